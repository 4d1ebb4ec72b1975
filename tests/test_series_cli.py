"""A series from its file to alarms: train, score, evaluate, follow, and what is refused."""

import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jaxcae.cli import follow, main
from jaxcae.data import load
from jaxcae.data.segments import segments
from jaxcae.results.detection.follower import Follower
from jaxcae.results.detection.of_run import detector_of
from jaxcae.runs import open_run
from tests import series

W = 16


def train(path, run, *options):
    return main(
        [
            "train", "--data", str(path), "--window", str(W), "--run-dir", str(run),
            "--no-plots", "--no-compare", *options,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on normal rows, and a series to score with a gap, missing cells and two events."""
    folder = tmp_path_factory.mktemp("series")
    normal = series.write(folder / "normal.csv", 900, label=False)
    run = folder / "run"
    assert train(normal, run, "--time-column", "when", "--epochs", "12", "--missing", "drop") == 0
    new = series.write(
        folder / "new.csv",
        400,
        seed=1,
        events=[(120, 140), (300, 312)],
        gaps=[200],
        missing=[(60, 0), (61, 1)],
    )
    return run, new


@pytest.fixture(scope="module")
def scored(made, tmp_path_factory):
    """The files that scoring gives."""
    run, new = made
    folder = tmp_path_factory.mktemp("scored")
    paths = {name: folder / name for name in ("scores.csv", "events.csv", "plots")}
    code = main(
        [
            "score", str(run), "--data", str(new), "--output", str(paths["scores.csv"]),
            "--events", str(paths["events.csv"]), "--plots", str(paths["plots"]),
        ]
    )  # fmt: skip
    assert code == 0
    return paths


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_walk_from_a_file_to_alarms(scored, made):
    """A row for each row, under its own time; both events found, and no row where none can be."""
    rows, given = rows_of(scored["scores.csv"]), rows_of(made[1])
    assert [row["when"] for row in rows] == [row["when"] for row in given]
    assert list(rows[0]) == [
        "when", "score", "p_value", "alarm", "window_error", "point_error",
        "point_error:a", "point_error:b", "expected:a", "expected:b",
    ]  # fmt: skip
    uncovered = [i for i, row in enumerate(rows) if row["score"] == "nan"]
    assert uncovered == [60, 61]
    assert all(rows[i]["alarm"] == "0" and rows[i]["p_value"] == "nan" for i in uncovered)
    for start, stop in ((120, 140), (300, 312)):
        assert any(row["alarm"] == "1" for row in rows[start:stop])
    events = rows_of(scored["events.csv"])
    strongest = max(events, key=lambda event: float(event["score"]))
    assert strongest["channel"] == "a"
    assert 110 <= int(strongest["peak_row"]) < 150
    assert strongest["peak"] == given[int(strongest["peak_row"])]["when"]
    assert float(strongest["observed"]) == pytest.approx(
        float(given[int(strongest["peak_row"])]["a"])
    )
    for event in events:  # none goes on beyond the gap
        assert not int(event["start_row"]) < 200 <= int(event["end_row"])
        assert int(event["rows"]) == int(event["end_row"]) - int(event["start_row"]) + 1
    alarms = {i for i, row in enumerate(rows) if row["alarm"] == "1"}
    held = {i for e in events for i in range(int(e["start_row"]), int(e["end_row"]) + 1)}
    assert alarms <= held
    pictures = sorted(path.name for path in scored["plots"].iterdir())
    assert pictures[:2] == ["event-1.png", "event-2.png"]
    assert pictures[-1] == "series.png"


def test_scores_do_not_depend_on_labels_or_the_order_of_columns(scored, made, tmp_path):
    """Columns are found by name."""
    turned = tmp_path / "turned.csv"
    turned.write_text(
        "\n".join(
            ",".join(line.split(",")[i] for i in (2, 0, 1)) for line in made[1].read_text().split()
        )
    )
    output = tmp_path / "scores.csv"
    assert main(["score", str(made[0]), "--data", str(turned), "--output", str(output)]) == 0
    assert output.read_bytes() == scored["scores.csv"].read_bytes()


def test_evaluate_measures_beside_simpler_detectors(scored, made, capsys):
    """With the run all of them, without it those that need no training; JSON as it stands."""
    run, new = made
    asked = ["evaluate", str(scored["scores.csv"]), str(new)]
    assert main([*asked, "--run", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["detectors"]) == [
        "score", "PCA", "PCA, two scales", "1-NN of windows", "isolation forest", "|difference|",
        "random",
    ]  # fmt: skip
    assert result["events"] == result["detectors"]["score"]["events_found"] == 2
    assert result["vus"] == {"rule": "aeon", "buffer": W}
    assert result["uncovered_rows"] == 2
    assert result["detectors"]["score"]["roc_auc"] > 0.9
    assert abs(result["detectors"]["random"]["roc_auc"] - 0.5) < 0.2
    assert main([*asked, "--buffer", "5", "--since", "150"]) == 0
    out, err = capsys.readouterr()
    assert "from row 150 · 250 rows, 12 of them anomalous in 1 event" in " ".join(out.split())
    assert "buffer 5 rows" in out
    assert "PCA" not in out
    assert "--run" in err


@pytest.mark.slow
def test_the_report_of_a_labelled_series_compares_after_its_training(tmp_path, capsys):
    """Networks beside simpler detectors, on rows that nothing was trained on."""
    path = series.write(tmp_path / "a.csv", 700, events=[(560, 580)])
    run = tmp_path / "run"
    options = ["--time-column", "when", "--train-until", "500", "--epochs", "2"]
    assert train(path, run, *options, "--score", "reconstruction") == 0
    out = capsys.readouterr().out
    assert "labelled rows after the training · 200 rows, 20 of them anomalous in 1 event" in out
    report = json.loads((run / "report.json").read_text())["detection"]
    assert report["comparison"]["rows"] == 200
    assert {"contractive network", "PCA", "1-NN of windows"} <= set(
        report["comparison"]["detectors"]
    )
    assert report["calibration_rows"] == 100 - W
    assert report["least_alpha"] == pytest.approx(W / (100 - W))
    output = tmp_path / "scores.csv"
    assert main(["score", str(run), "--data", str(path), "--output", str(output)]) == 0
    assert "its first 500 rows are those of the run's training" in capsys.readouterr().err
    assert main(["evaluate", str(output), str(path), "--run", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["first_row"] == 500
    # What was written to nine digits, and measured again.
    assert result["detectors"]["score"]["vus_pr"] == pytest.approx(
        report["comparison"]["detectors"]["contractive network"]["vus_pr"], abs=1e-6
    )
    # Killed between training and calibration: going on with the run makes up for it, to the bit.
    kept = (run / "detector.safetensors").read_bytes()
    (run / "detector.safetensors").unlink()
    assert main(["score", str(run), "--data", str(path), "--output", str(output)]) == 2
    assert "without a detector" in capsys.readouterr().err
    assert main(["train", "--run-dir", str(run), "--resume", "--no-plots"]) == 0
    assert (run / "detector.safetensors").read_bytes() == kept


# --------------------------------------------------------------------------- following


def followed(monkeypatch, run, *blocks, options=()):
    """Give blocks of bytes to `score --follow`, and return its exit code."""
    reader, writer = os.pipe()
    monkeypatch.setattr(follow, "STDIN", reader)

    def feed():
        for block in blocks:
            os.write(writer, block)
        os.close(writer)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        return main(["score", str(run), "--follow", *options])
    finally:
        thread.join()
        os.close(reader)


def test_following_gives_the_causal_scores_of_the_whole(made, monkeypatch, capsys):
    """However the text is cut, and with the gaps of the whole."""
    run, new = made
    text = new.read_bytes()
    cuts = [0, 10, 200, 207, 5000, 5001, len(text)]
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    assert followed(monkeypatch, run, *pieces) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    detector = detector_of(open_run(run), run)
    data = load(new, time_column="when", missing="mean", standardize=True)
    ranges = segments(data.features, data.times.values)
    scorer = detector._scorer()
    measured = scorer.measure(detector.standardization_.apply(data.features), ranges)
    parts = scorer.parts(measured, "last", len(data), ranges)
    expected = sum(part / scale for part, scale in zip(parts, detector.causal_scales_, strict=True))
    got = np.array([float(row["score"]) for row in rows])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert np.isnan(got[[0, W - 2, 60, 61, 76, 200, 200 + W - 2]]).all()
    assert np.isfinite(got[[W - 1, 77, 199, 200 + W - 1]]).all()
    assert [row["when"] for row in rows] == [row["when"] for row in rows_of(new)]


def test_a_follower_takes_one_program_and_the_memory_of_a_window(made, compilations):
    """Whatever number of rows comes at a time."""
    run, new = made
    detector = detector_of(open_run(run), run)
    values = load(new, time_column="when", missing="mean", standardize=True).features
    follower = Follower(detector)
    follower.update(values[:40])
    before = compilations()
    for count in (1, 7, 300, 0, 3):
        found = follower.update(values[:count])
        assert len(found.scores) == len(found.alarms) == count
        assert len(follower._kept) <= W - 1
    assert compilations() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "standard input: no rows."),
        ("when,a,b\n", "standard input: a header and no rows."),
        ("1,2,3\n", "line 1 names none of the run's channels"),
        ("when,a\n2024-05-01,1\n", "b is missing"),
        ("when,a,b\n2024-05-01T00:00:00Z,1,x\n", "line 2, column 3: 'x' is not a number"),
        ("when,a,b\n2024-05-01T00:00:00Z,1\n", "line 2 has 2 columns, expected 3"),
        ("when,a,b\n\n", "line 2 is blank"),
        ("when,a,b\nsoon,1,2\n", "line 2: the time is 'soon'"),
        ("when,a,b\n2024-05-01T00:00:00Z,1,1e999\n", "line 2, column 3"),
        (
            "when,a,b\n2024-05-01T00:00:01Z,1,2\n2024-05-01T00:00:00Z,1,2\n",
            "line 3: the time goes back",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_in_a_line(made, monkeypatch, capsys, text, message):
    """With the line that it came in."""
    assert followed(monkeypatch, made[0], text.encode()) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert not any("Traceback" in line for line in err)


@pytest.mark.slow
def test_scores_come_while_rows_come(made):
    """A row's score is there before the next row is, in a process of its own."""
    run, new = made
    lines = new.read_bytes().splitlines(keepends=True)
    command = [sys.executable, "-m", "jaxcae", "score", str(run), "--follow"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"".join(lines[:40]))
        process.stdin.flush()
        got = [process.stdout.readline() for _ in range(40)]
        process.stdin.write(lines[40])
        process.stdin.flush()
        got.append(process.stdout.readline())
        assert got[-1].split(b",")[0] == lines[40].split(b",")[0]
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.slow
def test_a_million_rows_take_no_more_memory_than_a_few(made):
    """The largest resident size is that of the program, whatever comes."""
    run, _ = made
    code = (
        "import resource, sys; from jaxcae.cli import main\n"
        "code = main(['score', sys.argv[1], '--follow'])\n"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for count in (20_000, 1_000_000):
        t = np.arange(count)
        with subprocess.Popen(
            [sys.executable, "-c", code, str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:

            def feed(process=process, t=t):
                process.stdin.write(b"when,a,b\n")
                for at in range(0, len(t), 10_000):
                    rows = t[at : at + 10_000]
                    block = "".join(
                        f"{1714564800 + i},{a:.4f},{b:.4f}\n"
                        for i, a, b in zip(rows, np.sin(rows / 4), np.cos(rows / 6), strict=True)
                    )
                    process.stdin.write(block.encode())
                process.stdin.close()

            thread = threading.Thread(target=feed)
            thread.start()
            lines = sum(
                block.count(b"\n") for block in iter(lambda: process.stdout.read(1 << 20), b"")
            )
            thread.join()
            last = process.stderr.read().split()
            assert lines == count + 1
            assert last[-2] == b"0"
            peaks.append(int(last[-1]))
    assert peaks[1] < peaks[0] + 40_000  # kilobytes


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "0.0001"], "alpha 0.0001 is below"),
        (["--alpha", "2"], "alpha must be above 0 and below 1"),
        (["--network", "plain"], "--network: a series is scored by the network"),
        (["--output", "s.npy"], "scores of a series are written as .csv"),
        (["--events", "e.txt"], "--events e.txt: expected a name that ends in .csv"),
        (["--events", "nowhere/e.csv"], "there is no directory nowhere"),
        (["--plots", "new.csv"], "--plots new.csv: is no directory"),
        (["--events", "scores.csv"], "is the --output, too"),
        (["--follow"], "leave out --data"),
        (["--data", "short.csv"], "short.csv: a window of 16 rows is longer than the series"),
        (["--data", "gaps.csv"], "gaps.csv: a window of 16 rows fits between no two gaps"),
        (["--data", "back.csv"], "back.csv: line 4: the time goes back"),
        (
            ["--data", "twice.csv"],
            "twice.csv: line 3: the time 2024-05-01T00:00:00+00:00 comes twice",
        ),
        (
            ["--data", "other.csv"],
            "the columns are not those of the run (2 features): b is missing",
        ),
        (["--data", "empty.csv"], "no row is left"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_line(
    made, tmp_path, monkeypatch, capsys, options, message
):
    """Exit 2, one line, and no file is written."""
    monkeypatch.chdir(tmp_path)
    run, new = made
    shutil.copy(new, "new.csv")
    lines = new.read_text().splitlines()
    bad = {
        "short.csv": lines[:10],
        "gaps.csv": [lines[0], *(lines[i] for i in range(1, 400, 40) for i in (i, i + 1, i + 2))],
        "back.csv": [lines[0], lines[1], lines[3], lines[2], *lines[4:]],
        "twice.csv": [lines[0], lines[1], *lines[1:]],
        "other.csv": [",".join(line.split(",")[:2]) for line in lines],
        "empty.csv": [lines[0], *(f"{line.split(',')[0]},,," + "0" for line in lines[1:])],
    }
    bad["empty.csv"] = [lines[0], *(f"{line.split(',')[0]},,,0" for line in lines[1:])]
    for name, text in bad.items():
        Path(name).write_text("\n".join(text) + "\n")
    before = sorted(os.listdir())
    asked = ["score", str(run), "--data", "new.csv", "--output", "scores.csv"]
    assert main([*asked, *options]) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert len(err) == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["scores.csv", "new.csv", "--label-column", "lable"], "Did you mean 'label'"),
        (["new.csv", "new.csv"], "not scores that jaxcae score wrote"),
        (["scores.csv", "short.csv"], "has scores of 400 rows, short.csv has 50"),
        (["scores.csv", "moved.csv"], "row 0 (from 0) is of 2024-05-01T00:00:00+00:00"),
        (["scores.csv", "bare.csv"], "has no labels. Name their column by --label-column"),
        (["scores.csv", "calm.csv"], "no row is labelled an anomaly"),
        (["scores.csv", "new.csv", "--since", "999"], "--since is '999'"),
        (["scores.csv", "new.csv", "--buffer", "-1"], "--buffer must be at least 0"),
        (["scores.csv", "new.csv", "--run", "nowhere"], "nowhere: no such directory"),
        (["scores.txt", "new.csv"], "expected scores as .csv"),
        (["absent.csv", "new.csv"], "absent.csv"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_line(
    scored, made, tmp_path, monkeypatch, capsys, asked, message
):
    """Exit 2 and one line."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(scored["scores.csv"], "scores.csv")
    shutil.copy(made[1], "new.csv")
    text = made[1].read_text()
    lines = text.splitlines()
    Path("short.csv").write_text("\n".join(lines[:51]) + "\n")
    Path("moved.csv").write_text(text.replace("2024-05-01", "2024-06-01"))
    Path("bare.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    Path("calm.csv").write_text("\n".join([lines[0], *(f"{x[:-1]}0" for x in lines[1:])]) + "\n")
    assert main(["evaluate", *asked]) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert len(err) == 1


@pytest.mark.skipif(importlib.util.find_spec("sktime") is None, reason="needs sktime's data")
@pytest.mark.slow
def test_the_walk_of_the_readme(tmp_path, capsys):
    """An electrocardiogram with timestamps, a gap and missing cells, to alarms and an event."""
    data = load("mitdb")
    start = np.datetime64("2024-05-01T12:00:00", "us")
    times = start + np.arange(len(data)) * np.timedelta64(2778, "us")
    times[2000:] += np.timedelta64(60, "s")
    lines = ["time,mV,abnormal"]
    for row, (when, value, label) in enumerate(
        zip(times, data.features[:, 0], data.labels, strict=True)
    ):
        cell = "" if row in (3000, 3001, 6500) else f"{value:.3f}"
        lines.append(f"{when},{cell},{label}")
    path = tmp_path / "ecg.csv"
    path.write_text("\n".join(lines) + "\n")
    run, scores = tmp_path / "ecg", tmp_path / "scores.csv"
    assert main(
        [
            "train", "--data", str(path), "--window", "128", "--time-column", "time",
            "--label-column", "abnormal", "--missing", "drop", "--train-until", "6000",
            "--held-out", "0.3", "--score", "reconstruction+neighbour", "--contraction", "3",
            "--run-dir", str(run),
        ]
    ) == 0  # fmt: skip
    capsys.readouterr()
    asked = ["score", str(run), "--data", str(path), "--output", str(scores)]
    events = tmp_path / "events.csv"
    assert main([*asked, "--events", str(events), "--plots", str(tmp_path / "plots")]) == 0
    strongest = max(rows_of(events), key=lambda event: float(event["score"]))
    assert int(strongest["start_row"]) < 7288
    assert int(strongest["end_row"]) >= 6936
    assert main(["evaluate", str(scores), str(path), "--run", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["detectors"]
    assert result["score"]["vus_pr"] > 0.8 > result["1-NN of windows"]["vus_pr"]
