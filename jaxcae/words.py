"""Numbers for reading: in tables, titles, messages and pages, written in one way."""

import math
from collections.abc import Sequence


def number(
    value: float, digits: int = 4, *, decimals: int | None = None, trim: bool = False
) -> str:
    """Write a number with thousands apart, and with an exponent only where it can't be helped.

    Args:
        value: Any number.
        digits: Significant digits; whole numbers keep all of theirs.
        decimals: Digits after the point instead.
        trim: Leave out zeros at the end of the fraction.

    Example:
        >>> number(1234.5), number(0.05), number(0.05, trim=True), number(1e-9)
        ('1,234', '0.05000', '0.05', '1.00e−09')
    """
    if not math.isfinite(value) or (value == 0 and decimals is None):
        return f"{value:g}".replace("-", "−")
    if decimals is None:
        exponent = math.floor(math.log10(abs(value)))
        if not -4 <= exponent < 9:
            form = f".{max(2, digits - 1)}g" if trim else f".{digits - 2}e"
            return f"{value:{form}}".replace("-", "−")
        decimals = max(0, digits - 1 - exponent)
    text = f"{value:,.{decimals}f}".replace("-", "−")
    return text.rstrip("0").rstrip(".") if trim and "." in text else text


def short(value: float) -> str:
    """Write a number in three significant digits, as short as it gets."""
    return number(value, 3, trim=True)


def numbers(values: Sequence[float]) -> list[str]:
    """Write the numbers of one row with the same decimals, so that their points line up."""
    magnitudes = [abs(v) for v in values if math.isfinite(v) and v != 0]
    if not magnitudes or max(magnitudes) >= 1e7 or min(magnitudes) < max(magnitudes) * 1e-4:
        return [number(v) for v in values]
    decimals = max(0, 2 - math.floor(math.log10(min(magnitudes))))
    return [number(v, decimals=decimals if decimals <= 6 else None) for v in values]


def change(before: float, after: float) -> str:
    """Write the change from one value to another in percent, with its sign."""
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return "–"
    percent = 100 * (after - before) / abs(before)
    decimals = 1 if abs(percent) < 99.95 or percent > 0 else 2
    text = f"{percent:+,.{decimals}f}%"
    return text.replace("-", "−") if percent and text.strip("+-0.%") else "0.0%"


def percent(fraction: float) -> str:
    """Write the size of a fraction in percent; its sign is for the verb."""
    size = abs(100 * fraction)
    return f"{size:,.0f}%" if size >= 9.5 else f"{size:.1f}%"
