"""Directions that share no element: groups of them cost one product each, exactly.

Where the windows of code units i and j do not overlap, the rows e_iᵀJ and e_jᵀJ have no entry in
common, so ‖(e_i + e_j)ᵀJ‖² = ‖e_iᵀJ‖² + ‖e_jᵀJ‖². The same holds for columns, of features that
reach no code unit in common. With A the 0/1 matrix of such groups, ‖J‖² = ‖A J‖² (or ‖J Aᵀ‖²): a
given matrix at one end, as any metric is (Curtis, Powell, Reid 1974, doi:10.1093/imamat/13.1.117).
"""

from typing import Literal, NamedTuple

import numpy as np

from jaxcae.jacobian.reach import follow, group, touching, whole
from jaxcae.jacobian.structure import Structure


class Groups(NamedTuple):
    """Groups of the directions at one end.

    Attributes:
        side: Whose directions: features or code units.
        numbers: The group of each.
    """

    side: Literal["input", "output"]
    numbers: np.ndarray

    @property
    def rows(self) -> int:
        """How many groups there are."""
        return int(self.numbers.max()) + 1

    @property
    def matrix(self) -> np.ndarray:
        """The matrix A, (groups, directions)."""
        return (np.arange(self.rows)[:, None] == self.numbers[None, :]).astype(np.float32)


def find_groups(structure: Structure) -> list[Groups]:
    """Find the groups at each end; none where no two directions can share one."""
    if not structure.segments:
        return []
    entry, exit_ = structure.program.sample, structure.program.code
    equations = [eqn for segment in structure.segments for eqn in segment.equations]
    shape = structure.program.x.shape
    found = follow(equations, whole(shape), entry).get(exit_)
    if found is None or not found.axes:
        return []
    axes = found.axes.items()
    by_code = {b: touching(axis.matrix) for b, axis in axes}
    by_features = {axis.source: touching(axis.matrix.T) for _, axis in axes}
    ends = [
        Groups("output", group(found.shape, by_code)),
        Groups("input", group(shape, by_features)),
    ]
    return [groups for groups in ends if groups.rows < len(groups.numbers)]
