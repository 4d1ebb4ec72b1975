"""SIGINT and SIGTERM while a command works: the first asks, the second does not."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jaxcae.cli import SIGNALS, Leave, leave
from jaxcae.cli.encoding import any_encoding
from jaxcae.errors import InputError

GRACE = 3.0
"""Seconds that the work may take to come to an end by itself."""


class Interrupted(BaseException):
    """A signal came where there was nothing to save."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.exit_code = signum, 128 + signum


def run_process(main: Callable[[], int], prog: str) -> None:
    """Run `main` in any encoding, and end the process with the exit code that it returns.

    Bad input, and a device that is not there, are told in one line.

    After a failure or a signal Python does not take itself apart: it would wait for the threads of
    a failed save, and a library whose import was cut short may crash.
    """
    any_encoding()
    try:
        code = main()
    except Exception as error:
        from jaxcae.cli.device import unusable

        problem = str(error) if isinstance(error, InputError) else unusable()
        if problem is None:
            raise
        print(f"{prog}: {problem}", file=sys.stderr)
        code = 2
    if code in (0, 2) and not _others_wait():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _others_wait() -> bool:
    """Tell whether JAX would wait for other processes of the run, in vain, before it ends."""
    processes = sys.modules.get("jaxcae.devices.processes")
    return processes is not None and bool(processes.are_many())


@contextlib.contextmanager
def interruptible(grace: float = GRACE) -> Iterator[None]:
    """Let a signal raise `Interrupted` within, so that what was begun is cleaned up.

    In a process that does not listen (see `jaxcae.cli.listen`) nothing is changed.

    Args:
        grace: Seconds after which a signal ends the process where nothing came of the exception.
    """
    outside = signal.getsignal(signal.SIGINT)
    if not isinstance(outside, Leave):
        yield
        return
    came: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if came:
            leave(signum)
        came.append(signum)
        raise Interrupted(signum)

    with _watched(lambda signum: outside(signum), grace):
        for signum in SIGNALS:
            signal.signal(signum, handle)
        try:
            yield
        except Exception:
            if not came:
                raise
        finally:
            for signum in SIGNALS:
                signal.signal(signum, outside)
    if came:  # the exception was lost in a callback, or became another one on its way
        raise Interrupted(came[0]) from None


class StopRequest:
    """Listen for SIGINT and SIGTERM while in use as a context.

    Within `deferred` the first signal only sets `signum`, and the work decides where to stop;
    elsewhere it raises `Interrupted`. A second signal ends the process at once.

    Args:
        grace: Seconds after which work that has nothing to lose is not waited for any longer.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.signum: int | None = None
        self._deferred, self._grace = False, grace

    def __enter__(self) -> "StopRequest":
        self._before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @property
    def exit_code(self) -> int | None:
        """The exit code that the signal asks for, if one came."""
        return None if self.signum is None else 128 + self.signum

    @contextlib.contextmanager
    def deferred(self, at_stake: Callable[[], bool]) -> Iterator[None]:
        """Let the work within come to a good place by itself.

        Args:
            at_stake: Tells whether the work has done anything that is not on the disk; where it has
                not, and does not answer in time, the process ends.
        """

        def give_up(signum: int) -> None:
            if not at_stake():
                os.write(2, b"\nstopped before the first step; there was nothing to save\n")
                leave(signum)

        with _watched(give_up, self._grace):
            self._deferred = True
            try:
                yield
            finally:
                self._deferred = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            leave(signum)
        self.signum = signum
        if not self._deferred:
            raise Interrupted(signum)
        os.write(2, b"\nstopping: finishing the step and saving; once more to quit at once\n")


@contextlib.contextmanager
def _watched(give_up: Callable[[int], object], grace: float) -> Iterator[None]:
    """Call `give_up` where the work within goes on for `grace` seconds after a signal.

    Python calls a handler between two of its own instructions, and one of them may compile for a
    minute. A thread therefore hears of the signal too.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        while signum := os.read(reader, 1):
            if signum[0] in SIGNALS and not over.wait(grace):
                give_up(signum[0])

    watcher = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writer)  # the thread reads the end of the pipe
        watcher.join()
        os.close(reader)
