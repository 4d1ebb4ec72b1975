"""The words over the pictures: what the numbers say, and no more than they say."""

import math
from collections.abc import Mapping

from jaxcae.words import percent, short


def comparison(values: Mapping[str, float], what: str, less: str, more: str) -> str:
    """State how a figure of the contractive network compares with the plain one's.

    Args:
        values: Name of a network to the figure.
        what: What the figure is, such as `"the median norm ‖w‖ of filters"`.
        less: The verb where contraction lowers it, such as `"cuts"`.
        more: The verb where it raises it, such as `"raises"`.
    """
    if not _both(values):
        told = ", ".join(f"{short(value)} ({name})" for name, value in values.items())
        return f"{what[:1].upper()}{what[1:]}: {told}"
    new, old = values["contractive"], values["plain"]
    if not _comparable(new, old):
        return f"{what[:1].upper()}{what[1:]}: {short(new)} (contractive), {short(old)} (plain)"
    if abs(new / old - 1) < 0.005:
        return f"Contraction leaves {what} at {short(new)}"
    verb, end = (less if new < old else more), f"from {short(old)} to {short(new)}"
    return f"Contraction {verb} {what} {amount(old, new)}, {end}"


def trade(norms: Mapping[str, float], errors: Mapping[str, float]) -> str:
    """State what contraction gains in ‖J‖ and what it costs in reconstruction."""
    if not (_both(norms) and _both(errors)):
        return "Reconstruction and sensitivity of the code during training"
    gain = comparison(norms, "mean ‖J‖$_F$", "cuts", "raises").split(",")[0]
    new, old = errors["contractive"], errors["plain"]
    if not _comparable(new, old):
        return gain
    if abs(new / old - 1) < 0.005:
        return f"{gain}, at the same reconstruction error"
    if new / old >= 2:
        return f"{gain}, at {new / old:.1f} times the reconstruction error"
    return f"{gain}, at {percent(new / old - 1)} {'more' if new > old else 'less'} " + (
        "reconstruction error"
    )


def amount(old: float, new: float) -> str:
    """Say how far one figure is from another: in percent, or as a factor from 3 on."""
    ratio = max(old / new, new / old) if new else math.inf
    if ratio < 3:
        return f"by {percent(new / old - 1)}"
    return "altogether" if math.isinf(ratio) else f"{short(float(f'{ratio:.2g}'))}-fold"


def _both(values: Mapping[str, float]) -> bool:
    return "contractive" in values and "plain" in values


def _comparable(new: float, old: float) -> bool:
    return math.isfinite(new) and math.isfinite(old) and old > 0 and new >= 0
