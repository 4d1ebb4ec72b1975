"""Walk through the museum: measure every exhibit, train with those that train, keep the results."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jaxcae.files import write_atomic
from parity.museum import curved, formulas, hazards, jacobians, reductions
from parity.museum.exhibit import Exhibit, Visit
from parity.museum.ground import Recipe, exact, held_out, train, true_norms, tutorial_model
from parity.museum.tell import as_json, as_markdown
from parity.reference import DenseCAE

ROOMS = (jacobians, formulas, reductions, curved, hazards)

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


def curved_runs() -> dict[str, Recipe | None]:
    """List the runs whose curvature is followed: of a softplus network, for ReLU has none."""
    return {
        "no penalty": None,
        "Hessian of the summed outputs": curved.hessian_of_summed_outputs,
        "noise form, one ε for the batch": curved.with_noise(shared=True),
        "noise form, an ε for each sample": curved.with_noise(shared=False),
        "exact": curved.exact_curvature,
    }


def follow(name: str, steps: int) -> list[float]:
    """Train with one recipe; the mean true ‖J‖² of held-out digits before and after every step."""
    return _follow(tutorial_model(), RUNS[name], steps, true_norms)


def follow_curvature(name: str, steps: int) -> list[float]:
    """Train with one recipe for ‖∇²h‖², and follow that."""
    return _follow(tutorial_model("softplus"), curved_runs()[name], steps, curved.true_curvatures)


def _follow(
    model: DenseCAE, recipe: Recipe | None, steps: int, truth: Callable[[DenseCAE, Tensor], Tensor]
) -> list[float]:
    xs = held_out()
    track: list[float] = []
    train(
        model,
        recipe,
        steps,
        after=lambda step, model: track.append(truth(model, xs).mean().item()),
    )
    return track


def visit(out: Path, steps: int, begin: Callable[[str], None] = lambda name: None) -> Visit:
    """Measure everything and write `museum.json`, `museum.md` and two pictures into `out`."""
    from parity.museum.picture import draw_curvatures, draw_norms

    exhibits: list[Exhibit] = []
    for room in ROOMS:
        begin(room.__name__.rpartition(".")[2])
        exhibits += room.exhibits()
    runs = {}
    for name in RUNS:
        begin(name)
        runs[name] = follow(name, steps)
    curvatures = {}
    for name in curved_runs():
        begin(f"curvature: {name}")
        curvatures[name] = follow_curvature(name, steps)
    seen = Visit(exhibits, runs, curvatures, steps)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "steps": steps,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "museum.json", json.dumps(as_json(seen, about), indent=1).encode())
    write_atomic(out / "museum.md", as_markdown(seen, about).encode())
    write_atomic(out / "museum.png", draw_norms(seen.runs))
    write_atomic(out / "museum-curvature.png", draw_curvatures(seen.curved))
    return seen
