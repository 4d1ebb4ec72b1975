"""SIGINT and SIGTERM: the first asks, the second does not."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
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
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferred = False

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
    def deferred(self) -> Iterator[None]:
        """Let the work within come to a good place by itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
            os._exit(128 + signum)
        self.signum = signum
        if not self._deferred:
            raise Interrupted(signum)
        os.write(2, b"\nstopping: finishing the step and saving; once more to quit at once\n")
