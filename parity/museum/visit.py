"""Walk through the museum: measure every exhibit, train with those that train, keep the results."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from jaxcae.files import write_atomic
from parity.museum import formulas, hazards, jacobians, reductions
from parity.museum.exhibit import Exhibit, Visit
from parity.museum.ground import Recipe, exact, held_out, train, true_norms, tutorial_model
from parity.museum.tell import as_json, as_markdown

# Detached weights leave a ReLU encoder's penalty without gradient, a missing graph any encoder's:
# both of those runs are that of no penalty, as tests prove.
RUNS: dict[str, Recipe | None] = {
    "no penalty": None,
    "gradient of the summed outputs": formulas.gradient_of_summed_outputs,
    "finite differences, step 1e-6": jacobians.finite_differences,
    "finite differences, step 1e-2": jacobians.finite_differences_that_work,
    "exact": exact,
    "L1 of the weights": formulas.l1_of_weights,
}


def follow(name: str, steps: int) -> list[float]:
    """Train with one recipe; the mean true ‖J‖² of held-out digits before and after every step."""
    xs = held_out()
    track: list[float] = []
    train(
        tutorial_model(),
        RUNS[name],
        steps,
        after=lambda step, model: track.append(true_norms(model, xs).mean().item()),
    )
    return track


def visit(out: Path, steps: int, begin: Callable[[str], None] = lambda name: None) -> Visit:
    """Measure everything and write `museum.json`, `museum.md` and `museum.png` into `out`."""
    from parity.museum.picture import draw

    exhibits: list[Exhibit] = []
    for room in (jacobians, formulas, reductions, hazards):
        begin(room.__name__.rpartition(".")[2])
        exhibits += room.exhibits()
    runs = {}
    for name in RUNS:
        begin(name)
        runs[name] = follow(name, steps)
    seen = Visit(exhibits, runs, steps)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "steps": steps,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "museum.json", json.dumps(as_json(seen, about), indent=1).encode())
    write_atomic(out / "museum.md", as_markdown(seen, about).encode())
    write_atomic(out / "museum.png", draw(seen.runs))
    return seen
