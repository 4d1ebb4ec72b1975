"""What results may depend on beside the configuration."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Describe what results may depend on beside the configuration: versions and device."""
    versions = {}
    for name in ("jaxcae", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "host": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "threads": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": str(
            getattr(jax.config, "jax_default_matmul_precision", None) or "default"
        ),
        "x64": bool(jax.numpy.zeros(0).dtype == "float64"),
    }
