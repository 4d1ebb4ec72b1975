"""What does a contraction at every n-th step cost, and what does it do to held-out figures?

A deep encoder, whose exact norms are dear; the control variate at every step stands beside.
"""

from dataclasses import replace
from typing import Any

import jax
import optax

import jaxcae
from benchmarks.harness import Outcome, Row, Settings, Subject, compare
from benchmarks.streaming import caller
from jaxcae.data import load, split
from jaxcae.training.sources import Resident

TITLE = "Lazy contraction: every n-th step at n times its weight, on trained deep digits"
SIZES, BATCH, CONTRACTION, RATE = (64, 128, 64, 16), 64, 0.1, 1e-3
STEPS = 16
"""Steps that are timed together: whole turns of every n."""
EPOCHS, QUICK_EPOCHS = 60, 20
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"contraction": None},
    "exact": {},
    "exact, every 4": {"contraction_every": 4},
    "exact, every 16": {"contraction_every": 16},
    "control variate": {"method": "control_variate"},
    "control variate, every 4": {"method": "control_variate", "contraction_every": 4},
}


def run(settings: Settings) -> Outcome:
    """Time all ways in turns, and train each from the same parameters on the same batches."""
    train, held_out = split(load("digits"), 0.2, 0)
    model = jaxcae.mlp(SIZES, output="sigmoid")
    optimizer = optax.adam(RATE)
    params = model.init(jax.random.key(0))
    start = jaxcae.TrainState.create(params, optimizer, jax.random.key(1))
    losses = {
        name: jaxcae.cae_loss(model, **{"contraction": CONTRACTION, **options})
        for name, options in WAYS.items()
    }
    subjects = [
        Subject(
            name,
            caller(Resident(loss, optimizer, train.features[: STEPS * BATCH], BATCH), start, STEPS),
            check="unit" if name == "plain" else "differs",
            note=f"{STEPS} steps of fit",
        )
        for name, loss in losses.items()
    ]
    group = f"{'-'.join(map(str, SIZES))}, batch {BATCH}"
    rows = compare(group, subjects, settings)
    epochs = EPOCHS if settings.full else QUICK_EPOCHS
    measure = jaxcae.cae_loss(model, CONTRACTION)
    trained = []
    for row in rows:
        settings.say(f"{row.name}: {epochs} epochs")
        state, _ = jaxcae.fit(
            losses[row.name], optimizer, start, train.features, epochs=epochs, batch_size=BATCH
        )
        found = jaxcae.evaluate(measure, state.params, held_out.features)
        facts = {
            "epochs": epochs,
            "held_out_loss": found["loss"],
            "held_out_reconstruction": found["reconstruction"],
            "held_out_norm_squared": found["contraction"],
        }
        trained.append(replace(row, facts=facts))
    return Outcome(trained, _notes(trained))


def _notes(rows: list[Row]) -> list[str]:
    best = {row.name: row.facts["held_out_loss"] for row in rows}
    said = ", ".join(f"{name} {best[name] / best['exact']:.3f}" for name in best)
    return [f"Held-out objective, exactly evaluated, over that of the exact way: {said}."]
