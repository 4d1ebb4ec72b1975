"""Where two correct frameworks differ by convention: nobody's fault, everybody's bug."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from torch import nn

from parity.museum.exhibit import Exhibit
from parity.reference import norms_by_jacobian


def exhibits() -> Iterator[Exhibit]:
    """Measure the hazards of this room."""
    grid = np.linspace(-4, 4, 8001, dtype="float32")
    gap = np.abs(np.asarray(jax.nn.gelu(grid)) - F.gelu(torch.from_numpy(grid)).numpy()).max()
    exact = np.asarray(jax.nn.gelu(grid, approximate=False))
    rest = np.abs(exact - F.gelu(torch.from_numpy(grid)).numpy()).max()
    yield Exhibit(
        "GELU by its default",
        "ports between the frameworks",
        f"jax.nn.gelu is the tanh form, F.gelu the erf form: up to {gap:.1g} apart "
        f"(with approximate=False {rest:.0g})",
        None,
        None,
        "jax.nn.gelu(a, approximate=False), as jaxcae has it",
        None,
        {"gap": float(gap), "rest": float(rest)},
    )

    a = torch.tensor(20.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.softplus(a), a)
    (raised,) = torch.autograd.grad(F.softplus(a, threshold=100), a)
    with jax.enable_x64(True):
        ours = float(jax.grad(jax.nn.softplus)(jnp.asarray(20.5)))
    yield Exhibit(
        "softplus above 20",
        "PyTorch's threshold",
        f"torch returns a itself: the slope is exactly {slope.item():.0f} where it is 1 − "
        f"{1 - ours:.1e}; nothing in float32, three thousand bounds in float64",
        None,
        None,
        "F.softplus(a, threshold=100) when comparing in float64",
        None,
        {"cut": 1 - slope.item(), "raised": abs(raised.item() - ours), "ours": 1 - ours},
    )

    tie = float(jax.grad(lambda a: jnp.maximum(a, 0.0))(0.0))
    relu = float(jax.grad(jax.nn.relu)(0.0))
    zero = torch.zeros((), requires_grad=True)
    (theirs,) = torch.autograd.grad(F.relu(zero), zero)
    yield Exhibit(
        "ReLU written as maximum(a, 0)",
        "hand-written activations in JAX",
        f"its slope at 0 is {tie} (jax.nn.relu and torch: {relu:.0f}); dead inputs and zero biases "
        "put units exactly there",
        None,
        None,
        "jax.nn.relu",
        None,
        {"maximum": tie, "relu": relu, "torch": theirs.item()},
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(784, 256)
    ours = float(np.std(jax.nn.initializers.glorot_uniform()(jax.random.key(0), (784, 256))))
    yield Exhibit(
        "layout and first weights",
        "ports between the frameworks",
        f"torch keeps (out, in) = {tuple(linear.weight.shape)}, jaxcae (in, out); default weights "
        f"have standard deviations {linear.weight.std().item():.3f} and {ours:.3f}, and torch "
        "draws the biases too",
        None,
        None,
        "start from the same weights: python -m parity convert",
        None,
        {"torch": linear.weight.std().item(), "jax": ours},
    )

    weight = torch.ones(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight], lr=1.0).step()
    update = optax.adamw(1.0)
    ones = jnp.ones(1)
    step, _ = update.update(jnp.zeros(1), update.init(ones), ones)
    yield Exhibit(
        "AdamW's default decay",
        "ports between the frameworks",
        f"with no gradient at all torch shrinks a weight by {1 - weight.item():.2g} of the rate, "
        f"optax by {-float(step[0]):.2g}",
        None,
        None,
        "give weight_decay on both sides, or use Adam",
        None,
        {"torch": 1 - weight.item(), "optax": -float(step[0])},
    )

    yield _recurrent()


def _recurrent() -> Exhibit:
    """PyTorch's documented recipe for per-sample Jacobians, on its own recurrent modules."""
    raised = {}
    kinds: tuple[Callable[..., nn.RNNBase], ...] = nn.GRU, nn.LSTM
    modules = [kind(3, 4, batch_first=True).double() for kind in kinds]
    for module in modules:
        raised[type(module).__name__] = 0.0
        try:
            norms_by_jacobian(partial(_last_state, module), torch.zeros(2, 5, 3).double())
        except RuntimeError:
            raised[type(module).__name__] = 1.0
    names = " and ".join(f"nn.{name}" for name, count in raised.items() if count)
    return Exhibit(
        "vmap(jacrev) of nn.GRU or nn.LSTM",
        "the documentation's recipe for per-sample Jacobians",
        f"raises for {names or 'neither'}: they write into arrays that vmap has not batched "
        "(an LSTM in float32 on a CPU falls back to one sample at a time)",
        None,
        None,
        "one autograd.grad per unit, or jaxcae.contractive_penalty of a lax.scan, batched",
        None,
        raised,
    )


def _last_state(module: nn.RNNBase, xs: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = module(xs)[0]
    return states[:, -1]
