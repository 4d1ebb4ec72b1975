"""SIGINT and SIGTERM: the first asks, the second does not."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Interrupted(BaseException):
    """A signal came where there was nothing to save."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopRequest:
    """Listen for SIGINT and SIGTERM while in use as a context.

    Within `deferred` the first signal only sets `signum`, and the work decides where to stop;
    elsewhere it raises `Interrupted`. A second signal ends the process at once.

    Args:
        grace: Seconds after which work that has nothing to lose is not waited for any longer.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, grace: float = 3.0) -> None:
        self.signum: int | None = None
        self._deferred, self._grace = False, grace

    def __enter__(self) -> "StopRequest":
        self._before = {signum: signal.signal(signum, self._handle) for signum in self._SIGNALS}
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

        Python calls a handler between two of its own instructions, and one of them may compile for
        a minute. A thread therefore hears of the signal too, and ends the process where the work
        does not answer in time and has nothing to lose.

        Args:
            at_stake: Tells whether the work has done anything that is not on the disk.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(reader, over, at_stake), daemon=True)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher.start()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            over.set()
            signal.set_wakeup_fd(before)
            os.close(writer)  # the thread reads the end of the pipe
            watcher.join()
            os.close(reader)

    def _watch(self, reader: int, over: threading.Event, at_stake: Callable[[], bool]) -> None:
        while signum := os.read(reader, 1):
            if signum[0] in self._SIGNALS and not over.wait(self._grace) and not at_stake():
                os.write(2, b"\nstopped before the first step; there was nothing to save\n")
                _leave(signum[0])

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            _leave(signum)
        self.signum = signum
        if not self._deferred:
            raise Interrupted(signum)
        os.write(2, b"\nstopping: finishing the step and saving; once more to quit at once\n")


def _leave(signum: int) -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(128 + signum)
