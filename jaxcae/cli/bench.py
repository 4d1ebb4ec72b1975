"""`jaxcae bench`: what a training step costs on this machine, by method, at the user's sizes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcae import __version__
from jaxcae.cli.device import OnDevice
from jaxcae.errors import InputError, check_positive_int, unknown_name
from jaxcae.jacobian import choose
from jaxcae.models import mlp
from jaxcae.objective import cae_loss
from jaxcae.penalty import METHODS
from jaxcae.timing import (
    Answer,
    Compiled,
    Timing,
    check_exact,
    check_unbiased,
    compile_ahead,
    interleave,
    matmul_peak,
    ratio,
    tolerance_of,
)
from jaxcae.words import number

PLAIN = "plain"
DEFAULT = (PLAIN, "auto", "reverse", "forward", "hutchinson")
_BY_DIRECTION = ("forward", "reverse", "finite_difference")
_UNBIASED = ("hutchinson", "control_variate")
_DRAWS = 16
_CHECKED_SAMPLES = 32
# Large, so that an error in the penalty shows in the gradient of the loss. No time depends on it.
_CONTRACTION = 10.0


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Time one training step (loss and gradient) by several methods, next to a plain autoencoder.

    Values and gradients are checked first: a method that disagrees is not timed, and the exit code
    is 1. Steps run in turns, so that whatever else the machine does hits all of them alike.
    """

    sizes: str = "784,256,64"
    """Widths from the features to the code."""
    batch_size: int = 128
    """Samples per step."""
    activation: str = "softplus"
    """Hidden activation."""
    latent_activation: str = "identity"
    """Activation on the code."""
    methods: tuple[str, ...] = DEFAULT
    """What to time; plain is the step without a penalty, and the unit."""
    memory_limit: float = 4.0
    """Skip a method that is predicted to take more GiB of temporaries than this."""
    rounds: int = 15
    """How many turns every method takes."""
    seed: int = 0
    """Seed of weights and samples."""
    json: bool = False
    """Print JSON."""


class Entry(NamedTuple):
    """A method, compiled and checked, or why it is not here."""

    name: str
    program: Compiled | None = None
    arguments: tuple[Any, ...] = ()
    errors: tuple[float, float] | None = None
    skipped: str | None = None


def run(arguments: Arguments) -> int:
    """Check, time and print."""
    sizes = _sizes(arguments.sizes)
    _check(arguments)
    model = _model(arguments, sizes)
    params_key, data_key, probe_key = jax.random.split(jax.random.key(arguments.seed), 3)
    params = model.init(params_key)
    xs = jax.random.uniform(data_key, (arguments.batch_size, sizes[0]))
    entries = list(_prepare(arguments, model, params, xs, probe_key))
    calls = {
        entry.name: lambda entry=entry: entry.program.call(*entry.arguments)
        for entry in entries
        if entry.program
    }
    timings = interleave(calls, arguments.rounds)
    report = _report(arguments, sizes, entries, timings)
    if arguments.json:
        print(json.dumps(report, allow_nan=False))
    else:
        _print(report)
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"--sizes: expected widths such as 784,256,64, got {text!r}.")
    return sizes


def _check(arguments: Arguments) -> None:
    try:
        for name in ("batch_size", "rounds"):
            check_positive_int(f"--{name.replace('_', '-')}", getattr(arguments, name))
        for name in arguments.methods:
            if name not in (PLAIN, *METHODS):
                raise unknown_name("method", name, (PLAIN, *METHODS))
    except ValueError as error:
        raise InputError(str(error)) from None


def _model(arguments: Arguments, sizes: tuple[int, ...]) -> Any:
    try:
        return mlp(sizes, arguments.activation, latent_activation=arguments.latent_activation)
    except ValueError as error:
        raise InputError(str(error)) from None


def _prepare(arguments: Arguments, model: Any, params: Any, xs: Any, key: Any) -> Iterator[Entry]:
    """Compile each method, and check it on a few samples against products by reverse mode."""
    few = xs[:_CHECKED_SAMPLES]
    reference: Answer | None = None
    for name in dict.fromkeys((PLAIN, *arguments.methods)):
        if name in _BY_DIRECTION:
            predicted = _predicted_bytes(name, model, params, xs)
            if predicted > arguments.memory_limit * 2**30:
                yield Entry(name, skipped=f"needs {predicted / 2**30:.2g} GiB (--memory-limit)")
                continue
        step = _step(model, name)
        errors = None
        if name != PLAIN:
            if reference is None:
                reference = _answer(_step(model, "reverse"), params, few)
            errors = _errors(name, step, params, few, key, reference)
        yield Entry(name, compile_ahead(step, params, xs, key), (params, xs, key), errors)


def _step(model: Any, name: str) -> Any:
    penalty = (
        {"contraction": None} if name == PLAIN else {"contraction": _CONTRACTION, "method": name}
    )
    return jax.value_and_grad(cae_loss(model, **penalty), has_aux=True)


def _answer(step: Any, params: Any, xs: Any, key: Any = None) -> Answer:
    (value, metrics), gradient = jax.jit(step)(params, xs, key)
    return Answer((value, metrics["contraction"]), gradient)


def _errors(
    name: str, step: Any, params: Any, xs: Any, key: Any, reference: Answer
) -> tuple[float, float]:
    tolerance = tolerance_of(xs.dtype)
    if name in _UNBIASED:
        keys = jax.random.split(key, _DRAWS)
        answers = [_answer(step, params, xs, k) for k in keys]
        return check_unbiased(name, answers, reference, tolerance)
    if name == "finite_difference":  # biased by the square of its step
        tolerance = max(tolerance, float(jnp.finfo(xs.dtype).eps) ** (1 / 3))
    return check_exact(name, _answer(step, params, xs), reference, tolerance)


def _predicted_bytes(name: str, model: Any, params: Any, xs: Any) -> float:
    method = "reverse" if name == "reverse" else "forward"
    return choose.predict(method, model.encode, params, xs, None, gradient=True).bytes


def _report(
    arguments: Arguments,
    sizes: tuple[int, ...],
    entries: list[Entry],
    timings: Mapping[str, Timing],
) -> dict[str, Any]:
    device = jax.devices()[0]
    peak = matmul_peak()
    steps: list[dict[str, Any]] = []
    for entry in entries:
        if entry.program is None:
            steps.append({"method": entry.name, "skipped": entry.skipped})
            continue
        timing, flops = timings[entry.name], entry.program.flops
        against = ratio(timing, timings[PLAIN])
        steps.append(
            {
                "method": entry.name,
                "seconds": timing.median,
                "quartiles": [timing.quantile(0.25), timing.quantile(0.75)],
                "times_plain": against.value,
                "times_plain_interval": [against.low, against.high],
                "compile_seconds": entry.program.seconds,
                "flops": flops,
                "share_of_peak": flops / timing.median / peak if flops else None,
                "temp_bytes": entry.program.temp_bytes,
                "spread" if entry.name in _UNBIASED else "error": entry.errors,
            }
        )
    return {
        "sizes": sizes,
        "batch_size": arguments.batch_size,
        "activation": arguments.activation,
        "device": f"{device.platform} {device.device_kind}",
        "jax": jax.__version__,
        "jaxcae": __version__,
        "matmul_peak": peak,
        "steps": steps,
    }


def _print(report: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from jaxcae.cli.console import print_result

    head = (
        f"{'-'.join(map(str, report['sizes']))} · batch {report['batch_size']:,} · "
        f"{report['activation']} · {report['device']} · jax {report['jax']}"
    )
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), header_style="bold"
    )
    table.add_column("training step", no_wrap=True)
    for column in ("ms", "× plain", "95 %", "compile", "MFLOP", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for step in report["steps"]:
        if "skipped" in step:
            table.add_row(step["method"], *["–"] * 6)
            continue
        low, high = step["times_plain_interval"]
        table.add_row(
            step["method"],
            number(1e3 * step["seconds"]),
            f"{step['times_plain']:.3g}",
            f"{low:.3g} – {high:.3g}",
            f"{step['compile_seconds']:.1f} s",
            number(step["flops"] / 1e6) if step["flops"] else "–",
            f"{step['temp_bytes'] / 2**20:,.2f}" if step["temp_bytes"] is not None else "–",
        )
    notes = [
        f"{s['method']} was not run: it {s['skipped']}." for s in report["steps"] if "skipped" in s
    ]
    foot = (
        "Values and gradients agreed with reverse mode before anything was timed.\n"
        f"Products of matrices reach {report['matmul_peak'] / 1e9:,.0f} GFLOP/s here."
    )
    print_result(
        Group(Text(head, style="bold"), Text(), table, Text(), Text("\n".join([*notes, foot])))
    )
