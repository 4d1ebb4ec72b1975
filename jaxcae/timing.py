"""Time programs so that the figures can be compared: compilation apart, turns interleaved.

Two programs timed one after the other are timed on two machines: clocks, caches and neighbours
change in between. Here each program takes its turn in every round, in an order that rotates, and a
figure is the median over rounds. What disagrees is not timed at all: `check_exact` and
`check_unbiased` come first.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
FEWEST_TURNS, FEWEST_LONG_TURNS = 5, 2
_LONG = 2.0
_GENEROUS = 4
STANDARD_ERRORS = 5.0


class Compiled(NamedTuple):
    """A program ready to run, and what XLA says of it.

    Attributes:
        call: `call(*arguments)`, for arguments of the shapes it was compiled for.
        seconds: What tracing and compilation took.
        flops: Floating-point operations; the body of a loop counts once. None if not told.
        temp_bytes: Memory for what lives between operations, arguments and results apart.
    """

    call: Callable[..., Any]
    seconds: float
    flops: float | None
    temp_bytes: int | None


class Timing(NamedTuple):
    """Seconds per call, one figure for each round that the program took a turn in."""

    turns: dict[int, float]

    @property
    def median(self) -> float:
        """The middle of the rounds, in seconds per call."""
        return self.quantile(0.5)

    def quantile(self, q: float) -> float:
        """A quantile over the rounds, in seconds per call."""
        return float(np.quantile(list(self.turns.values()), q))


class Ratio(NamedTuple):
    """A ratio of medians with its 95 % interval, from resampled rounds."""

    value: float
    low: float
    high: float


class Answer(NamedTuple):
    """What a program computed: some values, and the gradients as a pytree."""

    values: Any
    gradient: Any


class DisagreementError(ArithmeticError):
    """Two programs that were to be compared do not compute the same."""


def compile_ahead(function: Callable[..., Any], *arguments: Any) -> Compiled:
    """Trace and compile `jit(function)` for these arguments, against the clock."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops = costs.get("flops") if isinstance(costs, Mapping) else None
    temp_bytes = getattr(memory, "temp_size_in_bytes", None)
    return Compiled(compiled, seconds, flops, temp_bytes)


def interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 15, turn_seconds: float = 0.04
) -> dict[str, Timing]:
    """Time programs in turns.

    A turn is one call that is not counted, which finds the caches as its own neighbours leave them,
    and then calls for about `turn_seconds`; the turn's figure is their median. A program whose
    one call takes several times as long gets fewer turns, evenly over the rounds, so that it does
    not take all of the time: at least five, or two beyond two seconds a call.

    Args:
        calls: Name to a function without arguments; results of jax are waited for.
        rounds: How often every fast program takes its turn.
        turn_seconds: How long a turn is to last.

    Returns:
        The timing of each program.
    """
    estimates = {name: _estimate(call) for name, call in calls.items()}
    plans = {name: _turns(rounds, turn_seconds, each) for name, each in estimates.items()}
    turns: dict[str, dict[int, float]] = {name: {} for name in calls}
    names = list(calls)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            if index not in plans[name]:
                continue
            if estimates[name] < turn_seconds:
                _seconds(calls[name])
            count = max(1, round(turn_seconds / estimates[name]))
            turns[name][index] = float(np.median([_seconds(calls[name]) for _ in range(count)]))
    return {name: Timing(taken) for name, taken in turns.items()}


def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """Divide medians, over the rounds that both took a turn in.

    The interval comes from drawing rounds again, whole: what slowed both in a round stays paired.
    """
    shared = sorted(numerator.turns.keys() & denominator.turns.keys())
    above = np.array([numerator.turns[index] for index in shared])
    below = np.array([denominator.turns[index] for index in shared])
    drawn = np.random.default_rng(0).integers(len(shared), size=(RESAMPLES, len(shared)))
    resampled = np.median(above[drawn], 1) / np.median(below[drawn], 1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Ratio(float(np.median(above) / np.median(below)), float(low), float(high))


def matmul_peak(dtype: Any = jnp.float32, seconds: float = 0.05) -> float:
    """Measure the most operations per second that a product of square matrices reaches here.

    Sizes double until one product takes `seconds`; each is tried eight times, the best counts.
    """
    best, size = 0.0, 512
    while True:
        a = jnp.ones((size, size), dtype)
        product = compile_ahead(jnp.matmul, a, a).call
        times = [_seconds(partial(product, a, a)) for _ in range(8)]
        best = max(best, 2.0 * size**3 / min(times))
        if min(times) > seconds or size >= 8192:
            return best
        size *= 2


def check_exact(
    name: str, answer: Answer, reference: Answer, tolerance: float
) -> tuple[float, float]:
    """Measure how far an answer is from the reference, and refuse it beyond the tolerance.

    Returns:
        The largest relative error of a value, and ‖g − g₀‖ / ‖g₀‖ over all gradients together.

    Raises:
        DisagreementError: If one of the two is beyond the tolerance, or not a number.
    """
    values, expected = _values(answer), _values(reference)
    in_values = float(np.max(np.abs(values - expected) / np.abs(expected)))
    gradient, true = _flat(answer), _flat(reference)
    if gradient.shape != true.shape:
        raise DisagreementError(f"{name}: {gradient.size} gradients, expected {true.size}.")
    in_gradient = float(np.linalg.norm(gradient - true) / np.linalg.norm(true))
    for what, error in (("values", in_values), ("gradients", in_gradient)):
        if not error <= tolerance:
            raise DisagreementError(
                f"{name}: {what} are off by {error:.2g}, allowed is {tolerance:.2g}. Not timed."
            )
    return in_values, in_gradient


def check_unbiased(
    name: str, answers: Sequence[Answer], reference: Answer, tolerance: float
) -> tuple[float, float]:
    """Refuse an estimator whose mean over independent draws is not the reference.

    Of a gradient its component along the true one is tested.

    Returns:
        The spread of one draw: relative standard deviation of the values (the largest), and root
        mean square of ‖g − g₀‖ / ‖g₀‖.

    Raises:
        DisagreementError: If a mean is off by more than 5 standard errors and the tolerance.
    """
    expected, true = _values(reference), _flat(reference)
    values = np.stack([_values(answer) for answer in answers]) / expected
    gradients = np.stack([_flat(answer) for answer in answers])
    along = (gradients @ true / (true @ true))[:, None]
    for what, draws in (("values", values), ("gradients", along)):
        off = np.abs(draws.mean(0) - 1)
        allowed = STANDARD_ERRORS * draws.std(0, ddof=1) / np.sqrt(len(draws)) + tolerance
        if not (off <= allowed).all():
            raise DisagreementError(
                f"{name}: the mean of {len(draws)} draws is off by {off.max():.2g} in {what}, "
                f"allowed are 5 standard errors, {allowed[off.argmax()]:.2g}. Not timed."
            )
    errors = np.linalg.norm(gradients - true, axis=1) / np.linalg.norm(true)
    return float(values.std(0, ddof=1).max()), float(np.sqrt(np.mean(errors**2)))


def tolerance_of(dtype: Any) -> float:
    """How far two exact methods may be apart: rounding, in this dtype on this device.

    Accelerators multiply float32 in TF32 or bfloat16 unless told otherwise.
    """
    if jnp.dtype(dtype) == jnp.float64:
        return 1e-10
    coarse = jnp.dtype(dtype) != jnp.float32 or jax.default_backend() != "cpu"
    return 3e-2 if coarse else 5e-5


def _estimate(call: Callable[[], Any]) -> float:
    """Warm up, and time one call; the best of a few where it is short."""
    first = _seconds(call)
    return first if first > 1.0 else min(_seconds(call) for _ in range(3))


def _turns(rounds: int, turn_seconds: float, each: float) -> set[int]:
    """Choose the rounds of a program whose call takes `each` seconds."""
    fewest = FEWEST_TURNS if each < _LONG else FEWEST_LONG_TURNS
    count = min(rounds, max(fewest, int(_GENEROUS * rounds * turn_seconds / each)))
    return set(np.linspace(0, rounds - 1, count).round().astype(int).tolist())


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def _values(answer: Answer) -> NDArray[np.float64]:
    return np.concatenate([np.ravel(np.asarray(v, float)) for v in jax.tree.leaves(answer.values)])


def _flat(answer: Answer) -> NDArray[np.float64]:
    leaves = jax.tree.leaves(answer.gradient)
    return np.concatenate([np.ravel(np.asarray(leaf, float)) for leaf in leaves])
