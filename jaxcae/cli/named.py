"""Models of the user's own, named on the command line as PACKAGE.MODULE:FACTORY."""

import os
import sys
from pathlib import Path

from jaxcae.models.factory import is_factory
from jaxcae.runs import Run, open_run


def find_in_working_directory(model: str | None) -> None:
    """Let a factory that the user has named be imported from where they are.

    As `python -m` does, and as little as it under `python -P`; a script installed by pip looks
    beside itself instead. No name, no change: a directory of unknown files shadows no package.
    """
    here = os.getcwd()
    named = model is not None and is_factory(model)
    if named and not sys.flags.safe_path and sys.path[:1] not in ([""], [here]):
        sys.path.insert(0, here)


def open_named_run(path: Path, model: str | None) -> Run:
    """Open a finished run whose model may be the user's own, named once more."""
    find_in_working_directory(model)
    return open_run(path, model)
