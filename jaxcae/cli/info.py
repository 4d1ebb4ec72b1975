"""`jaxcae info`: what is in a run directory, whether it is whole, and whether this machine is."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from jaxcae.cli.device import OnDevice
from jaxcae.cli.named import find_in_working_directory
from jaxcae.errors import InputError
from jaxcae.files import read_json
from jaxcae.runs import (
    LogMark,
    check_log,
    check_params,
    is_in_use,
    params_path,
    read_config,
    read_metrics,
)
from jaxcae.runs.checkpoints import Checkpoints, checkpoint_steps
from jaxcae.runs.config import Config, differences
from jaxcae.runs.entries import METRIC, PRETRAINED
from jaxcae.runs.leaves import CheckpointError
from jaxcae.runs.metric import load_metric
from jaxcae.runs.recipe import make_optimizer, make_state
from jaxcae.runs.remake import remake_model
from jaxcae.types import Autoencoder


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Show what is in a run directory.

    Without one, and with --self-test, check this installation on this machine's accelerator.
    """

    run_dir: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN_DIR]")] = None
    """The directory of a run."""
    verify: bool = False
    """Load everything that has a digest and compare; exit 1 if anything is damaged."""
    model: str | None = None
    """With --verify, of a run whose model is your own: its PACKAGE.MODULE:FACTORY once more. What a
    directory names is not imported on its word."""
    self_test: bool = False
    """Check versions, device, precision, repeatability and exactness; exit 1 on any failure."""
    json: bool = False
    """Print JSON."""


def run(arguments: Arguments) -> int:
    """Show, verify or test, and return the exit code."""
    if arguments.self_test:
        return _self_test(arguments.json)
    if arguments.run_dir is None:
        raise InputError("needs a RUN_DIR, or --self-test.")
    config = read_config(arguments.run_dir)
    if arguments.verify:
        find_in_working_directory(arguments.model)
        model = remake_model(config, arguments.model, arguments.run_dir)
        return _verify(arguments.run_dir, config, model, arguments.json)
    sections = _sections(arguments.run_dir, config)
    if arguments.json:
        print(json.dumps(sections, allow_nan=False))
        return 0
    from jaxcae.cli.console import print_result
    from jaxcae.cli.tables import info_table

    print_result(info_table(sections))
    return 0


def _self_test(as_json: bool) -> int:
    from jaxcae.selftest import self_test

    outcome = self_test()
    print(json.dumps(outcome.to_json()) if as_json else outcome)
    return 0 if outcome.passed else 1


def _sections(path: Path, config: Config) -> dict[str, dict[str, Any]]:
    steps = checkpoint_steps(path / "checkpoints")
    last, epoch = 0, 0
    for line in read_metrics(path) if (path / "metrics.jsonl").exists() else ():
        last = max(last, int(line.get("step", 0)))
        epoch = int(line.get("epoch", 0)) if line.get("kind") == "epoch" else epoch
    report, environment = _table(path / "report.json"), _table(path / "env.json")
    # A run that is given more epochs has the report of those before.
    finished = bool(report) and report.get("steps") == last
    # What a script has saved, such as a detector, was trained outside of the directory.
    finished |= not (last or steps) and (path / "params.safetensors").exists()
    state = "finished" if finished else "stopped; --resume goes on with it"
    sections = {
        "run": {
            "directory": str(path),
            "state": "in use" if is_in_use(path) else state,
            "epochs": f"{epoch} of {config.training.epochs}",
            "checkpoints at steps": steps or None,
        },
        "configuration": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in config.settings()
            if name not in ("data_digest", "model_source", "model_frozen", "metric_digest")
        },
        "environment": {
            **_part(environment, "versions"),
            "device": ", ".join(map(str, _part(environment, "device").values())),
        },
    }
    for network, figures in _part(report, "networks").items():
        sections[f"{network}, on held-out samples"] = _part(figures, "after")
    return sections


def _table(path: Path) -> dict[str, Any]:
    """Read a table in JSON; none where there is no file."""
    table = read_json(path) if path.exists() else {}
    if not isinstance(table, dict):
        raise InputError(f"{path}: expected a table, got {type(table).__name__}.")
    return table


def _part(table: Any, name: str) -> dict[str, Any]:
    """Return a table within a table; the files may be anybody's."""
    part = table.get(name) if isinstance(table, dict) else None
    return part if isinstance(part, dict) else {}


def _verify(path: Path, config: Config, model: Autoencoder, as_json: bool) -> int:
    """Load all that has a digest; say of each part whether it is as it was written."""
    findings = {}
    for name, check in _checks(path, config, model):
        try:
            check()
            findings[name] = "verified"
        except (CheckpointError, InputError) as error:
            findings[name] = f"DAMAGED: {error}"
    damaged = [name for name, finding in findings.items() if finding != "verified"]
    if as_json:
        print(json.dumps(findings))
    else:
        from jaxcae.cli.console import print_result
        from jaxcae.cli.tables import info_table

        print_result(info_table({f"verified {path}": findings}))
    return 1 if damaged else 0


def _checks(
    path: Path, config: Config, model: Autoencoder
) -> Iterator[tuple[str, Callable[[], Any]]]:
    # Only shapes are asked for, which do not depend on the number of steps.
    like = jax.eval_shape(lambda: make_state(config, model, make_optimizer(config, steps=1)))
    checkpoints = Checkpoints(path / "checkpoints")

    def check_checkpoint(step: int) -> None:
        _, record = checkpoints.load(step, like)
        stored = Config.from_json(record["config"], f"checkpoint {step}")
        if differences(stored, config):
            raise CheckpointError("; ".join(differences(stored, config)))
        check_log(path, LogMark(*record["log"]))

    for step in checkpoints.steps():
        yield f"checkpoint {step}", lambda step=step: check_checkpoint(step)  # type: ignore[misc]
    if (path / PRETRAINED).exists():
        yield PRETRAINED, lambda: check_params(path / PRETRAINED, like.params, config)
    if config.objective.input_metric is not None:
        yield METRIC, lambda: load_metric(path, config)
    for network in config.networks:
        file = params_path(path, config, network)
        if file.exists() or (path / "report.json").exists():
            shape = like.params[network]
            yield file.name, lambda file=file, shape=shape: check_params(file, shape, config)  # type: ignore[misc]
