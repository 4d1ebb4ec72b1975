"""What every suite shares: a subject, the check that comes before the clock, and a row."""

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal, NamedTuple

import jax

from jaxcae.runs import environment
from jaxcae.timing import Answer, Timing, check_exact, check_unbiased, interleave, ratio

Check = Literal["exact", "unbiased", "unit", "differs"]
"""How a subject is held against the reference: equal to rounding; equal on average, by many draws;
not at all because it is the step without a penalty; or it computes something else, as noted."""

DRAWS = 16


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        full: Everything, or what fits in a few minutes.
        rounds: Turns of every fast subject.
        turn_seconds: How long a turn lasts.
        peak: Operations per second of a product of matrices on this machine, float32.
        say: Where progress goes.
        load: Processes at work on the machine before the first suite began.
    """

    full: bool
    rounds: int
    turn_seconds: float
    peak: float
    say: Callable[[str], None]
    load: float | None = None


@dataclass(frozen=True)
class Subject:
    """One thing to time.

    Attributes:
        name: Unique within its group.
        call: Does it once; a result of jax is waited for.
        check: How its answers are held against the reference.
        answers: Makes them: one for an exact subject, many draws for an unbiased one.
        tolerance: How far it may be off.
        note: What a reader has to know.
        compile_seconds: What tracing and compilation took, where there is such a thing.
        flops: As XLA counts them.
        temp_bytes: As XLA plans them.
    """

    name: str
    call: Callable[[], Any]
    check: Check = "exact"
    answers: Callable[[], Sequence[Answer]] | None = None
    tolerance: float = 0.0
    note: str = ""
    compile_seconds: float | None = None
    flops: float | None = None
    temp_bytes: float | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one subject. Times are in seconds; None is what does not apply.

    `turns` are the seconds per call of each round. `errors` are those of values and gradient:
    against the reference if exact, the spread of a single draw if unbiased. `times_unit` is the
    ratio to the group's unit with its 95 % interval.
    """

    group: str
    name: str
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    turns: dict[int, float] | None = None
    times_unit: tuple[float, float, float] | None = None
    compile_seconds: float | None = None
    flops: float | None = None
    share_of_peak: float | None = None
    temp_bytes: float | None = None
    check: str = ""
    errors: tuple[float, float] | None = None
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Outcome(NamedTuple):
    """What a suite found: its rows, and sentences on them that need no editing."""

    rows: list[Row]
    notes: list[str]


def compare(
    group: str,
    subjects: Sequence[Subject],
    settings: Settings,
    reference: Answer | None = None,
    unit: str = "plain",
    facts: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Check the subjects against the reference, then time them in turns.

    Raises:
        DisagreementError: If one of them does not compute what it should.
    """
    settings.say(f"{group}: checking {len(subjects)} subjects")
    errors = {subject.name: verify(subject, reference) for subject in subjects}
    settings.say(f"{group}: timing")
    calls = {subject.name: subject.call for subject in subjects}
    timings = interleave(calls, settings.rounds, settings.turn_seconds)
    return [
        _row(group, s, timings, unit, settings.peak, errors[s.name], dict(facts or {}))
        for s in subjects
    ]


def verify(subject: Subject, reference: Answer | None) -> tuple[float, float] | None:
    """Hold a subject against the reference, in the way that its `check` names."""
    if subject.check in ("unit", "differs"):
        return None
    if reference is None or subject.answers is None:
        raise ValueError(f"{subject.name}: nothing to check it with; say check='differs' and why.")
    answers = subject.answers()
    if subject.check == "exact":
        return check_exact(subject.name, answers[0], reference, subject.tolerance)
    return check_unbiased(subject.name, answers, reference, subject.tolerance)


def _row(
    group: str,
    subject: Subject,
    timings: Mapping[str, Timing],
    unit: str,
    peak: float,
    errors: tuple[float, float] | None,
    facts: dict[str, Any],
) -> Row:
    timing = timings[subject.name]
    against = ratio(timing, timings[unit]) if unit in timings else None
    return Row(
        group,
        subject.name,
        seconds=timing.median,
        quartiles=(timing.quantile(0.25), timing.quantile(0.75)),
        turns=timing.turns,
        times_unit=(against.value, against.low, against.high) if against else None,
        compile_seconds=subject.compile_seconds,
        flops=subject.flops,
        share_of_peak=subject.flops / timing.median / peak if subject.flops else None,
        temp_bytes=subject.temp_bytes,
        check=subject.check,
        errors=errors,
        note=subject.note,
        facts=facts,
    )


def describe(settings: Settings) -> dict[str, Any]:
    """Say where and when: versions, device, threads, date, load, and how long was measured."""
    where = environment()
    for package in ("torch", "equinox"):
        try:
            where["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            where["versions"][package] = None
    where["host"]["processor"] = _processor()
    where["host"]["load"] = settings.load
    return {
        **where,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "mode": "full" if settings.full else "quick",
        "rounds": settings.rounds,
        "turn_seconds": settings.turn_seconds,
        "matmul_peak": settings.peak,
        "jax_backend": jax.default_backend(),
    }


def as_json(row: Row) -> dict[str, Any]:
    """Make plain JSON of a row; what does not apply is left out."""
    return {key: value for key, value in asdict(row).items() if value not in (None, "", {})}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
