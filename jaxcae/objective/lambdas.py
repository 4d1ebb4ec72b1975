"""λ between the conventions in use, so that the gradients are equal and not only the intention.

Every convention is a choice of four things: whether the reconstruction error is summed or averaged
over features, whether it and the penalty are summed or averaged over the batch, and a factor on the
penalty. Two objectives are equal up to a factor s when

    s · (rec + λ · penalty)  ==  rec' + λ' · penalty'        for every batch.
"""

from typing import NamedTuple

from jaxcae.errors import check_positive_int
from jaxcae.objective.losses import Reduction


class Convention(NamedTuple):
    """How an objective reduces its two terms.

    Attributes:
        features: Reduction of the reconstruction error over features.
        batch: Reduction of the reconstruction error over the batch.
        penalty: Reduction of ‖J‖²_F over the batch; norm(J)**2 of a whole batch is a sum.
        factor: What the penalty is multiplied by, such as ½.
        squared: False for norm(J) itself, which no λ converts: its gradient is divided by ‖J‖.
    """

    features: Reduction = "sum"
    batch: Reduction = "mean"
    penalty: Reduction = "mean"
    factor: float = 1.0
    squared: bool = True


CONVENTIONS = {
    "jaxcae": Convention(),
    "jaxcae, features='mean'": Convention(features="mean"),
    "paper": Convention(batch="sum", penalty="sum"),  # a sum over the training set
    "mse_loss + norm(J)**2": Convention(features="mean", penalty="sum"),
    "mse_loss + mean penalty": Convention(features="mean"),
    "mse_loss(reduction='sum') + norm(J)**2": Convention(batch="sum", penalty="sum"),
    "mse_loss + jacobian regulariser": Convention(features="mean", factor=0.5),
    "mse_loss + norm(J)": Convention(features="mean", penalty="sum", squared=False),
}


class Converted(NamedTuple):
    """λ in the new convention, and the factor between the two losses.

    Attributes:
        value: The λ to use.
        scale: New loss = scale · old loss, for every batch; with SGD divide the rate by it.
    """

    value: float
    scale: float


def convert_lambda(
    value: float,
    source: Convention | str,
    target: Convention | str = "jaxcae",
    *,
    features: int,
    batch_size: int,
) -> Converted:
    """Convert λ so that both objectives have the same minima and parallel gradients.

    Args:
        value: λ in the source's convention.
        source: A `Convention`, or a name in `jaxcae.objective.CONVENTIONS`.
        target: The same; jaxcae's own by default.
        features: Number of features of a sample, which a mean divides by.
        batch_size: Number of samples in a batch.

    Returns:
        `(value, scale)`.

    Raises:
        ValueError: If a name is unknown, a size is not positive, or one convention does not
            square the norm.

    Example:
        >>> ours = convert_lambda(0.001, "mse_loss + norm(J)**2", features=784, batch_size=128)
        >>> round(ours.value, 3)
        100.352
    """
    one, two = _look_up(source), _look_up(target)
    check_positive_int("features", features)
    check_positive_int("batch_size", batch_size)
    if not (one.squared and two.squared):
        raise ValueError(
            "an unsquared norm is another objective: the gradient of norm(J) is that of norm(J)**2 "
            "divided by 2·norm(J), which changes with every batch. Square it; no λ converts it."
        )
    # Weight of one sample's summed error, and of its ‖J‖², in each loss.
    error = [_weight(c.features, features) * _weight(c.batch, batch_size) for c in (one, two)]
    norm = [_weight(c.penalty, batch_size) * c.factor for c in (one, two)]
    scale = error[1] / error[0]
    return Converted(value * scale * norm[0] / norm[1], scale)


def _weight(reduction: Reduction, count: int) -> float:
    return 1.0 if reduction == "sum" else 1.0 / count


def _look_up(convention: Convention | str) -> Convention:
    if isinstance(convention, Convention):
        return convention
    if convention not in CONVENTIONS:
        names = ", ".join(repr(name) for name in CONVENTIONS)
        raise ValueError(f"unknown convention {convention!r}; choose from {names}.")
    return CONVENTIONS[convention]
