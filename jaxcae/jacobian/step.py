"""Vectors through one step of a recurrence: affine and elementwise stages, from the outputs back.

An elementwise stage and the affine one before it are passed as one matrix Σ_e K_e diag(slopes_e),
made once for all vectors, or apart: kernel by kernel, each vector scaled before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import Var

from jaxcae.jacobian import affine
from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.structure import Edge, Segment

Vectors = dict[Any, Any]
"""Cotangents, flat, by the variable that they belong to."""
Slopes = Sequence[tuple[Edge, Any]]
"""The diagonals of an elementwise stage; None for the identity."""


def add(vectors: Vectors, v: Any, cotangent: Any) -> None:
    """Add to the cotangent of a variable."""
    vectors[v] = vectors[v] + cotangent if v in vectors else cotangent


def pays(stages: Sequence[Segment], rows: int) -> bool:
    """Tell whether so many vectors pass the stages at less work than the step's own pullback."""
    work = 0.0
    for i, stage in enumerate(stages):
        if stage.kind == "elementwise":
            work += 2.0 * rows * sum(stage.in_sizes[edge.source] for edge in stage.edges)
            continue
        last = stages[i + 1] if i + 1 < len(stages) else None
        for blocks, n in zip(affine.recipe(stage), stage.in_sizes, strict=True):
            dense = {s for s, b in enumerate(blocks) if b is not None and not b.is_identity}
            work += n * min(_joined_work(stage, dense, last, rows), _work(stage, dense, rows))
    return work < rows * flops([eqn for stage in stages for eqn in stage.equations])


def _work(first: Segment, dense: set[int], rows: int) -> float:
    """Count what each element that goes in takes, kernel by kernel."""
    return 2.0 * rows * sum(first.out_sizes[s] for s in dense)


def _joined_work(first: Segment, dense: set[int], last: Segment | None, rows: int) -> float:
    """Count what it takes with one matrix for each array that comes out, made first."""
    if last is None:
        return float("inf")
    touching = [edge for edge in last.edges if edge.source in dense]
    made = sum(first.out_sizes[edge.source] for edge in touching)
    return 2.0 * (made + rows * sum(last.out_sizes[t] for t in {e.target for e in touching}))


class Stages:
    """The stages of a step with their kernels, prepared for so many vectors at a time."""

    def __init__(
        self, stages: Sequence[Segment], known: Mapping[Var, Any], rows: int, dtype: Any
    ) -> None:
        self.stages, self.rows, self.dtype = stages, rows, dtype
        self.kernels = [  # by affine stage, array in and array out
            [[self._kernel(block, known) for block in blocks] for blocks in affine.recipe(stage)]
            for stage in stages
            if stage.kind == "affine"
        ]

    def _kernel(self, block: Any, known: Mapping[Var, Any]) -> Any:
        """Compute a block: None for 0, the number 1 for the identity."""
        if block is None:
            return None
        return 1.0 if block.is_identity else block.matrix(known).astype(self.dtype)

    def pull(self, vectors: Vectors, slopes: Sequence[Sequence[Any]]) -> Vectors:
        """Pull vectors at the outputs back to the inputs, by the slopes of elementwise stages."""
        left, kernels, stages = list(slopes), list(self.kernels), list(self.stages)
        while stages:
            last = stages.pop()
            if last.kind == "affine":
                vectors = _through_kernels(last, kernels.pop(), vectors)
                continue
            own = iter(left.pop())
            edges = [(edge, None if edge.is_identity else next(own)) for edge in last.edges]
            if stages:
                vectors = self._pair(stages.pop(), kernels.pop(), last, edges, vectors)
            else:
                vectors = _through_edges(last, edges, vectors)
        return vectors

    def _pair(
        self,
        first: Segment,
        kernels: list[list[Any]],
        last: Segment,
        edges: Slopes,
        vectors: Vectors,
    ) -> Vectors:
        """Pass an elementwise stage and the affine one before it, by the cheaper of two ways."""
        passed: Vectors | None = None
        found: Vectors = {}
        for blocks, v in zip(kernels, first.inputs, strict=True):
            dense = {s for s, block in enumerate(blocks) if _is_matrix(block)}
            if _joined_work(first, dense, last, self.rows) < _work(first, dense, self.rows):
                for t, w in enumerate(last.outputs):
                    if w in vectors:
                        for block in _joined(blocks, edges, t):
                            add(found, v, _times(block, vectors[w]))
            else:
                passed = passed or _through_edges(last, edges, vectors)
                for block, w in zip(blocks, first.outputs, strict=True):
                    if block is not None and w in passed:
                        add(found, v, _times(block, passed[w]))
        return found


def _joined(blocks: list[Any], edges: Slopes, target: int) -> list[Any]:
    """Add up what leads from one array in to one out: a matrix, a diagonal, or both."""
    matrix = diagonal = None
    for edge, slope in edges:
        block = blocks[edge.source]
        if edge.target != target or block is None:
            continue
        if _is_matrix(block):
            part = block if slope is None else block * slope[None, :]
            matrix = part if matrix is None else matrix + part
        else:
            part = 1.0 if slope is None else slope
            diagonal = part if diagonal is None else diagonal + part
    return [part for part in (matrix, diagonal) if part is not None]


def _is_matrix(block: Any) -> bool:
    return getattr(block, "ndim", 0) == 2


def _times(block: Any, vector: Any) -> Any:
    return block @ vector if _is_matrix(block) else block * vector


def _through_edges(stage: Segment, edges: Slopes, vectors: Vectors) -> Vectors:
    found: Vectors = {}
    for edge, slope in edges:
        v, w = stage.inputs[edge.source], stage.outputs[edge.target]
        if w in vectors:
            add(found, v, vectors[w] if slope is None else slope * vectors[w])
    return found


def _through_kernels(stage: Segment, kernels: list[list[Any]], vectors: Vectors) -> Vectors:
    found: Vectors = {}
    for v, blocks in zip(stage.inputs, kernels, strict=True):
        for block, w in zip(blocks, stage.outputs, strict=True):
            if block is not None and w in vectors:
                add(found, v, _times(block, vectors[w]))
    return found
