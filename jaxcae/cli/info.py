"""`jaxcae info`: what is in a run directory, whether it is whole, and whether this machine is."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from jaxcae.cli.device import OnDevice
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
from jaxcae.runs.leaves import CheckpointError
from jaxcae.runs.recipe import make_model, make_optimizer, make_state


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Show what is in a run directory.

    Without one, and with --self-test, check this installation on this machine's accelerator.
    """

    run_dir: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN_DIR]")] = None
    """The directory of a run."""
    verify: bool = False
    """Load everything that has a digest and compare; exit 1 if anything is damaged."""
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
        return _verify(arguments.run_dir, config, arguments.json)
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
    finished = (path / "report.json").exists()
    in_use = is_in_use(path)
    state = "in use" if in_use else "finished" if finished else "stopped; --resume goes on with it"
    last = None
    for line in read_metrics(path) if (path / "metrics.jsonl").exists() else ():
        last = line if line.get("kind") == "epoch" else last
    done = int(last["epoch"]) if last else 0
    environment = read_json(path / "env.json") if (path / "env.json").exists() else {}
    sections = {
        "run": {
            "directory": str(path),
            "state": state,
            "epochs": f"{done} of {config.training.epochs}",
            "checkpoints at steps": steps or None,
        },
        "configuration": {k: v for k, v in config.to_json().items() if k != "data_digest"},
        "environment": {
            **environment.get("versions", {}),
            "device": ", ".join(map(str, environment.get("device", {}).values())),
        },
    }
    if finished:
        for network, figures in read_json(path / "report.json")["networks"].items():
            sections[f"{network}, on held-out samples"] = figures["after"]
    return sections


def _verify(path: Path, config: Config, as_json: bool) -> int:
    """Load all that has a digest; say of each part whether it is as it was written."""
    findings = {}
    for name, check in _checks(path, config):
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


def _checks(path: Path, config: Config) -> Iterator[tuple[str, Callable[[], Any]]]:
    model = make_model(config)
    # Only shapes are asked for, which do not depend on the number of steps.
    like = jax.eval_shape(lambda: make_state(config, model, make_optimizer(config, steps=1)))
    with Checkpoints(path / "checkpoints") as checkpoints:

        def check_checkpoint(step: int) -> None:
            _, record = checkpoints.load(step, like)
            stored = Config.from_json(record["config"], f"checkpoint {step}")
            if differences(stored, config):
                raise CheckpointError("; ".join(differences(stored, config)))
            check_log(path, LogMark(*record["log"]))

        for step in checkpoints.steps():
            yield f"checkpoint {step}", lambda step=step: check_checkpoint(step)  # type: ignore[misc]
    for network in config.networks:
        file = params_path(path, config, network)
        if file.exists() or (path / "report.json").exists():
            shape = like.params[network]
            yield file.name, lambda file=file, shape=shape: check_params(file, shape, config)  # type: ignore[misc]
