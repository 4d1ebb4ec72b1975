"""Wrong structure cannot hide: random encoders from a grammar, by every exact method.

In the default run by the chain, which alone reads structure; `-m slow` adds the others.

Values and gradients against brute force in float64. What the engine takes for affine or
elementwise and is not gives another number here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcae
from jaxcae import penalty as penalty_module
from tests import reference as ref
from tests.grammar import PIECES, WITHOUT_FORWARD, sentence
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("x64")

FEATURES, BATCH = 5, 2
WEIGHTS = np.array([1.0, -0.5])


def check(names, seed, chosen=("chain",)):
    """Compare exact methods with the reference, on one encoder."""
    encoder = sentence(tuple(names), FEATURES, seed)
    xs = np.random.default_rng(seed + 1).normal(size=(BATCH, FEATURES))
    methods = [
        method for method in chosen if method != "forward" or WITHOUT_FORWARD.isdisjoint(names)
    ]

    def everything(arrays, xs):
        def of_method(method):
            both = jaxcae.encode_and_penalty(encoder.encode, method)

            def total(arrays):
                codes, norms = both(arrays, xs)
                return norms @ jnp.asarray(WEIGHTS), (codes, norms)

            return jax.grad(total, has_aux=True)(arrays)

        return {method: of_method(method) for method in methods}

    results = jax.jit(everything)([jnp.asarray(a) for a in encoder.arrays], jnp.asarray(xs))
    codes = np.array([encoder.numpy(encoder.arrays, ref.Dual.seed(x)).value.real for x in xs])
    norms = ref.penalty(encoder.numpy, encoder.arrays, xs)
    gradients = ref.penalty_gradient(encoder.numpy, encoder.arrays, xs, WEIGHTS)
    # Not below 1e-8: where units are saturated in a row, a norm of 1e-20 has no digits in the
    # reference either, whose slope of tanh is 1 − tanh².
    scale = max([1e-8, np.max(np.abs(norms)), *(np.max(np.abs(g)) for g in gradients)])
    for method, (got, (got_codes, got_norms)) in results.items():
        assert_close(got_codes, codes, "float64", f"{method}: codes")
        found, truth = (np.append(a, 1e-8) for a in (got_norms, norms.real))
        assert_close(found, truth, "float64", f"{method}: norms")
        for leaf, want in zip(got, gradients, strict=True):
            # Relative to the whole result, as a gradient may vanish or cancel.
            found, truth = (np.append(np.ravel(a), scale) for a in (leaf, want))
            assert_close(found, truth, "float64", f"{method}: gradient")


@pytest.mark.parametrize("name", sorted(PIECES))
def test_each_piece_between_two_layers(name):
    """Every piece once, where a wrong reading of it would join it to a neighbour."""
    check(("affine", name, "tanh", "affine"), seed=1)


sentences = st.lists(st.sampled_from(list(PIECES)), min_size=1, max_size=6)


@settings(max_examples=15)
@given(names=sentences, seed=st.integers(0, 1000))
def test_random_encoders(names, seed):
    """Pieces in any order, several of a kind, activations first or last."""
    check(names, seed)


@pytest.mark.slow
@settings(max_examples=60)
@given(names=sentences, seed=st.integers(0, 1000))
def test_many_random_encoders(names, seed):
    """The same for longer, and by every method."""
    check(names, seed, penalty_module.EXACT_METHODS)
