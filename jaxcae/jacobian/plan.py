"""Plan ‖J‖²_F of a chain: sweep in from both ends, and meet where it is cheapest.

Write the encoder as a chain of segments, so that J = J_N … J_2 J_1. A *sweep* carries what one end
of the chain contributes up to a position of width s, in one of three forms:

- `diagonal`: a vector of s, while only elementwise segments (or none) have been passed;
- `stack`: n vectors of s, the images of the n basis vectors at that end;
- `gram`: the s × s inner products of a stack, for which n no longer matters.

With T from the input side and R from the output side, ‖J‖²_F = ‖R Tᵀ‖²_F = ⟨RᵀR, TᵀT⟩. Where
both are shared by the whole batch and meet at an elementwise segment of slopes m, that is
mᵀ(TᵀT ∘ RᵀR)m: neither d nor k appears in the cost of a sample. An elementwise segment of several
arrays has a diagonal block, an *edge*, for each pair of arrays in and out that touch, and m and the
two grams run over the edges. Edges whose slope is 1 everywhere (an array that passes) are summed
once a batch: with A₀ what passes along them, ‖J‖² = ‖A₀‖² + 2mᵀc + mᵀ(TᵀT ∘ RᵀR)m.

Each end is the identity or a given matrix: T starts from an input metric F (r, d), R from an output
matrix A (m, k), and the result is ‖A J Fᵀ‖²_F.

Costs are floating-point operations of value and gradient: a matrix product costs three times its
value (one product forward, two backward), a symmetric one twice (less what is copied).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxcae.jacobian import affine
from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.groups import Groups, find_groups
from jaxcae.jacobian.local import Local, find_local
from jaxcae.jacobian.low_rank import LowRank
from jaxcae.jacobian.products import HALVED_FROM
from jaxcae.jacobian.structure import Segment, Structure

Form = Literal["diagonal", "stack", "gram"]
Move = Literal["pass", "scale", "matrix", "operator", "gram"]
Side = Literal["input", "output"]

_PRODUCT, _SYMMETRIC = 3.0, 2.0


class Sweep(NamedTuple):
    """The cheapest way to carry one end of the chain to a position in some form.

    Attributes:
        form: What is carried.
        rows: Number of vectors in a stack.
        shared: Whether it is the same for every sample.
        once: Cost once a batch.
        each: Cost for each sample.
        moves: How to get there: each move passes one segment (`"pass"`: one whose kernel is
            the identity), except `"gram"`, which turns the
            stack into its gram on the spot.
        start: What it started from: a diagonal, or a given stack.
    """

    form: Form
    rows: int
    shared: bool
    once: float
    each: float
    moves: tuple[Move, ...]
    start: Literal["diagonal", "stack"] = "diagonal"

    def then(self, move: Move, form: Form, cost: float, *, rows: int, shared: bool) -> "Sweep":
        """Extend the sweep by one move, whose cost is paid once if its result is shared."""
        once, each = (cost, 0.0) if shared else (0.0, cost)
        moves = (*self.moves, move)
        return Sweep(form, rows, shared, self.once + once, self.each + each, moves, self.start)


class Plan(NamedTuple):
    """Two sweeps that meet.

    Attributes:
        from_input: The sweep from the features inwards.
        from_output: The sweep from the code inwards.
        position: Segments left of the meeting point.
        across: Whether an elementwise segment stands between the two (both grams shared).
        once: Cost once a batch, in operations of value and gradient.
        each: Cost for each sample.
        batch: The size it was made for.
        local: The band of units that interact, if only they are met across the segment.
        groups: Directions at one end that are taken together.
    """

    from_input: Sweep
    from_output: Sweep
    position: int
    across: bool
    once: float
    each: float
    batch: int = 1
    local: Local | None = None
    groups: Groups | None = None

    def cost(self, batch: int) -> float:
        """Operations for a batch, value and gradient."""
        return self.once + batch * self.each


class End(NamedTuple):
    """What a sweep starts from: the identity, or a given matrix, the same for all samples.

    Attributes:
        rows: Rows of the matrix.
        is_diagonal: Whether it is diagonal (the identity is).
    """

    rows: int
    is_diagonal: bool = True


def make_plan(
    structure: Structure, batch: int, from_input: End | None = None, from_output: End | None = None
) -> Plan:
    """Find the cheapest plan for a batch of that size; ends that are None are the identity."""
    plans = [_plan_between(structure, batch, from_input, from_output)]
    if any(segment.rank is not None for segment in structure.segments):
        return plans[0]._replace(batch=batch)
    if from_input is None and from_output is None:
        for groups in groups_of(structure):
            end = End(groups.rows, is_diagonal=False)
            ends = (end, None) if groups.side == "input" else (None, end)
            plans.append(_plan_between(structure, batch, *ends)._replace(groups=groups))
        plans += _across_bands(structure)
    return min(plans, key=lambda plan: plan.cost(batch))._replace(batch=batch)


def groups_of(structure: Structure) -> list[Groups]:
    """List the groups at each end, found once."""
    if not structure.segments:
        return []
    memory = structure.segments[0].memory
    if "groups" not in memory:
        memory["groups"] = find_groups(structure)
    return memory["groups"]


def _across_bands(structure: Structure) -> list[Plan]:
    """Meet across elementwise segments whose units interact with their neighbours alone."""
    found = []
    for position, segment in enumerate(structure.segments):
        if segment.kind != "elementwise":
            continue
        if "local" not in segment.memory:
            segment.memory["local"] = find_local(structure, position)
        local = segment.memory["local"]
        if local is not None:
            ends = (structure.in_size, structure.code_size)
            sweeps = [Sweep("diagonal", rows, True, 0.0, 0.0, ()) for rows in ends]
            once, each = _PRODUCT * local.once(structure), _PRODUCT * 2 * local.block
            plan = Plan(sweeps[0], sweeps[1], position, True, once, each)
            found.append(plan._replace(local=local))
    return found


def _plan_between(
    structure: Structure, batch: int, from_input: End | None, from_output: End | None
) -> Plan:
    segments = structure.segments
    ranks = [i for i, segment in enumerate(segments) if segment.rank is not None]
    left = _sweeps(segments, "input", from_input or End(structure.in_size), batch)
    right = _sweeps(segments[::-1], "output", from_output or End(structure.code_size), batch)[::-1]
    meetings = []
    for position in range(len(segments) + 1):
        width = segments[position].in_size if position < len(segments) else structure.code_size
        if ranks not in ([], [position]):
            continue
        for a in left[position].values():
            if not ranks:
                meetings += [_meet(a, b, position, width) for b in right[position].values()]
            if position < len(segments) and segments[position].kind == "elementwise":
                meetings += [
                    _meet_across(a, b, position, segments[position])
                    for b in right[position + 1].values()
                    if a.shared and b.shared and _can_meet_across(a, b, segments[position])
                ]
    return min(meetings, key=lambda plan: plan.cost(batch))


def _sweeps(
    segments: Sequence[Segment], side: Side, end: End, batch: int
) -> list[dict[Form, Sweep]]:
    """List, for each position from that side, the best sweep in each form that can reach it."""
    form: Literal["diagonal", "stack"] = "diagonal" if end.is_diagonal else "stack"
    start = Sweep(form, end.rows, True, 0.0, 0.0, (), form)
    best: dict[Form, Sweep] = {form: start}
    if form == "stack" and segments:
        width = segments[0].in_size if side == "input" else segments[0].out_size
        best["gram"] = _to_gram(start, width)
    positions = [best]
    for segment in segments:
        reached: dict[Form, Sweep] = {}
        options = [o for sweep in best.values() for o in _pass(sweep, segment, side)]
        width = segment.out_size if side == "input" else segment.in_size
        options += [_to_gram(o, width) for o in options if o.form == "stack"]
        for o in options:
            if o.form not in reached or _total(o, batch) < _total(reached[o.form], batch):
                reached[o.form] = o
        best = reached
        positions.append(best)
    return positions


def _total(sweep: Sweep, batch: int) -> float:
    return sweep.once + batch * sweep.each


def _pass(sweep: Sweep, segment: Segment, side: Side) -> list[Sweep]:
    """List the ways to carry a sweep through a segment."""
    if segment.kind == "affine" and affine.is_identity(segment):
        return [sweep.then("pass", sweep.form, 0.0, rows=sweep.rows, shared=sweep.shared)]
    inside, outside = segment.in_size, segment.out_size
    if side == "output":
        inside, outside = outside, inside
    rows = {"diagonal": 1, "stack": sweep.rows, "gram": inside}[sweep.form]
    if segment.is_diagonal:
        cost = _PRODUCT * rows * inside
        return [sweep.then("scale", sweep.form, cost, rows=sweep.rows, shared=False)]
    if segment.kind == "elementwise":
        rows = {"diagonal": inside, "stack": sweep.rows, "gram": inside + outside}[sweep.form]
        width = sum(segment.in_sizes[e.source] for e in segment.edges)
        form: Form = "gram" if sweep.form == "gram" else "stack"
        kept = inside if sweep.form == "diagonal" else sweep.rows
        return [sweep.then("scale", form, _PRODUCT * rows * width, rows=kept, shared=False)]

    options = []
    apply = flops(segment.linear)
    shared = sweep.shared and segment.kind == "affine"
    form = "gram" if sweep.form == "gram" else "stack"
    columns = {"diagonal": inside, "stack": sweep.rows, "gram": inside + outside}[sweep.form]
    stack_rows = inside if sweep.form == "diagonal" else sweep.rows
    if side == "output" or segment.forward_mode:
        cost = _PRODUCT * columns * apply
        options.append(sweep.then("operator", form, cost, rows=stack_rows, shared=shared))
    if segment.kind == "affine":
        kernel = _PRODUCT * affine.kernel_flops(segment)
        product = 2.0 * inside * outside * columns
        if sweep.form == "diagonal":  # scales the kernel's rows, if anything
            product = 0.0 if sweep.shared else float(inside * outside)
        option = sweep.then("matrix", form, _PRODUCT * product, rows=stack_rows, shared=shared)
        options.append(option._replace(once=option.once + kernel))
    return options


def _to_gram(stack: Sweep, width: int) -> Sweep:
    return stack.then(
        "gram", "gram", _gram_cost(stack, width), rows=stack.rows, shared=stack.shared
    )


def _gram_cost(stack: Sweep, width: int) -> float:
    copied = 0.25 if stack.shared and width >= HALVED_FROM else 0.0
    return (_SYMMETRIC - copied) * 2.0 * stack.rows * width**2


def _meet(a: Sweep, b: Sweep, position: int, width: int) -> Plan:
    """Cost ⟨·, ·⟩ of two sweeps at a position of that width."""
    forms = {a.form, b.form}
    rows = [sweep.rows for sweep in (a, b) if sweep.form == "stack"]
    if forms == {"stack"}:
        cost = _PRODUCT * (2.0 * a.rows * b.rows * width)
    elif forms == {"stack", "gram"}:
        cost = _SYMMETRIC * 2.0 * rows[0] * width**2
    elif forms == {"gram"}:
        cost = _PRODUCT * 2.0 * width**2
    else:
        cost = _PRODUCT * 2.0 * width
        for sweep in (a, b):
            if sweep.form == "stack":  # its squared column norms
                norms = _PRODUCT * 2.0 * sweep.rows * width
                if sweep.shared:
                    return _plan(a, b, position, False, norms, cost)
                cost += norms
    if a.shared and b.shared:
        return _plan(a, b, position, False, cost, 0.0)
    return _plan(a, b, position, False, 0.0, cost)


def _can_meet_across(a: Sweep, b: Sweep, segment: Segment) -> bool:
    if segment.rank is not None:  # an end that is not a matrix is the identity
        return {a.form, b.form} <= {"gram", "diagonal"}
    if segment.is_diagonal:
        return a.form == b.form == "gram"
    # Both grams, or both matrices, from which what passes unchanged needs no gram.
    return (a.form == "gram") == (b.form == "gram")


def _meet_across(a: Sweep, b: Sweep, position: int, segment: Segment) -> Plan:
    if segment.is_diagonal:
        width = segment.in_size
        hadamard, form = _PRODUCT * width**2, _SYMMETRIC * 2.0 * width**2
        if segment.rank is not None:
            form += _PRODUCT * _rank_cost(segment.rank, [a, b], width)
        return _plan(a, b, position, True, hadamard, form)
    sizes = segment.in_sizes
    own = [edge for edge in segment.edges if not edge.is_identity]
    passing = sum(sizes[edge.source] for edge in segment.edges if edge.is_identity)
    edges = sum(sizes[edge.source] for edge in own)
    once, each = _PRODUCT * edges**2, _SYMMETRIC * 2.0 * edges**2
    if a.form == "gram":
        once += _PRODUCT * (2.0 * edges * passing + passing**2)
    else:
        inside = sum(sizes[i] for i in {edge.source for edge in own})
        outside = sum(segment.out_sizes[j] for j in {edge.target for edge in own})
        once += _gram_cost(a, inside) + _gram_cost(b, outside)
        if passing:
            stacks = [s for s in (a, b) if s.form == "stack"]
            product = 2.0 * a.rows * b.rows * passing if len(stacks) == 2 else 0.0
            once += _PRODUCT * (product + 2.0 * a.rows * b.rows * inside)
    return _plan(a, b, position, True, once, each)


def _rank_cost(rank: LowRank, sweeps: Sequence[Sweep], width: int) -> float:
    """Count the products of both sides' columns, and of all pairs of them."""
    products = sum(2.0 * width**2 for sweep in sweeps if sweep.form == "gram")
    return rank.columns * (products + 4.0 * rank.columns * rank.blocks * width)


def _plan(a: Sweep, b: Sweep, position: int, across: bool, once: float, each: float) -> Plan:
    return Plan(a, b, position, across, a.once + b.once + once, a.each + b.each + each)
