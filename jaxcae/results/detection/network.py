"""The network of a detector that a run trained."""

from typing import NamedTuple

from jaxcae.runs.config import Config
from jaxcae.types import Autoencoder


class NetworkOfRun(NamedTuple):
    """What stands for a recipe where a run made the network, of whatever model.

    Attributes:
        model: The autoencoder, of windows as rows.
        size: Rows of a window.
        channels: Channels of a row.
        contraction: λ; None for a plain autoencoder.
    """

    model: Autoencoder
    size: int
    channels: int
    contraction: float | None

    @classmethod
    def of(cls, config: Config, model: Autoencoder) -> "NetworkOfRun":
        """Read the widths off the configuration of a run on windows."""
        size = config.series.window or 1
        channels = config.model.num_features // size
        return cls(model, size, channels, config.objective.contraction or None)

    def make(self) -> tuple[Autoencoder, None, None]:
        """Return the model, as `Recipe.make` does."""
        return self.model, None, None
