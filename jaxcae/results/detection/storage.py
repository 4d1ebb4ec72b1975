"""A fitted detector as a run: its network as of any run, and beside it what makes scores alarms.

`params.safetensors` holds the network, so that other commands read the run, and
`detector.safetensors` the arguments, the calibration, and the training samples that a neighbour
score compares with. Both carry a digest of every array; neither holds code.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcae.data import ARRAY
from jaxcae.data.standardization import Standardization, finite_list
from jaxcae.errors import CheckpointError, InputError
from jaxcae.results.detection.calibration import Calibration
from jaxcae.results.detection.neighbours import Neighbours
from jaxcae.results.detection.network import NetworkOfRun
from jaxcae.results.detection.recipe import Recipe
from jaxcae.runs import Config, Run, RunDirectory, open_run
from jaxcae.runs.entries import DETECTOR as FILE
from jaxcae.runs.leaves import check_digests, damaged
from jaxcae.runs.params_file import read_params_record, save_params, tensors_of

_MAX_BYTES = 2**33


def save(detector: Any, path: Path, overwrite: bool) -> Path:
    """Write a fitted detector into a new or empty directory, or in place of a run.

    Raises:
        RunError: If the directory holds something else, or a run and `overwrite` is not set.
    """
    recipe = detector.recipe_
    config = _config(recipe, detector)
    tiled = Standardization(*(np.tile(part, recipe.size) for part in detector.standardization_))
    directory = RunDirectory.create(path, overwrite=overwrite)
    try:
        directory.start(config)
        save_params(
            path / "params.safetensors",
            detector.params_,
            {
                "config": config.to_json(),
                "network": config.networks[0],
                "step": config.training.epochs,
                "standardization": tiled.to_json(),
            },
        )
        write(detector, path / FILE)
    finally:
        directory.discard()
    return path


def write(detector: Any, file: Path) -> None:
    """Write what a detector is beside its network, which is kept elsewhere."""
    standardization, names = detector.standardization_, getattr(detector, "feature_names_in_", None)
    tensors: dict[str, Any] = {
        "calibration": detector._levels.scores,
        "causal_calibration": detector._causal_levels.scores,
        "decision_scores": detector.decision_scores_,
        "usual": detector.usual_,
    }
    neighbours = detector.neighbours_
    if neighbours is not None:
        tensors["neighbours"] = {
            "samples": neighbours.samples,
            "codes": neighbours.codes,
            "mean": neighbours.mean,
        }
    record = {
        "arguments": {name: _plain(value) for name, value in detector.get_params().items()},
        "standardization": standardization.to_json(),
        "feature_names": None if names is None else [str(name) for name in names],
        "scales": list(detector.scales_),
        "causal_scales": list(detector.causal_scales_),
        "epsilon": None if neighbours is None else neighbours.epsilon,
        "step": detector.step_,
    }
    save_params(file, tensors, {"detector": record})


def load(kind: Any, path: Path) -> Any:
    """Read what `save` wrote into a detector of the class `kind`.

    Raises:
        RunError: If there is no run.
        CheckpointError: If anything is damaged, or does not belong together.
    """
    run = open_run(path)
    return read(kind, run, path / FILE)


def read(kind: Any, run: Run, file: Path) -> Any:
    """Read a detector whose network is that of a run; see `load`."""
    if not file.exists():
        raise InputError(
            f"{file.parent}: is a run without a detector ({FILE} is missing). On windows, going on "
            "with it (`resume=True`) calibrates one."
        )
    sealed, data = read_params_record(file, _MAX_BYTES)
    try:
        tensors = tensors_of(data)
    except Exception as error:
        raise CheckpointError(damaged(file, error)) from error
    check_digests(sealed["leaves"], tensors, str(file))
    try:
        return _assemble(kind, run, sealed["detector"], tensors)
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{file}: is not a detector's: {text.splitlines()[0]}") from None


def _assemble(kind: Any, run: Run, record: Any, tensors: dict[str, np.ndarray]) -> Any:
    detector = kind(**record["arguments"])
    standardization, params = Standardization.from_json(record["standardization"]), run.params
    channels = len(standardization.mean)
    recipe: Any
    if run.config.series.digest:  # a run trained it, of any model
        recipe = NetworkOfRun.of(run.config, run.model)
    else:
        recipe = Recipe.of(
            detector.window,
            channels,
            detector.model,
            detector.hidden,
            detector.latent,
            detector.contraction,
            detector.learning_rate,
        )
    like = jax.eval_shape(recipe.make()[0].init, jax.random.key(0))
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, like)]
    if shapes[0] != shapes[1] or channels != recipe.channels:
        raise InputError("its arguments are of another network.")
    levels = [
        Calibration.of(tensors[name], recipe.size) for name in ("calibration", "causal_calibration")
    ]
    if len(tensors["usual"]) != channels:
        raise InputError(f"it has {len(tensors['usual'])} channels, expected {channels}.")
    detector.n_features_in_ = channels
    names = record["feature_names"]
    if names is not None:
        if len(names) != channels:
            raise InputError(f"it has {len(names)} names of features, expected {channels}.")
        detector.feature_names_in_ = np.array([str(name) for name in names], object)
    detector.standardization_, detector.params_ = standardization, jax.device_get(params)
    detector.recipe_, detector.kind_ = recipe, detector._kind(recipe)
    detector.neighbours_ = None
    if "neighbour" in detector.kind_:
        samples, codes, mean = (
            tensors[f"neighbours.{name}"] for name in ("samples", "codes", "mean")
        )
        if samples.shape != (len(codes), recipe.size * channels) or codes.shape[1:] != mean.shape:
            raise InputError(f"its neighbours have shapes {samples.shape} and {codes.shape}.")
        detector.neighbours_ = Neighbours(samples, codes, mean, float(record["epsilon"]))
    scales = [finite_list(record[name], name) for name in ("scales", "causal_scales")]
    detector.scales_, detector.causal_scales_ = (tuple(map(float, part)) for part in scales)
    detector.step_ = None if record["step"] is None else float(record["step"])
    detector.usual_ = tensors["usual"]
    detector.decision_scores_ = tensors["decision_scores"]
    detector._set_levels(*levels)
    return detector


def _config(recipe: Recipe, detector: Any) -> Config:
    """Say what the network is as a run says it."""
    window: dict[str, Any] = {}
    model: dict[str, Any] = {"sizes": recipe.sizes}
    if detector.window is not None:
        window = {"window": recipe.size, "max_gap": detector.gap, "score": detector.kind_}
    if recipe.model == "temporal_conv":
        arguments = (f"features={recipe.features}", f"latent={recipe.latent}")
        shape = (recipe.size, recipe.channels)
        model = {"model": recipe.model, "model_args": arguments, "shape": shape}
    return Config.of(
        data=ARRAY,
        held_out=float(detector.calibration),
        standardize="yes",
        digits="float64",
        feature_names=tuple(map(str, getattr(detector, "feature_names_in_", ()))),
        activation="softplus",
        output="identity",
        contraction=recipe.contraction or 0.0,
        epochs=int(detector.steps),
        batch_size=int(detector.batch_size),
        learning_rate=recipe.learning_rate,
        schedule="constant",
        compare=False,
        **model,
        **window,
    )


def _plain(value: Any) -> Any:
    """Return an argument as JSON can hold it; a generator of random numbers has done its work."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str | int | float | bool | None) else None
