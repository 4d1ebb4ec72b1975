"""What a person reads: one Markdown page of targets, notes and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import architectures
from benchmarks.targets import Verdict, judge
from jaxcae.timing import Ratio
from jaxcae.words import short

_MIB = 2**20


def page(stored: Mapping[str, Any]) -> str:
    """Write the whole page, from what is stored."""
    parts = ["# What the exact penalty costs", *_summary(stored)]
    for name, suite in stored.items():
        parts += [f"## {suite['title']}", _provenance(name, suite)]
        parts += [f"- {note}" for note in suite["notes"]]
        if name == "estimators":
            parts.append("![spread against cost](estimators.png)")
        if name == "steps":
            parts.append("![cost by method](steps.png)")
        if name == "side_by_side":
            parts.append("![cost by method and framework](side_by_side.png)")
        if name == "architectures":
            lines = architectures.table(suite["rows"])
            parts.append(markdown(lines, right=range(2, len(lines[0]))))
        for group in dict.fromkeys(row["group"] for row in suite["rows"]):
            rows = [row for row in suite["rows"] if row["group"] == group]
            parts += [f"### {group}", _table(rows)]
    return "\n\n".join(_join_items(parts)) + "\n"


def targets_table(stored: Mapping[str, Any]) -> str:
    """Write the figures to reach as a Markdown table."""
    rows = [["figure", "target", "measured", "95 %", "", "suite"]]
    for verdict in judge(stored):
        target = verdict.target
        sign = "≥" if target.at_least else "≤"
        limit = f"{sign} {short(target.limit)}"
        suite = f"{target.suite} ({verdict.mode})" if verdict.mode else target.suite
        rows.append([target.text, limit, *_value(verdict), verdict.word, suite])
    return markdown(rows, right=(1, 2, 3))


def _value(verdict: Verdict) -> tuple[str, str]:
    if verdict.value is None:
        return "–", "–"
    if isinstance(verdict.measured, Ratio):
        low, high = map(short, verdict.measured[1:])
        return short(verdict.value), f"{low} – {high}"
    return short(verdict.value), "–"


def _summary(stored: Mapping[str, Any]) -> list[str]:
    verdicts = judge(stored)
    met = sum(verdict.word == "met" for verdict in verdicts)
    measured = sum(verdict.value is not None for verdict in verdicts)
    return [
        "Written by `python -m benchmarks`. Times are medians of turns taken in rotation; nothing "
        "is timed before its values and gradients agree with reverse mode.",
        "## The figures to reach",
        f"{met} of {measured} measured figures are met ({len(verdicts)} in all).",
        targets_table(stored),
    ]


def _provenance(name: str, suite: Mapping[str, Any]) -> str:
    at = suite["environment"]
    versions, device, host = at["versions"], at["device"], at["host"]
    torch = f", torch {versions['torch']}" if versions.get("torch") else ""
    return (
        f"`python -m benchmarks{' --full' if at['mode'] == 'full' else ''} --only {name}`, "
        f"{at['date'][:10]}: {device['platform']} ({host.get('processor') or device['kind']}), "
        f"{host['threads']} threads, jax {versions['jax']}{torch}, Python {versions['python']}; "
        f"products of matrices reach {at['matmul_peak'] / 1e9:,.0f} GFLOP/s"
        f"{_load(host.get('load'))}."
    )


def _load(load: float | None) -> str:
    return "" if load is None else f"; load before the start {load:.1f}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the columns that these rows have."""
    columns: dict[str, Any] = {
        "ms": lambda r: short(1e3 * r["seconds"]),
        "quartiles": lambda r: " – ".join(short(1e3 * q) for q in r["quartiles"]),
        "× unit": lambda r: short(r["times_unit"][0]),
        "95 %": lambda r: " – ".join(short(v) for v in r["times_unit"][1:]),
        "compile s": lambda r: f"{r['compile_seconds']:.2f}",
        "GFLOP": lambda r: short(r["flops"] / 1e9),
        "of peak": lambda r: f"{100 * r['share_of_peak']:.0f} %",
        "temp MiB": lambda r: short(r["temp_bytes"] / _MIB),
        "error, value": lambda r: _error(r, 0),
        "error, gradient": lambda r: _error(r, 1),
        "note": lambda r: r["note"],
    }
    for key in dict.fromkeys(key for row in rows for key in row.get("facts", {})):
        if key not in ("axis", "value"):
            columns[_words(key)] = lambda r, key=key: _fact(key, r["facts"][key])
    cells = {title: [_cell(make, row) for row in rows] for title, make in columns.items()}
    kept = {title: found for title, found in cells.items() if any(found)}
    body = [
        [row["name"], *(found[i] or "–" for found in kept.values())] for i, row in enumerate(rows)
    ]
    return markdown([["", *kept], *body], right=range(1, 1 + len(kept)))


def _cell(make: Any, row: Mapping[str, Any]) -> str:
    try:
        return str(make(row))
    except KeyError:
        return ""


def _error(row: Mapping[str, Any], index: int) -> str:
    text = f"{row['errors'][index]:.1e}"
    return f"{text} (spread)" if row.get("check") == "unbiased" else text


def _words(key: str) -> str:
    return key.replace("_bytes", " MiB").replace("_seconds", " s").replace("_", " ")


def _fact(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return short(value / _MIB)
    return short(value) if isinstance(value, int | float) else " – ".join(map(short, value))


def markdown(rows: Sequence[Sequence[str]], right: Any = ()) -> str:
    """Lay out a Markdown table, aligned to the eye as well; the first row is the head."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + ":" if i in right else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def _join_items(parts: Sequence[str]) -> list[str]:
    """Keep the items of a list on neighbouring lines."""
    joined: list[str] = []
    for part in parts:
        if part.startswith("- ") and joined and joined[-1].startswith("- "):
            joined[-1] += "\n" + part
        else:
            joined.append(part)
    return joined
