"""What all that is printed has in common: streams and characters.

Three promises hold for it: no colour codes outside a terminal or under `NO_COLOR`, no table wider
than the terminal (80 columns in a pipe), and no character that the stream cannot encode.
"""

import sys
from typing import IO, Any, Protocol, cast, runtime_checkable

from rich.console import Console, RenderableType


@runtime_checkable
class Stream(Protocol):
    """What can be printed to."""

    def write(self, text: str, /) -> Any: ...

    def flush(self) -> Any: ...


def print_result(result: RenderableType, file: Stream | None = None) -> None:
    """Print a table or text on stdout, without colour codes unless stdout is a terminal."""
    stream = file or sys.stdout
    console = make_console(stream)
    with console.capture() as capture:
        console.print(result)
    # Rich pads every line to the full width of a table; a file needs no trailing blanks.
    text = capture.get()
    if not console.is_terminal:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    stream.write(text)
    stream.flush()


def make_console(file: Stream) -> Console:
    """Make a rich console that guesses nothing from the values it prints."""
    return Console(file=cast(IO[str], file), markup=False, highlight=False, emoji=False)
