"""Put what was seen in words: Markdown and JSON; the console has its own table."""

from typing import Any

from jaxcae.words import number
from parity.museum.exhibit import Exhibit, Visit


def as_json(seen: Visit, about: dict[str, Any]) -> dict[str, Any]:
    """Lay out everything that was measured."""
    return {
        **about,
        "exhibits": [exhibit._asdict() for exhibit in seen.exhibits],
        "mean true squared norm on held-out digits after each step": seen.runs,
    }


def as_markdown(seen: Visit, about: dict[str, Any]) -> str:
    """Write the table, and where every run ended."""
    text = [
        "# The museum of wrong penalties",
        "",
        f"784-256-64, ReLU, sigmoid output, λ 0.001, Adam 1e-3, batches of 128 real digits, "
        f"{seen.steps} steps; PyTorch {about['torch']}, {about['date']}.",
        "",
        "![true ‖J‖² over training](museum.png)",
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
            trained(exhibit, seen.runs),
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


def trained(exhibit: Exhibit, runs: dict[str, list[float]]) -> str:
    """Say what training with a recipe did to the true norm, beside the exact penalty's."""
    if exhibit.run is None:
        return ""
    begin, end = runs[exhibit.run][0], runs[exhibit.run][-1]
    same = ", as without a penalty" if exhibit.run == "no penalty" else ""
    first, last, exact = (number(v, 2, trim=True) for v in (begin, end, runs["exact"][-1]))
    return f"‖J‖² {first} → {last}{same}; exact: {exact}"
