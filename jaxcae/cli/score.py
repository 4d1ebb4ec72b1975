"""`jaxcae score`: a trained run and a file in, one row of scores per sample out."""

import io
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from jaxcae.cli.device import OnDevices
from jaxcae.cli.named import open_named_run
from jaxcae.cli.score_checks import check_asked, check_series
from jaxcae.data import CATALOGUE, NpySource, Preparation, TableOptions, load_as
from jaxcae.data.readers import kind_of
from jaxcae.data.tables import nameless
from jaxcae.errors import InputError, printable
from jaxcae.files import write_atomic
from jaxcae.results.scores import Scores, score_in_chunks, scores
from jaxcae.runs import Run
from jaxcae.runs.config import PLAIN, Config, main_network
from jaxcae.runs.material import is_narrow

COLUMNS = ("reconstruction_error", "jacobian_norm")


@dataclass(frozen=True)
class Arguments(OnDevices):
    """Score samples: how badly each is rebuilt, and how strongly its code reacts (‖J‖_F).

    A high reconstruction error marks samples unlike the training data. ‖J‖_F is how far a small
    step in the input moves the code: only of a network trained with the penalty is a high value a
    sign of that too, and of a plain one often the opposite. A sample's scores do not depend on the
    other samples in the file.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The directory of a finished run."""
    data: str | None = None
    """What to score: a .npy, .npz or .csv with the run's features, or the name of a data set."""
    output: Path | None = None
    """Where to write the scores: .csv with a header, or .npy of two columns; of a series .csv. It
    is replaced."""
    events: Path | None = None
    """Of a series: where to write the events that alarms make, as .csv."""
    alpha: float | None = None
    """Of a series: the share of normal rows that may raise an alarm; 0.01, or the least that the
    run's calibration can hold."""
    plots: Path | None = None
    """Of a series: a folder for pictures of its scores and of the strongest events."""
    follow: bool = False
    """Of a series: read rows as CSV from standard input, with a header, and write their scores to
    standard output as they come. Scores are of the rows so far, and see less than half as much."""
    time_column: str | None = None
    """Column of times; that of the run by default."""
    model: str | None = None
    """Of a run whose model is your own: its PACKAGE.MODULE:FACTORY once more. What a directory
    names is not imported on its word."""
    network: str | None = None
    """Which network of the run: contractive or plain; the one that the run is for by default."""
    label_column: str | None = None
    """Column of labels, left out; that of the run by default, where the data has it."""
    drop: tuple[str, ...] = ()
    """Columns to leave out, beside those that the run left out."""
    header: str | None = None
    """Whether the first line of a CSV names the columns: yes, no, auto; as in the run."""
    delimiter: str | None = None
    """What separates the cells of a CSV; as in the run."""
    decimal: str | None = None
    """Decimal mark of a CSV: point or comma; as in the run."""
    array: str | None = None
    """Which array of a .npz holds the samples; that of the run by default, where there is one."""
    missing: str | None = None
    """Missing cells: refuse, mean (of the training split), or drop, which scores nan; as in the
    run."""
    any_range: bool = False
    """Score values outside [0, 1] by a network whose output cannot leave it."""
    flatten: bool = False
    """Accept arrays of rank 3 and more, one sample per entry of the first axis."""
    max_bytes: int | None = None
    """Refuse .npz and .csv that would take more memory than this; half the memory by default."""
    json: bool = False
    """Print the summary as JSON."""


def run(arguments: Arguments) -> int:
    """Score, write the file, and print a summary."""
    check_asked(arguments)
    trained = open_named_run(arguments.run_dir, arguments.model)
    config = trained.config
    if config.series.window is not None:
        from jaxcae.cli.follow import follow
        from jaxcae.cli.score_series import run_series

        if arguments.devices is not None:
            raise InputError("`devices` is for scores of rows; a series is scored on one.")
        check_series(arguments)
        return follow(arguments, trained) if arguments.follow else run_series(arguments, trained)
    for name in ("events", "alpha", "plots", "follow", "time_column"):
        if getattr(arguments, name) not in (None, False):
            raise InputError(f"`{name}` is of a series; {arguments.run_dir} was trained on rows.")
    assert arguments.output is not None
    params = trained.params_of(arguments.network)
    blocks, taken = _open(arguments, trained)
    if not arguments.any_range:
        blocks = _in_unit_range(str(arguments.data), config, blocks)
    score = scores(
        trained.model,
        reconstruction=config.objective.loss,
        features=config.objective.features,  # type: ignore[arg-type]
    )
    incomplete: list[np.ndarray] = []
    shared = arguments.layout()
    parts = list(score_in_chunks(score, params, _complete(blocks, incomplete), layout=shared))
    result = Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    _check_finite(str(arguments.data), result)
    result = _without(result, np.concatenate(incomplete))
    write_atomic(arguments.output, _encode(arguments.output, result))
    if taken and not arguments.json:
        print(taken, file=sys.stderr)
    _print_summary(arguments, result, arguments.network or main_network(config))
    return 0


def _open(arguments: Arguments, trained: Run) -> tuple[Iterable[np.ndarray], str]:
    """Return the samples in blocks, a `.npy` from disk as it is needed, and what was taken."""
    assert arguments.data is not None
    path, config = Path(arguments.data), trained.config
    named = arguments.data in CATALOGUE
    flatten = arguments.flatten or config.data.flatten
    kind = "" if named else kind_of(path)
    table = table_of(arguments, config, kind)
    preparation = preparation_of(trained.preparation, table.missing)
    # Rows with a missing cell are kept here, so that the scores stand in the rows of the data.
    table = replace(table, missing="refuse" if table.missing == "refuse" else "mean")
    if kind == ".npy":
        table.check_kind(path, kind)
        source = NpySource(
            path,
            flatten=flatten,
            standardization=preparation.standardization,
            missing=table.missing,
            fill=preparation.fill,
            narrow=is_narrow(config),
        )
        if not source.fortran_order:
            _check_width(arguments.data, config, source.num_features)
            nameless(path, source.num_features, table)
            return source.scan(), ""
    wide = preparation.standardization is not None and not is_narrow(config)
    dataset = load_as(
        arguments.data,
        table,
        max_bytes=arguments.max_bytes,
        flatten=flatten,
        standardize=wide,
    )
    _check_width(arguments.data, config, dataset.num_features)
    if dataset.feature_names and not config.data.feature_names and not named:
        warnings.warn(
            f"{path}: the run keeps no column names; its columns are taken in their order.",
            stacklevel=1,
        )
    return [dataset.prepared(preparation).features], dataset.taken


def table_of(arguments: Arguments, config: Config, kind: str) -> TableOptions:
    """Return how to read the data: as the run read its own, but for what is asked otherwise."""
    asked = {
        name: value
        for name in (
            "label_column",
            "header",
            "delimiter",
            "decimal",
            "array",
            "missing",
            "time_column",
        )
        if (value := getattr(arguments, name)) is not None
    }
    run = config.data.table.for_kind(kind)
    left_out = run.drop
    if run.label_column is not None and "label_column" in asked:
        left_out += (run.label_column,)
    optional = tuple(
        name
        for name in (*left_out, run.label_column, run.array)
        if name is not None
        and name not in (*arguments.drop, arguments.label_column, arguments.array)
    )
    return replace(
        run, **asked, drop=tuple(dict.fromkeys((*left_out, *arguments.drop))), optional=optional
    )


def preparation_of(preparation: Preparation, missing: str) -> Preparation:
    """Return what to do to the features; with fill where missing cells take a mean."""
    standardization, names, fill = preparation
    if missing == "mean" and fill is None:
        if standardization is None:
            raise InputError(
                "`missing='mean'`: the run keeps no means of its features. Fill in missing cells, "
                "or use `missing='drop'`."
            )
        fill = standardization.mean
    return Preparation(standardization, names, fill if missing == "mean" else None)


def _check_width(name: str, config: Config, width: int) -> None:
    if width != config.model.num_features:
        raise InputError(
            f"{name}: expected {config.model.num_features} features (from the checkpoint), "
            f"the file has {width}."
        )


def _in_unit_range(name: str, config: Config, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass blocks on; refuse what a network trained on [0, 1] cannot have been meant for."""
    limited = config.model.output == "sigmoid" or config.objective.loss == "bernoulli"
    row = 0
    for block in blocks:
        outside = (block < 0) | (block > 1)
        if limited and outside.any():
            at, column = (int(i) for i in np.argwhere(outside)[0])
            raise InputError(
                f"{name}: the run was trained on values in [0, 1], the file has "
                f"{block[at, column]} at row {row + at}, column {column} (from 0). Scale it as the "
                "training data was, or score it as it is with --any-range."
            )
        yield block
        row += len(block)


def _complete(blocks: Iterable[np.ndarray], incomplete: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass blocks on with 0 for what is missing, and note in which rows something is."""
    for block in blocks:
        missing = np.isnan(block)
        incomplete.append(missing.any(axis=1))
        yield np.where(missing, np.float32(0), block) if missing.any() else block


def _without(result: Scores, incomplete: np.ndarray) -> Scores:
    """Put NaN for the scores of incomplete rows, and say how many."""
    count = int(incomplete.sum())
    if not count:
        return result
    if count == len(incomplete):
        raise InputError("no rows to score: there is a missing cell in every one.")
    warnings.warn(
        f"{count} of {len(incomplete)} rows have missing cells; their scores are nan.",
        stacklevel=1,
    )
    return Scores(*(np.where(incomplete, np.float32(np.nan), values) for values in result))


def _check_finite(name: str, result: Scores) -> None:
    for column, values in zip(COLUMNS, result, strict=True):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ArithmeticError(
                f"{name}: the {column} of row {bad[0]} is {values[bad[0]]}: its values are too "
                "large for this network in float32."
            )


def _encode(path: Path, result: Scores) -> bytes:
    table = np.stack([np.asarray(values, np.float32) for values in result], axis=1)
    buffer = io.BytesIO()
    if path.suffix.lower() == ".npy":
        np.save(buffer, table, allow_pickle=False)
    else:  # nine digits give every float32 back
        np.savetxt(buffer, table, "%.9g", delimiter=",", header=",".join(COLUMNS), comments="")
    return buffer.getvalue()


def _print_summary(arguments: Arguments, result: Scores, network: str) -> None:
    summary = {
        column: {
            "median": float(np.nanmedian(values)),
            "99%": float(np.nanquantile(values, 0.99)),
            "max": float(np.nanmax(values)),
            "row_of_max": int(np.nanargmax(values)),
        }
        for column, values in zip(COLUMNS, result, strict=True)
    }
    count = len(result.reconstruction)
    if arguments.json:
        print(json.dumps({"output": str(arguments.output), "samples": count, **summary}))
        return
    print(f"{printable(arguments.output)}: {count:,} samples scored")
    for column, values in summary.items():
        print(
            f"  {column:<21} median {values['median']:.6g}, 99 % {values['99%']:.6g}, "
            f"highest {values['max']:.6g} at row {values['row_of_max']}"
        )
    if network == PLAIN:
        print(
            "  trained without the penalty: its ‖J‖_F may be lower on strange samples, not higher"
        )
