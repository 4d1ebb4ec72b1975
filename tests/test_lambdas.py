"""λ converted between conventions gives equal gradients, in PyTorch's own arithmetic."""

import subprocess
import sys

import pytest
import torch

import parity
from jaxcae import convert_lambda
from jaxcae.objective import CONVENTIONS, Convention
from parity.reference import DenseCAE, norms_by_jacobian

SQUARED = [name for name, convention in CONVENTIONS.items() if convention.squared]
FEATURES, BATCH = 6, 4


def gradient(convention: Convention, strength: float) -> torch.Tensor:
    """Take the gradient of an objective written out in one convention."""
    torch.manual_seed(0)
    model = DenseCAE((FEATURES, 5, 3), "tanh").double()
    xs = torch.rand(BATCH, FEATURES, dtype=torch.float64)
    errors = (model.decode(model.encode(xs)) - xs).square()
    errors = errors.sum(1) if convention.features == "sum" else errors.mean(1)
    norms = norms_by_jacobian(model.encode, xs)
    error = errors.sum() if convention.batch == "sum" else errors.mean()
    penalty = norms.sum() if convention.penalty == "sum" else norms.mean()
    loss = error + strength * convention.factor * (
        penalty if convention.squared else penalty.sqrt()
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("source", SQUARED)
@pytest.mark.parametrize("target", SQUARED)
def test_equal_gradients(source, target):
    value, scale = convert_lambda(0.3, source, target, features=FEATURES, batch_size=BATCH)
    one = scale * gradient(CONVENTIONS[source], 0.3)
    two = gradient(CONVENTIONS[target], value)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_named_mse_conventions_are_those_of_torch():
    torch.manual_seed(0)
    model = DenseCAE((FEATURES, 3), "tanh").double()
    xs = torch.rand(BATCH, FEATURES, dtype=torch.float64)
    x_hats, norms = model.decode(model.encode(xs)), norms_by_jacobian(model.encode, xs)
    jacobian = torch.autograd.functional.jacobian(model.encode, xs, create_graph=True)
    tutorial = torch.nn.functional.mse_loss(x_hats, xs) + 0.001 * torch.norm(jacobian) ** 2
    value, scale = convert_lambda(
        0.001, "mse_loss + norm(J)**2", features=FEATURES, batch_size=BATCH
    )
    ours = ((x_hats - xs).square().sum(1) + value * norms).mean()
    torch.testing.assert_close(scale * tutorial, ours, rtol=1e-12, atol=0)


def test_an_unsquared_norm_is_not_converted():
    with pytest.raises(ValueError, match="another objective"):
        convert_lambda(0.1, "mse_loss + norm(J)", features=784, batch_size=128)


def test_misuse_is_told(untyped):
    with pytest.raises(ValueError, match="choose from 'jaxcae'"):
        convert_lambda(0.1, "keras", features=784, batch_size=128)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="batch_size must be a positive int"):
            convert_lambda(0.1, "paper", features=784, batch_size=wrong)


def test_parity_gives_the_same_names_and_starts_without_jax():
    assert parity.convert_lambda is convert_lambda
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = parity.nothing
    program = (
        "import parity, parity.__main__, sys; print(sorted({'jax', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
