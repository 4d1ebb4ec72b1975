"""The case table: which models, on which data, are compared."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Dtype = Literal["float64", "float32"]
DTYPES: tuple[Dtype, ...] = ("float64", "float32")
SMOOTH = ("sigmoid", "tanh", "softplus", "gelu", "silu", "identity")
KINKED = ("relu", "elu")  # the kink of elu is in its slope


@dataclass(frozen=True)
class Case:
    """One model, objective and batch; every exact method is run on it.

    Attributes:
        name: What `--case` matches, dtype aside.
        sizes: Widths of a dense model, or the code's width alone of a convolutional one.
        activation: Hidden activation, by a name of `parity.reference.ACTIVATIONS`.
        image: `(height, width, channels)` of a convolutional model's sample; None when dense.
        maps: Features of each convolution.
        curvature: Factor of ‖∇²h‖², in training; how it is compared by itself, `family` says.
        l1: Factor of Σ|w| over all weights, biases left out; a tied weight counts once.
        l2: Factor of Σw², likewise.
        gain: Standard deviation of the weights, in units of 1/√fan_in.
        bias: Mean of the biases.
        against: Whether float32 is held against PyTorch's float32 or against float64.
        core: The dtypes in which pytest runs it without `-m slow`; `python -m parity` runs both.
    """

    name: str
    sizes: tuple[int, ...]
    activation: str
    tied: bool = False
    latent_activation: str = "identity"
    output: str = "identity"
    reconstruction: Literal["squared_error", "bernoulli"] = "squared_error"
    features: Literal["sum", "mean"] = "sum"
    contraction: float = 0.1
    curvature: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    image: tuple[int, int, int] | None = None
    maps: tuple[int, ...] = ()
    stride: int = 2
    batch: int = 7
    gain: float = 1.0
    bias: float = 0.0
    data: Literal["uniform", "digits", "small digits"] = "uniform"
    against: Literal["same dtype", "float64"] = "same dtype"
    core: tuple[Dtype, ...] = DTYPES
    dtype: Dtype = "float64"

    @property
    def id(self) -> str:
        """Name the case and its dtype in one word, as `--case` takes it."""
        return f"{self.name}/{self.dtype}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample as jaxcae sees it."""
        return self.image or self.sizes[:1]


def table() -> Iterator[Case]:
    """List every case, in both dtypes."""
    for case in (*_dense(), *_shapes(), *_hard(), *_convolutional(), *_real()):
        for dtype in DTYPES:
            if case.against == "same dtype" or dtype == "float32":
                yield replace(case, dtype=dtype)


def _dense() -> Iterator[Case]:
    """Every activation, tied and not, with both losses."""
    for i, activation in enumerate(SMOOTH + KINKED):
        for tied in (False, True):
            for loss in ("squared_error", "bernoulli"):
                name = f"dense/{activation}/{_tied(tied)}/{loss}"
                # Two of the eight settings of an activation, chosen so that each has both values
                # of every option and all activations together have every pair of options.
                chosen = (tied + (loss == "bernoulli") + i) % 2 == 0
                core = (DTYPES[(tied + i // 2) % 2],) if chosen else ()
                yield Case(name, (12, 9, 5), activation, tied, reconstruction=loss, core=core)


def _shapes() -> Iterator[Case]:
    """Other depths and widths, activations on the code, means over features."""
    double, single = (DTYPES[0],), (DTYPES[1],)
    one = Case("one-layer/sigmoid/untied", (12, 5), "sigmoid", False, "sigmoid", core=double)
    yield one
    yield replace(one, name="one-layer/sigmoid/tied", tied=True, core=single)
    square = Case("square/tanh", (6, 6, 6), "tanh", latent_activation="tanh", core=double)
    yield replace(square, output="sigmoid")
    yield Case("deep/softplus", (12, 10, 8, 5), "softplus", core=single)
    yield Case("deep/relu/tied", (12, 10, 8, 5), "relu", True, "sigmoid", core=double)
    yield Case("mean-over-features/silu", (12, 9, 5), "silu", features="mean", core=single)
    weights = Case("weight-terms/tanh/untied", (12, 9, 5), "tanh", l1=3e-3, l2=2e-2, core=double)
    yield weights
    yield replace(weights, name="weight-terms/tanh/tied", tied=True, core=())
    yield Case("wide-code/gelu", (5, 9, 12), "gelu", latent_activation="tanh", core=double)


def _hard() -> Iterator[Case]:
    """Where one framework rounds or cuts: named in the tolerances."""
    cut = Case("softplus-over-20", (12, 9, 5), "softplus", gain=40.0, core=("float64",))
    yield cut
    yield replace(cut, name="raised-threshold/softplus", activation="softplus, threshold raised")
    for activation in ("sigmoid", "tanh"):
        name = f"saturated/{activation}"
        yield Case(name, (12, 9, 5), activation, bias=6.0, against="float64")


def _convolutional() -> Iterator[Case]:
    """Convolutions; 8 columns and stride 2 leave one over, which the decoder must restore."""
    untied = Case("conv/softplus/untied", (5,), "softplus", image=(7, 8, 2), maps=(3, 4), batch=3)
    yield replace(untied, reconstruction="bernoulli", core=("float64",))
    yield replace(untied, name="conv/softplus/tied", tied=True, core=())
    tied = replace(untied, name="conv/tanh/tied", activation="tanh", tied=True)
    yield replace(tied, reconstruction="bernoulli", core=("float32",))
    yield replace(tied, name="conv/tanh/untied", tied=False, core=())
    relu = Case("conv/relu/one-stage", (4,), "relu", image=(6, 5, 1), maps=(3,), batch=3)
    yield replace(relu, stride=1, core=("float32",))


def _real() -> Iterator[Case]:
    """The sizes of the tutorials, on real digits."""
    relu = Case("digits-784-256-64/relu", (784, 256, 64), "relu", batch=32, data="digits")
    tutorial = replace(relu, output="sigmoid", features="mean", contraction=0.001)
    yield replace(tutorial, core=("float32",))
    softplus = replace(relu, name="digits-784-256-64/softplus", activation="softplus")
    yield replace(softplus, reconstruction="bernoulli", core=())


def _tied(tied: bool) -> str:
    return "tied" if tied else "untied"
