"""Cells of text: which are numbers, which are missing, and what the first line of a table is."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from jaxcae.data.tables import DELIMITERS, TableOptions
from jaxcae.data.values import Source, check_fits
from jaxcae.errors import InputError, printable

MISSING_WORDS = ("", *"na n/a #n/a <na> nan null none nil missing ? - .".split())
_WORDS = {mark: word for word, mark in DELIMITERS.items()}
_MARKS = {";": "';'", "\t": "tabs", "|": "'|'", " ": "spaces"}


def number(cell: str, options: TableOptions) -> float | None:
    """Return a cell as a number, NaN where it is missing and that is allowed, else None."""
    if options.missing != "refuse" and cell.strip().lower() in MISSING_WORDS:
        return math.nan
    if not cell.isascii() or "_" in cell:  # float("1_000") and float("٣") are Python, not data
        return None
    if options.decimal == "comma":
        if "." in cell:
            return None
        cell = cell.replace(",", ".")
    try:
        return float(cell)
    except ValueError:
        return None


def complaint(cell: str, options: TableOptions) -> str:
    """Say why a cell is no number, and what to do."""
    word = cell.strip()
    if word.lower() in MISSING_WORDS:
        what = "the cell is empty" if not word else f"{word[:40]!r} is not a number"
        return f"{what}. Fill it in, or use `missing='drop'` or `missing='mean'`."
    told = f"{cell[:40]!r} is not a number."
    for mark, name in _MARKS.items():
        if mark != " " and mark in cell:
            return f"{told} Cells are separated by {_named(options)}, not by {name}."
    if options.decimal == "point" and number(cell.replace(",", "."), options) is not None:
        return f"{told} If its comma is a decimal mark, use `decimal='comma'`."
    if ":" in cell or word.count("-") > 1 or word.count("/") > 1:
        return f"{told} If the column holds times, use `time_column`, or `drop` it."
    return told


def labels_of(source: Source, cells: Sequence[str], max_bytes: int | None) -> np.ndarray:
    """Return labels as whole numbers if all are, else as numbers if all are, else as text.

    Raises:
        InputError: If texts, which all take the room of the longest, would not fit.
    """
    try:
        numbers = np.array([float(cell) for cell in cells])
    except ValueError:
        texts = [cell.strip() for cell in cells]
        check_fits(source, 4 * len(texts) * max(map(len, texts)), max_bytes, "Shorten the labels. ")
        return np.array(texts)
    whole = bool((np.abs(numbers) < 2**53).all()) and bool((numbers == np.round(numbers)).all())
    return numbers.astype(np.int64) if whole else numbers


def check_first(source: Source, cells: list[str], delimiter: str, options: TableOptions) -> None:
    """Refuse a first line that no table of ours begins with."""
    if is_blank(cells):
        raise InputError(f"{source}: line 1 is blank.")
    if cells[0].lstrip().startswith("#"):
        raise InputError(
            f"{source}: line 1 begins with '#': a comment, or names behind a mark. Remove the line "
            "or the mark."
        )
    if mark := other_separator(cells, delimiter, options):
        raise InputError(
            f"{source}: line 1 is separated by {_MARKS[mark]}, expected {_named(options)}. "
            f"Use `delimiter={_WORDS[mark]!r}`."
        )


def other_separator(cells: list[str], delimiter: str, options: TableOptions) -> str | None:
    """Return the mark that seems to separate cells, if it is not the delimiter."""
    line = delimiter.join(cells)
    for mark in _MARKS:
        if mark == delimiter or mark not in line.strip():
            continue
        if mark in ";\t" or len(cells) == 1:
            parts = line.split(mark) if mark != " " else line.split()
            # Spaces and bars occur in names; between numbers they separate.
            if mark in ";\t" or all(number(p, options) is not None for p in parts):
                return mark
    return None


def is_header(
    source: Source, cells: list[str], below: Sequence[list[str]], options: TableOptions
) -> bool:
    """Tell whether the first line holds names; refuse where that would be a guess.

    Args:
        source: What to name in front of an error.
        cells: The first line.
        below: The next lines, as many as one cares to look at.
        options: What was asked for.
    """
    if options.header != "auto":
        return options.header == "yes"
    numbers = [number(cell, options) for cell in cells]
    known = [value for value in numbers if value is not None and not math.isnan(value)]
    if not known:
        words = [cell.strip().lower() for cell in cells]
        for column, word in enumerate(words, start=1):
            if word and word in MISSING_WORDS:
                raise InputError(
                    f"{source}: line 1, column {column}: {word.upper()!r} is neither a "
                    "number nor the name of a column. Use `header='yes'` if it is a name."
                )
        return True
    steps = _steps(known)
    if not cells[0].strip() and len(known) == len(cells) - 1 and known[0] == 0:
        raise InputError(
            f"{source}: line 1, column 1 has no name and the others are called 0, 1, …, as in a "
            "data frame saved with its index. Save it without the index, or use "
            "`header='yes'` and `drop` the column ''."
        )
    # Numbers in even steps, and lines below that are not: 0, 1, 2, or years, or wavelengths. Two
    # numbers always have an even step, so those must be whole and follow each other.
    whole = all(cell.strip().isdecimal() for cell in cells)
    even = len(steps) == 1 and 0 not in steps and len(known) == len(cells)
    if even and below and (len(cells) > 2 or (whole and steps == {1.0})):
        rows = [[number(cell, options) for cell in row] for row in below]
        alike = any(None not in row and _steps(row) == steps for row in rows)  # type: ignore[arg-type]
        if not alike or (whole and known[0] == 0 and steps == {1.0}):
            shown = printable(", ".join(cell.strip() for cell in cells[:4]))[:40]
            raise InputError(
                f"{source}: line 1 reads {shown}{', …' if len(cells) > 4 else ''}: numbers of "
                "columns, or a sample? Say which with `header='yes'` or `header='no'`."
            )
    return False


def is_blank(cells: list[str]) -> bool:
    """Tell whether a line holds nothing."""
    return len(cells) < 2 and not "".join(cells).strip()


def _named(options: TableOptions) -> str:
    mark = options.mark or ","
    return "commas" if mark == "," else _MARKS.get(mark, repr(mark))


def _steps(row: Sequence[float]) -> set[float]:
    return {round(b - a, 9) for a, b in pairwise(row)}
