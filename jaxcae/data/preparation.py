"""What a run keeps of the columns it was trained on, to take in other data in the same way."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Real

from jaxcae.data.standardization import Standardization, finite_list
from jaxcae.errors import InputError


class Preparation(NamedTuple):
    """How rows in the units of the data become what the networks see.

    Attributes:
        standardization: What is applied to each feature, if anything.
        feature_names: The names of the features, in the order of the networks' inputs.
        fill: What stands in for a missing value of each feature: its mean over the training split.
    """

    standardization: Standardization | None = None
    feature_names: tuple[str, ...] | None = None
    fill: Float[np.ndarray, " features"] | None = None

    def apply(
        self, features: Real[np.ndarray, "rows features"]
    ) -> Float[np.ndarray, "rows features"]:
        """Return rows in float32, filled in and standardised; NaN stays where nothing fills it."""
        if self.fill is not None:
            missing = np.isnan(features)
            if missing.any():
                features = np.where(missing, self.fill, features)
        if self.standardization is None:
            return features.astype(np.float32, copy=False)
        return self.standardization.apply(features)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists; each float64 is held exactly."""
        return {
            "standardization": self.standardization and self.standardization.to_json(),
            "feature_names": None if self.feature_names is None else list(self.feature_names),
            "fill": None if self.fill is None else self.fill.tolist(),
        }

    @classmethod
    def from_json(cls, record: Any, width: int) -> "Preparation":
        """Read the entries of `to_json` from a record that holds others, too, or lacks some.

        Args:
            record: A table.
            width: How many features there are.

        Raises:
            InputError: If an entry is not usable, or not of this width.
        """
        values, names, means = (
            record.get(key) for key in ("standardization", "feature_names", "fill")
        )
        standardization = None if values is None else Standardization.from_json(values)
        if standardization is not None:
            standardization.check_width(width)
        if names is not None:
            texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
            if not texts or len(names) != width or len(set(names)) != width:
                raise InputError(f"feature_names must be {width} different names.")
        fill = None if means is None else finite_list(means, "fill")
        if fill is not None and len(fill) != width:
            raise InputError(f"fill must hold {width} numbers, it has {len(fill)}.")
        return cls(standardization, None if names is None else tuple(names), fill)
