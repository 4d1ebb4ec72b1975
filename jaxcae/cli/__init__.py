"""The command line: `jaxcae COMMAND [OPTIONS]`; see `jaxcae.cli.command`.

This file is what a process runs first, so it imports nothing but what it takes to listen for
signals: JAX takes a second or more to import, and a signal meanwhile must not end in a traceback.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # as in `typing`, without the price of importing it
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Leave:
    """The handler while there is nothing to save or to clean up: one line, and the process ends.

    An exception would pass through whatever is being imported; through C code it may be lost, or
    end in a crash.
    """

    def __init__(self, prog: str):
        """Make a handler that says the name of the program."""
        self.prog = prog

    def __call__(self, signum: int, frame: object = None) -> None:
        """End the process."""
        os.write(2, f"{self.prog}: stopped by {signal.Signals(signum).name}\n".encode())
        leave(signum)


before_leaving: "list[Callable[[int], None]]" = []
"""Called with the exit code before a signal ends the process: other processes may wait for it."""


def leave(signum: int) -> None:
    """End the process at once, as after a signal."""
    for tell in before_leaving:
        tell(128 + signum)
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(128 + signum)


def listen(prog: str) -> None:
    """Listen for SIGINT and SIGTERM from now to the end of the process."""
    import atexit

    for signum in SIGNALS:
        signal.signal(signum, Leave(prog))
    # Registered first and so called last: the work is done, and Python takes itself apart.
    atexit.register(lambda: [signal.signal(signum, signal.SIG_IGN) for signum in SIGNALS])


def entry() -> None:
    """Run the command as a process of its own."""
    listen("jaxcae")
    from jaxcae.cli.interrupts import run_process

    if "--debug" not in sys.argv:
        # Where a save failed, threads of TensorStore may still finish writes that nobody waits for,
        # and find the event loop gone. There is nobody to raise that to; Python would print it
        # below, or into, the line that matters.
        sys.unraisablehook = lambda _: None
    run_process(main, "jaxcae")


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run a command and return its exit code.

    0 done; 1 failed while running; 2 misuse or bad input; 130 or 143 after SIGINT or SIGTERM.
    """
    from jaxcae.cli.command import run

    return run(argv)
