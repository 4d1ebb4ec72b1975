"""Windows: what an element can depend on, directions taken together, and bands of units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.jacobian import plan as plans
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.chain import Prepared
from jaxcae.jacobian.choose import choose
from jaxcae.jacobian.cost import estimate
from jaxcae.jacobian.groups import find_groups
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.reach import colours, follow, group, touching, whole
from jaxcae.jacobian.structure import read_structure

RNG = np.random.default_rng(0)


def arrays(*shapes):
    return [jnp.asarray(RNG.normal(size=shape)) for shape in shapes]


def convolve(x, w, stride=2, padding=((1, 1), (1, 1)), **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        x[None], w, strides, padding, dimension_numbers=numbers, **options
    )[0]


def pool(x, reducer=jax.lax.max, start=-np.inf):
    return jax.lax.reduce_window(x, start, reducer, (2, 2, 1), (2, 2, 1), "VALID")


def in_time(x, w):
    """A causal, dilated convolution."""
    return jax.lax.conv_general_dilated(
        x[None], w, (1,), [(4, 0)], rhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC")
    )[0]


def torch_like(x, w, strides):
    return jax.lax.conv_general_dilated(x[None], w, strides, [(1, 1), (0, 1)])[0]


# Encoder, shapes of its parameters, shape of a sample.
ENCODERS = {
    "dense code": (lambda p, x: jnp.tanh(convolve(x, p[0])).reshape(-1) @ p[1],
                   [(3, 3, 1, 2), (40, 3)], (7, 10, 1)),
    "map for a code": (lambda p, x: convolve(jnp.tanh(convolve(x, p[0])), p[1]).reshape(-1),
                       [(3, 3, 1, 2), (3, 3, 2, 3)], (7, 8, 1)),
    "two activations": (lambda p, x: jnp.tanh(convolve(jnp.tanh(convolve(x, p[0])), p[1])),
                        [(3, 3, 1, 2), (3, 3, 2, 2)], (15, 12, 1)),
    "activation on the code": (lambda p, x: jax.nn.softplus(convolve(x, p[0])),
                               [(2, 3, 2, 2)], (6, 7, 2)),
    "in time": (lambda p, x: jnp.tanh(in_time(x, p[0])).reshape(-1) @ p[1],
                [(3, 2, 3), (33, 4)], (11, 2)),
    "map in time": (lambda p, x: jnp.tanh(in_time(x, p[0])), [(3, 2, 3)], (11, 2)),
    "from everywhere": (
        lambda p, x: jnp.tanh(convolve(x, p[0], 1)) + jnp.sin(x.sum((0, 1, 2), keepdims=True)),
        [(3, 3, 1, 2)], (6, 5, 1)),
    "whole rows": (lambda p, x: jnp.tanh(x) + jnp.sin(x.sum(1, keepdims=True)), [], (4, 5, 2)),
    "torch layout": (
        lambda p, x: torch_like(jnp.tanh(torch_like(x, p[0], (2, 2))), p[1], (2, 1)),
        [(4, 2, 3, 3), (3, 4, 3, 2)], (2, 9, 8)),
    "mean pool": (lambda p, x: pool(jnp.tanh(convolve(x, p[0], 1)), jax.lax.add, 0.0),
                  [(3, 3, 1, 2)], (8, 6, 1)),
    "max pool": (lambda p, x: pool(jnp.tanh(convolve(x, p[0], 1))), [(3, 3, 1, 2)], (8, 6, 1)),
    "transposed": (lambda p, x: jnp.sin(convolve(x, p[0], 1, lhs_dilation=(2, 3))),
                   [(3, 3, 1, 2)], (4, 3, 1)),
    "depthwise": (lambda p, x: jnp.sin(convolve(x, p[0], 3, feature_group_count=2)),
                  [(3, 3, 1, 4)], (7, 9, 2)),
    "pixels apart": (lambda p, x: jnp.tanh(x @ p[0])[::-1, 1::2].transpose(1, 0, 2),
                     [(2, 3)], (4, 5, 2)),
    "padded": (lambda p, x: convolve(jnp.tanh(jnp.pad(x, ((1, 2), (0, 1), (0, 0)))), p[0], 3),
               [(3, 3, 1, 2)], (6, 5, 1)),
    "skip": (lambda p, x: jnp.tanh(convolve(x, p[0], 1)) + jnp.sin(convolve(x, p[1], 1, "SAME")),
             [(3, 3, 1, 2), (1, 1, 1, 2)], (6, 5, 1)),
    "row sums": (lambda p, x: jnp.sum(jnp.tanh(x) * p[0], 1), [(4, 5, 2)], (4, 5, 2)),
}  # fmt: skip


def jacobian(encode, params, x):
    return jax.jacrev(lambda x: encode(params, x))(x).reshape(-1, x.size)


def read(name):
    encode, shapes, shape = ENCODERS[name]
    params, (xs,) = arrays(*shapes), arrays((2, *shape))
    encoder, xs = trace_encoder(encode, params, xs)
    return encode, params, xs, encoder, read_structure(encoder.program)


@pytest.mark.parametrize("name", ENCODERS)
def test_windows_hold_all_that_is_not_zero_and_groups_share_nothing(name, x64):
    """Against the explicit Jacobian: nothing outside a window, no two of a group in one place."""
    encode, params, xs, encoder, structure = read(name)
    flat = encoder.program.flat
    reach = follow(flat.equations, whole(xs.shape[1:]), encoder.program.sample)[flat.outputs[0]]
    assert (len(reach.axes) > 0) == (name not in ("dense code", "in time", "from everywhere"))
    found = jax.jit(jacobian, static_argnums=0)(encode, params, xs[0]) != 0
    found = np.asarray(found).reshape(*reach.shape, *xs.shape[1:])
    for place in np.ndindex(reach.shape):
        seen = np.ones(xs.shape[1:], bool)
        for b, axis in reach.axes.items():
            sides = [1] * len(seen.shape)
            sides[axis.source] = -1
            seen &= axis.matrix[:, place[b]].reshape(sides)
        assert not (found[place] & ~seen).any()
    rows = found.reshape(-1, xs[0].size)
    for groups in find_groups(structure):
        apart = rows if groups.side == "output" else rows.T
        assert groups.matrix.sum(0).tolist() == [1.0] * len(groups.numbers)
        assert (groups.matrix @ apart).max() <= 1


def test_windows_are_no_larger_than_they_are():
    """A 3×3 kernel at stride 2 sees three rows, and shares one with its neighbours."""
    *_, encoder, structure = read("map for a code")
    (unit,) = structure.segments[1].inputs
    first = follow(structure.segments[0].equations, whole((7, 8, 1)), encoder.program.sample)[unit]
    matrix = next(axis.matrix for axis in first.axes.values() if axis.source == 0)
    np.testing.assert_array_equal(
        matrix.T, [[a in (2 * j - 1, 2 * j, 2 * j + 1) for a in range(7)] for j in range(4)]
    )
    meets = touching(matrix)
    np.testing.assert_array_equal(np.abs(np.subtract.outer(range(4), range(4))) <= 1, meets)
    assert colours(meets).tolist() == [0, 1, 0, 1]
    assert len(set(group((4, 4, 2), {0: meets, 1: meets}).tolist())) == 2 * 2 * 2


@pytest.mark.parametrize("name", ["map for a code", "in time"])
def test_bands_give_inner_products_of_jacobians(name, x64):
    """⟨J(x), J(y)⟩ by the blocks of neighbours, and by matrices multiplied out."""
    encode, params, xs, encoder, structure = read(name)
    (plan,) = plans._across_bands(structure)
    assert plan.local is not None

    @jax.jit
    def found(xs):
        prepared = Prepared(Bound(structure, encoder), plan)
        a, b = (prepared.at(x) for x in xs)
        return prepared.norm(a), prepared.inner(a, b), prepared.difference(a, b)

    @jax.jit
    def expected(xs):
        one, two = (jacobian(encode, params, x) for x in xs)
        return jnp.sum(one * one), jnp.sum(one * two), jnp.sum((one - two) ** 2)

    np.testing.assert_allclose(found(xs), expected(xs), rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense code", "map for a code", "two activations", "max pool"])
def test_norms_and_gradients_are_those_of_explicit_jacobians(name, x64):
    """Of every plan that there is: bands, groups at either end, and neither."""
    encode, params, xs, encoder, structure = read(name)
    weights = jnp.array([1.0, -0.5])

    def value(params, xs, plan):
        if plan is None:
            norms = jax.vmap(lambda x: jnp.sum(jacobian(encode, params, x) ** 2))(xs)
        else:
            prepared = Prepared(Bound(structure, encoder._replace(params=tuple(params))), plan)
            norms = jax.vmap(lambda x: prepared.norm(prepared.at(x)))(xs)
        return jnp.sum(weights * norms)

    every = plans._across_bands(structure)
    for groups in (None, *find_groups(structure)):
        end = groups and plans.End(groups.rows, False)
        ends = (None, end) if groups and groups.side == "output" else (end, None)
        every.append(plans._plan_between(structure, 2, *ends)._replace(groups=groups))

    @jax.jit
    def gradients(params, xs):
        return [jax.value_and_grad(value)(params, xs, plan) for plan in (None, *every)]

    expected, *found = gradients(params, xs)
    for each in found:
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(each), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11)


# Encoder of 28×28 pixels, shapes, whether a decoder stands behind it, and how many plain steps the
# exact one may take at most.
STEPS = {
    "dense code": (lambda p, x: jnp.tanh(convolve(x, p[0])).reshape(-1) @ p[1],
                   [(3, 3, 1, 16), (3136, 64)], True, 2.1),
    "map for a code": (lambda p, x: convolve(jnp.tanh(convolve(x, p[0])), p[1]).reshape(-1),
                       [(3, 3, 1, 16), (3, 3, 16, 32)], False, 8),
    "two activations": (lambda p, x: jnp.tanh(convolve(jnp.tanh(convolve(x, p[0])), p[1])),
                        [(3, 3, 1, 16), (3, 3, 16, 32)], False,
                        46 if jax.__version_info__ < (0, 11) else 46.5),  # 45.89, and 46.19
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step_keeps_to_its_price(name):
    """Operations of the traced programs: XLA counts a padded kernel as if it were full."""
    encode, shapes, decoded, most = STEPS[name]
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    xs = jax.ShapeDtypeStruct((128, 28, 28, 1), jnp.float32)
    size = jax.eval_shape(encode, params, xs.update(shape=xs.shape[1:])).size
    decoder = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((size, 256), (256, 784)) if decoded]

    def loss(params, decoder, xs, exact):
        if exact:
            codes, norms = jaxcae.encode_and_penalty(encode)(params, xs)
        else:
            codes, norms = jax.vmap(encode, (None, 0))(params, xs), 0.0
        found = codes.reshape(128, -1)
        if decoder:
            found = jax.nn.softplus(found @ decoder[0]) @ decoder[1] - xs.reshape(128, -1)
        return jnp.mean(jnp.sum(found**2, -1)) + jnp.mean(norms)

    plain, exact = (
        estimate(jax.value_and_grad(lambda *a, e=e: loss(*a, e), (0, 1)), params, decoder, xs).flops
        for e in (False, True)
    )
    assert exact / plain <= most
    plan = choose(encode, params, xs).plan
    assert (plan.groups is not None) == (name == "two activations")
    assert (plan.local is not None) == (name != "two activations")


def test_explain_tells_of_groups_and_bands():
    for name, words in (
        ("dense code", "whose units interact at 9 offsets alone"),
        ("two activations", "784 features in 49 groups"),
    ):
        encode, shapes, *_ = STEPS[name]
        params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        xs = jax.ShapeDtypeStruct((128, 28, 28, 1), jnp.float32)
        assert words in " ".join(str(jaxcae.explain(encode, params, xs)).split())
