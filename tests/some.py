"""Which cases of a table every run tests, and which the slow tests leave to themselves."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Mark all cases slow but those to keep."""
    return [c if c in kept else pytest.param(c, marks=pytest.mark.slow) for c in cases]
