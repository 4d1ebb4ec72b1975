"""A trained model as files that need jax and nothing of this library.

An artefact is StableHLO with the parameters inside, for one or more platforms and any batch size.
To use one:

    from jax import export
    encode = export.deserialize(open("encoder.jaxexport", "rb").read()).call
    codes = encode(samples)                      # float32 (batch, features) -> (batch, latent)
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcae.data.dataset import Standardization
from jaxcae.data.values import SMALL
from jaxcae.errors import InputError, unknown_name
from jaxcae.objective.losses import ReconstructionLoss, Reduction
from jaxcae.results.scores import scores
from jaxcae.types import Autoencoder, Params

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN_PLATFORMS = (*PLATFORMS, "rocm")
# Products in full float32 on every platform, as on CPU; the default elsewhere keeps 8 to 11 bits.
_PRECISION = "highest"

BatchFunction = Callable[[Any], Any]
"""A function of samples in rows, shape (batch, features), float32."""


def encoder_of(
    model: Autoencoder, params: Params, standardization: Standardization | None = None
) -> BatchFunction:
    """Make `xs -> codes` for samples in their own units."""
    prepare = _preparation(standardization)

    def encoder(xs: Float[Array, "batch features"]) -> Any:
        return jax.vmap(model.encode, (None, 0))(params, prepare(xs))

    return encoder


def scorer_of(
    model: Autoencoder,
    params: Params,
    standardization: Standardization | None = None,
    *,
    reconstruction: str | ReconstructionLoss = "squared_error",
    features: Reduction = "sum",
) -> BatchFunction:
    """Make `xs -> {"reconstruction_error", "jacobian_norm"}` for samples in their own units."""
    prepare = _preparation(standardization)
    score = scores(model, reconstruction=reconstruction, features=features)

    def scorer(xs: Float[Array, "batch features"]) -> dict[str, Any]:
        result = score(params, prepare(xs))
        return {
            "reconstruction_error": result.reconstruction,
            "jacobian_norm": result.jacobian_norm,
        }

    return scorer


def export_function(
    function: BatchFunction, num_features: int, platforms: Sequence[str] = PLATFORMS
) -> bytes:
    """Export a function of samples in rows, with a symbolic batch.

    Args:
        function: What `encoder_of` or `scorer_of` made; parameters become constants.
        num_features: The width of a sample.
        platforms: Where it is to run; it need not be the platform at hand.

    Returns:
        The bytes that `jax.export.deserialize` takes.

    Raises:
        InputError: If a platform is unknown, flatbuffers is not installed, or the function has
            effects, such as `jax.debug.print`.
    """
    from jax import export

    if not platforms:
        raise InputError(f"no platform to export for; choose from {', '.join(_KNOWN_PLATFORMS)}.")
    for platform in platforms:
        if platform not in _KNOWN_PLATFORMS:
            raise InputError(str(unknown_name("platform", platform, _KNOWN_PLATFORMS)))
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError(
            "exporting needs the flatbuffers package, which is not installed: "
            "run pip install flatbuffers"
        )
    if jax.make_jaxpr(function)(jax.ShapeDtypeStruct((2, num_features), jnp.float32)).effects:
        raise InputError(
            "the function calls back to Python (jax.debug.print, a callback or the like), which no "
            "file can hold. Leave that out of what is to be exported."
        )
    (batch,) = export.symbolic_shape("batch")
    with jax.default_matmul_precision(_PRECISION):
        exported = export.export(jax.jit(function), platforms=tuple(platforms))(
            jax.ShapeDtypeStruct((batch, num_features), jnp.float32)
        )
    return bytes(exported.serialize())


def call_elsewhere(artefact: bytes, batches: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Call an artefact in a new process that does not import jaxcae.

    Args:
        artefact: What `export_function` returned.
        batches: Samples in rows; each is one call.

    Returns:
        The results of each call by name; a function of one result names it `result`.

    Raises:
        RuntimeError: If the process failed, or imported jaxcae.
    """
    with tempfile.TemporaryDirectory(prefix="jaxcae-export-") as name:
        folder = Path(name)
        (folder / "artefact").write_bytes(artefact)
        np.savez(folder / "inputs.npz", *batches)
        process = subprocess.run(
            [sys.executable, "-P", "-c", _ELSEWHERE, name],
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"the exported function failed in a new process: {lines[-1]}")
        with np.load(folder / "outputs.npz", allow_pickle=False) as outputs:
            results: list[dict[str, np.ndarray]] = [{} for _ in batches]
            for key in outputs.files:
                index, _, label = key.partition(" ")
                results[int(index)][label] = outputs[key]
    return results


def compare(function: BatchFunction, artefact: bytes, batches: Sequence[np.ndarray]) -> float:
    """Return the largest relative difference of an artefact from the function it was made of.

    The artefact runs in a new process that does not import jaxcae; differences are relative to
    the largest value of each result.
    """
    worst = 0.0
    for xs, got in zip(batches, call_elsewhere(artefact, batches), strict=True):
        with jax.default_matmul_precision(_PRECISION):
            want = jax.device_get(jax.jit(function)(xs))
        named = want if isinstance(want, dict) else {"result": want}
        if set(named) != set(got):
            raise RuntimeError(f"the exported function returned {sorted(got)}.")
        for label, values in named.items():
            if got[label].shape != values.shape:
                raise RuntimeError(f"{label}: shape {got[label].shape}, expected {values.shape}.")
            difference = np.max(np.abs(got[label] - values), initial=0.0)
            scale = np.max(np.abs(values), initial=0.0)
            worst = max(worst, float(difference / scale) if difference else 0.0)
    return worst


def holds_own_units(standardization: Standardization | None) -> bool:
    """Tell whether samples in float32, in their own units, keep the digits that matter.

    Where a feature is large against its deviation, such as seconds since 1970, they do not. What
    is exported must then be given samples that were standardised in float64.
    """
    if standardization is None:
        return True
    mean, deviation = standardization
    spacing = np.finfo(np.float32).eps * (np.abs(mean) + 4 * deviation)
    return bool((spacing <= SMALL * deviation).all())


def example_batches(
    num_features: int, standardization: Standardization | None = None
) -> list[np.ndarray]:
    """Draw batches of three sizes to compare on, in the units of the data."""
    rng = np.random.default_rng(0)
    batches = []
    for size in (1, 7, 300):
        xs = rng.random((size, num_features))
        if standardization is not None:
            xs = standardization.mean + standardization.deviation * rng.normal(size=xs.shape)
        batches.append(xs.astype(np.float32))
    return batches


def _preparation(standardization: Standardization | None) -> Callable[[Any], Any]:
    if standardization is None:
        return lambda xs: xs
    # The mean in two parts, so that a column far from zero loses no more than it has.
    mean = np.asarray(standardization.mean, np.float32)
    rest = np.asarray(standardization.mean - mean, np.float32)
    deviation = np.asarray(standardization.deviation, np.float32)

    def prepare(xs: Any) -> Any:
        standardization.check_width(xs.shape[1])
        return ((xs - mean[None]) - rest[None]) / deviation[None]

    return prepare


_ELSEWHERE = """
import sys
from pathlib import Path

import numpy as np
from jax import export

folder = Path(sys.argv[1])
function = export.deserialize(bytearray((folder / "artefact").read_bytes())).call
outputs = {}
with np.load(folder / "inputs.npz", allow_pickle=False) as inputs:
    for index, name in enumerate(inputs.files):
        result = function(inputs[name])
        named = result if isinstance(result, dict) else {"result": result}
        outputs.update({f"{index} {label}": np.asarray(values) for label, values in named.items()})
np.savez(folder / "outputs.npz", **outputs)
if "jaxcae" in sys.modules:
    sys.exit("jaxcae was imported")
"""
