"""The PyTorch contractive autoencoder, written from the papers and from nothing in jaxcae.

The penalty is ‖J_h(x)‖²_F = Σ_ij (∂h_i(x)/∂x_j)², one number per sample, in three ways that share
no step: rows by `vmap(jacrev)`, rows by one `autograd.grad` per code unit, and the closed form of
one sigmoid layer that the first paper gives. They must agree with one another before anything
else is compared with them.

References:
    Rifai, Vincent, Muller, Glorot, Bengio, "Contractive Auto-Encoders: Explicit Invariance During
    Feature Extraction", ICML 2011, equations 4 to 7. Rifai et al., "Higher Order Contractive
    Auto-Encoder", ECML 2011, doi:10.1007/978-3-642-23783-6_41.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encode = Callable[[Tensor], Tensor]
"""`(batch, …features) -> (batch, …code)`; PyTorch code sees whole batches."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "identity": lambda a: a,
    # torch returns a itself above 20, where the true value is a + 2e-9: see the tolerances.
    "softplus, threshold raised": partial(F.softplus, threshold=80),
}


class CAE(nn.Module):
    """An encoder h and a decoder, each a list of layers with s between them.

    The last layer of the encoder ends in the latent activation, that of the decoder in the output.
    """

    encoder: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(self, activation: str, latent_activation: str, output: str, tied: bool) -> None:
        """Look up the activations; the subclasses add the layers."""
        super().__init__()
        self.hidden = ACTIVATIONS[activation]
        self.latent = ACTIVATIONS[latent_activation]
        self.output = ACTIVATIONS[output]
        self.tied = tied

    def encode(self, x: Tensor) -> Tensor:
        """Map a batch of samples to a batch of codes."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Map a batch of codes to a batch of reconstructions."""
        raise NotImplementedError


class DenseCAE(CAE):
    """h(x) = W_L s(… s(W_1 x + b_1) …) + b_L; a tied decoder uses W_Lᵀ, …, W_1ᵀ."""

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "sigmoid",
        *,
        tied: bool = False,
        latent_activation: str = "identity",
        output: str = "identity",
    ) -> None:
        """Make one linear layer for each pair of neighbouring widths, there and back."""
        super().__init__(activation, latent_activation, output, tied)
        self.encoder = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.decoder = nn.ModuleList(
            Bias(b) if tied else nn.Linear(a, b) for a, b in pairwise(sizes[::-1])
        )

    def encode(self, x: Tensor) -> Tensor:
        """Map `(batch, features)` to `(batch, latent)`."""
        for layer in self.encoder[:-1]:
            x = self.hidden(layer(x))
        return self.latent(self.encoder[-1](x))

    def decode(self, z: Tensor) -> Tensor:
        """Map `(batch, latent)` to `(batch, features)`."""
        for i, layer in enumerate(self.decoder):
            weight = weight_of(self.encoder[-1 - i]).T if self.tied else weight_of(layer)
            z = F.linear(z, weight, bias_of(layer))
            z = self.hidden(z) if i < len(self.decoder) - 1 else self.output(z)
        return z


class ConvCAE(CAE):
    """Strided 3×3 convolutions and a linear layer; the decoder transposes each of them."""

    def __init__(
        self,
        image: tuple[int, int, int],
        maps: Sequence[int],
        latent: int,
        activation: str = "sigmoid",
        *,
        stride: int = 2,
        tied: bool = False,
        latent_activation: str = "identity",
        output: str = "identity",
    ) -> None:
        """Make one convolution for each entry of `maps`; `image` is (height, width, channels)."""
        super().__init__(activation, latent_activation, output, tied)
        rows, columns, channels = image
        self.stride = stride
        self.extra: list[tuple[int, int]] = []  # rows and columns that each stride leaves over
        for _ in maps:
            self.extra.append(((rows - 1) % stride, (columns - 1) % stride))
            rows, columns = (rows - 1) // stride + 1, (columns - 1) // stride + 1
        self.map = (maps[-1], rows, columns)
        flat = maps[-1] * rows * columns

        ends = list(pairwise((channels, *maps)))
        self.encoder = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding=1) for a, b in ends)
        self.encoder.append(nn.Linear(flat, latent))
        self.decoder = nn.ModuleList([Bias(flat) if tied else nn.Linear(latent, flat)])
        for a, b in ends[::-1]:
            self.decoder.append(Bias(a) if tied else nn.ConvTranspose2d(b, a, 3, stride, padding=1))

    def encode(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` to `(batch, latent)`."""
        for layer in self.encoder[:-1]:
            x = self.hidden(layer(x))
        return self.latent(self.encoder[-1](x.flatten(1)))

    def decode(self, z: Tensor) -> Tensor:
        """Map `(batch, latent)` to `(batch, channels, height, width)`."""
        dense = self.decoder[0]
        weight = weight_of(self.encoder[-1]).T if self.tied else weight_of(dense)
        z = self.hidden(F.linear(z, weight, bias_of(dense))).unflatten(1, self.map)
        for i, layer in enumerate(self.decoder[1:]):
            weight = weight_of(self.encoder[-2 - i] if self.tied else layer)
            extra = self.extra[-1 - i]
            z = F.conv_transpose2d(z, weight, bias_of(layer), self.stride, 1, output_padding=extra)
            z = self.hidden(z) if i < len(self.decoder) - 2 else self.output(z)
        return z


class Bias(nn.Module):
    """The parameters of a decoder layer whose weight belongs to the encoder."""

    def __init__(self, features: int) -> None:
        """Hold one bias."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))


def weight_of(layer: nn.Module) -> Tensor:
    """Take the weight of a layer."""
    return layer.get_parameter("weight")


def bias_of(layer: nn.Module) -> Tensor:
    """Take the bias of a layer."""
    return layer.get_parameter("bias")


def norms_by_jacobian(encode: Encode, xs: Tensor) -> Tensor:
    """Compute ‖J(x)‖²_F per sample from the explicit Jacobian, `vmap(jacrev)`."""

    def one(x: Tensor) -> Tensor:
        return torch.func.jacrev(lambda x: encode(x[None])[0])(x).square().sum()

    return torch.func.vmap(one)(xs)


def norms_by_code_unit(encode: Encode, xs: Tensor) -> Tensor:
    """Compute ‖J(x)‖²_F per sample, one row of every J at a time.

    The rows ∂h_i/∂x of all samples come from one `autograd.grad` of Σ_batch h_i, because h_i of
    one sample does not depend on another. The squares are summed over i *outside* of the gradient:
    the gradient of Σ_i h_i instead is the commonest mistake in published code.
    """
    xs = xs.detach().requires_grad_()
    codes = encode(xs).flatten(1)
    norms = codes.new_zeros(len(xs))
    for unit in codes.unbind(1):
        (row,) = torch.autograd.grad(unit.sum(), xs, create_graph=True)
        norms = norms + row.square().flatten(1).sum(1)
    return norms


def norms_of_sigmoid_layer(layer: nn.Module, xs: Tensor) -> Tensor:
    """Compute ‖J(x)‖²_F = Σ_i (h_i(1 − h_i))² Σ_j W_ij² of one sigmoid layer (ICML 2011, eq. 7)."""
    h = torch.sigmoid(layer(xs))
    return (h * (1 - h)).square() @ weight_of(layer).square().sum(1)


def reconstruction_errors(name: str, features: str, xs: Tensor, x_hats: Tensor) -> Tensor:
    """Compute one reconstruction error per sample: squared error, or cross-entropy of logits."""
    if name == "squared_error":
        errors = (xs - x_hats).square()
    else:
        errors = F.binary_cross_entropy_with_logits(x_hats, xs, reduction="none")
    return errors.flatten(1).sum(1) if features == "sum" else errors.flatten(1).mean(1)


def weight_penalties(model: CAE, l1: float, l2: float) -> Tensor:
    """Compute l1·Σ|w| + l2·Σw² over the weights of all layers; biases are left out."""
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    return torch.stack([l1 * w.abs().sum() + l2 * w.square().sum() for w in weights]).sum()
