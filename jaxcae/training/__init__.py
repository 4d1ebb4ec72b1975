"""Training: one jitted step, and a loop over epochs that can stop and go on at any step."""

from jaxcae.objective.side_by_side import side_by_side
from jaxcae.training.evaluation import evaluate
from jaxcae.training.loop import Record, Segment, best_record, fit
from jaxcae.training.sources import epoch_order
from jaxcae.training.stages import Stage, stacked, train_stages
from jaxcae.training.state import Batches, DivergedError, TrainState
from jaxcae.training.step import make_train_step

__all__ = [
    "Batches",
    "DivergedError",
    "Record",
    "Segment",
    "Stage",
    "TrainState",
    "best_record",
    "epoch_order",
    "evaluate",
    "fit",
    "make_train_step",
    "side_by_side",
    "stacked",
    "train_stages",
]
