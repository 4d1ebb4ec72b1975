"""Many processes, one run: started together, deciding together, ended together.

Started by `jax.distributed`; what they compute together goes through JAX's collectives (gloo
between CPUs). Nothing that a process decides may rest on what only it knows, such as its clock: a
decision is process 0's (`agree`) or of all together (`any_process`). Where one process is lost,
the others would wait for it in a collective; `jaxcae.devices.peers` ends them, with one line.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np

from jaxcae.devices.peers import BEAT, Peers, listener
from jaxcae.errors import InputError, printable

PEER_TIMEOUT = 60.0
"""Seconds without a sign of life after which a process counts as stuck."""
_SHORTEST = 2 * BEAT
_ROOM = 256
"""Bytes by which what is exchanged grows: each size is a program of its own."""
_JOIN_SECONDS, _SHUTDOWN_SECONDS, _VERDICT_SECONDS = 60.0, 10, 3.0
_SUSPENDED_SECONDS = 7 * 24 * 3600
_LAUNCHERS = {
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Kubernetes": ("", "JOB_COMPLETION_INDEX"),
}
_peers: Peers | None = None
_prog, _advice = "jaxcae", ""


def launcher() -> str | None:
    """Name the launcher that started this process as one of several, or return None.

    SLURM, Open MPI and indexed jobs of Kubernetes are known by their environment. A step of one
    task is none of several, and neither is a shell in an allocation, which has no number.
    """
    for name, (count, index) in _LAUNCHERS.items():
        if index in os.environ and (not count or os.environ.get(count, "1") != "1"):
            return name
    return None


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    peer_timeout: float = PEER_TIMEOUT,
    prog: str = "jaxcae",
    advice: str = "",
    before: Callable[[], object] = lambda: None,
) -> bool:
    """Join the processes of a run; before the first use of a device.

    JAX's service and the connections between processes are not encrypted and ask nobody for a
    password: use them in a network that you trust. With `coordinator` they listen on that address
    alone. Without it JAX reads the launcher's environment (SLURM, Open MPI, Kubernetes), and its
    service listens on all addresses of the machine of process 0.

    Args:
        coordinator: HOST:PORT of process 0. Give all three, or none.
        num_processes: How many processes there are.
        process_id: The number of this one, from 0.
        peer_timeout: Seconds without a sign of life after which another process counts as stuck.
        prog: What the lines that this module writes begin with.
        advice: What to do where another process is lost, for the line that says so.
        before: Called when JAX knows of the others, and before the first use of a device.

    Returns:
        Whether there is more than one process.

    Raises:
        InputError: If the arguments are not usable, or the processes do not find together.
    """
    global _prog, _advice
    if not peer_timeout >= _SHORTEST:
        raise InputError(
            f"`peer_timeout` must be at least {_SHORTEST:g} seconds, got {peer_timeout!r}."
        )
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise InputError(
                f"{' and '.join(f'`{name}`' for name in missing)} must be given, too: the three "
                "of `coordinator`, `num_processes` and `process_id` go together."
            )
        if launcher() is None:
            raise InputError(
                "there is no launcher's environment here (SLURM, Open MPI, Kubernetes). Give "
                "`coordinator`, `num_processes` and `process_id`."
            )
    elif coordinator is not None:
        _check(coordinator, num_processes or 0, process_id or 0)
        if num_processes == 1:
            return False
    # JAX would take SIGTERM for itself, with a handler in C++.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=coordinator,
            # A job that is suspended for longer than this, as a whole, would be aborted.
            heartbeat_timeout_seconds=_SUSPENDED_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            cluster_detection_method="deactivate" if coordinator else None,
        )
    except Exception as error:
        raise InputError(
            f"the processes of the run do not find together: {_first_line(error)}. See that "
            "process 0 is started, that its address can be reached from here, and that its port "
            "is free."
        ) from error
    _prog, _advice = prog, advice
    before()
    if jax.process_count() == 1:
        return False
    _keep_stdout()
    _connect(coordinator, peer_timeout)
    return True


def everyone(value: Any) -> list[Any]:
    """Return the values of all processes in all of them, by process; anything JSON can hold.

    With one process, its value alone. All processes must call it, and in the same order.
    """
    if _peers is None:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.asarray(len(data), np.int32)).ravel()
    room = np.zeros(-(-int(sizes.max()) // _ROOM) * _ROOM, np.uint8)
    room[: len(data)] = data
    rows = process_allgather(room)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def agree(value: Any) -> Any:
    """Return process 0's value in every process; anything that JSON can hold.

    With one process, the value itself.
    """
    return value if _peers is None else everyone(value)[0]


def any_process(flag: int) -> int:
    """Return the largest of all processes' values, in each of them: of flags, whether any is set.

    With one process, the value itself.
    """
    return max(everyone(flag))


def first_does(do: Callable[[], Any], *errors: type[Exception]) -> Any:
    """Call a function in process 0 alone, and return what it returned in every process.

    Args:
        do: The function; it returns what JSON can hold.
        errors: What all processes raise if process 0 does. Of other errors the rest is not told:
            process 0 is about to end, and the others with it.
    """
    if _peers is None:
        return do()
    value, problem, own = None, None, None
    if is_first():
        try:
            value = do()
        except errors as error:
            own, problem = error, [_index(errors, error), str(error)]
    value, problem = agree([value, problem])
    if own is not None:
        raise own
    if problem is not None:
        raise errors[problem[0]](problem[1])
    return value


def is_first() -> bool:
    """Tell whether this is process 0, which owns files and screen; the only process is."""
    return _peers is None or jax.process_index() == 0


def are_many() -> bool:
    """Tell whether `start` has joined several processes."""
    return _peers is not None


def fail_fast(error: object, code: int = 1) -> NoReturn:
    """Say an error in one line, and end this process at once; the others end with its exit code.

    Neither JAX's shutdown, which waits for processes that will not come, nor Python's own is gone
    through.
    """
    leave(code, f"{_prog}: {printable(' '.join(str(error).split()))}")


def leave(code: int, line: str = "") -> NoReturn:
    """End this process at once, with or without a line; see `fail_fast`."""
    if _peers is not None:
        _peers.farewell(code)
    _exit(code, line)


def failed(code: int, lost: bool) -> None:
    """Tell the others that this process is about to end with an exit code other than 0.

    Args:
        code: The exit code.
        lost: Whether what failed may be the connection to another process. Then that process is
            waited for to be known as gone, which ends this one with a line that names it.
    """
    if _peers is None:
        return
    if lost:
        _peers.wait_for_first(_VERDICT_SECONDS)
    _peers.farewell(code)


def finish() -> None:
    """End together: the others wait here until process 0 is done with what only it does."""
    global _peers
    if _peers is None:
        return
    if is_first():
        _peers.farewell(0)
    else:
        _peers.wait_for_first()
        _peers.farewell(0)
    _peers = None
    with contextlib.suppress(Exception):  # one who is killed now has lost nothing
        jax.distributed.shutdown()


def _connect(coordinator: str | None, peer_timeout: float) -> None:
    """Connect this process to process 0 beside JAX's own connections."""
    global _peers
    me, count = jax.process_index(), jax.process_count()
    peers = _peers = Peers(me, count, peer_timeout, _on_ended)
    names = everyone(socket.gethostname())
    try:
        if coordinator is not None:
            host = coordinator.rpartition(":")[0].strip("[]")
        else:
            host = _address_towards(names) if me == 0 else ""
        server = listener(host) if me == 0 else None
        mine = [*server.getsockname()[:2], secrets.token_hex(16)] if server else None
        host, port, token = agree(mine)
        if server:
            peers.serve(server, token, _JOIN_SECONDS)
        else:
            peers.join(host, port, token, _JOIN_SECONDS)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the processes of the run cannot connect to process 0: {_first_line(error)}."
        ) from error


def _keep_stdout() -> None:
    """Give Python's stdout a descriptor of its own: gloo, which is C++, prints to the usual one."""
    old = sys.stdout
    old.flush()
    sys.stdout = open(  # noqa: SIM115
        os.dup(1),
        "w",
        encoding=old.encoding,
        errors=old.errors,
        buffering=1 if old.isatty() else -1,
    )
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _address_towards(names: list[str]) -> str:
    """Return the address of this machine that the machines of the others see."""
    others = [name for name in names if name != names[0]]
    if not others:
        return "127.0.0.1"
    kind, _, _, _, address = socket.getaddrinfo(others[0], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _index(errors: tuple[type[Exception], ...], error: Exception) -> int:
    return next(index for index, kind in enumerate(errors) if isinstance(error, kind))


def _on_ended(who: int, code: int, how: str) -> None:
    advice = f"; {_advice}" if code == 1 and _advice else ""
    _exit(code, f"{_prog}: process {who} of {jax.process_count()} {printable(how)}{advice}")


def _exit(code: int, line: str) -> NoReturn:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    if line:
        os.write(2, f"{line}\n".encode(sys.stderr.encoding or "utf-8", "backslashreplace"))
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"`coordinator` must be HOST:PORT, got {coordinator!r}.")
    if num_processes < 1:
        raise InputError(f"`num_processes` must be at least 1, got {num_processes}.")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"`process_id` must be from 0 to {num_processes - 1}, got {process_id}: processes are "
            "numbered from 0."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])[:200].rstrip('.') if lines else ''}"
