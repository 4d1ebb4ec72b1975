"""Which layers of a state dict make up the encoder and the decoder, and in which order they run.

A state dict names arrays and says nothing of how they are used. Three things tell the order of a
half's layers: the order of the dict itself, which is that in which the module made them (but a
safetensors file sorts its names); numbers in the names, compared as numbers; and widths, where
only one order lets every layer take what the one before it makes. Where these leave a choice, or
contradict one another, the names are asked for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice, pairwise
from typing import Any

from parity.layers import (
    HALVES,
    ConversionError,
    Layer,
    as_arrays,
    check_chain,
    check_kinds,
    fits,
    layer_of,
    modules_of,
)

Names = Sequence[str] | None
_WRAPPERS = ("module", "_orig_mod", "model")  # of DataParallel, torch.compile and trainers
_MAX_LAYERS = 12  # more are not put in order by their widths: too many orders to try


def read_layers(
    weights: Mapping[str, Any], encoder: Names = None, decoder: Names = None
) -> dict[str, list[Layer]]:
    """Read both halves of an autoencoder from a state dict, in order, accounting for every name.

    Raises:
        ConversionError: If a name is of no known layer, or the order cannot be told.
    """
    modules = modules_of(as_arrays(weights))
    prefix = _prefix(list(modules))
    given = [_resolve(names, prefix, modules) for names in (encoder, decoder)]
    taken = {name for names in given for name in names}
    halves: dict[str, list[Layer]] = {}
    for half, names in zip(HALVES, given, strict=True):
        start = f"{prefix}{half}"
        found = names or [
            m for m in modules if (m + ".").startswith(start + ".") and m not in taken
        ]
        if not found:
            raise ConversionError(
                f"no weights are named {start}.<layer>.weight; there are "
                f"{', '.join(sorted(weights)[:4]) or 'none'}. Name the {half}'s layers in order.",
                "names",
            )
        layers = [layer_of(name, modules[name], half) for name in found]
        halves[half] = layers if names else _in_order(layers, weights)
    used = [layer.name for layers in halves.values() for layer in layers]
    if twice := {name for name in used if used.count(name) > 1}:
        raise ConversionError(f"{min(twice)!r} is named twice; name every layer once.")
    if left := [name for name in modules if name not in used]:
        first = f"{left[0]}.{min(modules[left[0]])}".removeprefix(".")
        raise ConversionError(
            f"{first!r} belongs to no layer of the encoder or decoder; name the layers in order, "
            "and leave out what is not a weight or bias of the autoencoder.",
            "names",
        )
    for layers in halves.values():
        check_kinds(layers)
    check_chain([layer for layers in halves.values() for layer in layers])
    return halves


def _in_order(layers: list[Layer], weights: Mapping[str, Any]) -> list[Layer]:
    """Put a half's layers in the order in which they run, by every clue there is."""
    chains = _chains(layers)
    if chains is not None and len(chains) == 1:
        return chains[0]
    orders = [o for o in (_own_order(layers, weights), _numbered(layers)) if o is not None]
    if chains:  # of several, the clues may only choose one
        orders = [o for o in orders if all(fits(*pair) for pair in pairwise(o))]
    if all(order == orders[0] for order in orders[1:]) and orders:
        return orders[0]
    names = ", ".join(layer.name for layer in layers)
    raise ConversionError(
        f"the order of the {layers[0].half}'s layers cannot be told from their names {names}"
        f"{': numbers and their order in the state dict differ' if orders else ''}. "
        f"Name the {layers[0].half}'s layers in the order in which they run.",
        "names",
    )


def _chains(layers: list[Layer]) -> list[list[Layer]] | None:
    """Find the orders that widths allow, two at most; None where widths do not tell."""
    if len(layers) > _MAX_LAYERS or any(layer.kind in ("BatchNorm", "bias") for layer in layers):
        return None

    def extend(begun: list[Layer], rest: list[Layer]) -> Iterator[list[Layer]]:
        if not rest:
            yield begun
        for i, layer in enumerate(rest):
            if not begun or fits(begun[-1], layer):
                yield from extend([*begun, layer], rest[:i] + rest[i + 1 :])

    return list(islice(extend([], layers), 2))


def _own_order(layers: list[Layer], weights: Mapping[str, Any]) -> list[Layer] | None:
    """Take the dict's own order, unless it is only that of its names, or of chance.

    The `state_dict()` of a module is known by its `_metadata`. Another dict tells nothing if it is
    sorted by name (within each dtype, as safetensors sorts), or if a layer's arrays do not stand
    together, weight first: `safetensors.torch.load` gives them in any order.
    """
    if hasattr(weights, "_metadata"):
        return layers
    by_dtype = (list(names) for _, names in groupby(weights, lambda n: str(weights[n].dtype)))
    if all(names == sorted(names) for names in by_dtype):
        return None
    together = [module for module, _ in groupby(name.rpartition(".")[0] for name in weights)]
    at = {name: i for i, name in enumerate(weights)}
    weight_first = all(
        i >= at.get(n[:-4] + "weight", -1) for n, i in at.items() if n[-5:] == ".bias"
    )
    return layers if len(together) == len(set(together)) and weight_first else None


def _numbered(layers: list[Layer]) -> list[Layer] | None:
    """Sort by the numbers in the names, if it is always a number in which two names differ."""
    split = {layer.name: re.split(r"(\d+)", layer.name) for layer in layers}

    def key(layer: Layer) -> list[tuple[str, int]]:
        return [("", int(p)) if p.isdecimal() else (p, 0) for p in split[layer.name]]

    ordered = sorted(layers, key=key)
    for one, two in pairwise(ordered):
        parts = zip(split[one.name], split[two.name], strict=False)
        differ = next(((a, b) for a, b in parts if a != b), None)
        if differ is None or not (differ[0].isdecimal() and differ[1].isdecimal()):
            return None
    return ordered


def _prefix(modules: Sequence[str]) -> str:
    """Find what stands before `encoder.` and `decoder.`, or the wrappers around all names."""
    found: dict[str, str] = {}
    for name in modules:
        parts = name.split(".")
        ends = [i for i, part in enumerate(parts) if part in HALVES]
        if ends:
            found.setdefault("".join(f"{part}." for part in parts[: ends[0]]), name)
    if len(found) > 1:
        one, two = sorted(found.values())[:2]
        raise ConversionError(
            f"{one!r} and {two!r} stand under different names; name the layers of each half in "
            "order, and leave out the weights of other models.",
            "names",
        )
    if found:
        return next(iter(found))
    parts = modules[0].split(".") if modules else []
    end = next((i for i, part in enumerate(parts) if part not in _WRAPPERS), 0)
    prefix = "".join(f"{part}." for part in parts[:end])
    return prefix if all(name.startswith(prefix) for name in modules) else ""


def _resolve(names: Names, prefix: str, modules: Mapping[str, Any]) -> list[str]:
    """Find the named layers, with or without the prefix that all share."""
    found = []
    for name in names or ():
        whole = next((n for n in (name, prefix + name) if n in modules), None)
        if whole is None:
            raise ConversionError(f"no layer is named {name!r}; there are {', '.join(modules)}.")
        found.append(whole)
    return found
