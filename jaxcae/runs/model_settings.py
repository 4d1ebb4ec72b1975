"""The settings of a model: which go together, and the shape of the samples that it takes."""

import math

from jaxcae.errors import InputError
from jaxcae.models.factory import is_factory, parse_arguments
from jaxcae.runs.sections import ModelConfig

_MAX_WIDTH = 2**20
_MAX_LAYERS = 128
_MAX_RANK = 8


def check_model(model: ModelConfig) -> None:
    """Check what can be checked without the data, and without importing anything.

    Raises:
        InputError: With the first setting that is not usable.
    """
    _check_sizes(model.sizes)
    parse_arguments(model.args)
    if len(model.shape) > _MAX_RANK or not all(1 <= n <= _MAX_WIDTH for n in model.shape):
        raise InputError(f"`shape` is that of a sample, such as 28 28 1, got {model.shape!r:.80}.")
    if model.kind == "mlp":
        foreign = {"args": "model_args", "shape": "shape"}
    elif model.kind == "conv":
        foreign = {"sizes": "sizes"}
    elif model.kind == "temporal_conv":
        foreign = {"sizes": "sizes", "tied": "tied"}
    elif is_factory(model.kind):
        names = ("sizes", "activation", "latent_activation", "output", "tied")
        foreign = {name: name for name in names if (name, model.output) != ("output", "identity")}
    else:
        raise InputError(
            "`model` is mlp, conv, temporal_conv or a function as PACKAGE.MODULE:FACTORY, got "
            f"{model.kind!r:.80}."
        )
    for name, setting in foreign.items():
        if getattr(model, name) != getattr(ModelConfig(), name):
            raise InputError(f"`{setting}` does not go with `model={model.kind}`.")


def model_shape(
    model: ModelConfig, features: int, image: tuple[int, ...] | None, window: int | None = None
) -> tuple[int, ...]:
    """Return the shape of a sample as the model takes it; () for an mlp, which takes rows.

    Args:
        model: The settings.
        features: The width of a sample as a row.
        image: The shape that a sample has in the data, if it is an image.
        window: Rows of a sample that is the window of a series.

    Raises:
        InputError: If the shape does not go with the data, or cannot be told.
    """
    if model.kind == "mlp":
        return ()
    found = {"conv": _image, "temporal_conv": _window}.get(model.kind)
    shape = model.shape or (found(features, image, window) if found else (features,))
    if math.prod(shape) != features:
        raise InputError(
            f"`shape` {shape} has {math.prod(shape):,} entries, a sample of the data {features:,}."
        )
    return shape


def _window(features: int, image: tuple[int, ...] | None, window: int | None) -> tuple[int, ...]:
    """Tell (rows, channels) from the rows of a window."""
    if window is None:
        raise InputError("`shape` is needed of a window: its rows and channels, such as 128 3.")
    return (window, features // window)


def _image(features: int, image: tuple[int, ...] | None, window: int | None) -> tuple[int, ...]:
    """Tell (height, width, channels) from the data, or from a square number of grey values."""
    if image is not None and len(image) in (2, 3):
        return image if len(image) == 3 else (*image, 1)
    side = math.isqrt(features)
    if side * side != features:
        raise InputError(
            f"`shape` is needed: {features:,} features are no square image of grey values. Give "
            "height, width and channels, such as 32 32 3."
        )
    return (side, side, 1)


def _check_sizes(sizes: tuple[int, ...]) -> None:
    if len(sizes) == 1:
        raise InputError(f"`sizes` needs the features and a code at least, got {sizes!r}.")
    if len(sizes) > _MAX_LAYERS:
        raise InputError(f"`sizes` has {len(sizes):,} widths, at most {_MAX_LAYERS}.")
    for width in sizes:
        if not 1 <= width <= _MAX_WIDTH:
            raise InputError(f"`sizes` must be from 1 to {_MAX_WIDTH:,}, got {width!r}.")
