"""The page for PyTorch users does what it says."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "parity" / "README.md"


def test_every_block_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.M | re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, README.name, "exec"), names)
    theirs, ours = capsys.readouterr().out.split()
    assert theirs[:6] == ours[:6]
    apart = names["jax"].tree.map(  # type: ignore[attr-defined]
        lambda a, b: float(abs(a - b).mean()), names["state"].params, names["there"]
    )
    # "The mean difference is a thousand times smaller" than Adam's step.
    assert max(names["jax"].tree.leaves(apart)) < 1e-6


def test_the_table_of_lambdas():
    from parity import convert_lambda

    d, b = 784, 128
    for source, total, mean in (
        ("mse_loss + norm(J)**2", d * b, b),
        ("mse_loss + mean penalty", d, 1),
        ("mse_loss + jacobian regulariser", d / 2, 1 / 2),
        ("paper", 1, 1 / d),
    ):
        for target, factor in (("jaxcae", total), ("jaxcae, features='mean'", mean)):
            found = convert_lambda(1.0, source, target, features=d, batch_size=b)
            assert abs(found.value / factor - 1) < 1e-12


def test_the_numbers_are_those_of_the_recorded_run():
    text = " ".join(README.read_text().split())
    report = (README.parent / "results" / "report.md").read_text()
    (counts,) = re.findall(r"^PASSED: ([\d,]+ comparisons in [\d,]+ cases)", report, flags=re.M)
    assert counts in text
    section = report.split("## Jaxcae against PyTorch")[1]
    worst = [
        re.search(rf"^\| {what} \| float64 \| {measure} \| (\S+) \|", section, flags=re.M)[1]
        for what, measure in (("norms", "relative"), ("gradient", "norm"))
    ]
    assert f"float64 norms within {worst[0]} and gradients within {worst[1]}" in text
    museum = (README.parent / "results" / "museum.md").read_text()
    for picture in re.findall(r"\]\((\S+\.png)\)", museum):
        assert (README.parent / "results" / picture).exists()
