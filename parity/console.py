"""What a person sees: progress on stderr where it is a terminal, results on stdout."""

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from jaxcae.errors import printable
from parity import report
from parity.compare import Row
from parity.files import Converted

if TYPE_CHECKING:
    from parity.cost import Cost
    from parity.museum.exhibit import Visit


class Progress:
    """A bar with the name of the job at hand; nothing where stderr is not a terminal."""

    def __init__(self, total: int | None) -> None:
        """Prepare a bar of `total` jobs, or a spinner if their number is not known."""
        self._bar = Bar(
            TextColumn("{task.description:<44}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=total)
        self._begun = False

    def begin(self, name: str) -> None:
        """Say which job begins; the one before it is done."""
        self._bar.update(self._task, description=name, advance=int(self._begun))
        self._begun = True

    def __enter__(self) -> "Progress":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        self._bar.stop()


def print_report(rows: Sequence[Row], about: dict[str, Any], out: Path) -> None:
    """Print the worst error of every quantity, the drift of training, and any breach."""
    console = make_console()
    versions = about["versions"]
    console.print(
        f"jaxcae {versions['jaxcae']}, JAX {versions['jax']} on {about['jax_device']}; "
        f"PyTorch {versions['torch']} on {about['torch_device']}; "
        "highest matrix-product precision, no TF32\n"
    )
    for name, lines in groupby(report.summarise(rows), key=lambda line: line.section):
        table = Table(
            title=name, title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        for column in ("quantity", "dtype", "measure"):
            table.add_column(column)
        for column in ("worst error", "in ε", "bound", "of bound"):
            table.add_column(column, justify="right")
        table.add_column("where", style="dim", overflow="fold")
        for line in lines:
            worst = line.worst
            table.add_row(
                report.quantity_of(line.entry).replace("[", r"\["),
                worst.dtype,
                worst.measure,
                f"{worst.error:.1e}",
                f"{worst.epsilons:.1f}",
                f"{worst.bound:.0e}",
                f"{report.severity(worst):.1%}",
                report.where(worst),
                style="bold red" if line.breaches else None,
            )
        console.print(table, "")
    if tracks := report.drift_table(rows):
        table = Table(
            title="drift, relative to the distance travelled, after step",
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
        )
        table.add_column("run")
        for step in report.SHOWN_STEPS:
            table.add_column(str(step), justify="right")
        for name, cells in tracks:
            table.add_row(name, *cells)
        console.print(table, "")
    breaches = [row for row in rows if not row.ok]
    for row in sorted(breaches, key=report.severity, reverse=True)[:20]:
        console.print(f"breach: {report.describe(row)}", style="red", markup=False)
    if len(breaches) > 20:
        console.print(f"… and {len(breaches) - 20} more in {out / 'report.json'}")
    console.print(report.verdict(rows), style="bold red" if breaches else "bold green")
    console.print(f"{about['seconds']:.0f} s; {out / 'report.md'}, {out / 'report.json'}")


def print_conversion(done: Converted, source: Path, target: Path) -> None:
    """Print every tensor beside what it became, what was proved, and the model that takes them."""
    table = Table(box=None, pad_edge=False)
    for column in ("PyTorch", "shape", "jaxcae", "shape", "dtype", ""):
        table.add_column(column, overflow="fold")
    for pair in done.pairs:
        theirs = (printable(pair.torch), shape_of(pair.torch_shape)) if pair.torch else ("none", "")
        ours = (printable(pair.jax), shape_of(pair.jax_shape))
        table.add_row(*map(escape, (*theirs, *ours, pair.dtype, printable(pair.note))))
    console = make_console()
    console.print(table)
    bits = "converted back and equal bit for bit"
    if done.folded:
        bits = f"BatchNorm folded, with eps {done.eps:g}; what is stored, {bits}"
    where = f"{printable(source)} -> {printable(target)} ({done.to}): {bits}"
    if isinstance(done.compared, str):
        proof = f"no outputs were compared: {done.compared}"
    else:
        exact, stored, how, _ = done.compared
        proof = f"codes and reconstructions agree to {exact:.0e} in float64 {how}".rstrip()
        if stored > 10 * exact:
            proof += f"; to {stored:.0e} as they are stored"
    console.print(f"{where}; {proof}", markup=False, soft_wrap=True)
    if not isinstance(done.compared, str):
        console.print(f"for {done.compared.model}", markup=False, soft_wrap=True)


def shape_of(shape: tuple[int, ...]) -> str:
    """Write a shape as people do."""
    return "×".join(map(str, shape)) or "scalar"


def print_museum(seen: "Visit", out: Path) -> None:
    """Print every exhibit, and where training with it led."""
    from parity.museum import tell

    table = Table(show_lines=True, pad_edge=False, title_justify="left", title_style="bold")
    table.title = f"{tell.SETTING}, {seen.steps} steps"
    table.add_column("recipe", style="bold", ratio=3, overflow="fold")
    table.add_column("what is wrong, measured", ratio=6, overflow="fold")
    table.add_column("value ÷ truth", justify="right", ratio=1)
    table.add_column("gradient cosine", justify="right", ratio=1)
    table.add_column("trained with it", ratio=2, overflow="fold")
    table.add_column("the right way", style="green", ratio=3, overflow="fold")
    for exhibit in seen.exhibits:
        table.add_row(
            f"{exhibit.name}\n({exhibit.found})".replace("[", r"\["),
            exhibit.wrong.replace("[", r"\["),
            tell.ratio_of(exhibit),
            tell.cosine_of(exhibit),
            tell.trained(exhibit, seen),
            exhibit.right.replace("[", r"\["),
        )
    console = make_console()
    console.print(table)
    console.print(f"{out / 'museum.md'}; museum.json, museum.png, museum-curvature.png beside it")


def print_cost(costs: "Sequence[Cost]") -> None:
    """Print the cost of a step by variant, and relative to the same framework's plain one."""
    table = Table(box=None, pad_edge=False)
    table.add_column("training step, 784-256-64, batch 128")
    for column in ("ms", "× plain", "first step, ms"):
        table.add_column(column, justify="right")
    for name, first, fastest, times_plain in costs:
        table.add_row(name, f"{fastest:.2f}", f"{times_plain:.2f}", f"{first:.0f}")
    make_console().print(table)


def make_console() -> Console:
    """Print in the terminal's width, and in 160 columns to a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=False)
