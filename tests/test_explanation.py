"""What `explain` says, and that it says what `auto` does."""

import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.cli import main
from jaxcae.jacobian.choose import choose

W, V = jnp.ones((96, 48)), jnp.ones((48, 12))


def batch(size=32, features=96):
    return jax.ShapeDtypeStruct((size, features), jnp.float32)


ENCODERS = {
    "two layers": (lambda p, x: jax.nn.softplus(x @ p[0]) @ p[1], "AEA", "chain"),
    "activation on the code": (lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]), "AEAE", "chain"),
    "normalised": (lambda p, x: jax.nn.standardize(x @ p[0]) @ p[1], "ANA", "chain"),
    "opaque": (lambda p, x: (x @ p[0] @ p[0].T + x) * jax.nn.softmax(x), "O", "forward"),
    "linear": (lambda p, x: x @ p[0], "A", "chain"),
    "identity": (lambda p, x: x, "", "chain"),
    "constant": (lambda p, x: p[1][:, 0], "", "chain"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_explanation_is_a_table_that_fits_and_tells_what_auto_does(name):
    encode, kinds, method = ENCODERS[name]
    explanation = jaxcae.explain(encode, (W, V), batch())
    letters = {"affine": "A", "normalised": "N", "elementwise": "E", "opaque": "O"}
    assert "".join(letters[segment.kind] for segment in explanation.segments) == kinds
    choice = choose(encode, (W, V), batch())
    assert explanation.chosen.method == choice.method == method
    assert explanation.chosen.gradient.flops == min(m.gradient.flops for m in explanation.methods)
    text = str(explanation)
    assert max(map(len, text.splitlines())) <= 100
    assert f"→ {method}" in text
    assert json.loads(json.dumps(explanation.as_dict()))["methods"][0]["value"]["flops"] >= 0


def test_two_layers_are_told_in_full():
    explanation = jaxcae.explain(ENCODERS["two layers"][0], (W, V), batch(512))
    text = str(explanation)
    for sentence in (
        "‖J‖²_F of an encoder of 96 features and 12 code units, batch 512, float32",
        "from the input   kernel 1, its gram (48 × 48) (once a batch)",
        "from the output  kernel 3, its gram (48 × 48) (once a batch)",
        "at 2, whose slopes m and the grams G and H give mᵀ(G ∘ H)m",
        "96 Jacobian-vector products a sample",
        "12 vector-Jacobian products a sample",
    ):
        assert sentence in text
    assert explanation.segments[1].operations == ("softplus",)


def test_segments_carry_the_names_of_scopes_that_calls_lie_in():
    """As in a profile; what surrounds all of the encoder says nothing and is left out."""

    @jax.jit
    def first(p, x):
        with jax.named_scope("first"):
            return jax.nn.softplus(x @ p[0])

    def encode(p, x):
        with jax.named_scope("encoder"):
            with jax.named_scope("block"):
                x = first(p, x)[None]
            with jax.named_scope("last"):
                rows = jax.vmap(lambda row: jax.nn.softmax(row @ p[1]))
                return rows(x)[0]

    segments = jaxcae.explain(encode, (W, V), batch()).segments
    affine, elementwise, *others = segments
    assert affine.scopes == ("block/first",)
    assert elementwise.scopes == ("block",)  # what relabels elements belongs to what comes before
    assert {segment.scopes for segment in others} == {("last",)}
    assert "block: softplus" in str(jaxcae.explain(encode, (W, V), batch()))


def test_what_could_not_be_proved_is_named_with_its_cure():
    """Of a primitive that nothing is known of, registration is the cure."""
    attention = lambda p, x: (x @ p[0]) * jnp.sum((x @ p[0]) @ (x @ p[0]))  # noqa: E731
    for encode, primitive, said in (
        (attention, "dot_general", "method='hutchinson'"),
        (lambda p, x: jnp.sort(x @ p[0]) @ p[1], "sort", "no cheaper exact form"),
        (lambda p, x: jnp.cumprod(x @ p[0]) @ p[1], "cumprod", "cumprod is linear or elementwise"),
    ):
        explanation = jaxcae.explain(encode, (W, V), batch())
        (opaque,) = (s for s in explanation.segments if s.kind == "opaque")
        assert primitive in opaque.unproved
        assert said in opaque.cure
        assert said.split()[0] in str(explanation)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64)(nn.LayerNorm()(nn.gelu(nn.Dense(256)(x))))


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="versions trace other operations")
def test_the_readme_shows_what_is_printed():
    """Word for word, and numbers within a little."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (shown,) = re.findall(r"^```\n(‖J‖²_F of an encoder.*?)^```", readme, re.MULTILINE | re.DOTALL)
    params = jax.jit(Encoder().init)(jax.random.key(0), jnp.zeros(784))
    printed = str(jaxcae.explain(Encoder().apply, params, batch(128, 784)))
    number = re.compile(r"\d+(?:\.\d+)?")
    words = [number.sub("#", text).split() for text in (shown, printed)]
    assert words[0] == words[1]
    in_readme, now = (np.array(number.findall(text), float) for text in (shown, printed))
    np.testing.assert_allclose(now, in_readme, rtol=0.05)


def test_branches_are_drawn_beside_the_segments():
    def encode(p, x):
        a = x @ p[0]
        return (a + jnp.tanh(a) * jax.nn.sigmoid(x @ p[2])) @ p[1]

    params = (W, V, W)
    explanation = jaxcae.explain(encode, params, batch())
    drawn = [segment.drawing for segment in explanation.segments]
    assert drawn == ["├─┐", "├─┘", "●"]
    assert "1        ├─┐  affine       96 → 48 + 48" in str(explanation)
    chain = jaxcae.explain(ENCODERS["two layers"][0], params, batch())
    assert not any(segment.drawing for segment in chain.segments)


def test_what_cancelling_units_cost_is_told_in_digits():
    """ε/r² of a form of grams, which float32 then shows; nothing is told of shapes alone."""
    rng = np.random.default_rng(0)
    w, v, z = (np.float32(rng.normal(size=s)) / 5 for s in ((96, 24), (24, 12), (24, 12)))
    xs = np.float32(rng.uniform(size=(8, 96)))
    encode = lambda p, x: jnp.tanh(x @ p[0]) @ p[1]  # noqa: E731
    for remainder, said in ((1.0, False), (0.03, True)):
        params = (np.concatenate([w, w], 1), np.concatenate([v, remainder * z - v]))
        found = jaxcae.explain(encode, params, xs)
        hidden = jnp.tanh(xs @ params[0])
        slopes = 1 - np.asarray(hidden, np.float64) ** 2
        apart = (slopes**2) @ ((params[0] ** 2).sum(0) * (params[1] ** 2).sum(1))
        norms = jaxcae.contractive_penalty(encode, "reverse")(params, xs)
        expected = np.sqrt((norms / apart).min())
        np.testing.assert_allclose(found.cancellation, expected, rtol=0.02)
        assert ("digits" in dict(found.plan)) == ("by method='reverse'" in str(found)) == said
    assert "float64 keeps" in str(found)
    assert jaxcae.explain(encode, params, batch(8)).cancellation is None
    with jax.enable_x64(True):  # which has no wider dtype to advise
        double = jaxcae.explain(encode, *jax.tree.map(np.float64, (params, xs)))
    assert "digits" in dict(double.plan)
    assert "float64 keeps" not in str(double)


def test_a_small_batch_gets_another_plan_than_a_large_one():
    """Grams are paid once a batch: for one sample they cost more than they save."""
    one, many = (
        str(jaxcae.explain(ENCODERS["two layers"][0], (W, V), batch(size))) for size in (1, 512)
    )
    assert "gram" not in one
    assert "gram" in many


def test_a_budget_is_told_with_what_would_have_been_taken():
    def encode(p, x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) @ p[1].T)

    whole = jaxcae.explain(encode, (W, V), batch(256))
    budget = int(whole.chosen.gradient.bytes / 5)
    chunked = jaxcae.explain(encode, (W, V), batch(256), memory_budget=budget)
    assert whole.chosen.chunk_size is None
    assert 1 <= chunked.chosen.chunk_size < 256
    assert chunked.chosen.gradient.bytes <= budget
    assert f"{chunked.chosen.chunk_size} samples at a time" in str(chunked)


def test_the_command_explains_sizes_and_refuses_nonsense_in_one_line(capsys):
    assert main(["explain", "--sizes", "30", "20", "5", "--batch-size", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == 30
    for arguments, message in (
        (["--sizes", "30"], "at least one layer"),
        (["--activation", "softmax"], "unknown activation 'softmax'"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["no-such-run"], "no-such-run"),
    ):
        assert main(["explain", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
