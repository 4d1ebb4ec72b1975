"""Old names of modules, so that scripts written for an earlier version go on working.

`from jaxcae.anomaly import scores` imports `jaxcae.results.scores` and warns with the new name. To
move a module, move it and add a line to `MOVED`; a test imports every old name.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED: dict[str, str | tuple[str, ...]] = {
    "jaxcae.analysis": "jaxcae.results.analysis",
    "jaxcae.anomaly": "jaxcae.results.scores",
    "jaxcae.checkpoints": (
        "jaxcae.runs.checkpoints",
        "jaxcae.runs.params_file",
        "jaxcae.runs.leaves",
    ),
    "jaxcae.config": ("jaxcae.runs.config", "jaxcae.runs.recipe"),
    "jaxcae.explanation": "jaxcae.jacobian.explanation",
    "jaxcae.export": "jaxcae.results.export",
    "jaxcae.losses": "jaxcae.objective.losses",
    "jaxcae.weight_penalties": "jaxcae.objective.weight_penalties",
}
"""Old module to the new one, or to several that now hold its names together."""


class _Finder:
    """Find what moved. It stands last on `sys.meta_path`, and is asked where no file was found."""

    # The path of a package may be any iterable: that of a namespace package is no sequence.
    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        import warnings

        new = MOVED[module.__name__]
        names = (new,) if isinstance(new, str) else new
        warnings.warn(
            f"{module.__name__} has moved: import from {' or '.join(names)}.",
            DeprecationWarning,
            stacklevel=2,  # Python leaves its own frames of an import out of the count
        )
        targets = [importlib.import_module(name) for name in names]
        if len(targets) == 1:
            # The module itself under its old name, so that there are no two of anything.
            sys.modules[module.__name__] = targets[0]
            return
        for target in reversed(targets):
            module.__dict__.update({k: v for k, v in vars(target).items() if k[:2] != "__"})


def install() -> None:
    """Let old names be imported in this process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def attribute(name: str) -> ModuleType:
    """Import `jaxcae.NAME` where it is written as an attribute, for modules that were one.

    Raises:
        AttributeError: If nothing of that name has moved.
    """
    if f"jaxcae.{name}" not in MOVED:
        raise AttributeError(f"module 'jaxcae' has no attribute {name!r}")
    return importlib.import_module(f"jaxcae.{name}")
