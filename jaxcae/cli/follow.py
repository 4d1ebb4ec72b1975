"""`jaxcae score --follow`: rows of a series from standard input, scores as they come."""

import csv
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxcae.cli.score import Arguments, preparation_of, table_of
from jaxcae.data.cells import check_first, complaint, is_blank, number
from jaxcae.data.tables import Columns, TableOptions, choose_columns
from jaxcae.data.times import check_ascending, parse_times
from jaxcae.errors import InputError
from jaxcae.results.detection.follower import Follower
from jaxcae.results.detection.of_run import detector_of
from jaxcae.runs import Run
from jaxcae.runs.windowed import of_channels
from jaxcae.words import number as shown
from jaxcae.words import short

SOURCE, STDIN = "standard input", 0
_MOST_AT_ONCE, _MAX_LINE = 1 << 16, 1 << 24


def follow(arguments: Arguments, trained: Run) -> int:
    """Score rows until there are no more."""
    detector = detector_of(trained, arguments.run_dir)
    follower = Follower(detector, arguments.alpha)
    table = table_of(arguments, trained.config, ".csv")
    preparation = preparation_of(of_channels(trained.preparation, trained.config), table.missing)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns: Columns | None = None
    count = 0
    for first, lines in _lines(STDIN):
        records = list(csv.reader(lines, delimiter=table.mark or ",", skipinitialspace=True))
        if columns is None:
            columns = _header(records.pop(0), table)
            first += 1
            key = "row" if columns.time is None else str(table.time_column)
            writer.writerow([key, "score", "p_value", "alarm"])
            print(
                f"following: alarms at α = {short(follower.alpha)}, scores above "
                f"{shown(follower.threshold)}, each of the rows so far",
                file=sys.stderr,
            )
        if records:
            rows = np.array(
                [_numbers(cells, first + i, columns, table) for i, cells in enumerate(records)]
            )
            if preparation.fill is not None:
                rows = np.where(np.isnan(rows), preparation.fill, rows)
            keys: Any = range(count, count + len(rows))
            times = None
            if columns.time is not None:
                keys = [cells[columns.time].strip() for cells in records]
                place = _place(first)
                parsed = parse_times(SOURCE, keys, place)
                check_ascending(SOURCE, parsed)
                times = parsed.values
            try:
                found = follower.update(rows, times)
            except InputError as error:
                raise InputError(f"{SOURCE}: line {first} and on: {error}") from None
            for key, score, p, alarm in zip(keys, *found, strict=True):
                writer.writerow([key, f"{score:.9g}", f"{p:.9g}", int(alarm)])
            count += len(rows)
        sys.stdout.flush()
    if columns is None or not count:
        raise InputError(f"{SOURCE}: {'a header and no rows' if columns else 'no rows'}.")
    return 0


def _place(first: int) -> Any:
    return lambda row: f"line {first + row}"


def _lines(descriptor: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines that have come, whole ones, with the number of the first."""
    kept, first = b"", 1
    while True:
        block = os.read(descriptor, _MOST_AT_ONCE)
        data = kept + block
        end = data.rfind(b"\n") + 1 if block else len(data)
        kept = data[end:]
        if len(kept) > _MAX_LINE:
            raise InputError(f"{SOURCE}: line {first} is longer than {_MAX_LINE} bytes.")
        if end:
            try:
                lines = data[:end].decode("utf-8-sig" if first == 1 else "utf-8").splitlines()
            except UnicodeDecodeError:
                raise InputError(f"{SOURCE}: from line {first} on is not text in UTF-8.") from None
            yield first, lines
            first += len(lines)
        if not block:
            return


def _header(cells: list[str], table: TableOptions) -> Columns:
    check_first(SOURCE, cells, table.mark or ",", table)
    names = [cell.strip() for cell in cells]
    if table.names is not None and not set(names) & set(table.names):
        raise InputError(
            f"{SOURCE}: line 1 names none of the run's channels; the rows need a header like that "
            "of the data that it was trained on."
        )
    return choose_columns(SOURCE, names, table)


def _numbers(cells: list[str], line: int, columns: Columns, table: TableOptions) -> list[float]:
    if is_blank(cells):
        raise InputError(f"{SOURCE}: line {line} is blank.")
    last = max([*columns.features, *columns.beside])
    if len(cells) <= last:
        raise InputError(f"{SOURCE}: line {line} has {len(cells)} columns, expected {last + 1}.")
    values = []
    for column in columns.features:
        value = number(cells[column], table)
        if value is None or np.isinf(value) or (np.isnan(value) and table.missing == "refuse"):
            told = complaint(cells[column], table)
            raise InputError(f"{SOURCE}: line {line}, column {column + 1}: {told}")
        values.append(value)
    return values
