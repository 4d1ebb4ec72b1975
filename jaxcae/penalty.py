"""The contractive penalty ‖J_h(x)‖²_F of any encoder, by a method of your choice."""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.errors import check_positive_int, unknown_name
from jaxcae.jacobian import directions
from jaxcae.jacobian.chain import chain
from jaxcae.jacobian.plan import make_plan
from jaxcae.jacobian.structure import read_structure
from jaxcae.types import Encode, EncodeAndPenalty, Params, Penalty

METHODS = ("auto", "chain", "forward", "reverse")


def contractive_penalty(
    encode: Encode, method: str = "auto", *, chunk_size: int | None = None
) -> Penalty:
    """Make `penalty(params, xs, key=None) -> norms`, one ‖J_h(x)‖²_F per sample."""
    encode_and_norms = encode_and_penalty(encode, method, chunk_size=chunk_size)

    def penalty(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> Float[Array, " batch"]:
        return encode_and_norms(params, xs, key)[1]

    return penalty


def encode_and_penalty(
    encode: Encode, method: str = "auto", *, chunk_size: int | None = None
) -> EncodeAndPenalty:
    """Make `(params, xs, key=None) -> (codes, norms)`, both from one forward trace."""
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if chunk_size is not None:
        check_positive_int("chunk_size", chunk_size, "Use None for no chunking.")

    def encode_and_norms(
        params: Params, xs: Any, key: PRNGKeyArray | None = None
    ) -> tuple[Any, Float[Array, " batch"]]:
        one = partial(encode, params)
        if method == "forward":
            per_sample = directions.forward(one, chunk_size)
        elif method == "reverse":
            per_sample = directions.reverse(one, chunk_size)
        else:
            structure = read_structure(one, jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype))
            per_sample = chain(structure, make_plan(structure, xs.shape[0]))
        return jax.vmap(per_sample)(xs)

    return encode_and_norms
