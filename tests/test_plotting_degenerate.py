"""No data is too plain for a picture: each is drawn, or left out with a word."""

import itertools

import numpy as np
import pytest

from jaxcae import plotting

NAN, INF = float("nan"), float("inf")
FILLS = {"zero": 0.0, "constant": 3.5, "negative": -2.0, "nan": NAN, "inf": INF, "-inf": -INF,
         "huge": 3e38, "tiny": 1e-45, "beyond": 1e300}  # fmt: skip


def filled(kind: str, *shape: int) -> np.ndarray:
    dtype = np.float64 if kind == "beyond" else np.float32
    return np.full(shape, FILLS[kind], dtype)


def mixed(kind: str, *shape: int) -> np.ndarray:
    """Fill all but the first entry."""
    array = filled(kind, *shape).astype(np.float64)
    array.flat[0] = 0.5
    return array


def draw(figure) -> None:
    figure.canvas.draw()
    assert figure.texts[0].get_text()


QUICK = [("zero", filled), ("inf", filled), ("nan", mixed)]
over_kinds = pytest.mark.parametrize(
    ("kind", "make"),
    [
        pytest.param(kind, make, marks=() if (kind, make) in QUICK else pytest.mark.slow)
        for kind, make in itertools.product(FILLS, (filled, mixed))
    ],
)


@over_kinds
def test_reconstructions(kind, make):
    for rows, shape in ((1, (1, 1)), (2, (3, 2)), (2, None)):
        width = 6 if shape is None else shape[0] * shape[1]
        xs = make(kind, rows, width)
        others = {"contractive": xs, "plain": np.zeros_like(xs)}
        draw(plotting.reconstructions(xs, others, feature_shape=shape))
        draw(
            plotting.reconstructions(xs, others, feature_shape=shape, errors={"plain": FILLS[kind]})
        )


@over_kinds
def test_filters(kind, make):
    for units, shape in ((1, (1, 1)), (5, (3, 2)), (2, None)):
        ws = make(kind, units, 6 if shape is None else shape[0] * shape[1])
        active = None if shape is None else {"plain": make(kind, units)}
        draw(plotting.first_layer_filters({"plain": ws}, activity=active, feature_shape=shape))


@over_kinds
def test_training_curves(kind, make):
    keys = ("reconstruction", "held_out_reconstruction", "held_out_jacobian_norm")
    for epochs in (1, 4):
        history = {"epoch": range(epochs)} | {key: make(kind, epochs) for key in keys}
        networks = {"contractive": history, "plain": {"epoch": range(epochs)}}
        draw(plotting.training_curves(networks, kept=0))


@over_kinds
def test_spectra(kind, make):
    for rank in (1, 5):
        bands = tuple(make(kind, rank) for _ in range(3))
        dimensions = {"contractive": FILLS[kind]}
        spectra = {"contractive": bands, "plain": bands[0]}
        draw(plotting.singular_value_spectrum(spectra, dimensions=dimensions))


@over_kinds
def test_contraction(kind, make):
    for count in (1, 6):
        radii = np.geomspace(0.1, 2.0, count)
        ratios = {"contractive": make(kind, count), "plain": np.ones(count)}
        draw(plotting.contraction_curves(radii, ratios, typical_distance=FILLS[kind]))
    draw(plotting.contraction_curves(make(kind, 6), ratios, typical_distance=1.0))


@pytest.mark.parametrize("shape", [None, (3, 2)])
def test_no_samples_and_no_units(shape):
    none = np.zeros((0, 6))
    draw(plotting.reconstructions(none, {"plain": none}, feature_shape=shape))
    draw(plotting.first_layer_filters({"plain": none}, feature_shape=shape))


def test_no_epochs_no_ranks_no_radii():
    draw(plotting.training_curves({"plain": {"epoch": [], "held_out_reconstruction": []}}))
    draw(plotting.singular_value_spectrum({"plain": np.zeros(0)}))
    draw(plotting.contraction_curves(np.zeros(0), {"plain": np.zeros(0)}))


def test_a_picture_that_cannot_be_drawn_is_left_out_with_a_word(tmp_path):
    def fail():
        raise ValueError("no such colour")

    def make():
        return plotting.singular_value_spectrum({"plain": np.ones(3)})

    with pytest.warns(UserWarning, match=r"one\.png is left out: ValueError: no such colour"):
        paths = plotting.save_each(tmp_path / "plots", {"one": fail, "two": make})
    assert paths == [tmp_path / "plots" / "two.png"]
    assert paths[0].stat().st_size > 1000
