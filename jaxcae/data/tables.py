"""Which columns of a table are samples: by name wherever there are names, and never in silence."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxcae.data.times import Times
from jaxcae.data.values import Source
from jaxcae.errors import InputError, printable, unknown_name

LABEL_COLUMN = "label"
HEADERS = ("auto", "yes", "no")
MISSING = ("refuse", "mean", "drop")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "space": " ", "bar": "|"}
TEXT = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_OF_TEXT = ("header", "delimiter", "decimal")
DECIMALS = {"point": ".", "comma": ","}
# Names that often stand for a label, or for the number of a row, without case and punctuation.
_LABEL_LIKE = re.compile(
    "(is|normal)?(labels?|class(es)?|targets?|anomal(y|ies|ous)|outliers?|frauds?|attacks?|intrusions?"
    "|groundtruth|category|species)(label|id|cat|category|type|name)?"
)
_NUMBER_LIKE = re.compile("index|id|rowid|rownumber|unnamed0|level0|indexlevel0")


@dataclass(frozen=True)
class TableOptions:
    """How to read a table.

    Attributes:
        label_column: The column of labels; None takes a column `label` where there is one. In a
            table without names a column is called by its number, from 1. In a `.npz` it is the
            name of an array.
        drop: Columns to leave out.
        header: Whether the first line of a CSV names the columns: "yes", "no", or "auto", which
            takes it for names if no cell of it is a number, and refuses to guess where all are
            numbers that count.
        delimiter: What stands between the cells of a CSV: a word of `DELIMITERS` or one character;
            a space stands for any number of spaces and tabs. None is a comma, or a tab in a
            `.tsv`.
        decimal: The decimal mark, "point" or "comma".
        missing: What to do with missing cells (empty, or NA and the like; NaN in arrays): "refuse"
            them, leave out their rows ("drop"), or put the "mean" of the training split there.
        array: The array of samples in a `.npz` that holds several.
        names: The columns that are expected, in the order to give them; None takes all.
        optional: Names in `label_column`, `drop` and `array` that may be absent.
        time_column: The column of times, which is no feature: see `times`.
    """

    label_column: str | None = None
    drop: tuple[str, ...] = ()
    header: str = "auto"
    delimiter: str | None = None
    decimal: str = "point"
    missing: str = "refuse"
    array: str | None = None
    names: tuple[str, ...] | None = None
    optional: tuple[str, ...] = ()
    time_column: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the table.

        Raises:
            InputError: With the first option that is not usable.
        """
        for name, known in (("header", HEADERS), ("missing", MISSING), ("decimal", DECIMALS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(str(unknown_name(f"value of `{name}`", value, known)))
        if isinstance(self.drop, str) or not all(isinstance(name, str) for name in self.drop):
            raise InputError(f"`drop` must be a sequence of column names, got {self.drop!r:.80}.")
        mark = self.mark
        if mark is not None and (len(mark) != 1 or mark in "'\"\n\r.+-_" or mark.isalnum()):
            raise InputError(
                f"`delimiter` must be {', '.join(DELIMITERS)} or another character, got "
                f"{self.delimiter!r:.40}."
            )
        if mark == DECIMALS[self.decimal]:
            raise InputError(f"`delimiter` and `decimal` are both {mark!r}.")
        if self.time_column is not None and self.time_column in (self.label_column, *self.drop):
            raise InputError(f"`time_column` {self.time_column!r:.40} is labels, or left out, too.")

    @property
    def mark(self) -> str | None:
        """The character between cells, if one was asked for."""
        return DELIMITERS.get(self.delimiter or "", self.delimiter)

    def for_kind(self, kind: str) -> "TableOptions":
        """Return the options without those that say nothing about data of a kind.

        Args:
            kind: The ending of a file's name; "" for what is no file.
        """
        without = {} if kind in TEXT else {name: getattr(PLAIN, name) for name in _OF_TEXT}
        if kind != ".npz":
            without["array"] = None
        return replace(self, **without)

    def check_kind(self, source: Source, kind: str) -> None:
        """Refuse an option that says nothing about data of this kind.

        Raises:
            InputError: With the first of them.
        """
        usable = self.for_kind(kind)
        for name in (*_OF_TEXT, "array"):
            if getattr(self, name) != getattr(usable, name):
                belongs = "a .npz" if name == "array" else "text, such as a .csv"
                raise InputError(
                    f"{source}: `{name}` is about {belongs}, and says nothing here. Leave it out."
                )


PLAIN = TableOptions()


class Columns(NamedTuple):
    """What was taken from a table.

    Attributes:
        features: Where the features stand in the table, in the order to give them.
        label: Where the label stands, if there is one.
        names: Names of the features, if they have any.
        words: The same in words, for a person to check.
        time: Where the time stands, if there is one.
    """

    features: list[int]
    label: int | None
    names: tuple[str, ...] | None
    words: str
    time: int | None = None

    @property
    def beside(self) -> list[int]:
        """Where that stands which need not be numbers: label and time."""
        return [i for i in (self.label, self.time) if i is not None]


class Content(NamedTuple):
    """What was read from a table: the features in a matrix, and what stands beside them."""

    features: np.ndarray
    labels: np.ndarray | None
    times: Times | None
    columns: Columns


def choose_columns(
    source: Source, found: Sequence[str], options: TableOptions, *, named: bool = True
) -> Columns:
    """Choose label and features among the columns of a table.

    Args:
        source: What to name in front of an error.
        found: The names of the columns, or their numbers, from 1.
        options: What was asked for.
        named: Whether `found` are names.

    Raises:
        InputError: If a column is missing, comes twice, or is not known.
    """
    if named:
        _check_names(source, found, options)
    position = {name: i for i, name in enumerate(found)}
    time = options.time_column
    for name in (*options.drop, options.label_column, time):
        if name is not None and name not in position and name not in options.optional:
            raise InputError(f"{source}: {unknown_name('column', name, found[:50])}")
    time = time if time in position else None
    expected = options.names if named else None
    label = options.label_column
    if label is None and LABEL_COLUMN in position and LABEL_COLUMN not in (expected or ()):
        label = LABEL_COLUMN
    if label in options.drop or label not in position:
        label = None
    drop = set(options.drop)
    names = [name for name in found if name not in (label, time) and name not in drop]
    if expected is not None:
        _check_same(source, names, expected)
        names = list(expected)
    elif named:
        _hint(source, names)
    if not names:
        raise InputError(f"{source}: no features, only labels or dropped columns.")
    if options.names is not None and not named and len(names) == len(options.names):
        warnings.warn(_by_position(source, options.names), stacklevel=2)
    dropped = [name for name in found if name in drop]
    called = "column" if named else "column number"
    words = [
        f"label {called} {printable(label)[:40]}" if label is not None else "no label column",
        *([f"time {called} {printable(time)[:40]}"] if time is not None else []),
        *([f"without {_shown(dropped)}"] if dropped else []),
        f"{len(names)} feature{'s' if len(names) > 1 else ''}"
        + (f": {_shown(names)}" if named else ""),
    ]
    return Columns(
        [position[name] for name in names],
        None if label is None else position[label],
        tuple(names) if named else None,
        "; ".join(words),
        None if time is None else position[time],
    )


def nameless(source: Source, width: int, options: TableOptions) -> None:
    """Say what is assumed of columns without names, and refuse to find one by its name.

    Raises:
        InputError: If a column is to be found by name.
    """
    for name in (*options.drop, options.label_column, options.time_column):
        if name is not None and name not in options.optional:
            raise InputError(f"{source}: has no column names, so none is {name!r:.60}.")
    if options.names is not None and width == len(options.names):
        warnings.warn(_by_position(source, options.names), stacklevel=2)


def _by_position(source: Source, names: Sequence[str]) -> str:
    return f"{source}: has no column names; its columns are taken to be {_shown(names)}."


def _check_names(source: Source, names: Sequence[str], options: TableOptions) -> None:
    first: dict[str, int] = {}
    for column, name in enumerate(names, start=1):
        where = f"{source}, column {column}"
        if not name and name not in options.drop:
            raise InputError(
                f"{where}: the column has no name. If it counts the rows, as the index of a data "
                "frame does, `drop` the column '', or save without it."
            )
        if name in first:
            raise InputError(
                f"{where}: the column name {name[:40]!r} comes twice, first in column "
                f"{first[name]}. Rename one of them."
            )
        first[name] = column


def _check_same(source: Source, names: Sequence[str], expected: Sequence[str]) -> None:
    have, known = set(names), set(expected)
    absent = [name for name in expected if name not in have]
    unknown = [name for name in names if name not in known]
    if not (absent or unknown):
        return
    told = []
    if absent:
        told.append(f"{_shown(absent)} {'is' if len(absent) == 1 else 'are'} missing")
    if unknown:
        told.append(f"{_shown(unknown)} {'is' if len(unknown) == 1 else 'are'} not known to it")
    advice = " Use `drop` for what is not a feature." if unknown and not absent else ""
    raise InputError(
        f"{source}: the columns are not those of the run ({len(expected)} features): "
        f"{'; '.join(told)}.{advice}"
    )


def label_like(names: Sequence[str]) -> list[str]:
    """Return the names that often stand for labels."""
    return [name for name in names if _LABEL_LIKE.fullmatch(_bare(name))]


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _hint(source: Source, names: Sequence[str]) -> None:
    """Warn of features that look as if they were none."""
    for found, what, advice in (
        (label_like(names), "a label", "If it is one, use `label_column` or `drop`."),
        (
            [name for name in names if _NUMBER_LIKE.fullmatch(_bare(name))],
            "the number of a row",
            "If it is, use `drop`.",
        ),
    ):
        if found:
            warnings.warn(
                f"{source}: column {_shown(found)} is taken as a feature and looks like {what}. "
                f"{advice}",
                stacklevel=2,
            )


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name)[:40] or "''" for name in names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
