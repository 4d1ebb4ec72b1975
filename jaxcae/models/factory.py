"""A model named as `PACKAGE.MODULE:FACTORY`: the function is imported, called, and adapted.

To import a module is to run its code, so nothing here is called for a name that the user has not
given: names that come out of files are for the caller to confirm.
"""

import ast
import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from jaxcae.errors import InputError, unknown_name
from jaxcae.models.equinox import from_equinox
from jaxcae.models.flax import from_flax
from jaxcae.models.methods import parameters_of
from jaxcae.types import Autoencoder

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_MAX_VALUE = 1000


def is_factory(name: str) -> bool:
    """Tell whether a model is named as `PACKAGE.MODULE:FACTORY`."""
    return _FORM.fullmatch(name) is not None


def parse_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` pairs: values are Python literals, and text where they are no literal.

    Raises:
        InputError: If a pair has another form, or a key comes twice.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise InputError(f"`model_args`: expected key=value, got {pair!r:.80}.")
        if key in arguments:
            raise InputError(f"`model_args`: {key!r} comes twice.")
        if len(text) > _MAX_VALUE:
            raise InputError(f"`model_args`: {key!r} has {len(text):,} characters, at most 1,000.")
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if text[:1] in tuple("([{'\""):
                raise InputError(
                    f"`model_args`: {pair!r:.80} begins as a Python literal and is none."
                ) from None
            arguments[key] = text
    return arguments


def load_factory(name: str) -> Callable[..., Any]:
    """Import what `PACKAGE.MODULE:FACTORY` names, which runs the code of that module.

    Raises:
        InputError: If it cannot be imported, or is nothing that can be called.
    """
    place, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a script that ends itself is no module
        hint = f" Leave out '.py': {place[:-3]}:{attribute}." if place.endswith(".py") else ""
        what = f"{name}: {place} cannot be imported: {_in_a_line(error)}.{hint}"
        raise InputError(what) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise InputError(f"{name}: {unknown_name('factory', attribute, known)}")
    return factory


def from_factory(
    name: str, factory: Callable[..., Any], pairs: Iterable[str], shape: tuple[int, ...]
) -> Autoencoder:
    """Make the autoencoder of a factory for samples of a shape.

    A factory returns an `Autoencoder`, a module of Flax or Equinox, or a pair of them. One that
    takes `rngs` (Flax NNX) or `key` (Equinox) is called with one at `init`, so that the seed of a
    run decides its parameters.

    Args:
        name: What to call it in messages, `PACKAGE.MODULE:FACTORY`.
        factory: What `load_factory` returned.
        pairs: Its arguments; see `parse_arguments`.
        shape: The shape of one sample.

    Raises:
        InputError: If anything about it does not work, in one line.
    """
    bound = functools.partial(factory, **parse_arguments(pairs))
    takes = parameters_of(bound)
    try:
        if "rngs" in takes:
            return from_flax(bound, sample=shape)
        if "key" in takes:
            return from_equinox(bound, sample=shape)
        return _adapted(bound(), shape)
    except Exception as error:
        hint = " Samples are rows here; `shape` says how images are." if len(shape) == 1 else ""
        raise InputError(f"{name}: {_in_a_line(error)}.{hint}") from error


def _adapted(made: Any, shape: tuple[int, ...]) -> Autoencoder:
    if isinstance(made, Autoencoder):
        return made
    first = made[0] if isinstance(made, tuple) and made else made
    makers = {cls.__module__.split(".")[0] for cls in type(first).__mro__}
    if "flax" in makers:
        return from_flax(made, sample=shape)
    if "equinox" in makers:
        return from_equinox(made, sample=shape)
    raise TypeError(
        "expected an Autoencoder, a module of Flax or Equinox or a pair of them, "
        f"got {type(made).__name__}"
    )


def _in_a_line(error: BaseException) -> str:
    """Say what was raised, its type where that is not clear from a refusal of ours."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
