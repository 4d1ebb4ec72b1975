"""`python -m benchmarks recipe`: what contraction does for a classifier, in the way of Rifai et al.

Table 1 of the ICML 2011 paper and the CAE+H of ECML 2011, in kind: an encoder of one hidden layer
(sigmoid, tied weights, cross-entropy) is trained without labels on a part of `mnist5k`, then read
by a linear classifier as it is, and fine-tuned under a softmax. Each seed holds out a fifth of the
digits of its own for the test; weights of penalties are chosen on a validation part of the rest.

Quality, not time: it may run on a busy machine.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcae
from benchmarks.detection_page import read
from benchmarks.recipe_page import COLUMNS, best, neighbours, page
from jaxcae.data import load
from jaxcae.errors import unknown_name
from jaxcae.files import write_atomic, write_json
from jaxcae.objective import noise_curvature_term
from jaxcae.penalty import jacobian_norm
from jaxcae.results import analysis
from jaxcae.runs import environment
from jaxcae.training import TrainState
from jaxcae.training.step import take_step
from jaxcae.types import Autoencoder, Loss, Params

CLASSES, FOLDS = 10, 5
NOISE_SCALE = 0.3
"""σ of the noise form, which is not searched."""
ROUNDS = 6
L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Weight decay of the linear classifier, chosen on the validation part, too."""


class Sizes(NamedTuple):
    """How much of everything: `Sizes()` is what is recorded."""

    digits: int = 5000
    validation: int = 800
    hidden: int = 256
    epochs: int = 20
    fine_epochs: int = 12
    probe_steps: int = 40
    batch: int = 100
    seeds: int = FOLDS


QUICK = Sizes(500, 50, 16, 3, 4, 10, 25, 1)


class Entry(NamedTuple):
    """A way to train the encoder.

    Attributes:
        name: What the table calls it.
        weights: What is searched.
        start: Where the search begins.
        loss: `(model, *weights) -> loss`, made inside `jit`; None trains no encoder.
        factor: How far apart neighbours in the search are.
    """

    name: str
    weights: tuple[str, ...] = ()
    start: tuple[float, ...] = ()
    loss: Callable[..., Loss] | None = None
    factor: float = 4.0


def _loss(model: Autoencoder, contraction: Any = None, **options: Any) -> Loss:
    return jaxcae.cae_loss(model, contraction, reconstruction="bernoulli", **options)


def _higher_order(model: Autoencoder, contraction: Any, curvature: Any) -> Loss:
    bent = noise_curvature_term(model, curvature, NOISE_SCALE)
    return _loss(model, contraction, terms=(bent,))


ENTRIES = (
    Entry("no pre-training"),
    Entry("AE", loss=_loss),
    Entry("AE + weight decay", ("l2",), (1e-3,), lambda model, weight: _loss(model, l2=weight)),
    Entry("DAE", ("σ",), (0.4,), lambda model, scale: _loss(model, noise_scale=scale), factor=2.0),
    Entry("CAE", ("λ",), (0.4,), _loss),
    Entry("CAE+H", ("λ", "γ"), (0.4, 1.0), _higher_order),
)


def main(argv: list[str] | None = None) -> int:
    """Measure, store, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks recipe", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one seed and a small network")
    parser.add_argument("--only", action="append", metavar="NAME", help="one method; may repeat")
    parser.add_argument("--seeds", type=int, default=FOLDS, help=f"1 to {FOLDS}, all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--render", action="store_true", help="measure nothing: the page alone")
    options = parser.parse_args(argv)
    names = [entry.name for entry in ENTRIES]
    for name in options.only or ():
        if name not in names:
            parser.error(str(unknown_name("method", name, names)))
    if not 1 <= options.seeds <= FOLDS:
        parser.error(f"--seeds must be from 1 to {FOLDS}, got {options.seeds}")
    sizes = QUICK if options.quick else Sizes(seeds=options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "recipe.json"
    kept = read(file)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    chosen = () if options.render else options.only or names
    for entry in [entry for entry in ENTRIES if entry.name in chosen]:
        known = kept.get(entry.name, {})
        same = known.get("sizes") == sizes._asdict() and known.get("factor") == entry.factor
        points: Points = {}
        for record in known["records"] if same else ():
            points.setdefault(tuple(record["at"]), []).append(record)

        def keep(points: Points, entry: Entry = entry) -> None:
            """Store what there is after every point, so that a run can be stopped and gone on."""
            kept[entry.name] = {
                "environment": environment(),
                "quick": options.quick,
                "sizes": sizes._asdict(),
                "weights": list(entry.weights),
                "factor": entry.factor,
                "l2": list(L2),
                "records": list(itertools.chain.from_iterable(points.values())),
            }
            write_json(file, {name: kept[name] for name in names if name in kept})

        at = measurement(entry, sizes, say)
        search(entry.start, entry.factor, at, 1 if options.quick else ROUNDS, points, keep)
    text = page({name: kept[name] for name in names if name in kept})
    write_atomic(options.out / "recipe.md", text.encode())
    print(text)
    return 0


Points = dict[tuple[float, ...], list[dict[str, Any]]]
"""What was measured at each point, one record a seed."""


def measurement(
    entry: Entry, sizes: Sizes, say: Callable[[str], None]
) -> Callable[[tuple[float, ...]], list[dict[str, Any]]]:
    """Make what measures a method at a point, with every seed."""
    digits = load_digits(sizes)
    run = jax.jit(partial(train, entry, sizes))

    def at(point: tuple[float, ...]) -> list[dict[str, Any]]:
        params = run(jnp.asarray(point, jnp.float32), digits)
        found = jax.device_get(_evaluate(sizes, params, digits))
        rows = [
            {"at": list(point), "seed": seed}
            | {name: float(f"{values[seed]:.5g}") for name, values in found.items()}
            for seed in range(sizes.seeds)
        ]
        errors = ", ".join(
            f"{column} {100 * np.mean(found[f'{column}/validation']):.2f} %" for column in COLUMNS
        )
        say(f"{entry.name} {' '.join(f'{value:g}' for value in point)}: validation: {errors}")
        return rows

    return at


def search(
    start: Sequence[float],
    factor: float,
    at: Callable[[tuple[float, ...]], list[dict[str, Any]]],
    rounds: int,
    points: Points | None = None,
    keep: Callable[[Points], None] = lambda points: None,
) -> list[dict[str, Any]]:
    """Measure a grid from a point on, until the best has been held against all its neighbours.

    A point's neighbours have one weight that is `factor` times higher or lower. The best is that
    of the mean validation error over the seeds, in either column. What `points` holds is known;
    `keep` hears of each more.
    """
    points = {} if points is None else points
    wanted = {tuple(start)}
    for _ in range(rounds + 1):
        for point in sorted(wanted - points.keys()):
            points[point] = at(point)
            keep(points)
        records = list(itertools.chain.from_iterable(points.values()))
        near = (neighbours(best(records, column), factor) for column in COLUMNS)
        wanted = set(itertools.chain.from_iterable(near))
        if wanted <= points.keys():
            break
    return records


class Parts(NamedTuple):
    """Rows of the digits, by seed: shape (seeds, rows)."""

    seed: Any
    train: Any
    validation: Any
    test: Any


class Digits(NamedTuple):
    xs: Any
    labels: Any
    parts: Parts


def load_digits(sizes: Sizes) -> Digits:
    """Split the digits: every one is tested with one seed, and classes are even in each part."""
    data = load("mnist5k")
    assert data.labels is not None
    rng = np.random.default_rng(0)
    by_class = [rng.permutation(np.flatnonzero(data.labels == c)) for c in range(CLASSES)]
    order = np.stack([rows[: sizes.digits // CLASSES] for rows in by_class], 1).reshape(-1)
    folds = np.arange(len(order)) // CLASSES % FOLDS
    rest = [order[folds != seed] for seed in range(sizes.seeds)]
    parts = Parts(
        np.arange(sizes.seeds),
        np.stack([rows[sizes.validation :] for rows in rest]),
        np.stack([rows[: sizes.validation] for rows in rest]),
        np.stack([order[folds == seed] for seed in range(sizes.seeds)]),
    )
    return Digits(data.features, data.labels.astype(np.int32), parts)


def model_of(sizes: Sizes, xs: Any) -> Autoencoder:
    return jaxcae.mlp((xs.shape[1], sizes.hidden), latent_activation="sigmoid", tied=True)


def train(entry: Entry, sizes: Sizes, point: Any, digits: Digits) -> Params:
    """Train an encoder with every seed, by one program whatever the weights."""
    model = model_of(sizes, digits.xs)
    loss = None if entry.loss is None else entry.loss(model, *point)

    def one(part: Parts) -> Params:
        params = model.init(jax.random.key(part.seed))
        if loss is None:
            return params
        return _trained(loss, params, part.seed, digits.xs, part.train, sizes)

    # One after another: as fast on a CPU as `vmap`, whose products by batches are slower.
    return jax.lax.map(one, digits.parts)


@partial(jax.jit, static_argnums=0)
def _evaluate(sizes: Sizes, params: Params, digits: Digits) -> Mapping[str, Any]:
    xs, labels, _ = digits
    model = model_of(sizes, xs)

    def one(of_seed: tuple[Params, Parts]) -> Mapping[str, Any]:
        params, part = of_seed
        codes = _standardized(jax.vmap(model.encode, (None, 0))(params, xs), part.train)
        slopes = analysis.encoder_slopes("sigmoid", "sigmoid")(params, xs[part.test])[0]
        norms = jaxcae.contractive_penalty(model.encode)(params, xs[part.test])
        return {
            **_columns("probe", _probed(codes, labels, part, sizes), part, labels),
            **_columns("fine", _fine_tuned(model, params, xs, labels, part, sizes), part, labels),
            "jacobian_norm": jnp.mean(jacobian_norm(norms)),
            "saturation": jnp.mean(analysis.saturation(slopes, "sigmoid")),
            "reconstruction": _loss(model)(params, xs[part.test])[0],
        }

    return jax.lax.map(one, (params, digits.parts))


def _columns(name: str, guesses: Any, part: Parts, labels: Any) -> Mapping[str, Any]:
    """Take the errors of the guesses (options, digits) that are best on the validation part.

    They are of the validation part and then the test part.
    """
    wrong = guesses != labels[_judged(part)][None]
    validation, test = jnp.split(wrong, [len(part.validation)], axis=1)
    errors = jnp.mean(validation, 1)
    chosen = jnp.argmin(errors)
    return {
        f"{name}/validation": errors[chosen],
        f"{name}/test": jnp.mean(test[chosen]),
        f"{name}/option": chosen,
    }


def _judged(part: Parts) -> Any:
    return jnp.concatenate([part.validation, part.test])


def batches(key: Any, rows: Any, size: int) -> Any:
    kept = len(rows) // size * size
    return jax.random.permutation(key, rows)[:kept].reshape(-1, size)


def _trained(loss: Loss, params: Params, seed: Any, xs: Any, rows: Any, sizes: Sizes) -> Params:
    steps = sizes.epochs * (len(rows) // sizes.batch)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state = TrainState.create(params, optimizer, jax.random.key(100 + seed))

    def epoch(state: TrainState, key: Any) -> tuple[TrainState, None]:
        def step(state: TrainState, batch: Any) -> tuple[TrainState, None]:
            return take_step(loss, optimizer.update, state, xs[batch])[0], None

        return jax.lax.scan(step, state, batches(key, rows, sizes.batch))

    keys = jax.random.split(jax.random.key(200 + seed), sizes.epochs)
    return jax.lax.scan(epoch, state, keys)[0].params


def _standardized(codes: Any, rows: Any) -> Any:
    of_rows = codes[rows]
    mean, deviation = (f(of_rows, 0, keepdims=True) for f in (jnp.mean, jnp.std))
    return (codes - mean) / (deviation + 1e-3)


def _cross_entropy(logits: Any, labels: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _probed(codes: Any, labels: Any, part: Parts, sizes: Sizes) -> Any:
    """Guess by softmax regression on the codes, for each weight decay."""
    inputs = jnp.pad(codes, ((0, 0), (0, 1)), constant_values=1.0)

    def guesses(weight: Any) -> Any:
        def loss(readout: Any) -> Any:
            error = _cross_entropy(inputs[part.train] @ readout, labels[part.train])
            return error + weight * jnp.sum(readout[:-1] ** 2)

        optimizer = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(loss)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            readout, state = carry
            value, grad = value_and_grad(readout, state=state)
            updates, state = optimizer.update(
                grad, state, readout, value=value, grad=grad, value_fn=loss
            )
            return (optax.apply_updates(readout, updates), state), None

        readout = jnp.zeros((inputs.shape[1], CLASSES))
        start = (readout, optimizer.init(readout))
        (readout, _), _ = jax.lax.scan(step, start, None, sizes.probe_steps)
        return jnp.argmax(inputs[_judged(part)] @ readout, 1)

    return jax.lax.map(guesses, jnp.asarray(L2))


def _fine_tuned(
    model: Autoencoder, params: Params, xs: Any, labels: Any, part: Parts, sizes: Sizes
) -> Any:
    """Guess after each epoch of training encoder and softmax together."""
    optimizer = optax.adam(1e-2)
    readout = {"kernel": jnp.zeros((sizes.hidden, CLASSES)), "bias": jnp.zeros((1, CLASSES))}
    net = {"encoder": params, "readout": readout}

    def logits(net: Any, rows: Any) -> Any:
        codes = jax.vmap(model.encode, (None, 0))(net["encoder"], xs[rows])
        return codes @ net["readout"]["kernel"] + net["readout"]["bias"]

    def epoch(carry: Any, key: Any) -> tuple[Any, Any]:
        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            net, state = carry
            grads = jax.grad(lambda net: _cross_entropy(logits(net, batch), labels[batch]))(net)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(net, updates), state), None

        carry, _ = jax.lax.scan(step, carry, batches(key, part.train, sizes.batch))
        return carry, jnp.argmax(logits(carry[0], _judged(part)), 1)

    keys = jax.random.split(jax.random.key(300 + part.seed), sizes.fine_epochs)
    return jax.lax.scan(epoch, (net, optimizer.init(net)), keys)[1]
