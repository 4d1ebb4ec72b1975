"""The model of scale: its counts are XLA's, and its bounds say what they should."""

import jax
import pytest

from benchmarks.roofline import (
    DATA,
    FEATURES,
    FSDP,
    H100,
    LAYOUTS,
    SPLIT_GRAM,
    Case,
    data_parallel,
    flops,
    step,
    traffic,
)
from benchmarks.roofline_check import check, collectives, is_right, page, scale
from tests.some import some

SMALL = (784, 256, 64)
CASES = [
    Case(SMALL, 1024),
    Case((784, 128, 64), 1024, DATA, 4),
    Case(SMALL, 1024, FEATURES, 4, 4),
    data_parallel((2048, 512, 64), 1024, 4),
]


@pytest.mark.parametrize("case", some(CASES, [CASES[1]]), ids=str)
def test_operations_and_bytes_are_those_that_xla_counts(case):
    """Within 4 %, and equal."""
    assert jax.device_count() >= case.devices
    row = check(case)
    assert is_right(row), row
    assert row["bytes"] > 0 or case.devices == 1


def test_a_wrong_count_is_seen():
    """The guard itself."""
    row = {"layout": DATA, "bytes": 8, "predicted_bytes": 8, "error": 0.03}
    assert is_right(row)
    assert not is_right({**row, "error": -0.05})
    assert not is_right({**row, "bytes": 12})


def test_the_bytes_of_collectives_are_read_from_a_program():
    text = """
      %a = (f32[10,2]{1,0}, f32[]) all-reduce(%x, %y), replica_groups={}
      %b = bf16[4,3]{1,0} all-gather-start(%z), dimensions={0}
      %c = f32[8]{0} add(%a, %b)
    """
    assert collectives(text) == {"all-reduce": 84, "all-gather": 24}


def test_counts_that_are_known():
    """As measured: 2,004,296 bytes a step; 2,298,880 where the features are split."""
    assert traffic(Case(SMALL, 1024, DATA, 8)).reduced == 2_004_296
    wide = traffic(Case((200_000, 256, 64), 1024, FEATURES, 8, 8))
    assert (wide.reduced_inside, wide.reduced, wide.gathered) == (2_298_880, 0, 0)
    assert traffic(Case(SMALL, 128)).reduced == 0


@pytest.mark.parametrize("layout", [SPLIT_GRAM, FSDP])
def test_devices_share_the_work_where_the_gram_is_divided(layout):
    """A larger part of it than where each repeats the gram, which symmetry makes cheaper."""
    alone = flops(Case(SMALL, 1024))
    assert flops(Case(SMALL, 1024, layout, 8)) < 0.15 * alone
    assert flops(Case(SMALL, 1024, DATA, 8)) > 0.18 * alone


def test_a_bound_names_its_limit():
    """A small encoder is limited by links; a large one on one device by what it computes."""
    assert step(H100, Case((200_000, 8192, 1024), 1024)).limit == "compute"
    many = step(H100, Case(SMALL, 1024 * 1024, DATA, 1024))
    assert many.limit == "links"
    assert many.overlapped <= many.in_turn


def test_the_page_holds_every_layout_at_every_scale():
    row = {
        "sizes": [8, 4, 2], "batch": 16, "layout": DATA, "predicted_flops": 1e9, "flops": 1e9,
        "error": 0.01, "predicted_bytes": 8, "bytes": 8,
    }  # fmt: skip
    here = {"sizes": [8, 4, 2], "batch": 16, "measured_ms": 2.0, "bound_ms": 1.0}
    text = page({"checked": [row], "here": here, "scale": {H100.name: scale(H100)}})
    for layout in LAYOUTS:
        assert text.count(f"| {layout} ") >= 12
    assert "1,024" in text
    assert "No accelerator was measured" in text
