"""Tables for stdout, laid out from figures; nothing is computed here but differences.

The report of `jaxcae train` that `result_table` reads is a plain dict, JSON as it stands:

    {
      "data": "mnist5k",                 # name or path of the data
      "held_out_samples": 1000,          # how many samples the figures below are means over
      "epochs": 30,
      "best_epoch": null,                # with early stopping, the epoch that "after" is of
      "contraction": 0.1,                # λ
      "reconstruction": "squared_error", # or "bernoulli"; the name of the loss
      "features": "sum",                 # or "mean": how the loss reduces over features
      "networks": {
        "contractive": {"before": FIGURES, "after": FIGURES},
        "plain":       {"before": FIGURES, "after": FIGURES},   # either of the two may be absent
      },
    }
    FIGURES = {
      "reconstruction": …,        # mean over held-out samples of rec(x, x̂)
      "jacobian_norm": …,         # mean of ‖J‖_F   (the mean of roots, not the root of the mean)
      "jacobian_norm_squared": …, # mean of ‖J‖²_F
      "metric_norm_squared": …,   # optional: mean of ‖J Fᵀ‖²_F, where the run has a metric F
      "curvature": …,             # optional: mean of ‖∇²h‖²_F, where it was asked for
      "relative_jacobian_norm": …, # optional: mean ‖J‖_F · (spread of x) / (spread of codes), which
                                  # does not change when an encoder merely scales its codes
    }

Other keys are ignored, so the report may hold more than the table shows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxcae.cli.encoding import encodable
from jaxcae.errors import printable
from jaxcae.words import change, number, numbers

_NARROW = 70
"""Columns below which a table of networks is laid out one below the other."""

_ROWS = {
    "reconstruction": "",  # named by `_reconstruction_label`
    "jacobian_norm": "mean ‖J‖_F",
    "jacobian_norm_squared": "mean ‖J‖²_F",
    "metric_norm_squared": "mean ‖J Fᵀ‖²_F",
    "curvature": "mean ‖∇²h‖²_F",
    "relative_jacobian_norm": "‖J‖_F / code scale",
}


class Layout:
    """A renderable that is laid out once the stream is known: its encoding decides widths."""

    def __init__(self, build: Callable[[Callable[[object], str], int], RenderableType]):
        self._build = build

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield self._build(
            lambda text: encodable(printable(text), console.encoding), options.max_width
        )


def result_table(report: Mapping[str, Any]) -> RenderableType:
    """Lay out what training did: the networks side by side, and a sentence that says it.

    Args:
        report: The dict that the head of this module describes.

    Returns:
        A renderable for `print_result`, or any rich console.

    Raises:
        ValueError: If the report holds no network.
    """
    networks = report["networks"]
    contractive, plain = networks.get("contractive"), networks.get("plain")
    some = contractive or plain
    if some is None:
        raise ValueError("a report needs a contractive or a plain network, got neither.")
    columns = {"untrained": some["before"]}
    columns |= {"plain": plain["after"]} if plain else {}
    columns |= {"contractive": contractive["after"]} if contractive else {}
    rows = {
        label or _reconstruction_label(report): [figures[key] for figures in columns.values()]
        for key, label in _ROWS.items()
        if all(key in figures for figures in columns.values())
    }
    return comparison_table(
        _headline(report),
        "mean over held-out samples",
        list(columns),
        rows,
        _finding(report, columns),
        reference="plain" if plain and contractive else "untrained",
    )


def _reconstruction_label(report: Mapping[str, Any]) -> str:
    if report.get("features") == "mean":
        return "reconstruction per feature"
    name = report.get("reconstruction", "error")
    units = {"squared_error": "‖x − x\u0302‖²", "bernoulli": "(nats)"}
    return f"reconstruction {units.get(name, f'({name})')}"


def _headline(report: Mapping[str, Any]) -> str:
    samples, epochs = report["held_out_samples"], report["epochs"]
    facts = [report["data"], f"{samples:,} held-out samples"]
    ran = f"{epochs:,} epoch{'s' * (epochs != 1)}"
    best = report.get("best_epoch")
    facts.append(ran if best is None else f"epoch {best:,}, the best of {ran}")
    if report["networks"].get("contractive"):
        facts.append(f"λ = {report['contraction']:g}")
        facts += [f"γ = {report['curvature']:g}"] if report.get("curvature") else []
        facts += [f"F = {report['input_metric']}"] if report.get("input_metric") else []
    return " · ".join(facts)


def _finding(report: Mapping[str, Any], columns: Mapping[str, Mapping[str, float]]) -> str:
    """Say in a sentence what contraction did to ‖J‖_F, and what that cost."""
    if "plain" in columns and "contractive" in columns:
        start, end = columns["plain"], columns["contractive"]
        subject, against = f"contraction (λ = {report['contraction']:g})", "a plain autoencoder"
    else:
        start, *_, end = columns.values()
        subject, against = "training", "the untrained network"
    norm = _moved("mean ‖J‖_F", "cut", start["jacobian_norm"], end["jacobian_norm"])
    cost = _moved(
        "the reconstruction error", "lowered", start["reconstruction"], end["reconstruction"]
    )
    return f"Against {against}, {subject} {norm} and {cost}, on held-out data."


def _moved(what: str, down: str, before: float, after: float) -> str:
    percent = change(before, after)
    if percent in ("–", "0.0%"):
        return f"left {what} at {number(after)}"
    first, second = numbers([before, after])
    verb = down if after < before else "raised"
    return f"{verb} {what} by {percent.lstrip('+−')} ({first} → {second})"


def comparison_table(
    headline: str,
    heading: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    finding: str,
    *,
    reference: str | None = None,
) -> RenderableType:
    """Lay out figures of several networks side by side, between a headline and a sentence.

    Args:
        headline: What the figures are of.
        heading: What the rows are.
        columns: Names of the networks; the last is the one that the table is about.
        rows: Name of a figure to its value for each network.
        finding: The sentence below.
        reference: The network that a further column compares the last one with, in percent.
    """
    cells = {name: numbers(values) for name, values in rows.items()}
    changes = {
        name: change(values[columns.index(reference)], values[-1]) if reference else ""
        for name, values in rows.items()
    }

    def build(say: Callable[[object], str], width: int) -> RenderableType:
        comparison = f"against {reference}" if reference else ""
        body: RenderableType
        if width < _NARROW:
            stack = _stacked(say, columns, cells, changes, comparison)
            body = Group(Text(say(heading), style="dim"), stack)
        else:
            body = table = _table(heading, columns, comparison)
            for name, values in cells.items():
                table.add_row(*map(say, [name, *values, *[changes[name]] * bool(reference)]))
        title = Text(say(headline), style="bold")
        return Group(title, Text(), body, Text(), Text(say(finding)))

    return Layout(build)


def _stacked(
    say: Callable[[object], str],
    columns: Sequence[str],
    cells: Mapping[str, Sequence[str]],
    changes: Mapping[str, str],
    comparison: str,
) -> Table:
    """Lay out the figures one below the other, where there is no room side by side."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for name, values in cells.items():
        table.add_row(Text(say(name), style="bold"))
        for column, value in zip(columns, values, strict=True):
            table.add_row(say(f"  {column}"), say(value))
        if comparison:
            table.add_row(say(f"  {comparison}"), say(changes[name]))
    return table


def _table(heading: str, columns: Sequence[str], comparison: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column(heading)
    for name in columns:
        table.add_column(name, justify="right", style="cyan" if name == "contractive" else "")
    if comparison:
        table.add_column(comparison, justify="right", style="bold")
    return table


def info_table(sections: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Lay out facts as names and values under headings, for `jaxcae info`.

    Args:
        sections: Heading to facts, such as `{"model": {"sizes": (784, 256, 64)}, …}`. Values may
            be numbers, strings, booleans, None, or sequences of these.
    """

    def build(say: Callable[[object], str], _: int) -> RenderableType:
        width = max((len(say(name)) for facts in sections.values() for name in facts), default=0)
        parts: list[RenderableType] = []
        for heading, facts in sections.items():
            table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
            table.add_column(style="dim", min_width=width, no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in facts.items():
                table.add_row(Text(say(name)), Text(say(_fact(value))))
            parts += [Text(), Text(say(heading), style="bold"), table]
        return Group(*parts[1:])

    return Layout(build)


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return ", ".join(_fact(item) for item in value)
    return printable(value)
