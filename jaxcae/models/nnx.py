"""Flax NNX modules, by `nnx.split` and `nnx.merge`."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from jaxcae.models.foreign import Calls, copied, is_trainable
from jaxcae.models.methods import Methods, maker
from jaxcae.types import Params


def nnx_calls(module: Any, decoder: Any, options: Mapping[str, Any]) -> Calls:
    """Read a module, its class or a function of `rngs`, or an encoder and a decoder; unbatched.

    Raises:
        ValueError: If it is no module, or has nothing to train.
    """
    from flax import nnx

    make = maker(module, "rngs")
    if make is not None:
        made = make(nnx.Rngs(0))
        module, decoder = made if len(made) == 2 else (*made, None)
    for part in (module,) if decoder is None else (module, decoder):
        if not isinstance(part, nnx.Module):
            raise ValueError(
                "expected a Flax module, or a function of rngs that makes one, "
                f"got {type(part).__name__}."
            )
    methods = Methods.of(module, decoder, options)
    definition, own, rest, frozen = _divided(methods.join(methods.parts))
    if not own:
        raise ValueError(f"{methods.name} has no nnx.Param to train.")
    definitions = {random: _in_mode(methods, random) for random in (False, True)}

    def call(index: int, params: Params, x: Any, key: PRNGKeyArray | None) -> Any:
        random = key is not None
        state = rest if key is None else _reseeded(rest, jax.random.fold_in(key, index))
        parts = methods.divide(nnx.merge(definitions[random], params, state))
        method = getattr(methods.owners(parts)[index], methods.names[index])
        return method(x, **methods.arguments(index, random=random))

    def init(key: PRNGKeyArray) -> Params:
        return copied(own) if make is None else _divided(methods.join(make(nnx.Rngs(key))))[1]

    def module_of(params: Params) -> Any:
        parts = methods.divide(nnx.merge(definition, params, rest))
        return parts if len(parts) == 2 else parts[0]

    return Calls(
        methods.name,
        False,
        init,
        lambda params, x, key: call(0, params, x, key),
        lambda params, z, key: call(1, params, z, key),
        module_of,
        frozen,
    )


def _divided(tree: Any) -> tuple[Any, Params, Params, Params]:
    """Split a module into its definition, what is trained, all the rest, and what of it counts.

    What counts is what a forward pass without random numbers may depend on.
    """
    from flax import nnx

    definition, state = nnx.split(tree)
    own, rest, frozen = [], [], []
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        if isinstance(leaf, nnx.Param) and is_trainable(value):
            own.append((path, value))
            continue
        rest.append((path, value))
        if not isinstance(leaf, nnx.RngState):
            frozen.append((path, value))
    return definition, _nested(own), _nested(rest), _nested(frozen)


def _in_mode(methods: Methods, random: bool) -> Any:
    """Return the definition of a copy that uses its running averages, and dropout or not."""
    from flax import nnx

    copy = nnx.merge(*nnx.split(methods.join(methods.parts)))
    for part in methods.divide(copy):
        part.set_attributes(
            deterministic=not random, use_running_average=True, raise_if_not_found=False
        )
    return nnx.split(copy)[0]


def _reseeded(rest: Params, key: PRNGKeyArray) -> Params:
    """Draw the key of every stream of random numbers from one key."""
    leaves, structure = jax.tree.flatten(rest)
    drawn = []
    for number, leaf in enumerate(leaves):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(key, number)
            leaf = jax.random.split(own, leaf.shape) if leaf.shape else own
        drawn.append(leaf)
    return jax.tree.unflatten(structure, drawn)


def _nested(leaves: Iterable[tuple[tuple[Any, ...], Any]]) -> dict[Any, Any]:
    """Build nested dicts from paths."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves:
        group = tree
        for name in path[:-1]:
            group = group.setdefault(name, {})
        group[path[-1]] = leaf
    return tree
