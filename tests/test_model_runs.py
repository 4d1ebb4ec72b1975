"""Runs of conv and of models of the user's own: every command, and nothing imported unasked."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxcae
from jaxcae.cli import main
from jaxcae.errors import InputError
from jaxcae.models.factory import from_factory, load_factory, parse_arguments
from jaxcae.runs import Config, load_run
from jaxcae.runs.material import load_material
from tests.tolerances import assert_close

SOURCE = '''
"""Models of somebody's own."""
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax.numpy as jnp
import jaxcae
from flax import nnx

Path("imported").write_text("")
NORMALISED = 1.0


class Net(nnx.Module):
    """NNX: a list, and statistics that are not trained."""

    def __init__(self, rngs, features=16, hidden=6, latent=3, activation="tanh"):
        self.layers = nnx.List(
            [nnx.Linear(features, hidden, rngs=rngs), nnx.Linear(hidden, latent, rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(hidden, rngs=rngs)
        self.norm.var.set_value(jnp.full(hidden, NORMALISED))
        self.out = nnx.Linear(latent, features, rngs=rngs)
        self.activation = getattr(nnx, activation)

    def encode(self, x):
        return self.layers[1](self.activation(self.norm(self.layers[0](x))))

    def decode(self, z):
        return nnx.sigmoid(self.out(z))


class Pictures(nn.Module):
    """Linen: for batches of pictures."""

    width: int = 2

    def setup(self):
        self.conv, self.code, self.out = nn.Conv(self.width, (3, 3), 2), nn.Dense(3), nn.Dense(16)

    def encode(self, x):
        return self.code(nn.relu(self.conv(x)).reshape((x.shape[0], -1)))

    def decode(self, z):
        return self.out(z).reshape((z.shape[0], 4, 4, 1))


def pair(key, latent=3):
    return eqx.nn.Linear(16, latent, key=key), eqx.nn.Linear(latent, 16, key=key)


def own(latent=3):
    return jaxcae.mlp((16, latent), latent_activation="tanh")


def number():
    return 3


def two_codes():
    return jaxcae.Autoencoder(own().init, lambda p, x: (x, x), lambda p, z: z[0])


def fails():
    raise KeyError("on purpose")
'''
SMALL = ["--epochs", "1", "--no-plots", "--no-compare", "--json", "--batch-size", "16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with somebody's module and pictures in it."""
    folder = tmp_path_factory.mktemp("somewhere")
    (folder / "their_models.py").write_text(SOURCE)
    (folder / "their_script.py").write_text("raise SystemExit('usage: their_script FILE')")
    rng = np.random.default_rng(0)
    np.save(folder / "pictures.npy", rng.random((40, 4, 4), np.float32))
    np.save(folder / "rows.npy", np.load(folder / "pictures.npy").reshape(40, 16))
    return folder


@pytest.fixture
def jaxcae_in(monkeypatch: pytest.MonkeyPatch, capsys: Any, place: Path) -> Callable[..., Any]:
    """Give a function that runs a command in that directory, as in a process of its own."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.delitem(sys.modules, "their_models", raising=False)
        (place / "imported").unlink(missing_ok=True)
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def net_run(place: Path) -> Path:
    """Train an NNX module of their own once, with a checkpoint after every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "path", list(sys.path))
        arguments = ["--model", "their_models:Net", "--model-args", "hidden=5", "activation=gelu"]
        every = ["--save-every", "1"]
        code = main(["train", "--data", "rows.npy", "--run-dir", "net", *arguments, *every, *SMALL])
    assert code == 0
    return place / "net"


NET = ("--model", "their_models:Net")


COMMANDS = pytest.mark.parametrize(
    "command",
    [
        ["score", "net", "--data", "rows.npy", "--output", "scores.csv"],
        ["explain", "net"],
        ["info", "net", "--verify"],
        ["analyze", "net", "--no-plots"],
        ["export", "net", "--platforms", "cpu"],
        ["train", "--run-dir", "net", "--resume"],
    ],
    ids=lambda command: command[0],
)


@COMMANDS
def test_nothing_is_imported_on_a_directorys_word(command, net_run, jaxcae_in, place):
    """Refused in one line that says what to name."""
    code, out, err = jaxcae_in(*command)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "name it: --model their_models:Net" in err
    assert not (place / "imported").exists()
    assert "their_models" not in sys.modules


@pytest.mark.slow
@COMMANDS
def test_what_is_named_is_imported(command, net_run, jaxcae_in, place):
    """Once named, every command does its work."""
    code, _, err = jaxcae_in(*command, *NET)
    assert code == 0, err
    assert (place / "imported").exists()


def test_info_shows_a_run_whose_factory_is_gone(net_run, jaxcae_in, place):
    """And never imports it; what needs the model says in one line that it cannot."""
    source = place / "their_models.py"
    source.rename(place / "away.txt")
    try:
        code, out, _ = jaxcae_in("info", "net", "--json")
        assert code == 0
        assert json.loads(out)["configuration"]["model"] == "their_models:Net"
        code, _, err = jaxcae_in("explain", "net", *NET)
        assert code == 2
        assert "their_models:Net: their_models cannot be imported: ModuleNotFoundError" in err
        assert err.count("\n") == 1
    finally:
        (place / "away.txt").rename(source)


def test_scores_are_those_of_the_module_by_hand(net_run, jaxcae_in, place):
    """The module with the trained parameters, called by itself, gives the same errors."""
    code, _, err = jaxcae_in("score", "net", "--data", "rows.npy", "--output", "s.csv", *NET)
    assert code == 0, err
    scores = np.loadtxt(place / "s.csv", delimiter=",", skiprows=1)
    module = sys.modules["their_models"]
    model = jaxcae.from_flax(lambda rngs: module.Net(rngs, hidden=5, activation="gelu"))
    tensors = safetensors.numpy.load_file(net_run / "params.safetensors")
    params = jax.tree.map_with_path(
        lambda path, _: tensors[jax.tree_util.keystr(path, simple=True, separator=".")],
        model.init(jax.random.key(0)),
    )
    net = model.module(params)
    net.eval()
    xs = np.load(place / "rows.npy")
    assert_close(scores[:, 0], np.sum((xs - net.decode(net.encode(xs))) ** 2, 1), "float32")
    norms = jaxcae.contractive_penalty(model.encode, "reverse")(params, xs)
    assert_close(scores[:, 1], np.sqrt(norms), "float32")


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits(net_run, jaxcae_in, place):
    """From a checkpoint in the middle, through Orbax, whose keys are names where ours are ints."""
    shutil.copytree(net_run, place / "cut")
    last = max((place / "cut/checkpoints").iterdir(), key=lambda p: int(p.name))
    shutil.rmtree(last)
    for name in ("params.safetensors", "report.json"):
        (place / "cut" / name).unlink()
    code, _, err = jaxcae_in("train", "--run-dir", "cut", "--resume", *NET, "--json")
    assert code == 0, err
    one, other = (
        safetensors.numpy.load_file(place / name / "params.safetensors") for name in ("net", "cut")
    )
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ("somebody's own", "somebody else's", 0, "has changed since the run began"),
        ("NORMALISED = 1.0", "NORMALISED = 2.0", 1, "such as statistics of normalisation, is not"),
        ("latent=3, activation", "latent=4, activation", 1, "expected float32[4]"),
        ("self.out = ", "self.last = ", 2, "has no attribute 'out'"),
        ("self.norm(self", "(self", 0, "has changed since the run began"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_an_edited_factory_is_said_or_refused(net_run, jaxcae_in, place, old, new, code, message):
    """An edit is warned of; other shapes or other statistics are refused."""
    source = place / "their_models.py"
    source.write_text(SOURCE.replace(old, new))
    shutil.rmtree(place / "__pycache__", ignore_errors=True)  # as old as to the second
    try:
        got, out, err = jaxcae_in("info", "net", "--verify", *NET)
    finally:
        source.write_text(SOURCE)
        shutil.rmtree(place / "__pycache__", ignore_errors=True)
    assert got == code, err
    assert message in " ".join((out + err).split())


def test_conv_trains_on_pictures_and_scores_rows_alike(jaxcae_in, place):
    """Its shape is found by the data; a row is the picture that it holds."""
    arguments = ["--model", "conv", "--model-args", "features=(2,)", "latent=3", *SMALL]
    data = ("--data", "pictures.npy", "--run-dir", "conv-pictures")
    code, _, err = jaxcae_in("train", *data, *arguments)
    assert code == 0, err
    for name in ("pictures", "rows"):
        arguments = ["--data", f"{name}.npy", "--output", f"{name}.csv"]
        code, _, err = jaxcae_in("score", "conv-pictures", *arguments)
        assert code == 0, err
    assert (place / "rows.csv").read_text() == (place / "pictures.csv").read_text()
    config, model, params = load_run(place / "conv-pictures")
    assert config.model.shape == (4, 4, 1)
    assert model.encode(params, jnp.zeros(16)).shape == (3,)
    assert params["encoder"]["conv_0"]["kernel"].shape == (3, 3, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ["their_models:Pictures", "--shape", "4", "4", "1", "--model-args", "width=3"],
        ["their_models:pair", "--model-args", "latent=2"],
        ["their_models:own"],
        ["conv", "--model-args", "features=(2, 3)"],
    ],
    ids=lambda model: model[0].partition(":")[2] or model[0],
)
def test_every_command_takes_every_kind_of_model(model, jaxcae_in, place):
    """Train with pictures and the plain network, then everything that opens a run."""
    name = f"all-{model[0].replace(':', '-')}"
    options = ["--epochs", "1", "--json", "--data", "rows.npy", "--run-dir", name]
    assert jaxcae_in("train", "--model", *model, *options)[0] == 0
    named = ["--model", model[0]]
    for command in (
        ["score", name, "--data", "rows.npy", "--output", "all.csv"],
        ["explain", name],
        ["info", name, "--verify"],
        ["analyze", name],
        ["export", name, "--platforms", "cpu"],
        ["train", "--run-dir", name, "--resume", "--json"],
    ):
        code, _, err = jaxcae_in(*command, *named)
        assert code == 0, (command, err)


# --------------------------------------------------------------------------- without training


@pytest.mark.parametrize("name", ["Net", "Pictures", "pair", "own"])
def test_a_factory_may_give_any_of_these(name, jaxcae_in, place, monkeypatch):
    """A class or function of `rngs` or `key`, a Linen class, a pair, an Autoencoder."""
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "their_models", raising=False)
    shape = (4, 4, 1) if name == "Pictures" else (16,)
    model = from_factory(name, load_factory(f"their_models:{name}"), [], shape)
    params = model.init(jax.random.key(0))
    code = model.encode(params, jnp.ones(shape))
    assert code.shape == (3,)
    assert model.decode(params, code).shape == shape
    other = jax.tree.leaves(model.init(jax.random.key(1)))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(params), other, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["their_models:number"], "expected an Autoencoder, a module of Flax or Equinox"),
        (["their_models:two_codes"], "encode returned a tuple, expected one array"),
        (["their_models:fails"], "KeyError: 'on purpose'"),
        (["their_models:Nett"], "unknown factory 'Nett'; choose from "),
        (["their_models.py:Net"], "Leave out '.py': their_models:Net"),
        (["their_script:Net"], "cannot be imported: SystemExit: usage: their_script FILE"),
        (["nowhere:Net"], "nowhere cannot be imported: ModuleNotFoundError"),
        (["their_models:Net", "--model-args", "width=3"], "unexpected keyword argument 'width'"),
        (["their_models:Net", "--model-args", "features=15"], "`shape` says"),
        (["their_models:Net", "--model-args", "3"], "--model-args: expected key=value, got '3'"),
        (["their_models:Net", "--model-args", "a=1", "a=2"], "--model-args: 'a' comes twice"),
        (["their_models:Net", "--model-args", "a=(1,"], "begins as a Python literal and is none"),
        (["their_models:Net", "--tied"], "--tied does not go with --model their_models:Net"),
        (["their_models:Net", "--output", "tanh"], "--output does not go with --model"),
        (["their_models:Net", "--shape", "3", "3"], "--shape (3, 3) has 9 entries, a sample"),
        (["Net"], "or a function as PACKAGE.MODULE:FACTORY, got 'Net'"),
        (["a;b:c"], "--model is mlp, conv, temporal_conv or a function as PACKAGE.MODULE:FACTORY"),
        (["mlp", "--shape", "4", "4"], "--shape does not go with --model mlp"),
        (["mlp", "--model-args", "a=1"], "--model-args does not go with --model mlp"),
        (["conv", "--sizes", "16", "3"], "--sizes does not go with --model conv"),
        (["conv", "--model-args", "width=1"], "unknown argument of conv 'width'"),
        (["conv", "--model-args", "latent=0"], "latent must be a positive int, got 0"),
        (["conv", "--shape", "4", "0", "4"], "--shape is that of a sample"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(options, message, jaxcae_in, place):
    """Exit 2, with what came and what was expected, and no run directory."""
    code, _, err = jaxcae_in(
        "train", "--data", "rows.npy", "--run-dir", "none", *SMALL, "--model", *options
    )
    assert code == 2, err
    assert message.replace("`shape`", "--shape") in err
    assert err.count("\n") == 1
    assert not (place / "none").exists()


def test_pictures_in_memory_are_taken_as_they_are(place):
    """From Python a model of images trains on an array of images."""
    pictures = np.load(place / "pictures.npy")
    material = load_material(Config.of(model="conv"), samples=pictures)
    assert material.config.model.shape == (4, 4, 1)
    assert material.feature_shape == (4, 4)
    assert material.held_out.shape == (8, 16)
    with pytest.raises(InputError, match="expected rank 2"):
        load_material(Config.of(), samples=pictures)


def test_values_of_arguments_are_literals_or_text():
    """`ast.literal_eval` and nothing beyond it."""
    pairs = ["a=1", "b=(2, 3.5)", "c=gelu", "d=None", "e='1'", "f=__import__('os')", "g=", "h=x=y"]
    assert parse_arguments(pairs) == {
        "a": 1, "b": (2, 3.5), "c": "gelu", "d": None, "e": "1",
        "f": "__import__('os')", "g": "", "h": "x=y",
    }  # fmt: skip
    for pair in ("a", "1=2", "a b=3", "a=" + "1" * 1001, "a=[" + "(" * 500):
        with pytest.raises(InputError, match="model_args"):
            parse_arguments([pair])


def test_a_configuration_of_before_reads_as_an_mlp():
    """Settings of the model that came later are absent from older files."""
    config = Config.of(sizes=(6, 3))
    stored = config.to_json()
    for name in ("kind", "args", "shape", "source", "frozen"):
        del stored["model"][name]
    assert Config.from_json(stored) == config
    own = Config.of(model="a.b:c", model_args=("x=1",), shape=(2, 3))
    assert Config.from_json(json.loads(json.dumps(own.to_json()))) == own
