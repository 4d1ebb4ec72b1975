"""Files of weights: safetensors on both sides, since reading one cannot run code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from jaxcae.files import read_bytes, write_atomic
from jaxcae.runs.leaves import CheckpointError, check_digests
from jaxcae.runs.params_file import read_params_record, save_params
from parity.convert import (
    Arrays,
    ConversionError,
    Names,
    params_from_torch,
    params_to_torch,
    torch_layers,
)

MAX_BYTES = 2**36


class Converted(NamedTuple):
    """What was converted: tensors by name on both sides, in the order of the layers."""

    to: str
    torch: Arrays
    jax: Arrays


def read_torch(path: Path) -> Arrays:
    """Read the weights that PyTorch saved with `safetensors.torch.save_file`.

    Raises:
        ConversionError: If it is another kind of file, with the line that saves it as this one.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        return dict(load(data))
    except (SafetensorError, ValueError) as cause:
        raise ConversionError(
            f"{path}: not a safetensors file. Reading a file of torch.save can run code, so none "
            "is read here; save it again where it was made, with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
        ) from cause


def read_jax(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file of jaxcae's params, every leaf verified, as `(params, record)`."""
    record, data = read_params_record(path, MAX_BYTES)
    leaves = load(data)
    check_digests(record["leaves"], leaves, str(path))
    return nest(leaves), record


def write_torch(path: Path, weights: Mapping[str, Any]) -> None:
    """Write weights so that `safetensors.torch.load_file` reads them as a state dict."""
    write_atomic(path, save(dict(weights), {"format": "pt"}))


def convert_file(
    source: Path, target: Path, encoder: Names = None, decoder: Names = None
) -> Converted:
    """Convert a file of weights to the other framework and prove it by converting back.

    The direction follows from the source. PyTorch's layer names are kept in jaxcae's file, so
    that the way back gives them again.

    Args:
        source: A safetensors file of either framework.
        target: Where to write; the file appears whole or not at all.
        encoder: PyTorch's names of the encoder's layers in order; see `params_from_torch`.
        decoder: The same for the decoder.

    Raises:
        ConversionError: If the weights do not make an autoencoder that jaxcae knows.
    """
    try:
        params, record = read_jax(source)
    except CheckpointError as not_jax:
        weights = read_torch(source)
        if is_jax(source):
            raise not_jax
        params = params_from_torch(weights, encoder, decoder)
        theirs = torch_layers(weights, encoder, decoder)
        names = dict(zip(("encoder", "decoder"), theirs, strict=True))
        save_params(target, params, {"torch_layers": names})
        back, _ = read_jax(target)
        _check_same(weights, params_to_torch(back, *theirs), target)
        return Converted("jaxcae", weights, flat(params))
    names = record.get("torch_layers", {})
    encoder, decoder = encoder or names.get("encoder"), decoder or names.get("decoder")
    weights = params_to_torch(params, encoder, decoder)
    write_torch(target, weights)
    back = params_from_torch(read_torch(target), encoder, decoder)
    _check_same(flat(params), flat(back), target)
    return Converted("torch", weights, flat(params))


def is_jax(path: Path) -> bool:
    """Tell whether a safetensors file says that jaxcae wrote it."""
    with safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get("format") == "jaxcae"


def nest(leaves: Arrays) -> dict[str, Any]:
    """Make nested dicts of leaves named by their path, `encoder.layer_0.kernel`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> Arrays:
    """Name the leaves of nested dicts by their path, in order."""
    leaves: Arrays = {}
    for name, branch in tree.items():
        path = f"{prefix}{name}"
        leaves |= flat(branch, f"{path}.") if isinstance(branch, Mapping) else {path: branch}
    return leaves


def _check_same(before: Arrays, after: Arrays, target: Path) -> None:
    for name in before.keys() | after.keys():
        one, two = before.get(name), after.get(name)
        if one is None or two is None or not same_bits(one, two):
            target.unlink()
            raise ConversionError(
                f"{name} did not survive the way there and back; nothing is left."
            )


def same_bits(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> bool:
    """Compare arrays bit by bit: 0.0 differs from -0.0, and a NaN equals itself."""
    return (one.dtype, one.shape) == (two.dtype, two.shape) and one.tobytes() == two.tobytes()
