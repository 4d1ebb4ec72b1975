"""How do jaxcae's steps compare with PyTorch's, same weights, batch, machine and threads?"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

import jaxcae
from benchmarks import methods, torch_methods
from benchmarks.harness import DRAWS, Check, Outcome, Row, Settings, Subject, compare
from benchmarks.steps import EXPLICIT, SHALLOW, title_of
from jaxcae.timing import Answer, tolerance_of
from parity.reference import CAE

TITLE = "Side by side with PyTorch: the same step, weights, batch and threads"
TUTORIAL_BATCH = 32
IMAGE, MAPS, LATENT = (28, 28, 1), (16, 32), 64
_NOT_A_NORM = "wrong by design: rounding noise of a step of 1e-6, squared norm of the whole batch"
_NO_GRADIENT = "wrong by design: no gradient, not squared, and blocks that are zero are computed"


def run(settings: Settings) -> Outcome:
    """Measure at batch 128 and at the tutorial's recipe's 32; at 1,024 too if all is asked for."""
    threads = torch_methods.use_threads()
    notes = [f"PyTorch and JAX ran in one process, with {threads} threads each, in turns."]
    rows = _group(128, settings, notes) + _convolutional(128, settings) + _tutorial(settings)
    if settings.full:
        rows += _group(1024, settings, notes)
    return Outcome(rows, notes)


def _group(batch: int, settings: Settings, notes: list[str]) -> list[Row]:
    """Time cheap steps among themselves, and explicit Jacobians apart; see `steps`."""
    model, params, xs = methods.network(SHALLOW, batch)
    reference = methods.answer(methods.step(model, "reverse", chunk_size=8), params, xs)
    names = ("plain", "auto", "hutchinson")
    ours = [methods.step_subject(model, params, xs, name, f"jaxcae {name}") for name in names]
    cheap = [
        *ours,
        _subject("torch plain", params, xs, None, "unit"),
        _subject("torch closed form", params, xs, torch_methods.by_closed_form),
        _subject("torch one projection", params, xs, torch_methods.by_projection, "unbiased"),
    ]
    compiled = _compiled("torch closed form, compiled", params, xs, notes, settings)
    cheap += [compiled] if compiled else []
    heavy = [
        *ours[:2],
        methods.step_subject(model, params, xs, "reverse", "jaxcae reverse"),
        _subject("torch vmap(jacrev)", params, xs, torch_methods.by_jacrev),
    ]
    if batch <= 128:
        differences = torch_methods.by_tutorial_differences
        heavy += [
            _subject("torch vmap(jacfwd)", params, xs, torch_methods.by_jacfwd),
            _subject(
                "torch 784 finite differences", params, xs, differences, "differs", _NOT_A_NORM
            ),
        ]
    if settings.full:
        by_unit = torch_methods.by_code_unit
        heavy.append(_subject("torch grad per code unit", params, xs, by_unit))
    group = title_of(SHALLOW, batch)
    unit = "jaxcae plain"
    return [
        *compare(group, cheap, settings, reference, unit),
        *compare(group + EXPLICIT, heavy, settings, reference, unit),
    ]


def _convolutional(batch: int, settings: Settings) -> list[Row]:
    """Two convolutions before a dense code, exactly, in both frameworks."""
    sizes = (IMAGE, MAPS, LATENT, "softplus")
    model = jaxcae.conv(*sizes)
    params = model.init(jax.random.key(0))
    xs = jax.random.uniform(jax.random.key(1), (batch, *IMAGE))
    reference = methods.answer(methods.step(model, "reverse", chunk_size=8), params, xs)
    batch_in_torch = _tensor(xs).permute(0, 3, 1, 2).contiguous()

    def theirs(name: str, norms: torch_methods.Norms | None, check: Check) -> Subject:
        network = torch_methods.convolutional_network(*sizes, params)
        call = torch_methods.step(network, batch_in_torch, methods.CONTRACTION, norms)
        return _as_subject(name, call, network, check, "")

    subjects = [
        *(methods.step_subject(model, params, xs, n, f"jaxcae {n}") for n in ("plain", "auto")),
        theirs("torch plain", None, "unit"),
        theirs("torch vmap(jacrev)", torch_methods.by_jacrev, "exact"),
    ]
    pixels, maps = "×".join(map(str, IMAGE[:2])), " and ".join(map(str, MAPS))
    group = f"{pixels}, convolutions of {maps} features, code {LATENT}, batch {batch}"
    return compare(group, subjects, settings, reference, unit="jaxcae plain")


def _tutorial(settings: Settings) -> list[Row]:
    """The batch that `autograd.functional.jacobian` still manages."""
    model, params, xs = methods.network(SHALLOW, TUTORIAL_BATCH)
    reference = methods.answer(methods.step(model, "reverse", chunk_size=8), params, xs)
    names = ("plain", "auto")
    subjects = [methods.step_subject(model, params, xs, name, f"jaxcae {name}") for name in names]
    subjects += [
        _subject("torch plain", params, xs, None, "unit"),
        _subject(
            "torch autograd.functional.jacobian",
            params,
            xs,
            torch_methods.by_functional_jacobian,
            note="the recipe mended: with create_graph, squares summed for each sample",
        ),
        _subject(
            "torch autograd.functional.jacobian, as published",
            params,
            xs,
            torch_methods.by_tutorial_jacobian,
            "differs",
            note=_NO_GRADIENT,
        ),
    ]
    group = title_of(SHALLOW, TUTORIAL_BATCH)
    return compare(group, subjects, settings, reference, unit="jaxcae plain")


def _subject(
    name: str,
    params: Any,
    xs: Any,
    norms: torch_methods.Norms | None,
    check: Check = "exact",
    note: str = "",
) -> Subject:
    model = torch_methods.network(SHALLOW, "softplus", params)
    call = torch_methods.step(model, _tensor(xs), methods.CONTRACTION, norms)
    return _as_subject(name, call, model, check, note)


def _compiled(
    name: str, params: Any, xs: Any, notes: list[str], settings: Settings
) -> Subject | None:
    """Compile the closed form with PyTorch, or note that this machine cannot."""
    settings.say("torch.compile")
    model = torch_methods.network(SHALLOW, "softplus", params)
    call = torch_methods.compiled_step(
        model, _tensor(xs), methods.CONTRACTION, torch_methods.by_closed_form
    )
    started = time.perf_counter()
    try:
        call()
    except Exception as error:  # whatever a missing or broken compiler makes of itself
        notes.append(f"torch.compile does not work on this machine: {_first_line(error)}")
        return None
    seconds = time.perf_counter() - started
    return _as_subject(name, call, model, "exact", "", compile_seconds=seconds)


def _as_subject(
    name: str,
    call: Callable[[], Any],
    model: CAE,
    check: Check,
    note: str,
    compile_seconds: float | None = None,
) -> Subject:
    def answers() -> list[Answer]:
        torch.manual_seed(0)
        found = []
        for _ in range(DRAWS if check == "unbiased" else 1):
            loss, mean = call()
            found.append(Answer((float(loss), float(mean)), torch_methods.gradients(model)))
        return found

    tolerance = tolerance_of(np.float32)
    return Subject(name, call, check, answers, tolerance, note, compile_seconds=compile_seconds)


def _tensor(xs: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(xs))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
