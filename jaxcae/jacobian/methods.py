"""The table of methods: how ‖J‖²_F may be computed, each with its options."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcae.errors import check_positive, check_positive_int, unknown_name
from jaxcae.jacobian import batches, choose, estimators, modes
from jaxcae.jacobian.choose import MEMORY_BUDGET, Memory
from jaxcae.jacobian.estimators import Distribution
from jaxcae.jacobian.low_noise import low_noise
from jaxcae.jacobian.program import Encoder

Computed: TypeAlias = tuple[Any, Float[Array, " batch"]]
Count: TypeAlias = int | np.integer[Any]
Number: TypeAlias = int | float | np.integer[Any] | np.floating[Any]


@dataclass(frozen=True)
class Method:
    """How ‖J‖²_F is computed: its options are the fields, checked by their names.

    Attributes:
        name: What stands for it in `contractive_penalty(encode, method=...)`.
        is_exact: Whether rounding is its only error.
        needs_key: Whether it draws random numbers.
    """

    name: ClassVar[str]
    is_exact: ClassVar[bool] = True
    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options; NumPy's numbers become Python's."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, _checked(field.name, value))

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and norms of a batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class Auto(Method):
    """Exact: the cheapest plan for the structure found in the encoder, in chunks that fit.

    Attributes:
        memory_budget: Bytes of temporaries allowed; 2 GiB by default.
        gradient: Whether a gradient will be taken. False plans for values alone, as scoring does:
            they need less memory, so fewer chunks.
    """

    name: ClassVar[str] = "auto"
    memory_budget: Number | None = None
    gradient: bool | None = None

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and norms of a batch."""
        budget = float(MEMORY_BUDGET if self.memory_budget is None else self.memory_budget)
        gradient = True if self.gradient is None else self.gradient
        remembered = choose.choose_again(encoder, xs, budget, gradient, memory)
        choose.warn_if_unmet(remembered.choice, budget)
        return remembered.run(encoder, xs)


@dataclass(frozen=True)
class Chain(Method):
    """Exact: the plan of `Auto`, with the chunk left to you.

    Attributes:
        chunk_size: Samples at a time, rematerialised; all by default.
    """

    name: ClassVar[str] = "chain"
    chunk_size: Count | None = None

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and norms of a batch."""
        modes.require_reverse(encoder)
        structure, plan = choose.read_and_plan(encoder, *batches.share_of(xs))
        return choose.run_chain(structure, plan, encoder, xs, cast(int | None, self.chunk_size))


@dataclass(frozen=True)
class _Directions(Method):
    chunk_size: Count | None = None

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and norms of a batch."""
        chunk_size = cast(int | None, self.chunk_size)

        def run() -> Computed:
            return choose.run_directions(self.name, encoder, xs, chunk_size)

        if self.name == "reverse":
            modes.require_reverse(encoder)
            return run()
        modes.require_forward(encoder)
        return modes.without_reverse(encoder, run)


@dataclass(frozen=True)
class Forward(_Directions):
    """Exact: d Jacobian-vector products a sample.

    Attributes:
        chunk_size: Features at a time, rematerialised; all by default.
    """

    name: ClassVar[str] = "forward"


@dataclass(frozen=True)
class Reverse(_Directions):
    """Exact: k vector-Jacobian products a sample.

    Attributes:
        chunk_size: Code units at a time, rematerialised; all by default.
    """

    name: ClassVar[str] = "reverse"


@dataclass(frozen=True)
class _Probes(Method):
    is_exact: ClassVar[bool] = False
    needs_key: ClassVar[bool] = True
    num_probes: Count | None = 1
    distribution: Distribution | str | None = "rademacher"

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and the estimates of a batch."""
        modes.require_reverse(encoder)
        how_many = int(self.num_probes or 1)
        distribution = cast(Distribution, self.distribution or "rademacher")
        if self.name == "control_variate":
            return low_noise(encoder, xs, key, how_many, distribution)
        codes, norms = estimators.hutchinson(encoder, xs, key, how_many, distribution)
        return codes, jnp.mean(norms, -1)


@dataclass(frozen=True)
class Hutchinson(_Probes):
    """Unbiased estimate: the mean of ‖Jᵀv‖² over random probes v. Needs the key.

    Attributes:
        num_probes: Probes a sample.
        distribution: `"rademacher"` (balanced over the batch), `"orthonormal"` (exact with as many
            probes as code units), `"sphere"` or `"normal"`.
    """

    name: ClassVar[str] = "hutchinson"


@dataclass(frozen=True)
class ControlVariate(_Probes):
    """Unbiased estimate with little noise: encoders of affine, elementwise, normalising parts.

    Attributes:
        num_probes: Probes a sample.
        distribution: As for `Hutchinson`.
    """

    name: ClassVar[str] = "control_variate"


@dataclass(frozen=True)
class FiniteDifference(Method):
    """Central differences, biased by O(step²).

    Attributes:
        step: Relative step; ∛ε of the coarsest dtype met by default.
        chunk_size: Features at a time, rematerialised; all by default.
    """

    name: ClassVar[str] = "finite_difference"
    is_exact: ClassVar[bool] = False
    step: Number | None = None
    chunk_size: Count | None = None

    def compute(self, encoder: Encoder, xs: Any, key: Any, memory: Memory) -> Computed:
        """Compute codes and the differences of a batch."""
        step, chunk_size = (cast(Any, value) for value in (self.step, self.chunk_size))
        per_sample = estimators.finite_difference(encoder, step, chunk_size)
        return modes.without_reverse(encoder, lambda: jax.vmap(per_sample)(xs))


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


def _checked(name: str, value: Any) -> Any:
    """Check an option by its name."""
    if name in ("chunk_size", "num_probes"):
        check_positive_int(name, value, "Leave it out for the default.")
        return int(value)
    if name in ("memory_budget", "step"):
        check_positive(name, value)
        return float(value)
    if name == "distribution" and value not in estimators.DISTRIBUTIONS:
        raise unknown_name("distribution", value, estimators.DISTRIBUTIONS)
    return bool(value) if name == "gradient" else value
