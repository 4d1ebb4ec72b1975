"""Modules of Flax and Equinox as autoencoders: unmodified, frozen where they should be, or refused.

That their penalties are right is for the contract table; here is what an adapter can do wrong.
"""

import re
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcae
from jaxcae.models.foreign import ModuleAutoencoder
from tests.tolerances import assert_close, assert_each_close

KEY = jax.random.key(0)


class NnxNet(nnx.Module):
    """Everything at once: a list, a BatchNorm, a Dropout, a stream of its own."""

    def __init__(self, rngs: nnx.Rngs, rate: float = 0.5):
        self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.norm.mean.set_value(jnp.arange(5.0))
        self.norm.var.set_value(1 + jnp.arange(5.0))
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(3, 6, rngs=rngs)
        self.rngs = rngs

    def encode(self, x: Any) -> Any:
        return self.layers[1](self.dropout(nnx.tanh(self.norm(self.layers[0](x)))))

    def decode(self, z: Any) -> Any:
        return self.out(z)


class LinenNet(nn.Module):
    """The same in Linen, with `train` as an argument that has no default."""

    rate: float = 0.5

    def setup(self) -> None:
        self.hidden, self.code, self.out = nn.Dense(5), nn.Dense(3), nn.Dense(6)
        self.norm, self.dropout = nn.BatchNorm(use_running_average=True), nn.Dropout(self.rate)

    def encode(self, x: Any, train: bool) -> Any:
        h = nn.tanh(self.norm(self.hidden(x)))
        return self.code(self.dropout(h, deterministic=not train))

    def decode(self, z: Any) -> Any:
        return self.out(z)


class EqxNet(eqx.Module):
    """The same in Equinox, whose statistics are in a state apart."""

    layers: list
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key: Any):
        keys = jax.random.split(key, 3)
        self.layers = [eqx.nn.Linear(6, 5, key=keys[0]), eqx.nn.Linear(5, 3, key=keys[1])]
        self.norm = eqx.nn.BatchNorm(5, axis_name="batch", mode="ema")
        self.dropout = eqx.nn.Dropout(0.5)
        self.out = eqx.nn.Linear(3, 6, key=keys[2])

    def encode(self, x: Any, state: Any, key: Any = None) -> Any:
        h, state = self.norm(self.layers[0](x), state)
        return self.layers[1](self.dropout(jnp.tanh(h), key=key)), state

    def decode(self, z: Any, state: Any) -> Any:
        return self.out(z), state


def _linen_variables() -> Any:
    method = lambda m, x: m.decode(m.encode(x, train=False))  # noqa: E731
    variables = jax.jit(partial(LinenNet().init, method=method))(KEY, jnp.zeros((1, 6)))
    stats = {"norm": {"mean": jnp.arange(5.0), "var": 1 + jnp.arange(5.0)}}
    return {**variables, "batch_stats": stats}


def _nnx_model() -> ModuleAutoencoder:
    return jaxcae.from_flax(NnxNet(nnx.Rngs(0)))


def _linen_model() -> ModuleAutoencoder:
    return jaxcae.from_flax(LinenNet(), variables=_linen_variables())


def _eqx_model() -> ModuleAutoencoder:
    module, state = eqx.nn.make_with_state(EqxNet)(KEY)
    state = state.set(module.norm.ema_state_index, (jnp.arange(5.0), 1 + jnp.arange(5.0)))
    return jaxcae.from_equinox(module, state=state)


MODELS = {"nnx": _nnx_model, "linen": _linen_model, "equinox": _eqx_model}
LAYERS = {
    "nnx": lambda p: [(p["layers"][i]["kernel"], p["layers"][i]["bias"]) for i in (0, 1)],
    "linen": lambda p: [(p[name]["kernel"], p[name]["bias"]) for name in ("hidden", "code")],
    "equinox": lambda p: [(p["layers"][i]["weight"].T, p["layers"][i]["bias"]) for i in "01"],
}


@pytest.fixture(scope="module", params=list(MODELS))
def trained(request: Any) -> Any:
    """Take a step with weight decay, which would move whatever it could reach."""
    jax.config.update("jax_numpy_rank_promotion", "allow")  # Equinox's BatchNorm
    model = MODELS[request.param]()
    xs = jax.random.normal(KEY, (8, 6))
    optimizer = optax.adamw(0.01, weight_decay=0.5)
    before = model.init(KEY)
    loss = jaxcae.cae_loss(model, None, l2=1e-3)

    @jax.jit
    def step(params: Any) -> Any:
        gradient, _ = jax.grad(loss, has_aux=True)(params, xs)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    yield request.param, model, before, step(before), xs
    jax.config.update("jax_numpy_rank_promotion", "raise")


def test_statistics_are_frozen_and_everything_else_is_trained(trained):
    """Codes after training are those of the trained kernels and the first statistics."""
    name, model, before, params, xs = trained
    changed = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, params)
    assert all(jax.tree.leaves(changed))
    assert not any("mean" in jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params))
    (first, bias), (second, last) = (
        tuple(np.asarray(a, np.float64) for a in layer) for layer in LAYERS[name](params)
    )
    scale, shift = (params["norm"][k] for k in (("weight", "bias") if name == "equinox" else
                                                ("scale", "bias")))  # fmt: skip
    h = (np.asarray(xs, np.float64) @ first + bias - np.arange(5)) / np.sqrt(
        1 + np.arange(5) + 1e-5
    )
    want = np.tanh(h * np.asarray(scale) + np.asarray(shift)) @ second + last
    assert_close(jax.vmap(model.encode, (None, 0))(params, xs), want, "float32")


def test_the_module_comes_back_with_what_was_trained(trained):
    """As the other library would call it, in evaluation mode, it gives the same codes."""
    name, model, _, params, xs = trained
    module, want = model.module(params), jax.vmap(model.encode, (None, 0))(params, xs)
    if name == "nnx":
        module.eval()
        got = module.encode(xs)
        again = NnxNet(nnx.Rngs(1))
        nnx.update(again, params, model.frozen)  # in place, as the docstring has it
        again.eval()
        assert_close(again.encode(xs), want, "float32")
    elif name == "linen":
        got = module.encode(xs, train=False)
        variables = {**model.frozen, "params": params}
        assert_close(LinenNet().apply(variables, xs, False, method="encode"), want, "float32")
    else:
        got = want
        for layer, (kernel, bias) in zip(module.layers, LAYERS[name](params), strict=True):
            np.testing.assert_array_equal(layer.weight.T, kernel)
            np.testing.assert_array_equal(layer.bias, bias)
    assert_close(got, want, "float32")


def test_dropout_is_off_or_drawn_from_a_key(trained):
    """Off: the same codes each time. On: by the key alone, one mask for the batch, and exact."""
    _, model, _, params, xs = trained

    @jax.jit
    def measure(key: Any) -> Any:
        thinned = model.stochastic(key)
        codes, norms = jaxcae.encode_and_penalty(thinned.encode)(params, xs)
        want = jax.vmap(lambda x: jnp.sum(jax.jacrev(thinned.encode, 1)(params, x) ** 2))(xs)
        return codes, norms, want

    first, again, other = (measure(jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    assert np.any(np.abs(first[0] - other[0]) > 1e-3)
    assert_each_close(first[1], first[2], "float32")


def test_parameters_are_what_flax_calls_them_and_the_module_is_left_alone():
    """NNX: those of `nnx.state(module, nnx.Param)`, copied; flags and values stay the module's."""
    net = NnxNet(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.RngState))))
    model = jaxcae.from_flax(net)
    params = model.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, params, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    model.encode(params, jnp.ones(6))
    assert net.norm.use_running_average is False
    assert net.dropout.deterministic is False
    jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)(params)
    after = nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # A loss of the module's own state, for loops that hold the module.
    np.testing.assert_array_equal(
        model.encode(nnx.state(net, nnx.Param), jnp.ones(6)),
        model.encode(model.init(KEY), jnp.ones(6)),
    )


def test_a_class_is_drawn_from_the_key_of_init():
    """A class, or a function of `rngs` or `key`, gives other parameters for another key."""
    for model in (
        jaxcae.from_flax(NnxNet),
        jaxcae.from_flax(lambda rngs: (nnx.Linear(6, 3, rngs=rngs), nnx.Linear(3, 6, rngs=rngs))),
        jaxcae.from_equinox(
            lambda key: (eqx.nn.Linear(6, 3, key=key), eqx.nn.Linear(3, 6, key=key))
        ),
        jaxcae.from_flax(nn.Dense(3), nn.Dense(6), sample=np.zeros(6, np.float32)),
    ):
        init = jax.jit(model.init)
        one, again, other = (jax.tree.leaves(init(jax.random.key(n))) for n in (0, 0, 1))
        assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
        assert any(np.any(a != b) for a, b in zip(one, other, strict=True))
        assert model.decode(model.init(KEY), model.encode(model.init(KEY), jnp.ones(6))).shape == (
            6,
        )


# --------------------------------------------------------------------------- batches and samples


class Pictures(nn.Module):
    """A network for pictures: flattening keeps the batch, or all of one picture is flattened."""

    keep: bool
    norm: bool = False

    def setup(self) -> None:
        self.conv, self.code, self.out = nn.Conv(4, (3, 3), 2), nn.Dense(3), nn.Dense(36)
        self.group = nn.GroupNorm(2)

    def encode(self, x: Any) -> Any:
        h = nn.relu(self.conv(x))
        h = self.group(h) if self.norm else h
        return self.code(h.reshape((h.shape[0], -1) if self.keep else -1))

    def decode(self, z: Any) -> Any:
        return self.out(z).reshape((*z.shape[:-1], 6, 6, 1))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "group norm"])
def test_a_module_for_batches_sees_batches(norm):
    """Codes are those of the module on a batch: GroupNorm takes the first axis for the batch."""
    net = Pictures(True, norm)
    xs = np.random.default_rng(0).normal(size=(3, 6, 6, 1)).astype(np.float32)
    model = jaxcae.from_flax(net, sample=xs[0])

    @jax.jit
    def both(xs: Any) -> Any:
        params = model.init(KEY)
        one_by_one = jax.vmap(model.encode, (None, 0))(params, xs)
        return one_by_one, net.apply({"params": params}, xs, method="encode")

    assert_close(*both(xs), "float32")


def test_a_module_for_one_sample_sees_one():
    """One that flattens everything cannot be given a batch, and is not."""
    model = jaxcae.from_flax(Pictures(False), sample=(6, 6, 1))
    params = jax.eval_shape(model.init, KEY)
    assert params["code"]["kernel"].shape == (36, 3)
    assert jax.eval_shape(model.encode, params, jnp.ones((6, 6, 1))).shape == (3,)


def test_the_first_use_may_be_inside_any_transformation():
    """What is found out at first use is found out under jit, vmap and grad, decoder first too."""
    for first in (
        lambda m, p: jax.jit(jax.vmap(m.encode, (None, 0)))(p, jnp.ones((2, 6))),
        lambda m, p: jax.grad(lambda p: m.encode(p, jnp.ones(6)).sum())(p),
        lambda m, p: jax.jit(m.decode)(p, jnp.ones(3)),
    ):
        model = _nnx_model()
        first(model, model.init(KEY))


def test_the_engine_reads_a_module_as_it_reads_the_built_in_network():
    """The batch of one in the way hides no structure: three segments, as of `mlp`."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.a, self.b = nnx.Linear(32, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
            self.c = nnx.Linear(4, 32, rngs=rngs)

        def encode(self, x: Any) -> Any:
            return self.b(nnx.tanh(self.a(x)))

        def decode(self, z: Any) -> Any:
            return self.c(z)

    theirs = jaxcae.from_flax(Net)
    params = jax.jit(theirs.init)(KEY)
    found = jaxcae.explain(theirs.encode, params, jnp.zeros((64, 32)))
    assert [segment.kind for segment in found.segments] == ["affine", "elementwise", "affine"]


def test_bfloat16_compute_keeps_float32_parameters():
    """A module's `dtype` and `param_dtype` are its own."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32, "rngs": rngs}
            self.a, self.b = nnx.Linear(6, 3, **kinds), nnx.Linear(3, 6, **kinds)

        def encode(self, x: Any) -> Any:
            return nnx.tanh(self.a(x))

        def decode(self, z: Any) -> Any:
            return self.b(z)

    model = jaxcae.from_flax(Net)
    params, xs = jax.jit(model.init)(KEY), jax.random.normal(KEY, (4, 6))
    step = jax.jit(jax.value_and_grad(jaxcae.cae_loss(model, 0.1), has_aux=True))
    (value, metrics), gradient = step(params, xs)
    assert model.encode(params, xs[0]).dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}
    assert value.dtype == metrics["contraction"].dtype == jnp.float32
    kernel = np.asarray(params["a"]["kernel"], np.float64)
    slopes = 1 - np.tanh(np.asarray(xs, np.float64) @ kernel) ** 2
    want = np.mean(slopes**2 @ np.sum(kernel**2, 0))
    assert_close(metrics["contraction"], want, "bfloat16")


# --------------------------------------------------------------------------- refusals


class _Plain(nnx.Module):
    """A linear pair of maps, to be spoilt."""

    def __init__(self, rngs: nnx.Rngs):
        self.a, self.b = nnx.Linear(6, 3, rngs=rngs), nnx.Linear(3, 6, rngs=rngs)

    def encode(self, x: Any) -> Any:
        return self.a(x)

    def decode(self, z: Any) -> Any:
        return self.b(z)


class _NoDecode(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.Linear(6, 3, rngs=rngs)

    def encode(self, x: Any) -> Any:
        return self.a(x)


class _Pair(_Plain):
    def encode(self, x: Any) -> Any:
        return self.a(x), self.a(x)


class _Centred(_Plain):
    def encode(self, x: Any) -> Any:
        return self.a(x - jnp.mean(x, axis=0, keepdims=True))


class _Bare(_Plain):
    def __init__(self, rngs: nnx.Rngs):
        self.a = self.b = jnp.tanh


class _Trains(nn.Module):
    def setup(self) -> None:
        self.norm, self.out = nn.BatchNorm(use_running_average=False), nn.Dense(6)

    def encode(self, x: Any) -> Any:
        return self.norm(x)

    def decode(self, z: Any) -> Any:
        return self.out(z)


class _EqxPair(eqx.Module):
    a: eqx.nn.Linear

    def encode(self, x: Any) -> Any:
        return {"mean": self.a(x)}

    def decode(self, z: Any) -> Any:
        return z


def _eqx_linear(a: int = 6, b: int = 3) -> eqx.nn.Linear:
    return eqx.nn.Linear(a, b, key=KEY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxcae.from_flax(_NoDecode), "_NoDecode has no method 'decode': expected a mod"),
        (lambda: jaxcae.from_flax(nn.Dense(3), sample=(6,)), "Dense has no method 'encode'"),
        (lambda: jaxcae.from_flax(_Pair, sample=(6,)), "encode returned a tuple of 2 arrays, exp"),
        (lambda: jaxcae.from_flax(_Centred, sample=(6,)), "encode mixes the samples of a batch"),
        (lambda: jaxcae.from_flax(_Trains(), sample=(6,)), "mixes its samples. Let it use running"),
        (lambda: jaxcae.from_flax(_Plain, sample=(7,)), "cannot encode and decode one sample of s"),
        (lambda: jaxcae.from_flax(_Plain, train=True), "neither encode nor decode takes 'train'"),
        (lambda: jaxcae.from_flax(_Bare), "_Bare has no nnx.Param to train"),
        (lambda: jaxcae.from_flax(_eqx_linear()), "expected a Flax module"),
        (lambda: jaxcae.from_flax(LinenNet()), "a Linen module holds no parameters: give from_fl"),
        (lambda: jaxcae.from_flax(_Plain, variables={}), "variables are Linen's, got a"),
        (lambda: jaxcae.from_equinox(nn.Dense(3)), "expected an Equinox module"),
        (lambda: jaxcae.from_equinox(_eqx_linear()), "Linear has no method 'encode'"),
        (
            lambda: jaxcae.from_equinox(_EqxPair(_eqx_linear()), sample=(6,)),
            "encode returned a dict of 1 arrays, expected one array",
        ),
        (
            lambda: jaxcae.from_equinox(_eqx_linear(), _eqx_linear(3, 5), sample=(6,)),
            "decode gives (5,) for the code of (6,)",
        ),
    ],
)
def test_what_cannot_be_an_autoencoder_is_refused_in_one_line(call, message):
    """With what came and what was expected, not with the other library's traceback."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_mixing_module_is_refused_at_first_use_without_a_sample():
    """And one that says it is written for one sample is believed."""
    with pytest.raises(ValueError, match="mixes the samples"):
        jaxcae.contractive_penalty(jaxcae.from_flax(_Centred).encode)(
            jaxcae.from_flax(_Centred).init(KEY), jnp.ones((2, 6))
        )
    model = jaxcae.from_flax(_Centred, batched=False)
    assert model.encode(model.init(KEY), jnp.arange(6.0)).shape == (3,)
