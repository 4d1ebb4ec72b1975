"""What hangs on the wall: one wrong recipe, what it gives, and the right way; a visit."""

from typing import NamedTuple


class Exhibit(NamedTuple):
    """One recipe, measured.

    Attributes:
        name: A short name.
        found: The kind of code that it is found in.
        wrong: What is wrong with it, with the figures measured.
        ratio: Its value divided by the true one, in its own convention; None if it has no value.
        cosine: Cosine of its gradient with the true one by the encoder's parameters; 0 if it has
            no gradient, None if that does not apply.
        right: The right way, in one line.
        run: Name of the training run in the picture that uses it, if one does.
        numbers: Further figures by name, as the tests read them.
    """

    name: str
    found: str
    wrong: str
    ratio: float | None
    cosine: float | None
    right: str
    run: str | None = None
    numbers: dict[str, float] = {}  # noqa: RUF012


class Visit(NamedTuple):
    """The exhibits in order, and what was followed over training, by the name of the run.

    Attributes:
        exhibits: All of them.
        runs: The true ‖J‖² of held-out digits after each step.
        curved: The true ‖∇²h‖², in runs of their own.
        steps: Of each run.
    """

    exhibits: list[Exhibit]
    runs: dict[str, list[float]]
    curved: dict[str, list[float]]
    steps: int
