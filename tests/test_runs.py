"""The run directory: locked, never overwritten unasked, read strictly, its log cut to the state."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcae import runs
from jaxcae.errors import InputError
from jaxcae.files import parse_json, read_json, seal, unseal, write_atomic, write_json
from jaxcae.runs import (
    LogMark,
    RunDirectory,
    RunError,
    load_run,
    open_run,
    params_path,
    read_metrics,
)
from jaxcae.runs import config as config_module
from jaxcae.runs.config import Config, differences, main_network
from jaxcae.runs.leaves import CheckpointError, digest_of_tree
from jaxcae.runs.params_file import save_params
from jaxcae.runs.recipe import make_model
from jaxcae.runs.sections import TrainingConfig, added
from tests.processes import python

CONFIG = Config.of(data="digits", sizes=(6, 4, 2), output="identity")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The directory of a run that has ended."""
    path = tmp_path / "run"
    with RunDirectory.create(path) as run:
        run.start(CONFIG)
        model = make_model(CONFIG)
        for seed, network in enumerate(CONFIG.networks):
            params = model.init(jax.random.key(seed))
            save_params(params_path(path, CONFIG, network), params, {"config": CONFIG.to_json()})
    return path


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that not even root can write to, where one can be mounted."""
    path = tmp_path / "read_only"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(path)]
    mounted = (
        shutil.which("mount") is not None
        and not subprocess.run(command, capture_output=True).returncode
    )
    if not mounted:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere, and nothing can be mounted")
        path.chmod(0o555)
    yield path
    if mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
    else:
        path.chmod(0o755)


HOLDER = """
import sys
from jaxcae.runs import RunDirectory
run = RunDirectory.create(sys.argv[1])
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    path = tmp_path / "held"
    process = python(HOLDER, str(path))
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    yield process, path
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_the_lock_dies_with_its_holder(
    holder: tuple[subprocess.Popen[str], Path],
) -> None:
    process, path = holder
    before = sorted(path.iterdir())
    assert runs.is_in_use(path)
    for overwrite in (False, True):
        with pytest.raises(RunError, match=f"held: in use by process {process.pid} on"):
            RunDirectory.create(path, overwrite=overwrite)
    assert sorted(path.iterdir()) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not runs.is_in_use(path)
    RunDirectory.create(path).discard()
    assert not path.exists()


def test_a_run_is_not_replaced_unasked(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"run: holds a run already. Use `resume=True`"):
        RunDirectory.create(finished)
    assert {p: p.read_bytes() for p in before} == before
    with RunDirectory.create(finished, overwrite=True) as run:
        # Asked for, but not yet begun: what there is stays until the new run starts.
        assert (finished / "params.safetensors").exists()
        run.start(CONFIG.replace(seed=1))
    assert not (finished / "params.safetensors").exists()
    assert runs.read_config(finished).training.seed == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(RunError, match=r"holds 'report.json' and no run"):
        RunDirectory.create(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    file = tmp_path / "report.json"
    with pytest.raises(RunError, match="cannot be made: File exists"):
        RunDirectory.create(file)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_would_not_be_replaced_is_not_advised_to_be(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "config.json").write_text('{"learning_rate": 0.1}')
    with pytest.raises(RunError, match=r"config.json: was not written by this or an earlier"):
        RunDirectory.create(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]  # not even a lock


def test_a_read_only_directory_is_refused_at_once(read_only: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be written to: Read-only|Permission denied"):
        RunDirectory.create(read_only)
    with pytest.raises(RunError, match="cannot be made"):
        RunDirectory.create(read_only / "below")


def test_only_a_run_is_opened(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="absent: no such directory"):
        RunDirectory.open(tmp_path / "absent")
    with pytest.raises(RunError, match=r"no run here \(config.json is missing\)"):
        RunDirectory.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new"
    RunDirectory.create(path).discard()
    assert not path.exists()


def test_a_finished_run_is_loaded_and_verified(finished: Path) -> None:
    config, model, params = load_run(finished)
    assert config == CONFIG
    assert digest_of_tree(params) == digest_of_tree(model.init(jax.random.key(0)))
    run = open_run(finished)
    assert digest_of_tree(run.plain) == digest_of_tree(model.init(jax.random.key(1)))
    assert run.standardization is None


def test_parameters_are_had_by_the_name_of_the_network(finished: Path) -> None:
    run = open_run(finished)
    assert run.params_of(None) is run.params_of("contractive") is run.params
    assert run.params_of("plain") is run.plain
    with pytest.raises(InputError, match="the run has contractive and plain, got 'other'"):
        run.params_of("other")


def test_parameters_of_another_configuration_are_refused(finished: Path) -> None:
    """One digit of config.json: the shapes still fit, and the numbers would be others'."""
    config = read_json(finished / "config.json")
    config = edited(config, "model", activation="tanh")
    write_json(finished / "config.json", edited(config, "objective", contraction=0.3))
    with pytest.raises(CheckpointError, match="'relu' in the run, 'tanh' asked; `contraction`"):
        load_run(finished)


def test_an_unfinished_run_is_not_loaded(finished: Path) -> None:
    (finished / "params.safetensors").unlink()
    with pytest.raises(RunError, match=r"has not finished .*Train it to its end first"):
        load_run(finished)


@pytest.mark.parametrize("name", ["config.json", "params.safetensors", "plain.safetensors"])
def test_a_symbolic_link_is_not_followed(finished: Path, tmp_path: Path, name: str) -> None:
    (finished / name).rename(tmp_path / "elsewhere")
    (finished / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises((InputError, CheckpointError), match=f"{name}: is a symbolic link"):
        load_run(finished)


def test_links_are_not_cleared(finished: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (finished / "checkpoints").symlink_to(outside)
    with pytest.raises(RunError, match="checkpoints: is a symbolic link"):
        RunDirectory.create(finished, overwrite=True)
    assert (outside / "precious").read_text() == "kept"


def edited(config: dict[str, Any], section: str, **options: Any) -> dict[str, Any]:
    """Set options of a section; `...` takes one out."""
    merged = {**config[section], **options}
    return {**config, section: {k: v for k, v in merged.items() if v is not ...}}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: {**c, "activaton": "relu"},
            "unknown section 'activaton'; choose from data, model, objective, training",
        ),
        (lambda c: edited(c, "model", activaton="relu"), "unknown option 'activaton'.* 'activatio"),
        (lambda c: edited(c, "training", seed=...), "training: the option 'seed' is missing"),
        (lambda c: edited(c, "training", seed="0"), "'seed' has the unusable value '0'"),
        (lambda c: edited(c, "model", tied=0), "model: 'tied' has the unusable value 0"),
        (lambda c: edited(c, "model", sizes=[6, 4.5]), "'sizes' has the unusable value"),
        (lambda c: edited(c, "objective", contraction=-1.0), "`contraction` must be finite and at"),
        (lambda c: edited(c, "model", activation="rel"), "activation 'rel'.* Did you mean 'relu'"),
        (lambda c: edited(c, "model", sizes=[6, 2**40]), "`sizes` must be from 1 to"),
        (lambda c: {**c, "model": [4]}, "model: expected a table of options, got list"),
        (lambda c: {k: v for k, v in c.items() if k != "model"}, "section 'model' is missing"),
        (lambda c: {**c, "format": 2}, "is in format 2, this version of jaxcae reads up to 1"),
        (lambda c: {**c, "format": 10**9, "models": {}}, "is in format 1000000000, this version"),
        (lambda c: {**c, "format": True}, "is in format True"),
        (lambda c: {**c, "format": "1"}, "is in format '1'"),
        (lambda c: {k: v for k, v in c.items() if k != "format"}, "unknown option 'objective'"),
        (lambda c: [c], "expected a table of sections, got list"),
    ],
)
def test_a_configuration_is_read_strictly(finished: Path, edit: Any, message: str) -> None:
    write_json(finished / "config.json", edit(CONFIG.to_json()))
    with pytest.raises(InputError, match=message) as caught:
        load_run(finished)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' comes twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
    ],
    ids=["duplicate", "nan", "infinity", "overflow", "deep", "bytes", "empty", "trailing"],
)
def test_json_is_parsed_strictly(text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_json(text, "config.json")


def test_json_is_capped(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_bytes(b" " * 2**21)
    with pytest.raises(InputError, match="2,097,152 bytes, expected at most 1,048,576"):
        read_json(path, 2**20)


def test_a_configuration_comes_back_as_it_was() -> None:
    config = Config.of(sizes=(784, 256, 64), contraction=1 / 3, patience=None, data="λ.npy")
    stored = json.loads(json.dumps(config.to_json()))
    assert Config.from_json(stored) == config
    other = config.replace(patience=3, tied=True)
    assert differences(config, other) == [
        "`tied`: False in the run, True asked",
        "`patience`: None in the run, 3 asked",
    ]


def test_settings_find_their_sections() -> None:
    config = Config.of(data="a.npy", sizes=(6, 2), epochs=3)
    assert (config.data.source, config.model.sizes, config.training.epochs) == ("a.npy", (6, 2), 3)
    assert config.replace(epochs=5).training.epochs == 5
    assert config.replace(epochs=5).model == config.model
    with pytest.raises(InputError, match=r"unknown setting 'epoch'.* Did you mean 'epochs'"):
        Config.of(epoch=3)
    with pytest.warns(DeprecationWarning, match=r"Config.sizes has moved: read Config.model.sizes"):
        assert config.sizes == (6, 2)
    with pytest.raises(AttributeError, match="no attribute 'size'"):
        getattr(config, "size")  # noqa: B009
    flat = dict(config.settings())
    written = config.replace(window=2).to_json()  # without one, a run says nothing of series
    assert len(flat) == sum(len(section) for section in written.values() if section != 1)


def test_what_was_written_before_a_setting_existed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """`added` gives it the value that means "as before"; all other settings must be there."""

    @dataclass(frozen=True)
    class Later(TrainingConfig):
        clipping: float | None = added(None)

    stored = CONFIG.to_json()
    sections = {**config_module._SECTIONS}
    names = {**sections["training"][1], "clipping": "clipping"}
    monkeypatch.setattr(config_module, "_SECTIONS", {**sections, "training": (Later, names)})
    assert Config.from_json(stored).training == Later(**vars(CONFIG.training))
    wrong = edited(stored, "training", clipping="much")
    with pytest.raises(InputError, match="'clipping' has the unusable value 'much'"):
        Config.from_json(wrong)


def test_a_file_without_sections_is_read_as_the_first_format() -> None:
    flat = {k: list(v) if isinstance(v, tuple) else v for k, v in CONFIG.settings()}
    assert Config.from_json(flat) == CONFIG
    for edit, message in (
        ({"seed": ...}, "the option 'seed' is missing"),
        ({"sead": 0}, "unknown option 'sead'.* Did you mean 'seed'"),
        ({"seed": True}, "'seed' has the unusable value True"),
    ):
        changed = {k: v for k, v in {**flat, **edit}.items() if v is not ...}
        with pytest.raises(InputError, match=message):
            Config.from_json(changed)


def test_the_main_network_is_the_contractive_one_unless_there_is_no_penalty() -> None:
    assert main_network(CONFIG) == "contractive"
    assert CONFIG.replace(contraction=0.0).networks == ("plain",)
    assert CONFIG.replace(contraction=0.0, curvature=0.1).networks == ("contractive", "plain")
    assert CONFIG.replace(compare=False).networks == ("contractive",)


def test_a_sealed_record_tells_any_change() -> None:
    text = seal({"step": 7, "loss": 0.1})
    assert unseal(text, "record") == {"step": 7, "loss": 0.1}
    for changed in (text.replace("0.1", "0.2"), text.replace("step", "stop"), '{"step": 7}'):
        with pytest.raises(InputError, match="record: "):
            unseal(changed, "record")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")  # type: ignore[arg-type]
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_the_log_is_cut_to_what_a_checkpoint_had_seen(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.create(path) as run:
        run.start(CONFIG)
        run.log({"step": 1, "loss": 0.1})
        run.log({"step": 2, "loss": 0.2})
        mark = run.log_mark()
        run.log({"step": 3, "loss": 0.3})
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo')  # torn by a crash
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    with RunDirectory.open(path) as run:
        run.cut_log(mark)
        assert [line["step"] for line in read_metrics(path)] == [1, 2]
        run.log({"step": 3, "loss": 0.3})
        again = run.log_mark()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    with RunDirectory.open(path) as run:
        run.cut_log(again)
        run.cut_log(LogMark.empty())
    assert list(read_metrics(path)) == []


def test_a_log_that_was_changed_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "run"
    with RunDirectory.create(path) as run:
        run.start(CONFIG)
        for step in range(20):
            run.log({"step": step, "loss": float(rng.random())})
        mark = run.log_mark()
    file = path / "metrics.jsonl"
    whole = file.read_bytes()
    with RunDirectory.open(path) as run:
        for bit in rng.integers(8 * len(whole), size=20):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bytes(changed))
            with pytest.raises(CheckpointError, match=r"metrics.jsonl: its first .* bytes"):
                run.cut_log(mark)
        file.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=r"metrics.jsonl"):
            run.cut_log(mark)
        file.unlink()
        with pytest.raises(CheckpointError, match=r"metrics.jsonl"):
            run.cut_log(mark)
        file.write_bytes(whole)
        run.cut_log(mark)


def test_metrics_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\nnonsense\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: not valid JSON"):
        list(read_metrics(tmp_path))
    file.write_bytes(b"1" * 2**21)
    with pytest.raises(InputError, match="line 1: too long"):
        list(read_metrics(tmp_path))


def test_the_environment_says_what_results_depend_on() -> None:
    described = runs.environment()
    assert described["versions"]["jax"] == jax.__version__
    assert described["device"]["platform"] == jax.devices()[0].platform
    assert described["host"]["threads"] >= 1
    assert described["x64"] is False
    json.dumps(described, allow_nan=False)
