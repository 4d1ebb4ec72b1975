"""The leaves of a pytree by name, each with its digest.

A digest guards against accidents, not against an attacker, who would change both.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcae.devices.processes import everyone
from jaxcae.errors import CheckpointError, InputError, printable
from jaxcae.files import dump_json, sha256
from jaxcae.runs.pieces import digests_along, is_split, split_axis, whole


def leaf_names(tree: Any, separator: str = "/") -> list[str]:
    """Name the leaves of a pytree by their paths, in the order of `jax.tree.leaves`.

    Raises:
        InputError: If two have one name, as {"a.b": …} and {"a": {"b": …}} do with a dot between.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=separator) for path, _ in paths]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(
            f"two leaves of the tree are called {printable(twice)!s:.80}, so one would be lost. "
            f"Rename one, without {separator!r} in a key."
        )
    return names


def to_host(tree: Any, separator: str = "/") -> dict[str, Any]:
    """Copy the leaves to the host, by name; typed keys as the data that they hold.

    A leaf of which no process holds all stays where it is.

    Raises:
        InputError: If two leaves have one name, or one is no array.
    """
    names, leaves = leaf_names(tree, separator), jax.tree.leaves(tree)
    for name, leaf in zip(names, leaves, strict=True):
        if not hasattr(leaf, "dtype"):
            raise InputError(
                f"{printable(name)!s:.80} is {printable(leaf)!s:.40}, a {type(leaf).__name__}; "
                "expected an array. Make it a jax.Array."
            )
    arrays = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
    # In C order: safetensors writes the memory of a transposed array as it lies there.
    host = iter(jax.device_get([x for x in arrays if not is_split(x)]))
    taken = [x if is_split(x) else np.asarray(next(host), order="C") for x in arrays]
    return dict(zip(names, taken, strict=True))


def describe(leaves: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Give `{name: [dtype, shape, digest]}`; the digest covers dtype and shape too.

    A leaf that processes share along an axis has a digest along this axis, `AXIS:DIGEST`; see
    `jaxcae.runs.pieces`.

    Args:
        leaves: The leaves, as `to_host` gives them; of split ones, in all processes.
        stored: What they were described as before, to digest them in the same way.
    """
    along = {}
    for name, leaf in leaves.items():
        axis = split_axis(leaf) if stored is None else _axis_of(stored.get(name))
        if axis is not None and axis < leaf.ndim:
            along[name] = leaf, axis
    digests = {name: f"{along[name][1]}:{d}" for name, d in digests_along(along).items()}
    for name, leaf in leaves.items():
        if name not in digests:
            digests[name] = _digest(whole(leaf))
    return {
        name: [str(leaf.dtype), list(leaf.shape), digests[name]] for name, leaf in leaves.items()
    }


def digest_of_tree(tree: Any) -> str:
    """Return one SHA-256 for a whole pytree of arrays: names, dtypes, shapes and values."""
    return sha256(dump_json(describe(to_host(tree))).encode())


def check_layout(
    described: Mapping[str, Any], like: Any, source: str, separator: str = "/"
) -> None:
    """Compare names, shapes and dtypes with what is expected, before anything is loaded.

    Raises:
        CheckpointError: With the first difference. (Orbax would cast to another dtype silently.)
    """
    wanted = {}
    for name, leaf in zip(leaf_names(like, separator), jax.tree.leaves(like), strict=True):
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        wanted[name] = [str(np.dtype(data.dtype)), list(data.shape)]
    if set(wanted) != set(described):
        odd = sorted(set(wanted) ^ set(described))[0]
        where = "is missing" if odd in wanted else "is not expected"
        raise CheckpointError(f"{source}: {odd} {where}; it belongs to another model.")
    for name, layout in wanted.items():
        if described[name][:2] != layout:
            raise CheckpointError(
                f"{source}: {name} is {_layout(described[name])}, expected {_layout(layout)}."
            )


def check_digests(
    described: Mapping[str, Any],
    leaves: Mapping[str, Any],
    source: str,
    *,
    together: bool = False,
) -> None:
    """Compare every leaf with its digest.

    Args:
        described: What `describe` gave when they were saved.
        leaves: The leaves, as `to_host` gives them.
        source: Where they come from, for the message.
        together: Whether all processes call this; then all raise if one must.

    Raises:
        CheckpointError: With the names of those that differ.
    """
    found = describe(leaves, described)
    wrong = [name for name in {**described, **found} if described.get(name) != found.get(name)]
    if together:  # one process may have read what another has not
        wrong = list(dict.fromkeys(name for names in everyone(wrong) for name in names))
    if wrong:
        raise CheckpointError(
            f"{source}: {', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} "
            "differs from its digest; the file is damaged."
        )


def _axis_of(entry: Any) -> int | None:
    """Read the axis of a digest from a leaf's stored description."""
    axis, colon, _ = str(entry[2] if entry else "").partition(":")
    return int(axis) if colon and axis.isdecimal() else None


def _digest(leaf: np.ndarray) -> str:
    digest = hashlib.sha256(f"{leaf.dtype} {list(leaf.shape)} ".encode())
    # Viewed as bytes: bfloat16 has no buffer of its own.
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _layout(described: Sequence[Any]) -> str:
    return f"{described[0]}{described[1]}"


def damaged(path: Path, error: Exception) -> str:
    """Say that a file is damaged, in one line that names it."""
    text = first_line(error)
    return text if str(path) in text else f"{path}: damaged or incomplete: {text}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error, with its kind where that is not one of ours."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else ""
    return (
        text
        if isinstance(error, InputError | OSError) and text
        else f"{type(error).__name__} {text}"
    )
