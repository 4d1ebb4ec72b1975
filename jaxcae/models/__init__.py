"""Built-in autoencoders as pure functions over nested dicts of parameters."""

from jaxcae.models.conv import conv
from jaxcae.models.mlp import mlp

__all__ = ["conv", "mlp"]
