"""Weights move between the frameworks bit by bit, by function and by command, and run no code."""

import json
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import jaxcae
import parity.__main__ as command
from jaxcae.runs.params_file import load_params, save_params
from parity import convert, files
from parity.convert import ConversionError, params_from_torch, params_to_torch
from parity.reference import ConvCAE, DenseCAE


class Tutorial(nn.Module):
    """The autoencoder of the tutorials: two `nn.Sequential`, layers at 0 and 2."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
        self.decoder = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 12), nn.Sigmoid())


def models():
    yield "sequential", Tutorial()
    for tied in (False, True):
        yield f"dense, tied={tied}", DenseCAE((12, 9, 5), tied=tied)
        yield f"conv, tied={tied}", ConvCAE((7, 8, 2), (3, 4), 5, tied=tied)


def fill(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Give every weight random bits: NaNs with payloads, infinities, subnormals, −0."""
    generator = torch.Generator().manual_seed(0)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    low, high = torch.iinfo(ints).min, torch.iinfo(ints).max
    state = OrderedDict()
    for name, weight in model.state_dict().items():
        bits = torch.randint(low, high, weight.shape, dtype=ints, generator=generator)
        state[name] = bits.view(dtype)
    return state


def drawn(model: jaxcae.Autoencoder) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Draw params by NumPy: nothing is compiled for it."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), like)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and bits(one) == bits(two)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize(("name", "model"), list(models()), ids=[name for name, _ in models()])
def test_there_and_back_bit_for_bit(name, model, dtype):
    state = fill(model, dtype)
    params = params_from_torch(state)
    layers = convert.torch_layers(state)
    back = convert.as_tensors(params_to_torch(params, *layers))
    assert set(back) == set(state)
    assert all(same(back[name], state[name]) for name in state)
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype.name for leaf in leaves} == {str(dtype).removeprefix("torch.")}
    # A permutation and nothing else: the bytes of all leaves are those of all weights.
    words = np.sort(np.concatenate([leaf.view("u2").ravel() for leaf in leaves]))
    theirs = np.concatenate([np.frombuffer(bits(weight), "u2") for weight in state.values()])
    np.testing.assert_array_equal(words, np.sort(theirs))


@pytest.mark.parametrize(("name", "model"), list(models()), ids=[name for name, _ in models()])
def test_params_have_the_form_of_the_models(name, model):
    params = params_from_torch(model.state_dict())
    if name.startswith("conv"):
        ours = jaxcae.conv((7, 8, 2), (3, 4), 5, tied=name.endswith("True"))
    else:
        ours = jaxcae.mlp((12, 9, 5), tied=name.endswith("True"))
    like = jax.eval_shape(ours.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, like)


def test_a_tutorial_model_computes_the_same_here(tmp_path):
    theirs = Tutorial()
    save_file(theirs.state_dict(), tmp_path / "tutorial.safetensors")
    assert (
        command.main(["convert", str(tmp_path / "tutorial.safetensors"), str(tmp_path / "ours")])
        == 0
    )
    ours = jaxcae.mlp((12, 9, 5), "relu", output="sigmoid")
    like = jax.eval_shape(ours.init, jax.random.key(0))
    params, record = load_params(tmp_path / "ours", like)
    assert record["torch_layers"] == {
        "encoder": ["encoder.0", "encoder.2"],
        "decoder": ["decoder.0", "decoder.2"],
    }
    x = np.random.default_rng(0).uniform(size=12).astype("float32")
    z = ours.encode(params, jnp.asarray(x))
    with torch.no_grad():
        theirs_z = theirs.encoder(torch.from_numpy(x))
        np.testing.assert_allclose(z, theirs_z.numpy(), rtol=1e-5, atol=1e-6)
        x_hat = theirs.decoder(theirs_z).numpy()
    np.testing.assert_allclose(ours.decode(params, z), x_hat, rtol=1e-5)


def test_by_command_there_and_back(tmp_path, capsys):
    state = fill(Tutorial(), torch.float32)
    first, ours, last = (tmp_path / name for name in ("a.safetensors", "b", "c.safetensors"))
    save_file(state, first)
    assert command.main(["convert", str(first), str(ours)]) == 0
    assert "encoder.layer_0.kernel" in capsys.readouterr().out
    assert command.main(["convert", str(ours), str(last)]) == 0
    back = load_file(last)
    assert set(back) == set(state)
    assert all(same(back[name], state[name]) for name in state)
    # The file loads into the model that it came from, under its own names.
    Tutorial().load_state_dict(back)


def test_params_of_jaxcae_load_into_pytorch(tmp_path):
    ours = jaxcae.conv((7, 8, 2), (3, 4), 5)
    params = drawn(ours)
    save_params(tmp_path / "ours", params, {})
    files.convert_file(tmp_path / "ours", tmp_path / "theirs.safetensors")
    theirs = ConvCAE((7, 8, 2), (3, 4), 5, "softplus")
    theirs.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
    x = np.random.default_rng(0).uniform(size=(7, 8, 2)).astype("float32")
    with torch.no_grad():
        code = theirs.encode(torch.from_numpy(x.transpose(2, 0, 1).copy())[None])[0].numpy()
    z = ours.encode(jax.tree.map(jnp.asarray, params), jnp.asarray(x))
    np.testing.assert_allclose(z, code, rtol=1e-5, atol=1e-6)


def test_other_names_are_given_in_order():
    state = {
        "fc1.weight": torch.randn(9, 12),
        "fc1.bias": torch.randn(9),
        "fc2.weight": torch.randn(12, 9),
        "fc2.bias": torch.randn(12),
    }
    params = params_from_torch(state, encoder=["fc1"], decoder=["fc2"])
    assert params["encoder"]["layer_0"]["kernel"].shape == (12, 9)
    with pytest.raises(ConversionError, match=r"no weights are named encoder\.<layer>"):
        params_from_torch(state)


def test_layers_are_taken_in_natural_order():
    state = {}
    for i in range(11):
        state[f"encoder.{i}.weight"], state[f"encoder.{i}.bias"] = torch.randn(4, 4), torch.randn(4)
        state[f"decoder.{i}.weight"], state[f"decoder.{i}.bias"] = torch.randn(4, 4), torch.randn(4)
    params = params_from_torch(state)
    np.testing.assert_array_equal(
        params["encoder"]["layer_10"]["bias"], state["encoder.10.bias"].numpy()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.0.weight"), "'encoder.0' holds bias"),
        (lambda s: s.update({"head.weight": torch.zeros(2, 2)}), "'head.weight' belongs to no"),
        (lambda s: s.update({"encoder.2.weight": torch.zeros(5, 8)}), "9 outputs but .* takes 8"),
        (lambda s: s.update({"encoder.2.bias": torch.zeros(4)}), "bias has shape"),
        (
            lambda s: s.update({"encoder.0.weight": torch.zeros(9, 12, 1, 1, 1)}),
            "only Linear, Conv1d",
        ),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("decoder")], "decoder's layers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    state = dict(Tutorial().state_dict())
    change(state)
    with pytest.raises(ConversionError, match=message):
        params_from_torch(state)


def test_files_that_can_run_code_are_refused(tmp_path, capsys):
    saved = tmp_path / "model.pt"
    torch.save(Tutorial().state_dict(), saved)
    assert command.main(["convert", str(saved), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_target_is_not_replaced_unasked(tmp_path, capsys):
    save_file(Tutorial().state_dict(), tmp_path / "a")
    (tmp_path / "b").write_text("mine")
    assert command.main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "b").read_text() == "mine"
    assert command.main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--force"]) == 0


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert command.main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_file_of_jaxcae_is_refused(tmp_path, capsys):
    model = jaxcae.mlp((4, 3))
    save_params(tmp_path / "ours", drawn(model), {})
    data = bytearray((tmp_path / "ours").read_bytes())
    data[-1] ^= 1
    (tmp_path / "ours").write_bytes(data)
    assert command.main(["convert", str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_loses_a_bit_is_refused(tmp_path, monkeypatch):
    save_file(Tutorial().state_dict(), tmp_path / "a")
    (tmp_path / "b").write_text("mine")
    right = convert.kernel_to_torch
    monkeypatch.setattr(convert, "kernel_to_torch", lambda kernel: right(kernel) + 1e-6)
    with pytest.raises(ConversionError, match="did not survive"):
        files.convert_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "mine"


class Square(nn.Module):
    """Widths that hide a transposed or swapped kernel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid())


@pytest.mark.parametrize("to", ["jaxcae", "torch"])
def test_equal_bytes_in_the_wrong_place_are_refused(tmp_path, monkeypatch, to):
    """Kernels that are not transposed, either way, survive the way there and back bit for bit."""
    save_file(Square().state_dict(), tmp_path / "a")
    if to == "torch":
        files.convert_file(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(convert, "kernel_to_torch", convert.as_numpy)
    monkeypatch.setattr(convert, "kernel_from_torch", lambda weight: weight)
    with pytest.raises(ConversionError, match="networks differ: codes or reconstructions are up"):
        files.convert_file(tmp_path / ("b" if to == "torch" else "a"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_norm_folded_on_the_wrong_side_is_refused(tmp_path, monkeypatch):
    from parity import folding

    theirs = Square()
    theirs.encoder.insert(1, nn.BatchNorm1d(4))
    theirs.encoder[1].running_var.fill_(4.0)
    save_file(theirs.state_dict(), tmp_path / "a")
    assert files.convert_file(tmp_path / "a", tmp_path / "b").folded == ["encoder.1"]
    right = folding._affine
    monkeypatch.setattr(folding, "_affine", lambda *a: (right(*a)[0] * 1.001, right(*a)[1]))
    with pytest.raises(ConversionError, match="networks differ"):
        files.convert_file(tmp_path / "a", tmp_path / "b")


def converted(tmp_path, capsys, state, *options):
    """Run the command on a state dict; give the exit code and what was shown in one line each."""
    save_file(state, tmp_path / "in.safetensors")
    source, target = str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")
    code = command.main(["convert", source, target, "--force", *options])
    return code, capsys.readouterr()


def test_the_command_says_what_was_compared(tmp_path, capsys):
    state = Tutorial().state_dict()
    code, shown = converted(tmp_path, capsys, state)
    assert code == 0
    last = " ".join(shown.out.split())
    assert "converted back and equal bit for bit; codes and reconstructions agree to" in last
    assert "in float64 with tanh for the activation, which weights do not tell" in last
    assert last.endswith("for jaxcae.mlp((12, 9, 5))")
    code, shown = converted(tmp_path, capsys, state, "--activation", "relu", "--output", "sigmoid")
    assert "with tanh" not in shown.out
    assert "for jaxcae.mlp((12, 9, 5), 'relu', output='sigmoid')" in shown.out
    state["encoder.0.weight"].fill_(torch.nan)
    assert "no outputs were compared: they are not fi" in converted(tmp_path, capsys, state)[1].out
    narrow = {n: v for n, v in Tutorial().state_dict().items() if n.startswith("encoder.")}
    narrow |= {"decoder.weight": torch.zeros(12, 5)}
    code, shown = converted(tmp_path, capsys, narrow)
    assert code == 0
    assert "no outputs were compared: the decoder, of widths 12, does not mirror" in shown.out


def test_the_table_pairs_what_belongs_together(tmp_path, capsys):
    """Eleven layers, of a bias each that tells which it is; some without."""
    state = {}
    for half in ("encoder", "decoder"):
        for i in range(1, 12):
            state[f"{half}.fc{i}.weight"] = torch.full((4, 4), float(i))
            if i != 5:
                state[f"{half}.fc{i}.bias"] = torch.full((4,), float(i))
    save_file(state, tmp_path / "in")
    done = files.convert_file(tmp_path / "in", tmp_path / "out")
    params, _ = files.read_jax(tmp_path / "out")
    leaves = files.flat(params)
    assert [pair.jax.split(".")[1] for pair in done.pairs[:22:2]] == [
        f"layer_{i}" for i in range(11)
    ]
    for pair in done.pairs:
        want = state[pair.torch].flatten()[0].item() if pair.torch else 0.0
        assert (leaves[pair.jax] == want).all(), pair
    # The layers that had no bias have none when they come back, unless it has learned one.
    files.convert_file(tmp_path / "out", tmp_path / "back")
    assert set(load_file(tmp_path / "back")) == set(state)
    params["encoder"]["layer_4"]["bias"] += 1
    _, record = files.read_jax(tmp_path / "out")
    kept = {name: record[name] for name in ("torch_layers", "torch_without_bias")}
    save_params(tmp_path / "out", params, kept)
    files.convert_file(tmp_path / "out", tmp_path / "back")
    assert set(load_file(tmp_path / "back")) - set(state) == {"encoder.fc5.bias"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, "mixed"], ids=str)
def test_every_dtype_by_command_there_and_back(tmp_path, dtype):
    state = fill(Tutorial(), torch.float32 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        state["encoder.2.weight"] = state["encoder.2.weight"].nan_to_num().bfloat16()
    save_file(state, tmp_path / "in")
    for source, target in (("in", "out"), ("out", "back")):
        assert command.main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
    back = load_file(tmp_path / "back")
    assert set(back) == set(state)
    assert all(same(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encodre", "fc1"], "unrecognized arguments: --encodre fc1. Did you mean --encoder?"),
        (["--batch-norm", "behind"], "invalid choice: 'behind'"),
        (["--activation", "rleu"], "unknown activation 'rleu'; choose from"),
        (["--eps", "-1"], "eps must be finite and at least 0"),
        (["--encoder", "fc1"], "no layer is named 'fc1'; there are"),
    ],
)
def test_misuse_is_one_line_and_two(tmp_path, capsys, arguments, message):
    save_file(Tutorial().state_dict(), tmp_path / "a")
    argv = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), *arguments]
    try:
        code = command.main(argv)
    except SystemExit as left:
        code = left.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_what_a_message_asks_for_has_an_option(tmp_path, capsys):
    state = {f"fc{i}.weight": torch.randn(4, 4) for i in (1, 2)}
    code, shown = converted(tmp_path, capsys, state)
    assert code == 2
    assert shown.err.endswith("Give --encoder LAYER … or --decoder LAYER ….\n")
    assert converted(tmp_path, capsys, state, "--encoder", "fc1", "--decoder", "fc2")[0] == 0
    theirs = Square()
    theirs.encoder = nn.Sequential(
        OrderedDict(one=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), two=nn.Linear(4, 4))
    )
    names = [f"encoder.{name}" for name in ("one", "norm", "two")]
    code, shown = converted(tmp_path, capsys, theirs.state_dict(), "--encoder", *names)
    assert code == 2
    assert shown.err.endswith("Give --batch-norm before or --batch-norm after.\n")
    options = "--encoder", *names, "--batch-norm", "before", "--eps", "0.001"
    code, shown = converted(tmp_path, capsys, theirs.state_dict(), *options)
    assert code == 0
    assert "BatchNorm folded, with eps 0.001; what is stored, converted back" in " ".join(
        shown.out.split()
    )


def test_a_target_is_a_file_that_is_not_the_source(tmp_path, capsys):
    save_file(Tutorial().state_dict(), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    for target in (tmp_path / "a", tmp_path, tmp_path / "no" / "where"):
        assert command.main(["convert", str(tmp_path / "a"), str(target), "--force"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "a").read_bytes() == before


def test_names_from_a_file_reach_the_terminal_as_text(tmp_path, capsys):
    state = {"encoder.\x1b[31m[red].weight": torch.randn(4, 4), "decoder.weight": torch.eye(4)}
    assert converted(tmp_path, capsys, state)[0] == 0
    state["\x1b[2Jother\n.weight"] = torch.randn(4, 4)
    code, shown = converted(tmp_path, capsys, state)
    assert code == 2
    assert "\x1b" not in shown.err
    assert shown.err.count("\n") == 1


def test_tensors_are_read_in_the_order_of_the_file(tmp_path):
    """A writer that keeps the order of a state dict has told it."""
    names = ["zeta", "alpha", "mid", "beta", "omega", "gamma", "nu", "delta"]
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i, name in enumerate(names)
    }
    header = json.dumps(dict(sorted(entries.items()))).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4 * len(names))
    (tmp_path / "a").write_bytes(data)
    assert list(files.read_torch(tmp_path / "a")) == names
