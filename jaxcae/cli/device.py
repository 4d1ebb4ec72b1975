"""Which device a command runs on: that of `--device`, of JAX_PLATFORMS, or of JAX's choice."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxcae.errors import InputError

if TYPE_CHECKING:
    from jaxcae.devices import Layout

NAMES = ("cpu", "gpu", "tpu")


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """The option that commands share which compute something."""

    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Run on this kind of device; JAX's choice by default, the fastest that it finds."""


@dataclass(frozen=True, kw_only=True)
class OnDevices(OnDevice):
    """The options of commands that can share their work among devices."""

    devices: str | None = None
    """Share the rows of each batch among so many devices, or auto: among all; one by default."""

    def layout(self, features: int = 1, shard_params: bool = False) -> "Layout | None":
        """Say which device takes what; None for one device alone.

        Raises:
            InputError: If there are not so many.
        """
        if self.devices is None and features == 1 and not shard_params:
            return None
        from jaxcae.devices import layout

        count = None
        if self.devices not in (None, "auto"):
            count = int(self.devices) if self.devices.isdecimal() else 0
            if count < 1:
                raise InputError(
                    f"`devices` must be a number of at least 1, or auto, got {self.devices!r}."
                )
        return layout(count, features, shard_params)


def use(name: str | None) -> None:
    """Run on a kind of device, or see that the one which JAX_PLATFORMS asks for is there.

    Raises:
        InputError: If it is not.
    """
    if name is None and not os.environ.get("JAX_PLATFORMS"):
        return
    import jax

    if name is None:
        if problem := unusable():
            raise InputError(problem)
        return
    # The option is said later, and more clearly, than the environment.
    jax.config.update("jax_platforms", "cpu" if name == "cpu" else None)
    try:
        first = jax.devices(name)[0]
    except Exception:
        raise InputError(
            f"--device {name}: JAX finds no {name.upper()} here, only "
            f"{', '.join(sorted({d.platform for d in jax.devices()}))}. {_ADVICE}"
        ) from None
    if first.platform != jax.devices()[0].platform:
        jax.config.update("jax_default_device", first)


def unusable() -> str | None:
    """Say in a line why JAX has no device to run on, or return None where it has one."""
    import jax

    try:
        jax.devices()
    except Exception as error:
        asked = os.environ.get("JAX_PLATFORMS")
        reason = " ".join(str(error).split("(set JAX_PLATFORMS")[0].split())
        wish = f"JAX_PLATFORMS={asked}" if asked else "JAX"
        return f"{wish}: there is no such device here{f' ({reason})' if reason else ''}. {_ADVICE}"
    return None


_ADVICE = "Leave it out to run on what there is, or install the jax of that device."
