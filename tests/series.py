"""Small series with a rhythm, as tables of text: what the tests of detection train and score."""

import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np

START = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)


def write(
    path: Path,
    rows: int,
    *,
    seed: int = 0,
    events: Sequence[tuple[int, int]] = (),
    gaps: Sequence[int] = (),
    missing: Sequence[tuple[int, int]] = (),
    label: bool = True,
) -> Path:
    """Write a CSV of two channels, a row a second, and return its path.

    Args:
        path: Where.
        rows: How many.
        seed: Of the noise.
        events: Half-open ranges of rows in which channel `a` is 3 higher.
        gaps: Rows before which a minute is missing.
        missing: Cells (row, channel) that are empty.
        label: Whether there is a column of labels.
    """
    noise = np.random.default_rng(seed).normal(0, 0.02, (rows, 2))
    t = np.arange(rows)
    values = np.stack([np.sin(t / 4) + 0.5 * np.sin(t / 2), np.cos(t / 6)], 1) + noise
    marks = np.zeros(rows, int)
    for start, stop in events:
        values[start:stop, 0] += 3
        marks[start:stop] = 1
    lines = ["when,a,b" + ",label" * label]
    for row in range(rows):
        late = 60 * sum(row >= gap for gap in gaps)
        when = (START + datetime.timedelta(seconds=row + late)).isoformat()
        cells = ["" if (row, c) in missing else f"{values[row, c]:.5f}" for c in (0, 1)]
        lines.append(",".join([when, *cells, *([str(marks[row])] if label else [])]))
    path.write_text("\n".join(lines) + "\n")
    return path
