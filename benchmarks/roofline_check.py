"""`python -m benchmarks roofline`: the model of scale, held against what XLA compiles, and a page.

Nothing is run but one small step on one CPU: operations and collectives are read from compiled
programs for 8 CPU devices. No accelerator was measured for the tables of times.
"""

import argparse
import datetime
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcae
from benchmarks.report import markdown
from benchmarks.roofline import (
    DATA,
    FEATURES,
    FSDP,
    H100,
    LAYOUTS,
    TPU_V5E,
    Case,
    Device,
    data_parallel,
    flops,
    step,
    traffic,
)
from jaxcae.devices import batch_sharding
from jaxcae.files import write_atomic, write_json
from jaxcae.runs import environment
from jaxcae.timing import matmul_peak

RESULTS = Path(__file__).parent / "results"
DEVICES = 8
TOLERANCE = 0.04
"""How far operations may be from XLA's count, which has activations and Adam in it, too."""
SIZES = (
    ((784, 128, 64), 1024),
    ((784, 256, 64), 128),
    ((784, 256, 64), 1024),
    ((12288, 1024, 256), 1024),
    ((200000, 256, 64), 1024),
)
SCALES = (
    (784, 256, 64),
    (12288, 1024, 256),
    (200000, 1024, 256),
    (200000, 8192, 1024),
)
COUNTS = (1, 8, 64, 1024)
ROWS = 1024
"""Samples of a step and device in the tables of times."""
_WORDS = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
_WORDS |= {"pred": 1, "s8": 1, "u8": 1}
_COLLECTIVE = re.compile(
    r"=\s*(\(?[^=]*?)\s(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(text: str) -> dict[str, int]:
    """Sum up the bytes that the collectives of a compiled program return, by kind."""
    found: dict[str, int] = {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if match := _COLLECTIVE.search(line):
            size = sum(
                _WORDS.get(kind, 0) * int(np.prod([int(n) for n in shape.split(",") if n]))
                for kind, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match[1])
            )
            found[match[2]] = found.get(match[2], 0) + size
    return found


def compiled(case: Case) -> Any:
    """Compile a step of a case for the devices that are here, without its arrays."""
    model, optimizer = jaxcae.mlp(case.sizes, "softplus"), optax.adam(1e-3)
    take = jaxcae.make_train_step(jaxcae.cae_loss(model, 0.03), optimizer)
    where = jaxcae.layout(case.devices, case.domain, shard_params=case.layout == FSDP)
    shapes = jax.eval_shape(
        lambda: jaxcae.TrainState.create(
            model.init(jax.random.key(0)), optimizer, jax.random.key(1)
        )
    )
    lies = where.shardings(shapes)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        lies,
    )
    xs = jax.ShapeDtypeStruct(
        (case.batch, case.sizes[0]), jnp.float32, sharding=batch_sharding(where)
    )
    return jax.jit(take, out_shardings=(lies, None)).lower(state, xs).compile()


def check(case: Case) -> dict[str, Any]:
    """Hold a case against its compiled program: operations and bytes, the model's and XLA's."""
    program = compiled(case)
    found = collectives(program.as_text())
    predicted, counted = flops(case), float(program.cost_analysis()["flops"])
    moved = traffic(case)
    return {
        "sizes": list(case.sizes),
        "batch": case.batch,
        "layout": case.layout if case.devices > 1 else "one device",
        "devices": case.devices,
        "predicted_flops": predicted,
        "flops": counted,
        "error": predicted / counted - 1,
        "predicted_bytes": moved.reduced + moved.gathered + moved.reduced_inside,
        "bytes": sum(found.values()),
        "collectives": found,
    }


def cases(devices: int = DEVICES) -> list[Case]:
    """List what is compiled: every layout that the library has, of every size."""
    return [
        case
        for sizes, batch in SIZES
        for case in (
            Case(sizes, batch),
            data_parallel(sizes, batch, devices),
            Case(sizes, batch, FSDP, devices),
            Case(sizes, batch, FEATURES, devices, devices),
        )
    ]


def scale(device: Device) -> list[dict[str, Any]]:
    """Bound the step of every size, on 1 to 1,024 devices, under every layout."""
    rows = []
    for sizes in SCALES:
        alone = step(device, Case(sizes, ROWS)).in_turn
        for count in COUNTS:
            for layout in LAYOUTS if count > 1 else (DATA,):
                domain = min(device.domain, count) if layout == FEATURES else 1
                bound = step(device, Case(sizes, ROWS * count, layout, count, domain))
                rows.append(
                    {
                        "sizes": list(sizes),
                        "devices": count,
                        "layout": layout if count > 1 else "one device",
                        "compute_ms": 1e3 * bound.compute,
                        "memory_ms": 1e3 * bound.memory,
                        "links_ms": 1e3 * bound.links,
                        "step_ms": [1e3 * bound.overlapped, 1e3 * bound.in_turn],
                        "samples_per_second": ROWS * count / bound.in_turn,
                        "efficiency": [alone / bound.in_turn, alone / bound.overlapped],
                        "gigabytes": bound.held / 1e9,
                        "fits": bound.held <= device.memory,
                        "limit": bound.limit,
                    }
                )
    return rows


def on_this_machine(peak: float) -> dict[str, Any]:
    """Take a few small steps on one CPU, beside what the model says of a device of its peak."""
    case = Case((784, 256, 64), 1024)
    model, optimizer = jaxcae.mlp(case.sizes, "softplus"), optax.adam(1e-3)
    take = jax.jit(jaxcae.make_train_step(jaxcae.cae_loss(model, 0.03), optimizer))
    state = jaxcae.TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    xs = jax.random.uniform(jax.random.key(2), (case.batch, case.sizes[0]))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(take(state, xs))
        seconds.append(time.perf_counter() - began)
    return {
        "sizes": list(case.sizes),
        "batch": case.batch,
        "matmul_peak": peak,
        "bound_ms": 1e3 * flops(case) / peak,
        "measured_ms": 1e3 * float(np.median(seconds[2:])),
    }


def main(argv: Sequence[str]) -> int:
    """Check the model and write `roofline.json` and `roofline.md`; 1 if it is not as said."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks roofline",
        description="Predict steps on 1 to 1,024 devices, checked by compiling for 8 CPU devices.",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the page is kept")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    rows = []
    for case in cases():
        rows.append(check(case))
        row = rows[-1]
        print(f"{title(row)}: {row['error']:+.1%} of XLA's operations", file=sys.stderr, flush=True)
    stored = {
        "environment": environment(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "checked": rows,
        "here": on_this_machine(matmul_peak()),
        "scale": {device.name: scale(device) for device in (H100, TPU_V5E)},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "roofline.json", stored)
    write_atomic(options.out / "roofline.md", page(stored).encode())
    print(options.out / "roofline.md")
    wrong = [title(row) for row in rows if not is_right(row)]
    for name in wrong:
        print(f"benchmarks: roofline: not as predicted: {name}", file=sys.stderr)
    return 1 if wrong else 0


def is_right(row: dict[str, Any]) -> bool:
    """Tell whether a case is within what the model promises.

    Bytes are equal where the library says which collectives there are; how XLA writes a scatter of
    gradients under `shard_params` is its own affair, and differs between backends.
    """
    bytes_right = row["layout"] == FSDP or row["bytes"] == row["predicted_bytes"]
    return abs(row["error"]) <= TOLERANCE and bytes_right


def title(row: dict[str, Any]) -> str:
    """Name a case."""
    sizes = "-".join(map(str, row["sizes"]))
    return f"{sizes}, batch {row['batch']:,}, {row['layout']}"


def page(stored: dict[str, Any]) -> str:
    """Write what a person reads."""
    checked, here = stored["checked"], stored["here"]
    errors = [row["error"] for row in checked]
    equal = sum(row["bytes"] == row["predicted_bytes"] for row in checked)
    parts = [
        "# A model of scale",
        "Written by `python -m benchmarks roofline`; the formulas stand in "
        "`benchmarks/roofline.py`. No accelerator was measured: times are bounds from published "
        "figures, with products at 40 % of the peak.",
        f"Operations a device are within {min(errors):+.1%} to {max(errors):+.1%} of XLA's in "
        f"{len(errors)} compiled programs; the bytes of collectives are equal in {equal}.",
        f"Measured here: {'-'.join(map(str, here['sizes']))}, batch {here['batch']:,}, on the CPU "
        f"takes {here['measured_ms']:.1f} ms, and would take {here['bound_ms']:.1f} ms at the "
        "measured peak of matrix products.",
        "## Checked by compiling for 8 CPU devices",
        markdown(
            [
                ["step", "GFLOP a device", "XLA's", "", "bytes", "XLA's"],
                *(
                    [
                        title(row),
                        f"{row['predicted_flops'] / 1e9:.3f}",
                        f"{row['flops'] / 1e9:.3f}",
                        f"{row['error']:+.1%}",
                        f"{row['predicted_bytes']:,.0f}",
                        f"{row['bytes']:,}",
                    ]
                    for row in checked
                ),
            ],
            right=(1, 2, 3, 4, 5),
        ),
    ]
    for name, rows in stored["scale"].items():
        parts += [f"## {name}", f"{ROWS:,} samples a device and step.", _table(rows)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["encoder", "devices", "layout", "compute", "memory", "links", "step, ms"]
    head += ["samples/s", "efficiency", "GB", "limit"]
    lines = [head]
    for row in rows:
        low, high = row["step_ms"]
        lines.append(
            [
                "-".join(map(str, row["sizes"])),
                f"{row['devices']:,}",
                row["layout"],
                *(f"{row[name]:.3f}" for name in ("compute_ms", "memory_ms", "links_ms")),
                f"{low:.3f} – {high:.3f}",
                f"{row['samples_per_second']:.3g}",
                f"{row['efficiency'][0]:.2f}",
                f"{row['gigabytes']:.1f}{'' if row['fits'] else ', too much'}",
                row["limit"],
            ]
        )
    return markdown(lines, right=(1, 3, 4, 5, 6, 7, 8, 9))
