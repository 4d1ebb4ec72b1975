"""Several losses as one, so that several networks train on the same batches."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxcae.types import Loss, Metrics, Params


def side_by_side(losses: Mapping[str, Loss]) -> Loss:
    """Train several networks on the same batches as if each were alone.

    The parameters of the result are a dict with the networks' names as keys. Its value is the sum
    of the losses, so its gradient with respect to one network is the gradient of that network's
    own loss. With an optimizer that treats parameters one by one (SGD, Adam and most others, but
    not clipping by the global norm) each network therefore takes the steps it would take alone.

    Metrics carry the network's name in front: `plain/reconstruction`.
    """

    def loss(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> tuple[Any, Metrics]:
        total: Any = jnp.zeros(())
        metrics: Metrics = {}
        for name, one in losses.items():
            value, own = one(params[name], xs, key)
            total = total + value
            metrics |= {f"{name}/{k}": v for k, v in {"loss": value, **own}.items()}
        return total, {"loss": total, **metrics}

    return loss
