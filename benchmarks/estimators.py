"""How good are the estimators for their price, on deep networks trained on real digits?

Spread is that of a single draw for one sample: the root mean square over samples and draws of
P̂ − P, relative to the mean of P. The error of a gradient is ‖ĝ − g‖ / ‖g‖ of the batch's mean
penalty, root mean square over draws.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcae
from benchmarks import methods
from benchmarks.harness import Outcome, Row, Settings, Subject
from benchmarks.steps import DEEP
from jaxcae.data import load
from jaxcae.timing import Answer, check_unbiased, compile_ahead, interleave, ratio, tolerance_of
from jaxcae.types import Encode, Penalty

TITLE = "Estimators on trained deep networks: spread and gradient error against cost"
BATCH, CONTRACTION, DRAWS = 1024, 0.1, 16
EPOCHS, QUICK_EPOCHS = 20, 5
DEPTHS = {3: DEEP, 5: (784, 512, 256, 128, 64, 32)}
ACTIVATIONS = ("softplus", "relu", "sigmoid", "tanh")


def independent_probes(encode: Encode) -> Penalty:
    """Make ‖Jᵀv‖² as JAX users write it: one probe v a sample, drawn without the others."""

    def penalty(params: Any, xs: Any, key: Any = None) -> Any:
        def project(x: Any, key: Any) -> Any:
            code, pull = jax.vjp(partial(encode, params), x)
            return jnp.sum(pull(jax.random.rademacher(key, code.shape, code.dtype))[0] ** 2)

        return jax.vmap(project)(xs, jax.random.split(key, len(xs)))

    return penalty


def _by(method: str, **options: Any) -> Callable[[Encode], Penalty]:
    return partial(jaxcae.contractive_penalty, method=method, **options)


INDEPENDENT, PROBE = "independent probes, 1", "hutchinson, 1 probe"
CONTROL_VARIATE = "control variate, 1 probe"
ESTIMATORS: dict[str, Callable[[Encode], Penalty]] = {
    INDEPENDENT: independent_probes,
    PROBE: _by("hutchinson", num_probes=1),
    "hutchinson, 4 probes": _by("hutchinson", num_probes=4),
    "hutchinson, 16 probes": _by("hutchinson", num_probes=16),
    CONTROL_VARIATE: _by("control_variate", num_probes=1),
}


def run(settings: Settings) -> Outcome:
    """Measure quality on every network, and cost once for each depth."""
    digits = load("mnist5k").features
    depths = DEPTHS if settings.full else {3: DEPTHS[3]}
    activations = ACTIVATIONS if settings.full else ("softplus", "relu")
    rows: list[Row] = []
    for depth, sizes in depths.items():
        seconds: dict[str, tuple[Any, ...]] = {}
        for activation in activations:
            group = f"{depth} layers, {activation}"
            settings.say(f"{group}: training")
            model = jaxcae.mlp(sizes, activation)
            params = trained(model, digits, EPOCHS if settings.full else QUICK_EPOCHS)
            found = quality(model, params, jnp.asarray(digits[:BATCH]), group, settings, seconds)
            rows += found
    return Outcome(rows, _notes(rows))


def trained(model: jaxcae.Autoencoder, xs: Any, epochs: int) -> Any:
    """Train with the contractive penalty, estimated: the exact one would take most of the time."""
    loss = jaxcae.cae_loss(model, CONTRACTION, method="control_variate")
    optimizer = optax.adam(1e-3)
    state = jaxcae.TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    state, _ = jaxcae.fit(loss, optimizer, state, xs, epochs=epochs, batch_size=128)
    return state.params


def quality(
    model: jaxcae.Autoencoder,
    params: Any,
    xs: Any,
    group: str,
    settings: Settings,
    cost: dict[str, tuple[Any, ...]],
) -> list[Row]:
    """Measure spread and gradient error; `cost` is filled by the first network of a depth."""
    encoder = params["encoder"]
    penalties = {"exact": _by("auto"), **ESTIMATORS}
    programs = {
        name: compile_ahead(_norms_and_gradient(make(model.encode)), encoder, xs, jax.random.key(0))
        for name, make in penalties.items()
    }
    plain = methods.step_subject(model, params, xs, "plain")
    norms, gradient = jax.device_get(programs["exact"].call(encoder, xs, jax.random.key(0)))
    errors: dict[str, tuple[float, float]] = {"exact": (0.0, 0.0)}
    for name in ESTIMATORS:
        settings.say(f"{group}: {name}")
        keys = jax.random.split(jax.random.key(3), DRAWS)
        draws = [jax.device_get(programs[name].call(encoder, xs, key)) for key in keys]
        answers = [Answer(np.mean(n), g) for n, g in draws]
        truth = Answer(np.mean(norms), gradient)
        _, in_gradient = check_unbiased(name, answers, truth, tolerance_of(xs.dtype))
        off = np.stack([n for n, _ in draws]) - norms
        errors[name] = float(np.sqrt(np.mean(off**2)) / np.mean(norms)), in_gradient
    if not cost:
        cost.update(_cost(plain, programs, encoder, xs, group, settings))
    return [
        Row(
            group,
            name,
            seconds=cost[name][0],
            times_unit=cost[name][1],
            flops=programs[name].flops,
            temp_bytes=programs[name].temp_bytes,
            compile_seconds=programs[name].seconds,
            check="exact" if name == "exact" else "unbiased",
            errors=errors[name],
            facts={"share_of_exact": cost[name][2], "mean_norm": float(np.mean(norms))},
        )
        for name in penalties
    ]


def _norms_and_gradient(penalty: Penalty) -> Callable[..., Any]:
    def mean(encoder: Any, xs: Any, key: Any) -> Any:
        norms = penalty({"encoder": encoder}, xs, key)
        return jnp.mean(norms), norms

    def both(encoder: Any, xs: Any, key: Any) -> Any:
        (_, norms), gradient = jax.value_and_grad(mean, has_aux=True)(encoder, xs, key)
        return norms, gradient

    return both


def _cost(
    plain: Subject, programs: Any, encoder: Any, xs: Any, group: str, settings: Settings
) -> dict[str, tuple[Any, ...]]:
    """Time penalty and gradient by each method, in units of a plain training step."""
    settings.say(f"{group}: timing")
    key = jax.random.key(4)
    calls: dict[str, Callable[[], Any]] = {"plain": plain.call}
    for name, program in programs.items():
        calls[name] = partial(program.call, encoder, xs, key)
    timings = interleave(calls, settings.rounds, settings.turn_seconds)
    return {
        name: (
            timings[name].median,
            tuple(ratio(timings[name], timings["plain"])),
            tuple(ratio(timings[name], timings["exact"])),
        )
        for name in programs
    }


def _notes(rows: list[Row]) -> list[str]:
    notes = [
        "Times are those of penalty and gradient alone, measured once for each depth, in units of "
        "a plain training step. Spreads and gradient errors are those of one draw."
    ]
    for group in dict.fromkeys(row.group for row in rows):
        errors = {row.name: row.errors for row in rows if row.group == group and row.errors}
        apart, one, low = (errors[name] for name in (INDEPENDENT, PROBE, CONTROL_VARIATE))
        notes.append(
            f"{group}: balanced over the batch, one plain probe's gradient error is "
            f"{apart[1] / one[1]:.3g} times smaller. The control variate's spread is "
            f"{one[0] / low[0]:.3g} times smaller than that probe's, and its gradient error "
            f"{one[1] / low[1]:.3g} times."
        )
    return notes
