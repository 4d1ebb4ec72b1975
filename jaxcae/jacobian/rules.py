"""What is known of primitives: which are linear in which operands, and which elementwise.

This table is all that the engine knows of mathematics. A primitive that is not in it is opaque: its
products are exact, and nothing is gained by its structure. `register` adds to the table.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Primitive

Linear = Callable[[JaxprEqn, frozenset[int]], bool]
"""Tells whether an equation is linear in the operands at these positions together, the rest fixed.
"""


class Rule(NamedTuple):
    """What is known of a primitive."""

    linear: Linear
    elementwise: bool


def register(
    primitive: Primitive | str,
    *,
    linear: bool | Collection[int] | Linear = False,
    elementwise: bool = False,
) -> Rule | None:
    """Tell the exact engine what a primitive is, so that encoders made of it stay cheap.

    Derivatives are always JAX's own; what is told here decides how often they are taken. **What is
    told must be true**: the engine cannot check it, and a primitive called linear that is not makes
    `"auto"`, `"chain"` and `"control_variate"` wrong. Compare with `method="reverse"`, which uses
    nothing of it. Registering again replaces what was told before.

    Args:
        primitive: A `jax.extend.core.Primitive`, or its name.
        linear: True if the results are linear in all array operands together (such as `add`); the
            positions in which they are linear together while the others are held (such as
            `{0}` for a division by `y`); or a function of the equation and the positions of the
            operands that depend on the sample. A constant part is allowed: affine is enough.
        elementwise: Whether each element of a result depends on the elements at the same index of
            the operands and on no others, all being of the result's shape or scalars.

    Returns:
        What was known of it before; None for nothing.

    Raises:
        TypeError: If `primitive` is neither a primitive nor a name.
        ValueError: If nothing is told.

    Example:
        >>> import jax, jaxcae
        >>> jaxcae.register("my_rotation", linear=True)  # before the encoder is first used
    """
    name = primitive if isinstance(primitive, str) else getattr(primitive, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"primitive must be a Primitive or its name, got {primitive!r}.")
    if not elementwise and linear is False:
        raise ValueError(f"say what {name!r} is: pass linear=... or elementwise=True.")
    before = _TABLE.get(name)
    _TABLE[name] = Rule(_linear(linear), elementwise)
    return before


def rule_of(eqn: JaxprEqn) -> Rule:
    """Look an equation's primitive up."""
    return _TABLE.get(eqn.primitive.name, _UNKNOWN)


def floating(*avals: Any) -> bool:
    """Tell whether all are real floating-point arrays."""
    return all(hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating) for a in avals)


def _linear(told: bool | Collection[int] | Linear) -> Linear:
    if callable(told):
        return told
    if isinstance(told, bool):
        return lambda eqn, moving: told
    positions = frozenset(told)
    return lambda eqn, moving: moving <= positions


def _one(eqn: JaxprEqn, moving: frozenset[int]) -> bool:
    return len(moving) == 1


def _keeps_numbers(eqn: JaxprEqn, moving: frozenset[int]) -> bool:
    """Judge a conversion: between floating-point types it is linear, up to rounding."""
    kinds: tuple[Any, Any] = (eqn.invars[0].aval, eqn.outvars[0].aval)
    return all(jnp.issubdtype(kind.dtype, jnp.inexact) for kind in kinds) and (
        floating(kinds[0]) or not floating(kinds[1])
    )


_UNKNOWN = Rule(_linear(False), False)
_TABLE: dict[str, Rule] = {
    name: Rule(_linear(False), True)
    for name in """abs acos acosh and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma
    eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p
    logistic lt max min ne nextafter not or pow reduce_precision rem round rsqrt sign sin sinh sqrt
    square tan tanh xor""".split()
}
for _name in """add add_any copy copy_p device_put mesh_cast name neg optimization_barrier pcast
    pvary reshard sharding_constraint sub""".split():
    _TABLE[_name] = Rule(_linear(True), True)
for _name in """broadcast_in_dim complex concatenate conj cumsum expand_dims fft imag pad real
    reduce_sum reduce_window_sum reshape rev slice split squeeze transpose""".split():
    _TABLE[_name] = Rule(_linear(True), False)
for _name in ("dot_general", "conv_general_dilated"):
    _TABLE[_name] = Rule(_one, False)
_TABLE |= {
    "mul": Rule(_one, True),
    "div": Rule(_linear({0}), True),
    "select_n": Rule(lambda eqn, moving: 0 not in moving, True),
    "convert_element_type": Rule(_keeps_numbers, True),
    # Divisors and indices held:
    "gather": Rule(_linear({0}), False),
    "dynamic_slice": Rule(_linear({0}), False),
    "dynamic_update_slice": Rule(_linear({0, 1}), False),
    "scatter": Rule(_linear({0, 2}), False),
    "scatter-add": Rule(_linear({0, 2}), False),
    "scatter-sub": Rule(_linear({0, 2}), False),
    "triangular_solve": Rule(_linear({1}), False),
}
