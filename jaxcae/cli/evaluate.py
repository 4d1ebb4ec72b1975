"""`jaxcae evaluate`: scores that were written and labels in, what they are worth out."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from jaxcae.cli.device import OnDevice
from jaxcae.data import TableOptions, load_as
from jaxcae.data.series import Series, open_series
from jaxcae.data.times import Times
from jaxcae.errors import InputError, printable
from jaxcae.files import open_regular
from jaxcae.runs import Config, read_config

_BUFFER = 100


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Measure scores against labels: areas under curves, events found, false alarms.

    Beside them, of a series, stand simpler detectors on the same rows: PCA, the nearest training
    window, an isolation forest (these need --run), |difference| and random numbers.
    """

    scores: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCORES")]
    """What jaxcae score wrote: a .csv."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The data that was scored, with labels: a file or the name of a data set."""
    label_column: str | None = None
    """Column of labels; `label` where there is one, or that of the run."""
    run: Path | None = None
    """The run that scored a series: simpler detectors train on the rows that it trained on, and
    these rows are not evaluated."""
    since: str | None = None
    """Evaluate from this ROW or TIME on; of the run's own series from the end of its training."""
    normal_label: str | None = None
    """Label of normal rows; 0, false or normal, or that of the run."""
    time_column: str | None = None
    """Column of times, by which rows are found in SCORES; that of the run, or the one that SCORES
    begins with."""
    buffer: int | None = None
    """Rows of the longest buffer of VUS-PR; a window of the run, or 100."""
    drop: tuple[str, ...] = ()
    """Columns of FILE to leave out."""
    delimiter: str | None = None
    """What separates the cells of a CSV."""
    decimal: str = "point"
    """Decimal mark of a CSV: point or comma."""
    max_bytes: int | None = None
    """Refuse files that would take more memory than this; half the memory by default."""
    json: bool = False
    """Print the figures as JSON."""


class _Written(NamedTuple):
    """What SCORES holds: one row of it for each row of the data."""

    key: str
    times: Times
    scores: dict[str, np.ndarray]
    alarms: np.ndarray | None


def run(arguments: Arguments) -> int:
    """Measure, and print the figures."""
    if arguments.buffer is not None and arguments.buffer < 0:
        raise InputError(f"`buffer` must be at least 0, got {arguments.buffer!r}.")
    written = _read_scores(arguments)
    config = None if arguments.run is None else read_config(arguments.run)
    if config is not None and config.series.window is None:
        raise InputError(f"`run` {arguments.run}: was trained on rows; it is needed for series.")
    series = _open(arguments, written, config)
    labels = series.anomalous
    if labels is None:
        raise InputError(f"{series.name}: has no labels. Name their column by `label_column`.")
    rows = _matched(arguments, series, written)
    scores: dict[str, Any] = {name: values[rows] for name, values in written.scores.items()}
    alarms = {} if written.alarms is None else {"score": written.alarms[rows]}
    note, first = "", 0
    is_series = "score" in scores
    if is_series:
        others, first, note = _beside(arguments, series, config)
        scores |= others
    if arguments.since is not None:
        first = _since(arguments.since, series)
    from jaxcae.results.detection.comparison import compare

    size = None if config is None else config.series.window
    buffer = (
        (arguments.buffer if arguments.buffer is not None else size or _BUFFER)
        if is_series
        else None
    )
    try:
        result = compare(
            labels[first:],
            {name: values[first:] for name, values in scores.items()},
            buffer,
            {name: values[first:] for name, values in alarms.items()},
        )
    except InputError as error:
        raise InputError(f"{series.name}, rows from {first:,} on: {error}") from None
    result["first_row"] = first
    if arguments.json:
        print(json.dumps(result, allow_nan=False))
        return 0
    from jaxcae.cli.console import print_result
    from jaxcae.cli.quality import quality_table

    print_result(quality_table(result, f"{series.name}, from row {first:,}"))
    if note:
        print(note, file=sys.stderr)
    return 0


def _read_scores(arguments: Arguments) -> _Written:
    """Read what `jaxcae score` wrote; times are whatever the first column holds."""
    path = arguments.scores
    if path.suffix.lower() != ".csv":
        raise InputError(f"{path}: expected scores as .csv, as jaxcae score writes them.")
    with open_regular_text(path) as file:
        names = [name.strip() for name in file.readline(1 << 20).rstrip("\r\n").split(",")]
    kinds = ("score", "reconstruction_error", "jacobian_norm")
    found = [name for name in kinds if name in names]
    if not found:
        raise InputError(
            f"{path}: has no column {', '.join(kinds[:-1])} or {kinds[-1]}: not scores that jaxcae "
            "score wrote."
        )
    keyed = names[0] not in kinds
    table = TableOptions(header="yes", missing="mean", time_column=names[0] if keyed else None)
    data = load_as(path, table, max_bytes=arguments.max_bytes, standardize=True)
    assert data.feature_names is not None
    columns = dict(zip(data.feature_names, data.features.T, strict=True))
    times = data.times or Times(np.arange(len(data)))
    alarms = columns["alarm"] > 0 if "alarm" in columns and found[0] == "score" else None
    scores = {name: columns[name] for name in (found[:1] if found[0] == "score" else found)}
    return _Written(names[0] if keyed else "row", times, scores, alarms)


def open_regular_text(path: Path) -> Any:
    """Open a regular file as text."""
    return open(open_regular(path), encoding="utf-8-sig", errors="replace")


def _open(arguments: Arguments, written: _Written, config: Config | None) -> Series:
    """Load the data as the run does, but for what is asked otherwise."""
    table = TableOptions() if config is None else config.data.table
    label = arguments.label_column or table.label_column
    key = None if written.key == "row" else written.key
    time = arguments.time_column or table.time_column or key
    options = TableOptions(
        label_column=label,
        drop=tuple(dict.fromkeys((*table.drop, *arguments.drop))),
        header=table.header,
        delimiter=arguments.delimiter or table.delimiter,
        decimal=arguments.decimal if config is None else table.decimal,
        missing="mean",
        array=table.array,
        names=table.names,
        optional=tuple(n for n in (*table.drop, table.label_column) if n and n != label),
        time_column=time,
    )
    return open_series(
        arguments.data,
        options,
        max_gap=1.5 if config is None else config.series.max_gap,
        normal_label=arguments.normal_label
        or (None if config is None else config.series.normal_label),
        max_bytes=arguments.max_bytes,
    )


def _matched(arguments: Arguments, series: Series, written: _Written) -> Any:
    """Return where in SCORES each row of the data is.

    Raises:
        InputError: If there is another number of rows, or a row is of another time.
    """
    have, want = len(written.times.values), len(series)
    path = arguments.scores
    if have != want:
        raise InputError(f"{path}: has scores of {have:,} rows, {series.name} has {want:,}.")
    if series.times is not None and written.key != "row":
        other, own = written.times.values, series.times.values
        if other.dtype.kind != own.dtype.kind or (other != own).any():
            row = 0 if other.dtype.kind != own.dtype.kind else int(np.flatnonzero(other != own)[0])
            raise InputError(
                f"{path}: row {row} (from 0) is of {printable(written.times.text(row))}, in "
                f"{series.name} it is of {printable(series.times.text(row))}: other data."
            )
    return slice(None)


def _since(since: str, series: Series) -> int:
    from jaxcae.data.times import row_of

    return 0 if since.strip() == "0" else row_of(since, series.times, len(series), "since")


def _beside(
    arguments: Arguments, series: Series, config: Config | None
) -> tuple[dict[str, Any], int, str]:
    """Return scores of simpler detectors, the first row to evaluate, and what to say of it."""
    from jaxcae.results.detection.baselines import untrained
    from jaxcae.results.detection.comparison import simpler
    from jaxcae.runs.windowed import load_parts, sha256_of_rows

    if config is None:
        return (
            untrained(series.values, series.segments(~np.isnan(series.values).any(1))),
            0,
            "With the --run that scored, PCA, 1-NN and an isolation forest stand beside it, and "
            "rows that it trained on are left out.",
        )
    settings = config.series
    own = sha256_of_rows(series.values[: settings.train_rows]) == settings.digest
    source = series.dataset if own else config.data.source
    try:
        parts = load_parts(config, arguments.max_bytes, source)
        if sha256_of_rows(parts.series.values[: parts.train_rows]) != settings.digest:
            raise InputError(f"{config.data.source}: is not what the run was trained on.")
    except InputError as error:
        raise InputError(f"simpler detectors need the data of the run: {error}") from None
    others = simpler(parts, settings.window or 1, series, config.training.seed)
    return others, settings.train_rows if own else 0, ""
