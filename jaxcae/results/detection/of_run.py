"""The detector of a run on a series: the network that the run trained, calibrated and kept with it.

It is a `ContractiveDetector` whose network came from `jaxcae.runs.train`: of any model, resumed
after any crash. `detector.safetensors` lies beside the parameters.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcae.data.segments import time_steps
from jaxcae.data.standardization import Standardization
from jaxcae.data.windows import window_starts
from jaxcae.results.detection import storage
from jaxcae.results.detection.detector import ContractiveDetector
from jaxcae.results.detection.events import Event, alarms_of, find_events
from jaxcae.results.detection.neighbours import Neighbours
from jaxcae.results.detection.network import NetworkOfRun
from jaxcae.results.detection.scoring import combined
from jaxcae.runs.config import Config, main_network
from jaxcae.runs.entries import DETECTOR
from jaxcae.runs.finished import Run
from jaxcae.runs.material import Material
from jaxcae.runs.trainer import Outcome
from jaxcae.runs.windowed import of_channels
from jaxcae.types import Autoencoder, Params


class Assessment(NamedTuple):
    """What a detector says of a series; one value a row, NaN where no window covers it.

    Attributes:
        scores: High for an anomaly.
        p_values: How often normal rows score as high.
        alarms: Which scores are above the threshold.
        alpha: The level of the alarms.
        threshold: Theirs.
        window_values: The value of the windows about a row, by the score: the reconstruction error
            ‖x − x̂‖², the neighbour distance, their sum, or ‖J‖_F.
        points: (x − x̂)² of a row by channel, in units of the channel's variance.
        expected: The mean reconstruction of each row, in the units of the data.
        events: Alarms that follow each other.
    """

    scores: Float[np.ndarray, " rows"]
    p_values: Float[np.ndarray, " rows"]
    alarms: Bool[np.ndarray, " rows"]
    alpha: float
    threshold: float
    window_values: Float[np.ndarray, " rows"]
    points: Float[np.ndarray, "rows channels"]
    expected: Float[np.ndarray, "rows channels"]
    events: list[Event]


def calibrate(outcome: Outcome) -> ContractiveDetector:
    """Calibrate the network of a finished run on a series, and keep the detector with the run.

    Args:
        outcome: What `jaxcae.runs.train` returned, of a run with a `window`.

    Raises:
        InputError: If the run is on rows, or too few are left to calibrate on.
    """
    config, material = outcome.config, outcome.material
    parts = material.parts
    if parts is None:
        raise ValueError("the run is on rows: without windows there is nothing to calibrate.")
    detector = uncalibrated(config, outcome.model, outcome.params[main_network(config)], material)
    detector._calibrate(parts.values, parts.calibration)
    detector.decision_scores_ = np.zeros(0)  # a run keeps no scores of its own rows
    times = parts.series.times
    steps = None if times is None else time_steps(times.values, len(parts.series))
    detector.step_ = None if steps is None else float(np.median(steps))
    storage.write(detector, outcome.run_dir / DETECTOR)
    return detector


def detector_of(run: Run, path: str | Path) -> ContractiveDetector:
    """Load the detector of a run on a series, with every number verified.

    Args:
        run: As `jaxcae.runs.open_run` gives it.
        path: Its directory.

    Raises:
        RunError: If it has no detector.
        CheckpointError: If anything is damaged, or does not belong together.
    """
    return storage.read(ContractiveDetector, run, Path(path) / DETECTOR)


def uncalibrated(
    config: Config, model: Autoencoder, params: Params, material: Material
) -> ContractiveDetector:
    """Make the detector of a network of a run, which is not calibrated yet."""
    network: Any = NetworkOfRun.of(config, model)  # which serves as a recipe
    detector = ContractiveDetector(
        config.series.window,
        contraction=network.contraction,
        statistic=config.series.score,
        batch_size=config.training.batch_size,
        learning_rate=config.training.learning_rate,
        calibration=config.data.held_out,
        gap=config.series.max_gap,
        random_state=config.training.seed,
    )
    scaling = of_channels(material.preparation, config).standardization
    if scaling is None:
        scaling = Standardization(np.zeros(network.channels), np.ones(network.channels))
    detector.standardization_, detector.params_ = scaling, params
    detector.recipe_, detector.kind_ = network, detector._kind(network)
    detector.neighbours_, detector.n_features_in_ = None, network.channels
    if config.data.feature_names:
        detector.feature_names_in_ = np.array(config.data.feature_names, object)
    if "neighbour" in detector.kind_:
        detector.neighbours_ = Neighbours.of(model, params, material.train)
    return detector


def assess(
    detector: ContractiveDetector,
    x: Float[np.ndarray, "rows channels"],
    ranges: Int[np.ndarray, "segments 2"],
    alpha: float | None = None,
) -> Assessment:
    """Say all that a detector says of a series.

    Args:
        detector: Fitted, on windows.
        x: The series in the units of the data.
        ranges: The segments of `x` that windows stay in.
        alpha: The level of alarms; that of the detector by default.

    Raises:
        InputError: If no window fits, or the calibration cannot hold the level.
    """
    levels = detector._levels
    level = levels.level(detector.alpha if alpha is None else alpha)
    threshold, scorer = levels.threshold(level), detector._scorer()
    window_starts(len(x), scorer.size, segments=ranges)  # which says why, if none fits
    measured = scorer.measure(detector.standardization_.apply(x), ranges)
    parts = scorer.parts(measured, detector.placement, len(x), ranges)  # type: ignore[arg-type]
    scores = combined(parts, detector.scales_)
    p_values, alarms = levels.p_values(scores), alarms_of(scores, threshold)
    mean, deviation = detector.standardization_
    return Assessment(
        scores,
        p_values,
        alarms,
        level,
        threshold,
        parts[0],
        measured.points,
        measured.expected * deviation + mean,
        [
            event._replace(
                start=event.start + first, end=event.end + first, peak=event.peak + first
            )
            for first, stop in ranges.tolist()  # no event goes on beyond a gap
            for event in find_events(
                alarms[first:stop],
                scores[first:stop],
                p_values[first:stop],
                measured.points[first:stop],
                detector.usual_,
                join=scorer.box,
            )
        ],
    )
