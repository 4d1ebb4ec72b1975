"""Split a stretch with branches into stages between *sets* of arrays, affine and elementwise.

Between two sets that each carry everything that depends on the sample, the Jacobian is one matrix
between concatenated arrays. The stages alternate: as many equations as are affine in the set at
hand, then as many as are elementwise in it, each result depending on the same position of several
arrays (a gate, a sum, a maximum). Skips, concatenations, parallel branches, gates and maxout are
all of this form; what needs anything else is left to the caller as opaque.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import variables
from jaxcae.jacobian.proofs import EVERYTHING, Fact, facts_of
from jaxcae.jacobian.rules import floating


class Stage(NamedTuple):
    """Equations between two sets of arrays, all of one kind; arrays may pass unchanged."""

    kind: Literal["affine", "elementwise"]
    equations: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]


def split(equations: Sequence[JaxprEqn], source: Var, sink: Var) -> list[Stage] | None:
    """Split a stretch from one array to another into stages; None where something is opaque."""
    return split_between(equations, (source,), (sink,))


def split_between(
    equations: Sequence[JaxprEqn], sources: Sequence[Var], sinks: Sequence[Var]
) -> list[Stage] | None:
    """Split a stretch from one set of arrays to another; a sink may be a source."""
    return _Splitter(equations, sources, sinks).split()


class _Splitter:
    def __init__(
        self, equations: Sequence[JaxprEqn], sources: Sequence[Var], sinks: Sequence[Var]
    ) -> None:
        self.sources, self.sinks = list(sources), set(sinks)
        moving = {*sources, *(v for eqn in equations for v in eqn.outvars)}
        self.order = {id(eqn): i for i, eqn in enumerate(equations)}
        self.reads = {
            id(eqn): [v for v in dict.fromkeys(variables(eqn.invars)) if v in moving]
            for eqn in equations
        }
        self.readers: dict[Var, list[JaxprEqn]] = {}
        for eqn in equations:
            for v in self.reads[id(eqn)]:
                self.readers.setdefault(v, []).append(eqn)
        # How many equations still to come read a variable, and how many arrays one still lacks.
        self.wanted = {v: len(eqns) for v, eqns in self.readers.items()}
        for sink in self.sinks:
            self.wanted[sink] = self.wanted.get(sink, 0) + 1
        self.lacks = {id(eqn): len(self.reads[id(eqn)]) for eqn in equations}
        self.left = len(equations)

    def split(self) -> list[Stage] | None:
        cut = self.sources
        waiting = self._arrive(cut)
        stages: list[Stage] = []
        idle = 0
        while self.left:
            kind: Literal["affine", "elementwise"] = ("affine", "elementwise")[len(stages) % 2]
            taken, waiting = self._take(kind, cut, waiting)
            idle = 0 if taken else idle + 1
            if idle > 1:
                return None
            before, cut = tuple(cut), self._next_cut(cut, taken)
            stages.append(Stage(kind, tuple(taken), before, tuple(cut)))
        return [stage for stage in stages if stage.equations]

    def _arrive(self, arrays: Iterable[Var]) -> list[JaxprEqn]:
        """Note that arrays are at hand; list the equations that now have all they need."""
        ready = []
        for v in arrays:
            for eqn in self.readers.get(v, ()):
                self.lacks[id(eqn)] -= 1
                if not self.lacks[id(eqn)]:
                    ready.append(eqn)
        return ready

    def _take(
        self, kind: str, cut: Sequence[Var], waiting: list[JaxprEqn]
    ) -> tuple[list[JaxprEqn], list[JaxprEqn]]:
        """Take all equations of the kind, those of them that need one another included."""
        facts: dict[Var, Fact] = dict.fromkeys(cut, EVERYTHING)
        taken: list[JaxprEqn] = []
        refused: list[JaxprEqn] = []
        queue = list(waiting)
        while queue:
            eqn = queue.pop()
            inputs = [facts.get(a) if isinstance(a, Var) else None for a in eqn.invars]
            found = (
                facts_of(eqn, inputs)
                if all(v in facts for v in self.reads[id(eqn)])
                else [Fact(False, False)] * len(eqn.outvars)
            )
            if not all(getattr(fact, kind) for fact in found):
                refused.append(eqn)
                continue
            taken.append(eqn)
            facts.update(zip(eqn.outvars, found, strict=True))
            queue += self._arrive(eqn.outvars)
        taken, back = self._settle(sorted(taken, key=lambda eqn: self.order[id(eqn)]))
        self.left -= len(taken)
        for eqn in taken:
            for v in self.reads[id(eqn)]:
                self.wanted[v] -= 1
        hidden = {v for eqn in back for v in eqn.outvars}
        again = [eqn for eqn in refused if hidden.isdisjoint(self.reads[id(eqn)])]
        return taken, again + [eqn for eqn in back if hidden.isdisjoint(self.reads[id(eqn)])]

    def _settle(self, taken: list[JaxprEqn]) -> tuple[list[JaxprEqn], list[JaxprEqn]]:
        """Give back what would leave an array at the cut that is not real (complex, boolean)."""
        back: list[JaxprEqn] = []
        inside = {id(eqn) for eqn in taken}
        for eqn in reversed(taken):
            for v in eqn.outvars:
                needed = v in self.sinks or any(
                    id(reader) not in inside for reader in self.readers.get(v, ())
                )
                if needed and not floating(v.aval):
                    inside.discard(id(eqn))
            if id(eqn) not in inside:
                back.append(eqn)
        # Whoever reads what was given back goes, too; it stands later, and may be kept by mistake.
        gone = {v for eqn in back for v in eqn.outvars}
        kept = []
        for eqn in taken:
            if id(eqn) in inside and gone.isdisjoint(self.reads[id(eqn)]):
                kept.append(eqn)
            elif id(eqn) in inside:
                gone.update(eqn.outvars)
                inside.discard(id(eqn))
                back.append(eqn)
        for eqn in back:  # what they gave to others is not at hand any more
            for v in eqn.outvars:
                for reader in self.readers.get(v, ()):
                    self.lacks[id(reader)] += 1
        if len(kept) < len(taken) and kept:
            kept, more = self._settle(kept)
            back += more
        return kept, back

    def _next_cut(self, cut: Sequence[Var], taken: Sequence[JaxprEqn]) -> list[Var]:
        candidates = [*cut, *(v for eqn in taken for v in eqn.outvars)]
        return [v for v in candidates if self.wanted.get(v, 0) > 0]
