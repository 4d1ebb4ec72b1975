"""What does a training step cost whose batches come from a file, against batches in memory?"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxcae
from benchmarks.harness import Outcome, Row, Settings, Subject, compare
from jaxcae.data import NpySource, StreamedBatches
from jaxcae.training.sources import Resident, Streamed
from jaxcae.training.state import copied

TITLE = "Training steps: batches from a .npy file against batches in memory"
SIZES, ROWS, CONTRACTION = (784, 256, 64), 16384, 0.03
BATCHES = {128: 16, 1024: 4}
"""Steps that are timed together, by batch size; an epoch is a multiple of them."""


def run(settings: Settings) -> Outcome:
    """Measure both at each batch size, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, np.random.default_rng(0).random((ROWS, SIZES[0]), np.float32))
        rows = [row for batch in BATCHES for row in _batch(path, batch, settings)]
    return Outcome(rows, _notes(rows))


def _batch(path: Path, batch: int, settings: Settings) -> list[Row]:
    model = jaxcae.mlp(SIZES, output="sigmoid")
    loss, optimizer = jaxcae.cae_loss(model, CONTRACTION), optax.adam(1e-3)
    state = jaxcae.TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    sources = {
        "resident": Resident(loss, optimizer, np.load(path), batch),
        "streamed": Streamed(loss, optimizer, StreamedBatches(NpySource(path), batch)),
    }
    subjects = [
        Subject(
            name,
            caller(source, state, BATCHES[batch]),
            check="unit" if name == "resident" else "differs",
            note=f"{BATCHES[batch]} steps of fit",
        )
        for name, source in sources.items()
    ]
    group = f"{'-'.join(map(str, SIZES))}, batch {batch:,}"
    return compare(group, subjects, settings, unit="resident")


def caller(source: Any, state: Any, steps: int) -> Callable[[], Any]:
    """Make a call that goes on from where the last one ended."""
    state, step = copied(state), 0
    source.begin(state, step)

    def call() -> Any:
        nonlocal state, step
        state, metrics, _ = source.run(state, step, steps)
        step += steps
        return metrics["loss"]

    return call


def _notes(rows: list[Row]) -> list[str]:
    found = [
        f"{row.times_unit[0]:.2f} at {row.group.rpartition(', ')[2]}"
        for row in rows
        if row.name == "streamed" and row.times_unit
    ]
    return [
        f"A streamed step takes {' and '.join(found)} of a resident one (at most 1.15 aimed at)."
    ]
