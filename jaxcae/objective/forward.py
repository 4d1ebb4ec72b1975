"""One forward pass: codes, norms and reconstructions of a batch, each computed once and if asked.

Losses, held-out measures, anomaly scores and exported scorers all read it.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.jacobian.methods import Method
from jaxcae.penalty import encode_and_penalty
from jaxcae.types import Autoencoder, EncodeAndPenalty, Params


class Forward:
    """What a model makes of a batch.

    Attributes:
        params: The parameters.
        xs: The samples, shape (batch, *features).
        inputs: What the encoder sees: the samples, or their corruption.
        codes: encode(inputs), shape (batch, *latent).
        norms: ‖J‖²_F of the encoder at the inputs, shape (batch,).
        x_hats: decode(codes), shape (batch, *features).
    """

    def __init__(
        self,
        model: Autoencoder,
        encode_and_norms: EncodeAndPenalty,
        with_norms: bool,
        params: Params,
        xs: Any,
        key: PRNGKeyArray | None,
        inputs: Any,
    ) -> None:
        self._model, self._encode_and_norms = model, encode_and_norms
        self._with_norms, self._key = with_norms, key
        self.params, self.xs, self.inputs = params, xs, inputs

    @cached_property
    def norms(self) -> Float[Array, " batch"]:
        """‖J‖²_F of the encoder, one number per sample; codes come from the same trace."""
        codes, norms = self._encode_and_norms(self.params, self.inputs, self._key)
        self.__dict__.setdefault("codes", codes)
        return norms

    @cached_property
    def codes(self) -> Any:
        """The codes of the inputs."""
        if self._with_norms:
            _ = self.norms
            return self.__dict__["codes"]
        return jax.vmap(self._model.encode, (None, 0))(self.params, self.inputs)

    @cached_property
    def x_hats(self) -> Any:
        """The reconstructions."""
        return jax.vmap(self._model.decode, (None, 0))(self.params, self.codes)

    def fork(self) -> "Forward":
        """Copy what is known: what a branch of `lax.cond` adds must not leave it."""
        return copy.copy(self)


def forward_pass(
    model: Autoencoder,
    method: str | Method = "auto",
    *,
    with_norms: bool = True,
    **method_options: Any,
) -> Callable[..., Forward]:
    """Make `(params, xs, key=None, inputs=None) -> Forward`.

    Args:
        model: The autoencoder.
        method: How to compute the norms; see `contractive_penalty`.
        with_norms: Whether norms will be asked for. Codes then come from the trace of the norms,
            whichever is asked for first; a second trace would compute each gradient twice.
        **method_options: Passed on to `contractive_penalty`.

    Returns:
        A function whose `key` is for methods that draw probes, and whose `inputs` are what the
        encoder is to see in place of the samples.

    Raises:
        ValueError: If an option is not usable.
    """
    encode_and_norms = encode_and_penalty(model.encode, method, **method_options)

    def forward(
        params: Params, xs: Any, key: PRNGKeyArray | None = None, inputs: Any = None
    ) -> Forward:
        seen = xs if inputs is None else inputs
        return Forward(model, encode_and_norms, with_norms, params, xs, key, seen)

    return forward
