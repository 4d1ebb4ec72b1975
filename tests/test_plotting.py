"""The pictures: the right data on the right axes, titles that tell the truth, whole files."""

import struct
import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxcae import plotting
from jaxcae.plotting import frame, words


def headline(figure: Figure) -> str:
    """Return the title over the figure, as one line."""
    return " ".join(figure.texts[0].get_text().split())


def subtitle(figure: Figure) -> str:
    return " ".join(figure.texts[1].get_text().split())


def drawn(figure: Figure) -> None:
    """Lay the figure out and draw it, as saving does."""
    figure.canvas.draw()


def notes(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def images(rng, count=4, shape=(6, 5)):
    return rng.uniform(size=(count, int(np.prod(shape))))


# Samples.


def test_reconstructions_of_images_are_rows_of_the_same_samples(rng):
    originals = images(rng)
    networks = {"contractive": originals * 0.5, "plain": originals * 0.9}
    figure = plotting.reconstructions(originals, networks, feature_shape=(6, 5))
    assert len(figure.axes) == 3 * 4
    for row, samples in enumerate([originals, *networks.values()]):
        for column, sample in enumerate(samples):
            (picture,) = figure.axes[4 * row + column].images
            np.testing.assert_array_equal(picture.get_array(), sample.reshape(6, 5))
            # One grey scale for all: that of the originals.
            assert picture.get_clim() == (originals.min(), originals.max())
    labels = [figure.axes[4 * row].get_ylabel() for row in range(3)]
    assert [label.split("\n")[0] for label in labels] == ["original", "contractive", "plain"]
    drawn(figure)


def test_the_title_of_reconstructions_is_the_error_of_the_arrays(rng):
    originals = images(rng)
    off_by = np.zeros_like(originals)
    off_by[:, 0] = 1  # ‖x − x̂‖² is 1 for the plain network and 4 for the other
    figure = plotting.reconstructions(
        originals, {"contractive": originals + 2 * off_by, "plain": originals - off_by}
    )
    assert headline(figure) == "Contraction raises the reconstruction error 4-fold, from 1 to 4"
    assert "the samples shown" in subtitle(figure)
    told = {"contractive": 1.2, "plain": 1.0}
    figure = plotting.reconstructions(
        originals, {"contractive": originals, "plain": originals}, errors=told
    )
    assert headline(figure) == "Contraction raises the reconstruction error by 20%, from 1 to 1.2"
    assert "all held-out samples" in subtitle(figure)


def test_reconstructions_of_tables_are_traces(rng):
    originals = rng.normal(size=(5, 7))
    networks = {"contractive": originals + 1, "plain": originals - 1}
    names = list("abcdefg")
    figure = plotting.reconstructions(originals, networks, feature_names=names)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 5
    for sample, axes in enumerate(panels):
        curves = {line.get_label(): line.get_ydata() for line in axes.lines}
        np.testing.assert_array_equal(curves["original"], originals[sample])
        np.testing.assert_array_equal(curves["contractive"], originals[sample] + 1)
        np.testing.assert_array_equal(curves["plain"], originals[sample] - 1)
    assert panels[0].get_ylabel() == "feature value"
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == names
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["contractive", "plain", "original"]
    drawn(figure)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_with_channels(rng, channels):
    shape = (4, 3, channels)
    originals = images(rng, 2, shape)
    figure = plotting.reconstructions(originals, {"plain": originals}, feature_shape=shape)
    expected = (4, 3) if channels == 1 else shape
    assert figure.axes[0].images[0].get_array().shape == expected
    figure = plotting.first_layer_filters({"plain": originals}, feature_shape=shape)
    assert figure.axes[0].images[0].get_array().ndim == 2
    drawn(figure)


def test_filters_are_tiles_from_the_largest_on(rng):
    filters = rng.normal(size=(5, 6)) * np.array([[1.0], [5.0], [2.0], [4.0], [3.0]])
    order = np.argsort(-np.linalg.norm(filters, axis=1))
    figure = plotting.first_layer_filters(
        {"contractive": filters, "plain": 2 * filters}, feature_shape=(3, 2), max_units=4
    )
    left, right = (axes for axes in figure.axes if axes.get_title(loc="left"))
    for axes, scale in ((left, 1), (right, 2)):
        (picture,) = axes.images
        tiles = np.ma.filled(picture.get_array(), np.nan)
        height, width = 3 + 1, 2 + 1
        columns = (tiles.shape[1] + 1) // width
        for place, unit in enumerate(order[:4]):
            top, start = place // columns * height, place % columns * width
            tile = tiles[top : top + 3, start : start + 2]
            np.testing.assert_allclose(tile, scale * filters[unit].reshape(3, 2))
        low, high = picture.get_clim()
        assert low == -high  # white is zero
    assert headline(figure).startswith("Contraction cuts the median norm ‖w‖ of filters by 50%")
    assert "the 4 largest of 5" in subtitle(figure)
    drawn(figure)


def test_filters_of_tables_are_a_heat_map(rng):
    filters = rng.normal(size=(9, 4))
    figure = plotting.first_layer_filters({"plain": filters}, feature_names=list("abcd"))
    axes = figure.axes[0]
    order = np.argsort(-np.linalg.norm(filters, axis=1))
    np.testing.assert_array_equal(axes.images[0].get_array(), filters[order])
    assert axes.get_ylabel() == "unit, by ‖w‖"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list("abcd")
    drawn(figure)


# Curves.


def histories():
    nan = float("nan")
    return {
        "contractive": {
            "epoch": [0, 1, 2],
            "reconstruction": [nan, 30.0, 12.0],
            "held_out_reconstruction": [50.0, 28.0, 11.0],
            "held_out_jacobian_norm": [4.0, 2.0, 1.0],
        },
        "plain": {
            "epoch": [0, 1, 2],
            "reconstruction": [nan, 25.0, 8.0],
            "held_out_reconstruction": [50.0, 26.0, 10.0],
            "held_out_jacobian_norm": [4.0, 8.0, 10.0],
        },
    }


def test_training_curves_keep_reconstruction_and_norm_apart():
    figure = plotting.training_curves(histories(), reconstruction_label="cross-entropy (nats)")
    left, right = figure.axes
    assert left.get_yscale() == right.get_yscale() == "log"
    assert left.get_xlabel() == right.get_xlabel() == "epoch"
    assert left.get_title(loc="left") == "reconstruction error, cross-entropy (nats)"
    assert "mean ‖J‖" in right.get_title(loc="left")
    of = {}
    for axes in (left, right):
        for line in axes.lines:
            of.setdefault((axes, line.get_label()), []).append(line)
    for name, history in histories().items():
        training, held_out = of[left, name]
        np.testing.assert_array_equal(training.get_ydata(), history["reconstruction"])
        np.testing.assert_array_equal(held_out.get_ydata(), history["held_out_reconstruction"])
        assert held_out.get_linewidth() > 2 * training.get_linewidth()
        (norm,) = of[right, name]
        np.testing.assert_array_equal(norm.get_xdata(), [0, 1, 2])
        np.testing.assert_array_equal(norm.get_ydata(), history["held_out_jacobian_norm"])
    assert notes(right) == ["contractive 1", "plain 10"]
    title = headline(figure)
    assert title == "Contraction cuts mean ‖J‖$_F$ 10-fold, at 10% more reconstruction error"
    drawn(figure)


def test_training_curves_of_one_network_claim_nothing():
    figure = plotting.training_curves({"plain": histories()["plain"]})
    assert headline(figure) == "Reconstruction and sensitivity of the code during training"
    assert len(figure.axes[1].lines) == 1
    drawn(figure)


def test_the_spectrum_is_by_rank_with_a_band():
    mean = np.array([8.0, 4.0, 2.0, 0.0])
    spectra = {"plain": (mean, mean / 2, mean * 2), "contractive": (mean / 8, mean / 16, mean / 4)}
    figure = plotting.singular_value_spectrum(spectra, dimensions={"plain": 2.5}, samples=1000)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "rank i of the singular value"
    assert "σ" in axes.get_ylabel()
    curves = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(curves["plain"].get_xdata(), [1, 2, 3, 4])
    # A log scale has no place for 0.
    np.testing.assert_array_equal(curves["plain"].get_ydata(), [8, 4, 2, np.nan])
    np.testing.assert_array_equal(curves["contractive"].get_ydata()[:3], [1, 0.5, 0.25])
    band = axes.collections[0].get_paths()[0].vertices
    assert (1.0, 4.0) in map(tuple, band)
    assert (1.0, 16.0) in map(tuple, band)
    assert headline(figure) == (
        "Contraction cuts the largest singular value of J 8-fold, from 8 to 1"
    )
    assert "1,000 held-out samples" in subtitle(figure)
    assert "plain 2.5" in subtitle(figure)
    drawn(figure)


@pytest.mark.parametrize("rank", [1, 2, 200])
def test_the_spectrum_of_any_rank_from_means_alone(rank):
    figure = plotting.singular_value_spectrum({"plain": np.geomspace(2, 1, rank)})
    low, high = figure.axes[0].get_xlim()
    assert low <= 1
    assert high >= rank
    assert "middle" not in subtitle(figure)
    drawn(figure)


def test_a_spectrum_of_zeros_can_be_drawn():
    figure = plotting.singular_value_spectrum({"contractive": np.zeros(3), "plain": np.ones(3)})
    drawn(figure)


def test_contraction_curves_are_over_the_distance():
    radii = np.array([0.1, 1.0, 10.0])
    ratios = {"contractive": np.array([0.1, 0.2, 0.5]), "plain": np.array([2.0, 1.5, 0.8])}
    figure = plotting.contraction_curves(radii, ratios, typical_distance=5.0)
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "distance r between inputs"
    curves = {line.get_label(): line for line in axes.lines}
    for name, values in ratios.items():
        np.testing.assert_array_equal(curves[name].get_xdata(), radii)
        np.testing.assert_array_equal(curves[name].get_ydata(), values)
    assert {"ratio 1, a distance is kept", "distance between\ntwo samples"} <= set(notes(axes))
    assert headline(figure) == (
        "Contraction cuts the ratio at small distances 20-fold, from 2 to 0.1"
    )
    away = plotting.contraction_curves(radii, ratios, typical_distance=50.0)
    assert "distance between\ntwo samples" not in notes(away.axes[0])
    drawn(figure)


def test_curvature_is_drawn_beside_the_ratio_where_it_is_given():
    radii = np.array([0.1, 1.0, 10.0])
    ratios = {"contractive": np.array([0.1, 0.2, 0.5]), "plain": np.array([2.0, 1.5, 0.8])}
    bends = {name: 3 * values for name, values in ratios.items()}
    figure = plotting.contraction_curves(radii, ratios, typical_distance=5.0, curvatures=bends)
    left, right = figure.axes
    assert right.get_ylabel() == "curvature ‖∇²h(x + ru)‖$_F$"
    for axes, given in ((left, ratios), (right, bends)):
        curves = {line.get_label(): line.get_ydata() for line in axes.lines}
        np.testing.assert_array_equal(curves["contractive"], given["contractive"])
    assert "ratio 1, a distance is kept" not in notes(right)
    drawn(figure)


# What all of them share.


def every_figure(rng):
    two = {"contractive": images(rng), "plain": images(rng)}
    spectrum = {name: np.sort(xs, axis=1)[:3, ::-1] + 0.1 for name, xs in two.items()}
    yield plotting.reconstructions(images(rng), two, feature_shape=(6, 5))
    yield plotting.reconstructions(images(rng), two)
    yield plotting.first_layer_filters(two, feature_shape=(6, 5))
    yield plotting.first_layer_filters(two)
    yield plotting.training_curves(histories())
    yield plotting.singular_value_spectrum(spectrum)
    ratios = {n: x[0] + 0.1 for n, x in two.items()}
    yield plotting.contraction_curves(np.arange(1.0, 31.0), ratios)
    yield plotting.contraction_curves(np.arange(1.0, 31.0), ratios, curvatures=ratios)


def test_nothing_is_cut_off_at_the_edges(rng):
    for figure in every_figure(rng):
        drawn(figure)
        box = figure.bbox
        texts = [*figure.texts]
        for axes in figure.axes:
            if axes.get_visible():
                texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title]
        for text in filter(lambda text: text.get_text(), texts):
            extent = text.get_window_extent()
            assert extent.x0 >= box.x0 - 1, text
            assert extent.x1 <= box.x1 + 1, text
            assert extent.y0 >= box.y0 - 1, text
            assert extent.y1 <= box.y1 + 1, text


def test_the_headline_stands_clear_of_the_axes(rng):
    for figure in every_figure(rng):
        drawn(figure)
        bottom = min(text.get_window_extent().y0 for text in figure.texts)
        for axes in figure.axes:
            if axes.get_visible():
                assert axes.get_tightbbox().y1 <= bottom, headline(figure)


def test_a_long_headline_is_broken_to_fit():
    title = " ".join(["contraction"] * 40)
    figure = frame.make_figure(6, 3, title, "short")
    assert headline(figure) == title
    assert figure.texts[0].get_text().count("\n") >= 4
    extent = figure.texts[0].get_window_extent()
    assert extent.x1 <= figure.bbox.x1
    assert figure.texts[1].get_window_extent().y1 <= extent.y0


def test_networks_keep_their_colours_and_dashes_in_every_picture():
    curves = plotting.training_curves(histories()).axes[1].lines
    spectrum = plotting.singular_value_spectrum({"plain": [1.0, 0.5], "mine": [2.0, 1.0]})
    colours = {line.get_label(): line.get_color() for line in [*curves, *spectrum.axes[0].lines]}
    assert colours["contractive"] == plotting.COLOURS["contractive"]
    assert colours["plain"] == plotting.COLOURS["plain"]
    assert colours["mine"] not in plotting.COLOURS.values()
    dashes = {line.get_label(): line.is_dashed() for line in curves}
    assert dashes == {"contractive": False, "plain": True}


def test_saved_files_are_png_and_the_same_for_the_same_arrays(tmp_path):
    figure, again = (plotting.training_curves(histories()) for _ in range(2))
    first = plotting.save_figure(figure, tmp_path / "a.png", dpi=50)
    second = plotting.save_figure(again, tmp_path / "b.png", dpi=50)
    data = first.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    expected = figure.get_size_inches() * 50
    assert abs(width - expected[0]) <= 1
    assert abs(height - expected[1]) <= 1
    assert data == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_failed_save_leaves_the_old_file(rng, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plotting.save_figure(next(every_figure(rng)), path, dpi=40)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_drawing_changes_no_global_setting(rng):
    before = dict(matplotlib.rcParams)
    for figure in every_figure(rng):
        drawn(figure)
    assert dict(matplotlib.rcParams) == before


def test_plotting_loads_neither_jax_nor_pyplot():
    code = (
        "import sys, jaxcae.plotting.curves as c; "
        "print('matplotlib.pyplot' in sys.modules); "
        "print([n for n in vars(c) if n in ('jax', 'jnp')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["False", "[]"]


# Words and labels.


@pytest.mark.parametrize(
    ("contractive", "plain", "expected"),
    [
        (1.0, 2.0, "Contraction cuts it by 50%, from 2 to 1"),
        (2.2, 2.0, "Contraction raises it by 10%, from 2 to 2.2"),
        (2.004, 2.0, "Contraction leaves it at 2"),
        (0.01, 1.234, "Contraction cuts it 120-fold, from 1.23 to 0.01"),
        (0.0, 2.0, "Contraction cuts it altogether, from 2 to 0"),
        (1.0, 0.0, "It: 1 (contractive), 0 (plain)"),
        (float("nan"), 1.0, "It: nan (contractive), 1 (plain)"),
    ],
)
def test_comparisons_say_what_the_numbers_say(contractive, plain, expected):
    assert words.comparison(
        {"plain": plain, "contractive": contractive}, "it", "cuts", "raises"
    ) == (expected)


def test_one_network_is_compared_with_nothing():
    assert words.comparison({"plain": 2.0}, "the norm", "cuts", "raises") == "The norm: 2 (plain)"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ((1.0, 1.0), "at the same reconstruction error"),
        ((1.5, 1.0), "at 50% more reconstruction error"),
        ((0.9, 1.0), "at 10% less reconstruction error"),
        ((2.5, 1.0), "at 2.5 times the reconstruction error"),
    ],
)
def test_the_price_of_contraction(errors, expected):
    both = dict(zip(("contractive", "plain"), errors, strict=True))
    told = words.trade({"contractive": 1.0, "plain": 2.0}, both)
    assert told == f"Contraction cuts mean ‖J‖$_F$ by 50%, {expected}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.12345, "0.123"),
        (12345.6, "12,346"),
        (99.96, "100"),
        (-0.5, "−0.5"),
        (1.2e-7, "1.2e−07"),
        (float("inf"), "inf"),
    ],
)
def test_short_numbers(value, expected):
    assert words.short(value) == expected


@pytest.mark.parametrize("heights", [[0.5, 0.5, 0.5], [0.1, 0.12, 0.9], [0.0, 0.5, 1.0]])
def test_labels_are_spread_no_further_than_needed(heights):
    spread = frame._spread(heights, 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(spread))
    assert np.mean(spread) == pytest.approx(np.mean(heights))
    if all(b - a >= 0.1 for a, b in pairwise(heights)):
        assert spread == pytest.approx(heights)


def test_the_headline_is_of_the_epoch_that_was_kept() -> None:
    history = {"epoch": [0, 1, 2, 3], "held_out_reconstruction": [9, 4, 2, 8]}
    curves = {
        "contractive": {**history, "held_out_jacobian_norm": [5, 4, 1, 9]},
        "plain": {**history, "held_out_jacobian_norm": [5, 6, 2, 9]},
    }
    for kept, title, marks in ((2, "cuts mean ‖J‖$_F$ by 50%", 1), (3, "leaves mean ‖J‖$_F$", 0)):
        figure = plotting.training_curves(curves, kept=kept)
        assert title in figure.texts[0].get_text()
        assert ("epoch 2, the best" in figure.texts[1].get_text()) == (kept == 2)
        for axes in figure.axes:
            assert sum(text.get_text() == "best\nepoch" for text in axes.texts) == marks


def test_filters_of_units_that_never_vary_come_last_and_do_not_count() -> None:
    """The largest weights belong to a unit that is always off: shown last, not in the headline."""
    weights = np.array([[9.0, 9.0], [0.0, 2.0], [0.0, 1.0]])
    filters = {"contractive": weights, "plain": 2 * weights}
    activity = {"contractive": np.array([0.0, 0.1, 0.3]), "plain": np.array([0.0, 0.3, 0.1])}
    figure = plotting.first_layer_filters(filters, activity=activity)
    title, subtitle = (text.get_text().replace("\n", " ") for text in figure.texts[:2])
    assert "from 3 to 1.5" in title
    assert "Units that never vary: 1 of contractive and 1 of plain." in subtitle
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown[0], weights[[2, 1, 0]])
    np.testing.assert_array_equal(shown[1], 2 * weights[[1, 2, 0]])
    # Nothing that varies at all is a picture too.
    plotting.first_layer_filters(filters, activity={name: np.zeros(3) for name in filters})


def test_no_line_crosses_a_gap_in_time(rng) -> None:
    series = rng.normal(size=(40, 2))
    options = {
        "segments": np.array([[0, 15], [15, 40]]),
        "places": np.arange(40) + 90 * (np.arange(40) >= 15),
    }
    figure = plotting.series_scores(series, series[:, 0], 1.0, np.zeros((0, 2), int), **options)
    for axes in figure.axes:
        curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
        assert [len(line.get_xdata()) for line in curves] == [15, 25]
