"""A test of the installation and the device, for a person to run first on new hardware.

Compilers have been wrong about this library's core pattern before: jaxlib 0.10.2 silently returns
wrong values on CPU for a product followed by a reduction under `jit`, at real sizes only. So every
exact method is compiled at real sizes and held against float64 NumPy, values and gradients, and a
training step is repeated to see that it repeats.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcae import __version__
from jaxcae.models import mlp
from jaxcae.objective import cae_loss
from jaxcae.penalty import EXACT_METHODS, contractive_penalty
from jaxcae.runs.leaves import digest_of_tree
from jaxcae.training import TrainState, make_train_step
from jaxcae.types import Params

SIZES, BATCH = (784, 256, 64), 128

LIMIT = 1e-5
"""Relative, for products in full float32: 5e-7 seen, and a factor for other orders of summation."""
LIMIT_AT_DEFAULT = 3e-2
"""Relative, for products as the device makes them unasked: down to bfloat16 on TPU."""
_WRONG_JAXLIB = "0.10.2"
_REPEATS = 3


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: What.
        passed: Whether it was as expected.
        result: What came out, in words.
        seconds: How long it took, compilation included.
    """

    name: str
    passed: bool
    result: str
    seconds: float


@dataclass(frozen=True)
class SelfTest:
    """The outcome; `str` of it is a table."""

    device: str
    versions: dict[str, str]
    precision: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "checks": [asdict(c) for c in self.checks], "passed": self.passed}

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        width = max(len(check.name) for check in self.checks)
        middle = max(len(check.result) for check in self.checks)
        rows = [
            f"{'ok' if check.passed else 'FAIL':<4}  {check.name:<{width}}  "
            f"{check.result:<{middle}}  {check.seconds:4.1f} s"
            for check in self.checks
        ]
        failed = sum(not check.passed for check in self.checks)
        verdict = (
            f"{failed} of {len(rows)} checks failed: do not trust results from this device and "
            "these versions."
            if failed
            else f"all {len(rows)} checks passed"
        )
        return "\n".join(
            [
                f"device     {self.device}",
                f"versions   {versions}",
                f"precision  {self.precision}",
                f"model      {'-'.join(map(str, SIZES))}, batch {BATCH}",
                "",
                *rows,
                "",
                verdict,
            ]
        )


def self_test() -> SelfTest:
    """Run every check on the default device; about ten seconds on a small CPU."""
    device = jax.devices()[0]
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    model = mlp(SIZES, "softplus")
    params = jax.device_get(model.init(jax.random.key(0)))
    xs = np.random.default_rng(0).random((BATCH, SIZES[0]), np.float32)
    norms, gradient = reference(params, xs)

    def method(name: str) -> Check:
        def check() -> str:
            with jax.default_matmul_precision("highest"):
                return _compare(name, model.encode, params, xs, norms, gradient, LIMIT)

        return _try(f"{name}: norms and gradient against NumPy float64", check)

    checks = [
        _try("jaxlib is not the one that is known to be wrong", _check_jaxlib),
        *map(method, EXACT_METHODS),
        _try(
            "auto: the same at the default precision",
            lambda: _compare("auto", model.encode, params, xs, norms, gradient, LIMIT_AT_DEFAULT),
        ),
        _try("a training step gives the same bits each time", lambda: _repeat_step(model, xs)),
    ]
    return SelfTest(
        device=f"{device.device_kind} ({device.platform}), {jax.device_count()} of them",
        versions={
            "jaxcae": __version__,
            "jax": jax.__version__,
            "jaxlib": jax.lib.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        precision=f"float32, products at {precision or 'default'} precision",
        checks=tuple(checks),
    )


def reference(params: Params, xs: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Compute ‖J‖²_F and the gradient of its batch mean in float64 NumPy, by the definition.

    For z = W₂ᵀ s(W₁ᵀx + b₁) + b₂ with s = softplus, slopes m = σ(a) and J = W₁ diag(m) W₂ (the
    transpose of the usual Jacobian, kernels being (in, out)), G = 2J/B is the gradient with respect
    to J; the rest is the product rule: dW₁ = G W₂ᵀ diag(m), dW₂ = diag(m) W₁ᵀ G, and
    da = diag(W₁ᵀ G W₂ᵀ) · m(1 − m).
    """
    first, second = (params["encoder"][f"layer_{i}"] for i in (0, 1))
    w1, b1, w2 = (
        np.asarray(a, np.float64) for a in (first["kernel"], first["bias"], second["kernel"])
    )
    x = xs.astype(np.float64)
    slopes = 1 / (1 + np.exp(-(x @ w1 + b1)))
    norms = np.empty(len(x))
    d_w1, d_b1, d_w2 = np.zeros_like(w1), np.zeros_like(b1), np.zeros_like(w2)
    for i, m in enumerate(slopes):
        jacobian = (w1 * m) @ w2
        norms[i] = np.sum(jacobian**2)
        g = 2 * jacobian / len(x)
        inner = w1.T @ g
        g_w2 = g @ w2.T
        d_a = np.sum(inner * w2, axis=1) * m * (1 - m)
        d_w1 += g_w2 * m + np.outer(x[i], d_a)
        d_w2 += m[:, None] * inner
        d_b1 += d_a
    return norms, {"layer_0/kernel": d_w1, "layer_0/bias": d_b1, "layer_1/kernel": d_w2}


class _FailedError(Exception):
    """A check found something wrong."""


def _try(name: str, check: Callable[[], str]) -> Check:
    start = time.perf_counter()
    try:
        passed, result = True, check()
    except _FailedError as failure:
        passed, result = False, str(failure)
    except Exception as error:  # a check that cannot run is a failed check, not a crash
        lines = str(error).strip().splitlines() or [""]
        passed, result = False, f"{type(error).__name__}: {lines[0]}"
    return Check(name, passed, result, time.perf_counter() - start)


def _check_jaxlib() -> str:
    version = jax.lib.__version__
    if version == _WRONG_JAXLIB:
        raise _FailedError(f"{version}: install another version of jax and jaxlib")
    return version


def _compare(
    method: str,
    encode: Callable[..., Any],
    params: Params,
    xs: np.ndarray,
    norms: np.ndarray,
    gradient: dict[str, np.ndarray],
    limit: float,
) -> str:
    penalty = contractive_penalty(encode, method)

    def mean_and_norms(params: Params) -> tuple[Any, Any]:
        values = penalty(params, jnp.asarray(xs))
        return jnp.mean(values), values

    # Values apart from gradients: a compiler may be right about one and wrong about the other.
    alone = jax.jit(penalty)(params, xs)
    grads, values = jax.jit(jax.grad(mean_and_norms, has_aux=True))(params)
    errors = {
        "norms": max(np.max(np.abs(np.asarray(v) / norms - 1)) for v in (alone, values)),
        "gradient": max(
            np.max(np.abs(_leaf(grads, name) - want)) / np.max(np.abs(want))
            for name, want in gradient.items()
        ),
    }
    text = ", ".join(f"{name} within {error:.1e}" for name, error in errors.items())
    if not all(error <= limit for error in errors.values()):  # also if one is NaN
        raise _FailedError(f"{text}, expected {limit:.0e}")
    return text


def _leaf(grads: Params, name: str) -> np.ndarray:
    layer, leaf = name.split("/")
    return np.asarray(grads["encoder"][layer][leaf], np.float64)


def _repeat_step(model: Any, xs: np.ndarray) -> str:
    optimizer = optax.adam(1e-3)
    step = make_train_step(cae_loss(model), optimizer)
    start = TrainState.create(model.init(jax.random.key(1)), optimizer, jax.random.key(2))
    digests = set()
    for _ in range(_REPEATS):
        state, _metrics = step(start, xs)
        state, metrics = step(state, xs)
        if not np.isfinite(float(metrics["loss"])):
            raise _FailedError(f"the loss is {metrics['loss']}")
        digests.add(digest_of_tree(state))
    if len(digests) > 1:
        raise _FailedError(f"{len(digests)} different results of {_REPEATS} repetitions")
    return f"{_REPEATS} × 2 steps, SHA-256 {digests.pop()[:12]}…"
