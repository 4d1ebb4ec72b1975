"""Checkpoints: exact, or refused; real bits are flipped, real files cut, a real disk filled."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcae
from jaxcae.errors import InputError
from jaxcae.runs import checkpoints as module
from jaxcae.runs import params_file
from jaxcae.runs.checkpoints import Checkpoints
from jaxcae.runs.leaves import CheckpointError, digest_of_tree
from jaxcae.runs.params_file import load_params, save_params
from jaxcae.training import TrainState

STEP = 7

# Where a file is unreadable, Orbax leaves coroutines behind that complain when they are collected.
ORBAX_LEAVES_COROUTINES = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A state whose bits are all in use: nothing is left at the zeros of an initialiser."""
    model, optimizer = jaxcae.mlp((6, 4, 2)), optax.adam(1e-2)
    state = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    step = jaxcae.make_train_step(jaxcae.cae_loss(model, None), optimizer)
    for _ in range(STEP):
        state, _ = step(state, jax.random.uniform(jax.random.key(2), (8, 6)))
    return state


@pytest.fixture(scope="module")
def saved(state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(STEP, state, {"note": "as saved"})
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte, where the user may mount one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system here; the file-size limit is tested instead")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / str(STEP)).rglob("*") if path.is_file())


def outcome(directory: Path, state: TrainState) -> str:
    """Load, and say `exact` or `refused`; anything else is a failure of the test."""
    try:
        loaded, record = Checkpoints(directory).load(STEP, state)
    except CheckpointError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert "\n" not in message
        assert str(directory) in message
        return "refused"
    assert digest_of_tree(loaded) == digest_of_tree(state), "a wrong number came out"
    assert record["note"] == "as saved"
    return "exact"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def test_every_kind_of_leaf_comes_back_as_it_was(tmp_path: Path) -> None:
    tree = {
        "params": {"kernel": jnp.arange(6.0).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16) / 3},
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(6), 3),
        "rbg": jax.random.key(7, impl="rbg"),
        "step": jnp.asarray(3, jnp.int32),
        "flag": jnp.asarray(True),
        "bytes": jnp.asarray([0, 255], jnp.uint8),
        "infinite": jnp.asarray(jnp.inf),  # an optimizer's best loss so far
        "adam": optax.adam(1e-3).init({"w": jnp.ones((2, 2))}),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {"floats": [0.1, 1e-300, -0.0], "text": "λ"})
        loaded, record = checkpoints.load(1, tree)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
    assert digest_of_tree(loaded) == digest_of_tree(tree)
    assert record["floats"] == [0.1, 1e-300, -0.0]
    assert record["text"] == "λ"


def test_what_jax_would_not_give_back_is_not_saved(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="step is int64"),
    ):
        checkpoints.save(1, {"step": np.int64(3)}, {})
    assert Checkpoints(tmp_path).steps() == []


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, state: TrainState) -> None:
    bad = state.replace(params=jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(CheckpointError, match="params/decoder/layer_0/bias is not finite"):
            checkpoints.save(2, bad, {})
        assert checkpoints.steps() == [1]


@ORBAX_LEAVES_COROUTINES
@pytest.mark.parametrize(
    "manifest", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["by file", "by leaf"]
)
def test_one_flipped_bit_in_any_file(
    manifest: bool, copy: Path, saved: Path, state: TrainState, rng: np.random.Generator
) -> None:
    """With the manifest, and with what is left if the process died before it was written."""
    outcomes = {"exact": 0, "refused": 0}
    if not manifest:
        (copy / str(STEP) / "manifest.json").unlink()
    for path in files_of(copy):
        whole = path.read_bytes()
        if not whole:  # a mark whose name says all
            continue
        # The arrays are in the largest files: there, and in small ones, more than one bit.
        for bit in rng.integers(8 * len(whole), size=2 if len(whole) < 3000 else 8):
            flip(path, int(bit))
            outcomes[outcome(copy, state)] += 1
            path.write_bytes(whole)
    assert outcome(copy, state) == "exact"
    assert outcomes["refused"] > 20
    if manifest:
        assert outcomes["exact"] == 0


@ORBAX_LEAVES_COROUTINES
@pytest.mark.parametrize(
    "manifest", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["by file", "by leaf"]
)
def test_a_truncated_or_missing_file(
    manifest: bool, copy: Path, state: TrainState, rng: np.random.Generator
) -> None:
    if not manifest:
        (copy / str(STEP) / "manifest.json").unlink()
    for path in files_of(copy):
        whole = path.read_bytes()
        for length in sorted({0, len(whole) // 2, max(len(whole) - 1, 0)} - {len(whole)}):
            path.write_bytes(whole[:length])
            if manifest and path.name != "manifest.json":
                with pytest.raises(CheckpointError, match=path.name):
                    Checkpoints(copy).load(STEP, state)
            else:
                outcome(copy, state)
        path.unlink()
        if manifest and path.name != "manifest.json":
            with pytest.raises(CheckpointError, match=f"{path.name}: missing"):
                Checkpoints(copy).load(STEP, state)
        else:
            outcome(copy, state)
        path.write_bytes(whole)


def test_the_digest_of_a_leaf_decides_alone(
    copy: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax itself reads other numbers without a word: rewrite the arrays, keep the record."""
    from orbax.checkpoint import v1 as ocp

    record = Checkpoints(copy).read_record(STEP)
    other = state.replace(params=jax.tree.map(lambda x: x * (1 + 2**-23), state.params))
    shutil.rmtree(copy / str(STEP))
    ocp.save_checkpointables(
        copy / str(STEP),
        {"state": other},
        custom_metadata={"record": module.seal(record)},
    )
    with pytest.raises(CheckpointError, match=r"params/\S+, .* differs from its digest"):
        Checkpoints(copy).load(STEP, state)


def test_a_checkpoint_of_a_terabyte_is_not_read(copy: Path, state: TrainState) -> None:
    """A sparse file costs its maker nothing, and whoever reads it an hour."""
    with (copy / str(STEP) / "state" / "more").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=r"7: 1,099,.* bytes, expected at most .*; not read"):
        Checkpoints(copy).load(STEP, state)


def test_another_model_is_named_before_anything_is_loaded(copy: Path, state: TrainState) -> None:
    wider = jaxcae.mlp((6, 5, 2)).init(jax.random.key(0))
    deeper = jaxcae.mlp((6, 4, 3, 2)).init(jax.random.key(0))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    for params, message in (
        (wider, r"params/decoder/layer_0/bias is float32\[4\], expected float32\[5\]"),
        (deeper, "is missing"),
        (half, r"is float32\[4\], expected bfloat16\[4\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Checkpoints(copy).load(STEP, state.replace(params=params))


def test_a_checkpoint_under_another_step_is_refused(copy: Path, state: TrainState) -> None:
    (copy / str(STEP)).rename(copy / "9")
    with pytest.raises(CheckpointError, match="step 9, its record says format 1 and step 7"):
        Checkpoints(copy).load(9, state)


def test_the_newest_are_kept_and_debris_goes(tmp_path: Path, state: TrainState) -> None:
    debris = tmp_path / f"5{module.DEBRIS}"
    (debris / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == []
        for step in (1, 2, 3):
            checkpoints.save(step, state, {})
        assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_full_disk_keeps_the_old_checkpoints(
    small_disk: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(small_disk) as checkpoints:
        checkpoints.save(1, state, {})
        filler = small_disk / "filler"
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(free - 16384))
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved: .* bytes are free"):
            checkpoints.save(2, state, {})
        # Even where the check was passed and the disk filled up afterwards.
        monkeypatch.setattr(module, "check_free_space", lambda *_: None)
        with pytest.raises(CheckpointError, match="step 2 could not be saved"):
            checkpoints.save(2, state, {})
        assert [path.name for path in small_disk.iterdir() if path != filler] == ["1"]
        assert digest_of_tree(checkpoints.load(1, state)[0]) == digest_of_tree(state)
    filler.unlink()
    with Checkpoints(small_disk) as checkpoints:
        checkpoints.save(2, state, {})
        assert checkpoints.steps() == [1, 2]


LIMITED = """
import resource, sys, threading
from pathlib import Path
import jax, jax.numpy as jnp
from jaxcae.runs.checkpoints import Checkpoints
from jaxcae.runs.leaves import CheckpointError, digest_of_tree
small, large = {"w": jnp.ones(10)}, {"w": jax.random.normal(jax.random.key(0), (100_000,))}
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(1, small, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    for _ in range(10):
        try:
            checkpoints.save(2, large, {})
        except CheckpointError as error:
            print(error)
        left = [t for t in threading.enumerate() if type(t).__module__.startswith("orbax.")]
        assert not left, f"still at work after the save has failed: {left}"
    assert sorted(p.name for p in Path(sys.argv[1]).iterdir()) == ["1"]
    assert digest_of_tree(checkpoints.load(1, small)[0]) == digest_of_tree(small)
"""


def test_a_limit_on_file_size_keeps_the_old_checkpoints(tmp_path: Path) -> None:
    """The same where nothing can be mounted: every write of a larger file fails."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all("step 2 could not be saved" in line for line in lines)


@pytest.fixture(scope="module")
def params() -> Any:
    return jaxcae.mlp((6, 4, 2)).init(jax.random.key(0))


@pytest.fixture
def file(params: Any, tmp_path: Path) -> Path:
    path = tmp_path / "params.safetensors"
    save_params(path, params, {"note": "as saved"})
    return path


def test_params_come_back_as_they_were(file: Path, params: Any) -> None:
    loaded, record = load_params(file, jax.eval_shape(lambda: params))
    assert digest_of_tree(loaded) == digest_of_tree(params)
    assert record["note"] == "as saved"


def test_params_are_read_by_safetensors_alone(file: Path, params: Any) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(file)
    np.testing.assert_array_equal(
        tensors["encoder.layer_0.kernel"], params["encoder"]["layer_0"]["kernel"]
    )
    assert len(tensors) == 8


def test_one_flipped_bit_or_a_cut_in_params(
    file: Path, params: Any, rng: np.random.Generator
) -> None:
    whole = file.read_bytes()
    refused = 0
    for bit in rng.choice(8 * len(whole), size=400, replace=False):
        flip(file, int(bit))
        try:
            loaded, _ = load_params(file, params)
        except CheckpointError:
            refused += 1
        else:
            assert digest_of_tree(loaded) == digest_of_tree(params), "a wrong number came out"
        file.write_bytes(whole)
    assert refused > 380  # a few hit what says nothing, such as the name of the format
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=file.name):
            load_params(file, params)


def test_safetensors_alone_would_have_missed_it(file: Path, params: Any) -> None:
    """The reason for the digests: the last bit of the file is a weight's."""
    from safetensors.numpy import load_file

    before = load_file(file)
    flip(file, 8 * (file.stat().st_size - 1))
    after = load_file(file)
    assert any((before[name] != after[name]).any() for name in before)
    with pytest.raises(CheckpointError, match="differs from its digest"):
        load_params(file, params)


def test_hostile_params_are_refused(file: Path, params: Any, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    with pytest.raises(CheckpointError, match="symbolic link"):
        load_params(link, params)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_params(tmp_path / "absent.safetensors", params)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_params(tmp_path, params)
    whole = file.read_bytes()
    file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header claims"):
        load_params(file, params)
    file.write_bytes(whole + bytes(40 * 2**20))
    with pytest.raises(CheckpointError, match="expected at most"):
        load_params(file, params)


def test_other_tensors_are_refused(tmp_path: Path, params: Any) -> None:
    path = tmp_path / "other.safetensors"
    save_params(path, {**params, "../../etc/passwd": jnp.ones(2)}, {})
    with pytest.raises(CheckpointError, match="is not expected"):
        load_params(path, params)
    save_params(path, jaxcae.mlp((6, 5, 2)).init(jax.random.key(0)), {})
    with pytest.raises(CheckpointError, match=r"is float32\[5\], expected float32\[4\]"):
        load_params(path, params)


def test_two_leaves_of_one_name_are_refused(tmp_path: Path) -> None:
    """One of them would be lost, and the other loaded twice."""
    tree = {"b.c": np.ones(2, np.float32), "b": {"c": np.zeros(2, np.float32)}}
    with pytest.raises(InputError, match=r"two leaves of the tree are called b\.c,"):
        save_params(tmp_path / "p.safetensors", tree, {})
    assert not (tmp_path / "p.safetensors").exists()


def test_a_dtype_that_the_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kernel: safetensors cannot hold int4"):
        save_params(tmp_path / "p.safetensors", {"kernel": jnp.ones(2, jnp.int4)}, {})


@pytest.mark.parametrize(
    "leaf",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2, 1:],
        np.broadcast_to(np.float32(2), (3, 2)),
        np.asfortranarray(np.eye(3, dtype=np.float16)),
        np.arange(3) / 3,
        np.arange(3) + 2**40,
        np.float64(1) / 3,
    ],
    ids=["transposed", "strided", "broadcast", "Fortran", "float64", "int64", "scalar"],
)
def test_arrays_of_numpy_come_back_as_they_were(tmp_path: Path, leaf: Any) -> None:
    """However they lie in memory, and with all their digits, whatever JAX is set to."""
    save_params(tmp_path / "p.safetensors", {"a": leaf}, {})
    back = load_params(tmp_path / "p.safetensors", {"a": leaf})[0]["a"]
    assert back.dtype == leaf.dtype
    assert back.shape == leaf.shape
    np.testing.assert_array_equal(back, leaf)


def test_what_is_no_array_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    for leaf, message in ((0.5, "b is 0.5, a float"), (jax.random.key(0), "b: is a key")):
        with pytest.raises(InputError, match=message):
            save_params(tmp_path / "p.safetensors", {"b": leaf}, {})
    with pytest.raises(InputError, match="params/b is 3, a int; expected an array"):
        Checkpoints(tmp_path / "c").save(1, {"params": {"b": 3}}, {})
    assert list(tmp_path.iterdir()) == []


def test_parameters_are_arrays_of_jax_and_of_a_known_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, params = tmp_path / "p.safetensors", {"a": np.ones(2, np.float32)}
    save_params(path, params, {})
    assert isinstance(load_params(path, params)[0]["a"], jax.Array)
    with monkeypatch.context() as patch:
        patch.setattr(params_file, "FORMAT", 2)
        save_params(path, params, {})
    with pytest.raises(CheckpointError, match="expected format 1, got 2"):
        load_params(path, params)
