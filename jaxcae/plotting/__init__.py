"""Pictures of a trained autoencoder: arrays in, matplotlib figures out, and one atomic writer.

Every function builds a `Figure` of its own and touches no state of pyplot, so that it is safe in a
thread, a notebook and a job without a display. Titles state what the arrays show, in numbers taken
from the arrays. Networks come as a mapping from name to array; `"contractive"`, `"plain"` and
`"untrained"` have colours of their own, others take the next ones of the same palette.
"""

from jaxcae.plotting.curves import contraction_curves, singular_value_spectrum, training_curves
from jaxcae.plotting.frame import COLOURS, save_each, save_figure
from jaxcae.plotting.samples import first_layer_filters, reconstructions
from jaxcae.plotting.series import event_closely, series_scores

__all__ = [
    "COLOURS",
    "contraction_curves",
    "event_closely",
    "first_layer_filters",
    "reconstructions",
    "save_each",
    "save_figure",
    "series_scores",
    "singular_value_spectrum",
    "training_curves",
]
