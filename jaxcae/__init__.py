"""Contractive autoencoders in JAX, exact and near the price of a plain autoencoder.

The names are in `jaxcae._public`, which is imported when the first of them is used: until then the
package costs nothing, so that the command line can listen for signals before JAX is loaded.
"""

from jaxcae import _moved

TYPE_CHECKING = False  # as in `typing`, without the price of importing it
if TYPE_CHECKING:
    from jaxcae._public import *  # noqa: F403
    from jaxcae.results.detection.detector import ContractiveDetector as ContractiveDetector

__version__ = "0.1.0"

_moved.install()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module 'jaxcae' has no attribute {name!r}")
        from jaxcae import _public

        # What it imports are submodules too, and attributes of the package from then on.
        for place in (vars(_public), globals()):
            if name in place:
                return place[name]
        if name in _public.LAZY:
            return _public.lazy(name)
        return _moved.attribute(name)

    def __dir__() -> list[str]:
        from jaxcae import _public

        return sorted({*globals(), *_public.__all__, *_public.LAZY})
