"""Proof that jaxcae and PyTorch agree, and a museum of the recipes that do not.

`python -m parity` runs the proof. torch is imported here and nowhere else in the project, and
only by the modules that need it, so that a missing torch is reported and never skipped.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcae.objective.lambdas import CONVENTIONS, Convention, convert_lambda

__all__ = ["CONVENTIONS", "Convention", "convert_lambda"]


def __getattr__(name: str) -> Any:
    """Take the names above from jaxcae when asked: the command starts without importing JAX."""
    if name in __all__:
        return getattr(importlib.import_module("jaxcae.objective.lambdas"), name)
    raise AttributeError(f"module 'parity' has no attribute {name!r}")
