"""The metric of a run's contraction: the covariance factor of its training data, or of a file.

What a run trained with is kept in its directory, so that a run that is gone on with has the same
bits, wherever the file has gone.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcae.data.arrays import open_regular, read_array, read_header, size_of
from jaxcae.data.covariance import covariance_factor
from jaxcae.data.values import check_fits
from jaxcae.errors import CheckpointError, InputError
from jaxcae.runs.checks import metric_rank
from jaxcae.runs.config import Config
from jaxcae.runs.entries import METRIC
from jaxcae.runs.leaves import digest_of_tree
from jaxcae.runs.material import Material
from jaxcae.runs.params_file import load_params, params_record, save_params


@dataclass(frozen=True)
class Metric:
    """F of ‖J Fᵀ‖², told from another by its digest.

    Attributes:
        digest: Of its shape and values.
        factor: F, of shape (rows, features), or (features,) if diagonal; float32.
    """

    digest: str
    factor: np.ndarray = field(compare=False, repr=False)

    @classmethod
    def of(cls, factor: Any) -> "Metric":
        """Take an array."""
        array = np.asarray(factor, np.float32)
        return cls(digest_of_tree({"metric": array}), array)


def make_metric(
    config: Config,
    material: Material,
    stored: Metric | None = None,
    max_bytes: int | None = None,
) -> Metric | None:
    """Make the metric that a configuration names; None if it names none.

    Args:
        config: The configuration.
        material: The data of the run.
        stored: That of the run to go on with; taken, unless it came from a file that is there.
        max_bytes: The most memory that a file may take; half the memory by default.

    Raises:
        InputError: If there are not so many directions, or the file is not usable.
    """
    name = config.objective.input_metric
    if name is None:
        return None
    rank = metric_rank(name)
    if stored is not None and (rank is not None or not Path(name).exists()):
        return stored
    if rank is None:
        return Metric.of(_read(Path(name), material.held_out.shape[1], max_bytes))
    try:
        factor = covariance_factor(material.train, rank)
    except ValueError as error:
        raise InputError(f"`input_metric={name}`: {error}") from None
    return Metric.of(factor)


def check_alike(config: Config) -> None:
    """Refuse a metric that many processes would each compute, to other last bits.

    Raises:
        InputError: If it is the data's own.
    """
    name = config.objective.input_metric
    if name is not None and metric_rank(name) is not None:
        raise InputError(
            f"`input_metric={name}`: many processes need one factor, the same to the last bit. "
            "Save that of `jaxcae.covariance_factor` as a .npy and name it instead."
        )


def with_digest(config: Config, metric: Metric | None) -> Config:
    """Fill in the digest of the metric."""
    digest = "" if metric is None else metric.digest
    return replace(config, objective=replace(config.objective, metric_digest=digest))


def save_metric(run_dir: Path, metric: Metric) -> None:
    """Keep a metric in a run directory."""
    save_params(run_dir / METRIC, {"metric": metric.factor}, {})


def load_metric(run_dir: Path, config: Config) -> Metric | None:
    """Load the metric of a run, verified; None if it has none.

    Raises:
        CheckpointError: If it is damaged, or not the one of the configuration.
    """
    if config.objective.input_metric is None:
        return None
    file = run_dir / METRIC
    try:
        ((_, (dtype, shape, _)),) = params_record(file)["leaves"].items()
        like = {"metric": jax.ShapeDtypeStruct(tuple(shape), dtype)}
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: is no metric: {' '.join(str(error).split())}") from None
    params, _ = load_params(file, like)
    metric = Metric.of(params["metric"])
    if metric.digest != config.objective.metric_digest:
        raise CheckpointError(f"{file}: is another metric than that of the run.")
    return metric


def _read(path: Path, features: int, max_bytes: int | None) -> np.ndarray:
    with open_regular(path) as file:
        header = read_header(path, file, size_of(file))
        if len(header.shape) not in (1, 2) or header.shape[-1] != features or 0 in header.shape:
            raise InputError(
                f"{path}: a metric has shape (rows, {features}), or ({features},) if diagonal, one "
                f"column for each feature, got {header.shape!s:.80}."
            )
        check_fits(path, header.num_bytes, max_bytes)
        with np.errstate(over="ignore"):
            factor = read_array(path, file, header).astype(np.float32)
    if not np.isfinite(factor).all():
        raise InputError(f"{path}: holds values that are not finite in float32.")
    return factor
