"""The vocabulary of the library: what an autoencoder, its parameters and its losses are."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

Params: TypeAlias = PyTree[Any]
"""Any pytree of arrays; the built-in models use nested dicts of `kernel` (in, out) and `bias`."""

Metrics: TypeAlias = dict[str, Scalar]

Encode: TypeAlias = Callable[[Params, Any], Any]
"""`encode(params, x) -> z` for ONE sample; any JAX function of this form will do."""


class Autoencoder(NamedTuple):
    """Three pure functions that make up an autoencoder.

    Attributes:
        init: `init(key) -> params`.
        encode: `encode(params, x) -> z`, one sample `(features,) -> (latent,)`.
        decode: `decode(params, z) -> x_hat`, one code `(latent,) -> (features,)`.
    """

    init: Callable[[PRNGKeyArray], Params]
    encode: Encode
    decode: Callable[[Params, Any], Any]


@runtime_checkable
class Penalty(Protocol):
    """`penalty(params, xs, key=None) -> norms`: one ‖J_h(x)‖²_F per sample, never reduced."""

    def __call__(
        self, params: Params, xs: Any, key: PRNGKeyArray | None = None
    ) -> Float[Array, " batch"]: ...


@runtime_checkable
class EncodeAndPenalty(Protocol):
    """`(params, xs, key=None) -> (codes, norms)` from one forward trace."""

    def __call__(
        self, params: Params, xs: Any, key: PRNGKeyArray | None = None
    ) -> tuple[Any, Float[Array, " batch"]]: ...


@runtime_checkable
class Loss(Protocol):
    """`loss(params, xs, key=None) -> (scalar, metrics)`: the mean over the batch.

    A loss may also take, by name, `step` (an integer scalar) and `weights` (one per sample, for
    the mean); training passes them to those that do.
    """

    def __call__(
        self, params: Params, xs: Any, key: PRNGKeyArray | None = None
    ) -> tuple[Scalar, Metrics]: ...
