"""Put what was seen in words: Markdown and JSON; the console has its own table."""

from typing import Any

from jaxcae.words import number
from parity.museum.exhibit import Exhibit, Visit

SETTING = (
    "784-256-64, ReLU (curvature: softplus), sigmoid output, λ 0.001, Adam 1e-3, batches of 128 "
    "real digits"
)


def as_json(seen: Visit, about: dict[str, Any]) -> dict[str, Any]:
    """Lay out everything that was measured."""
    return {
        **about,
        "exhibits": [exhibit._asdict() for exhibit in seen.exhibits],
        "mean true squared norm on held-out digits after each step": seen.runs,
        "mean true curvature on held-out digits after each step": seen.curved,
    }


def as_markdown(seen: Visit, about: dict[str, Any]) -> str:
    """Write the table, and where every run ended."""
    text = [
        "# The museum of wrong penalties",
        "",
        f"{SETTING}, {seen.steps} steps; PyTorch {about['torch']}, {about['date']}.",
        "",
        "![true ‖J‖² over training](museum.png)",
        "",
        "![true ‖∇²h‖² over training](museum-curvature.png)",
        "",
        "| recipe | found in | what is wrong | value ÷ truth | gradient cosine | trained with it | "
        "the right way |",
        "| --- | --- | --- | ---: | ---: | --- | --- |",
    ]
    for exhibit in seen.exhibits:
        cells = (
            exhibit.name,
            exhibit.found,
            exhibit.wrong,
            ratio_of(exhibit),
            cosine_of(exhibit),
            trained(exhibit, seen),
            exhibit.right,
        )
        text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(text) + "\n"


def ratio_of(exhibit: Exhibit) -> str:
    """Format the value of a recipe relative to the truth."""
    return "" if exhibit.ratio is None else f"{exhibit.ratio:.3g}"


def cosine_of(exhibit: Exhibit) -> str:
    """Format the cosine of a recipe's gradient with the true one."""
    if exhibit.cosine is None:
        return ""
    return "no gradient" if exhibit.cosine == 0 else f"{exhibit.cosine:.2f}"


def trained(exhibit: Exhibit, seen: Visit) -> str:
    """Say what training with a recipe did to what it should lower, beside the exact penalty."""
    if exhibit.run is None:
        return ""
    of_norms = exhibit.run in seen.runs
    what, runs = ("‖J‖²", seen.runs) if of_norms else ("‖∇²h‖²", seen.curved)
    begin, end = runs[exhibit.run][0], runs[exhibit.run][-1]
    same = ", as without a penalty" if exhibit.run == "no penalty" else ""
    first, last, exact = (number(v, 2, trim=True) for v in (begin, end, runs["exact"][-1]))
    return f"{what} {first} → {last}{same}; exact: {exact}"
