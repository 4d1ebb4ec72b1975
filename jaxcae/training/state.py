"""What a training run is made of: its state, its batches, and how it may fail."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from jaxcae.types import Params

Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps
"""Any optax gradient transformation."""


@flax.struct.dataclass
class TrainState:
    """All that the next step needs.

    Attributes:
        params: The parameters.
        opt_state: The state of the optimizer.
        step: How many steps have been taken, an int32 scalar.
        key: A typed key. It never changes: step keys are `fold_in(key, step)`.
        best: The parameters of the best epoch so far, where `fit` is told to watch for it.
    """

    # Not annotated by shape: as a pytree it may hold tracers, shapes or shardings in their place.
    params: Params
    opt_state: Any
    step: Any
    key: Any
    best: Any = None

    @classmethod
    def create(cls, params: Params, optimizer: Optimizer, key: PRNGKeyArray) -> "TrainState":
        """Make the state before the first step.

        Raises:
            TypeError: If `optimizer` is not one of optax's, such as `optax.adam(1e-3)`.
        """
        if not hasattr(optimizer, "init"):
            raise TypeError(
                f"optimizer must be an optax gradient transformation such as optax.adam(1e-3), "
                f"got {optimizer!r:.80}."
            )
        return cls(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


@runtime_checkable
class Batches(Protocol):
    """Training data that does not fit in memory: batches whose position follows from the step."""

    @property
    def steps_per_epoch(self) -> int:
        """How many batches make an epoch, a short last one included."""
        ...

    def from_step(self, step: int) -> Iterator[Any]:
        """Iterate without end over the batches of the steps from `step` on."""
        ...


@runtime_checkable
class InParts(Protocol):
    """Batches of which a process can read the rows that it needs, and leave the rest unread."""

    def of_rows(self, rows_here: Callable[[int], Any]) -> Batches:
        """Return the same batches, of which only some rows are read; the others may be anything.

        Args:
            rows_here: The numbers of the rows to read, of a batch of a size.
        """
        ...


class DivergedError(ArithmeticError):
    """The loss is no longer finite.

    Attributes:
        step: The step that produced it, counted from 1.
        state: The state before that step; its losses and parameters were all finite.
    """

    def __init__(self, what: str, value: float, step: int, state: TrainState):
        advice = "Try a smaller learning rate or contraction."
        if step <= 1:  # nothing has been learnt yet
            advice = (
                "Samples and parameters are finite: are they too large, or is the loss undefined "
                "there? Scale the samples."
            )
        super().__init__(f"{what} became {value} at step {step}. {advice}")
        self.step, self.state = step, state


@jax.jit
def copied(tree: Any) -> Any:
    """Copy every array: to hold on to what the next step overwrites in place."""
    return jax.tree.map(jnp.copy, tree)
