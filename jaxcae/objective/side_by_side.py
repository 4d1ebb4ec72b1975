"""Several losses as one, so that several networks train on the same batches."""

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, Scalar

from jaxcae.types import Loss, Metrics, Params


def call_loss(
    loss: Loss, params: Params, xs: Any, key: PRNGKeyArray | None, **context: Any
) -> tuple[Scalar, Metrics]:
    """Call a loss with those of `step` and `weights` that are given and that it takes by name."""
    given = {k: v for k, v in context.items() if v is not None and takes(loss, k)}
    return loss(params, xs, key, **given)


def takes(loss: Loss, name: str) -> bool:
    """Whether a loss has a parameter of this name."""
    try:
        return name in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # no signature to be read
        return False


def whole(loss: Loss) -> Loss:
    """Return the loss that leaves out no term at any step, for evaluation."""
    found: Loss = getattr(loss, "whole", loss)
    return found


class SideBySide:
    """The sum of losses over parameters by name; see `side_by_side`."""

    def __init__(self, losses: Mapping[str, Loss]) -> None:
        self.losses = dict(losses)

    @cached_property
    def whole(self) -> "SideBySide":
        """The same with no term left out at any step."""
        parts = {name: whole(loss) for name, loss in self.losses.items()}
        return self if parts == self.losses else SideBySide(parts)

    def __call__(
        self,
        params: Params,
        xs: Any,
        key: PRNGKeyArray | None = None,
        *,
        step: Any = None,
        weights: Any = None,
    ) -> tuple[Scalar, Metrics]:
        """Sum the losses; metrics carry the network's name in front."""
        total: Any = jnp.zeros(())
        metrics: Metrics = {}
        for name, loss in self.losses.items():
            value, own = call_loss(loss, params[name], xs, key, step=step, weights=weights)
            total = total + value
            metrics |= {f"{name}/{k}": v for k, v in {"loss": value, **own}.items()}
        return total, {"loss": total, **metrics}


def side_by_side(losses: Mapping[str, Loss]) -> Loss:
    """Train several networks on the same batches as if each were alone.

    The parameters of the result are a dict with the networks' names as keys. Its value is the sum
    of the losses, so its gradient with respect to one network is the gradient of that network's
    own loss. With an optimizer that treats parameters one by one (SGD, Adam and most others, but
    not clipping by the global norm) each network therefore takes the steps it would take alone.

    Metrics carry the network's name in front: `plain/reconstruction`.
    """
    return SideBySide(losses)
