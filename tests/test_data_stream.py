"""Streaming: the same rows as in memory, resumable to the bit, in bounded memory."""

import functools
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from jaxcae import data
from jaxcae.data.stream import StreamedBatches
from jaxcae.errors import InputError


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    np.save(tmp_path / "a.npy", rng.random((1003, 17)))
    return tmp_path / "a.npy"


def test_the_split_is_the_one_in_memory(path: Path) -> None:
    streamed = data.NpySource(path).split(0.2, seed=3)
    in_memory = data.split(data.load(path), 0.2, seed=3)
    for part, want in zip(streamed, in_memory, strict=True):
        assert len(part) == len(want)
        np.testing.assert_array_equal(np.concatenate(list(part.blocks(100))), want.features)


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(path: Path) -> None:
    rows = data.load(path).features
    iterator = data.stream(path, 64, seed=5, epochs=2, drop_remainder=False)
    batches = list(iterator)
    iterator.close()
    first, second = (np.concatenate(batches[i : i + 16]) for i in (0, 16))
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.sort(rows[:, 0]))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, rows)


def test_whole_batches_have_one_shape(path: Path) -> None:
    iterator = data.stream(path, 64, epochs=2)
    assert [batch.shape for batch in iterator] == [(64, 17)] * (2 * (1003 // 64))
    iterator.close()


@pytest.mark.parametrize("stop", [0, 1, 14, 15, 22])
def test_it_resumes_at_the_same_bits(path: Path, stop: int) -> None:
    def start() -> object:
        return data.stream(path, 64, seed=7, epochs=2)

    straight = start()
    want = list(straight)
    straight.close()
    interrupted = start()
    for _ in range(stop):
        next(interrupted)
    state = interrupted.get_state()
    interrupted.close()
    resumed = start()
    resumed.set_state(state)
    got = list(resumed)
    resumed.close()
    assert len(got) == len(want) - stop
    for batch, expected in zip(got, want[stop:], strict=True):
        np.testing.assert_array_equal(batch, expected)


@pytest.mark.parametrize("step", [0, 1, 15, 16, 40])
def test_training_batches_are_found_again_from_a_step(path: Path, step: int) -> None:
    source = data.NpySource(path)
    batches = data.StreamedBatches(source, 64, seed=7)
    assert batches.steps_per_epoch == 16
    straight = batches.from_step(0)
    want = list(islice(straight, 48))
    straight.close()
    assert [len(batch) for batch in want] == ([64] * 15 + [43]) * 3
    resumed = batches.from_step(step)
    got = list(islice(resumed, 48 - step))
    resumed.close()
    for batch, expected in zip(got, want[step:], strict=True):
        np.testing.assert_array_equal(batch, expected)


def test_training_from_a_file_resumes_to_the_same_bits(path: Path) -> None:
    import jax
    import optax

    import jaxcae
    from jaxcae.training import TrainState, fit

    model = jaxcae.mlp((17, 8, 3))
    loss, optimizer = jaxcae.cae_loss(model), optax.adam(1e-3)
    batches = data.StreamedBatches(data.NpySource(path), 64, seed=1)
    start = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    whole, history = fit(loss, optimizer, start, batches, epochs=3)
    part, first = fit(loss, optimizer, start, batches, epochs=1)
    resumed, _ = fit(loss, optimizer, part, batches, epochs=3, history=first)
    assert history[-1]["loss"] < history[0]["loss"]
    assert int(whole.step) == 48
    for got, want in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_the_seed_decides_the_order(path: Path) -> None:
    firsts = []
    for seed in (0, 0, 1):
        iterator = data.stream(path, 64, seed)
        firsts.append(next(iterator))
        iterator.close()
    np.testing.assert_array_equal(firsts[0], firsts[1])
    assert not np.array_equal(firsts[0], firsts[2])


def test_standardisation_is_applied_on_the_way(path: Path) -> None:
    dataset = data.load(path, standardize=True)
    fitted = data.Standardization.fit(dataset.features)
    source = data.NpySource(path, standardization=fitted)
    want = dataset.standardized(fitted).features
    np.testing.assert_array_equal(np.concatenate(list(source.blocks(90))), want)
    np.testing.assert_array_equal(source[7], want[7])


@pytest.mark.parametrize("ahead", [True, False])
def test_an_unusable_value_names_its_row(tmp_path: Path, ahead: bool) -> None:
    array = np.ones((500, 3))
    array[321, 2] = np.inf
    np.save(tmp_path / "a.npy", array)
    train, _ = data.NpySource(tmp_path / "a.npy").split(0.01)
    if ahead:
        with pytest.raises(InputError, match=r"1 value.*inf at row 321, column 2"):
            train.check()
        return
    iterator = data.stream(train, 10)
    with pytest.raises(InputError, match=r"1 value.*inf at row 321, column 2"):
        list(islice(iterator, 50))
    iterator.close()


def test_a_file_that_shrinks_is_an_error_and_not_a_crash(path: Path) -> None:
    source = data.NpySource(path)
    os.truncate(path, 5000)
    with pytest.raises(InputError, match="row 900 is gone"):
        source[900]


def test_fortran_order_is_refused_for_streaming(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(np.ones((50, 3))))
    with pytest.raises(InputError, match="Fortran order"):
        data.NpySource(tmp_path / "a.npy").check()


def test_fewer_rows_than_a_batch_are_refused(path: Path) -> None:
    with pytest.raises(InputError, match="1003 rows do not fill one batch of 1004"):
        data.stream(path, 1004)


def folder_of(parts: list[np.ndarray], folder: Path) -> Path:
    folder.mkdir()
    for number, part in enumerate(parts):
        np.save(folder / f"part-{number}.npy", part)
    return folder


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "uint8"])
def test_a_folder_is_one_set(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    """In the order of its numbers, read across files, split and streamed as one file is."""
    whole = (100 * rng.random((60, 3))).astype(dtype)
    folder = folder_of(np.array_split(whole, 12), tmp_path / "folder")
    np.save(tmp_path / "whole.npy", whole)
    many, one = data.NpySource(folder), data.NpySource(tmp_path / "whole.npy")
    assert len(many) == 60
    rows = np.array([59, 3, 17, 16, 0, 3])
    np.testing.assert_array_equal(many.read(rows), whole[rows].astype(np.float32))
    for a, b in zip(many.split(0.3, seed=1), one.split(0.3, seed=1), strict=True):
        np.testing.assert_array_equal(np.concatenate(list(a.blocks(7))), a.read(np.arange(len(a))))
        streams = [data.stream(source, 4, seed=2, epochs=1) for source in (a, b)]
        for got, want in zip(*streams, strict=True):
            np.testing.assert_array_equal(got, want)
        for iterator in streams:
            iterator.close()
    np.testing.assert_array_equal(np.concatenate(list(many.scan(13))), whole.astype(np.float32))
    loaded = data.load(folder)
    assert (loaded.name, loaded.features.dtype) == ("folder", np.float32)
    np.testing.assert_array_equal(loaded.features, whole.astype(np.float32))
    with pytest.raises(
        InputError, match=r"folder: needs 720 bytes in memory, the cap is 719 bytes"
    ):
        data.load(folder, max_bytes=719)


def test_a_folder_says_which_file_is_wrong(tmp_path: Path) -> None:
    parts = [np.ones((4, 3)) for _ in range(3)]
    parts[1][2, 1] = np.nan
    with pytest.raises(InputError, match=r"nan at row 2 of part-1.npy, column 1"):
        data.NpySource(folder_of(parts, tmp_path / "a")).read(np.arange(12))
    for name, other in (("b", np.ones((4, 2))), ("c", np.ones((4, 3), np.float32))):
        with pytest.raises(InputError, match=r"part-3\.npy: . features of .*part-0\.npy has 3 of"):
            data.NpySource(folder_of([*parts, other], tmp_path / name))
    with pytest.raises(InputError, match=r"no \.npy files in this folder"):
        data.NpySource(folder_of([], tmp_path / "d"))
    with pytest.raises(InputError, match=r"part-1\.npy: 1 value.* nan"):
        data.load(tmp_path / "a")
    with pytest.raises(InputError, match=r"no \.npy files in this folder"):
        data.load(tmp_path / "d")


def test_a_batch_is_one_read_of_any_rows() -> None:
    """Rows of one's own, with `len` and `read` alone; each epoch a permutation."""

    class Squares:
        asked: list[np.ndarray]

        def __init__(self) -> None:
            self.asked = []

        def __len__(self) -> int:
            return 10

        def read(self, rows: np.ndarray) -> np.ndarray:
            self.asked.append(rows)
            return np.square(rows, dtype=np.float32)[:, None]

    rows = Squares()
    batches = list(islice(data.StreamedBatches(rows, 4, seed=3).from_step(0), 6))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)[:, 0]), np.arange(10) ** 2)
    assert all(len(asked) > 1 for asked in rows.asked)


_MEASURE = """
import resource, sys
import numpy as np
from jaxcae import data

source = data.NpySource(sys.argv[1])
train, held_out = source.split(0.1, seed=0)
# Both paths once on a little, so that imports and threads are not counted.
iterator = data.stream(train, 256, seed=0)
next(iterator)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source.check()
for _ in range(len(train) // 256):
    batch = next(iterator)
for block in held_out.blocks(256):
    pass
iterator.close()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_stays_bounded_whatever_the_size_of_the_file(tmp_path: Path) -> None:
    """Peak memory grows by less than 16 MB while every row of a 256 MB file is read twice."""
    path = tmp_path / "large.npy"
    large = np.lib.format.open_memmap(path, "w+", np.float32, (1 << 16, 1 << 10))
    large[::1000] = 1
    large.flush()
    del large
    size = path.stat().st_size
    growth = int(
        subprocess.run(
            [sys.executable, "-c", _MEASURE, str(path)], check=True, capture_output=True, text=True
        ).stdout
    )
    assert size > 256 << 20
    assert growth < 16 << 20, f"{growth >> 20} MB for a file of {size >> 20} MB"


class Counted:
    """Rows that count how many of them were read."""

    def __init__(self, xs):
        self.xs, self.count = xs, 0

    def __len__(self):
        return len(self.xs)

    def read(self, rows):
        self.count += len(rows)
        return self.xs[rows]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_read_their_parts_of_the_same_batches(count, rng):
    """Together they are the batch that one would read, its short last one included."""
    xs = rng.random((23, 3), np.float32)
    whole = StreamedBatches(Counted(xs), 6, 1).from_step(2)
    parts, sources = [], []
    for number in range(count):
        sources.append(Counted(xs))
        batches = StreamedBatches(sources[-1], 6, 1)
        mine = functools.partial(lambda number, size: np.arange(number, size, count), number)
        parts.append(batches.of_rows(mine).from_step(2))
    for _ in range(5):
        expected = next(whole)
        got = [next(part) for part in parts]
        np.testing.assert_array_equal(sum(got), expected)
        assert all(batch.shape == expected.shape for batch in got)
    for part in (whole, *parts):
        part.close()
    assert max(source.count for source in sources) <= (9 * 6) / count + 9
