"""The figures to reach, each with what was measured and whether it is met.

A figure is read off the stored rows of a suite, never measured here: what the table says can be
found in the files beside it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.estimators import CONTROL_VARIATE, PROBE
from jaxcae.timing import Ratio, Timing, ratio

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
    measure: Callable[["Rows"], "float | Ratio"]

    def met(self, value: float) -> bool:
        """Tell whether a figure is within the bound; NaN is not."""
        return value >= self.limit if self.at_least else value <= self.limit


class Verdict(NamedTuple):
    """A target and what came of it.

    Attributes:
        target: What was to be reached.
        measured: The figure, with its interval where it is one of time; None if not measured.
        mode: `"quick"` or `"full"`.
    """

    target: Target
    measured: float | Ratio | None
    mode: str

    @property
    def value(self) -> float | None:
        """The figure alone."""
        return self.measured.value if isinstance(self.measured, Ratio) else self.measured

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

    def times(self, group: str, name: str, unit: str) -> Ratio:
        """Divide medians of one group, over the rounds that both took a turn in."""
        return ratio(self._timing(group, name), self._timing(group, unit))

    def _timing(self, group: str, name: str) -> Timing:
        turns = self.of(group, name)["turns"]
        return Timing({int(index): seconds for index, seconds in turns.items()})


SHALLOW, DEEP = "784-256-64, batch {}", "784-512-256-64, batch 1,024"
CONVOLUTIONAL = "28×28, convolutions of 16 and 32 features, code 64, batch 128"
LARGE = "12288-1024-256, batch 1,024"
MIB = 2**20


def _times(group: str, name: str, unit: str) -> Callable[[Rows], Ratio]:
    return lambda rows: rows.times(group, name, unit)


def _spread_of(name: str, activation: str, rows: Rows) -> float:
    return float(rows.of(f"3 layers, {activation}", name)["errors"][0])


def _spread_ratio(activation: str) -> Callable[[Rows], float]:
    return lambda rows: (
        _spread_of(PROBE, activation, rows) / _spread_of(CONTROL_VARIATE, activation, rows)
    )


def _share_of_exact(rows: Rows) -> Ratio:
    row = rows.of("3 layers, softplus", CONTROL_VARIATE)
    return Ratio(*row["facts"]["share_of_exact"])


def _against_best_direction(rows: Rows) -> Ratio:
    found = []
    for name in ("reverse", "forward"):
        try:
            found.append(rows.times(DEEP, "auto", name))
        except KeyError:
            continue
    return max(found, key=lambda one: one.value)


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


def _slowest_foreign(group: str) -> Callable[[Rows], Ratio]:
    names = ("Flax NNX", "Flax Linen", "Equinox")
    return lambda rows: max(
        (rows.times(group, name, "built-in") for name in names), key=lambda one: one.value
    )


def _most_foreign_flops(rows: Rows) -> float:
    return float(
        max(
            row["flops"] / rows.of(row["group"], "built-in")["flops"]
            for row in rows
            if row["name"] in ("Flax NNX", "Flax Linen", "Equinox")
        )
    )


def _low_noise_convolutions(rows: Rows) -> float:
    (row,) = (r for r in rows if r["group"].startswith("conv:") and r["name"] == "control_variate")
    return float(row["flops"] / rows.of(row["group"], "plain")["flops"])


_EXPLICIT = SHALLOW.format("128") + ", explicit Jacobians"
_EXPLICIT_1024 = SHALLOW.format("1,024") + ", explicit Jacobians"
_128, _1024, _32 = SHALLOW.format("128"), SHALLOW.format("1,024"), SHALLOW.format("32")

TARGETS = (
    Target("exact step over plain step, 784-256-64, batch 128", "steps", 2.0, False,
           _times(_128, "auto", "plain")),
    Target("exact step over plain step, 784-256-64, batch 1,024", "steps", 1.25, False,
           _times(_1024, "auto", "plain")),
    Target("times faster than reverse, batch 128", "steps", 25, True,
           _times(_EXPLICIT, "reverse", "auto")),
    Target("times faster than reverse, batch 1,024", "steps", 25, True,
           _times(_EXPLICIT_1024, "reverse", "auto")),
    Target("times faster than forward, all features at once, batch 1,024", "steps", 120, True,
           _times(_EXPLICIT_1024, "forward", "auto")),
    Target("times faster than PyTorch's vmap(jacrev), batch 128", "side_by_side", 20, True,
           _times(_EXPLICIT, "torch vmap(jacrev)", "jaxcae auto")),
    Target("times faster than PyTorch's vmap(jacrev), two convolutions, batch 128", "side_by_side",
           1, True, _times(CONVOLUTIONAL, "torch vmap(jacrev)", "jaxcae auto")),
    Target("times faster than PyTorch's autograd.functional.jacobian, batch 32", "side_by_side",
           300, True, _times(_32, "torch autograd.functional.jacobian", "jaxcae auto")),
    Target("exact step over PyTorch's single random projection, batch 128", "side_by_side", 1.0,
           False, _times(_128, "jaxcae auto", "torch one projection")),
    Target("change of per-sample operations with d or k, two layers", "scaling", 1e-4, False,
           _per_sample_change),
    Target("MiB of temporaries, 12288-1024-256, batch 1,024, exact", "steps", 512, False,
           lambda rows: float(rows.of(LARGE, "auto")["temp_bytes"] / MIB)),
    Target("exact over the best of forward and reverse, 784-512-256-64", "steps", 1.0, False,
           _against_best_direction),
    Target("memory of reverse that exact takes on a budget, 784-512-256-64", "steps", 0.1, False,
           _memory_saved),
    Target("low-noise estimator's step over the exact step, 784-512-256-64", "steps", 0.1, False,
           _times(DEEP, "control_variate", "auto")),
    Target("the same, penalty and gradient alone, trained network", "estimators", 0.1, False,
           _share_of_exact),
    Target("spread of one plain probe over the low-noise estimator's, softplus", "estimators", 20,
           True, _spread_ratio("softplus")),
    Target("spread of one plain probe over the low-noise estimator's, ReLU", "estimators", 3, True,
           _spread_ratio("relu")),
    Target("operations of the low-noise estimator's step over the plain step, convolutions",
           "architectures", 3.5, False, _low_noise_convolutions),
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
