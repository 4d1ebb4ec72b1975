"""A plan in words."""

import math
from collections.abc import Iterable

from jaxcae.jacobian.choose import Choice
from jaxcae.jacobian.plan import Form, Sweep
from jaxcae.jacobian.structure import Segment

PRODUCTS = {"forward": "Jacobian-vector", "reverse": "vector-Jacobian"}


_CURES = {
    "dot_general": "two factors depend on the sample: one probe (method='hutchinson') is cheap",
    "conv_general_dilated": "two factors depend on the sample: one probe is cheap",
    "while": "a lax.scan of fixed length can be read",
    "custom_vjp_call": "a jax.custom_jvp rule that is linear in the direction can be read",
    "reduce_max": "a mean in place of the maximum is affine",
    "reduce_window_max": "average pooling is affine",
    "sort": "no cheaper exact form is known",
    "exp": "divided by a sum, it is a softmax: elementwise gates (a sigmoid) can be read",
}
"""What to change where an operation could not be proved, by its primitive."""


def cure(primitives: Iterable[str]) -> str:
    """Say what would make an opaque stretch cheap."""
    names = dict.fromkeys(primitives)
    found = dict.fromkeys(_CURES[name] for name in names if name in _CURES)
    if found:
        return "; ".join(found)
    name = next(iter(names), "")
    return f"if {name} is linear or elementwise, say so by jaxcae.register" if name else ""


def describe(choice: Choice) -> Iterable[tuple[str, str]]:
    """Say what is carried from each end, and how the two meet."""
    plan, segments = choice.plan, choice.structure.segments
    if not choice.structure.depends:
        yield "result", "0: the code does not depend on the sample"
    elif choice.method != "chain":
        yield "directions", f"one {PRODUCTS[choice.method]} product each, summed squares"
    else:
        n = len(segments)
        if plan.groups is not None:
            what = {"input": "features", "output": "code units"}[plan.groups.side]
            yield (
                "groups",
                f"{len(plan.groups.numbers)} {what} in {plan.groups.rows} groups, whose "
                "windows have nothing in common",
            )
        yield "from the input", _sweep(plan.from_input, segments, range(n), "input")
        yield "from the output", _sweep(plan.from_output, segments, range(n)[::-1], "output")
        yield "meet", _meeting(choice)
        yield "work", f"{si(plan.once)}FLOP once a batch, {si(plan.each)}FLOP a sample"


def _sweep(sweep: Sweep, segments: tuple[Segment, ...], order: Iterable[int], side: str) -> str:
    if not sweep.moves:
        return "nothing to carry"
    indices = iter(order)
    phrases: dict[bool, list[str]] = {True: [], False: []}  # shared by the batch, or not
    form: Form = sweep.start
    shared, width = True, 0
    for move in sweep.moves:
        if move == "gram":
            phrases[shared].append(f"its gram ({width} × {width})")
            form = "gram"
            continue
        i = next(indices)
        segment, at = segments[i], i + 1
        shared = shared and segment.kind == "affine"
        sizes = segment.in_size, segment.out_size
        entry, width = sizes if side == "input" else sizes[::-1]
        if move == "pass":
            continue
        if move == "scale":
            phrases[shared].append(f"slopes of {at}")
        elif move == "matrix":
            phrases[shared].append(f"kernel {at}" if form == "diagonal" else f"× kernel {at}")
        else:
            count = {"diagonal": entry, "stack": sweep.rows, "gram": entry + width}[form]
            phrases[shared].append(f"{count} products through {at}")
        if move != "scale" and form == "diagonal":
            form = "stack"
    once = [", ".join(phrases[True]) + " (once a batch)"] if phrases[True] else []
    each = [", ".join(phrases[False]) + " (each sample)"] if phrases[False] else []
    return "; ".join(once + each)


def _meeting(choice: Choice) -> str:
    plan, at = choice.plan, choice.plan.position
    if plan.local is not None:
        band = plan.local
        return (
            f"at {at + 1}, whose units interact at {2 * len(band.offsets) - 1} offsets alone, by "
            f"their windows: {math.prod(band.extent)} places of {band.features} features"
        )
    rank = choice.structure.segments[at].rank if plan.across else None
    if rank is not None:
        several = f", each in {rank.blocks} blocks" if rank.blocks > 1 else ""
        return (
            f"at {at + 1}, whose Jacobian D + UVᵀ, with {rank.columns} columns{several}, and the "
            "grams give dᵀ(G ∘ H)d + 2 Σ uᵀHDGv + Σ (uᵀHu′)(vᵀGv′)"
        )
    if plan.across:
        return (
            f"at {at + 1}, whose slopes m and the grams G and H give mᵀ(G ∘ H)m: "
            "neither features nor code units count in a sample's work"
        )
    forms = frozenset({plan.from_input.form, plan.from_output.form})
    names = {
        frozenset({"diagonal"}): "the sum of squares",
        frozenset({"diagonal", "stack"}): "the stack's squared column norms, weighted",
        frozenset({"diagonal", "gram"}): "the gram's diagonal, weighted",
        frozenset({"stack"}): "‖R Tᵀ‖²_F, the product of two stacks",
        frozenset({"stack", "gram"}): "Σ rᵀ G r over the rows r of the stack",
        frozenset({"gram"}): "⟨G, H⟩, the sum of elementwise products",
    }
    return f"after segment {at}: {names[forms]}"


def si(number: float, unit: str = "") -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"
