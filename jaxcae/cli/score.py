"""`jaxcae score`: a trained run and a file in, one row of scores per sample out."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from jaxcae.cli.device import OnDevice
from jaxcae.data import CATALOGUE, NpySource, Standardization, load
from jaxcae.errors import InputError, printable
from jaxcae.files import write_atomic
from jaxcae.results.scores import Scores, score_in_chunks, scores
from jaxcae.runs import open_run
from jaxcae.runs.config import Config

COLUMNS = ("reconstruction_error", "jacobian_norm")
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Score samples: how badly each is rebuilt, and how strongly its code reacts (‖J‖_F).

    High values of either mark samples unlike the training data. A sample's scores do not depend on
    the other samples in the file.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The directory of a finished run."""
    data: str
    """What to score: a .npy, .npz or .csv with the run's features, or the name of a data set."""
    output: Path
    """Where to write the scores: .csv with a header, or .npy of two columns. It is replaced."""
    network: str | None = None
    """Which network of the run: contractive or plain; the one that the run is for by default."""
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
    _check_output(arguments.output)
    trained = open_run(arguments.run_dir)
    config = trained.config
    params = trained.params_of(arguments.network)
    blocks = _open(arguments, config, trained.standardization)
    if not arguments.any_range:
        blocks = _in_unit_range(arguments.data, config, blocks)
    score = scores(
        trained.model,
        reconstruction=config.objective.loss,
        features=config.objective.features,  # type: ignore[arg-type]
    )
    parts = list(score_in_chunks(score, params, blocks))
    result = Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    _check_finite(arguments.data, result)
    write_atomic(arguments.output, _encode(arguments.output, result))
    _print_summary(arguments, result)
    return 0


def _check_output(path: Path) -> None:
    """Refuse an output that cannot be written, before anything is loaded."""
    if path.suffix.lower() not in (".csv", ".npy"):
        raise InputError(f"--output {path}: expected a name that ends in .csv or .npy.")
    if path.is_dir():
        raise InputError(f"--output {path}: is a directory, expected a file.")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no directory {path.parent}.")


def _open(
    arguments: Arguments, config: Config, standardization: Standardization | None
) -> Iterable[np.ndarray]:
    """Return the samples in blocks: a `.npy` from disk as it is needed, the rest from memory."""
    path = Path(arguments.data)
    named = arguments.data in CATALOGUE
    if (
        not named
        and path.exists()
        and arguments.output.exists()
        and path.samefile(arguments.output)
    ):
        raise InputError(f"--output {path}: is the data to score; choose another name.")
    flatten = arguments.flatten or config.data.flatten
    if not named and path.suffix.lower() == ".npy":
        source = NpySource(path, flatten=flatten, standardization=standardization)
        if not source.fortran_order:
            _check_width(arguments.data, config, source.num_features)
            return source.scan(_ROWS_AT_ONCE)
    dataset = load(arguments.data, max_bytes=arguments.max_bytes, flatten=flatten)
    _check_width(arguments.data, config, dataset.num_features)
    if standardization is not None:
        dataset = dataset.standardized(standardization)
    return [dataset.features]


def _check_width(name: str, config: Config, width: int) -> None:
    if width != config.model.sizes[0]:
        raise InputError(
            f"{name}: expected {config.model.sizes[0]} features (from the checkpoint), "
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


def _print_summary(arguments: Arguments, result: Scores) -> None:
    summary = {
        column: {
            "median": float(np.median(values)),
            "99%": float(np.quantile(values, 0.99)),
            "max": float(values.max()),
            "row_of_max": int(values.argmax()),
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
