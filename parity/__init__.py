"""Proof that jaxcae and PyTorch agree, and a museum of the recipes that do not.

`python -m parity` runs the proof. torch is imported here and nowhere else in the project, and
only by the modules that need it, so that a missing torch is reported and never skipped.
"""

from parity.lambdas import CONVENTIONS, Convention, convert_lambda

__all__ = ["CONVENTIONS", "Convention", "convert_lambda"]
