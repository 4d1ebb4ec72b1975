"""The table of methods: how ‖J‖²_F may be computed, each with its options."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcae.errors import check_positive, check_positive_int, unknown_name
from jaxcae.jacobian import choose, estimators
from jaxcae.jacobian.choose import MEMORY_BUDGET, Choice
from jaxcae.jacobian.control_variate import control_variate
from jaxcae.jacobian.estimators import Distribution
from jaxcae.jacobian.plan import make_plan
from jaxcae.jacobian.program import Encoder
from jaxcae.jacobian.structure import read_structure

Computed: TypeAlias = tuple[Any, Float[Array, " batch"]]
Count: TypeAlias = int | np.integer[Any]
Number: TypeAlias = int | float | np.integer[Any] | np.floating[Any]
Memory: TypeAlias = dict[Any, Choice]
"""What was chosen before, by what was found; it lives as long as the penalty that owns it."""


@dataclass(frozen=True)
class Auto:
    """Exact: the cheapest plan for the structure found in the encoder, in chunks that fit.

    Attributes:
        memory_budget: Bytes of temporaries allowed; 2 GiB by default.
        gradient: Whether a gradient will be taken. False plans for values alone, as scoring does:
            they need less memory, so fewer chunks.
    """

    name: ClassVar[str] = "auto"
    is_exact: ClassVar[bool] = True
    needs_key: ClassVar[bool] = False
    memory_budget: Number | None = None
    gradient: bool | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.memory_budget is not None:
            check_positive("memory_budget", self.memory_budget)

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and norms of a batch."""
        budget = float(MEMORY_BUDGET if self.memory_budget is None else self.memory_budget)
        gradient = True if self.gradient is None else bool(self.gradient)
        choice = choose.choose_again(encoder, choose.batch_size(xs), budget, gradient, memory)
        choose.warn_if_unmet(choice, budget)
        return choose.run_choice(choice, encoder, xs)


@dataclass(frozen=True)
class Chain:
    """Exact: the plan of `Auto`, with the chunk left to you.

    Attributes:
        chunk_size: Samples at a time, rematerialised; all by default.
    """

    name: ClassVar[str] = "chain"
    is_exact: ClassVar[bool] = True
    needs_key: ClassVar[bool] = False
    chunk_size: Count | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _check_count("chunk_size", self.chunk_size)

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and norms of a batch."""
        structure = read_structure(encoder.program)
        plan = make_plan(structure, choose.batch_size(xs))
        return choose.run_chain(structure, plan, encoder, xs, _int(self.chunk_size))


@dataclass(frozen=True)
class Forward:
    """Exact: d Jacobian-vector products a sample.

    Attributes:
        chunk_size: Features at a time, rematerialised; all by default.
    """

    name: ClassVar[str] = "forward"
    is_exact: ClassVar[bool] = True
    needs_key: ClassVar[bool] = False
    chunk_size: Count | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _check_count("chunk_size", self.chunk_size)

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and norms of a batch."""
        return choose.run_directions(self.name, encoder, xs, _int(self.chunk_size))


@dataclass(frozen=True)
class Reverse:
    """Exact: k vector-Jacobian products a sample.

    Attributes:
        chunk_size: Code units at a time, rematerialised; all by default.
    """

    name: ClassVar[str] = "reverse"
    is_exact: ClassVar[bool] = True
    needs_key: ClassVar[bool] = False
    chunk_size: Count | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _check_count("chunk_size", self.chunk_size)

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and norms of a batch."""
        return choose.run_directions(self.name, encoder, xs, _int(self.chunk_size))


@dataclass(frozen=True)
class Hutchinson:
    """Unbiased estimate: the mean of ‖Jᵀv‖² over random probes v. Needs the key.

    Attributes:
        num_probes: Probes a sample.
        distribution: `"rademacher"` (balanced over the batch), `"orthonormal"` (exact with as many
            probes as code units), `"sphere"` or `"normal"`.
    """

    name: ClassVar[str] = "hutchinson"
    is_exact: ClassVar[bool] = False
    needs_key: ClassVar[bool] = True
    num_probes: Count | None = 1
    distribution: Distribution | str | None = "rademacher"

    def __post_init__(self) -> None:
        """Check the options."""
        _check_probes(self.num_probes, self.distribution)

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and the estimates of a batch."""
        codes, norms = estimators.hutchinson(
            encoder, xs, key, _int(self.num_probes) or 1, _distribution(self.distribution)
        )
        return codes, jnp.mean(norms, -1)


@dataclass(frozen=True)
class ControlVariate:
    """Unbiased estimate with little noise, for encoders of affine and elementwise parts.

    Attributes:
        num_probes: Probes a sample.
        distribution: As for `Hutchinson`.
    """

    name: ClassVar[str] = "control_variate"
    is_exact: ClassVar[bool] = False
    needs_key: ClassVar[bool] = True
    num_probes: Count | None = 1
    distribution: Distribution | str | None = "rademacher"

    def __post_init__(self) -> None:
        """Check the options."""
        _check_probes(self.num_probes, self.distribution)

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and the estimates of a batch."""
        return control_variate(
            encoder, xs, key, _int(self.num_probes) or 1, _distribution(self.distribution)
        )


@dataclass(frozen=True)
class FiniteDifference:
    """Central differences, biased by O(step²).

    Attributes:
        step: Relative step; ∛ε of the coarsest dtype met by default.
        chunk_size: Features at a time, rematerialised; all by default.
    """

    name: ClassVar[str] = "finite_difference"
    is_exact: ClassVar[bool] = False
    needs_key: ClassVar[bool] = False
    step: Number | None = None
    chunk_size: Count | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _check_count("chunk_size", self.chunk_size)
        if self.step is not None:
            check_positive("step", self.step)

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and the differences of a batch."""
        step = None if self.step is None else float(self.step)
        per_sample = estimators.finite_difference(encoder, step, _int(self.chunk_size))
        return jax.vmap(per_sample)(xs)


Method: TypeAlias = (
    Auto | Chain | Forward | Reverse | Hutchinson | ControlVariate | FiniteDifference
)
MethodName: TypeAlias = Literal[
    "auto", "chain", "forward", "reverse", "hutchinson", "control_variate", "finite_difference"
]

TABLE: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (Auto, Chain, Forward, Reverse, Hutchinson, ControlVariate, FiniteDifference)
}
"""Every method by its name. A new one is a class like these, entered here."""

METHODS = tuple(TABLE)
EXACT_METHODS = tuple(name for name, kind in TABLE.items() if kind.is_exact)
"""Methods without error other than rounding."""


def resolve(method: str | Method, options: dict[str, Any]) -> Method:
    """Make the method of that name with these options; a method as it is, without any.

    Raises:
        ValueError: If the name or an option is not usable.
    """
    if not isinstance(method, str):
        if not isinstance(method, tuple(TABLE.values())):
            raise unknown_name("method", method, METHODS)
        if options:
            raise ValueError(
                f"options {', '.join(sorted(options))} belong inside {type(method).__name__}(...): "
                "it is a method with its options already."
            )
        return method
    if method not in TABLE:
        raise unknown_name("method", method, METHODS)
    known = {field.name for field in dataclasses.fields(TABLE[method])}
    for name in options:
        if name not in known:
            takes = ", ".join(sorted(known))
            raise ValueError(f"method {method!r} takes {takes}; got {name!r}.")
    return TABLE[method](**options)


def _check_count(name: str, value: Any) -> None:
    if value is not None:
        check_positive_int(name, value, "Leave it out for the default.")


def _check_probes(num_probes: Any, distribution: Any) -> None:
    _check_count("num_probes", num_probes)
    if distribution is not None and distribution not in estimators.DISTRIBUTIONS:
        raise unknown_name("distribution", distribution, estimators.DISTRIBUTIONS)


def _distribution(name: str | None) -> Distribution:
    return cast(Distribution, name or "rademacher")  # __post_init__ has checked it


def _int(value: Any) -> int | None:
    return None if value is None else int(value)
