"""Every exhibit of the museum is what its label says."""

import ast
from pathlib import Path

import pytest
import torch

import parity.__main__ as command
from parity.derivatives import derivatives, squared
from parity.museum import curved, formulas, ground, jacobians, picture, tell, visit
from parity.museum.exhibit import Exhibit, Visit
from parity.reference import norms_by_jacobian


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exhibits() -> dict[str, Exhibit]:
    """Measure every room once, on smaller batches and in fewer steps than the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jacobians, "PROOF_STEPS", 20)
        patch.setattr(jacobians, "batch", lambda size=16: ground.batch(min(size, 8)))
        patch.setattr(curved, "DRAWS", 4)
        patch.setattr(curved, "PLAIN_STEPS", 20)
        found = [e for room in visit.ROOMS for e in room.exhibits()]
    return {exhibit.name: exhibit for exhibit in found}


def test_the_truth_is_the_jacobian():
    for activation in ("relu", "softplus", "sigmoid"):
        model = ground.tutorial_model(activation).double()
        xs = ground.batch(3).double()
        torch.testing.assert_close(
            ground.true_norms(model, xs), norms_by_jacobian(model.encode, xs), rtol=1e-12, atol=0
        )


@pytest.mark.slow
def test_tiny_steps_measure_rounding(exhibits):
    found = exhibits["one finite difference per input, step 1e-6"]
    assert found.ratio > 1.5
    assert found.cosine < 0.5
    assert found.numbers["contracted"] > 10 * found.ratio
    assert found.numbers["pixels"] == 0
    assert found.numbers["encodings"] == 785


@pytest.mark.slow
def test_a_working_step_works_for_the_value_and_for_smooth_encoders(exhibits):
    found = exhibits["the same with a step of 1e-2"]
    assert found.ratio == pytest.approx(1, abs=0.01)
    assert found.numbers["softplus ratio"] == pytest.approx(1, abs=0.01)
    assert found.numbers["softplus cosine"] > 0.9999
    # Rounding is not to blame for ReLU: a crossing within the step is.
    assert found.cosine < 0.9
    assert found.numbers["float64"] > 0.999


def test_without_a_graph_there_is_no_penalty(exhibits):
    found = exhibits["autograd.functional.jacobian without create_graph"]
    assert found.ratio == pytest.approx(1, abs=1e-4)  # the value is right
    assert found.numbers["requires grad"] == 0
    assert found.numbers["without"] == 0  # bit-identical
    assert found.numbers["with"] > 1e-4
    assert "(4, 64, 4, 784)" in found.wrong


def test_the_zero_mask_breaks(exhibits):
    found = exhibits["the zero blocks masked by J[J != 0]"]
    assert found.ratio == pytest.approx(1, abs=1e-5)
    assert found.numbers["breaks"] == 1


def test_l1_is_blind_to_saturation(exhibits):
    found = exhibits["L1 norm of the encoder's weights"]
    assert found.numbers["l1 after"] == found.numbers["l1 before"]
    assert found.numbers["norm after"] < 1e-6 * found.numbers["norm before"]
    norms = [norm for _, _, norm in formulas.saturate()]
    assert norms == sorted(norms, reverse=True)


def test_summed_outputs_cancel(exhibits):
    found = exhibits["gradient of the summed outputs, ‖Jᵀ1‖²"]
    assert (found.numbers["zero"], found.numbers["eight"]) == (0, 8)
    assert found.cosine < 0.5


def test_detached_weights_have_the_value_and_not_the_gradient(exhibits):
    found = exhibits["detached weights: W.data, state_dict(), a snapshot"]
    assert found.ratio == pytest.approx(1, abs=1e-5)
    assert found.cosine < 0.5
    assert 0.5 < found.numbers["biased"] < 0.99
    assert found.numbers["relu ratio"] == pytest.approx(1, abs=1e-5)
    assert found.numbers["relu cosine"] == 0


def test_another_activation_is_arbitrary(exhibits):
    found = exhibits["h(1 − h) for an activation that is not the sigmoid"]
    assert found.ratio < 0.1
    assert found.numbers["tanh ratio"] < 0.1
    assert found.numbers["tanh cosine"] < 0


def test_one_of_two_layers_is_off(exhibits):
    found = exhibits["the one-layer formula on the last (or first) of two layers"]
    assert found.ratio > 10
    assert found.numbers["first ratio"] > 100


def test_sum_and_square_do_not_commute(exhibits):
    found = exhibits["sum and square swapped, (Σ w)²"]
    assert found.numbers["lowest"] < 0.01
    assert found.numbers["highest"] > 2
    # The formula that it garbles is right for this encoder.
    right = ground.against_truth(formulas.one_layer(), ground.batch(), formulas.sigmoid_formula)
    assert right.ratio == pytest.approx(1, abs=1e-5)
    assert right.cosine == pytest.approx(1, abs=1e-6)


def test_a_floor_has_no_gradient(exhibits):
    found = exhibits["integer division by the batch size"]
    assert found.ratio == pytest.approx(3 / 3.6827, rel=1e-3)
    assert found.cosine == 0


def test_a_closure_is_stale(exhibits):
    found = exhibits["a JAX loss that closes over params"]
    assert found.numbers["gradient"] == 0
    assert found.numbers["moved"] == 1
    assert found.ratio == pytest.approx(16, rel=1e-3)


def test_factors_are_only_factors(exhibits):
    found = exhibits["factor ½, or a mean over outputs"]
    assert found.ratio == 0.5
    assert found.cosine == pytest.approx(1, abs=1e-9)
    assert found.numbers["outputs"] == pytest.approx(64)


def test_curvatures_are_those_of_torch():
    """The closed forms that make training with them cheap, at a size where torch forms them."""
    model, xs = ground.tutorial_model("tanh", (12, 9, 5)).double(), torch.rand(3, 12).double()
    hessians = derivatives(model.encode, xs, 2)
    torch.testing.assert_close(
        curved.true_curvatures(model, xs), squared(hessians), rtol=1e-12, atol=0
    )
    summed = [torch.func.hessian(lambda x: model.encode(x[None]).sum())(x) for x in xs]
    torch.testing.assert_close(
        curved.hessian_of_summed_outputs(model, xs),
        torch.stack(summed).square().sum(),
        rtol=1e-12,
        atol=0,
    )
    noise = torch.randn(3, 12).double()
    change = derivatives(model.encode, xs + noise, 1) - derivatives(model.encode, xs, 1)
    torch.testing.assert_close(
        curved.noise_form(model, xs, noise), change.square().sum() / curved.SIGMA**2
    )
    metric = torch.randn(12, 12).double()
    moved = torch.func.jacrev(lambda u: model.encode(u @ metric))(xs)
    blocks = torch.stack([moved[i, :, i] for i in range(3)])
    torch.testing.assert_close(
        curved.at_the_wrong_point(model, xs, metric), blocks.square().sum(), rtol=1e-12, atol=0
    )


def test_curvatures_of_summed_outputs_cancel(exhibits):
    found = exhibits["Hessian of the summed outputs"]
    assert found.numbers["zero"] == 0
    assert found.numbers["true"] > 1
    assert found.cosine < 0.5


def test_one_noise_for_a_batch_is_one_direction(exhibits):
    found = exhibits["noise form with one ε for the batch"]
    assert found.ratio == pytest.approx(1, abs=0.3)  # no bias: it is the spread that is wrong
    assert found.numbers["own ratio"] == pytest.approx(1, abs=0.2)
    assert found.cosine < 0.3
    assert found.numbers["own cosine"] > 0.6


def test_a_metric_that_moves_the_point_is_not_quadratic_in_it(exhibits):
    found = exhibits["a metric that moves the point"]
    assert found.ratio < 0.8
    assert found.numbers["other units"] < 0.1 * found.ratio
    assert found.numbers["other units cosine"] < 0.5


def test_hazards(exhibits):
    gelu = exhibits["GELU by its default"].numbers
    assert 1e-4 < gelu["gap"] < 1e-3
    assert gelu["rest"] < 5e-6
    softplus = exhibits["softplus above 20"].numbers
    assert softplus["cut"] == 0
    assert 1e-9 < softplus["ours"] < 2e-9
    assert softplus["raised"] < 1e-14
    ties = exhibits["ReLU written as maximum(a, 0)"].numbers
    assert ties == {"maximum": 0.5, "relu": 0.0, "torch": 0.0}
    weights = exhibits["layout and first weights"].numbers
    assert weights["torch"] == pytest.approx(1 / (3 * 784) ** 0.5, rel=0.01)
    assert weights["jax"] == pytest.approx((2 / (784 + 256)) ** 0.5, rel=0.01)
    decay = exhibits["AdamW's default decay"].numbers
    assert decay["torch"] == pytest.approx(1e-2, rel=1e-3)
    assert decay["optax"] == pytest.approx(1e-4, rel=1e-3)
    assert exhibits["vmap(jacrev) of nn.GRU or nn.LSTM"].numbers == {"GRU": 1.0, "LSTM": 1.0}


def test_training_tells_the_recipes_apart():
    steps = 25
    ends = {
        name: visit.follow(name, steps)[-1]
        for name in ("no penalty", "gradient of the summed outputs", "exact", "L1 of the weights")
    }
    start = visit.follow("exact", 1)[0]
    assert ends["no penalty"] > 3 * start
    assert ends["gradient of the summed outputs"] > start
    assert ends["exact"] < 0.3 * start
    assert ends["L1 of the weights"] < 0.3 * start


@pytest.mark.slow
def test_training_tells_curvatures_apart():
    ends = {name: visit.follow_curvature(name, 40)[-1] for name in visit.curved_runs()}
    start = visit.follow_curvature("exact", 1)[0]
    assert ends["no penalty"] > start
    assert ends["Hessian of the summed outputs"] > 10 * ends["exact"]
    assert ends["noise form, one ε for the batch"] > 5 * ends["noise form, an ε for each sample"]
    assert ends["exact"] < 0.1 * start


def test_the_command_prints_a_table_and_draws_a_picture(exhibits, tmp_path, capsys, monkeypatch):
    def quick(out, steps, begin):
        monkeypatch.setattr(jacobians, "exhibits", list)
        monkeypatch.setattr(curved, "exhibits", list)
        monkeypatch.setattr(
            visit, "RUNS", {n: r for n, r in visit.RUNS.items() if "finite" not in n}
        )
        return seen(out, steps, begin)

    seen = visit.visit
    monkeypatch.setattr(visit, "visit", quick)
    assert command.main(["museum", "--steps", "2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "gradient cosine" in shown
    for name in ("museum.png", "museum-curvature.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| L1 norm of the encoder's weights |" in (tmp_path / "museum.md").read_text()
    assert command.main(["museum", "--steps", "0"]) == 2


def test_each_exhibit_is_told_with_what_it_should_lower(exhibits):
    norms, curvatures = (
        exhibits[name]
        for name in ("gradient of the summed outputs, ‖Jᵀ1‖²", "Hessian of the summed outputs")
    )
    runs = {norms.run: [4.0, 2.0], "exact": [4.0, 1.0]}
    curved_runs = {curvatures.run: [3.0, 0.5], "exact": [3.0, 0.25]}
    seen = Visit([norms, curvatures], runs, curved_runs, 1)
    assert tell.trained(norms, seen) == "‖J‖² 4 → 2; exact: 1"
    assert tell.trained(curvatures, seen) == "‖∇²h‖² 3 → 0.5; exact: 0.25"


def test_labels_move_little_and_never_touch():
    assert picture.apart([0.5, 0.9], [0.05, 0.05]) == pytest.approx([0.5, 0.9])
    assert picture.apart([0.5, 0.5], [0.05, 0.03]) == pytest.approx([0.46, 0.54])
    assert picture.apart([0.0, 0.0, 0.9], [0.05, 0.05, 0.05]) == pytest.approx([0.05, 0.15, 0.9])


def test_every_run_of_an_exhibit_is_in_the_picture(exhibits):
    used = {exhibit.run for exhibit in exhibits.values() if exhibit.run}
    assert used <= {*visit.RUNS, *visit.curved_runs()}
    assert set(visit.RUNS) == set(picture.STYLES)
    assert set(visit.curved_runs()) == set(picture.CURVED_STYLES)


def test_no_module_of_parity_imports_itself_through_others():
    """Wherever the import stands: at the top, within a function, or for types only."""
    root = Path(__file__).parents[1]
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (root / "parity").rglob("*.py")
    }
    imports = {name: imported(path) & set(files) - {name} for name, path in files.items()}
    assert imports["parity.museum.visit"] >= {"parity.museum.ground", "parity.museum.tell"}
    while leaves := [name for name, found in imports.items() if not found]:
        for leaf in leaves:
            del imports[leaf]
        imports = {name: found - set(leaves) for name, found in imports.items()}
    assert imports == {}, "these import one another"


def imported(path: Path) -> set[str]:
    """List the modules that a file imports, and the names it takes from them as if modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    # A package is imported before its modules; that is no circle unless it imports them back.
    return found
