"""Flax Linen modules, by `init` and `apply` on their variables."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxcae.models.foreign import Calls, Refused, copied
from jaxcae.models.methods import Methods
from jaxcae.types import Params


def linen_calls(
    module: Any,
    decoder: Any,
    variables: Any,
    sample: jax.ShapeDtypeStruct | None,
    options: Mapping[str, Any],
    *,
    batched: bool,
) -> Calls:
    """Read a module, or an encoder and a decoder.

    Args:
        module: The module, or the encoder.
        decoder: The decoder, or None.
        variables: Their variables, as a pair for two; or None, to draw them for a `sample`.
        sample: The layout of one sample.
        options: Keyword arguments of the methods.
        batched: Whether to draw for, and to call with, batches.
    """
    from flax.errors import ModifyScopeVariableError

    methods = Methods.of(module, decoder, options)
    encoding, decoding = (methods.arguments(index, random=False) for index in (0, 1))

    def draw(key: PRNGKeyArray) -> tuple[Any, ...]:
        """Draw the variables of each part."""
        assert sample is not None
        x = jnp.zeros((1, *sample.shape) if batched else sample.shape, sample.dtype)
        if decoder is None:
            return (module.init(key, x, method=lambda own, x: own.decode(
                own.encode(x, **encoding), **decoding)),)  # fmt: skip
        code, first = module.init_with_output(key, x, **encoding)
        return first, decoder.init(jax.random.fold_in(key, 1), code, **decoding)

    init: Callable[[PRNGKeyArray], Params]
    if variables is not None:
        given = variables if decoder is not None else (variables,)
        own, rest = _divided(given)

        def init(key: PRNGKeyArray) -> Params:
            return copied(methods.join(own))

    else:
        # Statistics do not depend on the key, and are drawn only where there are any.
        rest = _divided(jax.eval_shape(lambda: draw(jax.random.key(0))))[1]
        if jax.tree.leaves(rest):
            rest = jax.jit(lambda: _divided(draw(jax.random.key(0)))[1])()

        def init(key: PRNGKeyArray) -> Params:
            return methods.join(_divided(draw(key))[0])

    def call(index: int, params: Params, x: Any, key: PRNGKeyArray | None) -> Any:
        number = index if decoder is not None else 0
        state = {**rest[number], "params": methods.divide(params)[number]}
        rngs = None if key is None else jax.random.fold_in(key, index)
        arguments = methods.arguments(index, random=key is not None)
        owner = methods.owners(methods.parts)[index]
        try:
            return owner.apply(state, x, method=methods.names[index], rngs=rngs, **arguments)
        except ModifyScopeVariableError as error:
            raise Refused(
                f"{methods.name}: {('encode', 'decode')[index]} updates what is frozen, as a "
                "BatchNorm does that normalises over the batch and so mixes its samples. Let it "
                "use running averages by use_running_average=True."
            ) from error

    def module_of(params: Params) -> Any:
        bound = tuple(
            part.bind({**own_rest, "params": own})
            for part, own_rest, own in zip(methods.parts, rest, methods.divide(params), strict=True)
        )
        return bound if decoder is not None else bound[0]

    return Calls(
        methods.name,
        batched,
        init,
        lambda params, x, key: call(0, params, x, key),
        lambda params, z, key: call(1, params, z, key),
        module_of,
        methods.join(rest),
    )


def _divided(variables: tuple[Any, ...]) -> tuple[list[Params], list[Params]]:
    """Divide the variables of each part into parameters and the rest, as plain dicts."""
    from flax import core
    from flax.linen import meta

    plain = [core.unfreeze(meta.unbox(part)) for part in variables]
    own = [part.get("params", {}) for part in plain]
    return own, [{name: v for name, v in part.items() if name != "params"} for part in plain]
