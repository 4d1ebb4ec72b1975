"""A factor of the data's covariance, the metric of a penalty along the data's own directions."""

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxcae.errors import check_positive_int


def covariance_factor(
    xs: Any, rank: int | None = None, *, noise_scale: float = 1.0
) -> Float[np.ndarray, "rank features"]:
    """Compute F with FᵀF = σ² Σ, Σ the covariance of the data, or its best F of few rows.

    As `input_metric` of `contractive_penalty` it makes ‖J Fᵀ‖²_F = σ² tr(J Σ Jᵀ): to leading order
    in σ, what noise of covariance σ²Σ adds to a mean squared change of the code,
    E‖h(x + ε) − h(x)‖². Rows are the principal directions times σ times their deviations, the
    largest first.

    Args:
        xs: Samples of at least two rows, shape (samples, *features), features taken in a row.
        rank: Rows of F; all directions in which the data varies by default.
        noise_scale: σ.

    Returns:
        F in the dtype of the data (float32 for integers), computed in float64.

    Raises:
        ValueError: If there are fewer than two samples, or no such rank.
    """
    array = np.asarray(xs)
    if array.ndim < 2 or len(array) < 2:
        raise ValueError(f"a covariance needs two samples or more, got shape {array.shape}.")
    rows = array.reshape(len(array), -1).astype(np.float64)
    most = min(len(rows) - 1, rows.shape[1])
    if rank is not None:
        check_positive_int("rank", rank)
        if rank > most:
            raise ValueError(
                f"rank must be at most {most} for {len(rows)} samples of {rows.shape[1]} features, "
                f"got {rank}."
            )
    rows -= rows.mean(0)
    if len(rows) > rows.shape[1]:
        values, vectors = np.linalg.eigh(rows.T @ rows / (len(rows) - 1))
        deviations, directions = np.sqrt(np.maximum(values[::-1], 0)), vectors.T[::-1]
    else:
        _, singular, directions = np.linalg.svd(rows, full_matrices=False)
        deviations = singular / np.sqrt(len(rows) - 1)
    factor = noise_scale * deviations[: rank or most, None] * directions[: rank or most]
    dtype = array.dtype if np.issubdtype(array.dtype, np.floating) else np.float32
    return factor.astype(dtype)
