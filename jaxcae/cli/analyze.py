"""`jaxcae analyze`: what a trained encoder follows, what it ignores, and how far."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxcae.cli.device import OnDevice
from jaxcae.cli.named import open_named_run
from jaxcae.cli.threads import one_blas_thread
from jaxcae.errors import InputError
from jaxcae.results import analysis
from jaxcae.runs import Run
from jaxcae.runs.config import PLAIN, Config, main_network
from jaxcae.types import Params
from jaxcae.words import number

_CURVE_SAMPLES, _RADII, _DIRECTIONS = 200, 16, 16
_ACTIVE = 0.1
_SATURATED = 0.1


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Look into the encoder of a finished run, on the held-out samples of its data.

    Shows the singular values of the Jacobian J, how many directions the code follows, how much
    distances shrink near a sample and far from it, how much the encoder bends there (of a run with
    --curvature), and how many units are saturated; beside the plain network of the run, where it
    has one. Pictures go to RUN_DIR/plots.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The directory of a finished run."""
    model: str | None = None
    """Of a run whose model is your own: its PACKAGE.MODULE:FACTORY once more. What a directory
    names is not imported on its word."""
    samples: int = 500
    """Look at so many held-out samples at most."""
    seed: int = 0
    """Seed of the directions in which distances are measured."""
    plots: bool = True
    """Draw spectrum.png and contraction.png into RUN_DIR/plots."""
    max_bytes: int | None = None
    """Refuse data that would take more memory than this; half the memory by default."""
    json: bool = False
    """Print all figures as JSON: spectra, curves and saturation in full."""


def run(arguments: Arguments) -> int:
    """Analyse a run, draw, and print a table."""
    if arguments.samples < 1:
        raise InputError(f"--samples must be at least 1, got {arguments.samples!r}.")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed must be from 0 to 2³² − 1, got {arguments.seed!r}.")
    trained = open_named_run(arguments.run_dir, arguments.model)
    held_out = _held_out(trained.config, arguments)
    params = {main_network(trained.config): trained.params}
    if trained.plain is not None:
        params[PLAIN] = trained.plain
    report = _report(trained, params, held_out, arguments)
    if arguments.plots:
        report["plots"] = [str(path) for path in _draw(report, arguments.run_dir / "plots")]
    if arguments.json:
        print(json.dumps(report, allow_nan=False))
        return 0
    from jaxcae.cli.console import print_result

    print_result(_table(report, trained.config))
    return 0


def _held_out(config: Config, arguments: Arguments) -> np.ndarray:
    """Load the held-out samples of the run, and see that they are the ones it had."""
    from jaxcae.runs.material import load_material

    material = load_material(config, arguments.max_bytes)
    if material.config.data.digest != config.data.digest:
        raise InputError(
            f"{config.data.source}: is not the data that the run was trained on (its digest "
            "differs); its held-out samples cannot be told from the others."
        )
    return material.held_out[: arguments.samples]


def _report(
    trained: Run, params: Mapping[str, Params], held_out: np.ndarray, arguments: Arguments
) -> dict[str, Any]:
    config, encode = trained.config, trained.model.encode
    xs, near = jnp.asarray(held_out), jnp.asarray(held_out[:_CURVE_SAMPLES])
    # One sample has no distance to another; any length will then do as the unit.
    distance = float(analysis.typical_distance(xs)) or 1.0
    radii = np.geomspace(0.01 * distance, 2 * distance, _RADII)
    singular_values = jax.jit(analysis.singular_values(encode))
    ratios = jax.jit(
        analysis.contraction_ratios(encode, radii.tolist(), num_directions=_DIRECTIONS)
    )
    model = config.model
    # Of what its layers do between one another, only the built-in mlp tells.
    slopes, names = None, [model.activation] * (len(model.sizes) - 2) + [model.latent_activation]
    if model.kind == "mlp":
        slopes = jax.jit(analysis.encoder_slopes(model.activation, model.latent_activation))
    key = jax.random.key(arguments.seed)
    bends = None
    if config.objective.curvature:
        bends = jax.jit(
            analysis.curvature_curves(
                encode,
                radii.tolist(),
                config.objective.curvature_method,
                num_directions=_DIRECTIONS,
            )
        )

    networks: dict[str, Any] = {}
    for name, network in params.items():
        with one_blas_thread():
            values = jax.block_until_ready(singular_values(network, xs))
        spectrum, squared = analysis.average_spectrum(values), jnp.sum(jnp.square(values), -1)
        networks[name] = {
            "jacobian_norm": float(jnp.mean(jnp.sqrt(squared))),
            "jacobian_norm_squared": float(jnp.mean(squared)),
            "spectrum": {field: _floats(array) for field, array in spectrum._asdict().items()},
            "effective_dimension": float(jnp.mean(analysis.effective_dimension(values))),
            "active_dimensions": float(jnp.mean(analysis.active_dimensions(values, _ACTIVE))),
            "contraction_ratios": _floats(jnp.mean(ratios(network, near, key), axis=0)),
            "saturation": [
                float(jnp.mean(analysis.saturation(layer, activation, _SATURATED)))
                for layer, activation in zip(slopes(network, xs), names, strict=False)
            ]
            if slopes
            else [],
        }
        if bends is not None:
            networks[name]["curvature"] = _floats(jnp.mean(bends(network, near, key), axis=0))
    report = {
        "run_dir": str(arguments.run_dir),
        "data": config.data.source,
        "held_out_samples": len(held_out),
        "rank": len(spectrum.mean),
        "typical_distance": distance,
        "radii": _floats(radii),
        "networks": networks,
    }
    if not all(np.isfinite(network["jacobian_norm_squared"]) for network in networks.values()):
        raise ArithmeticError(f"{arguments.run_dir}: the Jacobian is not finite on its own data.")
    return report


def _draw(report: Mapping[str, Any], directory: Path) -> list[Path]:
    from jaxcae import plotting

    networks = report["networks"]
    return plotting.save_each(
        directory,
        {
            "spectrum": lambda: plotting.singular_value_spectrum(
                {name: list(figures["spectrum"].values()) for name, figures in networks.items()},
                dimensions={name: n["effective_dimension"] for name, n in networks.items()},
                samples=report["held_out_samples"],
            ),
            "contraction": lambda: plotting.contraction_curves(
                np.array(report["radii"]),
                {name: np.array(n["contraction_ratios"]) for name, n in networks.items()},
                typical_distance=report["typical_distance"],
                curvatures={
                    name: np.array(n["curvature"])
                    for name, n in networks.items()
                    if "curvature" in n
                },
            ),
        },
    )


def _table(report: Mapping[str, Any], config: Config) -> Any:
    from jaxcae.cli.tables import comparison_table

    # The network that the run is for comes last, beside the column that compares it.
    networks = dict(reversed(list(report["networks"].items())))
    radii, distance = np.array(report["radii"]), report["typical_distance"]
    at = int(np.argmin(np.abs(np.log(radii / distance))))
    figures: dict[str, Callable[[Any], float]] = {
        "mean ‖J‖_F": lambda n: n["jacobian_norm"],
        "largest singular value σ₁": lambda n: n["spectrum"]["mean"][0],
        "smallest singular value": lambda n: n["spectrum"]["mean"][-1],
        f"effective dimension, of {report['rank']}": lambda n: n["effective_dimension"],
        f"dimensions with σ ≥ {_ACTIVE:.0%} of σ₁": lambda n: n["active_dimensions"],
        f"contraction ratio at r = {radii[0]:.2g}": lambda n: n["contraction_ratios"][0],
        f"… at r = {radii[at]:.2g}, another sample": lambda n: n["contraction_ratios"][at],
    }
    if "curvature" in next(iter(networks.values())):
        figures[f"curvature ‖∇²h‖_F at r = {radii[0]:.2g}"] = lambda n: n["curvature"][0]
        figures[f"curvature at r = {radii[at]:.2g}"] = lambda n: n["curvature"][at]
    for layer in range(len(next(iter(networks.values()))["saturation"])):
        figures[f"saturated units, layer {layer + 1}, %"] = partial(_saturated, layer=layer)
    rows = {label: [read(n) for n in networks.values()] for label, read in figures.items()}
    return comparison_table(
        f"{config.data.source} · {report['held_out_samples']:,} held-out samples · "
        f"{config.model.label}",
        "mean over held-out samples",
        list(networks),
        rows,
        _finding(networks, report["rank"]),
        reference=PLAIN if len(networks) > 1 else None,
    )


def _saturated(figures: Mapping[str, Any], layer: int) -> float:
    return 100 * figures["saturation"][layer]


def _finding(networks: Mapping[str, Any], rank: int) -> str:
    told = [
        f"the {name} code follows {figures['effective_dimension']:.1f} of {rank} directions "
        f"with a largest stretch of {number(figures['spectrum']['mean'][0])}"
        for name, figures in reversed(list(networks.items()))
    ]
    sentence = "; ".join(told)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _floats(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values)]
