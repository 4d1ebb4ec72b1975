"""One forward pass: codes, norms and reconstructions of a batch, each computed once and if asked.

Losses, held-out measures, anomaly scores and exported scorers all read it.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.jacobian.jaxprs import struct
from jaxcae.jacobian.methods import Method, resolve
from jaxcae.jacobian.samples import blamed_on_samples, is_array
from jaxcae.penalty import encode_and_penalties, encode_and_penalty, has_orders
from jaxcae.types import Autoencoder, EncodeAndPenalty, Params

_NAMES = {1: "norms", 2: "curvatures"}


class Penalties(NamedTuple):
    """Penalties of some orders that are computed together.

    Attributes:
        orders: The orders.
        compute: `(params, xs, key) -> (codes, one array of norms for each order)`.
        asked: Whether they will be asked for, so that codes should come from their trace.
    """

    orders: tuple[int, ...]
    compute: Callable[..., Any]
    asked: bool


class Forward:
    """What a model makes of a batch.

    Attributes:
        params: The parameters.
        xs: The samples, shape (batch, *features).
        inputs: What the encoder sees: the samples, or their corruption.
        key: The key for what draws probes or noise, or None.
        codes: encode(inputs), shape (batch, *latent).
        norms: ‖J‖²_F of the encoder at the inputs, shape (batch,).
        curvatures: ‖∇²h‖²_F of the encoder at the inputs, shape (batch,).
        x_hats: decode(codes), shape (batch, *features).
        decoder_norms: ‖J_g‖²_F of the decoder g at the codes, shape (batch,).
        map_norms: ‖J_r‖²_F of the reconstruction map r = g ∘ h at the inputs, shape (batch,).
    """

    def __init__(
        self,
        model: Autoencoder,
        penalties: Sequence["Penalties"],
        of_results: tuple[EncodeAndPenalty, EncodeAndPenalty],
        params: Params,
        xs: Any,
        key: PRNGKeyArray | None,
        inputs: Any,
    ) -> None:
        self._model, self._penalties = model, penalties
        self._decode, self._reconstruct = of_results
        self.params, self.xs, self.key, self.inputs = params, xs, key, inputs

    @cached_property
    def norms(self) -> Float[Array, " batch"]:
        """‖J‖²_F of the encoder, one number per sample; codes come from the same trace."""
        return self._of_order(1)

    @cached_property
    def curvatures(self) -> Float[Array, " batch"]:
        """‖∇²h‖²_F of the encoder, one number per sample; codes come from the same trace."""
        return self._of_order(2)

    def _of_order(self, order: int) -> Any:
        found = next(p for p in self._penalties if order in p.orders)
        codes, norms = found.compute(self.params, self.inputs, self.key)
        self.__dict__.setdefault("codes", codes)
        for n, values in zip(found.orders, norms, strict=True):
            self.__dict__.setdefault(_NAMES[n], values)
        return norms[found.orders.index(order)]

    @cached_property
    def codes(self) -> Any:
        """The codes of the inputs."""
        asked = [p.orders[0] for p in self._penalties if p.asked]
        if asked:
            self._of_order(asked[0])
            return self.__dict__["codes"]
        with blamed_on_samples(struct(self.inputs, of_sample=True)):
            return jax.vmap(self._model.encode, (None, 0))(self.params, self.inputs)

    @cached_property
    def x_hats(self) -> Any:
        """The reconstructions."""
        x_hats = jax.vmap(self._model.decode, (None, 0))(self.params, self.codes)
        if not is_array(x_hats):
            count = len(jax.tree.leaves(x_hats))
            raise TypeError(
                f"decode must return one array per sample, got a {type(x_hats).__name__} of "
                f"{count} arrays. Return the reconstruction alone."
            )
        if not jnp.issubdtype(x_hats.dtype, jnp.floating):
            raise TypeError(
                f"reconstructions must be real floating-point numbers, got {x_hats.dtype}. "
                "Let decode return them as such."
            )
        return x_hats

    @cached_property
    def decoder_norms(self) -> Float[Array, " batch"]:
        """‖J‖²_F of the decoder at the codes; reconstructions come from the same trace."""
        return self._of_results(self._decode, self.codes, 1)

    @cached_property
    def map_norms(self) -> Float[Array, " batch"]:
        """‖J‖²_F of the reconstruction map; reconstructions come from the same trace."""
        return self._of_results(self._reconstruct, self.inputs, 2)

    def _of_results(self, compute: EncodeAndPenalty, at: Any, number: int) -> Any:
        key = None if self.key is None else jax.random.fold_in(self.key, number)
        x_hats, norms = compute(self.params, at, key)
        self.__dict__.setdefault("x_hats", x_hats)
        return norms

    def fork(self) -> "Forward":
        """Copy what is known: what a branch of `lax.cond` adds must not leave it."""
        return copy.copy(self)


def forward_pass(
    model: Autoencoder,
    method: str | Method = "auto",
    *,
    with_norms: bool = True,
    with_curvatures: bool = False,
    curvature_method: str | Method | None = None,
    input_metric: Any = None,
    **method_options: Any,
) -> Callable[..., Forward]:
    """Make `(params, xs, key=None, inputs=None) -> Forward`.

    Args:
        model: The autoencoder.
        method: How to compute the norms; see `contractive_penalty`.
        with_norms: Whether norms will be asked for. Codes then come from the trace of the norms,
            whichever is asked for first; a second trace would compute each gradient twice.
        with_curvatures: Whether curvatures will be asked for.
        curvature_method: How to compute the curvatures; `method` where that can, else `"auto"`.
        input_metric: F, for ‖J Fᵀ‖² in place of ‖J‖² of the encoder; see `contractive_penalty`.
        **method_options: Passed on to `contractive_penalty`.

    Returns:
        A function whose `key` is for methods that draw probes, and whose `inputs` are what the
        encoder is to see in place of the samples.

    Raises:
        ValueError: If an option is not usable.
    """
    chosen = resolve(method, method_options)
    if curvature_method is None:
        curved: str | Method = chosen if has_orders(chosen) else "auto"
    else:
        curved = resolve(curvature_method, {})
        curved = chosen if curved == chosen else curved
    together = curved is chosen and with_norms and with_curvatures
    penalties_of = partial(encode_and_penalties, model.encode, input_metric=input_metric)
    penalties = [
        Penalties(orders, penalties_of(orders, by), asked)
        for orders, by, asked in (
            [((1, 2), chosen, True)]
            if together
            else [((1,), chosen, with_norms), ((2,), curved, with_curvatures)]
        )
    ]

    def reconstruct(params: Params, x: Any) -> Any:
        return model.decode(params, model.encode(params, x))

    of_results = (
        encode_and_penalty(model.decode, chosen),
        encode_and_penalty(reconstruct, chosen),
    )

    def forward(
        params: Params, xs: Any, key: PRNGKeyArray | None = None, inputs: Any = None
    ) -> Forward:
        seen = xs if inputs is None else inputs
        return Forward(model, penalties, of_results, params, xs, key, seen)

    return forward
