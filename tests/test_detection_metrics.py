"""Measures of scores against labels: those of aeon, known answers, bad labels in a line."""

import numpy as np
import pytest

from jaxcae.results.detection import metrics

# What aeon 1.6.0 gives (range_pr_vus_score, range_roc_vus_score): rows, seed, events, buffer.
AEON = {
    "three events": (
        *(400, 1, [(60, 90), (200, 203), (380, 400)], 20),
        *(0.7237365645548435, 0.9015649105742857),
    ),
    "points": (
        *(300, 2, [(50, 51), (52, 53), (120, 121), (299, 300)], 12),
        *(0.31263031562500526, 0.8602767544574933),
    ),
    "at the start": (250, 3, [(0, 10)], 7, 0.6466844468905174, 0.9139146974324079),
    "extensions that meet": (
        *(300, 4, [(100, 110), (130, 140)], 60),
        *(0.6269193176012726, 0.8489972115015226),
    ),
    "buffer 0": (200, 5, [(40, 60)], 0, 0.6405820259570852, 0.8855555555555555),
    "buffer 1": (200, 5, [(40, 60)], 1, 0.6405820259570852, 0.8855555555555555),
    "ties": (300, 6, [(100, 130)], 15, 0.7324825804895847, 0.8956478239551859),
    "few rows": (40, 7, [(10, 13)], 5, 0.714127918058309, 0.9073995660503543),
    "a long buffer": (500, 8, [(240, 260)], 300, 0.5662946122273226, 0.8529723491824457),
}


def _scores(rows, seed):
    """Make numbers in [0, 1) that no version of a generator can change."""
    state, out = seed, []
    for _ in range(rows):
        state = (1103515245 * state + 12345) % 2**31
        out.append((state >> 16) / 2**15)
    return np.array(out)


def _case(name):
    rows, seed, events, buffer, pr, roc = AEON[name]
    labels = np.zeros(rows, int)
    for start, stop in events:
        labels[start:stop] = 1
    scores = _scores(rows, seed) + 0.6 * labels
    if name == "ties":
        scores = np.round(4 * scores) / 4
    return labels, scores, buffer, pr, roc


@pytest.mark.parametrize("name", AEON)
def test_the_volume_is_that_of_aeon(name):
    """To 1e-12, with the rule and the buffer beside it."""
    labels, scores, buffer, pr, roc = _case(name)
    got = metrics.vus(labels, scores, buffer)
    assert abs(got.pr - pr) < 1e-12
    assert abs(got.roc - roc) < 1e-12
    assert (got.rule, got.buffer) == ("aeon", buffer)


def test_the_volume_depends_on_the_order_of_scores_alone():
    """Any rising function of the scores has the same; so have truth values as labels."""
    labels, scores, buffer, pr, _ = _case("three events")
    assert abs(metrics.vus(labels > 0, np.exp(scores), buffer).pr - pr) < 1e-12
    assert metrics.vus(labels, np.zeros(len(labels)), buffer) == (0.0, 0.0, buffer, "aeon")


def test_quality_of_a_known_case():
    """Ten rows by hand: two events, one found, one false alarm, one row without a score."""
    labels = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0, 0])
    scores = np.array([0, 1, 9, 2, 3, 0, np.nan, 1, 8, 0.0])
    got = metrics.quality(labels, scores, 2, scores > 5)
    assert (got.rows, got.uncovered, got.events, got.events_found) == (9, 1, 2, 1)
    assert got.false_alarms_per_1000 == 1000 / 6
    # Anomalies score 9, 2, 1, the others 8, 3, 1, 0, 0, 0: pairs in order 6 + 4 + 3.5 of 18.
    assert got.roc_auc == pytest.approx(13.5 / 18)
    assert got.average_precision == pytest.approx((1 + 2 / 4 + 3 / 6) / 3)
    assert metrics.quality(labels, scores, 2).events_found is None


def test_random_numbers_find_nothing():
    """On one event of a tenth of the rows, of which point adjustment would make 0.9 and more."""
    labels = np.zeros(3000, int)
    labels[2000:2300] = 1
    got = metrics.quality(labels, _scores(3000, 9), 100)
    assert abs(got.roc_auc - 0.5) < 0.05
    assert got.vus.pr < 0.2


BAD = {
    "no anomaly": (([0, 0, 0], [1, 2, 3], 1), "no row is labelled"),
    "nothing but anomalies": (([1, 1, 1], [1, 2, 3], 1), "every row is labelled"),
    "other lengths": (([0, 1], [1, 2, 3], 1), "a label and a score a row"),
    "text": ((["a", "b"], [1, 2], 1), "dtype"),
    "missing labels": (([0, np.nan, 1], [1, 2, 3], 1), "labels are missing"),
    "infinite scores": (([0, 1, 1], [1, 2, np.inf], 1), "not finite"),
    "a negative buffer": (([0, 1, 1], [1, 2, 3], -1), "buffer counts rows"),
    "part of a row": (([0, 1, 1], [1, 2, 3], 1.5), "buffer counts rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_measured_is_refused_in_one_line(name, untyped):
    """In both functions, with the cause."""
    arguments, words = BAD[name]
    for function in (metrics.vus, metrics.quality):
        with pytest.raises(ValueError, match=words) as error:
            function(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="3 alarms"):
        metrics.quality([0, 1, 1], [1, 2, 3], 1, [True])
