"""What does a training step cost by each method? Method × shape × batch × depth × dtype."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import methods
from benchmarks.harness import Outcome, Row, Settings, compare

TITLE = "Training steps: value and gradient of the whole loss, by method"
SHALLOW, DEEP, LARGE = (784, 256, 64), (784, 512, 256, 64), (12288, 1024, 256)
EXPLICIT = ", explicit Jacobians"
BUDGET_SHARE = 0.1
_LARGE_CHECKED = 8
_FEATURES = 28
_OFTEN = 5
"""Turns of cheap steps for one of a dear step: their ratio is what matters most, and noisy."""


def run(settings: Settings) -> Outcome:
    """Measure all groups."""
    rows = [
        *_two_layers(128, settings, ("reverse", "forward")),
        *_penalty_alone(128, settings),
        *_two_layers(1024, settings, ("reverse", "forward") if settings.full else ("reverse",)),
        *_deep(settings),
        *_large(settings),
        *_no_help(settings),
    ]
    if settings.full:
        rows += [*_penalty_alone(1024, settings), *_depths(settings), *_dtypes(settings)]
    return Outcome(rows, _notes(rows))


def title_of(sizes: tuple[int, ...], batch: int, more: str = "") -> str:
    """Name a group by its sizes and batch."""
    return f"{'-'.join(map(str, sizes))}, batch {batch:,}{more}"


def _two_layers(batch: int, settings: Settings, slow: tuple[str, ...]) -> list[Row]:
    """Time cheap steps among themselves, and explicit Jacobians apart.

    A step that sweeps hundreds of MB through the caches slows its neighbours, the plain step more
    than the others, and every ratio to it would look better than it is.
    """
    model, params, xs = methods.network(SHALLOW, batch)
    cheap = {
        name: methods.step_subject(model, params, xs, name)
        for name in ("plain", "auto", "hutchinson")
    }
    heavy = [methods.step_subject(model, params, xs, name) for name in slow]
    if "forward" in slow and batch > 128:  # which takes gigabytes at once
        name = f"forward, {_FEATURES} at a time"
        heavy.append(methods.step_subject(model, params, xs, "forward", name, chunk_size=_FEATURES))
    for name, jacobian in (("vmap(jacrev)", jax.jacrev), ("vmap(jacfwd)", jax.jacfwd)):
        if batch <= 128:
            step = methods.textbook(model, jacobian)
            heavy.append(methods.subject(name, step, params, xs, note="as JAX users write it"))
    reference = methods.answer(methods.step(model, "reverse", chunk_size=8), params, xs)
    group = title_of(SHALLOW, batch)
    often = replace(settings, rounds=_OFTEN * settings.rounds)
    return [
        *compare(group, list(cheap.values()), often, reference),
        *compare(group + EXPLICIT, [cheap["plain"], cheap["auto"], *heavy], settings, reference),
    ]


def _penalty_alone(batch: int, settings: Settings) -> list[Row]:
    """The penalty without reconstruction and decoder; the unit is still the whole plain step."""
    model, params, xs = methods.network(SHALLOW, batch)
    subjects = [methods.step_subject(model, params, xs, "plain")]
    for name in ("auto", "hutchinson", "reverse", "forward"):
        check: Any = "unbiased" if name in methods.UNBIASED else "exact"
        function = methods.penalty(model, name)
        subjects.append(methods.subject(name, function, params, xs, check=check))
    reference = methods.answer(methods.penalty(model, "reverse", chunk_size=8), params, xs)
    group = title_of(SHALLOW, batch, ", penalty alone")
    return compare(group, subjects, settings, reference)


def _deep(settings: Settings) -> list[Row]:
    """Three layers: the exact price, what a budget saves, and the estimator with little noise."""
    batch = 1024
    model, params, xs = methods.network(DEEP, batch)

    def make(method: str, name: str | None = None, **options: Any) -> Any:
        return methods.step_subject(model, params, xs, method, name, **options)

    directions = [make("reverse")]
    if settings.full:
        directions.append(make("forward"))
    settings.say("784-512-256-64: choosing the budget")
    budget = BUDGET_SHARE * float(directions[0].temp_bytes or 0)
    subjects = [make("plain"), make("auto"), make("hutchinson"), make("control_variate")]
    if budget:
        subjects.append(
            make(
                "auto",
                "auto, a tenth of reverse's memory",
                memory_budget=budget,
                note=f"memory_budget = {budget / 2**20:.0f} MiB",
            )
        )
    reference = methods.answer(methods.step(model, "reverse", chunk_size=8), params, xs)
    return compare(title_of(DEEP, batch), [*subjects, *directions], settings, reference)


def _large(settings: Settings) -> list[Row]:
    """Jacobians of 13 GB: the gradient of their norms in little memory, timed only if asked."""
    batch = 1024
    model, params, xs = methods.network(LARGE, batch)
    few = _LARGE_CHECKED
    note = f"checked on {few} samples against reverse mode"
    subjects = [
        methods.step_subject(model, params, xs, "plain"),
        methods.step_subject(model, params, xs, "auto", cut=few, note=note),
    ]
    reference = methods.answer(methods.step(model, "reverse", chunk_size=4), params, xs, cut=few)
    facts = {"jacobian_bytes": 4 * batch * LARGE[0] * LARGE[-1]}
    once = settings if settings.full else replace(settings, rounds=3)
    return compare(title_of(LARGE, batch), subjects, once, reference, facts=facts)


def _no_help(settings: Settings) -> list[Row]:
    """Where structure does not help: few features, or deep encoders that do not narrow."""
    rows = []
    for sizes, batch in (((8, 128, 4), 1024), ((256, 256, 256, 256), 128)):
        model, params, xs = methods.network(sizes, batch)
        names: tuple[str, ...] = ("plain", "auto", "hutchinson", "reverse", "forward")
        if len(sizes) > 3:
            names = (*names, "control_variate")
        subjects = [methods.step_subject(model, params, xs, name) for name in names]
        reference = methods.answer(methods.step(model, "reverse", chunk_size=4), params, xs)
        rows += compare(title_of(sizes, batch), subjects, settings, reference)
    return rows


def _depths(settings: Settings) -> list[Row]:
    rows = []
    for sizes, batch in (((784, 64), 1024), ((784, 512, 256, 128, 64, 32), 128)):
        model, params, xs = methods.network(sizes, batch)
        names: tuple[str, ...] = ("plain", "auto", "hutchinson", "reverse")
        if len(sizes) > 3:
            names = (*names, "control_variate")
        subjects = [methods.step_subject(model, params, xs, name) for name in names]
        reference = methods.answer(methods.step(model, "reverse", chunk_size=8), params, xs)
        rows += compare(title_of(sizes, batch), subjects, settings, reference)
    return rows


def _dtypes(settings: Settings) -> list[Row]:
    """Half the digits: each step is held against the float32 step on the same bfloat16 weights."""
    batch = 1024
    model, params, xs = methods.network(SHALLOW, batch, dtype=jnp.bfloat16)
    names = ("plain", "auto", "hutchinson")
    subjects = [methods.step_subject(model, params, xs, name) for name in names]
    wide: Any = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, xs))
    reference = methods.answer(methods.step(model, "reverse", chunk_size=8), *wide)
    return compare(title_of(SHALLOW, batch, ", bfloat16"), subjects, settings, reference)


def _notes(rows: list[Row]) -> list[str]:
    """Say of each group what the exact penalty costs."""
    notes = []
    for group in dict.fromkeys(row.group for row in rows):
        found = {row.name: row for row in rows if row.group == group}
        plain, exact = found["plain"], found["auto"]
        if (
            "alone" in group
            or exact.times_unit is None
            or exact.flops is None
            or plain.flops is None
        ):
            continue
        value, low, high = exact.times_unit
        notes.append(
            f"{group}: exact costs {value:.2f} times the plain step ({low:.2f} to {high:.2f}), "
            f"at {exact.flops / plain.flops:.2f} times its operations."
        )
    return notes
