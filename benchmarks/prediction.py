"""Are the predictions that `auto` and `explain` go by right? Against XLA's own counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcae
from benchmarks import methods
from benchmarks.harness import Outcome, Row, Settings
from benchmarks.steps import title_of
from jaxcae.jacobian import choose
from jaxcae.timing import compile_ahead

TITLE = "Predictions of operations and peak memory, against XLA's"
SHAPES = ((784, 64), (784, 256, 64), (784, 512, 256, 64), (64, 256, 256, 256), (8, 128, 4))
BATCHES = (128, 1024)
METHODS = ("chain", "reverse", "forward")


def run(settings: Settings) -> Outcome:
    """Compile norms and gradient for each shape, and compare; nothing is run."""
    rows = []
    cases: list[tuple[str, Any, Any]] = [
        (title_of(sizes, batch), *_dense(sizes, batch))
        for batch in (BATCHES if settings.full else BATCHES[:1])
        for sizes in SHAPES
    ]
    conv = jaxcae.conv((28, 28, 1), (8, 16), 32, "softplus")
    xs = jax.ShapeDtypeStruct((64, 28, 28, 1), jnp.float32)
    cases.append(("conv 28×28, maps 8 and 16, code 32, batch 64", conv, xs))
    for title, model, xs in cases:
        settings.say(title)
        params = jax.eval_shape(model.init, jax.random.key(0))
        rows += [_row(title, model, params, xs, method) for method in METHODS]
    return Outcome(rows, _notes(rows))


def _dense(sizes: tuple[int, ...], batch: int) -> tuple[Any, Any]:
    return jaxcae.mlp(sizes), jax.ShapeDtypeStruct((batch, sizes[0]), jnp.float32)


def _row(title: str, model: Any, params: Any, xs: Any, method: str) -> Row:
    function = methods.penalty(model, method)
    program = compile_ahead(function, params, xs, jax.random.key(0))
    encoder = {"encoder": params["encoder"]}
    predicted = choose.predict(method, model.encode, encoder, xs, None, gradient=True)
    return Row(
        title,
        method,
        flops=program.flops,
        temp_bytes=program.temp_bytes,
        facts={"predicted_flops": predicted.flops, "predicted_bytes": predicted.bytes},
    )


def _notes(rows: list[Row]) -> list[str]:
    notes = []
    for kind in ("dense", "convolutional"):
        chosen = [row for row in rows if row.group.startswith("conv") == (kind == "convolutional")]
        for what, true, guess in (
            ("operations", "flops", "predicted_flops"),
            ("bytes", "temp_bytes", "predicted_bytes"),
        ):
            factors = [row.facts[guess] / (getattr(row, true) or np.nan) for row in chosen]
            notes.append(
                f"Predicted {what} over XLA's, {kind} encoders: {np.nanmin(factors):.2f} to "
                f"{np.nanmax(factors):.2f}, median {np.nanmedian(factors):.2f}, in {len(factors)} "
                "programs."
            )
    return notes
