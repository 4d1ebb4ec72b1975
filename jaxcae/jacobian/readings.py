"""The ways to read a program as segments, of which the cheaper one is planned."""

from jaxcae.jacobian.jaxprs import calls_primitive
from jaxcae.jacobian.low_rank import find_low_rank
from jaxcae.jacobian.program import Program, of_sample
from jaxcae.jacobian.proofs import prove
from jaxcae.jacobian.structure import Segment, Structure, cut, read_structure


def readings(program: Program) -> list[Structure]:
    """List the structures that a program has: stages, and one stretch of diagonal and low rank."""
    structure = read_structure(program)
    other = _around_low_rank(structure)
    return [structure] if other is None else [structure, other]


def _around_low_rank(structure: Structure) -> Structure | None:
    """Read a program as a matrix, a stretch that is no matrix, and a matrix."""
    kinds = [s.kind for s in structure.segments if s.kind != "affine"]
    if structure.acts or structure.loops or kinds in ([], ["elementwise"]):
        return None
    equations = of_sample(structure.program)
    if any(calls_primitive(eqn, "custom_vjp_call") for eqn in equations):
        return None
    pieces = cut(equations, structure.program.sample, structure.program.code)
    first, last = 0, len(pieces)
    while first < last and prove(*pieces[first]).affine:
        first += 1
    while first < last and prove(*pieces[last - 1]).affine:
        last -= 1
    if first == last:
        return None

    def joined(start: int, stop: int) -> Segment:
        equations = tuple(eqn for piece in pieces[start:stop] for eqn in piece[0])
        return Segment("affine", equations, (pieces[start][1],), (pieces[stop - 1][2],))

    middle = joined(first, last)
    (source,), (sink,) = middle.inputs, middle.outputs
    found = find_low_rank(middle.equations, source, sink)
    if found is None:
        return None
    segments = [Segment("elementwise", middle.equations, (source,), (sink,), rank=found)]
    if first:
        segments.insert(0, joined(0, first))
    if last < len(pieces):
        segments.append(joined(last, len(pieces)))
    return structure._replace(segments=tuple(segments))
