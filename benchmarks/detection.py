"""`python -m benchmarks detection`: how well anomalies are found, on labelled data from wheels.

Quality, not time: it may run on a busy machine. Each network is trained with three seeds and six
weights of contraction, and its scores stand beside those of simpler detectors with the same
bookkeeping. Rows are evaluated that nothing was trained or calibrated on.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcae.data import load
from jaxcae.data.windows import to_timestamps, window_starts
from jaxcae.errors import InputError
from jaxcae.files import write_atomic, write_json
from jaxcae.results.detection.baselines import baselines
from jaxcae.results.detection.calibration import Calibration
from jaxcae.results.detection.metrics import quality
from jaxcae.results.detection.neighbours import Neighbours
from jaxcae.results.detection.recipe import Recipe, clipped, train
from jaxcae.results.detection.scoring import Scorer, combined
from jaxcae.runs import Config, environment
from jaxcae.runs.windowed import load_parts, windows_of

LAMBDAS = (None, 0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = (0, 1, 2)
_STEPS = 1000


class Subject(NamedTuple):
    """A labelled series as it is detected in: its windows, and the buffer of VUS-PR."""

    name: str
    windows: tuple[int, ...]
    buffer: int
    note: str


SERIES = (
    Subject("mitdb", (128, 64, 96, 160, 200, 256), 100, "electrocardiogram, one event of 352"),
    Subject("ucr135", (100,), 100, "arterial pressure, one event of 12"),
    Subject("uniDS", (48,), 24, "hourly, 3 events of 3"),
    Subject("yahoo", (24,), 12, "7 events of one point"),
    Subject("ecg3", (100,), 100, "synthetic, 3 events of 100"),
)
"""All of them were looked at while the scores were designed."""
_OTHERS = (3.0,)
"""Weights at windows other than a series' first."""


def main(argv: list[str] | None = None) -> int:
    """Measure, store, and write the page and the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks detection", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one seed, two weights, few steps")
    parser.add_argument("--only", action="append", metavar="SET", help="one set; may repeat")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--render", action="store_true", help="measure nothing: page and picture")
    options = parser.parse_args(argv)
    known = {**{s.name: s for s in SERIES}, "shuttle": None, "mnist5k": None}
    for name in options.only or ():
        if name not in known:
            parser.error(f"unknown set {name!r}; choose from {', '.join(known)}")
    from benchmarks import detection_page

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "detection.json"
    kept = detection_page.read(file)
    started = time.monotonic()
    for name in () if options.render else options.only or tuple(known):
        print(f"{time.monotonic() - started:6.0f} s  {name}", file=sys.stderr, flush=True)
        subject = known[name]
        try:
            records = list(
                _series(subject, options.quick) if subject else _ROWS[name](options.quick)
            )
        except InputError as error:
            print(f"benchmarks: {name}: not measured: {error}", file=sys.stderr)
            continue
        kept[name] = {"environment": environment(), "quick": options.quick, "records": records}
        write_json(file, kept)
    write_atomic(options.out / "detection.md", detection_page.page(kept).encode())
    detection_page.draw(kept, options.out)
    print(detection_page.page(kept))
    return 0


def _series(subject: Subject, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure a series at its windows."""
    for at, size in enumerate(subject.windows[:1] if quick else subject.windows):
        config = Config.of(data=subject.name, window=size, missing="drop")
        parts = load_parts(config)
        labels, x = parts.series.anomalous, parts.values
        assert labels is not None
        whole = parts.series.segments(~np.isnan(x).any(1))
        test = clipped(whole, parts.train_rows, len(x))
        seen = np.arange(len(x)) >= parts.train_rows

        def record(kind: str, scores: Any, **more: Any) -> dict[str, Any]:
            found = quality(labels[seen], scores[seen], subject.buffer)  # noqa: B023
            return {
                "set": subject.name,
                "window": size,  # noqa: B023
                "scores": kind,
                "vus_pr": found.vus.pr,
                "roc_auc": found.roc_auc,
                "average_precision": found.average_precision,
                "buffer": subject.buffer,
                **more,
            }

        starts = window_starts(len(x), size, segments=parts.train)
        for name, scores in baselines(windows_of(x, starts, size), x, test).items():
            yield record(name, scores)
        chosen = LAMBDAS if at == 0 else _OTHERS
        for weight in (None, 3.0) if quick else chosen:
            for seed in SEEDS[:1] if quick else SEEDS:
                steps = 100 if quick else _STEPS
                recipe = Recipe.of(size, x.shape[1], "mlp", None, None, weight, 2e-3)
                params, samples = train(
                    recipe, x, parts.train, steps=steps, batch_size=128, seed=seed
                )
                for kind, (scores, calibration) in _scores(
                    recipe, params, samples, x, test, parts.calibration
                ).items():
                    more: dict[str, Any] = {"contraction": weight, "seed": seed}
                    known = int((~np.isnan(calibration)).sum())
                    if kind == "two_scale" and known >= 2 * size:  # enough for any level
                        levels = Calibration.of(calibration, size)
                        alarms = scores > levels.threshold(levels.level(None))
                        normal = seen & ~labels & ~np.isnan(scores)
                        away = normal & ~_near(labels, size)
                        more["alpha"] = levels.level(None)
                        more["alarms_on_normal_rows"] = float(alarms[away].mean())
                    yield record(kind, scores, **more)


def _scores(
    recipe: Recipe, params: Any, samples: Any, x: Any, test: Any, calibration: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return `(scores, scores of the rows to calibrate on)` by kind."""
    model, size = recipe.make()[0], recipe.size
    neighbours = Neighbours.of(model, params, samples)
    found: dict[str, list[np.ndarray]] = {}
    scales: tuple[float, ...] = ()
    for ranges in (calibration, test):
        errors = Scorer(model, params, "two_scale", size, recipe.channels)
        measured = errors.measure(x, ranges)
        both = errors.parts(measured, "mean", len(x), ranges)
        last = errors.parts(measured, "last", len(x), ranges)
        scales = scales or errors.scales(both)
        distances = Scorer(model, params, "neighbour", size, recipe.channels, neighbours)
        distance = distances.parts(distances.measure(x, ranges), "mean", len(x), ranges)[0]
        norms = Scorer(model, params, "jacobian_norm", size, recipe.channels)
        values = norms.measure(x, ranges).values
        for kind, scores in {
            "reconstruction": both[0],
            "two_scale": combined(both, scales),
            "neighbour": distance,
            "reconstruction+neighbour": both[0] + distance,
            "jacobian_norm": to_timestamps(values, size, len(x), segments=ranges),
            "reconstruction, causal": last[0],
        }.items():
            found.setdefault(kind, []).append(scores)
    return {kind: (pair[1], pair[0]) for kind, pair in found.items()}


def _near(labels: np.ndarray, size: int) -> np.ndarray:
    """Tell which rows share a window with an anomaly."""
    return np.convolve(labels, np.ones(2 * size - 1), "same") > 0


def _one_class(quick: bool) -> Iterator[dict[str, Any]]:
    """Train on one digit; the others are anomalies."""
    data = load("mnist5k")
    assert data.labels is not None
    for digit in (8,) if quick else (0, 8):
        own = np.flatnonzero(data.labels == digit)
        yield from _rows(f"mnist5k, digit {digit}", data, own, quick)


def _shuttle(quick: bool) -> Iterator[dict[str, Any]]:
    data = load("shuttle", standardize=True)
    assert data.labels is not None
    yield from _rows("shuttle", data, np.flatnonzero(data.labels == 0)[:5000], quick)


def _rows(name: str, data: Any, own: np.ndarray, quick: bool) -> Iterator[dict[str, Any]]:
    """Train on four fifths of normal rows; test on the fifth, and on as many as 5,000 others."""
    cut = 4 * len(own) // 5
    normal, rest = own[:cut], own[cut:]
    anomalies = np.flatnonzero(data.labels != data.labels[own[0]])
    anomalies = anomalies[:: max(1, len(anomalies) // 5000)]
    rows = np.concatenate([rest, anomalies])
    labels = np.arange(len(rows)) >= len(rest)
    mean, deviation = data.features[normal].mean(0), data.features[normal].std(0)
    if data.feature_shape is not None:  # pixels share a unit
        deviation = np.ones_like(deviation)
    fitted, x = (
        ((data.features[r] - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
        for r in (normal, rows)
    )
    whole = np.array([[0, len(x)]])

    def record(kind: str, scores: Any, **more: Any) -> dict[str, Any]:
        found = quality(labels, scores, 0)
        return {
            "set": name,
            "window": None,
            "scores": kind,
            "roc_auc": found.roc_auc,
            "average_precision": found.average_precision,
            **more,
        }

    for kind, scores in baselines(fitted, x, whole).items():
        if kind not in ("PCA, two scales", "|difference|"):  # which are of series
            yield record(kind, scores)
    for weight in (None, 0.03) if quick else (None, 0.03, 0.1, 0.3, 1.0):
        for seed in SEEDS[:1] if quick else SEEDS:
            recipe = Recipe.of(None, x.shape[1], "mlp", None, None, weight, 2e-3)
            steps = 100 if quick else _STEPS
            inside = np.array([[0, len(fitted)]])
            params, _ = train(recipe, fitted, inside, steps=steps, batch_size=128, seed=seed)
            model = recipe.make()[0]
            errors, norms = (
                Scorer(model, params, kind, 1, x.shape[1]).measure(x, whole).values
                for kind in ("reconstruction", "jacobian_norm")
            )
            more = {"contraction": weight, "seed": seed}
            yield record("reconstruction", errors, **more)
            yield record("jacobian_norm", norms, **more)
            yield record("reconstruction × ‖J‖²", errors * norms**2, **more)


_ROWS: Mapping[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "shuttle": _shuttle,
    "mnist5k": _one_class,
}
