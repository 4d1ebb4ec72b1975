"""Which modes of differentiation an encoder has, and what to say where it lacks one."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxcae.jacobian.jaxprs import calls_primitive
from jaxcae.jacobian.program import Encoder, of_sample

_NO_REVERSE = (
    "the encoder runs a lax.while_loop (or a fori_loop without static bounds), which has no "
    "reverse mode, so the penalty has no gradient. Use lax.scan or static bounds; for values "
    "alone, method='forward'."
)
_NO_FORWARD = (
    "method='forward' takes Jacobian-vector products, which the encoder's jax.custom_vjp{} does "
    "not have. Use method='reverse' or 'auto', or write its rule as a jax.custom_jvp."
)


def require_reverse(encoder: Encoder) -> None:
    """Ask JAX whether a loop stands in the way of gradients, or carries none.

    Raises:
        ValueError: If it does.
    """
    if not _has_reverse(encoder):
        raise ValueError(_NO_REVERSE)


def require_forward(encoder: Encoder) -> None:
    """Look for a function that has a reverse rule alone.

    Raises:
        ValueError: If there is one.
    """
    for eqn in of_sample(encoder.program):
        if calls_primitive(eqn, "custom_vjp_call"):
            body = eqn.params.get("call_jaxpr")
            name = getattr(getattr(body, "debug_info", None), "func_name", None)
            raise ValueError(_NO_FORWARD.format(f" {name}" if name else ""))


def without_reverse(encoder: Encoder, compute: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Compute codes and norms without reverse mode; explain it to who takes a gradient of them."""
    if _has_reverse(encoder):
        return compute()
    try:
        codes, norms = compute()
    except TypeError as error:  # JAX's own, where a loop in a map is linearised
        raise ValueError(_NO_REVERSE) from error
    return codes, _no_reverse.bind(norms)


def _has_reverse(encoder: Encoder) -> bool:
    if not any(calls_primitive(eqn, "while") for eqn in of_sample(encoder.program)):
        return True

    def pulled(params: Any, x: Any) -> Any:
        code, pull = jax.vjp(encoder._replace(params=params).encode, x)
        return pull(code)

    try:
        jax.eval_shape(pulled, encoder.params, encoder.program.x)
    except ValueError as error:
        if "while_loop" not in str(error):
            raise
        return False
    return True


def _refuse(*_: Any) -> Any:
    raise ValueError(_NO_REVERSE)


_no_reverse = Primitive("no_reverse_mode")  # the identity, linear, without a transpose
_no_reverse.def_impl(lambda norms: norms)
_no_reverse.def_abstract_eval(lambda norms: norms)
ad.deflinear2(_no_reverse, _refuse)
ad.primitive_jvps[_no_reverse] = lambda primals, tangents: (
    _no_reverse.bind(*primals),
    tangents[0] if type(tangents[0]) is ad.Zero else _no_reverse.bind(*tangents),
)
batching.defvectorized(_no_reverse)
mlir.register_lowering(_no_reverse, lambda _, norms: [norms])
