"""Samples as they come: taken as one array, or refused in one line."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CURE = "Pass numpy.asarray(xs, dtype='float32')."


def is_array(leaf: Any) -> bool:
    """Tell whether it is an array, NumPy's too, or the shape and dtype of one."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def one_array(xs: Any) -> tuple[Any, Any]:
    """Take the one array out of a batch that may be a pytree of one leaf; return its tree, too.

    Raises:
        TypeError: If it is anything else, or not floating point.
        ValueError: If it is no batch.
    """
    leaves, tree = jax.tree.flatten(xs)
    if len(leaves) != 1:
        kind = type(xs).__name__
        what = f"a {kind} of {len(leaves)} leaves" if leaves else f"an empty {kind}"
        raise TypeError(
            f"xs must be one array of samples, got {what}. Concatenate features, or pass "
            "numpy.asarray(xs, dtype='float32')."
        )
    (leaf,) = leaves
    if not is_array(leaf):
        name, module = type(leaf).__qualname__, type(leaf).__module__
        name = name if module == "builtins" else f"{module}.{name}"
        raise TypeError(f"xs must be one array of samples, got {name}. {_CURE}")
    if leaf.dtype.kind in "OSUV" and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"xs must be an array of numbers, got one of dtype {leaf.dtype}. {_CURE}")
    if isinstance(leaf, np.ndarray | np.generic):
        leaf = jnp.asarray(leaf)
    if len(leaf.shape) < 2:
        raise ValueError(
            f"xs must be a batch of shape (batch, *features), got shape {leaf.shape}. "
            "Use xs[None] for one sample."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"samples must be floating point to have a Jacobian, got {leaf.dtype}.")
    return leaf, tree


@contextlib.contextmanager
def blamed_on_samples(x: Any) -> Iterator[None]:
    """Explain an error of shapes by the width of a sample, where JAX's words say so.

    Raises:
        ValueError: In place of it.
    """
    try:
        yield
    except Exception as error:  # Flax has classes of its own
        said = str(error).split("\n", 1)[0]
        expected = _expected(said, x.shape)
        if expected is None:
            raise
        raise ValueError(
            f"expected {expected} features, got samples of shape {x.shape}. The encoder says: "
            f"{said}"
        ) from error


def _expected(said: str, shape: tuple[int, ...]) -> int | None:
    """Find the width that stands in a message against that of the samples."""
    sizes = re.findall(r"size (\d+) is different from (\d+)", said)
    pairs = [(int(a), int(b)) for a, b in sizes]
    shapes = [
        [int(n) for n in re.findall(r"\d+", found)]
        for found in re.findall(r"\((\d+(?:, ?\d+)*),?\)", said)
    ]
    for one in shapes:
        for other in shapes:
            apart = [(a, b) for a, b in zip(one, other, strict=False) if a != b]
            if len(one) == len(other) and len(apart) == 1:
                pairs += apart
    widths = {shape[-1]} if len(shape) == 1 else {shape[-1], shape[0]}
    for a, b in pairs:
        if (a in widths) != (b in widths):
            return b if a in widths else a
    return None
