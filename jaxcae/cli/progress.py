"""How far training has come, on stderr: a bar on a terminal, a few plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from jaxcae.cli.console import Stream, make_console
from jaxcae.cli.encoding import encodable
from jaxcae.errors import printable
from jaxcae.words import number

PLAIN_LINES = 10
"""At most this many progress lines where there is no terminal to draw a bar on."""

_METRIC_LABELS = {
    "loss": ("loss", "loss"),
    "reconstruction": ("rec", "reconstruction"),
    "contraction": ("‖J‖²", "mean ‖J‖²"),
}
"""Metric name to (label beside the bar, label in a plain line)."""

_FIELD = 7
"""Columns that a number takes beside the bar."""


class Progress:
    """Show a training run on stderr: a bar on a terminal, a few plain lines elsewhere.

    Example:
        with Progress(config.epochs, "contractive", quiet=quiet) as progress:
            fit(..., callback=lambda epoch, metrics: progress.update(epoch, metrics))

    Several runs follow one another by one `Progress` each; finished bars stay on the screen.

    Args:
        epochs: How many epochs the run will have had when it ends.
        label: What is being trained, such as `"contractive"` or `"plain"`.
        completed: Epochs already done, for a resumed run; time left counts from here.
        quiet: Show nothing at all.
        file: The stream to write to; `sys.stderr` unless told otherwise.
    """

    def __init__(
        self,
        epochs: int,
        label: str = "training",
        *,
        completed: int = 0,
        quiet: bool = False,
        file: Stream | None = None,
    ):
        self.epochs, self.label, self.quiet = epochs, printable(label), quiet
        self._file = file
        self._first = self._shown = completed
        self._pace: tuple[int, float] | None = None
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        self._started = time.monotonic()
        if self.quiet:
            return self
        self._console = make_console(self._file or sys.stderr)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # redirect_stdout would send a result printed meanwhile to stderr, with the bar.
            self._bar = RichProgress(
                *_columns(self._console, self.label, self.epochs),
                console=self._console,
                refresh_per_second=8,
                redirect_stdout=False,
            )
            self._task = self._bar.add_task(
                self.label, total=self.epochs, completed=self._first, metrics={}
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Report that `epoch` epochs are done (1 after the first) with these metrics.

        Of the metrics, `loss`, `reconstruction` and `contraction` are shown where present.
        """
        if self.quiet:
            return
        shown = {name: float(metrics[name]) for name in _METRIC_LABELS if name in metrics}
        if self._bar is not None:
            self._bar.update(self._task, completed=epoch, metrics=shown)
        elif self._is_due(epoch):
            self._shown = epoch
            # Text.plain and soft_wrap: one line per epoch whatever the width, for grep.
            self._console.print(
                Text(encodable(self._line(epoch, shown), self._console.encoding)), soft_wrap=True
            )

    def _is_due(self, epoch: int) -> bool:
        interval = max(1, math.ceil((self.epochs - self._first) / PLAIN_LINES))
        return epoch >= self.epochs or epoch - self._shown >= interval

    def _line(self, epoch: int, metrics: Mapping[str, float]) -> str:
        width = len(str(self.epochs))
        parts = [f"{self.label}: epoch {epoch:{width}d}/{self.epochs}"]
        parts += [f"{_METRIC_LABELS[name][1]} {number(v)}" for name, v in metrics.items()]
        now = time.monotonic()
        if epoch >= self.epochs:
            parts.append(_duration(now - self._started))
        elif self._pace is None:
            # The first epoch compiles; the time that it took says nothing about the others.
            self._pace = epoch, now
        else:
            seconds = (now - self._pace[1]) / max(1, epoch - self._pace[0])
            parts.append(f"{_duration(seconds * (self.epochs - epoch))} left")
        return "  ".join(parts)


class _MetricsColumn(ProgressColumn):
    """The latest metrics, each in a field of constant width so that nothing jitters."""

    def __init__(self, labels: Mapping[str, str]):
        super().__init__()
        self._labels = labels

    @property
    def width(self) -> int:
        return sum(len(label) + _FIELD + 2 for label in self._labels.values())

    def render(self, task: Task) -> Text:
        text = Text(no_wrap=True)
        for name, label in self._labels.items():
            value = number(task.fields["metrics"][name]) if name in task.fields["metrics"] else ""
            text.append(f" {label if value else ' ' * len(label)} ", style="dim")
            text.append(f"{value:>{_FIELD}}")
        return text


def _columns(console: Console, label: str, epochs: int) -> list[ProgressColumn]:
    """Fit bar and metrics to the width; a narrow terminal loses the least telling metric first."""
    counts = 2 * len(str(epochs)) + 1
    label_width = max(len(label), len("contractive"))
    for names in (list(_METRIC_LABELS), ["loss", "contraction"], ["loss"], []):
        metrics = _MetricsColumn(
            {n: encodable(_METRIC_LABELS[n][0], console.encoding) for n in names}
        )
        # Four gaps of one column, and up to 1:00:00 left.
        room = console.width - label_width - counts - metrics.width - 7 - 4
        if room >= 8:
            break
    return [
        TextColumn(f"{{task.description:<{label_width}}}", markup=False, style="bold"),
        BarColumn(bar_width=max(4, min(room, 40)), complete_style="cyan", finished_style="green"),
        TextColumn(f"{{task.completed:{len(str(epochs))}.0f}}/{{task.total:.0f}}", markup=False),
        metrics,
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    ]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
