"""What is printed: in a pipe, on a terminal of any width, without colour, in any encoding."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console

from jaxcae import words
from jaxcae.cli import console, tables
from jaxcae.cli.progress import PLAIN_LINES, Progress

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-79]|4[0-79]|9[0-7]|[34]8;[0-9;]+)m")

BEFORE = {"reconstruction": 52.1, "jacobian_norm": 1.912, "jacobian_norm_squared": 3.7}
CONTRACTIVE = {"reconstruction": 6.02, "jacobian_norm": 0.912, "jacobian_norm_squared": 0.88}
PLAIN = {"reconstruction": 5.31, "jacobian_norm": 4.203, "jacobian_norm_squared": 17.9}


def report(**networks: Mapping[str, float]) -> dict:
    """Build a report of `jaxcae train` with these figures after training."""
    return {
        "data": "mnist5k",
        "held_out_samples": 1000,
        "epochs": 30,
        "contraction": 0.1,
        "reconstruction": "squared_error",
        "features": "sum",
        "networks": {name: {"before": BEFORE, "after": after} for name, after in networks.items()},
    }


def printed(renderable: object, encoding: str = "utf-8") -> str:
    """Print into a pipe of that encoding, and return what came through."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    console.print_result(renderable, stream)
    return raw.getvalue().decode(encoding)


def on_terminal(
    code: str, columns: int = 80, stdout: IO[str] | None = None, **environment: str
) -> str:
    """Run code on a pseudo-terminal, and return what a user sees; stdout may go to a file."""
    control, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=terminal,
        stdout=stdout or terminal,
        stderr=terminal,
        env={**keep, "TERM": "xterm-256color", **environment},
        cwd=Path(__file__).parents[1],
    )
    os.close(terminal)
    received = b""
    while True:
        try:
            received += os.read(control, 65536)
        except OSError:  # Linux says that the other side has gone by an I/O error
            break
        if process.poll() is not None and not received:
            break
    os.close(control)
    assert process.wait() == 0, received.decode()
    return received.decode()


def lines_of(seen: str) -> list[str]:
    seen = ESCAPE.sub("", seen).replace("\u0302", "")  # a combining hat takes no column
    return [line for line in re.split(r"[\r\n]+", seen) if line.strip()]


# The final table.


def test_the_table_sets_the_networks_side_by_side():
    text = printed(tables.result_table(report(contractive=CONTRACTIVE, plain=PLAIN)))
    assert text.split("\n")[0] == "mnist5k · 1,000 held-out samples · 30 epochs · λ = 0.1"
    rows = {
        cells[0]: cells[1:]
        for line in text.split("\n")
        if len(cells := re.split(r"\s{2,}", line.strip())) == 5
    }
    assert rows["mean over held-out samples"] == [
        "untrained",
        "plain",
        "contractive",
        "against plain",
    ]
    assert rows["reconstruction ‖x − x\u0302‖²"] == ["52.10", "5.31", "6.02", "+13.4%"]
    assert rows["mean ‖J‖_F"] == ["1.912", "4.203", "0.912", "−78.3%"]
    assert rows["mean ‖J‖²_F"] == ["3.700", "17.900", "0.880", "−95.1%"]
    assert " ".join(text.split()).endswith(
        "Against a plain autoencoder, contraction (λ = 0.1) cut mean ‖J‖_F by 78.3% "
        "(4.203 → 0.912) and raised the reconstruction error by 13.4% (5.31 → 6.02), "
        "on held-out data."
    )


def test_a_single_network_is_compared_with_itself_untrained():
    text = " ".join(printed(tables.result_table(report(plain=PLAIN))).split())
    assert "against untrained" in text
    assert "λ" not in text
    assert (
        "Against the untrained network, training raised mean ‖J‖_F by 119.8% (1.91 → 4.20)" in text
    )
    text = " ".join(printed(tables.result_table(report(contractive=CONTRACTIVE))).split())
    assert "training cut mean ‖J‖_F by 52.3% (1.912 → 0.912)" in text


def test_no_change_is_called_none():
    text = " ".join(printed(tables.result_table(report(contractive=PLAIN, plain=PLAIN))).split())
    assert "left mean ‖J‖_F at 4.203 and left the reconstruction error at 5.310" in text


def test_a_report_without_networks_is_refused():
    with pytest.raises(ValueError, match="needs a contractive or a plain network"):
        tables.result_table(report())


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({"reconstruction": "bernoulli"}, "reconstruction (nats)"),
        ({"reconstruction": "mine"}, "reconstruction (mine)"),
        ({"features": "mean"}, "reconstruction per feature"),
    ],
)
def test_the_reconstruction_has_its_unit(changed, label):
    made = report(contractive=CONTRACTIVE, plain=PLAIN) | changed
    assert f"\n{label}  " in printed(tables.result_table(made))


def test_the_table_fits_eighty_columns_and_leaves_no_trailing_blanks():
    wide = {"reconstruction": 123456.7, "jacobian_norm": 98765.4, "jacobian_norm_squared": 9e9}
    for made in (
        report(contractive=CONTRACTIVE, plain=PLAIN),
        report(contractive=wide, plain=wide),
    ):
        for line in printed(tables.result_table(made)).split("\n"):
            assert len(line.replace("\u0302", "")) <= 80, line
            assert line == line.rstrip()


def test_a_pipe_gets_no_codes_even_where_colour_is_forced_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    text = printed(tables.result_table(report(contractive=CONTRACTIVE, plain=PLAIN)))
    assert "\x1b" not in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_cannot_encode_gets_ascii_in_line(encoding):
    text = printed(tables.result_table(report(contractive=CONTRACTIVE, plain=PLAIN)), encoding)
    assert "mean ||J||_F" in text
    assert "-78.3%" in text
    table = [line for line in text.split("\n") if "|" in line][1:5]
    # The rightmost column ends at the same place in each row: widths were measured in ASCII.
    assert len({len(line) for line in table}) == 1


SHOW = """
    from jaxcae.cli.console import print_result
    from jaxcae.cli.tables import result_table
    FIGURES = {figures!r}
    print_result(result_table(FIGURES))
"""


def test_on_a_terminal_the_table_has_colour_unless_no_color():
    code = SHOW.format(figures=report(contractive=CONTRACTIVE, plain=PLAIN))
    assert COLOUR.search(on_terminal(code))
    quiet = on_terminal(code, NO_COLOR="1")
    assert not COLOUR.search(quiet)
    assert lines_of(quiet) == lines_of(on_terminal(code))


def test_on_a_narrow_terminal_no_digit_is_lost():
    code = SHOW.format(figures=report(contractive=CONTRACTIVE, plain=PLAIN))
    seen = lines_of(on_terminal(code, columns=60))
    assert all(len(line) <= 60 for line in seen)
    for value in ("0.912", "17.900", "+13.4%", "52.10"):
        assert any(value in line for line in seen), value


# Facts.


def test_facts_are_laid_out_under_headings():
    text = printed(
        tables.info_table(
            {
                "model": {"sizes": (784, 256, 64), "tied": False, "activation": "relu"},
                "run": {"steps": 12345, "λ": 0.1, "stopped": None, "rate": 1e-9},
            }
        )
    )
    assert text.rstrip().split("\n") == [
        "model",
        "sizes       784, 256, 64",
        "tied        no",
        "activation  relu",
        "",
        "run",
        "steps       12,345",
        "λ           0.1000",
        "stopped     none",
        "rate        1.00e−09",
    ]


def test_what_comes_from_files_is_shown_as_text_only():
    hostile = "[bold]x[/bold] \x1b[31mred\x07\n:smile:"
    text = printed(tables.info_table({hostile: {hostile: hostile}}))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"[bold]x[/bold] \x1b[31mred\x07\n:smile:" in text


# Numbers.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1.0, "1.000"),
        (0.00012346, "0.0001235"),
        (0.00001, "1.00e−05"),
        (1234.5, "1,234"),
        (-2.5, "−2.500"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_written_for_reading(value, expected):
    assert words.number(value) == expected


def test_the_numbers_of_a_row_share_their_decimals():
    assert words.numbers([52.1, 5.31, 0.912]) == ["52.100", "5.310", "0.912"]
    assert words.numbers([1e-9, 1.0]) == ["1.00e−09", "1.000"]
    assert words.numbers([0.0, 0.0]) == ["0", "0"]
    assert words.numbers([float("nan"), 2.0]) == ["nan", "2.00"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (2.0, 1.0, "−50.0%"),
        (1.0, 3.5, "+250.0%"),
        (1.0, 1.0, "0.0%"),
        (1.0, 1.0001, "0.0%"),
        (1000.0, 0.1, "−99.99%"),
        (0.0, 1.0, "–"),
        (1.0, float("nan"), "–"),
    ],
)
def test_changes_are_in_percent(before, after, expected):
    assert words.change(before, after) == expected


# Progress.


def run_progress(stream: io.StringIO, epochs: int, **options: object) -> list[str]:
    with Progress(epochs, "contractive", file=stream, **options) as progress:
        for epoch in range(options.get("completed", 0) + 1, epochs + 1):
            metrics = {"loss": 100 / epoch, "reconstruction": 90 / epoch, "contraction": 10 / epoch}
            progress.update(epoch, metrics | {"learning_rate": 0.1})
    return stream.getvalue().split("\n")[:-1]


@pytest.mark.parametrize("epochs", [1, 2, 9, 10, 11, 30, 99, 1000])
def test_a_pipe_gets_a_few_plain_lines_and_the_last_epoch(epochs):
    lines = run_progress(io.StringIO(), epochs)
    assert 1 <= len(lines) <= PLAIN_LINES
    assert len(lines) >= min(epochs, 5)
    assert lines[-1].startswith(f"contractive: epoch {epochs}/{epochs}  loss ")
    assert "\x1b" not in "".join(lines)


def test_a_plain_line_holds_the_figures():
    (line,) = run_progress(io.StringIO(), 1)
    assert re.fullmatch(
        r"contractive: epoch 1/1  loss 100\.0  reconstruction 90\.00  mean ‖J‖² 10\.00  \d+ s", line
    )


def test_a_resumed_run_counts_from_where_it_was():
    lines = run_progress(io.StringIO(), 30, completed=25)
    assert [int(re.search(r"epoch +(\d+)/30", line)[1]) for line in lines] == [26, 27, 28, 29, 30]


def test_time_left_does_not_count_the_first_epoch(monkeypatch):
    """It compiles: here it takes 50 s, and each later one 2 s."""
    now = [0.0]
    monkeypatch.setattr("jaxcae.cli.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(5, file=stream) as progress:
        for epoch in range(1, 6):
            now[0] += 50 if epoch == 1 else 2
            progress.update(epoch, {"loss": 1.0})
    lines = stream.getvalue().split("\n")
    assert "left" not in lines[0]
    assert [line.split("  ")[-1] for line in lines[1:5]] == [
        "6 s left",
        "4 s left",
        "2 s left",
        "58 s",
    ]


def test_quiet_is_quiet():
    assert run_progress(io.StringIO(), 30, quiet=True) == []


def test_progress_goes_to_stderr(capsys):
    with Progress(1) as progress:
        progress.update(1, {"loss": 1.0})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("training: epoch 1/1")


RUN = """
    import sys, time
    from jaxcae.cli.progress import Progress
    for name in ("contractive", "plain"):
        with Progress(40, name) as progress:
            for epoch in range(1, 41):
                time.sleep(0.01)
                metrics = {"loss": 12345.6, "reconstruction": 12.3}
                if name == "contractive":
                    metrics["contraction"] = 0.00123
                progress.update(epoch, metrics)
                if epoch == 20:
                    print("to stdout")
"""


@pytest.mark.parametrize(
    ("columns", "present", "absent"),
    [
        (100, ["loss", "rec", "‖J‖²"], []),
        (80, ["loss", "rec", "‖J‖²"], []),
        (64, ["loss", "‖J‖²"], ["rec"]),
        (40, [], ["loss", "rec", "‖J‖²"]),
    ],
)
def test_a_terminal_gets_a_bar_that_fits(columns, present, absent):
    seen = lines_of(on_terminal(RUN, columns))
    final = [line for line in seen if "40/40" in line]
    assert any(line.startswith("contractive") for line in final)
    assert any(line.startswith("plain") for line in final)
    for line in final:
        assert "━" in line
        assert "…" not in line
        assert len(line.rstrip()) <= columns
    told = next(line for line in final if line.startswith("contractive"))
    assert all(word in told for word in present)
    assert not any(word in told for word in absent)
    if "‖J‖²" in present:
        assert "0.00123" in told
    assert sum("to stdout" in line for line in seen) == 2


def test_a_result_printed_meanwhile_goes_to_stdout(tmp_path):
    with (tmp_path / "out").open("w+") as stdout:
        seen = on_terminal(RUN, stdout=stdout)
        stdout.seek(0)
        assert stdout.read() == "to stdout\n" * 2
    assert "to stdout" not in seen
    assert "40/40" in seen


def test_a_bar_without_colour_and_a_dumb_terminal():
    assert COLOUR.search(on_terminal(RUN))
    assert not COLOUR.search(on_terminal(RUN, NO_COLOR="1"))
    dumb = on_terminal(RUN, TERM="dumb")
    assert "\x1b" not in dumb
    assert len(lines_of(dumb)) == 2 * PLAIN_LINES + 2


def test_the_cursor_comes_back_after_an_error():
    seen = on_terminal(
        """
        from jaxcae.cli.progress import Progress
        try:
            with Progress(40) as progress:
                progress.update(1, {"loss": 1.0})
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        """
    )
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")


def test_a_renderable_can_be_used_in_any_rich_console():
    rich = Console(file=io.StringIO(), width=100)
    rich.print(tables.result_table(report(plain=PLAIN)))
    assert "mean ‖J‖_F" in rich.file.getvalue()


def test_a_narrow_terminal_gets_the_figures_one_below_the_other() -> None:
    """Side by side, 40 columns would leave no heading whole."""
    rows = {"mean ‖J‖_F": [8.6, 41.0, 5.3]}
    columns = ["untrained", "plain", "contractive"]
    table = tables.comparison_table("data", "mean", columns, rows, "So.", reference="plain")
    stream = io.StringIO()
    Console(file=stream, width=40).print(table)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["untrained", "8.60"] in lines
    assert ["contractive", "5.30"] in lines
    assert ["against", "plain", "−87.1%"] in lines
    assert max(map(len, stream.getvalue().splitlines())) <= 40
