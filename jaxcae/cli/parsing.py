"""Options from a frozen dataclass by tyro, with errors of one line."""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_type_hints

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
    options: dict[str, Any] = {} if default is None else {"default": default}
    wants_help = "-h" in argv or "--help" in argv
    captured = _Box()
    with contextlib.ExitStack() as stack:
        if not wants_help:
            stack.enter_context(contextlib.redirect_stderr(captured))
            stack.enter_context(contextlib.redirect_stdout(captured))
        try:
            return tyro.cli(
                kind, args=list(argv), prog=prog, config=(tyro.conf.OmitArgPrefixes,), **options
            )
        except SystemExit as exit_:
            if wants_help or not exit_.code:
                raise
    known = list(_flags(kind))
    for argument in argv:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise InputError(f"unknown option {flag}; {hint}{prog} --help lists them all.")
    raise InputError(f"{_complaint(captured.getvalue())}; {prog} --help lists the options.")


class _Box(io.StringIO):
    """What tyro prints; told that it may draw its frames in UTF-8, which mark the lines."""

    encoding = "utf-8"


def _flags(kind: Any) -> Iterator[str]:
    """Name the options of a dataclass, those of dataclasses in it included."""
    hints, extras = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _flags(hints[field.name])
            continue
        marks = getattr(extras[field.name], "__metadata__", ())
        if tyro.conf.Suppress in marks:
            continue
        named = (name for mark in marks if (name := getattr(mark, "name", None)))
        name = next(named, field.name).replace("_", "-")
        yield f"--{name}"
        if hints[field.name] is bool:
            yield f"--no-{name}"


def with_options(text: str, kind: Any) -> str:
    """Name options of a command where a message names settings, which it puts in backticks.

    `epochs` becomes --epochs, `sizes=(6, 2)` becomes --sizes 6 2, `resume=True` becomes --resume.
    What is no option of this command stays as it is.
    """
    known = set(_flags(kind))

    def option(match: re.Match[str]) -> str:
        flag, value = f"--{match[1].replace('_', '-')}", match[2]
        if flag not in known:
            return match[0]
        if value in (None, "True"):
            return flag
        if value == "False":
            return f"--no-{flag[2:]}"
        return f"{flag} {re.sub('[(),]', '', value).strip(chr(39))}"

    return re.sub(r"`([a-z]\w*)(?:=([^`]*))?`", option, text)


def _complaint(box: str) -> str:
    """Say in a few words what tyro says in a box."""
    lines = []
    for line in box.splitlines():
        if line.startswith("│ ──"):
            break
        if line.startswith("│"):
            lines.append(line.strip("│").rstrip())
    sentence = " ".join(line.strip(_FRAME) for line in lines).strip().rstrip(".")
    if sentence.startswith("Missing from "):
        # What is missing stands four columns in, its help eight.
        names = [line.split()[0] for line in lines if re.match(r" {5}\S", line)]
        return f"needs {' and '.join(names)}"
    if value := re.match(r"Missing value for argument '(\S+)'", sentence):
        return f"{value[1]} needs a value"
    if value := re.match(r"Error parsing (\S+): .*(?:int\(\) .*|to float): ('.*')", sentence):
        return f"{value[1]} needs a number, got {value[2]}"
    return sentence[:1].lower() + sentence[1:]
