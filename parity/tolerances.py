"""How close is close enough: one table, with the reason beside every entry.

Three measures are used, and never a bare relative error of single elements of a gradient, which
means nothing where terms cancel:

    relative   max |a − b| / |b|, for quantities that are sums of terms of one sign
    scaled     max |a − b| / max |b| over one array
    norm       ‖a − b‖ / ‖b‖ over one array
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


class Tolerance(NamedTuple):
    """One bound: `measure` of `quantity` stays within it, by every method in every case.

    Where `cases` or `methods` are given, only in cases and by methods that begin so.
    """

    quantity: str
    measure: str
    float64: float
    float32: float
    reason: str
    cases: str = ""
    methods: str = ""

    def bound(self, dtype: str) -> float:
        """Look up the bound for one dtype."""
        return self.float64 if dtype == "float64" else self.float32


_CUT = "torch returns a for a > 20 where softplus is a + e⁻²⁰: 2e-9 in value and both slopes"
# Held against float64. jaxcae's slopes are exact, so that it keeps to the ordinary bounds here.
_SIGMOID = "torch takes 1 − σ(6) = 2.5e-3, rounded to ε/2: 2e-5 of a slope; 1.4e-5 seen in norms"
_TANH = "torch takes 1 − tanh²(6) = 2.5e-5, rounded to ε/2: 2e-3 of a slope; 3e-4 seen in norms"

_NOISE = "J(x + ε) − J(x) cancels: ‖J‖ is 4 to 29 times as large; 2.4e-6 seen, 5e-6 in gradients"

# The first entry that fits a quantity and a case holds, so the special cases come first.
TABLE = (
    Tolerance("codes", "scaled", 1e-8, 2e-6, _CUT, "softplus-over-20"),
    Tolerance("reconstructions", "scaled", 1e-8, 2e-6, _CUT, "softplus-over-20"),
    Tolerance("sample losses", "relative", 1e-8, 2e-6, _CUT, "softplus-over-20"),
    Tolerance("norms", "relative", 1e-8, 2e-6, _CUT, "softplus-over-20"),
    Tolerance("loss", "relative", 1e-8, 2e-6, _CUT, "softplus-over-20"),
    Tolerance("gradient", "norm", 1e-8, 5e-6, _CUT, "softplus-over-20"),
    Tolerance("gradient elements", "scaled", 1e-8, 5e-6, _CUT, "softplus-over-20"),
    Tolerance("norms", "relative", 1e-12, 1e-4, _SIGMOID, "saturated/sigmoid", "torch"),
    Tolerance("gradient", "norm", 1e-12, 1e-4, _SIGMOID, "saturated/sigmoid", "torch"),
    Tolerance("gradient elements", "scaled", 1e-12, 1e-4, _SIGMOID, "saturated/sigmoid", "torch"),
    Tolerance("norms", "relative", 1e-12, 2e-3, _TANH, "saturated/tanh", "torch"),
    Tolerance("gradient", "norm", 1e-12, 2e-3, _TANH, "saturated/tanh", "torch"),
    Tolerance("gradient elements", "scaled", 1e-12, 2e-3, _TANH, "saturated/tanh", "torch"),
    Tolerance("norms", "relative", 1e-12, 1e-5, _NOISE, "family/noise-form"),
    Tolerance("gradient", "norm", 1e-12, 2e-5, _NOISE, "family/noise-form"),
    Tolerance("gradient elements", "scaled", 1e-12, 2e-5, _NOISE, "family/noise-form"),
    Tolerance(
        "codes",
        "scaled",
        1e-13,
        2e-6,
        "sums of up to 784 products in another order; an element near 0 is a cancelled sum",
    ),
    Tolerance("reconstructions", "scaled", 1e-13, 2e-6, "as the codes, one decoder further"),
    Tolerance("sample losses", "relative", 1e-12, 2e-6, "a sum of positive terms"),
    Tolerance("norms", "relative", 1e-12, 2e-6, "a sum of squares: nothing cancels"),
    Tolerance(
        "traces",
        "scaled",
        1e-12,
        2e-6,
        "a sum of terms of either sign, which may cancel in one sample: against the largest",
    ),
    Tolerance("loss", "relative", 1e-12, 2e-6, "a mean of positive terms"),
    Tolerance(
        "gradient",
        "norm",
        1e-12,
        5e-6,
        "products summed over batch and features in another order; per leaf",
    ),
    Tolerance(
        "gradient elements",
        "scaled",
        1e-12,
        5e-6,
        "against the leaf's largest: a small element is a difference of large terms",
    ),
    Tolerance("loss under sgd", "relative", 1e-12, 2e-5, "the loss, at parameters that drift"),
    Tolerance("loss under adam", "relative", 1e-12, 2e-5, "the loss, at parameters that drift"),
    Tolerance(
        "drift of sgd",
        "norm",
        1e-13,
        5e-6,
        "each step rounds parameters that are much larger than what they move by",
    ),
    Tolerance(
        "drift of adam",
        "norm",
        1e-12,
        1e-4,
        "adam moves an element whose gradient is rounding noise as far as any other",
    ),
)


def find(quantity: str, case: str, method: str) -> Tolerance:
    """Find the entry for a quantity of a case by a method."""
    for entry in TABLE:
        fits = case.startswith(entry.cases) and method.startswith(entry.methods)
        if entry.quantity == quantity and fits:
            return entry
    raise LookupError(f"no tolerance for {quantity!r} in {case!r} by {method!r}")


def error(measure: str, ours: Values, theirs: Values) -> float:
    """Measure how far `ours` is from `theirs`; infinite if either holds a NaN or an infinity."""
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        difference = np.abs(ours - theirs)
    if not np.isfinite(difference).all():
        return float("inf")
    if not difference.any():  # also where both are all zero
        return 0.0
    apart = difference > 0  # an element that is 0 on both sides is no error
    with np.errstate(divide="ignore"):
        match measure:
            case "relative":
                return float(np.max(np.divide(difference[apart], np.abs(theirs[apart]))))
            case "scaled":
                return float(np.divide(np.max(difference), np.max(np.abs(theirs))))
            case "norm":
                return float(np.divide(np.linalg.norm(difference), np.linalg.norm(theirs)))
    raise ValueError(f"unknown measure {measure!r}")
