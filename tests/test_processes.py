"""Several processes that are one run: real ones, over loopback."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from jaxcae.devices import processes
from jaxcae.errors import InputError

PATIENCE = 240.0
"""Seconds to wait for what should have come long ago."""

WORK = """
import sys, time
from jaxcae.devices import processes as p
port, count, me, then = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
p.start(f"127.0.0.1:{port}", count, me, peer_timeout=3, prog="run", advice="again")
long = p.first_does(lambda: "x" * 300)
print(p.agree({"mine": me}), p.any_process(me), p.everyone(me), len(long))
sys.stdout.flush()
try:
    while p.any_process(1):
        time.sleep(0.01)
        if then == "finish":
            p.finish()
            break
        if then == "fail" and me == 1:
            p.fail_fast("the disk is full", 2)
except Exception as error:
    p.failed(1, lost=True)
    print("nobody knew of", error, file=sys.stderr)
    sys.exit(1)
"""


class Group:
    """Processes that are started together, and never outlive the test."""

    def __init__(self, commands: list[list[str]]):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        self.members = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            for command in commands
        ]

    def ended(self, but: int = -1, within: float = PATIENCE) -> list[tuple[int, str, str]]:
        """Wait for all members (but one) to end; return exit codes, stdout and stderr."""
        deadline = time.monotonic() + within
        found = []
        for number, member in enumerate(self.members):
            if number != but:
                out, err = member.communicate(timeout=max(0.1, deadline - time.monotonic()))
                found.append((member.returncode, out, err))
        return found

    def close(self) -> None:
        for member in self.members:
            member.kill()
            member.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Group]]:
    groups = []

    def begin(count: int, command: Callable[[int, int], list[str]]) -> Group:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        groups.append(Group([command(port, number) for number in range(count)]))
        return groups[-1]

    yield begin
    for group in groups:
        group.close()


def at_work(count: int, then: str) -> Callable[[int, int], list[str]]:
    return lambda port, me: [sys.executable, "-c", WORK, str(port), str(count), str(me), then]


def own_lines(err: str) -> list[str]:
    """Leave out what gloo and XLA write by themselves."""
    return [line for line in err.splitlines() if line.startswith(("run:", "nobody", "Traceback"))]


def lost(start: Callable[..., Group], count: int, which: int, signum: int) -> list[str]:
    """Send a signal to one process at work; return the others' lines."""
    group = start(count, at_work(count, "go on"))
    for member in group.members:
        assert member.stdout is not None
        assert member.stdout.readline() == f"{{'mine': 0}} {count - 1} {list(range(count))} 300\n"
    time.sleep(0.2)
    began = time.monotonic()
    group.members[which].send_signal(signum)
    others = group.ended(but=which)
    assert time.monotonic() - began < (5 if signum == signal.SIGKILL else 20)
    assert [code for code, _, _ in others] == [1] * (count - 1)
    lines = [own_lines(err) for _, _, err in others]
    assert [len(line) for line in lines] == [1] * (count - 1), lines
    return [line for (line,) in lines]


def test_processes_decide_together_and_know_at_once_who_is_gone(start):
    """Killed with -9: the other ends within five seconds, with exit code 1 and one line."""
    assert lost(start, 2, 1, signal.SIGKILL) == ["run: process 1 of 2 is gone; again"]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 2])
def test_every_one_of_three_hears_who_is_gone(start, which):
    """Process 0 too, which the others know best; JAX may say more then, and no less than we."""
    assert (
        lost(start, 3, which, signal.SIGKILL) == [f"run: process {which} of 3 is gone; again"] * 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_is_stopped_is_not_waited_for_for_ever(start, which):
    """SIGSTOP: its connections stay, and only its beat is missing."""
    assert (
        lost(start, 3, which, signal.SIGSTOP)
        == [f"run: process {which} of 3 has given no sign of life for 3 s; again"] * 2
    )


@pytest.mark.slow
def test_processes_end_together(start):
    """All with 0, and nothing on stdout that is not ours."""
    for code, out, err in start(2, at_work(2, "finish")).ended():
        assert (code, own_lines(err)) == (0, [])
        assert len(out.splitlines()) == 1


@pytest.mark.slow
def test_the_exit_code_of_one_is_that_of_all(start):
    found = start(3, at_work(3, "fail")).ended()
    assert [code for code, _, _ in found] == [2, 2, 2]
    told = "run: process 1 of 3 ended with exit code 2"
    assert [own_lines(err) for _, _, err in found] == [[told], ["run: the disk is full"], [told]]


def test_one_process_agrees_with_itself():
    value = {"a": [1.5, None]}
    assert processes.agree(value) is value
    assert processes.everyone(3) == [3]
    assert processes.any_process(0) == 0
    assert processes.first_does(lambda: 4) == 4
    assert processes.is_first()
    assert not processes.are_many()
    processes.finish()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),  # a shell in an allocation
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI"),
        ({"JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_a_launcher_is_known_by_its_environment(monkeypatch, environment, expected):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.launcher() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:80",), "`num_processes` and `process_id` must be given"),
        (("127.0.0.1", 2, 0), "HOST:PORT"),
        (("127.0.0.1:port", 2, 0), "HOST:PORT"),
        (("127.0.0.1:80", 0, 0), "`num_processes` must be at least 1"),
        (("127.0.0.1:80", 2, 2), "`process_id` must be from 0 to 1"),
        ((), "no launcher's environment"),
        (("127.0.0.1:80", 2, 0, 1.0), "`peer_timeout` must be at least 2 seconds"),
    ],
)
def test_what_cannot_be_started_is_refused_in_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr(processes, "launcher", lambda: None)
    with pytest.raises(InputError, match=re.escape(message)):
        processes.start(*arguments[:3], **dict(zip(["peer_timeout"], arguments[3:], strict=False)))
