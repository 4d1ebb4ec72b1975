"""Samples as they are given to training, made arrays that it can use, or refused in one line."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcae.errors import InputError

_LARGEST_INTEGER = 1 << 24
"""float32 holds every integer up to here."""
_ROWS_AT_ONCE = 1 << 14


def as_samples(what: str, xs: Any) -> Any:
    """Return samples in rows as a floating-point array of JAX or NumPy, all of it finite.

    Arrays of JAX stay where they are. Integers and booleans become float32, and so does float64
    unless x64 is enabled.

    Args:
        what: What to call them in a message.
        xs: An array, a DataFrame, or anything that NumPy makes an array of.

    Raises:
        InputError: If they are not numbers in rows, or not all finite in the dtype of training.
    """
    columns = [str(name) for name in xs.columns] if hasattr(xs, "columns") else None
    array = xs if isinstance(xs, jax.Array) else _on_host(what, xs)
    if array.ndim == 0:
        raise InputError(f"{what} must be samples in rows, got a single value.")
    if len(array) == 0:
        raise InputError(f"{what} must hold at least one sample, got none.")
    kept = _cast(what, array, columns)
    # On the device it is one pass; what is spread over machines cannot be looked at from here.
    sound = isinstance(kept, jax.Array) and (
        not kept.is_fully_addressable or bool(jnp.isfinite(kept).all())
    )
    if not sound:
        check_finite(what, kept, array, columns)
    return kept


def check_finite(what: str, kept: Any, given: Any = None, columns: list[str] | None = None) -> None:
    """Refuse what is not finite, with its row and column.

    Raises:
        InputError: If a value is NaN, infinite, or was beyond the range of the dtype.
    """
    for start in range(0, len(kept), _ROWS_AT_ONCE):
        block = np.asarray(kept[start : start + _ROWS_AT_ONCE], np.float32)
        bad = np.argwhere(~np.isfinite(block))
        if len(bad):
            row, *rest = (int(index) for index in bad[0])
            source = kept if given is None else given
            value = np.asarray(source[start + row])[tuple(rest)]
            if np.isfinite(np.float64(value)):
                ending = f"which {kept.dtype} cannot hold. Scale the samples."
            else:
                ending = "which is not finite. Remove or impute such values first."
            raise InputError(
                f"{what} holds {value} in {_place(start + row, rest, columns)}, {ending}"
            )


def _on_host(what: str, xs: Any) -> np.ndarray:
    if isinstance(xs, dict | set | str | bytes):
        raise InputError(f"{what} must be one array of samples in rows, got a {type(xs).__name__}.")
    if hasattr(xs, "toarray"):
        raise InputError(f"{what} must be dense: make the sparse matrix dense by its `toarray()`.")
    if np.ma.is_masked(xs):
        masked = int(np.ma.count_masked(xs))
        raise InputError(
            f"{what} holds {masked} masked value{'s' * (masked > 1)}. Fill them in, or leave out "
            "their rows."
        )
    array = np.asarray(xs)
    if array.dtype == object:
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{what} must hold numbers alone: {error}.") from None
    return array


def _cast(what: str, array: Any, columns: list[str] | None) -> Any:
    dtype = array.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        wanted = jax.dtypes.canonicalize_dtype(dtype)
        with np.errstate(over="ignore"):
            return array if dtype == wanted else array.astype(wanted)
    boolean = jnp.issubdtype(dtype, jnp.bool_)
    if not (boolean or jnp.issubdtype(dtype, jnp.integer)):
        raise InputError(f"{what} must hold real numbers, got dtype {dtype}.")
    if not boolean and dtype.itemsize > 2:
        beyond = np.argwhere(np.asarray((array > _LARGEST_INTEGER) | (array < -_LARGEST_INTEGER)))
        if len(beyond):
            row, *rest = (int(index) for index in beyond[0])
            raise InputError(
                f"{what} holds {array[tuple(beyond[0])]} in {_place(row, rest, columns)}: beyond "
                f"±{_LARGEST_INTEGER} float32 does not tell integers apart. Centre or scale them."
            )
    return array.astype(np.float32)


def _place(row: int, rest: list[int], columns: list[str] | None) -> str:
    if len(rest) != 1:
        return f"row {row}" + (f", position {tuple(rest)}" if rest else "") + " (from 0)"
    name = f" ({columns[rest[0]]!r})" if columns else ""
    return f"row {row}, column {rest[0]}{name} (from 0)"
