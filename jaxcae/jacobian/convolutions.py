"""Convolutions in sweeps: the same three bilinear maps, lowered as each platform runs them best.

A convolution y = x ∗ w, its transpose and the gradient of its kernel are one family,
⟨x ∗ w, ȳ⟩ = ⟨x, ȳ ∗ᵀ w⟩ = ⟨w, ∇(x, ȳ)⟩, closed under derivatives. A sweep sends k vectors of each
sample through them, batch · k images at a time, and there XLA's own lowering for CPUs is far from
what the machine can do: for 8,192 images of 14×14×16 and a kernel of 3×3 the gradient of the kernel
takes 30 times as long as the product of matrices that it is. So on CPUs that gradient is a product
of the images' patches with ȳ, so many images at a time that the patches stay in the cache, and the
transpose of a convolution with strides is one without them, of the neighbours that meet in each
cell of the stride (Shi et al., arXiv:1609.05158, the sub-pixel form). Elsewhere, and for the values
of the encoder itself, everything is XLA's own.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir

from jaxcae.jacobian.jaxprs import struct, variables
from jaxcae.jacobian.structure import Segment

_PATCHES = 2**20  # elements of patches at a time: 4 MiB in float32
_DTYPES = {jnp.dtype("float32"), jnp.dtype("float64")}

convolve = Primitive("convolve")
"""x ∗ w, with the parameters of `jax.lax.conv_general_dilated`."""
convolve_transposed = Primitive("convolve_transposed")
"""ȳ ∗ᵀ w, an image of the shape `image`, the number of images apart."""
convolve_kernel = Primitive("convolve_kernel")
"""∇(x, ȳ), a kernel of the shape `kernel`."""


def swapped(segment: Segment) -> tuple[JaxprEqn, ...]:
    """Put our convolutions in the place of JAX's where images move and the kernel does not.

    In a `jax.shard_map`, or a mesh of explicit axes, JAX's own stay: they know of both.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes or mesh.explicit_axes:
        return segment.linear
    if "swapped" not in segment.memory:
        segment.memory["swapped"] = _swap(segment)
    return segment.memory["swapped"]


def _swap(segment: Segment) -> tuple[JaxprEqn, ...]:
    moving = set(segment.inputs)
    found = []
    for eqn in segment.linear:
        if not moving.isdisjoint(variables(eqn.invars)):
            moving.update(eqn.outvars)
            ours = _is_plain(eqn) and eqn.invars[0] in moving and eqn.invars[1] not in moving
            found.append(eqn.replace(primitive=convolve) if ours else eqn)
        else:
            found.append(eqn)
    return tuple(found)


def _is_plain(eqn: JaxprEqn) -> bool:
    if eqn.primitive is not jax.lax.conv_general_dilated_p:
        return False
    kinds = {struct(v).dtype for v in (*eqn.invars, *eqn.outvars)}
    groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    return len(kinds) == 1 and kinds <= _DTYPES and groups == (1, 1)


# ------------------------------------------------------------------ what they are, by JAX's own


def _convolve(x: Any, w: Any, **params: Any) -> Any:
    return jax.lax.conv_general_dilated_p.bind(x, w, **params)


def _transposed(y: Any, w: Any, *, image: tuple[int, ...], **params: Any) -> Any:
    like = jax.ShapeDtypeStruct(_with_count(image, y, params), y.dtype)
    return jax.linear_transpose(lambda x: _convolve(x, w, **params), like)(y)[0]


def _kernel(x: Any, y: Any, *, kernel: tuple[int, ...], **params: Any) -> Any:
    like = jax.ShapeDtypeStruct(kernel, y.dtype)
    return jax.linear_transpose(lambda w: _convolve(x, w, **params), like)(y)[0]


def _with_count(image: tuple[int, ...], y: Any, params: dict[str, Any]) -> tuple[int, ...]:
    """Give an image's shape the number of images that y has."""
    numbers = params["dimension_numbers"]
    shape = list(image)
    shape[numbers.lhs_spec[0]] = y.shape[numbers.out_spec[0]]
    return tuple(shape)


# ------------------------------------------------------------------ how a CPU runs them


def _kernel_by_patches(x: Any, y: Any, *, kernel: tuple[int, ...], **params: Any) -> Any:
    """Compute ∇(x, ȳ) as products of patches, rows (image, position), with ȳ."""
    numbers = params["dimension_numbers"]
    count, rank = x.shape[numbers.lhs_spec[0]], len(params["window_strides"])
    if set(params["lhs_dilation"]) != {1} or not isinstance(count, int):
        return _kernel(x, y, kernel=kernel, **params)
    taps = tuple(kernel[i] for i in numbers.rhs_spec[2:])
    x, y = _last_features(x, numbers.lhs_spec), _last_features(y, numbers.out_spec)
    positions, made = y.shape[1:-1], y.shape[-1]
    width = math.prod(taps) * x.shape[-1]

    def one(x: Any, y: Any) -> Any:
        padding = [(0, 0, 0), *((*pads, 0) for pads in params["padding"]), (0, 0, 0)]
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
        parts = []
        for tap in np.ndindex(taps):
            starts = [t * d for t, d in zip(tap, params["rhs_dilation"], strict=True)]
            steps = params["window_strides"]
            ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, positions, steps, strict=True)]
            limits = (padded.shape[0], *ends, padded.shape[-1])
            parts.append(jax.lax.slice(padded, (0, *starts, 0), limits, (1, *steps, 1)))
        patches = jnp.concatenate(parts, -1).reshape(-1, width)
        precision = params["precision"]
        return jnp.matmul(patches.T, y.reshape(-1, made), precision=precision)

    chunks = _chunks(count, math.prod(positions) * width)
    if chunks == 1:
        found = one(x, y)
    else:  # of images a chunk apart: a batch that is laid over devices stays where it is
        x, y = (a.reshape(count // chunks, chunks, *a.shape[1:]) for a in (x, y))
        found = jnp.sum(jax.lax.map(lambda i: one(x[:, i], y[:, i]), jnp.arange(chunks)), 0)
    found = found.reshape(*taps, x.shape[-1], made)
    spec = numbers.rhs_spec
    source = {spec[0]: rank + 1, spec[1]: rank} | {spec[2 + i]: i for i in range(rank)}
    return jnp.transpose(found, [source[i] for i in range(rank + 2)])


def _transposed_by_cells(y: Any, w: Any, *, image: tuple[int, ...], **params: Any) -> Any:
    """Compute ȳ ∗ᵀ w as a convolution of stride 1, whose features are those of a cell's pixels."""
    numbers, strides = params["dimension_numbers"], params["window_strides"]
    rank = len(strides)
    if set(params["lhs_dilation"]) | set(params["rhs_dilation"]) != {1} or max(strides) == 1:
        return _transposed(y, w, image=image, **params)
    sizes = [image[i] for i in numbers.lhs_spec[2:]]
    taken, made = (image[numbers.lhs_spec[1]], w.shape[numbers.rhs_spec[0]])
    # With j + p = s q + r and tap u = r + s t, pixel j is Σ_t y[q − t] w[r + s t].
    taps = [w.shape[i] for i in numbers.rhs_spec[2:]]
    reach = [-(-k // s) for k, s in zip(taps, strides, strict=True)]
    w = jnp.transpose(w, (*numbers.rhs_spec[2:], numbers.rhs_spec[0], numbers.rhs_spec[1]))
    more = [(0, t * s - k) for t, s, k in zip(reach, strides, taps, strict=True)]
    w = jnp.pad(w, [*more, (0, 0), (0, 0)])
    w = w.reshape(*(n for pair in zip(reach, strides, strict=True) for n in pair), made, taken)
    w = jnp.flip(w, range(0, 2 * rank, 2))
    order = (*range(0, 2 * rank, 2), 2 * rank, *range(1, 2 * rank, 2), 2 * rank + 1)
    w = jnp.transpose(w, order).reshape(*reach, made, -1)
    spatial = "".join("XYZ"[:rank])
    cells = jax.lax.conv_general_dilated(
        _last_features(y, numbers.out_spec),
        w,
        (1,) * rank,
        [(t - 1, t - 1) for t in reach],
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        precision=params["precision"],
    )
    count, *places = cells.shape[:-1]
    cells = cells.reshape(count, *places, *strides, taken)
    pairs = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    pixels = jnp.transpose(cells, (0, *pairs, 1 + 2 * rank)).reshape(
        count, *(q * s for q, s in zip(places, strides, strict=True)), taken
    )
    edges = [
        (-low, n - (have - low), 0)
        for n, have, (low, _) in zip(sizes, pixels.shape[1:-1], params["padding"], strict=True)
    ]
    pixels = jax.lax.pad(pixels, jnp.zeros((), pixels.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    order = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    return jnp.transpose(pixels, [order.index(i) for i in range(rank + 2)])


def _chunks(count: int, each: int) -> int:
    """Count the chunks of images: as few as divide their number and stay in the cache."""
    least = -(-count * each // _PATCHES)
    return next((n for n in range(least, 4 * least) if count % n == 0), 1)


def _last_features(array: Any, spec: Sequence[int]) -> Any:
    return jnp.transpose(array, (spec[0], *spec[2:], spec[1]))


# ------------------------------------------------------------------ one family


def _image_batch(args: Any, dims: Any, *, of: Primitive, **params: Any) -> tuple[Any, int]:
    """Batch over images alone: more of them. Anything else is JAX's own."""
    (array, w), (axis, other) = args, dims
    numbers = params["dimension_numbers"]
    ends = numbers.lhs_spec[0], numbers.out_spec[0]
    entry, exit_ = ends if of is convolve else ends[::-1]
    if axis is None or other is not None:
        return jax.vmap(functools.partial(_OWN[of], **params), dims)(*args), 0
    array = jnp.moveaxis(array, axis, entry)
    batch = array.shape[entry]
    merged = array.reshape(*array.shape[:entry], -1, *array.shape[entry + 2 :])
    found = of.bind(merged, w, **params)
    return found.reshape(*found.shape[:exit_], batch, -1, *found.shape[exit_ + 1 :]), exit_


def _kernel_batch(args: Any, dims: Any, **params: Any) -> tuple[Any, int]:
    return jax.vmap(functools.partial(_kernel, **params), dims)(*args), 0


def _enter(primitive: Primitive, own: Any, on_cpu: Any, batch: Any) -> None:
    @functools.cache
    def compiled(items: tuple[Any, ...]) -> Any:
        return jax.jit(functools.partial(primitive.bind, **dict(items)))

    def abstract(*avals: Any, **params: Any) -> Any:
        (aval,) = jax.make_jaxpr(functools.partial(own, **params))(*map(struct, avals)).out_avals
        return aval

    primitive.def_impl(lambda *args, **params: compiled(tuple(params.items()))(*args))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(own, multiple_results=False))
    if on_cpu is not None:
        lowering = mlir.lower_fun(on_cpu, multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform="cpu")


_OWN: dict[Primitive, Any] = {convolve: _convolve, convolve_transposed: _transposed}
_enter(convolve, _convolve, None, functools.partial(_image_batch, of=convolve))
_enter(
    convolve_transposed,
    _transposed,
    _transposed_by_cells,
    functools.partial(_image_batch, of=convolve_transposed),
)
_enter(convolve_kernel, _kernel, _kernel_by_patches, _kernel_batch)
ad.defbilinear(
    convolve,
    lambda ct, x, w, **p: convolve_transposed.bind(ct, w, image=x.aval.shape, **p),
    lambda ct, x, w, **p: convolve_kernel.bind(x, ct, kernel=w.aval.shape, **p),
)
ad.defbilinear(
    convolve_transposed,
    lambda ct, y, w, image, **p: convolve.bind(ct, w, **p),
    lambda ct, y, w, image, **p: convolve_kernel.bind(ct, y, kernel=w.aval.shape, **p),
)
ad.defbilinear(
    convolve_kernel,
    lambda ct, x, y, kernel, **p: convolve_transposed.bind(y, ct, image=x.aval.shape, **p),
    lambda ct, x, y, kernel, **p: convolve.bind(x, ct, **p),
)
