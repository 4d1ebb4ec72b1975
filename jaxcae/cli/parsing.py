"""Options from a frozen dataclass by tyro, with errors of one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

from jaxcae.errors import InputError

T = TypeVar("T")

_FRAME = "╭╮╰╯│─ "


def parse(kind: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Read the options of a command.

    Args:
        kind: The dataclass of options; docstrings are the help.
        argv: What came after the name of the command.
        prog: The name to show.
        default: Values of the options that are not given; those of `kind` unless told.

    Raises:
        InputError: If an option is unknown or its value unusable.
        SystemExit: After showing the help.
    """
    options = {} if default is None else {"default": default}
    wants_help = "-h" in argv or "--help" in argv
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(sys.stderr if wants_help else errors):
            return tyro.cli(
                kind, args=list(argv), prog=prog, config=(tyro.conf.OmitArgPrefixes,), **options
            )
    except SystemExit as exit_:
        if wants_help or not exit_.code:
            raise
        raise InputError(_one_line(errors.getvalue(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    """Take the sentence and the suggested options out of the box that tyro draws."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines():
        if line.startswith("│ ──"):
            paragraphs.append([])
        elif line.startswith("│"):
            paragraphs[-1].append(line.strip(_FRAME))
    sentence = " ".join(paragraphs[0]).strip().rstrip(".")
    suggested = [
        flag
        for paragraph in paragraphs[1:]
        if paragraph and paragraph[0].startswith("Perhaps")
        for flag in re.findall(r"--[a-z][a-z0-9-]*", " ".join(paragraph))
    ]
    hint = f"did you mean {suggested[0]}? " if suggested else ""
    return f"{sentence[:1].lower()}{sentence[1:]}; {hint}see {prog} --help."
