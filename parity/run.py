"""Run a selection of the case table and of the training runs, on one device."""

import contextlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, NamedTuple

import jax
import torch

from parity import cases, compare, family, recurrent, train
from parity.compare import Row

Device = Literal["cpu", "gpu"]


class Job(NamedTuple):
    """One entry of the table: its name, and what measures it."""

    id: str
    core: bool
    rows: Callable[[Device], Iterator[Row]]


class DeviceError(RuntimeError):
    """A device that one of the frameworks does not have."""


def jobs() -> list[Job]:
    """List everything that `python -m parity` runs, in order."""
    return [
        *(Job(case.id, case.dtype in case.core, partial(_compare, case)) for case in cases.table()),
        *(Job(c.id, c.dtype in c.core, partial(_compare_recurrent, c)) for c in recurrent.table()),
        *(Job(c.id, c.dtype in c.core, partial(_compare_family, c)) for c in family.table()),
        *(
            Job(
                f"{case.id}/{optimizer}",
                (case.name, case.dtype, optimizer) in train.CORE,
                partial(_train, case, optimizer),
            )
            for case in train.table()
            for optimizer in train.optimizers(case)
        ),
    ]


def select(pattern: str) -> list[Job]:
    """Choose the jobs whose name holds the pattern, or matches it where it has wildcards."""
    return [job for job in jobs() if pattern in job.id or fnmatchcase(job.id, pattern)]


@contextlib.contextmanager
def on(device: Device) -> Iterator[None]:
    """Compute on one kind of device in both frameworks, without TF32 or bfloat16 products.

    Raises:
        DeviceError: If one of the frameworks lacks the device.
    """
    try:
        ours = jax.devices(device)[0]
    except (RuntimeError, AssertionError) as error:  # the latter where JAX_PLATFORMS asks in vain
        why = str(error).partition("\n")[0] or "no plugin for one is installed."
        raise DeviceError(f"JAX has no {device.upper()} here: {why}") from None
    if device == "gpu" and not torch.cuda.is_available():
        raise DeviceError("this PyTorch has no CUDA device; install a CUDA build of it.")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with jax.default_device(ours), jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def torch_name(device: Device) -> str:
    """Name a device as PyTorch does."""
    return "cuda" if device == "gpu" else "cpu"


def _compare(case: cases.Case, device: Device) -> Iterator[Row]:
    return compare.compare(case, device=torch_name(device))


def _compare_recurrent(case: cases.Case, device: Device) -> Iterator[Row]:
    return recurrent.compare(case, device=torch_name(device))


def _compare_family(case: cases.Case, device: Device) -> Iterator[Row]:
    return family.compare(case, device=torch_name(device))


def _train(case: cases.Case, optimizer: train.Optimizer, device: Device) -> Iterator[Row]:
    return train.drift(case, optimizer, device=torch_name(device))
