"""What makes a run of `fit` survive: every step in the log, states to go on from, saved in time."""

import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from jaxcae.devices.processes import agree, first_does
from jaxcae.errors import CheckpointError, RunError
from jaxcae.runs.config import Config, differences
from jaxcae.runs.directory import RunDirectory
from jaxcae.runs.log import LogMark, read_metrics
from jaxcae.training import Record, Segment, TrainState

SAVE_SECONDS = 10.0
"""How long to train between two checkpoints where no number of steps is given."""


class Restored(NamedTuple):
    """Where a run goes on: what `fit` takes.

    Attributes:
        state: The state.
        history: Records of the epochs that are done.
        totals: Sums over the part of an epoch that is done.
        step: The step of the checkpoint; None where there was none and the run begins.
        damaged: Why newer checkpoints were left behind, by step.
    """

    state: TrainState
    history: list[Record]
    totals: Mapping[str, float]
    step: int | None
    damaged: Mapping[int, str]


class Keeper:
    """Log every step and save the state, as a callback of `fit`.

    Whatever is trained: the clock may pace the saves, and decides nothing else. Of many processes
    it is the clock of process 0, and all of them call this.

    Args:
        directory: The run's, started or opened.
        config: Stored with every checkpoint, and compared with it.
        save_every: Steps between two saves; every 10 seconds unless given. Pass it to `fit` as
            `pause_every`, so that it pauses there.
        log_every: Log every so many steps; epochs are logged always.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: Config,
        *,
        save_every: int | None = None,
        log_every: int = 1,
    ):
        self._directory, self._config = directory, config
        self._save_every, self._log_every = save_every, log_every
        self._started = self._saved_at = time.monotonic()
        self._saved_step = -1

    def restore(self, like: TrainState, *, fallback: bool = False) -> Restored:
        """Load the newest checkpoint that verifies, and cut the log to it.

        Args:
            like: The state before the first step, with which a run without checkpoints begins.
            fallback: Where the newest is damaged, go back to the one before, and remove what is
                damaged.

        Raises:
            CheckpointError: If a checkpoint is damaged, or with `fallback` all of them.
            RunError: If one is of another configuration.
        """
        checkpoints, damaged = self._directory.checkpoints, {}
        for step in reversed(first_does(checkpoints.steps)):
            try:
                record = checkpoints.read_record(step)
                stored = Config.from_json(record["config"], f"checkpoint {step}")
                if different := differences(stored, self._config):
                    raise RunError(
                        f"checkpoint {step} is of another configuration: {'; '.join(different)}."
                    )
                state, record = checkpoints.load(step, like)
                mark = LogMark(*record["log"])
                first_does(partial(self._directory.cut_log, mark), CheckpointError)
            except CheckpointError as error:
                if not fallback:
                    raise CheckpointError(
                        f"{error} `fallback=True` goes back to the checkpoint before."
                    ) from error
                damaged[step] = str(error)
                continue
            first_does(lambda: checkpoints.remove(*damaged))
            self._saved_step = step
            records = first_does(self._epoch_records)
            return Restored(state, records, record["totals"], step, damaged)
        if damaged:
            raise CheckpointError(
                f"{self._directory.path}: none of the checkpoints can be used; `overwrite=True` "
                "begins anew."
            )
        self._directory.cut_log(LogMark.empty())
        return Restored(like, [], {}, None, {})

    def __call__(self, segment: Segment) -> None:
        """Log what has happened since the last call, and save if it is time to."""
        self._log(segment)
        if self._save_every is None:
            due = time.monotonic() - self._saved_at > SAVE_SECONDS
        else:
            due = segment.step > 0 and segment.step % self._save_every == 0
        if agree(due):  # clocks differ
            self.save(segment.state, segment.totals)

    def save(self, state: TrainState, totals: Mapping[str, float] | None = None) -> None:
        """Save a state, with the sums over the part of an epoch that is done, unless it is saved.

        Raises:
            CheckpointError: If it cannot be saved, or is not finite.
        """
        step = int(state.step)
        if step == self._saved_step:
            return
        # The log first: what a checkpoint has seen must be on the disk when it is.
        record = {
            "config": self._config.to_json(),
            "totals": dict(totals or {}),
            "log": list(self._directory.log_mark()),
        }
        self._directory.checkpoints.save(step, state, record)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _log(self, segment: Segment) -> None:
        count = max((len(values) for values in segment.metrics.values()), default=0)
        for index in range(count):
            step = segment.step - count + index + 1
            if step % self._log_every == 0:
                metrics = {name: float(v[index]) for name, v in segment.metrics.items()}
                line = {"kind": "step", "epoch": segment.epoch, "step": step, **metrics}
                self._directory.log(line)
        if segment.history and (segment.epoch_done or segment.epoch == 0):
            seconds = round(time.monotonic() - self._started, 3)
            self._directory.log({"kind": "epoch", **segment.history[-1], "seconds": seconds})
        self._directory.flush_log()

    def _epoch_records(self) -> list[Record]:
        return [
            {name: value for name, value in line.items() if name not in ("kind", "seconds")}
            for line in read_metrics(self._directory.path)
            if line["kind"] == "epoch"
        ]
