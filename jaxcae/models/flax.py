"""Flax modules, NNX and Linen, as an `Autoencoder`: unmodified, in evaluation mode."""

from functools import partial
from typing import Any

from jaxcae.models.foreign import ModuleAutoencoder, layout_of
from jaxcae.models.linen import linen_calls
from jaxcae.models.nnx import nnx_calls


def from_flax(
    module: Any,
    decoder: Any = None,
    *,
    sample: Any = None,
    variables: Any = None,
    batched: bool | None = None,
    **options: Any,
) -> ModuleAutoencoder:
    """Make an `Autoencoder` of a Flax module, NNX or Linen, as it is.

    Parameters are plain nested dicts: of NNX that of `nnx.to_pure_dict(nnx.state(module,
    nnx.Param))`, which `nnx.update(module, params)` takes back; of Linen `variables["params"]`; of
    two modules `{"encoder": …, "decoder": …}`. All else that a module holds is frozen: a BatchNorm
    normalises by the statistics it came with, which are no parameters.

    Modules run in evaluation mode: copies of NNX modules with `deterministic` and
    `use_running_average` set, and methods that take `train`, `training`, `is_training`,
    `deterministic` or `use_running_average` with the value for it. Dropout is off;
    `model.stochastic(key)` switches it on.

    A module that is written for batches, as Flax's are, is called with a batch of one. A sample
    keeps its own shape, such as (height, width, channels).

    Args:
        module: A module with methods `encode` and `decode`, each a function of one array, or the
            encoder alone. In place of an NNX module, its class or any function of `rngs`: `init`
            then draws parameters from its key, where that of a module gives the module's own.
        decoder: The decoder, where `module` is the encoder; both are then called themselves. A
            pair (encoder, decoder) as `module` says the same.
        sample: One sample or its shape. Linen needs it to draw parameters; with it, what is else
            checked when the model is first used is checked now.
        variables: Of Linen, what `module.init` gave, in place of drawing them; a pair for two
            modules.
        batched: Whether the module is written for batches; by default this is found out.
        **options: Keyword arguments for `encode` and `decode`; each gets those that it takes.

    Returns:
        A `ModuleAutoencoder(init, encode, decode)`. `model.module(params)` gives the module with
        trained parameters, `model.frozen` what is not trained.

    Raises:
        ValueError: If there is no encode or decode, one returns anything but an array, or samples
            of a batch are mixed.

    Example:
        >>> import jax, jaxcae
        >>> from flax import nnx
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.hidden = nnx.Linear(6, 5, rngs=rngs)
        ...         self.code = nnx.Linear(5, 3, rngs=rngs)
        ...         self.out = nnx.Linear(3, 6, rngs=rngs)
        ...
        ...     def encode(self, x):
        ...         return self.code(nnx.gelu(self.hidden(x)))
        ...
        ...     def decode(self, z):
        ...         return self.out(z)
        >>> model = jaxcae.from_flax(Net(nnx.Rngs(0)))
        >>> model.encode(model.init(jax.random.key(0)), jax.numpy.zeros(6)).shape
        (3,)
    """
    from flax import linen

    if isinstance(module, tuple) and len(module) == 2:
        module, decoder = module
    orders = (True, False) if batched is None else (batched,)
    if isinstance(module, linen.Module):
        if variables is None and sample is None:
            raise ValueError(
                "a Linen module holds no parameters: give from_flax a sample to draw them for, "
                "such as sample=xs[0], or its variables."
            )
        layout = layout_of(sample)
        draw = partial(linen_calls, module, decoder, variables, layout, options)
        readings = [partial(draw, batched=order) for order in orders]
    elif variables is not None:
        raise ValueError(f"variables are Linen's, got a {type(module).__name__}.")
    else:
        calls = nnx_calls(module, decoder, options)
        readings = [partial(calls._replace, batched=order) for order in orders]
    return ModuleAutoencoder.of(readings, sample)
