"""What the exact engine found in an encoder, what it will do, and why: EXPLAIN for Jacobians."""

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jax.extend.core import Literal

from jaxcae.jacobian import cancellation
from jaxcae.jacobian.batches import share_of
from jaxcae.jacobian.choose import (
    MEMORY_BUDGET,
    Choice,
    choose_for,
    directional_methods,
    predict_for,
)
from jaxcae.jacobian.cost import Cost
from jaxcae.jacobian.drawing import draw
from jaxcae.jacobian.jaxprs import Call, scope, shape_of, struct
from jaxcae.jacobian.low_noise import describe_form
from jaxcae.jacobian.program import Encoder, trace_encoder
from jaxcae.jacobian.proofs import EVERYTHING, facts_of
from jaxcae.jacobian.structure import Segment, Structure, read_structure
from jaxcae.jacobian.wording import PRODUCTS, cure, describe, si
from jaxcae.types import Encode, Params


@dataclass(frozen=True)
class FoundSegment:
    """A stretch of the encoder: its kind, shapes of one sample, and the operations in it.

    `kind` is `"affine"`, `"normalised"` (affine times a scalar of the sample), `"elementwise"`,
    `"low rank"` (elementwise but for a few numbers, as GroupNorm and squeeze gates) or `"opaque"`.
    Where branches run beside one another, a stretch goes from several arrays to several: `branches`
    lists the shapes in and out, and `in_shape` and `out_shape` hold the number of elements of all
    together. `scopes` are the names given by `jax.named_scope`, such as those of Flax Linen
    modules; `unproved` names the operations for which an opaque stretch is opaque, and `cure` says
    what would make it cheap. `drawing` shows the arrays that run beside one another.
    """

    number: int
    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    operations: tuple[str, ...]
    scopes: tuple[str, ...]
    branches: tuple[tuple[tuple[int, ...], ...], ...] = ()
    unproved: tuple[str, ...] = ()
    cure: str = ""
    drawing: str = ""


@dataclass(frozen=True)
class MethodCost:
    """The predicted price of a method for the whole batch, encoder included.

    `value` is that of the norms, `gradient` that of the norms and the gradient of their sum by the
    parameters. `verdict` says why it was chosen or lost.
    """

    method: str
    chunk_size: int | None
    value: Cost
    gradient: Cost
    chosen: bool
    verdict: str


@dataclass(frozen=True)
class Explanation:
    """The structure found, the plan, and what each exact method would cost; `str` is a table.

    `low_noise` says by which form `method="control_variate"` would estimate the norms, or why not.
    `cancellation` is the least fraction ‖J‖ of what hidden units contribute apart, over the first
    samples: below 0.1 the plan says which digits that costs. None without values, or another form.
    """

    batch: int
    features: int
    latent: int
    dtype: str
    memory_budget: int | float
    segments: tuple[FoundSegment, ...]
    plan: tuple[tuple[str, str], ...]
    methods: tuple[MethodCost, ...]
    low_noise: str = ""
    metric: tuple[int, ...] | None = None
    cancellation: float | None = None

    @property
    def chosen(self) -> MethodCost:
        """The method that `auto` runs."""
        return next(method for method in self.methods if method.chosen)

    def as_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Lay the explanation out in at most 100 columns."""
        sizes = f"{self.features} features and {self.latent} code units"
        title = f"‖J‖²_F of an encoder of {sizes}, batch {self.batch}, {self.dtype}"
        if self.metric is not None:
            shape = " × ".join(map(str, self.metric))
            title = f"{title.replace('‖J‖', '‖J Fᵀ‖', 1)}, F {shape}"
        segments = [(str(s.number), s.kind, _shapes(s), _told(s)) for s in self.segments]
        header: tuple[str, ...] = ("segment", "kind", "shape", "operations")
        if any(s.drawing for s in self.segments):
            header = ("segment", "", *header[1:])
            drawn = zip(segments, self.segments, strict=True)
            rows = [(number, s.drawing, *rest) for (number, *rest), s in drawn]
        else:
            rows = list(segments)
        costs = [
            (
                ("→ " if m.chosen else "  ") + m.method,
                si(m.value.flops),
                si(m.gradient.flops),
                si(m.gradient.bytes, "B"),
                m.verdict,
            )
            for m in self.methods
        ]
        parts = [
            title,
            _table(header, rows),
            _table(("plan", ""), self.plan),
            _table(("method", "FLOPs", "with gradient", "peak memory", "verdict"), costs),
            _table(("control_variate", self.low_noise), ()),
        ]
        return "\n\n".join(parts)


def explain(
    encode: Encode,
    params: Params,
    xs: Any,
    *,
    memory_budget: int | float = MEMORY_BUDGET,
    input_metric: Any = None,
) -> Explanation:
    """Explain what `method="auto"` does for this encoder and batch.

    Shapes are enough. Where parameters and batch have values, a few samples are run to tell whether
    hidden units cancel one another, which costs digits.

    Args:
        encode: As for `contractive_penalty`.
        params: Its parameters.
        xs: A batch, or its `jax.ShapeDtypeStruct`.
        memory_budget: Bytes of temporaries that value and gradient may take.
        input_metric: F of ‖J Fᵀ‖²; see `contractive_penalty`.

    Returns:
        An `Explanation`. FLOPs and bytes are counted in the traced programs (value, and value and
        gradient), not measured; XLA's own counts agree within the factors tested.

    Raises:
        TypeError: If samples or codes are not floating point, or the code is not one array.

    Example:
        >>> import jax, jaxcae
        >>> model = jaxcae.mlp((784, 256, 64))
        >>> params = model.init(jax.random.key(0))
        >>> plan = jaxcae.explain(model.encode, params, jax.numpy.zeros((128, 784)))
        >>> plan.chosen.method
        'chain'
    """
    encoder, xs = trace_encoder(encode, params, xs)
    encoder = encoder.with_metric(input_metric)
    batch, _ = share_of(struct(xs))
    choice = choose_for(encoder, batch, memory_budget)
    structure = choice.structure
    scopes = _scopes(structure)
    calls = structure.program.flat.calls
    cancels = cancellation.fraction(choice, encoder, xs)
    lost = cancellation.told(cancels, encoder.epsilon)
    return Explanation(
        batch=batch,
        features=structure.in_size,
        latent=structure.code_size,
        dtype=str(xs.dtype),
        memory_budget=memory_budget,
        metric=None if encoder.metric is None else encoder.metric.shape,
        segments=tuple(
            replace(_found(number, segment, _operations(segment, calls), within), drawing=drawing)
            for number, (segment, within, drawing) in enumerate(
                zip(structure.segments, scopes, draw(structure.segments), strict=True), 1
            )
        ),
        plan=(*describe(choice), *([("digits", lost)] if lost else [])),
        methods=tuple(_methods(choice, encoder, struct(xs), memory_budget)),
        low_noise=describe_form(read_structure(encoder.program)),
        cancellation=cancels,
    )


def _found(
    number: int, segment: Segment, operations: Iterable[str], scopes: Iterable[str]
) -> FoundSegment:
    ends = [tuple(shape_of(v) for v in arrays) for arrays in (segment.inputs, segment.outputs)]
    several = any(len(shapes) > 1 for shapes in ends)
    before, after = (
        ((segment.in_size,), (segment.out_size,)) if several else (ends[0][0], ends[1][0])
    )
    unproved = _unproved(segment) if segment.kind == "opaque" else {}
    return FoundSegment(
        number,
        _kind(segment),
        before,
        after,
        tuple(operations),
        tuple(scopes),
        tuple(ends) if several else (),
        tuple(unproved),
        cure(unproved.values()),
    )


def _kind(segment: Segment) -> str:
    if segment.rank is not None:
        return "low rank"
    return "normalised" if segment.scale is not None else segment.kind


def _unproved(segment: Segment) -> dict[str, str]:
    """Name what is neither affine nor elementwise in whatever it reads; with its primitive."""
    moving = set(segment.inputs)
    found: dict[str, str] = {}
    for eqn in segment.equations:
        inputs = [
            EVERYTHING if not isinstance(a, Literal) and a in moving else None for a in eqn.invars
        ]
        if any(fact is not None for fact in inputs):
            moving.update(eqn.outvars)
            facts = facts_of(eqn, inputs)
            if all(not fact.affine and not fact.elementwise for fact in facts):
                found[_operation(eqn)] = eqn.primitive.name
    return found


def _methods(
    choice: Choice, encoder: Encoder, xs: Any, memory_budget: int | float
) -> Iterable[MethodCost]:
    structure = choice.structure
    names = ("reverse",) if structure.acts else ("chain", *directional_methods(structure))

    def cost(method: str, chunk: int | None, gradient: bool, samples: int | None = None) -> Cost:
        return predict_for(method, encoder, xs, chunk, gradient, structure, choice.plan, samples)

    whole = {m: cost(m, None, True) for m in names}
    best = whole[choice.method].flops
    directions = {"forward": encoder.directions, "reverse": structure.code_size}
    for method in names:
        chosen = method == choice.method
        chunk_size = choice.chunk_size if chosen else None
        samples = choice.samples if chosen else None
        verdict = "least work" if chosen else f"{whole[method].flops / best:.3g}× the work"
        if method != "chain":
            verdict += f": {directions[method]} {PRODUCTS[method]} products a sample"
        elif not chosen:
            verdict += ": nothing affine or elementwise to gain by"
        if chunk_size is not None:
            unit = "samples" if method == "chain" else "directions"
            several = f" of {samples} samples" if samples is not None else ""
            verdict += (
                f"; {chunk_size} {unit}{several} at a time, since all at once would take "
                f"{si(whole[method].bytes, 'B')} of the {si(memory_budget, 'B')} allowed"
            )
            if not choice.fits:
                verdict += ", which even this exceeds"
        value, gradient = (cost(method, chunk_size, g, samples) for g in (False, True))
        yield MethodCost(method, chunk_size, value, gradient, chosen, verdict)


def _scopes(structure: Structure) -> list[Iterable[str]]:
    """Name for each segment the scope that holds it, or those that it runs through."""
    paths = {id(eqn): scope(eqn) for s in structure.segments for eqn in s.equations}
    for call in structure.program.flat.calls:  # inner calls come before the calls around them
        for eqn in call.equations:
            if id(eqn) in paths:
                paths[id(eqn)] = (*call.scope, *paths[id(eqn)])
    outer = len(_common(paths.values()))

    def within(segment: Segment) -> Iterable[str]:
        inner = [paths[id(eqn)][outer:] for eqn in segment.equations]
        whole = _common(inner)
        return ["/".join(whole)] if whole else dict.fromkeys(path[0] for path in inner if path)

    return [within(segment) for segment in structure.segments]


def _common(paths: Iterable[tuple[str, ...]]) -> list[str]:
    """Find the names that all paths begin with."""
    levels = zip(*paths, strict=False)
    return [names[0] for names in itertools.takewhile(lambda names: len({*names}) == 1, levels)]


def _operations(segment: Segment, calls: Sequence[Call]) -> dict[str, None]:
    """Name the operations, by function where a whole call lies in the segment."""
    inside = {id(eqn) for eqn in segment.equations}
    names: dict[int, str] = {id(eqn): _operation(eqn) for eqn in segment.equations}
    for call in calls:  # inner calls come before the calls around them
        members = {id(eqn) for eqn in call.equations} & inside
        whole = len(members) == len(call.equations)
        if whole and call.name.isidentifier() and not call.name.startswith("_"):
            names |= dict.fromkeys(members, call.name)
    return dict.fromkeys(names.values())


def _operation(eqn: Any) -> str:
    """Name an equation, by its function where it is a call with a derivative rule of its own."""
    body = eqn.params.get("call_jaxpr")
    name = getattr(getattr(body, "debug_info", None), "func_name", None)
    return name or eqn.primitive.name


def _shapes(found: FoundSegment) -> str:
    if not found.branches:
        return _arrow(found.in_shape, found.out_shape)
    before, after = (
        " + ".join("×".join(map(str, shape)) or "1" for shape in shapes)
        for shapes in found.branches
    )
    return f"{before} → {after}"


def _told(found: FoundSegment) -> str:
    told = ": ".join(filter(None, (", ".join(found.scopes), ", ".join(found.operations))))
    if found.unproved:
        told += f" (opaque for {', '.join(found.unproved)})"
    if found.cure:
        told += f" → {found.cure}"
    return told


def _arrow(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    def size(shape: tuple[int, ...]) -> str:
        return "×".join(map(str, shape)) or "1"

    return size(before) if before == after else f"{size(before)} → {size(after)}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]], columns: int = 100) -> str:
    """Align columns; the last one wraps."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=True)]
        wrapped = textwrap.wrap(line[-1], max(20, columns - indent)) or [""]
        text.append("  ".join([*cells, wrapped[0]]).rstrip())
        text.extend(" " * indent + more for more in wrapped[1:])
    return "\n".join(text)
