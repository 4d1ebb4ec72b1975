"""A training run from its configuration to its report, in a directory that survives any crash."""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcae.devices.layout import Layout, gather
from jaxcae.devices.layout import layout as make_layout
from jaxcae.devices.processes import agree, any_process, are_many, is_first
from jaxcae.errors import InputError, RunError
from jaxcae.files import read_json
from jaxcae.runs.checkpoints import check_free_space
from jaxcae.runs.config import Config, differences, monitored
from jaxcae.runs.directory import RunDirectory
from jaxcae.runs.entries import CONFIG, METRIC
from jaxcae.runs.environment import environment
from jaxcae.runs.finished import params_path
from jaxcae.runs.follower import Follower
from jaxcae.runs.keeper import Keeper
from jaxcae.runs.material import Material, load_material
from jaxcae.runs.metric import check_alike, load_metric, make_metric, save_metric, with_digest
from jaxcae.runs.params_file import save_params
from jaxcae.runs.pieces import whole
from jaxcae.runs.pretraining import pretrain
from jaxcae.runs.recipe import (
    check_curvature,
    make_loss,
    make_measure,
    make_model,
    make_optimizer,
    make_state,
)
from jaxcae.runs.remake import confirm_factory, identified
from jaxcae.runs.report import make_report
from jaxcae.training import Record, Segment, TrainState, best_record, fit
from jaxcae.types import Autoencoder, Params


class Observer:
    """What a run tells while it is at work. Derive from it to show it, or to stop it."""

    def say(self, text: str) -> None:
        """Hear where the run stands."""

    def warn(self, text: str) -> None:
        """Hear of what the user should know."""
        warnings.warn(text, stacklevel=2)

    def training(self, config: Config, completed: int) -> contextlib.AbstractContextManager[Any]:
        """Give a context for the training itself, which begins with so many epochs completed."""
        return contextlib.nullcontext()

    def segment(self, segment: Segment) -> bool:
        """Hear of some steps; return whether to save and stop here."""
        return False


class Outcome(NamedTuple):
    """What came of a call of `train`.

    Attributes:
        run_dir: Where the run is.
        config: What it is, with what the data decides filled in.
        model: Its autoencoder.
        material: Its data.
        state: The state after the last step.
        params: The result by network: of the best epoch where it watched for one, else the last.
        history: One record per epoch.
        chosen: The record of the epoch that `params` are of.
        report: The figures; None where the run was stopped before its end, and in processes other
            than the first.
    """

    run_dir: Path
    config: Config
    model: Autoencoder
    material: Material
    state: TrainState
    params: Mapping[str, Params]
    history: list[Record]
    chosen: int
    report: dict[str, Any] | None


def train(
    config: Config,
    run_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    model: str | None = None,
    fallback: bool = False,
    save_every: int | None = None,
    log_every: int = 1,
    max_bytes: int | None = None,
    samples: Any = None,
    observer: Observer | None = None,
    layout: Layout | None = None,
) -> Outcome:
    """Train, or go on training, in a run directory; the same bits come out however often it stops.

    In many processes (`jaxcae.devices.processes.start`) all call this, with the same arguments and
    a directory that all see. Process 0 writes what is in it, but for the parts of a checkpoint that
    other processes hold.

    Args:
        config: What to train. To go on with a run, its own (`read_config`), though its data may
            have moved, and a constant schedule may have more epochs.
        run_dir: Where to keep the run: a new or empty directory, or that of the run to go on with.
        resume: Go on with the run there.
        overwrite: Replace the run there; only what jaxcae wrote is.
        model: With `resume`, of a run whose model a factory makes, its PACKAGE.MODULE:FACTORY once
            more; see `open_run`.
        fallback: With `resume`, go back to an older checkpoint where the newest is damaged.
        save_every: Steps between two checkpoints; every 10 seconds unless given.
        log_every: Log every so many steps to metrics.jsonl; epochs are logged always.
        max_bytes: Refuse data that would take more memory than this; half the memory by default.
        samples: Data that is in memory, instead of what `config` names: samples in rows, a data
            frame, or a `Dataset`. To go on with such a run, the same once more.
        observer: Who hears how it goes on.
        layout: Which devices hold what; see `jaxcae.layout`. Many processes share all of theirs
            unless told. It is no part of what a run is: it may be gone on with on another one.

    Returns:
        The outcome. `open_run(run_dir)` reads it again, verified.

    Raises:
        InputError: If the configuration, its data or the directory is not usable as asked.
        CheckpointError: If a checkpoint is damaged or cannot be saved.
        DivergedError: If the loss is not finite; the last good checkpoint is kept.
    """
    config.check()
    for name, value in (("save_every", save_every), ("log_every", log_every)):
        if value is not None and value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value!r}.")
    if resume and overwrite:
        raise InputError("`resume=True` and `overwrite=True` exclude each other.")
    observer = observer or Observer()
    if resume:
        config = confirm_factory(config, model, Path(run_dir))
    if are_many():
        if config.training.pretrain:
            raise InputError(
                "`pretrain` trains layer by layer in one process. Do it there, with few `epochs`, "
                "and go on from that run with many."
            )
        layout = layout or make_layout()
    directory = _take(Path(run_dir), resume, overwrite)
    try:
        material = load_material(config, max_bytes, samples)
        config = identified(material.config)
        # A run that was killed before it had kept its metric makes it again.
        kept = resume and (directory.path / METRIC).exists()
        stored = load_metric(directory.path, directory.config) if kept else None
        if are_many() and not kept:
            check_alike(config)
        metric = make_metric(config, material, stored, max_bytes)
        config = with_digest(config, metric)
        if resume:
            _check_continuation(directory, config)
        autoencoder = make_model(config)
        check_curvature(config, autoencoder, material.held_out.shape[1])
        steps = config.training.epochs * math.ceil(material.num_train / config.training.batch_size)
        optimizer = make_optimizer(config, steps)
        _check_room(
            directory.path, jax.eval_shape(lambda: make_state(config, autoencoder, optimizer))
        )
        # Only now, with all that can be wrong checked, is an earlier run replaced.
        if not resume:
            directory.start(config)
        if metric is not None and is_first():
            save_metric(directory.path, metric)
        initial = state = _begin(lambda: make_state(config, autoencoder, optimizer), layout)
        if config.training.pretrain:
            initial = state = pretrain(directory, config, material, state, observer.say, layout)
        history: list[Record] = []
        totals: Mapping[str, float] = {}
        keeper = Keeper(directory, config, save_every=save_every, log_every=log_every)
        if resume:
            state, history, totals = _restore(keeper, state, fallback, config, directory, observer)
        if material.taken:
            observer.say(material.taken)
        observer.say(f"run directory: {directory.path}")

        stopped = False

        def after(segment: Segment) -> bool:
            nonlocal stopped
            keeper(segment)
            if any_process(bool(observer.segment(segment))):
                keeper.save(segment.state, segment.totals)
                stopped = int(segment.history[-1]["epoch"]) < config.training.epochs
                return True
            return False

        with observer.training(config, len([r for r in history if r["epoch"]])):
            state, history = fit(
                make_loss(config, autoencoder, metric),
                optimizer,
                state,
                material.train,
                epochs=config.training.epochs,
                batch_size=config.training.batch_size,
                held_out=material.held_out,
                measure=make_measure(config, autoencoder, metric),
                callback=after,
                patience=config.training.patience,
                monitor=monitored(config),
                history=history,
                totals=totals,
                pause_every=save_every,
                layout=layout,
            )
            if not stopped:
                keeper.save(state)
        # With early stopping the best epoch is the result; the last checkpoint holds the last one.
        params, chosen = state.params, len(history) - 1
        if config.training.patience is not None:
            params, chosen = state.best, best_record(history, monitored(config))
        before, params = _here(initial.params), _here(params)
        report = None
        if not stopped and is_first():
            _save_result(directory.path, config, material, params, history[chosen])
            report = make_report(config, material, autoencoder, before, params, history, chosen)
            report["run_dir"] = str(directory.path)
            directory.write_json("report.json", report)
        return Outcome(
            directory.path, config, autoencoder, material, state, params, history, chosen, report
        )
    finally:
        directory.discard()


def _take(path: Path, resume: bool, overwrite: bool) -> RunDirectory:
    """Take the directory of a run, in process 0, and follow it there, in the others."""
    directory: RunDirectory | None = None
    if is_first() and resume:
        directory = RunDirectory.open(path)
    elif is_first():
        directory = RunDirectory.create(path, overwrite=overwrite)
    agree(None)  # the others come after it
    return directory or Follower(path)


def _begin(make: Callable[[], TrainState], layout: Layout | None) -> TrainState:
    """Make a state where it is to lie; jitted: one compilation instead of one per kind of leaf."""
    if layout is None:
        return jax.jit(make)()
    return jax.jit(make, out_shardings=layout.shardings(jax.eval_shape(make)))()


def _here(params: Mapping[str, Params]) -> Mapping[str, Params]:
    """Bring parameters that devices or processes share to one, for what it does alone."""
    if not are_many():
        return gather(params)
    return jax.tree.map(lambda leaf: jnp.asarray(whole(leaf)), params)


def _restore(
    keeper: Keeper,
    initial: TrainState,
    fallback: bool,
    config: Config,
    directory: RunDirectory,
    observer: Observer,
) -> tuple[TrainState, list[Record], Mapping[str, float]]:
    if changed := _changes(directory.path):
        observer.warn(
            f"{', '.join(changed)} changed since the run began; the results will not be the same "
            "to the last bit."
        )
    restored = keeper.restore(initial, fallback=fallback)
    for step, reason in restored.damaged.items():
        observer.warn(f"checkpoint {step} is not used: {reason}")
    done = int(restored.history[-1]["epoch"]) if restored.history else 0
    epochs = config.training.epochs
    if done > epochs:
        raise RunError(
            f"{directory.path}: has done {done} epochs already, `epochs={epochs}` is less."
        )
    if restored.step is None:
        observer.say("no checkpoint yet; starting from the first step")
    elif done == epochs:
        observer.say(f"the run has done its {epochs} epochs; there is nothing left to train")
    else:
        observer.say(f"resuming at step {restored.step}")
    if directory.config != config:  # its data has moved, or it has more epochs now
        directory.write_json(CONFIG, config.to_json())
    return restored.state, restored.history, restored.totals


def _check_continuation(directory: RunDirectory, config: Config) -> None:
    """Refuse to go on with a run as another one."""
    stored = directory.config
    different = differences(stored, config)
    if not different:
        return
    before, now = stored.training.epochs, config.training.epochs
    if stored.replace(epochs=now) == config.replace(data=stored.data.source):
        raise RunError(
            f"{directory.path}: `schedule='cosine'` brings the step size to 0 over the run's "
            f"{before} epochs, so one of {now} is another run from its first step on. Begin it "
            "anew; with `schedule='constant'` a run can be given more `epochs` later."
        )
    raise RunError(
        f"{directory.path}: the run has another configuration: {'; '.join(different)}. "
        "Leave these out to go on with it, or use another `run_dir`."
    )


def _changes(path: Path) -> list[str]:
    """Name what has changed in versions or the device: the promise of equal bits ends there."""
    try:
        before, now = read_json(path / "env.json"), environment()
        changed = [key for key in now if key != "host" and before.get(key) != now[key]]
        if before["host"]["threads"] != now["host"]["threads"]:
            changed.append("threads")
    except (InputError, AttributeError, KeyError, TypeError):
        return []
    return changed


def _check_room(path: Path, state: Any) -> None:
    """Refuse to begin where the checkpoints will not fit: three are kept while a fourth is made."""
    leaves = jax.tree.leaves(
        jax.eval_shape(lambda s: s.replace(key=jax.random.key_data(s.key)), state)
    )
    check_free_space(path, 4 * sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves))


def _save_result(
    path: Path, config: Config, material: Material, params: Mapping[str, Params], record: Record
) -> None:
    prepared = material.preparation.to_json()
    for network in config.networks:
        save_params(
            params_path(path, config, network),
            params[network],
            {
                "config": config.to_json(),
                "network": network,
                "step": int(record["step"]),
                **prepared,
            },
        )
