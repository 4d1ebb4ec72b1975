"""Leave out of the wheel the extras of what it does not hold.

`parity/`, `tests/` and `benchmarks/` run from a checkout, where `pip install -e '.[test]'` finds
the extras that they need. A wheel holds `jaxcae/` alone, and promises no more.
"""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KEPT = ("train",)


class WheelExtras(BuildHookInterface):
    """Called before the metadata of a wheel is written."""

    def initialize(self, version: str, build_data: dict) -> None:
        """Drop the other extras, except from the wheel of an editable install."""
        if version != "editable":
            extras = self.metadata.core.optional_dependencies
            for name in [name for name in extras if name not in KEPT]:
                del extras[name]
