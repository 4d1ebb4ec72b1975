"""Recurrent encoders: the exact penalty of a GRU and of an LSTM with PyTorch's own weights.

A window of T steps with n features becomes the hidden state after its last step. In JAX that is a
`lax.scan` over a cell, and ‖∂h_T/∂x‖²_F of a batch is `jaxcae.contractive_penalty` as for any other
encoder. In PyTorch the documented way, `vmap(jacrev(f))`, raises for `nn.GRU` and `nn.LSTM`: they
write into arrays that `vmap` has not batched. (An LSTM in float32 on a CPU falls back to one sample
at a time.) The reference therefore takes one `autograd.grad` per
unit through the unmodified module, and again `vmap(jacrev)` through the cells of the papers.

References:
    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014,
    arXiv:1406.1078, with the reset gate after the product, as PyTorch has it. Hochreiter,
    Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997,
    doi:10.1162/neco.1997.9.8.1735.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from numpy.typing import NDArray
from torch import Tensor, nn

import jaxcae
from parity.cases import DTYPES, Case
from parity.compare import Row, flatten, row_of
from parity.convert import kernel_from_torch
from parity.layers import as_numpy
from parity.reference import norms_by_code_unit, norms_by_jacobian

METHODS = ("auto", "reverse")
STEPS = 6
KINDS: dict[str, Callable[..., nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM}


class Outcome(NamedTuple):
    """Codes and norms of a batch, and the gradients of the mean norm by the leaves of params."""

    codes: NDArray[Any]
    norms: NDArray[Any]
    gradients: dict[str, NDArray[Any]]


def table() -> Iterator[Case]:
    """List the encoders that are compared; `sizes` are the features of a step and the units."""
    for kind in KINDS:
        for dtype, core in (("float64", DTYPES[:1]), ("float32", ())):
            name = f"recurrent/{kind}"
            yield Case(name, (3, 5), "tanh", batch=4, core=core, dtype=dtype)  # type: ignore[arg-type]


def params_from_recurrent(state: Mapping[str, Any]) -> dict[str, Any]:
    """Make params of the weights of a one-layer `nn.GRU` or `nn.LSTM`: kernels are (in, gates).

    The gates stay in PyTorch's order: reset, update, new; or input, forget, cell, output.
    """
    return {
        ours: {
            "kernel": kernel_from_torch(as_numpy(state[f"weight_{theirs}_l0"])),
            "bias": as_numpy(state[f"bias_{theirs}_l0"]),
        }
        for ours, theirs in (("input", "ih"), ("hidden", "hh"))
    }


def gru(params: Any, x: Any) -> Any:
    """Encode one window (T, n) as h_T: h' = (1 − z)∘tanh(a + r∘(Uh + c)) + z∘h."""

    def cell(h: Any, gates: Any) -> Any:
        of_h = h @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        (a, b, c), (d, e, f) = jnp.split(gates, 3), jnp.split(of_h, 3)
        reset, update = jax.nn.sigmoid(a + d), jax.nn.sigmoid(b + e)
        return (1 - update) * jnp.tanh(c + reset * f) + update * h, None

    gates = x @ params["input"]["kernel"] + params["input"]["bias"][None]
    start = jnp.zeros(params["hidden"]["kernel"].shape[0], gates.dtype)
    return lax.scan(cell, start, gates)[0]


def lstm(params: Any, x: Any) -> Any:
    """Encode one window (T, n) as h_T: c' = f∘c + i∘g, h' = o∘tanh(c')."""

    def cell(carry: Any, gates: Any) -> Any:
        h, c = carry
        sums = gates + h @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        i, f, g, o = jnp.split(sums, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    gates = x @ params["input"]["kernel"] + params["input"]["bias"][None]
    zeros = jnp.zeros(params["hidden"]["kernel"].shape[0], gates.dtype)
    return lax.scan(cell, (zeros, zeros), gates)[0][0]


ENCODERS: dict[str, Callable[[Any, Any], Any]] = {"gru": gru, "lstm": lstm}


def compare(
    case: Case,
    methods: tuple[str, ...] = METHODS,
    encoders: Mapping[str, Callable[[Any, Any], Any]] = ENCODERS,
    device: str = "cpu",
) -> Iterator[Row]:
    """Compare codes, norms and gradients of one recurrent encoder with PyTorch, by every method."""
    kind = case.name.rpartition("/")[2]
    module, xs = module_of(case).to(device), windows(case)
    batch = torch.from_numpy(xs).to(device)
    reference = torch_outcome(
        module, batch, lambda m: norms_by_code_unit(lambda x: last(m, x), batch)
    )
    looped = torch_outcome(
        module, batch, lambda m: norms_by_jacobian(lambda x: by_cells(kind, m, x), batch)
    )
    for row in _rows(case, "torch, by cells", looped, reference):
        if row.quantity != "codes":
            yield row
    with jax.enable_x64(case.dtype == "float64"), jax.default_matmul_precision("highest"):
        params = jax.tree.map(jnp.asarray, params_from_recurrent(module.state_dict()))
        found = jax_outcomes(encoders[kind], methods, params, jnp.asarray(xs))
    for method, outcome in found.items():
        yield from _rows(case, method, outcome, reference)


def module_of(case: Case) -> nn.RNNBase:
    """Make PyTorch's module with its default weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = KINDS[case.name.rpartition("/")[2]](*case.sizes, batch_first=True)
    return module.to(getattr(torch, case.dtype))


def windows(case: Case) -> NDArray[Any]:
    """Draw a batch of windows, (batch, T, n)."""
    shape = (case.batch, STEPS, case.sizes[0])
    return np.random.default_rng(1).normal(size=shape).astype(case.dtype)


def last(module: nn.RNNBase, xs: Tensor) -> Tensor:
    """Run the module as it is; the hidden state after the last step."""
    outputs: Tensor = module(xs)[0]
    return outputs[:, -1]


def by_cells(kind: str, module: nn.RNNBase, xs: Tensor) -> Tensor:
    """Compute the same by the cell's formula, step by step, which `vmap` can batch."""
    w, u = module.get_parameter("weight_ih_l0"), module.get_parameter("weight_hh_l0")
    b, d = module.get_parameter("bias_ih_l0"), module.get_parameter("bias_hh_l0")
    h = c = torch.zeros_like(xs[:, 0, :1]) @ w.new_zeros(1, module.hidden_size)
    for x in xs.unbind(1):
        mine, old = x @ w.T + b, h @ u.T + d
        if kind == "gru":
            (a1, a2, a3), (b1, b2, b3) = mine.chunk(3, -1), old.chunk(3, -1)
            reset, update = torch.sigmoid(a1 + b1), torch.sigmoid(a2 + b2)
            h = (1 - update) * torch.tanh(a3 + reset * b3) + update * h
        else:
            i, f, g, o = (mine + old).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
    return h


def torch_outcome(
    module: nn.RNNBase, batch: Tensor, norms_of: Callable[[nn.RNNBase], Tensor]
) -> Outcome:
    """Compute codes, norms and the gradient of the mean norm in PyTorch."""
    norms = norms_of(module)
    leaves = dict(module.named_parameters())
    found = torch.autograd.grad(norms.mean(), list(leaves.values()))
    grads = dict(zip(leaves, found, strict=True))
    codes = as_numpy(last(module, batch))
    return Outcome(codes, as_numpy(norms), flatten(params_from_recurrent(grads)))


def jax_outcomes(
    encode: Callable[[Any, Any], Any], methods: Sequence[str], params: Any, xs: Any
) -> dict[str, Outcome]:
    """Compute the same by jaxcae, by every method under one `jit`."""
    penalties = {name: jaxcae.contractive_penalty(encode, name) for name in methods}

    def mean(params: Any, penalty: Any) -> Any:
        norms = penalty(params, xs)
        return jnp.mean(norms), norms

    @jax.jit
    def run(params: Any, xs: Any) -> Any:
        codes = jax.vmap(encode, (None, 0))(params, xs)
        by_method = {n: jax.grad(mean, has_aux=True)(params, p) for n, p in penalties.items()}
        return codes, by_method

    codes, found = jax.tree.map(np.asarray, run(params, xs))
    return {name: Outcome(codes, found[name][1], flatten(found[name][0])) for name in methods}


def _rows(case: Case, method: str, ours: Outcome, theirs: Outcome) -> Iterator[Row]:
    yield row_of(case, method, "codes", "", ours.codes, theirs.codes)
    yield row_of(case, method, "norms", "", ours.norms, theirs.norms)
    for leaf, gradient in theirs.gradients.items():
        for quantity in ("gradient", "gradient elements"):
            yield row_of(case, method, quantity, leaf, ours.gradients[leaf], gradient)
