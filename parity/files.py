"""Files of weights: safetensors on both sides, since reading one cannot run code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save

from jaxcae.errors import InputError
from jaxcae.files import parse_json, read_bytes, write_atomic
from jaxcae.runs.leaves import check_digests
from jaxcae.runs.params_file import read_params_record, save_params
from parity.convert import EPS, Network, jax_names, params_of_network, params_to_torch, read
from parity.folding import BatchNorm
from parity.layers import HALVES, Arrays, ConversionError, as_numpy, as_tensors
from parity.order import Names
from parity.outputs import UNKNOWN, Activations, Compared, NoModelError, compare_outputs

MAX_BYTES = 2**36


class Pair(NamedTuple):
    """One tensor on both sides; `torch` is empty where there was none, and `note` says more."""

    torch: str
    torch_shape: tuple[int, ...]
    jax: str
    jax_shape: tuple[int, ...]
    dtype: str
    note: str


class Converted(NamedTuple):
    """What was converted.

    Attributes:
        to: `jaxcae` or `torch`.
        pairs: The tensors that belong together, layer by layer.
        compared: How far the outputs are apart, or why they were not compared.
        folded: Names of the BatchNorms that are no longer there.
        eps: What was taken for theirs.
    """

    to: str
    pairs: list[Pair]
    compared: Compared | str
    folded: list[str]
    eps: float


def read_torch(path: Path) -> dict[str, Any]:
    """Read the tensors that PyTorch saved with `safetensors.torch.save_file`, as they lie there.

    Raises:
        ConversionError: If it is another kind of file, with the line that saves it as this one.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        tensors = load(data)  # in any order
    except (SafetensorError, ValueError, KeyError, TypeError) as cause:
        raise ConversionError(
            f"{path}: not a safetensors file. Reading a file of torch.save can run code, so none "
            "is read here; save it again where it was made, with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
        ) from cause
    header = _header(data, path)
    names = sorted(tensors, key=lambda name: list(header[name]["data_offsets"]))
    return {name: tensors[name] for name in names}


def read_jax(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file of jaxcae's params, every leaf verified, as `(params, record)`."""
    record, data = read_params_record(path, MAX_BYTES)
    leaves = {name: as_numpy(tensor) for name, tensor in sorted(load(data).items())}
    check_digests(record["leaves"], leaves, str(path))
    return nest(leaves), record


def write_torch(path: Path, weights: Mapping[str, Any]) -> None:
    """Write weights so that `safetensors.torch.load_file` reads them as a state dict."""
    write_atomic(path, save(as_tensors(weights), {"format": "pt"}))


def convert_file(
    source: Path,
    target: Path,
    encoder: Names = None,
    decoder: Names = None,
    *,
    batch_norm: BatchNorm = None,
    eps: float = EPS,
    activations: Activations = UNKNOWN,
) -> Converted:
    """Convert a file of weights to the other framework, and prove it before it is written.

    Converting back must give every bit, and both networks the same codes and reconstructions. The
    direction follows from the source. PyTorch's layer names are kept in jaxcae's file, so that the
    way back gives them again.

    Args:
        source: A safetensors file of either framework.
        target: Where to write; the file appears whole or not at all.
        encoder: PyTorch's names of the encoder's layers in order; see `params_from_torch`.
        decoder: The same for the decoder.
        batch_norm: See `params_from_torch`.
        eps: See `params_from_torch`.
        activations: Those of the network, for the comparison of outputs.

    Raises:
        ConversionError: If the weights do not make an autoencoder that jaxcae knows.
    """
    to = "torch" if is_jax(source) else "jaxcae"
    if to == "torch":
        params, record = read_jax(source)
        names = record.get("torch_layers", {})
        encoder, decoder = (
            given or names.get(half) for half, given in zip(HALVES, (encoder, decoder), strict=True)
        )
        arrays = params_to_torch(
            params, encoder, decoder, without_bias=record.get("torch_without_bias", ())
        )
        encoder, decoder = _layers_of(params, encoder, decoder)
        network = read(arrays, encoder, decoder)
        _check_same(flat(params), flat(params_of_network(network)))
        compared = _compare(arrays, params, activations, encoder=encoder, decoder=decoder)
        write_torch(target, arrays)
    else:
        weights = read_torch(source)
        reading: dict[str, Any] = {
            "encoder": encoder,
            "decoder": decoder,
            "batch_norm": batch_norm,
            "eps": eps,
        }
        network = read(weights, **reading)
        params = params_of_network(network)
        names, without = network.names, network.without_bias
        back = params_to_torch(params, *names.values(), without_bias=without)
        _check_same(network.arrays, back)
        compared = _compare(weights, params, activations, **reading)
        save_params(target, params, {"torch_layers": names, "torch_without_bias": without})
    folded = [
        norm.name for half in HALVES for placed in network.placed[half] for norm in placed.norms
    ]
    return Converted(to, _pairs(network, params), compared, folded, eps)


def is_jax(path: Path) -> bool:
    """Tell whether a safetensors file says that jaxcae wrote it."""
    header = _header(read_bytes(path, MAX_BYTES), path)
    metadata = header.get("__metadata__")
    return isinstance(metadata, dict) and "jaxcae" in metadata


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


def _header(data: bytes, path: Path) -> dict[str, Any]:
    """Read the names and places of the tensors; of another kind of file, nothing."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        return {}
    try:
        header = parse_json(data[8 : 8 + length], str(path))
    except InputError:
        return {}
    return header if isinstance(header, dict) else {}


def _layers_of(
    params: Mapping[str, Any], encoder: Names, decoder: Names
) -> tuple[list[str], list[str]]:
    """Name the layers of PyTorch's side; as `params_to_torch` does where no names are given."""
    encoder, decoder = (
        list(given or [f"{half}.{i}" for i in range(len(params[half]))])
        for half, given in zip(HALVES, (encoder, decoder), strict=True)
    )
    return encoder, decoder


def _compare(
    weights: Mapping[str, Any], params: Any, activations: Activations, **reading: Any
) -> Compared | str:
    try:
        return compare_outputs(weights, params, activations, **reading)
    except NoModelError as reason:
        return str(reason)


def _pairs(network: Network, params: Mapping[str, Any]) -> list[Pair]:
    """Put side by side what became of what, layer by layer."""
    pairs = []
    for half in HALVES:
        ours = jax_names(network, half)
        for name, placed in zip(ours, network.placed[half], strict=True):
            layer = placed.layer
            merged = [f"{norm.name} (BatchNorm) folded in" for norm in placed.norms]
            merged += ["weight_norm put together"] if layer.normed else []
            for theirs, leaf in (("weight", "kernel"), ("bias", "bias")):
                if leaf not in params[half][name]:
                    continue
                array, before = params[half][name][leaf], layer.arrays.get(theirs)
                note = layer.what if theirs == "weight" else "" if before is not None else "zeros"
                if theirs == "bias" and placed.norms:
                    note = "made by BatchNorm" if before is None else ""
                pairs.append(
                    Pair(
                        f"{layer.name}.{theirs}" if before is not None else "",
                        () if before is None else before.shape,
                        f"{half}.{name}.{leaf}",
                        array.shape,
                        array.dtype.name,
                        ", ".join([note, *merged]) if theirs == "weight" else note,
                    )
                )
    return pairs


def _check_same(before: Arrays, after: Arrays) -> None:
    for name in sorted(before.keys() | after.keys()):
        one, two = before.get(name), after.get(name)
        if one is None or two is None or not same_bits(one, two):
            raise ConversionError(f"{name} did not survive the way there and back; not written.")


def same_bits(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> bool:
    """Compare arrays bit by bit: 0.0 differs from -0.0, and a NaN equals itself."""
    return (one.dtype, one.shape) == (two.dtype, two.shape) and one.tobytes() == two.tobytes()
