"""Equinox modules as an `Autoencoder`: unmodified, for inference."""

import inspect
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from jaxcae.models.foreign import Calls, ModuleAutoencoder, copied
from jaxcae.models.methods import Methods, maker
from jaxcae.types import Params


def from_equinox(
    module: Any, decoder: Any = None, *, sample: Any = None, state: Any = None, **options: Any
) -> ModuleAutoencoder:
    """Make an `Autoencoder` of an Equinox module, as it is.

    Parameters are the module's floating-point arrays as plain nested dicts by the names of its
    fields, `{"layers": {"0": {"weight": …}}}`; all else is frozen. A module of the same class does
    in their place, so that `loss(module, xs)` can be differentiated by `eqx.filter_grad`.

    Modules run by `eqx.nn.inference_mode`: dropout is off, and `model.stochastic(key)` switches it
    on. A module sees one sample, as Equinox has it.

    Args:
        module: A module with methods `encode` and `decode`, each a function of one array, or the
            encoder alone. In place of a module, its class or any function of `key`: `init` then
            draws parameters from its key, where that of a module gives the module's own.
        decoder: The decoder, where `module` is the encoder; both are then called themselves. A
            pair (encoder, decoder) as `module` says the same.
        sample: One sample or its shape; with it, what is else checked when the model is first used
            is checked now.
        state: Of modules with state, the `eqx.nn.State` that `eqx.nn.make_with_state` gave: the
            methods get it, and its statistics stay as they are.
        **options: Keyword arguments for `encode` and `decode`; each gets those that it takes.

    Returns:
        A `ModuleAutoencoder(init, encode, decode)`. `model.module(params)` gives the module with
        trained parameters.

    Raises:
        ValueError: If there is no encode or decode, or one returns anything but an array.
    """
    import equinox as eqx

    if isinstance(module, tuple) and len(module) == 2:
        module, decoder = module
    make = maker(module, "key")
    if make is not None:
        made = make(jax.random.key(0))
        module, decoder = made if len(made) == 2 else (*made, None)
    for part in (module,) if decoder is None else (module, decoder):
        if not isinstance(part, eqx.Module):
            raise ValueError(
                "expected an Equinox module, or a function of key that makes one, "
                f"got {type(part).__name__}."
            )
    methods = Methods.of(module, decoder, options)
    arrays, rest = eqx.partition(methods.parts, eqx.is_inexact_array)
    if not jax.tree.leaves(arrays):
        raise ValueError(f"{methods.name} has no floating-point array to train.")

    def rebuild(params: Params) -> tuple[Any, ...]:
        parts = params if isinstance(params, tuple) else (params,)
        if all(isinstance(part, eqx.Module) for part in parts):
            return parts
        return eqx.combine(_filled(arrays, methods.divide(params)), rest)

    def call(index: int, params: Params, x: Any, key: PRNGKeyArray | None) -> Any:
        parts = eqx.nn.inference_mode(rebuild(params))
        if key is not None:
            parts = _with_dropout(parts)
        method = getattr(methods.owners(parts)[index], methods.names[index])
        arguments = methods.arguments(index, random=key is not None)
        if key is not None and "key" in inspect.signature(method).parameters:
            arguments["key"] = jax.random.fold_in(key, index)
        return method(x, **arguments) if state is None else method(x, state, **arguments)[0]

    def init(key: PRNGKeyArray) -> Params:
        if make is None:
            return copied(methods.join([_names(part) for part in arrays]))
        return methods.join([_names(p) for p in eqx.filter(make(key), eqx.is_inexact_array)])

    def module_of(params: Params) -> Any:
        parts = rebuild(params)
        return parts if len(parts) == 2 else parts[0]

    frozen = [leaf for leaf in jax.tree.leaves((rest, state)) if eqx.is_array(leaf)]
    calls = Calls(
        methods.name,
        False,
        init,
        lambda params, x, key: call(0, params, x, key),
        lambda params, z, key: call(1, params, z, key),
        module_of,
        frozen,
    )
    return ModuleAutoencoder.of([lambda: calls], sample)


def _with_dropout(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Switch on dropout alone: a BatchNorm keeps to its running averages."""
    import equinox as eqx

    def switch(leaf: Any) -> Any:
        if not isinstance(leaf, eqx.nn.Dropout):
            return leaf
        return eqx.tree_at(lambda dropout: dropout.inference, leaf, False)

    return jax.tree.map(switch, parts, is_leaf=lambda leaf: isinstance(leaf, eqx.nn.Dropout))


def _paths(tree: Any) -> list[tuple[str, ...]]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [
        tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path) for path, _ in found
    ]


def _names(tree: Any) -> Params:
    """Give the leaves of a module as nested dicts."""
    named: dict[str, Any] = {}
    for path, leaf in zip(_paths(tree), jax.tree.leaves(tree), strict=True):
        group = named
        for name in path[:-1]:
            group = group.setdefault(name, {})
        group[path[-1]] = leaf
    return named


def _filled(trees: tuple[Any, ...], params: tuple[Params, ...]) -> tuple[Any, ...]:
    """Put the leaves of nested dicts back where `_names` took them from."""
    filled = []
    for tree, named in zip(trees, params, strict=True):
        leaves = []
        for path in _paths(tree):
            leaf = named
            for name in path:
                leaf = leaf[name]
            leaves.append(leaf)
        filled.append(jax.tree.unflatten(jax.tree.structure(tree), leaves))
    return tuple(filled)
