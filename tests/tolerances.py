"""How close is close: one table, with the reason beside each entry."""

from typing import Any, NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """A relative error that a test allows, and why it is not smaller."""

    relative: float
    reason: str


TOLERANCES = {
    "float64": Tolerance(
        1e-12, "4e-16 seen at best; sums of 200,000 terms in another order reach about 1e-13"
    ),
    "float32": Tolerance(
        1e-5, "5e-7 seen; a factor of twenty for other machines' order of summation"
    ),
    "bfloat16": Tolerance(
        3e-2, "eight bits of mantissa: one rounding is 4e-3, and a chain has several; 2e-2 seen"
    ),
    "bfloat16 gradient of a convolution": Tolerance(
        6e-2, "sums over positions too: in a dozen draws jax.vmap(jax.jacrev) itself reaches 4e-2"
    ),
    "bfloat16 curvature": Tolerance(
        6e-2, "second slopes round once more: jax.vmap(jax.hessian) itself reaches 3.6e-2"
    ),
    "differences": Tolerance(
        1e-8, "central differences of order six in float64, step 0.01, curvatures of order one"
    ),
}


def assert_close(got: Any, want: Any, kind: str, what: str = "") -> None:
    """Compare an array with the truth, relative to the truth's largest entry.

    Entries far below the largest carry the rounding of the sums that they come from, so an
    entrywise relative error would measure cancellation and not the method. Where each entry must
    be right by itself (one norm per sample), use `assert_each_close`.
    """
    got, want = _pair(got, want, what)
    scale = np.max(np.abs(want), initial=0.0)
    _compare(np.abs(got - want), scale, kind, what)


def assert_each_close(got: Any, want: Any, kind: str, what: str = "") -> None:
    """Compare an array with the truth, each entry relative to itself. A true 0 must be 0."""
    got, want = _pair(got, want, what)
    _compare(np.abs(got - want), np.abs(want), kind, what)


def _pair(got: Any, want: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert np.all(np.isfinite(want)), f"{what}: the reference is not finite"
    assert np.all(np.isfinite(got)), f"{what}: not finite: {got}"
    return got, want


def _compare(error: np.ndarray, scale: Any, kind: str, what: str) -> None:
    relative, reason = TOLERANCES[kind]
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = np.max(np.where(error == 0, 0.0, error / scale), initial=0.0)
    assert worst <= relative, (
        f"{what}: relative error {worst:.3g} above {relative:.0e} for {kind} ({reason})"
    )
