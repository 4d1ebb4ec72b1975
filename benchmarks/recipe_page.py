"""The page of `python -m benchmarks recipe`: a table, and what its intervals carry."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.detection_page import versions

Records = Sequence[Mapping[str, Any]]
COLUMNS = {"probe": "a linear classifier on the codes", "fine": "fine-tuned"}
REFERENCE = "AE"
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 97.5 %, by the number of seeds."""


class Interval(NamedTuple):
    """A mean over seeds and half the width of its 95 % interval; NaN of one seed."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float], tested_per_trained: float) -> "Interval":
        """Compute it by Student's t, corrected for training parts that overlap.

        The variance of the mean of n seeds is taken as s²(1/n + tested/trained).

        References:
            Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 2003,
            doi:10.1023/A:1024068626366.
        """
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), float("nan"))
        spread = np.std(values, ddof=1) * np.sqrt(1 / n + tested_per_trained)
        return cls(float(np.mean(values)), float(_T[n] * spread))

    @property
    def is_zero(self) -> bool:
        """Whether 0 lies inside, or nothing is known."""
        return not abs(self.mean) > self.half

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """Write it as `mean ± half`."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if np.isnan(self.half) else f"{mean} ± {scale * self.half:.{digits}f}"


def best(records: Records, column: str) -> tuple[float, ...]:
    """Find the point of a grid whose mean validation error over the seeds is least."""
    points = dict.fromkeys(tuple(r["at"]) for r in records)
    return min(points, key=lambda p: np.mean([r[f"{column}/validation"] for r in _at(records, p)]))


def neighbours(point: tuple[float, ...], factor: float) -> list[tuple[float, ...]]:
    """List the points with one weight that is a factor higher or lower."""
    return [
        (*point[:axis], float(f"{point[axis] * scale:.6g}"), *point[axis + 1 :])
        for axis in range(len(point))
        for scale in (1 / factor, factor)
    ]


def chosen(records: Records, column: str) -> list[Mapping[str, Any]]:
    """Choose, for each seed, the network whose own validation error is least."""
    seeds = sorted({r["seed"] for r in records})
    own = [[r for r in records if r["seed"] == seed] for seed in seeds]
    return [min(rows, key=lambda r: r[f"{column}/validation"]) for rows in own]


def page(kept: Mapping[str, Any]) -> str:
    """Write the table in Markdown, and what can be said."""
    if not kept:
        return "# What contraction does for a classifier\n\nNothing has been measured.\n"
    sizes = next(iter(kept.values()))["sizes"]
    tested = sizes["digits"] // 5
    trained = sizes["digits"] - tested - sizes["validation"]
    ratio = tested / trained
    quick = " **A quick form, not to be quoted.**" if any(k["quick"] for k in kept.values()) else ""
    where = "; ".join(dict.fromkeys(versions(k["environment"]) for k in kept.values()))
    lines = [
        "# What contraction does for a classifier",
        "",
        f"By `python -m benchmarks recipe`: {where}.{quick}",
        "",
        f"Table 1 of Rifai et al. (ICML 2011) in kind: mnist5k, 784-{sizes['hidden']} sigmoid, "
        f"tied weights, cross-entropy, {sizes['epochs']} epochs on {trained:,} digits without "
        f"labels; then a softmax on the codes as they are, and the whole fine-tuned for at most "
        f"{sizes['fine_epochs']} epochs. Each of {sizes['seeds']} seeds tests on "
        f"{tested:,} digits of its own and chooses weights, the classifier's decay and the epoch "
        f"on {sizes['validation']:,} others. ± 95 % interval over the seeds, corrected for "
        "training parts that overlap. ‖J‖_F, saturated units (slope below a tenth of the largest) "
        "and cross-entropy are of the test digits, before fine-tuning, of the networks chosen for "
        "it.",
        "",
        "| encoder | linear, % wrong | fine-tuned, % wrong | mean ‖J‖_F | saturated, % | "
        "cross-entropy, nats |",
        "| --- |" + " ---: |" * 5,
    ]
    for name, measured in kept.items():
        records = measured["records"]
        cells = [
            Interval.of([r[f"{column}/test"] for r in chosen(records, column)], ratio).text(1, 100)
            for column in COLUMNS
        ]
        for field, digits, scale in (
            ("jacobian_norm", 2, 1.0),
            ("saturation", 1, 100.0),
            ("reconstruction", 1, 1.0),
        ):
            values = [r[field] for r in chosen(records, "fine")]
            cells.append(Interval.of(values, ratio).text(digits, scale))
        told = f"{name} (search unfinished)" if _open_ends(measured) else name
        lines.append(f"| {told} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "What the intervals carry (each at 95 % for itself, of differences seed by seed):",
    ]
    lines += [
        "",
        *(f"- {sentence}" for column in COLUMNS for sentence in says(kept, column, ratio)),
    ]
    lines += ["", "What was searched, and what the seeds chose (linear; fine-tuned):", ""]
    lines += [f"- {line}" for line in _grids(kept)]
    last = len(next(iter(kept.values()))["l2"]) - 1
    picked = [r["probe/option"] for k in kept.values() for r in chosen(k["records"], "probe")]
    at_ends = sum(option in (0, last) for option in picked)
    lines.append(
        f"- weight decay of the linear classifier: at an end of its grid {at_ends} times of "
        f"{len(picked)}."
    )
    return "\n".join(lines) + "\n"


def says(kept: Mapping[str, Any], column: str, ratio: float) -> list[str]:
    """Say of each method whether it errs less or more than the AE, and which err least."""
    errors = {
        name: {r["seed"]: r[f"{column}/test"] for r in chosen(measured["records"], column)}
        for name, measured in kept.items()
    }

    def difference(a: str, b: str) -> Interval:
        shared = sorted(errors[a].keys() & errors[b].keys())
        return Interval.of([errors[a][seed] - errors[b][seed] for seed in shared], ratio)

    what = COLUMNS[column]
    found = []
    if REFERENCE in errors:
        told: dict[str, list[str]] = {"less": [], "more": [], "": []}
        for name in errors:
            if name != REFERENCE:
                apart = difference(name, REFERENCE)
                side = "" if apart.is_zero else "less" if apart.mean < 0 else "more"
                told[side].append(f"{name} ({apart.text(1, 100)} points)")
        for side, names in told.items():
            if names and side:
                found.append(f"{what}: {_listed(names)} err{_s(names)} {side} than {REFERENCE}.")
            elif names:
                found.append(f"{what}: {_listed(names)} cannot be told from {REFERENCE}.")
    least = min(errors, key=lambda name: float(np.mean(list(errors[name].values()))))
    near = [name for name in errors if name != least and difference(name, least).is_zero]
    beside = f", and {_listed(near)} cannot be told from it" if near else ", less than every other"
    return [*found, f"{what}: {least} has the lowest mean error{beside}."]


def _grids(kept: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, measured in kept.items():
        records, weights = measured["records"], measured["weights"]
        if not weights:
            continue
        points = f"{' and '.join(weights)} of {_points({tuple(r['at']): 0 for r in records})}"
        picks = "; ".join(
            _points(Counter(tuple(r["at"]) for r in chosen(records, column))) for column in COLUMNS
        )
        open_ends = _open_ends(measured)
        inside = "for both, the best on average has neighbours on all sides and none better"
        told = f"the search ended before its best had neighbours on all sides, {_listed(open_ends)}"
        lines.append(f"{name}: {points}; chosen {picks}; {told if open_ends else inside}.")
    return lines


def _open_ends(measured: Mapping[str, Any]) -> list[str]:
    """Name the columns whose best point has a neighbour that was not measured."""
    records = measured["records"]
    tried = {tuple(r["at"]) for r in records}
    return [
        what
        for column, what in COLUMNS.items()
        if not tried.issuperset(neighbours(best(records, column), measured["factor"]))
    ]


def _points(counts: Mapping[tuple[float, ...], int]) -> str:
    """Write points, each with how often it occurs if it does."""
    return ", ".join(
        " and ".join(f"{v:g}" for v in point) + (f" ({count} ×)" if count else "")
        for point, count in sorted(counts.items())
    )


def _at(records: Records, point: tuple[float, ...]) -> list[Mapping[str, Any]]:
    return [r for r in records if tuple(r["at"]) == point]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _s(names: Sequence[str]) -> str:
    return "s" if len(names) == 1 else ""
