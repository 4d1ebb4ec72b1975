"""`python -m benchmarks examples`: two recipes that are made of an encoder's tangents, in pictures.

Neither is part of the library: each is a few lines of it. The manifold tangent classifier (NeurIPS
2011) is kept from moving along the tangents of the encoder that it was fine-tuned from; the sampler
(ICML 2012) walks along them.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import recipe
from jaxcae.plotting.frame import INK, MUTED, bare, make_figure, save_figure
from jaxcae.results.analysis import tangents
from jaxcae.types import Autoencoder, Encode, Params

SHOWN, RANK, WEIGHT = 6, 5, 0.1
"""Digits in a picture; tangents of each; weight of the classifier's penalty."""
STEPS, EVERY, SIGMA = 60, 6, 0.1
SIZES = recipe.Sizes(digits=2000, validation=400, epochs=50, seeds=1)
"""Few digits: the tangents of each are a decomposition."""


def moved_along(logits: Encode, params: Params, x: Any, directions: Any) -> Any:
    """Compute Σ_u ‖∂ logits / ∂u‖², the manifold tangent classifier's penalty of one sample.

    Args:
        logits: `logits(params, x)`, such as an encoder and a readout on it.
        params: Its parameters.
        x: The sample.
        directions: Its tangents, from `jaxcae.results.analysis.tangents`.

    References:
        Rifai et al., "The Manifold Tangent Classifier", NeurIPS 2011, equation 8.
    """

    def along(u: Any) -> Any:
        return jnp.sum(jax.jvp(partial(logits, params), (x,), (u,))[1] ** 2)

    return jnp.sum(jax.vmap(along)(directions))


def walk(
    model: Autoencoder, params: Params, x: Any, key: Any, steps: int, noise_scale: float
) -> Any:
    """Walk from a sample along the tangents: x ← decode(h + J Jᵀε), ε ~ N(0, σ²I).

    One vector-Jacobian product and one Jacobian-vector product a step; J is never built.

    Returns:
        The samples after each step, shape (steps, *features).

    References:
        Rifai et al., "A Generative Process for Sampling Contractive Auto-Encoders", ICML 2012,
        arXiv:1206.6434.
    """
    encode = partial(model.encode, params)

    def step(x: Any, key: Any) -> tuple[Any, Any]:
        code, pull = jax.vjp(encode, x)
        (back,) = pull(noise_scale * jax.random.normal(key, code.shape, code.dtype))
        moved = code + jax.jvp(encode, (x,), (back,))[1]
        x = jax.nn.sigmoid(model.decode(params, moved))  # the decoder here gives logits
        return x, x

    return jax.lax.scan(step, x, jax.random.split(key, steps))[1]


def main(argv: list[str] | None = None) -> int:
    """Train, and draw the two pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks examples", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a small network, hardly trained")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = recipe.QUICK if options.quick else SIZES
    digits = recipe.load_digits(sizes)
    model = recipe.model_of(sizes, digits.xs)
    params = {}
    for name, point in (("CAE", (0.4,)), ("AE", ())):
        entry = next(e for e in recipe.ENTRIES if e.name == name)
        trained = jax.jit(partial(recipe.train, entry, sizes))(jnp.array(point), digits)
        params[name] = jax.tree.map(lambda leaf: leaf[0], trained)
    test, labels = digits.parts.test[0], digits.labels
    shown = np.array([next(i for i in test if labels[i] == c) for c in range(SHOWN)])
    xs = jnp.asarray(digits.xs[shown])
    _draw_tangents(model, params["CAE"], digits, xs, options.out / "tangents.png")
    keys = jax.random.split(jax.random.key(0), len(xs))
    chains = {
        name: jax.vmap(lambda x, key, p=p: walk(model, p, x, key, STEPS, SIGMA))(xs, keys)
        for name, p in params.items()
    }
    _draw_walks(xs, chains, digits.xs[digits.parts.train[0]], options.out / "sampler.png")
    print("\n".join(str(options.out / f"{name}.png") for name in ("tangents", "sampler")))
    return 0


def _draw_tangents(
    model: Autoencoder, params: Params, digits: recipe.Digits, xs: Any, path: Path
) -> None:
    """Draw digits and their tangents, and say what the classifier's penalty did."""
    train, test = digits.parts.train[0], digits.parts.test[0]
    directions = jax.jit(tangents(model.encode, RANK))
    rows = directions(params, jnp.asarray(digits.xs[train]))[1]
    there = directions(params, jnp.asarray(digits.xs[test]))[1]
    told = []
    for weight in (0.0, WEIGHT):
        net = _classifier(model, params, digits, rows, weight)
        along = jax.vmap(moved_along, (None, None, 0, 0))
        moved = jnp.mean(along(_logits(model), net, jnp.asarray(digits.xs[test]), there))
        guesses = jnp.argmax(jax.vmap(_logits(model), (None, 0))(net, digits.xs[test]), 1)
        told.append((float(moved), 100 * float(jnp.mean(guesses != digits.labels[test]))))
    (plain, errors), (less, others) = told
    title = (
        f"Tangents of digits; its penalty moves a classifier {plain / less:.1f} × less along them"
    )
    subtitle = (
        f"First column: digits; then the {RANK} directions in which a step moves the code of a CAE "
        f"most. Errors on {len(test):,} other digits, one seed: {errors:.1f} % without the "
        f"classifier's penalty, {others:.1f} % with it."
    )
    found = directions(params, xs)[1]
    images = [[np.asarray(x), *np.asarray(of)] for x, of in zip(xs, found, strict=True)]
    names = ["digit", *(f"tangent {n}" for n in range(1, RANK + 1))]
    save_figure(_images(images, names, title, subtitle), path, dpi=110)


def _logits(model: Autoencoder) -> Callable[..., Any]:
    return lambda net, x: model.encode(net["encoder"], x) @ net["readout"]


def _classifier(
    model: Autoencoder, params: Params, digits: recipe.Digits, directions: Any, weight: float
) -> Any:
    """Fine-tune encoder and readout for 8 epochs, with the penalty of so much weight."""
    rows, optimizer, logits = digits.parts.train[0], optax.adam(3e-3), _logits(model)
    xs, labels = jnp.asarray(digits.xs[rows]), jnp.asarray(digits.labels[rows])
    hidden = jax.eval_shape(model.encode, params, xs[0]).size

    def loss(net: Any, batch: Any) -> Any:
        found = jax.vmap(logits, (None, 0))(net, xs[batch])
        error = optax.softmax_cross_entropy_with_integer_labels(found, labels[batch])
        moved = jax.vmap(moved_along, (None, None, 0, 0))(logits, net, xs[batch], directions[batch])
        return jnp.mean(error + weight * moved)

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        net, state = carry
        updates, state = optimizer.update(jax.grad(loss)(net, batch), state)
        return (optax.apply_updates(net, updates), state), None

    net = {"encoder": params, "readout": jnp.zeros((hidden, recipe.CLASSES))}
    order = [
        recipe.batches(key, jnp.arange(len(rows)), 50)
        for key in jax.random.split(jax.random.key(0), 8)
    ]
    run = jax.jit(
        lambda net: jax.lax.scan(step, (net, optimizer.init(net)), jnp.concatenate(order))
    )
    return run(net)[0][0]


def _draw_walks(xs: Any, chains: dict[str, Any], train: Any, path: Path) -> None:
    ends = {name: np.asarray(chain)[:, -1] for name, chain in chains.items()}
    away = {
        name: float(np.mean([np.linalg.norm(train - x, axis=1).min() for x in end]))
        for name, end in ends.items()
    }
    told = ", ".join(f"{name} {distance:.1f}" for name, distance in away.items())
    title = f"{STEPS} steps along tangents, nearest training digit: {told} away"
    subtitle = (
        f"x ← decode(h + J Jᵀε), ε of deviation {SIGMA:g}: every {EVERY}th step, from the digits "
        f"on the left. Upper half: {' Lower half: '.join(f'{name}.' for name in chains)}"
    )
    images = [
        [np.asarray(x), *np.asarray(chain)[EVERY - 1 :: EVERY]]
        for chain in chains.values()
        for x, chain in zip(xs[: SHOWN // 2], chain[: SHOWN // 2], strict=True)
    ]
    names = ["start", *(str(n) for n in range(EVERY, STEPS + 1, EVERY))]
    save_figure(_images(images, names, title, subtitle), path, dpi=110)


def _images(rows: list[list[Any]], names: list[str], title: str, subtitle: str) -> Any:
    figure = make_figure(8.0, 1.1 + 0.78 * len(rows), title, subtitle)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, image in zip(axes_row, row, strict=True):
            bare(axes)
            signed = image.min() < 0
            most = float(np.abs(image).max()) or 1.0
            limits = (-most, most) if signed else (0.0, 1.0)
            axes.imshow(
                image.reshape(28, 28), cmap="RdBu_r" if signed else "gray_r",
                vmin=limits[0], vmax=limits[1],
            )  # fmt: skip
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=8.5, color=MUTED if name != names[0] else INK)
    return figure
