"""Branches drawn beside the segments, a line for each array that runs along, as of a history."""

from collections.abc import Sequence

from jax.extend.core import Var

from jaxcae.jacobian.structure import Segment


def draw(segments: Sequence[Segment]) -> list[str]:
    """Draw each segment's arrays: `├─┐` where one becomes two, `│ ●` where the first one waits.

    Empty strings where no arrays run beside one another.
    """
    if all(len(s.inputs) == len(s.outputs) == 1 for s in segments):
        return [""] * len(segments)
    return [_line(segment.inputs, segment.outputs) for segment in segments]


def _line(before: Sequence[Var], after: Sequence[Var]) -> str:
    few, many = sorted((len(before), len(after)))
    if few == many:
        return " ".join("│" if v in before else "●" for v in after)
    middle, end = ("┬", "┐") if len(after) == many else ("┴", "┘")
    return "│ " * (few - 1) + "├─" + f"{middle}─" * (many - few - 1) + end
