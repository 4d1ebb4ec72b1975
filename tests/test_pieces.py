"""Checkpoints of a state that processes share: saved by two, read by one, two and four."""

import json
import random
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcae.runs import leaves, pieces
from jaxcae.runs.checkpoints import Checkpoints
from jaxcae.runs.leaves import CheckpointError, check_digests, describe
from tests.test_processes import own_lines, start  # noqa: F401

WORK = """
import sys
from pathlib import Path
port, count, me, mode, where = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
from jaxcae.devices import processes
if count > 1:
    processes.start(f"127.0.0.1:{port}", count, me, prog="run")
import jax, numpy as np
from jaxcae.runs.checkpoints import Checkpoints, CheckpointError
from tests.test_pieces import placed
state, checkpoints = placed(), Checkpoints(Path(where))
if mode == "save":
    checkpoints.save(7, state, {"a": 1})
else:
    try:
        loaded, record = checkpoints.load(7, state)
    except CheckpointError as error:
        processes.leave(1, f"run: refused {error}")
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state)):
        for x, y in zip(a.addressable_shards, b.addressable_shards):
            assert jax.numpy.array_equal(x.data, y.data)
    print(record["a"])
processes.finish()
"""


def placed():
    """A state whose parameters all devices share, along the first axis and the second."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = {"w": P("data"), "v": P(None, "data"), "b": P()}

    def make():
        rows = jax.random.normal(jax.random.key(0), (16, 12))
        params = {"w": rows, "v": 2 * rows.T, "b": rows[0]}
        return {"params": params, "key": jax.random.key(3), "step": jax.numpy.int32(7)}

    lies = {"params": split, "key": P(), "step": P()}
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), lies, is_leaf=lambda x: isinstance(x, P)
    )
    return jax.jit(make, out_shardings=shardings)()


def run(start, count, mode, where):  # noqa: F811
    def command(port, me):
        return [sys.executable, "-c", WORK, str(port), str(count), str(me), mode, str(where)]

    return start(count, command).ended()


@pytest.mark.slow
def test_two_processes_save_and_any_number_loads(start, tmp_path):  # noqa: F811
    """Digests per slice where it lies; one flipped byte is refused, by the name of its file."""
    assert [code for code, _, _ in run(start, 2, "save", tmp_path)] == [0, 0]
    described = Checkpoints(tmp_path).read_record(7)["leaves"]
    assert described["params/w"][2].startswith("0:")
    assert described["params/v"][2].startswith("1:")
    for count in (1, 2, 4):
        assert [(c, o) for c, o, _ in run(start, count, "load", tmp_path)] == [(0, "1\n")] * count
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert len(files) >= 2
    file = random.Random(0).choice(sorted(files))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = run(start, 2, "load", tmp_path)
    assert [code for code, _, _ in found] == [1, 1]
    lines = [line for _, _, err in found for line in own_lines(err)]  # one may end the other
    assert any("refused" in line and file.name in line for line in lines), lines


@pytest.mark.slow
def test_a_wrong_number_is_refused_by_the_name_of_its_leaf(start, tmp_path):  # noqa: F811
    """Where the files are as they were saved, but not what was to be saved."""
    run(start, 2, "save", tmp_path)
    checkpoint = tmp_path / "7"
    metadata = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
    record = leaves_of(metadata)
    digest = record["leaves"]["params/v"]
    digest[2] = "1:" + "0" * 64
    metadata["custom_metadata"]["record"] = sealed(record)
    (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    (checkpoint / "manifest.json").unlink()
    found = run(start, 4, "load", tmp_path)
    assert [code for code, _, _ in found] == [1] * 4
    lines = [line for _, _, err in found for line in own_lines(err)]
    assert any("params/v differs from its digest" in line for line in lines), lines


def leaves_of(metadata):
    from jaxcae.files import unseal

    return unseal(metadata["custom_metadata"]["record"], "test")


def sealed(record):
    from jaxcae.files import seal

    return seal(record)


def test_a_sum_over_slices_does_not_depend_on_who_held_them(rng):
    """Any cut gives the sum of the whole; a slice elsewhere, or another number, does not."""
    data = rng.normal(size=(6, 5)).astype(np.float32)
    for axis, size in enumerate(data.shape):
        whole = pieces._sum(data, axis, 0)
        for cut in range(1, size):
            parts = np.split(data, [cut], axis)
            got = pieces._sum(parts[0], axis, 0) + pieces._sum(parts[1], axis, cut)
            assert got % 2**256 == whole
        assert pieces._sum(np.roll(data, 1, axis), axis, 0) != whole
        other = data.copy()
        other[2, 3] = np.nextafter(other[2, 3], np.float32(9))
        assert pieces._sum(other, axis, 0) != whole


def test_one_process_verifies_what_many_have_saved(rng):
    """A digest along an axis is computed as it was stored, and a changed leaf is named."""
    data = {"w": rng.normal(size=(6, 5)).astype(np.float32)}
    stored = describe(data)
    stored["w"][2] = "1:" + pieces.digests_along({"w": (data["w"], 1)})["w"]
    check_digests(stored, data, "here")
    with pytest.raises(CheckpointError, match="here: w differs"):
        check_digests(stored, {"w": data["w"] + 1}, "here")
    assert leaves.describe(data)["w"][2] != stored["w"][2]
