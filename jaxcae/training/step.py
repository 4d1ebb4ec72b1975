"""One step of gradient descent, compiled once for each loss and optimizer while they live."""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcae.objective.side_by_side import call_loss
from jaxcae.training.state import Optimizer, TrainState
from jaxcae.types import Loss, Metrics, Params

Update = Callable[..., Any]
"""The `update` of an optax gradient transformation."""


class TrainStep:
    """A compiled step; see `make_train_step`."""

    def __init__(self, loss: Loss, optimizer: Optimizer, donate: bool) -> None:
        # Held here: what is compiled holds them weakly.
        self.loss, self.optimizer = loss, optimizer
        compiled = Compiled.of(loss, optimizer.update)
        self._call = compiled.donating_step if donate else compiled.step

    def __call__(self, state: TrainState, xs: Any, weights: Any = None) -> tuple[TrainState, Any]:
        """Take a step on a batch, whose samples may carry weights."""
        after: tuple[TrainState, Any] = self._call(state, xs, weights)
        return after


def make_train_step(
    loss: Loss, optimizer: Optimizer, *, donate: bool = False
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Make one step of gradient descent, jitted.

    The step's key is `fold_in(state.key, state.step)`. Optimizers that ask for more than the
    gradient get `value`, `grad`, `value_fn` and `grad_fn`, as optax names them, as far as they
    take them. With `optax.lookahead` the parameters are `optax.LookaheadParams`: a loss of this
    library sees the fast ones, another gets both.

    Args:
        loss: `(params, xs, key) -> (scalar, metrics)`, such as `cae_loss(model)`; where it takes
            `step` by name it gets that, too.
        optimizer: Any optax gradient transformation.
        donate: Let the new state take the memory of the old one, which is unusable afterwards.

    Returns:
        `step(state, xs, weights=None) -> (state, metrics)`; metrics holds `loss` and what the loss
        reports. `weights` are for losses that weigh samples.
    """
    return TrainStep(loss, optimizer, donate)


def take_step(
    loss: Loss, update: Update, state: TrainState, xs: Any, weights: Any = None
) -> tuple[TrainState, Metrics]:
    """Take one step, without compiling it."""
    key = jax.random.fold_in(state.key, state.step)

    def value_of(params: Params) -> tuple[Any, Metrics]:
        return call_loss(loss, params, xs, key, step=state.step, weights=weights)

    (value, metrics), grads = jax.value_and_grad(value_of, has_aux=True)(state.params)
    if isinstance(grads, optax.LookaheadParams):
        grads = grads.fast
    offered = {
        "value": value,
        "grad": grads,
        "value_fn": lambda params: value_of(params)[0],
        "grad_fn": lambda params, _: jax.grad(value_of, has_aux=True)(params)[0],
    }
    extra = {name: offered[name] for name in _taken(update, offered)}
    updates, opt_state = update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    state = replace(state, params=params, opt_state=opt_state, step=state.step + 1)
    return state, {"loss": value, **metrics}


def guarded_step(
    loss: Loss, update: Update, going: Any, state: TrainState, xs: Any, weights: Any = None
) -> tuple[Any, TrainState, Metrics]:
    """Take a step if all before it were sound and its loss and parameters come out finite.

    Otherwise the state stays as it is, so that the last good one needs no memory of its own.
    """
    after, metrics = take_step(loss, update, state, xs, weights)
    finite = [jnp.isfinite(jnp.sum(p)) for p in jax.tree.leaves(after.params) if _inexact(p)]
    going = going & jnp.isfinite(metrics["loss"]) & jnp.all(jnp.stack([jnp.asarray(True), *finite]))
    state = jax.tree.map(lambda new, old: jnp.where(going, new, old), after, state)
    return going, state, metrics


@dataclass(frozen=True)
class Compiled:
    """The compiled functions of one loss and optimizer.

    They refer to both weakly, and are remembered under both weakly: the same two objects compile
    once, and what was compiled goes when either does.
    """

    loss: Callable[[], Loss]
    update: Callable[[], Update]
    step: Any
    donating_step: Any

    @classmethod
    def of(cls, loss: Loss, update: Update) -> "Compiled":
        """Find what was compiled for these two, or begin."""
        return remembered(_COMPILED, loss, update, lambda: cls._make(loss, update))

    @classmethod
    def _make(cls, loss: Loss, update: Update) -> "Compiled":
        its_loss, its_update = reference(loss), reference(update)

        def step(state: TrainState, xs: Any, weights: Any) -> tuple[TrainState, Metrics]:
            return take_step(its_loss(), its_update(), state, xs, weights)

        return cls(
            its_loss,
            its_update,
            jax.jit(step),
            jax.jit(step, donate_argnums=0),
        )


Table = weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Any]]
_COMPILED: Table = weakref.WeakKeyDictionary()


def remembered(table: Table, loss: Any, update: Any, make: Callable[[], Any]) -> Any:
    """Look up what belongs to two objects, or make it; it must not refer to them but weakly."""
    # A bound method is made anew at every look: its object stands for it.
    owner = update.__self__ if inspect.ismethod(update) else update
    try:
        row = table.setdefault(loss, weakref.WeakKeyDictionary())
        if owner not in row:
            row[owner] = make()
        return row[owner]
    except TypeError:  # without a hash or a weak reference: the caller alone keeps what is made
        return make()


def reference(thing: Any) -> Callable[[], Any]:
    """Refer to a thing, weakly if it allows that."""
    try:
        hash(thing)
        return weakref.WeakMethod(thing) if inspect.ismethod(thing) else weakref.ref(thing)
    except TypeError:
        return partial(_identity, thing)


def _identity(thing: Any) -> Any:
    return thing


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)


def _taken(update: Update, offered: dict[str, Any]) -> list[str]:
    parameters = inspect.signature(update).parameters
    # A line search hands on whatever it does not know to `value_fn`, which takes no `grad_fn`.
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return [n for n in offered if n in parameters or (anything and n != "grad_fn")]
