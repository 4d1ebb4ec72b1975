"""`python -m benchmarks`: measure, store, and write the page and the pictures."""

if __name__ == "__main__":  # before all else: what is imported below takes seconds
    from jaxcae.cli import listen

    listen("python -m benchmarks")

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import pictures, report
from benchmarks.harness import Settings, as_json, describe
from jaxcae.cli.device import use
from jaxcae.errors import unknown_name
from jaxcae.files import read_json, write_atomic, write_json
from jaxcae.runs import environment
from jaxcae.timing import DisagreementError, matmul_peak

SUITES = (
    "steps",
    "side_by_side",
    "whole_run",
    "scaling",
    "estimators",
    "foreign",
    "architectures",
    "prediction",
    "streaming",
    "lazy",
)
QUALITY = ("detection", "recipe", "examples")
"""What is measured of quality, not of time: commands of their own."""
RESULTS = Path(__file__).parent / "results"
QUICK, FULL = (12, 0.03), (20, 0.04)
"""Rounds, and seconds per turn."""
BUSY = 0.7
"""Load from which another process is at work. PyTorch, whose threads wait for one another by
spinning, suffers from one several times as much as JAX, so the comparison would be unfair."""


def main(argv: list[str] | None = None) -> int:
    """Run the suites; 1 if a method disagrees, and then nothing of its suite is stored."""
    asked = sys.argv[1:] if argv is None else argv
    if asked and asked[0] in QUALITY:
        use(None)
        code: int = importlib.import_module(f"benchmarks.{asked[0]}").main(asked[1:])
        return code
    if asked[:1] == ["roofline"]:  # counted, and hardly timed
        from benchmarks import roofline_check

        return roofline_check.main(asked[1:])
    options = _options(argv)
    for name in options.only or ():
        if name not in SUITES:
            print(f"benchmarks: {unknown_name('suite', name, SUITES)}", file=sys.stderr)
            return 2
    use(None)  # that which JAX_PLATFORMS asks for must be there
    options.out = options.out or RESULTS / device_name()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    failed = False
    if not options.render:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        if load is not None and load > BUSY:
            say(f"the load is {load:.1f}: others are at work; do not quote these figures")
        say("measuring the peak")
        rounds, turn_seconds = FULL if options.full else QUICK
        settings = Settings(options.full, rounds, turn_seconds, matmul_peak(), say, load)
        for name in options.only or SUITES:
            try:
                _measure(name, settings, options.out)
            except ModuleNotFoundError as error:
                say(f"{name}: not measured, needs the package {error.name!r}")
            except DisagreementError as error:
                print(f"benchmarks: {name}: {error}", file=sys.stderr)
                failed = True
    stored = read_results(options.out)
    write_atomic(options.out / "results.md", report.page(stored).encode())
    pictures.draw(stored, options.out)
    print(report.targets_table(stored))
    print(f"\n{options.out / 'results.md'}")
    return 1 if failed else 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what the exact penalty costs, on this machine's JAX backend.",
        epilog=f"Suites: {', '.join(SUITES)}. Use a quiet machine: the load is stored beside. "
        "`python -m benchmarks detection` measures how well anomalies are found, and `recipe` what "
        "contraction does for a classifier, on any machine; `examples` draws papers' recipes; "
        "`roofline` predicts steps on up to 1,024 devices.",
    )
    parser.add_argument("--full", action="store_true", help="everything; quick by default")
    parser.add_argument("--only", action="append", metavar="NAME", help="one suite; may repeat")
    parser.add_argument(
        "--out", type=Path, help="where results are kept; results/DEVICE by default"
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: page and pictures from what is kept"
    )
    return parser.parse_args(argv)


def device_name() -> str:
    """Name the folder of this machine's results: `cpu-2-threads`, `gpu-nvidia-h100-80gb`."""
    where = environment()
    device, threads = where["device"], where["host"]["threads"]
    kind = f"{threads} threads" if device["platform"] == "cpu" else device["kind"]
    return re.sub(r"[^a-z0-9]+", "-", f"{device['platform']} {kind}".lower()).strip("-")


def _measure(name: str, settings: Settings, out: Path) -> None:
    suite = importlib.import_module(f"benchmarks.{name}")
    environment = describe(settings)
    started = time.monotonic()
    outcome = suite.run(settings)
    write_json(
        out / f"{name}.json",
        {
            "title": suite.TITLE,
            "environment": environment,
            "measured_in_seconds": round(time.monotonic() - started, 1),
            "notes": outcome.notes,
            "rows": [as_json(row) for row in outcome.rows],
        },
    )


def read_results(out: Path) -> Mapping[str, Any]:
    """Read every suite that has been stored."""
    paths = {name: out / f"{name}.json" for name in SUITES}
    return {name: read_json(path) for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    from jaxcae.cli.interrupts import run_process

    run_process(main, "python -m benchmarks")
