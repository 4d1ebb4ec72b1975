"""The figures to reach, each with what was measured and whether it is met.

A figure is read off the stored rows of a suite, never measured here: what the table says can be
found in the files beside it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Stored = Mapping[str, Any]
"""Name of a suite to what it stored."""


class Target(NamedTuple):
    """One figure to reach.

    Attributes:
        text: What is measured.
        suite: Where it is measured: `python -m benchmarks --only SUITE`.
        limit: The bound.
        at_least: Whether the bound is from below.
        measure: Reads the figure off the suite's rows.
    """

    text: str
    suite: str
    limit: float
    at_least: bool
    measure: Callable[["Rows"], float]

    def met(self, value: float) -> bool:
        """Tell whether a figure is within the bound; NaN is not."""
        return value >= self.limit if self.at_least else value <= self.limit


class Verdict(NamedTuple):
    """A target and what came of it; the value is None where it has not been measured."""

    target: Target
    value: float | None
    mode: str

    @property
    def word(self) -> str:
        """Say it in a word or two."""
        if self.value is None:
            return "not measured"
        return "met" if self.target.met(self.value) else "NOT MET"


class Rows:
    """The rows of a suite, by group and name."""

    def __init__(self, rows: list[dict[str, Any]]):
        """Index the rows."""
        self._rows = {(row["group"], row["name"]): row for row in rows}

    def __iter__(self) -> Any:
        """Go over the rows."""
        return iter(self._rows.values())

    def of(self, group: str, name: str) -> dict[str, Any]:
        """Find one row; KeyError if it was not measured."""
        return self._rows[group, name]

    def times(self, group: str, name: str, unit: str) -> float:
        """Divide medians of one group, which ran in turns."""
        return float(self.of(group, name)["seconds"] / self.of(group, unit)["seconds"])


SHALLOW, DEEP = "784-256-64, batch {}", "784-512-256-64, batch 1,024"
LARGE = "12288-1024-256, batch 1,024"
MIB = 2**20


def _speed_up(group: str, name: str, unit: str) -> Callable[[Rows], float]:
    return lambda rows: rows.times(group, name, unit)


def _spread_of(name: str, activation: str, rows: Rows) -> float:
    return float(rows.of(f"3 layers, {activation}", name)["errors"][0])


def _spread_ratio(activation: str) -> Callable[[Rows], float]:
    return lambda rows: (
        _spread_of("hutchinson, 1 probe", activation, rows)
        / _spread_of("control variate, 1 probe", activation, rows)
    )


def _against_best_direction(rows: Rows) -> float:
    found = []
    for name in ("reverse", "forward"):
        try:
            found.append(rows.times(DEEP, "auto", name))
        except KeyError:
            continue
    return max(found)


def _memory_saved(rows: Rows) -> float:
    small = rows.of(DEEP, "auto, a tenth of reverse's memory")["temp_bytes"]
    return float(small / rows.of(DEEP, "reverse")["temp_bytes"])


def _per_sample_change(rows: Rows) -> float:
    """Find the largest relative change of the exact penalty's operations along d and along k."""
    worst = 0.0
    for axis in ("d", "k"):
        counts = [
            row["facts"]["per_sample_flops"]
            for row in rows
            if row["name"] == "auto" and row["facts"]["axis"] == axis
        ]
        worst = max(worst, max(counts) / min(counts) - 1)
    return worst


def _slowest_foreign(group: str) -> Callable[[Rows], float]:
    names = ("Flax NNX", "Flax Linen", "Equinox")
    return lambda rows: max(rows.times(group, name, "built-in") for name in names)


def _most_foreign_flops(rows: Rows) -> float:
    return float(
        max(
            row["flops"] / rows.of(row["group"], "built-in")["flops"]
            for row in rows
            if row["name"] in ("Flax NNX", "Flax Linen", "Equinox")
        )
    )


_128, _1024, _32 = SHALLOW.format("128"), SHALLOW.format("1,024"), SHALLOW.format("32")

TARGETS = (
    Target("exact step over plain step, 784-256-64, batch 128", "steps", 2.0, False,
           _speed_up(_128, "auto", "plain")),
    Target("exact step over plain step, 784-256-64, batch 1,024", "steps", 1.25, False,
           _speed_up(_1024, "auto", "plain")),
    Target("times faster than reverse, batch 128", "steps", 25, True,
           _speed_up(_128, "reverse", "auto")),
    Target("times faster than forward, batch 128", "steps", 120, True,
           _speed_up(_128, "forward", "auto")),
    Target("times faster than PyTorch's vmap(jacrev), batch 128", "side_by_side", 20, True,
           _speed_up(_128, "torch vmap(jacrev)", "jaxcae auto")),
    Target("times faster than PyTorch's autograd.functional.jacobian, batch 32", "side_by_side",
           300, True, _speed_up(_32, "torch autograd.functional.jacobian", "jaxcae auto")),
    Target("exact step over PyTorch's single random projection, batch 128", "side_by_side", 1.0,
           False, _speed_up(_128, "jaxcae auto", "torch one projection")),
    Target("change of per-sample operations with d or k, two layers", "scaling", 1e-4, False,
           _per_sample_change),
    Target("MiB of temporaries, 12288-1024-256, batch 1,024, exact", "steps", 512, False,
           lambda rows: float(rows.of(LARGE, "auto")["temp_bytes"] / MIB)),
    Target("exact over the best of forward and reverse, 784-512-256-64", "steps", 1.0, False,
           _against_best_direction),
    Target("memory of reverse that exact takes on a budget, 784-512-256-64", "steps", 0.1, False,
           _memory_saved),
    Target("low-noise estimator's step over the exact step, 784-512-256-64", "steps", 0.1, False,
           _speed_up(DEEP, "control_variate", "auto")),
    Target("spread of one plain probe over the low-noise estimator's, softplus", "estimators", 20,
           True, _spread_ratio("softplus")),
    Target("spread of one plain probe over the low-noise estimator's, ReLU", "estimators", 3, True,
           _spread_ratio("relu")),
    Target("operations of a foreign encoder's step over the built-in's", "foreign", 1.0001, False,
           _most_foreign_flops),
    Target("slowest foreign encoder's step over the built-in's, batch 128", "foreign", 1.1, False,
           _slowest_foreign(_128)),
    Target("slowest foreign encoder's step over the built-in's, batch 1,024", "foreign", 1.1,
           False, _slowest_foreign(_1024)),
)  # fmt: skip


def judge(stored: Stored) -> list[Verdict]:
    """Read every figure off what has been stored."""
    verdicts = []
    for target in TARGETS:
        suite = stored.get(target.suite)
        try:
            value = target.measure(Rows(suite["rows"])) if suite else None
        except (KeyError, ValueError):  # a part of the suite that has not been measured
            value = None
        verdicts.append(Verdict(target, value, suite["environment"]["mode"] if suite else ""))
    return verdicts
