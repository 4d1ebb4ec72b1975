"""An anomaly detector for rows and series, by the conventions of scikit-learn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from jaxcae.data.segments import segments, time_steps
from jaxcae.data.windows import PLACEMENTS, window_starts
from jaxcae.errors import InputError, is_finite, unknown_name
from jaxcae.results.detection import storage
from jaxcae.results.detection.calibration import Calibration
from jaxcae.results.detection.contributions import Contributions, contributions
from jaxcae.results.detection.events import Event, alarms_of, find_events
from jaxcae.results.detection.neighbours import Neighbours
from jaxcae.results.detection.network import NetworkOfRun
from jaxcae.results.detection.recipe import Recipe, divide, scaling, train
from jaxcae.results.detection.scoring import SCORES, Measured, Scorer, combined

Ranges = Int[np.ndarray, "_ 2"]


class ContractiveDetector(OutlierMixin, BaseEstimator):
    """Detect anomalies by a contractive autoencoder, in rows that stand alone or in a series.

    `fit` takes normal data: it standardises each column, trains on most of it, and calibrates on
    the rest, for a series on its end. What was not trained on gives every score a p-value, and
    alarms a level. With `window` the rows are a series in time, all methods take it in order, and
    return one value a row. A row with a NaN is a gap there, as is a long step between `times`: no
    window crosses it, and rows that no window covers have the score NaN and raise no alarm.

    Args:
        window: Rows of a window of a series; None for rows that stand alone.
        latent: Width of the code; by default half of a window, at most 64.
        hidden: Width of the hidden layer, by default twice the code's, for rows at least 64; of a
            temporal convolution the features of each map, by default 16.
        contraction: λ of ‖J‖²_F, None for a plain autoencoder; "auto" is 1 for windows and 0.03
            for rows.
        statistic: "two_scale", "reconstruction", "neighbour" or "reconstruction+neighbour"
            (experimental), or "jacobian_norm" where the network is contractive; "auto" is
            `two_scale` for a series, which adds to a window's error that about the timestamp, and
            `reconstruction` for rows.
        alpha: Level of alarms: the share of normal rows that may raise one. None is 0.01, or
            the least that the calibration can hold (see `alpha_`), which is window / rows.
        steps: Steps of training, about.
        batch_size: Windows, or rows, a step.
        learning_rate: Of Adam.
        calibration: Share of the rows to calibrate on, at the end of a series.
        placement: How windows tell of a timestamp: the "mean" or "max" of those that cover it, or
            the "last" one, which needs no later row and sees less than half as much.
        gap: A step in time longer than this many median steps is a gap.
        model: "mlp", or "temporal_conv" for windows; see `jaxcae.temporal_conv`.
        random_state: Seed, or generator, of the training.

    Attributes:
        offset_: The threshold of `score_samples`, under which is an anomaly.
        threshold_: The same in the sign of PyOD: −offset_.
        alpha_: The level of alarms.
        calibration_: The scores, high for an anomaly, of the rows to calibrate on.
        decision_scores_: Scores of the rows given to `fit`, high for an anomaly, as in PyOD. Most
            of them were trained on, so they are lower than those of new rows.
        standardization_: Mean and deviation of each column.
        params_: The parameters of the network.
        n_features_in_: Columns.
        feature_names_in_: Their names, if `fit` was given a data frame.

    Raises:
        ValueError: If data or an argument is not usable; in one line.

    Example:
        >>> import numpy as np, jaxcae
        >>> x = np.random.default_rng(0).normal(size=(200, 3))
        >>> detector = jaxcae.ContractiveDetector(steps=50).fit(x)
        >>> detector.predict([[0, 0, 0], [9, -9, 9]]).tolist()
        [1, -1]

    References:
        Rifai et al., "Contractive Auto-Encoders", ICML 2011.
    """

    def __init__(
        self,
        window: int | None = None,
        *,
        latent: int | None = None,
        hidden: int | None = None,
        contraction: float | str | None = "auto",
        statistic: str = "auto",
        alpha: float | None = None,
        steps: int = 1000,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
        calibration: float = 0.2,
        placement: str = "mean",
        gap: float = 1.5,
        model: str = "mlp",
        random_state: Any = 0,
    ) -> None:
        self.window = window
        self.latent = latent
        self.hidden = hidden
        self.contraction = contraction
        self.statistic = statistic
        self.alpha = alpha
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.calibration = calibration
        self.placement = placement
        self.gap = gap
        self.model = model
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, *, times: Any = None) -> "ContractiveDetector":
        """Train and calibrate on normal data.

        Args:
            X: Rows, shape (rows, columns); a data frame may name the columns. A series of one
                channel may have the shape (rows,).
            y: Not used.
            times: Of a series, a time for each row, increasing: `datetime64`, ISO 8601 or numbers.

        Returns:
            The detector itself.
        """
        x, ranges = self._read(X, times, reset=True)
        recipe = Recipe.of(
            self.window,
            x.shape[1],
            self.model,
            self.hidden,
            self.latent,
            self.contraction,
            self.learning_rate,
        )
        kind = self._kind(recipe)
        if not (is_finite(self.calibration) and 0 < self.calibration < 1):
            raise InputError(f"calibration is a share above 0, below 1; got {self.calibration!r}.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if self.window is None:
            order = np.random.default_rng(seed).permutation(len(x))
            held = min(max(2, round(self.calibration * len(x))), len(x) - 2)
            fitted, held_out = x[order[held:]], x[order[:held]]
            inside = (np.array([[0, len(fitted)]]), np.array([[0, held]]))
        else:
            window_starts(len(x), recipe.size, segments=ranges)  # which says it if there is none
            fitted = held_out = x
            inside = divide(ranges, recipe.size, self.calibration)
        names = getattr(self, "feature_names_in_", None)
        self.standardization_ = scaling(
            fitted, inside[0], None if names is None else tuple(names), self.window is not None
        )
        prepared = self.standardization_.apply(fitted)
        self.params_, samples = train(
            recipe,
            prepared,
            inside[0],
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
        )
        self.recipe_, self.kind_ = recipe, kind
        self.neighbours_ = None
        if "neighbour" in kind:
            self.neighbours_ = Neighbours.of(recipe.make()[0], self.params_, samples)
        self._calibrate(self.standardization_.apply(held_out), inside[1])
        self.step_ = None if times is None else float(np.median(time_steps(times, len(x))))
        scores, _ = self._scores(x, ranges)
        self.decision_scores_ = scores
        return self

    def _calibrate(self, prepared: Any, ranges: Ranges) -> None:
        scorer = self._scorer()
        measured = scorer.measure(prepared, ranges)
        self.usual_ = np.nanmean(measured.points, axis=0)
        found = {}
        for placement in {self.placement, "last"}:
            parts = scorer.parts(measured, placement, len(prepared), ranges)  # type: ignore[arg-type]
            scales = scorer.scales(parts)
            calibration = Calibration.of(combined(parts, scales), self.recipe_.size)
            found[placement] = scales, calibration
        self.scales_, levels = found[self.placement]
        self.causal_scales_, causal_levels = found["last"]
        self._set_levels(levels, causal_levels)

    def _set_levels(self, levels: Calibration, causal_levels: Calibration) -> None:
        self._levels, self._causal_levels = levels, causal_levels
        self.alpha_ = self._levels.level(self.alpha)
        self.threshold_ = self._levels.threshold(self.alpha_)
        self.offset_ = -self.threshold_

    @property
    def calibration_(self) -> Float[np.ndarray, " n"]:
        """The scores of the rows to calibrate on, in rising order."""
        check_is_fitted(self)
        return self._levels.scores

    # ----------------------------------------------------------------- what scikit-learn asks for

    def score_samples(self, X: Any, *, times: Any = None) -> Float[np.ndarray, " rows"]:
        """Return a score for each row, high for a normal one; NaN where no window covers it."""
        return -self._scores(*self._read(X, times))[0]

    def decision_function(self, X: Any, *, times: Any = None) -> Float[np.ndarray, " rows"]:
        """Return `score_samples` less `offset_`: negative for an anomaly."""
        return self.score_samples(X, times=times) - self.offset_

    def predict(self, X: Any, *, times: Any = None) -> Int[np.ndarray, " rows"]:
        """Return −1 for an anomaly and 1 for all else, rows that no window covers included."""
        return np.where(self.decision_function(X, times=times) < 0, -1, 1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.window is not None
        tags.input_tags.one_d_array = self.window is not None
        return tags

    # ----------------------------------------------------------------- what alarms are made of

    def p_values(self, X: Any, *, times: Any = None) -> Float[np.ndarray, " rows"]:
        """Return how often normal rows score as high as each row; see `Calibration`.

        An alarm is a p-value of at most `alpha_`. NaN where no window covers a row.
        """
        scores, _ = self._scores(*self._read(X, times))
        return self._levels.p_values(scores)

    def events(self, X: Any, *, times: Any = None) -> list[Event]:
        """Gather the alarms of a series into events: start, end, peak, channel.

        Alarms with no more than an eighth of a window between them are one event.
        """
        scores, measured = self._scores(*self._read(X, times))
        return find_events(
            alarms_of(scores, self.threshold_),
            scores,
            self._levels.p_values(scores),
            measured.points,
            self.usual_,
            join=0 if self.window is None else self._scorer().box,
        )

    def explain(
        self, X: Any, rows: Int[np.ndarray, "..."] | Sequence[int] | int, *, times: Any = None
    ) -> Contributions:
        """Tell what the network expected about some rows, by lag and column.

        Args:
            X: The rows or series.
            rows: Which rows to explain, such as the peaks of events, counted from 0. Each is
                explained by the window about it.
            times: As in `fit`.

        Raises:
            InputError: If there is no such row, or no window about it.
        """
        x, ranges = self._read(X, times)
        return contributions(self._scorer(), self.standardization_, x, ranges, np.atleast_1d(rows))

    def reconstruct(self, X: Any, *, times: Any = None) -> Float[np.ndarray, "rows columns"]:
        """Return what the network expects of each row: the mean over the windows that cover it."""
        _, measured = self._scores(*self._read(X, times))
        return measured.expected * self.standardization_.deviation + self.standardization_.mean

    def follower(self, alpha: float | None = None) -> Any:
        """Begin to score rows as they come, each by the window that ends there; see `Follower`."""
        from jaxcae.results.detection.follower import Follower

        return Follower(self, alpha)

    # ----------------------------------------------------------------- files

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Save into a run directory, without pickle; see `jaxcae.results.detection.storage`."""
        check_is_fitted(self)
        return storage.save(self, Path(directory), overwrite)

    @classmethod
    def load(cls, directory: str | Path) -> "ContractiveDetector":
        """Load what `save` wrote, with every number verified."""
        return storage.load(cls, Path(directory))

    # ----------------------------------------------------------------- inside

    def _read(self, X: Any, times: Any, reset: bool = False) -> tuple[Any, Ranges]:
        """Return rows in float64 or float32, and the segments that they fall into."""
        if not reset:
            check_is_fitted(self)
        series = self.window is not None
        if np.ma.is_masked(X):
            X = X.astype(np.float64).filled(np.nan)
        if series and np.ndim(X) == 1 and not hasattr(X, "toarray"):
            X = np.asarray(X).reshape(-1, 1)
        try:
            x = validate_data(
                self,
                X,
                reset=reset,
                dtype=[np.float64, np.float32],
                ensure_all_finite="allow-nan" if series else True,
                ensure_min_samples=4 if reset else 1,
            )
        except np.exceptions.DTypePromotionError:
            raise InputError(
                "a column of X holds times, which are no feature: leave it out, and give it as "
                "`times` where the rows are a series."
            ) from None
        if series:
            return x, segments(x, times, gap=self.gap)
        if times is not None:
            raise InputError("times are of a series: give the rows of its `window`, too.")
        return x, np.array([[0, len(x)]])

    def _kind(self, recipe: Recipe | NetworkOfRun) -> Any:
        if self.placement not in PLACEMENTS:
            raise unknown_name("placement", self.placement, PLACEMENTS)
        kind = self.statistic
        if kind == "auto":
            kind = "reconstruction" if self.window is None else "two_scale"
        if kind not in SCORES:
            raise unknown_name("statistic", kind, ("auto", *SCORES))
        if kind == "two_scale" and self.window is None:
            raise InputError("statistic 'two_scale' is of a series: say the rows of its `window`.")
        if kind == "jacobian_norm" and not recipe.contraction:
            raise InputError(
                "statistic 'jacobian_norm' says nothing of a network without contraction: "
                "anomalies can have lower norms there. Use a contraction above 0, or another one."
            )
        return kind

    def _scorer(self) -> Scorer:
        model, _, _ = self.recipe_.make()
        size, channels = self.recipe_.size, self.recipe_.channels
        return Scorer(model, self.params_, self.kind_, size, channels, self.neighbours_)

    def _scores(self, x: Any, ranges: Ranges) -> tuple[Float[np.ndarray, " rows"], Measured]:
        """Return scores, high for an anomaly, and what they are made of."""
        scorer = self._scorer()
        measured = scorer.measure(self.standardization_.apply(x), ranges)
        parts = scorer.parts(measured, self.placement, len(x), ranges)  # type: ignore[arg-type]
        return combined(parts, self.scales_), measured
