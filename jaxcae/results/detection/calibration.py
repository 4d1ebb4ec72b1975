"""What a score means: how often normal data that was held out scores as high."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxcae.errors import InputError, is_finite

ALPHA = 0.01
"""The level of alarms where none is asked for and the calibration can hold it."""


class Calibration(NamedTuple):
    """Scores of normal rows that the network was not trained on.

    The p-value of a score s is (1 + #{calibration scores ≥ s}) / (n + 1): for a row as normal as
    these, and no more dependent on them than they are on each other, P(p ≤ α) ≤ α.

    Attributes:
        scores: In rising order, finite, n of them.
        window: Rows of a window, 1 for rows that stand alone. Neighbours in time share windows, so
            that n rows hold about n / window that are independent.

    References:
        Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005; Laxhammar and
        Falkman, "Conformal prediction for distribution-independent anomaly detection in streaming
        vessel data", 2010, doi:10.1145/1833280.1833287.
    """

    scores: Float[np.ndarray, " n"]
    window: int

    @classmethod
    def of(cls, scores: Any, window: int) -> "Calibration":
        """Calibrate by scores of normal rows, NaN for those without one.

        Raises:
            InputError: If they hold fewer than two independent windows.
        """
        values = np.asarray(scores, np.float64)
        calibration = cls(np.sort(values[~np.isnan(values)]), window)
        if calibration.least_alpha > 0.5:
            raise InputError(
                f"{len(calibration.scores)} rows are left for calibration, fewer than two windows "
                f"of {window}: no alarm could be told from chance. Use a longer series, a shorter "
                "window, or more of it for `calibration`."
            )
        return calibration

    @property
    def least_alpha(self) -> float:
        """The smallest level at which alarms mean something: one independent window in n."""
        return self.window / len(self.scores) if len(self.scores) else np.inf

    def p_values(self, scores: Any) -> Float[np.ndarray, " rows"]:
        """Return the p-value of each score, between 1 / (n + 1) and 1; NaN for NaN."""
        values = np.asarray(scores, np.float64)
        above = len(self.scores) - np.searchsorted(self.scores, values, side="left")
        return np.where(np.isnan(values), np.nan, (1 + above) / (len(self.scores) + 1))

    def level(self, alpha: float | None) -> float:
        """Return the level of alarms that is asked for, or the default.

        Args:
            alpha: A level, or None for 0.01, or for the smallest that the calibration can hold.

        Raises:
            InputError: If a level is smaller than that, or none.
        """
        if alpha is None:
            return max(ALPHA, self.least_alpha)
        if not (is_finite(alpha) and 0 < alpha < 1):
            raise InputError(f"alpha must be above 0 and below 1, got {alpha!r}.")
        if alpha < self.least_alpha:
            rows = len(self.scores)
            raise InputError(
                f"alpha {alpha:g} is below {self.least_alpha:.2g}, the least that {rows} "
                f"calibration rows can hold: with windows of {self.window} they are as good as "
                f"{rows / self.window:.3g} independent ones. Use alpha {self.least_alpha:.2g} or "
                f"more, or {int(np.ceil(self.window / alpha)):,} calibration rows."
            )
        return float(alpha)

    def threshold(self, alpha: float) -> float:
        """Return the score above which, and only above which, the p-value is at most `alpha`."""
        exceeding = int(np.floor(alpha * (len(self.scores) + 1) * (1 + 1e-12))) - 1
        if exceeding < 0:
            return float(np.inf)
        return float(self.scores[len(self.scores) - 1 - exceeding])
