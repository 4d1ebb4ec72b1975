"""Many devices: how samples, parameters and the state of the optimizer lie on them."""

from jaxcae.devices.layout import Layout, batch_sharding, gather, layout, place

__all__ = ["Layout", "batch_sharding", "gather", "layout", "place"]
