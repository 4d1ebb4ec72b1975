"""Windows of a series and the way back: against plain loops, across gaps; bad series in a line."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

import jaxcae
from jaxcae.data.segments import segments
from jaxcae.data.windows import sliding, window_starts

SHAPES = [(23,), (23, 1), (23, 3)]
RANGES = [None, [[0, 23]], [[0, 9], [9, 14], [15, 23]], [[2, 5], [6, 20]]]


def _loop(values, starts, size, length, how):
    out = np.full(length, np.nan)
    for t in range(length):
        seen = [v for s, v in zip(starts, values, strict=True) if s <= t < s + size]
        if how == "last":
            seen = [v for s, v in zip(starts, values, strict=True) if t == s + size - 1]
        if seen:
            out[t] = np.max(seen) if how == "max" else np.mean(seen)
    return out


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_stay_within_their_segment(shape, ranges, stride, rng):
    """Each is a run of rows of one segment; all of these are there, in order."""
    x = rng.normal(size=shape)
    got = jaxcae.windows(x, 4, stride, segments=ranges)
    want = [x[s : s + 4] for a, b in ranges or [[0, len(x)]] for s in range(a, b - 3, stride)]
    assert np.array_equal(got, want)


def test_windows_of_one_segment_are_a_view():
    """No memory is taken, whatever the stride."""
    x = np.arange(30.0).reshape(15, 2)
    for stride in (1, 4):
        got = jaxcae.windows(x, 6, stride)
        assert np.shares_memory(got, x)
        assert not got.flags.writeable


@pytest.mark.parametrize("how", ["mean", "max", "last"])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("ranges", RANGES)
def test_timestamps_are_those_of_a_plain_loop(how, stride, ranges, rng):
    """Means, maxima and last windows, with gaps, strides and windows without a value."""
    starts = window_starts(23, 4, stride, ranges)
    values = rng.normal(size=len(starts))
    values[1] = np.nan
    got = jaxcae.to_timestamps(values, 4, 23, stride, how, segments=ranges)
    known = ~np.isnan(values)
    want = _loop(values[known], starts[known], 4, 23, how)
    assert np.allclose(got, want, rtol=1e-14, equal_nan=True)


@pytest.mark.parametrize("channels", [(), (2,)])
@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("ranges", RANGES)
def test_point_errors_are_those_of_a_plain_loop(channels, stride, ranges, rng):
    """The mean residual at each timestamp over the windows that cover it, by channel."""
    starts = window_starts(23, 4, stride, ranges)
    residuals = rng.normal(size=(len(starts), 4, *channels)) ** 2
    got = jaxcae.point_errors(residuals, 4, 23, stride, segments=ranges)
    assert got.shape == (23, *channels)
    for t in range(23):
        seen = [r[t - s] for s, r in zip(starts, residuals, strict=True) if s <= t < s + 4]
        assert np.allclose(got[t], np.mean(seen, 0)) if seen else np.isnan(got[t]).all()


def test_one_huge_window_costs_the_others_no_digit(rng):
    """Running sums would leave a rounding error of 1e4 behind a value of 1e20."""
    values = rng.random(60)
    values[20] = 1e20
    got = jaxcae.to_timestamps(values, 5, 64)
    want = _loop(values, np.arange(60), 5, 64, "mean")
    assert np.allclose(got, want, rtol=1e-15 * 4)


def test_the_way_back_takes_memory_of_the_length_alone(rng):
    """A table of windows by rows, here 12 MB, is never made."""
    values = rng.random(15_000 - 99)
    tracemalloc.start()
    jaxcae.to_timestamps(values, 100, 15_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * values.nbytes


@pytest.mark.parametrize("width", [1, 2, 7, 40])
def test_sliding_reduces_every_run_of_neighbours(width, rng):
    """For widths from one to all."""
    values = rng.normal(size=40)
    view = np.lib.stride_tricks.sliding_window_view(values, width)
    assert np.allclose(sliding(values, width, np.add), view.sum(1), rtol=0, atol=1e-14)
    assert np.array_equal(sliding(values, width, np.maximum), view.max(1))


# --------------------------------------------------------------------------- segments

DAY = np.datetime64("2026-03-01T00:00", "m")


@pytest.mark.parametrize(
    "times",
    [
        np.array([0, 1, 2, 3, 13, 14, 15.0]),
        np.array([0, 60, 120, 180, 780, 840, 900]) + 1_700_000_000,
        np.array([0, 60, 120, 180, 780, 840, 900], np.uint64),
        DAY + np.array([0, 1, 2, 3, 13, 14, 15]),
        (DAY + np.array([0, 1, 2, 3, 13, 14, 15])).astype("datetime64[ns]"),
        [f"2026-03-01T00:{minute:02}" for minute in (0, 1, 2, 3, 13, 14, 15)],
        [f"2026-03-01 0{hour}:30+01:00" for hour in (0, 1, 2, 3, 7, 8, 9)],
        pd.date_range("2026-03-01", periods=16, freq="min", tz="UTC")[[0, 1, 2, 3, 13, 14, 15]],
        (DAY + np.array([0, 1, 2, 3, 13, 14, 15])).tolist(),
    ],
)
def test_a_long_step_in_time_ends_a_segment(times):
    """In any unit, also where numbers are unsigned or large."""
    assert segments(np.zeros(7), times).tolist() == [[0, 4], [4, 7]]
    assert segments(np.zeros((7, 2)), times, gap=10).tolist() == [[0, 7]]


def test_a_missing_value_ends_a_segment():
    """In any channel, at the ends too, and together with gaps in time."""
    x = np.zeros((9, 2))
    x[[0, 4, 8], [1, 0, 1]] = np.nan
    assert segments(x).tolist() == [[1, 4], [5, 8]]
    times = np.array([0, 1, 2, 9, 10, 11, 12, 13, 14])
    assert segments(x, times).tolist() == [[1, 3], [3, 4], [5, 8]]
    assert segments(np.zeros(3), [5, 6, 7]).tolist() == [[0, 3]]
    assert segments(np.zeros(1), [5]).tolist() == [[0, 1]]


BAD = {
    "window longer than the series": (lambda: jaxcae.windows(np.zeros(5), 6), "longer than"),
    "no stretch holds a window": (
        lambda: jaxcae.windows(np.zeros(9), 5, segments=[[0, 4], [5, 9]]),
        "fits between no two gaps: the longest stretch without one has 4",
    ),
    "no rows": (lambda: jaxcae.windows(np.zeros((0, 2)), 1), r"needs rows"),
    "rank 3": (lambda: jaxcae.windows(np.zeros((4, 2, 2)), 1), r"\(length, channels\)"),
    "text": (lambda: jaxcae.windows(np.array(["a"]), 1), "real numbers"),
    "size of 0": (lambda: jaxcae.windows(np.zeros(4), 0), "size must be a positive int"),
    "stride of 0": (lambda: jaxcae.windows(np.zeros(4), 1, 0), "stride must be a positive int"),
    "segments in disorder": (
        lambda: jaxcae.windows(np.zeros(9), 2, segments=[[5, 9], [0, 4]]),
        "in order",
    ),
    "segments beyond the end": (
        lambda: jaxcae.windows(np.zeros(9), 2, segments=[[0, 10]]),
        "none beyond row 9",
    ),
    "too few values": (lambda: jaxcae.to_timestamps([1.0], 3, 9), "each of 7 windows"),
    "unknown placement": (lambda: jaxcae.to_timestamps(np.zeros(7), 3, 9, how="median"), "mean"),
    "residuals of another size": (
        lambda: jaxcae.point_errors(np.zeros((7, 2)), 3, 9),
        "3 residuals a window",
    ),
    "all gaps": (lambda: segments(np.full((4, 2), np.nan)), "nothing is left"),
    "an infinite value": (lambda: segments([0, 1, np.inf]), r"row 2 \(from 0\)"),
    "times that go back": (lambda: segments(np.zeros(3), [0, 2, 1]), "row 2 .* before the row"),
    "times that come twice": (lambda: segments(np.zeros(3), [0, 2, 2]), "row 2 .* comes twice"),
    "unsigned times that go back": (
        lambda: segments(np.zeros(3), np.array([5, 7, 6], np.uint8)),
        "row 2 .* before the row",
    ),
    "dates that go back": (
        lambda: segments(np.zeros(2), np.array(["2026-01-02", "2026-01-01"], "datetime64[D]")),
        "2026-01-01, is before",
    ),
    "a missing time": (lambda: segments(np.zeros(2), [0, np.nan]), "time of row 1"),
    "a missing date": (
        lambda: segments(np.zeros(2), np.array(["2026-01-02", "NaT"], "datetime64[D]")),
        "time of row 1",
    ),
    "times as other text": (lambda: segments(np.zeros(2), ["1 May", "2 May"]), "ISO 8601"),
    "a time that is None": (lambda: segments(np.zeros(2), ["2026-01-01", None]), "row 1"),
    "complex times": (lambda: segments(np.zeros(2), [1j, 2j]), "complex128"),
    "too few times": (lambda: segments(np.zeros(3), [0, 1]), "each of 3 rows"),
    "an absurd gap": (lambda: segments(np.zeros(3), [0, 1, 2], gap=0.5), "median steps"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_series_is_refused_in_one_line(name, untyped):
    """Of the family of ValueError, with what came and what to do."""
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
