"""The methods by which a module encodes and decodes, and their arguments."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "inference": True,
    "use_running_average": True,
}
"""Arguments that tell a module to use what training has gathered, and no random numbers."""

_RANDOM = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "inference": False,
    "use_running_average": True,
}


@dataclass(frozen=True)
class Methods:
    """How a module, or an encoder and a decoder, are called.

    Attributes:
        parts: The module, or the encoder and the decoder.
        names: The methods that encode and decode.
        options: Keyword arguments for either.
    """

    parts: tuple[Any, ...]
    names: tuple[str, str]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, module: Any, decoder: Any, options: Mapping[str, Any]) -> "Methods":
        """Find the methods of one module or two.

        Raises:
            ValueError: If one is missing, or none takes one of the options.
        """
        if decoder is not None:
            methods = cls((module, decoder), ("__call__", "__call__"), options)
        else:
            methods = cls((module,), ("encode", "decode"), options)
        takes = set()
        for part, name in zip(methods.owners(methods.parts), methods.names, strict=True):
            if not callable(getattr(part, name, None)):
                raise ValueError(
                    f"{type(part).__name__} has no method {name!r}: expected a module with encode "
                    "and decode, or an encoder and a decoder that can be called."
                )
            takes |= set(inspect.signature(getattr(part, name)).parameters)
        for option in options:
            if option not in takes:
                raise ValueError(f"neither {' nor '.join(methods.names)} takes {option!r}.")
        return methods

    @property
    def name(self) -> str:
        """Name the modules, for messages."""
        return " and ".join(type(part).__name__ for part in self.parts)

    def owners(self, parts: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return the part that encodes and the one that decodes."""
        return parts[0], parts[-1]

    def arguments(self, index: int, *, random: bool) -> dict[str, Any]:
        """Choose the keyword arguments of `encode` (0) or `decode` (1)."""
        owner, name = self.owners(self.parts)[index], self.names[index]
        takes = inspect.signature(getattr(owner, name)).parameters
        values = {**(_RANDOM if random else EVALUATION), **self.options}
        return {option: value for option, value in values.items() if option in takes}

    def join(self, values: Any) -> Any:
        """Give one part its value bare, and two theirs by name."""
        if len(self.parts) == 1:
            return values[0]
        return dict(zip(("encoder", "decoder"), values, strict=True))

    def divide(self, joined: Any) -> tuple[Any, ...]:
        """Undo `join`."""
        return (joined,) if len(self.parts) == 1 else (joined["encoder"], joined["decoder"])


def parameters_of(source: Any) -> set[str]:
    """Name the parameters of a function, a class, or what `functools.partial` leaves of one."""
    bound: set[str] = set()
    while isinstance(source, functools.partial):
        bound |= set(source.keywords)
        source = source.func
    if isinstance(source, type):  # those of libraries have metaclasses that take anything
        source = source.__init__  # type: ignore[misc]
    try:
        return set(inspect.signature(source).parameters) - bound - {"self"}
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return set()


def maker(source: Any, argument: str) -> Callable[[Any], tuple[Any, ...]] | None:
    """Return `value -> parts` where `source` makes modules of an argument, and is none itself.

    Args:
        source: A class, a function that returns a module or two, or a module.
        argument: The name of the argument; without one of this name, the first.
    """
    kinds = (type, types.FunctionType, types.MethodType, functools.partial)
    if not isinstance(source, kinds):
        return None
    by_name = argument in parameters_of(source)

    def make(value: Any) -> tuple[Any, ...]:
        made = source(**{argument: value}) if by_name else source(value)
        return made if isinstance(made, tuple) else (made,)

    return make
