"""Fuzzing: whatever the bytes, the answer is exact or a refusal, quick, small, and leaves no trace.

Mutations of sound files get further than noise, so most examples are sound files with a few bytes
changed, cut out, repeated or cut off.
"""

import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxcae import data
from jaxcae.cli import main
from jaxcae.errors import InputError
from tests import hostile
from tests.trained import fingerprint, train_digits

SECONDS = 2.0
"""Of the processor, so that a busy machine does not fail the test; ten times that of the clock."""
GROWTH = 256 << 20
CAP = 64 << 20


def _seeds() -> dict[str, list[bytes]]:
    rng = np.random.default_rng(0)
    array = rng.random((7, 3), np.float32)
    near = np.full((6, 4), 1e38, np.float32)  # one bit or one digit away from infinity
    return {
        ".npy": [
            hostile.npy(array),
            hostile.npy(np.asfortranarray(array.astype(">f8"))),
            hostile.npy(np.arange(12, dtype=np.int64).reshape(4, 3)),
            hostile.npy(near),
            hostile.npy(near.astype(np.float64)),
        ],
        ".npz": [hostile.npz(features=array, labels=np.arange(7)), hostile.npz(anything=array)],
        ".csv": [
            b"a,b,label\n1,2.5,0\n-3,4e2,1\n",
            b"\xef\xbb\xbf1,2\r\n3,4\r\n",
            b"1e38,2e38\n3e38,1e37\n",
            "\n".join(",".join(map(repr, row)) for row in array.tolist()).encode(),
        ],
    }


SEEDS = _seeds()


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draw a sound file with some damage, or noise."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["set", "flip", "cut", "repeat", "insert", "end"]))
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        size = draw(st.integers(1, 40))
        if kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + size]
        elif kind == "repeat":
            content[at:at] = content[at : at + size] * draw(st.integers(1, 50))
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=20))
        elif kind == "end":
            del content[at:]
    return bytes(content)


class _Watch:
    """Sees that what it spans is quick and small."""

    def __enter__(self) -> None:
        self._peak, self._clock, self._processor = _peak(), time.monotonic(), time.process_time()

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            assert time.process_time() - self._processor < SECONDS
            assert time.monotonic() - self._clock < 10 * SECONDS
            assert _peak() - self._peak < GROWTH


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _check_reader(folder: Path, suffix: str, content: bytes) -> bool:
    """Read a file; return whether it was accepted."""
    path = folder / f"fuzz{suffix}"
    path.write_bytes(content)
    with _Watch():
        try:
            dataset = data.load(path, max_bytes=CAP)
        except InputError as error:
            dataset, message = None, str(error)
    if dataset is None:
        assert "\n" not in message
        assert message.startswith(str(path))
        assert len(message) < 600 + len(str(path))
    else:
        assert dataset.features.dtype == np.float32
        assert dataset.features.ndim == 2
        assert min(dataset.features.shape) > 0
        assert np.isfinite(dataset.features).all()
        if dataset.labels is not None:
            assert len(dataset.labels) == len(dataset)
    assert [p.name for p in folder.iterdir()] == [path.name]
    path.unlink()
    return dataset is not None


@pytest.mark.parametrize("suffix", SEEDS)
def test_readers_on_damaged_files(folder: Path, suffix: str) -> None:
    outcomes = set()

    @settings(max_examples=400)
    @given(mutated(SEEDS[suffix]))
    def check(content: bytes) -> None:
        outcomes.add(_check_reader(folder, suffix, content))

    check()
    assert outcomes == {True, False}, "the fuzzer saw one side only, and proved nothing"


@pytest.mark.parametrize("suffix", SEEDS)
def test_readers_on_noise(folder: Path, suffix: str) -> None:
    magic = {".npy": b"\x93NUMPY\x01\x00", ".npz": b"PK\x03\x04", ".csv": b"1,2\n"}[suffix]

    @settings(max_examples=150)
    @given(st.booleans(), st.binary(max_size=400))
    @example(False, b"")
    def check(with_magic: bool, content: bytes) -> None:
        _check_reader(folder, suffix, magic * with_magic + content)

    check()


@given(
    st.tuples(st.integers(-(2**70), 2**70), st.integers(-(2**70), 2**70)),
    st.sampled_from(["'<f4'", "'>f8'", "'|O'", "'<U9'", "'|V1000000000'", "'<f2'", "'|b1'", "[]"]),
    st.booleans(),
)
@settings(max_examples=150)
def test_headers_that_promise_anything(
    folder: Path, shape: tuple[int, int], dtype: str, fortran: bool
) -> None:
    assert not _check_reader(folder, ".npy", hostile.promise(str(shape), dtype, fortran))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_digits(tmp_path_factory.mktemp("fuzz-run") / "run")


def _files(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


@pytest.mark.slow
def test_commands_on_damaged_runs(trained: Path, tmp_path: Path) -> None:
    """Score and info on a run of which one file is damaged: the right scores, or none."""
    run, xs, output = tmp_path / "run", tmp_path / "xs.npy", tmp_path / "scores.npy"
    np.save(xs, np.random.default_rng(0).random((5, 64), np.float32))
    shutil.copytree(trained, run)
    score = ["score", str(run), "--data", str(xs), "--output", str(output)]
    commands: dict[str, list[str]] = {"score": score, "info": ["info", str(run)]}
    for command in commands.values():  # imports and compilation are not what is timed
        assert main(command) == 0
    want = np.load(output)
    output.unlink()
    names = _files(trained)
    codes: dict[str, set[int]] = {name: set() for name in commands}

    @settings(max_examples=30)
    @given(st.sampled_from(names), st.data())
    def check(name: str, draws: st.DataObject) -> None:
        sound = (trained / name).read_bytes()
        content = draws.draw(mutated([sound]))
        (run / name).write_bytes(content)
        before = fingerprint(tmp_path)
        for kind, command in commands.items():
            with _Watch():
                code = main(command)
            assert code in (0, 1, 2)
            codes[kind].add(code)
            if kind == "score" and code == 0:
                np.testing.assert_array_equal(np.load(output), want)
            output.unlink(missing_ok=True)
            assert fingerprint(tmp_path) == before
        (run / name).write_bytes(sound)

    check()
    assert 0 in codes["score"]
    assert codes["score"] & {1, 2}


def test_missing_files_of_a_run(trained: Path, tmp_path: Path) -> None:
    xs, output = tmp_path / "xs.npy", tmp_path / "scores.npy"
    np.save(xs, np.zeros((5, 64), np.float32))
    for name in _files(trained):
        run = Path(shutil.copytree(trained, tmp_path / "run"))
        (run / name).unlink()
        arguments = ["--data", str(xs), "--output", str(output)]
        code = main(["score", str(run), *arguments])
        needed = name in ("config.json", "params.safetensors", "plain.safetensors")
        assert (code in (1, 2)) if needed else (code == 0), name
        assert main(["info", str(run)]) in (0, 1, 2)
        shutil.rmtree(run)
        output.unlink(missing_ok=True)


OPTIONS = st.one_of(
    st.sampled_from(["nan", "inf", "-1", "0", "1e400", "", " ", "\0", "--", "-h", "9" * 400, "./"]),
    st.text(max_size=12),
)


@given(
    st.sampled_from(["--contraction", "--batch-size", "--data", "--sizes", "--seed", "--method"]),
    OPTIONS,
)
@settings(max_examples=100)
def test_options_that_make_no_sense(folder: Path, option: str, value: str) -> None:
    """Whatever is passed, a run that would be trained is stopped by its held-out fraction."""
    before = fingerprint(folder)
    arguments = ["train", "--run-dir", str(folder / "run"), "--held-out", "7", option, value]
    with _Watch():
        code = main(arguments)
    assert code == 2 or (code == 0 and ("-h" in value or "--help" in value)), arguments
    assert fingerprint(folder) == before
