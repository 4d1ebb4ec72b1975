"""State dicts as people have them: in which order, under which names, of which layers."""

import json
import random
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import jaxcae
from parity.convert import ConversionError, as_numpy, params_from_torch, read, torch_layers

WIDTH = 4


class Named(nn.Module):
    """Square linear layers with tanh between them, as attributes of any names."""

    def __init__(self, names, width=WIDTH):
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x):
        for name in self.names[:-1]:
            x = torch.tanh(getattr(self, name)(x))
        return getattr(self, self.names[-1])(x)


class Auto(nn.Module):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def square(*names):
    torch.manual_seed(0)
    return Auto(Named(names), Named(names)).double()


def sequential(*encoder, decoder=None):
    torch.manual_seed(0)
    decoder = decoder or [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 8)]
    return Auto(nn.Sequential(*encoder), nn.Sequential(*decoder)).double().eval()


def apart(theirs, params, model, shape):
    """Measure how far codes and reconstructions of the module and of the params are apart."""
    x = np.random.default_rng(0).uniform(-1, 1, shape)
    with torch.no_grad():
        batch = torch.from_numpy(np.moveaxis(x, -1, 0).copy())[None]
        code = theirs.encoder(batch)
        x_hat = np.moveaxis(theirs.decoder(code)[0].numpy(), 0, -1)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        z = model.encode(params, jnp.asarray(x))
        mine = np.asarray(model.decode(params, z))
    return max(np.abs(np.asarray(z) - code[0].numpy()).max(), np.abs(mine - x_hat).max())


def in_a_file(state):
    """Give a state dict in the order of a safetensors file: by name within each dtype."""
    data = safetensors.torch.save(dict(state))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: state[name] for name in sorted(state, key=lambda n: header[n]["data_offsets"])}


def shuffled(state):
    """Give a state dict in an order of chance, as `safetensors.torch.load` does."""
    return dict(random.Random(1).sample(list(state.items()), len(state)))


NUMBERED = [f"fc{i}" for i in range(1, 12)]


class TestOrder:
    @pytest.mark.parametrize("how", ["live", "file", "shuffled", "prefixed"])
    def test_numbers_compare_as_numbers(self, how):
        theirs = square(*NUMBERED)
        state = theirs.state_dict()
        if how == "file":
            state = in_a_file(state)
            assert list(state)[2].startswith("decoder.fc10")
        if how == "shuffled":
            state = shuffled(state)
        if how == "prefixed":
            state = {f"_orig_mod.{name}": value for name, value in state.items()}
        assert [n.rpartition(".")[2] for n in torch_layers(state)[0]] == NUMBERED
        model = jaxcae.mlp((WIDTH,) * 12, "tanh")
        assert apart(theirs, params_from_torch(state), model, (WIDTH,)) < 1e-14

    def test_numbers_count_wherever_they_stand(self):
        state = {}
        for i in (10, 9, 2):
            for half in ("encoder", "decoder"):
                state[f"{half}.block.{i}.linear.weight"] = torch.randn(4, 4)
        names = torch_layers(dict(sorted(state.items())))[0]
        assert [name.split(".")[2] for name in names] == ["2", "9", "10"]

    def test_a_file_of_two_dtypes_is_sorted_within_each(self):
        state = OrderedDict()
        for half in ("encoder", "decoder"):
            for i in range(1, 12):
                dtype = torch.float64 if i % 2 else torch.float32
                state[f"{half}.fc{i}.weight"] = torch.randn(4, 4, dtype=dtype)
        names = torch_layers(in_a_file(state))[0]
        assert [name.rpartition(".")[2] for name in names] == NUMBERED

    @pytest.mark.parametrize("wrap", [lambda state: state, lambda state: dict(state.items())])
    def test_a_state_dict_has_an_order_of_its_own(self, wrap):
        theirs = square("opens", "goes_on", "closes")
        params = params_from_torch(wrap(theirs.state_dict()))
        assert apart(theirs, params, jaxcae.mlp((WIDTH,) * 4, "tanh"), (WIDTH,)) < 1e-14

    @pytest.mark.parametrize(
        "change",
        [in_a_file, shuffled],  # in the file alphabetical: closes, goes_on, opens
    )
    def test_an_order_of_chance_is_not_taken(self, change):
        theirs = square("opens", "goes_on", "closes")
        state = change(theirs.state_dict())
        with pytest.raises(ConversionError, match="the order of the encoder's layers cannot") as e:
            params_from_torch(state)
        assert e.value.argument == "names"
        halves = [[f"{half}.{n}" for n in theirs.encoder.names] for half in ("encoder", "decoder")]
        params = params_from_torch(state, *halves)
        assert apart(theirs, params, jaxcae.mlp((WIDTH,) * 4, "tanh"), (WIDTH,)) < 1e-14

    def test_numbers_against_the_dicts_order_are_asked_about(self):
        with pytest.raises(ConversionError, match="numbers and their order in the state dict diff"):
            params_from_torch(square("fc3", "fc2", "fc1").state_dict())

    def test_widths_decide_where_only_one_order_fits(self):
        """`in` and `out` sorted by name, and layers that count down: one order fits each."""
        layers = {"fc3": (5, 8), "fc2": (8, 7), "fc1": (7, 3)}
        state = {f"encoder.{n}.weight": torch.randn(b, a) for n, (a, b) in layers.items()}
        state |= {"decoder.out.weight": torch.randn(5, 6), "decoder.inp.weight": torch.randn(6, 3)}
        for order in (list(state), sorted(state)):
            names = torch_layers({name: state[name] for name in order})
            assert names == (
                ["encoder.fc3", "encoder.fc2", "encoder.fc1"],
                ["decoder.inp", "decoder.out"],
            )

    def test_given_names_are_taken_and_checked(self):
        state = square("fc1", "fc2").state_dict()
        names = torch_layers(state, encoder=["encoder.fc2", "encoder.fc1"])
        assert names[0] == ["encoder.fc2", "encoder.fc1"]
        with pytest.raises(
            ConversionError, match=r"no layer is named 'encoder\.fc9'; there are enc"
        ):
            params_from_torch(state, encoder=["encoder.fc9"])
        with pytest.raises(ConversionError, match="is named twice"):
            params_from_torch(state, encoder=["encoder.fc1", "encoder.fc1"])
        with pytest.raises(ConversionError, match=r"'encoder\.fc2\.bias' belongs to no layer"):
            params_from_torch(state, encoder=["encoder.fc1"])


class TestNames:
    @pytest.mark.parametrize(
        "prefix",
        ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "model._orig_mod.", "a.b."],
    )
    def test_what_stands_before_all_names_may_stay(self, prefix):
        state = {prefix + n: v for n, v in sequential(nn.Linear(8, 3)).state_dict().items()}
        encoder, decoder = torch_layers(state)
        assert encoder == [f"{prefix}encoder.0"]
        short = [name.removeprefix(prefix) for name in decoder]
        for names in (decoder, short):
            assert torch_layers(state, ["encoder.0"], names) == (encoder, decoder)

    def test_wrappers_before_names_without_halves(self):
        state = {f"module.fc{i}.weight": torch.randn(4, 4) for i in (1, 2)}
        assert torch_layers(state, ["fc1"], ["fc2"]) == (["module.fc1"], ["module.fc2"])

    def test_a_half_may_be_wrapped_or_be_one_layer(self):
        state = {
            "encoder._orig_mod.0.weight": torch.randn(3, 8),
            "decoder.weight": torch.randn(8, 3),
        }
        assert torch_layers(state) == (["encoder._orig_mod.0"], ["decoder"])

    def test_two_models_in_one_dict_are_refused(self):
        state = {f"{m}.encoder.0.weight": torch.randn(4, 4) for m in ("student", "teacher")}
        with pytest.raises(ConversionError, match=r"'student\.encoder\.0' and 'teacher\."):
            params_from_torch(state)

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            (nn.Linear(2, 2), "got a Linear; give model.state_dict"),
            ({"epoch": 3, "model": {}}, "'epoch' is int; expected an array of"),
            ({}, "no weights are named"),
            ({"encoder.0.weight": torch.zeros(2, 2, dtype=torch.int8)}, "is int8; .* quantised"),
        ],
    )
    def test_what_is_no_state_dict_is_told(self, what, message):
        with pytest.raises(ConversionError, match=message):
            params_from_torch(what)


class TestLayers:
    def test_a_layer_without_a_bias_gets_zeros(self):
        theirs = sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))
        params = params_from_torch(theirs.state_dict())
        bias = params["encoder"]["layer_0"]["bias"]
        assert (bias == 0).all()
        assert bias.dtype == np.float64
        assert apart(theirs, params, jaxcae.mlp((8, 6, 3), "tanh"), (8,)) < 1e-15

    @pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
    @pytest.mark.parametrize("dim", [0, 1, None])
    def test_weight_norm_is_put_together_to_the_bit(self, norm, dim):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **options: None)  # the old one is old
            theirs = sequential(norm(nn.Linear(8, 6), dim=dim), nn.Tanh(), nn.Linear(6, 3))
        with torch.no_grad():
            for name, value in theirs.named_parameters():
                if name.endswith(("weight_g", "original0")):
                    value.mul_(1.7)
        params = params_from_torch(theirs.state_dict())
        theirs.encoder(torch.zeros(1, 8, dtype=torch.float64))
        want = theirs.encoder[0].weight.detach().numpy().T
        np.testing.assert_array_equal(params["encoder"]["layer_0"]["kernel"], want)

    def test_conv1d_becomes_width_in_out(self):
        theirs = sequential(
            nn.Conv1d(2, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)
        )
        params = params_from_torch(theirs.state_dict())["encoder"]
        assert params["conv_0"]["kernel"].shape == (3, 2, 6)
        x = np.random.default_rng(0).normal(size=(5, 2))
        padded = np.pad(x, ((1, 1), (0, 0)))
        a = sum(padded[i : i + 5] @ params["conv_0"]["kernel"][i] for i in range(3))
        h = np.tanh(a + params["conv_0"]["bias"])  # (step, feature) order, flattened as it lies
        z = h.reshape(-1) @ params["dense"]["kernel"] + params["dense"]["bias"]
        with torch.no_grad():
            want = theirs.encoder(torch.from_numpy(x.T.copy())[None])[0].numpy()
        np.testing.assert_allclose(z, want, atol=1e-14)

    @pytest.mark.parametrize(
        ("layer", "name", "message"),
        [
            (nn.LayerNorm(6), "encoder.1", "weight .*bias"),
            (nn.GroupNorm(2, 6), "encoder.1", "weight .*bias"),
            (nn.PReLU(), "encoder.1", "weight"),
            (nn.BatchNorm1d(6, track_running_stats=False), "encoder.1", "with running statistics"),
            (nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), "encoder.1", "remove_param"),
            (nn.GRU(6, 6), "encoder.1", "weight_ih_l0"),
            (nn.Conv3d(6, 6, 1), "encoder.1", "weight"),
            (nn.MultiheadAttention(6, 2), "encoder.1", "in_proj_weight"),
            (nn.Linear(5, 6), "encoder.0", "makes 6 outputs but encoder.1 takes 5"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_anything_else_is_named_and_refused(self, layer, name, message):
        theirs = sequential(nn.Linear(8, 6), layer, nn.Tanh(), nn.Linear(6, 3))
        with pytest.raises(ConversionError, match=message) as error:
            params_from_torch(theirs.state_dict())
        assert name in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("encoder", "decoder", "message"),
        [
            ([nn.Conv2d(1, 4, 3)], None, r"encoder holds encoder\.0 \(Conv2d\); expected"),
            (
                [nn.Conv2d(1, 4, 3), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3)],
                None,
                r"encoder\.1 \(Linear\), encoder\.3 \(Linear\); expected",
            ),
            (
                [nn.Conv2d(1, 4, 3), nn.Linear(16, 3)],
                [nn.Linear(3, 16), nn.Upsample(), nn.Conv2d(4, 1, 3)],
                r"decoder\.2 is a Conv2d in a decoder: only ConvTranspose",
            ),
        ],
    )
    def test_other_convolutional_forms_are_refused(self, encoder, decoder, message):
        theirs = sequential(*encoder, decoder=decoder)
        with pytest.raises(ConversionError, match=message):
            params_from_torch(theirs.state_dict())

    def test_a_tied_decoder_is_tied_in_every_layer(self):
        state = sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).state_dict()
        del state["decoder.0.weight"]
        with pytest.raises(ConversionError, match=r"decoder\.0 has a bias and no weight"):
            params_from_torch(state)
        del state["decoder.2.weight"]
        assert set(params_from_torch(state)["decoder"]["layer_0"]) == {"bias"}
        state["decoder.2.bias"] = torch.zeros(7)
        with pytest.raises(ConversionError, match=r"decoder\.2 has 7 biases, but encoder\.0"):
            params_from_torch(state)


def norm_of(kind, features, affine=True, eps=1e-5):
    """Make a BatchNorm that has seen data: nothing about it is 0 or 1."""
    norm = kind(features, affine=affine, eps=eps)
    generator = torch.Generator().manual_seed(features)
    with torch.no_grad():
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.2, 3, generator=generator)
        norm.num_batches_tracked.fill_(7)
        if affine:
            norm.weight.normal_(generator=generator)
            norm.bias.normal_(generator=generator)
    return norm


class TestBatchNorm:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("where", ["before", "after", "first", "last", "code"])
    def test_dense_networks_compute_the_same(self, where, affine, bias):
        def norm(features):
            return norm_of(nn.BatchNorm1d, features, affine, eps=0.1)

        one, two = nn.Linear(8, 6, bias=bias), nn.Linear(6, 3)
        encoder = {
            "before": [one, norm(6), nn.Tanh(), two],
            "after": [one, nn.Tanh(), norm(6), two],
            "first": [norm(8), one, nn.Tanh(), two],
            "last": [one, nn.Tanh(), two, norm(3)],
            "code": [one, nn.Tanh(), two],
        }[where]
        decoder = [norm(3), nn.Linear(3, 6, bias=bias), nn.Tanh(), nn.Linear(6, 8), norm(8)]
        theirs = sequential(*encoder, decoder=decoder if where == "code" else None)
        params = params_from_torch(theirs.state_dict(), eps=0.1)
        model = jaxcae.mlp((8, 6, 3), "tanh")
        assert apart(theirs, params, model, (8,)) < 1e-14
        assert apart(theirs, params_from_torch(theirs.state_dict()), model, (8,)) > 1e-6  # eps

    def test_convolutional_networks_compute_the_same(self):
        """Behind a convolution, at the flattening on both sides, behind a transposed one."""
        theirs = sequential(
            nn.Conv2d(2, 3, 3, 2, padding=1, bias=False),
            norm_of(nn.BatchNorm2d, 3),
            nn.Tanh(),
            nn.Conv2d(3, 4, 3, 2, padding=1),
            nn.Tanh(),
            norm_of(nn.BatchNorm2d, 4),
            nn.Flatten(),
            nn.Linear(16, 5),
            decoder=[
                nn.Linear(5, 16),
                norm_of(nn.BatchNorm1d, 16),
                nn.Tanh(),
                nn.Unflatten(1, (4, 2, 2)),
                nn.ConvTranspose2d(4, 3, 3, 2, padding=1),
                norm_of(nn.BatchNorm2d, 3),
                nn.Tanh(),
                nn.ConvTranspose2d(3, 2, 3, 2, padding=1, output_padding=1),
            ],
        )
        state = theirs.state_dict()
        with pytest.raises(ConversionError, match=r"encoder\.5 is a BatchNorm, and whether an act"):
            params_from_torch(state)  # a Flatten stands between it and the next layer
        renamed = {name.replace("encoder.7.", "encoder.6."): value for name, value in state.items()}
        params = params_from_torch(renamed)
        model = jaxcae.conv((6, 6, 2), (3, 4), 5, "tanh")
        assert apart(theirs, params, model, (6, 6, 2)) < 1e-14

    def test_names_that_do_not_tell_are_asked_about(self):
        state = OrderedDict()
        for half, widths in (("encoder", (4, 4)), ("decoder", (4, 4))):
            state |= {f"{half}.fc1.{n}": v for n, v in nn.Linear(*widths).state_dict().items()}
            state |= {
                f"{half}.bn1.{n}": v for n, v in norm_of(nn.BatchNorm1d, 4).state_dict().items()
            }
            state |= {f"{half}.fc2.{n}": v for n, v in nn.Linear(*widths).state_dict().items()}
        with pytest.raises(ConversionError, match=r"encoder\.bn1 is a BatchNorm, and") as error:
            params_from_torch(state)
        assert error.value.argument == "batch_norm"
        before = params_from_torch(state, batch_norm="before")["encoder"]
        after = params_from_torch(state, batch_norm="after")["encoder"]
        fc1 = state["encoder.fc1.weight"].numpy().T
        np.testing.assert_array_equal(after["layer_0"]["kernel"], fc1)
        assert not (before["layer_0"]["kernel"] == fc1).any()

    def test_consecutive_numbers_on_both_sides_are_those_of_a_module_list(self):
        layers = [nn.Linear(8, 6), norm_of(nn.BatchNorm1d, 6), nn.Linear(6, 3)]
        with pytest.raises(ConversionError, match=r"encoder\.1 is a BatchNorm, and"):
            params_from_torch(sequential(*layers).state_dict())

    @pytest.mark.parametrize(
        ("encoder", "options", "message"),
        [
            (
                [nn.Linear(8, 3), nn.Tanh(), norm_of(nn.BatchNorm1d, 3)],
                {"batch_norm": "after"},
                r"encoder\.2 is a BatchNorm after the last activation of the encoder",
            ),
            (
                [nn.Linear(8, 3), nn.Tanh(), norm_of(nn.BatchNorm1d, 3)],
                {},
                "cannot be told from their names",
            ),
            (
                [norm_of(nn.BatchNorm2d, 1), nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Linear(16, 3)],
                {},
                r"encoder\.0 is a BatchNorm in front of encoder\.1, a Conv2d that pads",
            ),
            (
                [nn.Linear(8, 3), norm_of(nn.BatchNorm1d, 3), norm_of(nn.BatchNorm1d, 3)],
                {},
                "two BatchNorms in a row",
            ),
            (
                [nn.Linear(8, 6), norm_of(nn.BatchNorm1d, 3), nn.Tanh(), nn.Linear(6, 3)],
                {},
                r"encoder\.1 is a BatchNorm of 3 features beside a layer of 6",
            ),
            ([nn.Linear(8, 3)], {"eps": float("nan")}, "eps must be finite"),
        ],
    )
    def test_what_cannot_be_folded_is_told(self, encoder, options, message):
        with pytest.raises(ConversionError, match=message):
            params_from_torch(sequential(*encoder).state_dict(), **options)

    def test_no_variance_and_no_room_in_the_dtype_are_told(self):
        theirs = sequential(nn.Linear(8, 3), norm_of(nn.BatchNorm1d, 3))
        state = {
            n: v.half() if v.is_floating_point() else v for n, v in theirs.state_dict().items()
        }
        huge = {"encoder.0.weight": torch.ones(3, 8), "encoder.1.weight": torch.ones(3)}
        huge = {name: 60000 * ones.half() for name, ones in huge.items()}
        with pytest.raises(ConversionError, match=r"encoder\.0\.weight exceeds float16"):
            params_from_torch(state | huge)
        with pytest.raises(
            ConversionError, match=r"encoder\.1\.running_var has values that are no"
        ):
            params_from_torch(state | {"encoder.1.running_var": -torch.ones(3).half()})

    def test_a_tied_decoder_shares_no_folded_weight(self):
        theirs = sequential(nn.Linear(8, 3), norm_of(nn.BatchNorm1d, 3), decoder=[nn.Linear(3, 8)])
        state = dict(theirs.state_dict())
        del state["decoder.0.weight"]
        with pytest.raises(ConversionError, match="the decoder uses the encoder's weights"):
            params_from_torch(state)

    def test_numbers_are_rounded_once(self):
        theirs = sequential(nn.Linear(8, 3), norm_of(nn.BatchNorm1d, 3)).float()
        state = theirs.state_dict()
        wide = {name: as_numpy(value).astype("float64") for name, value in state.items()}
        for name, array in read(state).arrays.items():
            np.testing.assert_array_equal(array, read(wide).arrays[name].astype("float32"))
