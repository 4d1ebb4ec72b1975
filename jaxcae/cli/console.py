"""What all that is printed has in common: streams, characters, numbers.

Three promises hold for it: no colour codes outside a terminal or under `NO_COLOR`, no table wider
than the terminal (80 columns in a pipe), and no character that the stream cannot encode.
"""

import math
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


def number(value: float, decimals: int | None = None) -> str:
    """Write a number for reading: four significant digits, thousands apart, no `1e+03`."""
    if not math.isfinite(value):
        return str(value)
    if decimals is None:
        if value == 0:
            return "0"
        exponent = math.floor(math.log10(abs(value)))
        if not -4 <= exponent < 7:
            return f"{value:.2e}".replace("-", "−")
        decimals = max(0, 3 - exponent)
    return f"{value:,.{decimals}f}".replace("-", "−")
