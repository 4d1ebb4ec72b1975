"""Which control variate an encoder gets: that of all inner products of units, or the tangent's."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.jacobian import control_variate
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.directions import wide
from jaxcae.jacobian.estimators import Distribution, draw_probes
from jaxcae.jacobian.local import Local, find_local_input
from jaxcae.jacobian.program import Encoder
from jaxcae.jacobian.structure import Structure, read_structure
from jaxcae.jacobian.tangent import Tangent

Form = Literal["units", "tangent"]

_DENSE = 4.0
"""Kernels of so many times the multiplications that the encoder spends on them are not dense."""
_AFFORDABLE = 8.0
"""What inner products of units may cost a sample beside the encoder, if its kernels are not."""


def low_noise(
    encoder: Encoder,
    xs: Any,
    key: PRNGKeyArray,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> tuple[Any, Float[Array, " batch"]]:
    """Compute codes and an unbiased estimate P̂ of ‖J‖²_F for a batch, the mean over probes.

    Raises:
        ValueError: If a segment of the encoder is opaque.
    """
    structure = read_structure(encoder.program)
    if names := _opaque(structure):
        raise ValueError(
            "control_variate needs an encoder of affine, elementwise and normalising parts, but "
            f"found an opaque part ({', '.join(names)}). Use method='auto' or 'hutchinson'."
        )
    if encoder.program.flat.effects:
        jax.vmap(encoder.act)(xs)
    if not structure.depends:
        codes = jax.vmap(encoder.encode)(xs)
        return codes, jnp.zeros(xs.shape[0], wide(codes.dtype))
    bound = Bound(structure, encoder)
    if form_of(structure) == "units":
        return control_variate.estimate(bound, encoder, xs, key, num_probes, distribution)
    tangent = Tangent(bound, encoder.metric, _band(structure) if encoder.metric is None else None)
    codes, samples = jax.vmap(tangent.forward)(xs)
    probes = draw_probes(key, xs, num_probes, structure.code_size, distribution)
    return codes, tangent.estimate(probes.astype(bound.dtype), samples)


def _band(structure: Structure) -> Local | None:
    """Find the band of the first elementwise segment, unless it costs more than the encoder."""
    for position, segment in enumerate(structure.segments):
        if segment.kind == "elementwise":
            if "local input" not in segment.memory:
                segment.memory["local input"] = find_local_input(structure, position)
            found = segment.memory["local input"]
            return found if found is not None and found.block <= _work(structure) else None
    return None


def _work(structure: Structure) -> float:
    """Count the multiplications of the encoder for a sample."""
    return sum(flops(s.equations) for s in structure.segments) / 2


def form_of(structure: Structure) -> Form:
    """Choose the form: inner products of units where they cost little more than the encoder.

    So they do behind dense kernels, of any depth. A convolution's kernel as a matrix, and the
    products of all of its units, would be far larger than all else.
    """
    if any(segment.scale is not None for segment in structure.segments):
        return "tangent"
    kernels = sum(s.in_size * s.out_size for s in structure.segments if s.kind == "affine")
    widths = [s.out_size for s in structure.segments if s.kind == "elementwise"]
    work = _work(structure)
    is_dense = kernels <= _DENSE * work
    return "units" if is_dense or sum(widths) ** 2 + kernels <= _AFFORDABLE * work else "tangent"


def describe_form(structure: Structure) -> str:
    """Say what `method="control_variate"` does."""
    if names := _opaque(structure):
        return f"not for this encoder: {', '.join(names)} could not be read"
    layers = [s for s in structure.segments if s.kind == "elementwise"]
    if form_of(structure) == "units":
        units = sum(layer.out_size for layer in layers)
        exact = "exact" if len(layers) < 2 else "exact but for products of two deviations"
        return f"inner products of {units} units once a batch: {exact}"
    band = "; the first layer's units with their neighbours" if _band(structure) else ""
    return (
        f"{structure.code_size} products with the Jacobian at mean slopes once a batch, its "
        f"first-order expansion a sample{band}"
    )


def _opaque(structure: Structure) -> dict[str, None]:
    opaque = [s for s in structure.segments if s.kind == "opaque"]
    return dict.fromkeys(eqn.primitive.name for s in opaque for eqn in s.equations)
