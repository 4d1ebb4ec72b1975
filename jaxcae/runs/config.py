"""What a training run is: one frozen record, and the model, losses and optimizer it stands for."""

import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from jaxcae.activations import ACTIVATIONS, get_activation
from jaxcae.errors import InputError, unknown_name
from jaxcae.models import mlp
from jaxcae.objective import cae_loss
from jaxcae.objective.losses import RECONSTRUCTION_LOSSES, reconstruction_loss
from jaxcae.penalty import METHODS, encode_and_penalty, jacobian_norm
from jaxcae.training import TrainState, side_by_side
from jaxcae.types import Autoencoder, Loss, Metrics, Params

CONTRACTIVE, PLAIN = "contractive", "plain"
_MAX_WIDTH = 2**20
_MAX_LAYERS = 128

# The same configuration gives the same functions, so that JAX compiles them once per process.
_remembered = functools.lru_cache(maxsize=16)

STANDARDIZE = {"auto": None, "yes": True, "no": False}
"""Values of `standardize`; None leaves it to the data."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run."""

    data: str = "mnist5k"
    """Name of a data set (mnist5k, digits, shuttle, breast_cancer) or a .npy, .npz or .csv file."""
    sizes: tuple[int, ...] = ()
    """Widths from the features to the code, such as 784 256 64; by default chosen by the data."""
    activation: str = "relu"
    """Hidden activation: sigmoid, tanh, softplus, elu, gelu, silu, relu or identity."""
    latent_activation: str = "identity"
    """Activation on the code."""
    output: str = "auto"
    """Activation on the reconstruction; auto is sigmoid for data in [0, 1], else identity."""
    tied: bool = False
    """Decode with the encoder's kernels, transposed."""
    loss: str = "squared_error"
    """Reconstruction loss: squared_error or bernoulli (cross-entropy, for data in [0, 1])."""
    features: str = "sum"
    """How the reconstruction loss reduces over features: sum or mean."""
    contraction: float = 0.03
    """λ, the weight of the squared Frobenius norm of the encoder's Jacobian."""
    method: str = "auto"
    """How to compute the norms; auto is exact, and plans for speed."""
    l1: float = 0.0
    """Weight of Σ|w| over the kernels."""
    l2: float = 0.0
    """Weight of Σw² over the kernels."""
    corruption: str = "gaussian"
    """Corruption of the input where noise-scale is above 0: gaussian or masking."""
    noise_scale: float = 0.0
    """Deviation of the noise, or probability of masking; 0 trains on the samples as they are."""
    epochs: int = 60
    """How often to go through the data."""
    batch_size: int = 128
    """Samples per step; the last batch of an epoch may be short."""
    learning_rate: float = 3e-3
    """Adam's step size at the start."""
    schedule: str = "cosine"
    """How the step size changes: cosine (to 0 at the last step) or constant."""
    patience: int | None = None
    """Stop after so many epochs without a lower held-out loss, and keep the best epoch's result."""
    held_out: float = 0.2
    """Fraction of the samples to hold out for evaluation."""
    seed: int = 0
    """Seed of the split, the initial parameters, the order of samples and the noise."""
    compare: bool = True
    """Also train the same network without the penalty, from the same seed, to compare."""
    stream: bool = False
    """Read a .npy from disk while training, for data larger than memory."""
    standardize: str = "auto"
    """Scale features to mean 0, deviation 1 of the training split: yes, no, auto (tabular sets)."""
    flatten: bool = False
    """Accept arrays of rank 3 and more, one sample per entry of the first axis."""
    data_digest: str = ""
    """Digest of the training data; filled in by the run."""

    def check(self) -> None:
        """Check what can be checked without the data.

        Raises:
            InputError: With the first option that is not usable.
        """
        for name, kind, known in (
            ("activation", "activation", ACTIVATIONS),
            ("latent_activation", "activation", ACTIVATIONS),
            ("output", "output activation", ("auto", *ACTIVATIONS)),
            ("loss", "reconstruction loss", RECONSTRUCTION_LOSSES),
            ("features", "reduction over features", ("sum", "mean")),
            ("method", "method", METHODS),
            ("corruption", "corruption", ("gaussian", "masking")),
            ("schedule", "schedule", ("cosine", "constant")),
            ("standardize", "value of --standardize", tuple(STANDARDIZE)),
        ):
            if getattr(self, name) not in known:
                raise InputError(str(unknown_name(kind, getattr(self, name), known)))
        for name in ("contraction", "l1", "l2", "noise_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{_flag(name)} must be finite and at least 0, got {value!r}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"--learning-rate must be above 0, got {self.learning_rate!r}.")
        if not 0 < self.held_out < 1:
            raise InputError(f"--held-out must be above 0 and below 1, got {self.held_out!r}.")
        if self.corruption == "masking" and self.noise_scale > 1:
            raise InputError(f"--noise-scale is a probability here, got {self.noise_scale!r}.")
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise InputError(f"{_flag(name)} must be at least 1, got {value!r}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be from 0 to 2³² − 1, got {self.seed!r}.")
        if self.sizes and len(self.sizes) < 2:
            raise InputError(f"--sizes needs the features and a code at least, got {self.sizes!r}.")
        if len(self.sizes) > _MAX_LAYERS:
            raise InputError(f"--sizes has {len(self.sizes):,} widths, at most {_MAX_LAYERS}.")
        for width in self.sizes:
            if not 1 <= width <= _MAX_WIDTH:
                raise InputError(f"--sizes must be from 1 to {_MAX_WIDTH:,}, got {width!r}.")

    def resolve(
        self,
        features: int,
        low: float,
        high: float,
        data_digest: str,
        *,
        standardized: bool = False,
    ) -> "Config":
        """Fill in what the data decides.

        Args:
            features: The width of a sample.
            low: The smallest value of the data, as the networks see it.
            high: The largest.
            data_digest: The digest of the training data.
            standardized: Whether the data is standardised.

        Raises:
            InputError: If the options do not go with the data.
        """
        unit_range = low >= 0 and high <= 1
        sizes = self.sizes or (features, 256, min(64, max(1, features // 4)))
        if sizes[0] != features:
            raise InputError(
                f"--sizes begins with {sizes[0]}, {self.data} has {features} features. "
                f"Use --sizes {' '.join(map(str, (features, *sizes[1:])))}."
            )
        output = self.output
        if output == "auto":
            output = "sigmoid" if unit_range and self.loss == "squared_error" else "identity"
        if self.loss == "bernoulli":
            if not unit_range:
                raise InputError(
                    f"--loss bernoulli expects data in [0, 1], {self.data} goes from {low:g} to "
                    f"{high:g}. Use --loss squared_error."
                )
            if output != "identity":
                raise InputError("--loss bernoulli takes logits: leave --output at identity.")
        reached = get_activation(output)
        if low < reached.least or high > reached.greatest:
            beyond = "below" if low < reached.least else "above"
            bound = reached.least if low < reached.least else reached.greatest
            warnings.warn(
                f"--output {output} is never {beyond} {bound:g}, {self.data} goes from {low:g} to "
                f"{high:g}: what lies beyond cannot be reconstructed. Use --output identity.",
                stacklevel=2,
            )
        return dataclasses.replace(
            self,
            sizes=sizes,
            output=output,
            standardize="yes" if standardized else "no",
            data_digest=data_digest,
        )

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        fields = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}

    @classmethod
    def from_json(cls, value: Any, source: str = "config.json") -> "Config":
        """Read what `to_json` gave: every field, no other, each of its type.

        Raises:
            InputError: If it is anything else.
        """
        hints = get_type_hints(cls)
        if not isinstance(value, dict):
            raise InputError(f"{source}: expected a table of options, got {type(value).__name__}.")
        for name in value:
            if name not in hints:
                raise InputError(f"{source}: {unknown_name('option', name, hints)}")
        for name, hint in hints.items():
            if name not in value:
                raise InputError(f"{source}: the option {name!r} is missing.")
            if not _has_type(value[name], hint):
                raise InputError(f"{source}: {name!r} has the unusable value {value[name]!r:.80}.")
        options: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in value.items()
        }
        config = cls(**options)
        try:
            config.check()
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        return config

    @property
    def networks(self) -> tuple[str, ...]:
        """Which networks the run trains, by name."""
        if self.contraction == 0:
            return (PLAIN,)
        return (CONTRACTIVE, PLAIN) if self.compare else (CONTRACTIVE,)


def differences(stored: Config, asked: Config) -> list[str]:
    """Compare field by field: one line per field that differs."""
    return [
        f"{_flag(field.name)}: {getattr(stored, field.name)!r} in the run, "
        f"{getattr(asked, field.name)!r} asked"
        for field in dataclasses.fields(Config)
        if getattr(stored, field.name) != getattr(asked, field.name)
    ]


@_remembered
def make_model(config: Config) -> Autoencoder:
    """Make the autoencoder of a resolved configuration."""
    return mlp(
        config.sizes,
        config.activation,
        tied=config.tied,
        latent_activation=config.latent_activation,
        output=config.output,
    )


@_remembered
def make_loss(config: Config, model: Autoencoder) -> Loss:
    """Make the loss of all networks of the run, over `{network: params}`."""
    contraction = {CONTRACTIVE: config.contraction, PLAIN: None}
    return side_by_side(
        {
            name: cae_loss(
                model,
                contraction[name],
                method=config.method,
                reconstruction=config.loss,
                features=config.features,  # type: ignore[arg-type]
                l1=config.l1,
                l2=config.l2,
                corruption=config.corruption,  # type: ignore[arg-type]
                noise_scale=config.noise_scale,
            )
            for name in config.networks
        }
    )


@_remembered
def make_measure(config: Config, model: Autoencoder) -> Loss:
    """Make what is reported on held-out samples: exact, and without noise.

    Metrics per network are `reconstruction`, `jacobian_norm` (the mean of ‖J‖_F) and
    `jacobian_norm_squared` (the mean of ‖J‖²_F); the value is the sum of the networks' objectives
    without weight penalties.
    """
    rec = reconstruction_loss(config.loss, config.features)  # type: ignore[arg-type]
    encode_and_norms = encode_and_penalty(model.encode)
    weights = {CONTRACTIVE: config.contraction, PLAIN: 0.0}

    def measure_one(contraction: float) -> Loss:
        def measure(
            params: Params, xs: Any, key: PRNGKeyArray | None = None
        ) -> tuple[Any, Metrics]:
            codes, norms = encode_and_norms(params, xs)
            x_hats = jax.vmap(model.decode, (None, 0))(params, codes)
            reconstruction, squared = jnp.mean(jax.vmap(rec)(xs, x_hats)), jnp.mean(norms)
            return reconstruction + contraction * squared, {
                "reconstruction": reconstruction,
                "jacobian_norm": jnp.mean(jacobian_norm(norms)),
                "jacobian_norm_squared": squared,
            }

        return measure

    return side_by_side({name: measure_one(weights[name]) for name in config.networks})


@_remembered
def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Make the optimizer of a run of so many steps."""
    if config.schedule == "constant":
        return optax.adam(config.learning_rate)
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))


def make_state(
    config: Config, model: Autoencoder, optimizer: optax.GradientTransformation
) -> TrainState:
    """Make the state before the first step; all networks start from the same parameters."""
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = {name: model.init(init_key) for name in config.networks}
    state = TrainState.create(params, optimizer, train_key)
    return state if config.patience is None else dataclasses.replace(state, best=params)


def main_network(config: Config) -> str:
    """Name the network that the run is for: the contractive one, if it trains one."""
    return config.networks[0]


def monitored(config: Config) -> str:
    """Name the entry of an epoch's record that early stopping watches."""
    return f"held_out_{main_network(config)}/loss"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _has_type(value: Any, hint: Any) -> bool:
    if hint == tuple[int, ...]:
        return isinstance(value, list) and all(type(item) is int for item in value)
    kinds = get_args(hint) or (hint,)
    # A bool is an int in Python, and JSON writes 1.0 and 1 differently.
    return any(type(value) is kind or (kind is float and type(value) is int) for kind in kinds)
