"""The contractive family: every functional beyond ‖J‖², in jaxcae and in PyTorch.

A functional is one number per sample, or the loss of a batch. jaxcae computes it in all ways that
it offers, and PyTorch from whole arrays of derivatives, with the same metrics, noise and probes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import jaxcae
from jaxcae.jacobian.estimators import draw_probes
from jaxcae.objective import decoder_term, reconstruction_map_term
from parity import derivatives as torch_family
from parity.compare import EXACT_METHODS
from parity.derivatives import Mode, along, derivatives, reconstruct, squared
from parity.materials import to_torch
from parity.reference import CAE, norms_by_jacobian, reconstruction_errors

SIGMA, DRAWS, PROBES = 0.3, 2, 2
CONTRACTION, CURVATURE, DECODER, MAP = 0.1, 0.05, 0.02, 0.03


class Drawn(NamedTuple):
    """What is the same on both sides beside weights and batch, in NumPy or as tensors.

    Attributes:
        wide: F, (3, d).
        diagonal: F, (d,).
        noise: ε of jaxcae's noise form, (draws, batch, …features).
        outer: Probes of the code, (batch, probes, k).
        inner: Probes of the sample, (batch, probes, d).
        across: Probes of the sample for a trace, (batch, probes, d).
    """

    wide: Any
    diagonal: Any
    noise: Any
    outer: Any
    inner: Any
    across: Any


Values = Callable[[Any, Any], Any]
"""`(params, xs) -> values` of jaxcae, one per sample or one for the batch."""

Ours = Callable[[jaxcae.Autoencoder, Drawn], dict[str, Values]]
"""All ways in which jaxcae computes a functional of a model, by the name of the method."""

Theirs = Callable[[CAE, Tensor, Drawn, Mode], Tensor]
"""`(model, batch, drawn, mode) -> values` of PyTorch."""


class Functional(NamedTuple):
    """One functional on both sides.

    Attributes:
        ours: Makes it by jaxcae.
        theirs: Computes it in PyTorch.
        quantity: The entry of the tolerances that its values are held to.
        modes: In which ways PyTorch computes it; the first is the reference.
    """

    ours: Ours
    theirs: Theirs
    quantity: str = "norms"
    modes: tuple[Mode, ...] = ("reverse", "forward")


def key() -> Any:
    """Make the key of all that is drawn by jaxcae."""
    return jax.random.key(2)


def draw(xs: NDArray[Any], latent: int) -> Drawn:
    """Draw metrics by NumPy, and noise and probes as jaxcae will from the key."""
    rng, features, dtype = np.random.default_rng(3), xs[0].size, xs.dtype
    of_code, of_sample = jax.random.split(jax.random.fold_in(key(), 2))
    drawn = Drawn(
        rng.normal(size=(3, features)),
        rng.uniform(0.5, 1.5, features),
        SIGMA * jax.random.normal(key(), (DRAWS, *xs.shape), dtype),
        draw_probes(of_code, jnp.asarray(xs), PROBES, latent, "rademacher"),
        draw_probes(of_sample, jnp.asarray(xs), PROBES, features, "rademacher"),
        draw_probes(key(), jnp.asarray(xs), PROBES, features, "rademacher"),
    )
    return Drawn._make(np.array(array, dtype) for array in drawn)


def drawn_to_torch(drawn: Drawn, shape: tuple[int, ...], device: str) -> Drawn:
    """Bring what was drawn to PyTorch, features in the order that its samples have."""

    def features(rows: NDArray[Any]) -> Tensor:
        flat = to_torch(rows.reshape(-1, *shape), device).flatten(1)
        return flat.reshape(*rows.shape[:-1], -1)

    noise = torch.stack([to_torch(epsilon, device) for epsilon in drawn.noise])
    outer = torch.from_numpy(drawn.outer).to(device)
    return Drawn(
        features(drawn.wide),
        features(drawn.diagonal),
        noise,
        outer,
        features(drawn.inner),
        features(drawn.across),
    )


def of_order(order: int, metric: str | None = None) -> Functional:
    """‖∇ⁿh‖²_F by every exact method, along an input metric if there is one."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        factor = None if metric is None else getattr(drawn, metric)
        # Above order 1 `chain` is what `auto` computes, in chunks of another size.
        methods = ("auto",) if order > 1 else EXACT_METHODS
        made = partial(jaxcae.contractive_penalty, model.encode, order=order, input_metric=factor)
        return {method: made(method) for method in methods}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        array = derivatives(model.encode, xs, order, mode)
        return squared(array if metric is None else along(array, getattr(drawn, metric)))

    return Functional(ours, theirs)


def noise_form() -> Functional:
    """The mean over ε of ‖J(x + ε) − J(x)‖²_F."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        penalty = jaxcae.jacobian_difference(model.encode, SIGMA, num_samples=DRAWS)
        return {"exact": lambda params, xs: penalty(params, xs, key())}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        return torch_family.difference(model.encode, xs, drawn.noise, mode)

    return Functional(ours, theirs)


def along_probes() -> Functional:
    """‖∂_u ∇(vᵀh)‖², the unbiased estimate of curvature, from the same probes."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        options: dict[str, Any] = {"order": 2, "num_probes": PROBES}
        penalty = jaxcae.contractive_penalty(model.encode, "hutchinson", **options)
        return {"hutchinson": lambda params, xs: penalty(params, xs, key())}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        return torch_family.squared_along_probes(model.encode, xs, drawn.outer, drawn.inner)

    return Functional(ours, theirs, modes=("reverse",))


def of_the_decoder() -> Functional:
    """‖J_g(h)‖²_F at the codes, through which the encoder has a gradient, too."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        def at_codes(method: str) -> Values:
            penalty = jaxcae.contractive_penalty(model.decode, method)
            encode = jax.vmap(model.encode, (None, 0))
            return lambda params, xs: penalty(params, encode(params, xs))

        return {method: at_codes(method) for method in ("auto", "reverse")}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        return squared(derivatives(model.decode, model.encode(xs), 1, mode))

    return Functional(ours, theirs)


def of_the_map() -> Functional:
    """‖J_r(x)‖²_F of the reconstruction map r = g ∘ h."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        methods = ("auto", "reverse")
        return {name: jaxcae.contractive_penalty(mapped(model), name) for name in methods}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        return squared(derivatives(reconstruct(model), xs, 1, mode))

    return Functional(ours, theirs)


def mapped(model: jaxcae.Autoencoder) -> Callable[[Any, Any], Any]:
    """Take the reconstruction map of a model of jaxcae."""
    return lambda params, x: model.decode(params, model.encode(params, x))


def of_the_trace() -> Functional:
    """Compute tr J_r(x), the divergence of the reconstruction map."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        return {"auto": jaxcae.jacobian_trace(mapped(model))}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        return torch_family.trace(reconstruct(model), xs, mode)

    return Functional(ours, theirs, "traces")


def of_the_trace_along_probes() -> Functional:
    """Compute vᵀJ_r v, the unbiased estimate of the trace, from the same probes."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        found = jaxcae.jacobian_trace(mapped(model), "hutchinson", num_probes=PROBES)
        return {"hutchinson": lambda params, xs: found(params, xs, key())}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        return torch_family.trace_along_probes(reconstruct(model), xs, drawn.across)

    return Functional(ours, theirs, "traces", ("reverse",))


def of_the_score() -> Functional:
    """½‖ψ‖² + div ψ of ψ = (r(x) − x)/σ², from one trace of r."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        both = jaxcae.value_and_trace(mapped(model))

        def values(params: Any, xs: Any) -> Any:
            x_hats, traces = both(params, xs)
            psi = (x_hats - xs).reshape(len(xs), -1) / SIGMA**2
            return jnp.sum(psi**2, 1) / 2 + (traces - xs[0].size) / SIGMA**2

        return {"auto": values}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        return torch_family.score_matching(reconstruct(model), xs, SIGMA, mode)

    return Functional(ours, theirs, "traces")


def of_the_loss() -> Functional:
    """The loss of a batch with contraction, curvature, a metric, decoder and map."""

    def ours(model: jaxcae.Autoencoder, drawn: Drawn) -> dict[str, Values]:
        loss = jaxcae.cae_loss(
            model,
            CONTRACTION,
            curvature=CURVATURE,
            input_metric=drawn.wide,
            terms=(decoder_term(DECODER), reconstruction_map_term(MAP)),
        )
        return {"auto": lambda params, xs: loss(params, xs)[0]}

    def theirs(model: CAE, xs: Tensor, drawn: Drawn, mode: Mode) -> Tensor:
        codes = model.encode(xs)
        first, second = (
            squared(along(derivatives(model.encode, xs, n, mode), drawn.wide)) for n in (1, 2)
        )
        errors = reconstruction_errors("squared_error", "sum", xs, model.decode(codes))
        decoder = norms_by_jacobian(model.decode, codes)
        whole = norms_by_jacobian(reconstruct(model), xs)
        return (
            errors + CONTRACTION * first + CURVATURE * second + DECODER * decoder + MAP * whole
        ).mean()

    return Functional(ours, theirs, "loss")


FUNCTIONALS: dict[str, Functional] = {
    "curvature": of_order(2),
    "order-3": of_order(3),
    "curvature-along-probes": along_probes(),
    "noise-form": noise_form(),
    "metric": of_order(1, "wide"),
    "diagonal-metric": of_order(1, "diagonal"),
    "curvature-metric": of_order(2, "wide"),
    "decoder": of_the_decoder(),
    "map": of_the_map(),
    "trace": of_the_trace(),
    "trace-along-probes": of_the_trace_along_probes(),
    "score-matching": of_the_score(),
    "loss": of_the_loss(),
}
