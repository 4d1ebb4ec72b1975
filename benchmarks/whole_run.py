"""What does a whole run take, compilation included? 4,000 digits, 20 epochs, the same batches.

Each way runs in a process of its own, as a user's would. All start from the same weights, take the
same batches in the same order, and are judged afterwards by one evaluator on the same held-out
digits.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxcae
from benchmarks.harness import Outcome, Row, Settings
from benchmarks.one_run import flatten, unflatten
from jaxcae.data import load, split
from jaxcae.timing import DisagreementError
from jaxcae.training import epoch_order

TITLE = "A whole training run: 4,000 digits, 784-256-64, 20 epochs of batches of 128, Adam"
SIZES, EPOCHS, BATCH, RATE, CONTRACTION, SEED = (784, 256, 64), 20, 128, 1e-3, 0.1, 0
SAME_LOSS = 1e-3
"""How far held-out losses of exact ways may be apart after 640 steps of rounding."""


class Way(NamedTuple):
    """One way to train.

    Attributes:
        framework: `"jaxcae"` or `"torch"`.
        method: A method of jaxcae, or a function of `torch_methods`; None is plain.
        exact: Whether it must reach the held-out loss of the other exact ways.
        quick_epochs: Epochs that a quick benchmark runs; the rest is extrapolated.
    """

    framework: str
    method: str | None
    exact: bool = True
    quick_epochs: int = EPOCHS


WAYS = {
    "jaxcae plain": Way("jaxcae", None, exact=False),
    "jaxcae exact": Way("jaxcae", "auto"),
    "jaxcae one projection": Way("jaxcae", "hutchinson", exact=False),
    "jaxcae vmap(jacrev)": Way("jaxcae", "reverse", quick_epochs=2),
    "torch plain": Way("torch", None, exact=False),
    "torch closed form": Way("torch", "by_closed_form"),
    "torch one projection": Way("torch", "by_projection", exact=False),
    "torch vmap(jacrev)": Way("torch", "by_jacrev", quick_epochs=3),
}


def run(settings: Settings) -> Outcome:
    """Run every way, one after the other.

    Raises:
        DisagreementError: If exact ways end at different held-out losses.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        held_out = _write_materials(Path(folder))
        for name, way in WAYS.items():
            if way.framework == "torch" and importlib.util.find_spec("torch") is None:
                settings.say(f"{name}: not measured, needs the package 'torch'")
                continue
            settings.say(name)
            epochs = EPOCHS if settings.full else way.quick_epochs
            rows.append(_run_way(name, way, epochs, Path(folder), held_out))
    unit = rows[0].seconds
    assert unit is not None
    rows = [
        replace(row, times_unit=(row.seconds / unit,) * 3) if row.seconds else row for row in rows
    ]
    losses = {
        row.name: row.facts["held_out_loss"]
        for row in rows
        if WAYS[row.name].exact and row.facts["epochs"] == EPOCHS
    }
    apart = max(losses.values()) / min(losses.values()) - 1
    if not apart <= SAME_LOSS:
        raise DisagreementError(f"held-out losses differ by {apart:.1g}: {losses}.")
    return Outcome(
        rows,
        [
            f"Exact ways that ran to the end ({', '.join(losses)}) reach the same held-out loss, "
            f"to {apart:.1e}.",
            "Times include tracing and compilation, not imports; process_seconds includes both. "
            "One run each: these are a user's waiting times, not medians.",
        ],
    )


def _write_materials(folder: Path) -> Any:
    """Write training digits, weights and orders for the processes; return the held-out digits."""
    train, held_out = split(load("mnist5k"), 0.2, SEED)
    key = jax.random.key(SEED)
    samples = len(train.features)
    orders = [np.asarray(epoch_order(key, epoch, samples)) for epoch in range(EPOCHS)]
    params = jaxcae.mlp(SIZES).init(jax.random.key(SEED + 1))
    arrays: Any = flatten(jax.device_get(params))
    np.savez(folder / "materials.npz", train=train.features, orders=np.stack(orders), **arrays)
    return held_out.features


def _run_way(name: str, way: Way, epochs: int, folder: Path, held_out: Any) -> Row:
    spec = {
        "materials": str(folder / "materials.npz"),
        "framework": way.framework,
        "method": way.method,
        "epochs": epochs,
        "sizes": SIZES,
        "batch": BATCH,
        "rate": RATE,
        "contraction": CONTRACTION,
        "seed": SEED,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_run", folder / "spec.json", folder / "out.npz"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    whole = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    first, *later = measured["epochs"]
    steady = float(np.median(later))
    seconds = first + sum(later) + (EPOCHS - epochs) * steady
    facts = {
        "epochs": epochs,
        "first_epoch_seconds": first,
        "epoch_seconds": steady,
    }
    if measured["peak_bytes"]:
        facts["peak_bytes"] = measured["peak_bytes"]
    if epochs == EPOCHS:
        facts |= {
            "process_seconds": whole,
            "held_out_loss": _held_out_loss(folder / "out.npz", held_out),
        }
    note = "" if epochs == EPOCHS else f"measured over {epochs} epochs and extrapolated to {EPOCHS}"
    return Row("20 epochs", name, seconds=seconds, note=note, facts=facts)


def _held_out_loss(path: Path, held_out: Any) -> float:
    """Evaluate a run's parameters by one evaluator for all."""
    with np.load(path, allow_pickle=False) as stored:
        params = unflatten({name: stored[name] for name in stored.files})
    loss = jaxcae.cae_loss(jaxcae.mlp(SIZES), CONTRACTION)
    return jaxcae.evaluate(loss, params, held_out)["loss"]
