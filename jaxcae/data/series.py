"""A series as a detector takes it: rows in time, which of them are normal, where it has gaps."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcae.data import load_as
from jaxcae.data.dataset import Dataset
from jaxcae.data.segments import segments
from jaxcae.data.tables import TableOptions
from jaxcae.data.times import MAX_GAP, Times, check_ascending, row_of, sampling
from jaxcae.errors import InputError, printable

_NORMAL_WORDS = ("0", "false", "no", "normal", "nominal", "ok")


@dataclass(frozen=True)
class Series:
    """Rows in time.

    Attributes:
        values: Shape (rows, channels), in the units of the source; NaN where a value is missing.
        times: One a row, ascending; None where rows are all that is known.
        starts: The rows at which another recording begins, the first left out.
        train_rows: Its first rows, which are for training, where the source says so.
        dataset: Where it came from.
        max_gap: How many median steps a step may be long without being a gap.
        normal_label: The label of normal rows, where it is none that is known.
    """

    values: Float[np.ndarray, "rows channels"]
    times: Times | None
    starts: tuple[int, ...]
    train_rows: int | None
    dataset: Dataset
    max_gap: float = MAX_GAP
    normal_label: str | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def name(self) -> str:
        """What errors name: the path, or the name of a named series."""
        data = self.dataset
        return data.name if data.series is not None else data.source

    @functools.cached_property
    def anomalous(self) -> Bool[np.ndarray, " rows"] | None:
        """Which rows the labels call anomalous; None without labels.

        Raises:
            InputError: If they do not tell; see `anomalies`.
        """
        labels = self.dataset.labels
        return None if labels is None else anomalies(self.name, labels, self.normal_label)

    @property
    def sampling(self) -> str:
        """How it is sampled, in words; nothing without times."""
        return "" if self.times is None else sampling(self.times, self.max_gap)

    def rows_before(self, until: str | None) -> int:
        """Return how many rows come before a row or a time; all, or those for training, by default.

        Raises:
            InputError: If it is neither, or no row does.
        """
        if until is None:
            return len(self) if self.train_rows is None else self.train_rows
        return row_of(until, self.times, len(self))

    def segments(self, usable: Bool[np.ndarray, " rows"]) -> Int[np.ndarray, "segments 2"]:
        """Return the stretches of usable rows that no gap interrupts, as half-open ranges.

        Args:
            usable: Which rows windows may take.

        Raises:
            InputError: If there is none.
        """
        if not usable.any():
            raise InputError(f"{self.name}: no row is left to take windows from.")
        # Only where something is usable: the rest need not have a value.
        known = np.where(usable, 0.0, np.nan)
        times = None if self.times is None else self.times.values
        ranges = segments(known, times, gap=self.max_gap)
        for start in self.starts:
            cut = (ranges[:, 0] < start) & (start < ranges[:, 1])
            for first, stop in ranges[cut].tolist():
                ranges = np.concatenate([ranges[~cut], [[first, start], [start, stop]]])
                ranges = ranges[np.argsort(ranges[:, 0])]
        return ranges


def open_series(
    source: Any,
    table: TableOptions,
    *,
    max_gap: float = MAX_GAP,
    normal_label: str | None = None,
    max_bytes: int | None = None,
) -> Series:
    """Load a series: a named one, a file, a data frame or a `Dataset`.

    Args:
        source: What to load; see `jaxcae.data.load`.
        table: How its columns are read. Where missing cells are not refused they become NaN, and
            rows stay where they are.
        max_gap: How many median steps a step may be long without being a gap.
        normal_label: The label of normal rows; 0, false or normal unless given.
        max_bytes: Refuse what would take more memory than this; half the memory by default.

    Raises:
        InputError: If it is not usable, such as for times that do not ascend.
    """
    if isinstance(source, Dataset):
        data = source
    else:
        kept = replace(table, missing="refuse" if table.missing == "refuse" else "mean")
        data = load_as(source, kept, max_bytes=max_bytes, standardize=True)
    name = data.name if data.series is not None else data.source
    if data.times is not None:
        check_ascending(name, data.times)
    usage = data.series
    return Series(
        data.features.astype(np.float64, copy=False),
        data.times,
        () if usage is None else usage.starts,
        None if usage is None else usage.train_rows,
        data,
        max_gap,
        normal_label,
    )


def anomalies(name: str, labels: Any, normal_label: str | None = None) -> Bool[np.ndarray, " rows"]:
    """Tell which rows labels call anomalous: those that are not the label of normal rows.

    Args:
        name: What to name in front of an error.
        labels: Numbers, truth values or texts.
        normal_label: The label of normal rows; 0, false, no, normal, nominal or ok unless given.

    Raises:
        InputError: If no row has that label, or it is not given and cannot be told.
    """
    values = np.asarray(labels)
    texts = np.array([_text(value) for value in values])
    known = np.unique(texts)
    wanted = (normal_label.strip().lower(),) if normal_label is not None else _NORMAL_WORDS
    found = [text for text in known if text in wanted]
    shown = ", ".join(printable(text)[:20] for text in known[:6]) + ", …" * (len(known) > 6)
    if not found:
        asked = "none is 0, false or normal" if normal_label is None else f"none is {wanted[0]!r}"
        raise InputError(
            f"{name}: the labels are {shown}; {asked}. Say which one normal rows have by "
            "`normal_label`."
        )
    if normal_label is None and len(known) > 2 and values.dtype.kind not in "iufb":
        raise InputError(
            f"{name}: the labels are {shown}. Say which one normal rows have by `normal_label`."
        )
    return ~np.isin(texts, found)


def _text(value: Any) -> str:
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    return str(number).strip().lower()
