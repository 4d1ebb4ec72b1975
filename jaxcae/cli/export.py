"""`jaxcae export`: the encoder and the scorer of a run as files that need jax alone."""

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from jaxcae import __version__
from jaxcae.cli.device import OnDevice
from jaxcae.cli.named import open_named_run
from jaxcae.errors import InputError, printable
from jaxcae.files import sha256, write_atomic, write_json
from jaxcae.results.export import (
    PLATFORMS,
    BatchFunction,
    compare,
    encoder_of,
    example_batches,
    export_function,
    holds_own_units,
    scorer_of,
)

TOLERANCE = 1e-5
"""Largest relative difference to accept: that of two orders of summation in float32."""


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Write the encoder and the scorer of a run as files that need jax and not jaxcae.

    Each is called once in a new process that does not import jaxcae, and compared, before it takes
    its name. Inputs are samples in their own units, with features in the order of export.json:
    standardisation, where the run used it, is inside, unless float32 cannot hold those units.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The directory of a finished run."""
    output: Path | None = None
    """Where to write; RUN_DIR/export unless given."""
    platforms: tuple[str, ...] = PLATFORMS
    """Platforms to run on: cpu, cuda, tpu, rocm."""
    model: str | None = None
    """Of a run whose model is your own: its PACKAGE.MODULE:FACTORY once more. What a directory
    names is not imported on its word."""
    network: str | None = None
    """Which network of the run: contractive or plain; the one that the run is for by default."""
    json: bool = False
    """Print the summary as JSON."""


def run(arguments: Arguments) -> int:
    """Export, compare, write, and print where."""
    folder = arguments.output or arguments.run_dir / "export"
    trained = open_named_run(arguments.run_dir, arguments.model)
    config, params = trained.config, trained.params_of(arguments.network)
    _check_writable(folder)
    width, preparation = config.model.num_features, trained.preparation
    own_units = holds_own_units(preparation.standardization)
    scaling = preparation.standardization if own_units else None
    functions: dict[str, BatchFunction] = {
        "encoder": encoder_of(trained.model, params, scaling),
        "scorer": scorer_of(
            trained.model,
            params,
            scaling,
            reconstruction=config.objective.loss,
            features=config.objective.features,  # type: ignore[arg-type]
        ),
    }
    batches = example_batches(width, scaling)
    artefacts, entries = {}, {}
    for name, function in functions.items():
        artefact = export_function(function, width, arguments.platforms)
        difference = _compare(name, function, artefact, batches, arguments.platforms)
        artefacts[name] = artefact
        entries[name] = _describe(function, width, artefact, difference)
    for name, artefact in artefacts.items():
        write_atomic(folder / f"{name}.jaxexport", artefact)
    summary = {
        "platforms": list(arguments.platforms),
        "versions": {"jax": jax.__version__, "jaxcae": __version__},
        "network": arguments.network or config.networks[0],
        "inputs": "in their own units" if own_units else "standardised",
        **preparation.to_json(),
        "config": config.to_json(),
        "artefacts": entries,
    }
    write_json(folder / "export.json", summary)
    _print_summary(arguments, folder, entries)
    if not own_units:
        warnings.warn(
            "some features are so far from 0 that float32 would lose them: the files take samples "
            "that are standardised already, (x - mean) / deviation in float64, by the figures in "
            "export.json.",
            stacklevel=1,
        )
    return 0


def _check_writable(folder: Path) -> None:
    if folder.is_symlink():
        raise InputError(f"{folder}: is a symbolic link, which is not followed here.")
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror}.") from None


def _compare(
    name: str, function: BatchFunction, artefact: bytes, batches: Any, platforms: tuple[str, ...]
) -> float | None:
    """Compare where this machine is one of the platforms."""
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in platforms:
        return None
    difference = compare(function, artefact, batches)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"the exported {name} differs from the original by {difference:.2g} (relative), "
            f"more than {TOLERANCE:.0e}; nothing was written."
        )
    return difference


def _describe(
    function: BatchFunction, width: int, artefact: bytes, difference: float | None
) -> dict[str, Any]:
    sample = jax.ShapeDtypeStruct((1, width), "float32")
    outputs = jax.eval_shape(function, sample)
    named: Mapping[str, Any] = outputs if isinstance(outputs, dict) else {"result": outputs}
    return {
        "sha256": sha256(artefact),
        "bytes": len(artefact),
        "input": f"float32[batch, {width}]",
        "output": {
            label: f"{value.dtype}[{', '.join(map(str, ('batch', *value.shape[1:])))}]"
            for label, value in named.items()
        },
        "relative_difference": difference,
    }


def _print_summary(arguments: Arguments, folder: Path, entries: Mapping[str, Any]) -> None:
    if arguments.json:
        print(json.dumps({"output": str(folder), "artefacts": entries}))
        return
    for name, entry in entries.items():
        outputs = ", ".join(f"{label} {shape}" for label, shape in entry["output"].items())
        file = printable(folder / f"{name}.jaxexport")
        print(f"{file}: {entry['bytes']:,} bytes for {', '.join(arguments.platforms)}")
        print(f"  {entry['input']} → {outputs}")
        if entry["relative_difference"] is None:
            print("  not compared: this machine is none of the platforms")
        else:
            print(
                f"  called in a process without jaxcae: within {entry['relative_difference']:.1e}"
            )
