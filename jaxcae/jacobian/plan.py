"""Plan ‖J‖²_F of a chain: sweep in from both ends, and meet where it is cheapest.

Write the encoder as a chain of segments, so that J = J_N … J_2 J_1. A *sweep* carries what one end
of the chain contributes up to a position of width s, in one of three forms:

- `diagonal`: a vector of s, while only elementwise segments (or none) have been passed;
- `stack`: n vectors of s, the images of the n basis vectors at that end;
- `gram`: the s × s inner products of a stack, for which n no longer matters.

With T from the input side and R from the output side, ‖J‖²_F = ‖R Tᵀ‖²_F = ⟨RᵀR, TᵀT⟩. Where
both grams are shared by the whole batch and meet at an elementwise segment of slopes m, that is
mᵀ(TᵀT ∘ RᵀR)m: neither d nor k appears in the cost of a sample.

Costs are floating-point operations of value and gradient: a matrix product costs three times its
value (one product forward, two backward), a symmetric one twice (less what is copied).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxcae.jacobian import affine
from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.products import HALVED_FROM
from jaxcae.jacobian.structure import Segment, Structure

Form = Literal["diagonal", "stack", "gram"]
Move = Literal["scale", "matrix", "operator", "gram"]
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
        moves: How to get there: each move passes one segment, except `"gram"`, which turns the
            stack into its gram on the spot.
    """

    form: Form
    rows: int
    shared: bool
    once: float
    each: float
    moves: tuple[Move, ...]

    def then(self, move: Move, form: Form, cost: float, *, rows: int, shared: bool) -> "Sweep":
        """Extend the sweep by one move, whose cost is paid once if its result is shared."""
        once, each = (cost, 0.0) if shared else (0.0, cost)
        moves = (*self.moves, move)
        return Sweep(form, rows, shared, self.once + once, self.each + each, moves)


class Plan(NamedTuple):
    """Two sweeps that meet.

    Attributes:
        from_input: The sweep from the features inwards.
        from_output: The sweep from the code inwards.
        position: Segments left of the meeting point.
        across: Whether an elementwise segment stands between the two (both grams shared).
        once: Cost once a batch, in operations of value and gradient.
        each: Cost for each sample.
    """

    from_input: Sweep
    from_output: Sweep
    position: int
    across: bool
    once: float
    each: float

    def cost(self, batch: int) -> float:
        """Operations for a batch, value and gradient."""
        return self.once + batch * self.each


def make_plan(structure: Structure, batch: int) -> Plan:
    """Find the cheapest plan for a batch of that size."""
    segments = structure.segments
    left = _sweeps(segments, "input", structure.in_size, batch)
    right = _sweeps(segments[::-1], "output", structure.code_size, batch)[::-1]
    meetings = []
    for position in range(len(segments) + 1):
        width = segments[position].in_size if position < len(segments) else structure.code_size
        for a in left[position].values():
            meetings += [_meet(a, b, position, width) for b in right[position].values()]
            if position < len(segments) and segments[position].kind == "elementwise":
                meetings += [
                    _meet_across(a, b, position, width)
                    for b in right[position + 1].values()
                    if a.form == b.form == "gram" and a.shared and b.shared
                ]
    return min(meetings, key=lambda plan: plan.cost(batch))


def _sweeps(
    segments: Sequence[Segment], side: Side, size: int, batch: int
) -> list[dict[Form, Sweep]]:
    """List, for each position from that side, the best sweep in each form that can reach it."""
    best: dict[Form, Sweep] = {"diagonal": Sweep("diagonal", size, True, 0.0, 0.0, ())}
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
    inside, outside = segment.in_size, segment.out_size
    if side == "output":
        inside, outside = outside, inside
    rows = {"diagonal": 1, "stack": sweep.rows, "gram": inside}[sweep.form]
    if segment.kind == "elementwise":
        cost = _PRODUCT * rows * inside
        return [sweep.then("scale", sweep.form, cost, rows=sweep.rows, shared=False)]

    options = []
    apply = flops(segment.equations)
    shared = sweep.shared and segment.kind == "affine"
    form: Form = "gram" if sweep.form == "gram" else "stack"
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
    copied = 0.25 if stack.shared and width >= HALVED_FROM else 0.0
    cost = (_SYMMETRIC - copied) * 2.0 * stack.rows * width**2
    return stack.then("gram", "gram", cost, rows=stack.rows, shared=stack.shared)


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


def _meet_across(a: Sweep, b: Sweep, position: int, width: int) -> Plan:
    hadamard, form = _PRODUCT * width**2, _SYMMETRIC * 2.0 * width**2
    return _plan(a, b, position, True, hadamard, form)


def _plan(a: Sweep, b: Sweep, position: int, across: bool, once: float, each: float) -> Plan:
    return Plan(a, b, position, across, a.once + b.once + once, a.each + b.each + each)
