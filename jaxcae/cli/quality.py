"""The table of detectors against labels, of `jaxcae train` and `jaxcae evaluate`."""

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxcae.cli.tables import Layout


def quality_table(comparison: Mapping[str, Any], headline: str, note: str = "") -> RenderableType:
    """Lay out what `jaxcae.results.detection.comparison.compare` found.

    Args:
        comparison: That.
        headline: What the rows are.
        note: What to say below, before the rule and buffer of VUS-PR.
    """
    figures, vus = comparison["detectors"], comparison["vus"]
    events, rows = comparison["events"], comparison["rows"]
    told = f"{headline} · {rows:,} rows, {comparison['anomalous_rows']:,} of them anomalous in "
    told += f"{events:,} event{'s' * (events != 1)}"
    alarms = any(entry["events_found"] is not None for entry in figures.values())

    def build(say: Callable[[object], str], _: int) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        table.add_column(say("scores by"))
        heads = ["ROC-AUC", "AP", *(["VUS-PR"] if vus else [])]
        heads += ["events found", "false / 1,000"] if alarms else []
        for head in heads:
            table.add_column(say(head), justify="right")
        for name, entry in figures.items():
            cells = [f"{entry[key]:.3f}" for key in ("roc_auc", "average_precision")]
            cells += [f"{entry['vus_pr']:.3f}"] if vus else []
            if alarms:
                found, rate = entry["events_found"], entry["false_alarms_per_1000"]
                cells += ["–" if found is None else f"{found:,} of {events:,}"]
                cells += ["–" if rate is None else f"{rate:.1f}"]
            table.add_row(say(name), *map(say, cells))
        parts: list[RenderableType] = [Text(say(told), style="bold"), Text(), table]
        notes = [note] if note else []
        if vus:
            notes.append(f"VUS-PR by {vus['rule']}'s rule, buffer {vus['buffer']:,} rows.")
        if alarms:
            notes.append(
                "False: alarms for 1,000 normal rows, those within a window of an event included."
            )
        if comparison["uncovered_rows"]:
            left_out = comparison["uncovered_rows"]
            notes.append(f"Left out: {left_out:,} row{'s' * (left_out != 1)} without a score.")
        if notes:
            parts += [Text(), Text(say(" ".join(notes)), style="dim")]
        return Group(*parts)

    return Layout(build)
