"""What `jaxcae train` does at the end of a run on a series: calibrate, and measure where it can."""

from jaxcae.files import write_json
from jaxcae.results.detection.comparison import compare_run
from jaxcae.results.detection.of_run import calibrate
from jaxcae.runs import Outcome
from jaxcae.words import number, short


def calibrated(outcome: Outcome) -> str:
    """Calibrate the network, keep the detector with the run, and say what it can hold.

    What came of it is in `report.json`, under `detection`: with labelled rows after the training,
    the networks beside simpler detectors.
    """
    assert outcome.report is not None
    detector = calibrate(outcome)
    levels, settings = detector._levels, outcome.config.series
    outcome.report["detection"] = {
        "score": settings.score,
        "window": settings.window,
        "alpha": detector.alpha_,
        "threshold": detector.threshold_,
        "least_alpha": levels.least_alpha,
        "calibration_rows": len(levels.scores),
        "comparison": compare_run(outcome),
    }
    write_json(outcome.run_dir / "report.json", outcome.report)
    return (
        f"Alarms: scores ({settings.score}) above {number(detector.threshold_)}, at "
        f"α = {short(detector.alpha_)}. The {len(levels.scores):,} rows to calibrate on hold α "
        f"from {short(levels.least_alpha)} on."
    )
