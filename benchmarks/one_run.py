"""One training run in a process of its own: `python -m benchmarks.one_run SPEC OUT`.

It imports the framework it trains with and not the other one, so that time and memory are those of
a user's script. SPEC is JSON; OUT receives the parameters (npz), and stdout the times.
"""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def main() -> None:
    """Train as the specification says, and print what it took."""
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    with np.load(spec["materials"], allow_pickle=False) as stored:
        materials = {name: stored[name] for name in stored.files}
    train = train_by_jaxcae if spec["framework"] == "jaxcae" else train_by_torch
    epoch_seconds, params = train(spec, materials)
    arrays: Any = flatten(params)
    np.savez(sys.argv[2], **arrays)
    print(json.dumps({"epochs": epoch_seconds, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int | None:
    """Read the most memory this process has held.

    Linux hands the high-water mark of getrusage on to a child: there it would be the parent's.
    """
    try:
        with open("/proc/self/status") as file:
            lines = [line.split() for line in file if line.startswith("VmHWM:")]
        return 1024 * int(lines[0][1])
    except (OSError, IndexError):
        return None


def train_by_jaxcae(spec: Mapping[str, Any], materials: Arrays) -> tuple[list[float], Any]:
    """Train by `jaxcae.fit`; the first epoch includes tracing and compilation."""
    import jax
    import optax

    import jaxcae

    model = jaxcae.mlp(spec["sizes"])
    method = spec["method"]
    loss = (
        jaxcae.cae_loss(model, None)
        if method is None
        else jaxcae.cae_loss(model, spec["contraction"], method=method)
    )
    optimizer = optax.adam(spec["rate"])
    params = jax.tree.map(jax.numpy.asarray, unflatten(materials))
    state = jaxcae.TrainState.create(params, optimizer, jax.random.key(spec["seed"]))
    clock = [time.perf_counter()]

    def note(segment: Any) -> None:
        if segment.epoch_done:
            clock.append(time.perf_counter())

    state, _ = jaxcae.fit(
        loss,
        optimizer,
        state,
        materials["train"],
        epochs=spec["epochs"],
        batch_size=spec["batch"],
        callback=note,
    )
    return np.diff(clock).tolist(), jax.device_get(state.params)


def train_by_torch(spec: Mapping[str, Any], materials: Arrays) -> tuple[list[float], Any]:
    """Train by the loop that PyTorch users write, over the batches that `jaxcae.fit` takes."""
    import torch

    from benchmarks import torch_methods
    from parity.convert import params_from_torch

    torch_methods.use_threads()
    torch.manual_seed(spec["seed"])
    norms = None if spec["method"] is None else getattr(torch_methods, spec["method"])
    clock = [time.perf_counter()]
    model = torch_methods.network(spec["sizes"], "softplus", unflatten(materials))
    xs = torch.from_numpy(materials["train"])
    optimizer = torch.optim.Adam(model.parameters(), lr=spec["rate"])
    for order in torch.from_numpy(materials["orders"][: spec["epochs"]]).long():
        for rows in order.split(spec["batch"]):
            torch_methods.step(model, xs[rows], spec["contraction"], norms)()
            optimizer.step()
        clock.append(time.perf_counter())
    return np.diff(clock).tolist(), params_from_torch(model.state_dict())


def flatten(params: Mapping[str, Any], prefix: str = "params") -> Arrays:
    """Name the leaves of nested dicts by their paths."""
    flat: Arrays = {}
    for name, value in params.items():
        path = f"{prefix}/{name}"
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: np.asarray(value)}
    return flat


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`, whatever else is in the archive."""
    params: dict[str, Any] = {}
    for path, value in arrays.items():
        root, *names = path.split("/")
        if root != "params":
            continue
        level = params
        for name in names[:-1]:
            level = level.setdefault(name, {})
        level[names[-1]] = value
    return params


if __name__ == "__main__":
    main()
