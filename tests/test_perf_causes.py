"""Which comparisons are lost, and what is said of the cause."""

from __future__ import annotations

import pytest

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")

from dlops_triton.perf import causes
from dlops_triton.perf.rows import Row

from . import invented_rows as invented

OTHER = "Some GPU nobody has"


def pair(**columns: object) -> list[Row]:
    """Ours, with columns of its own, and a faster peer."""
    ours, *_, peer = invented.some(invented.measured(), "square-10k")[:4]
    for row, factor in ((ours, 2.0), (peer, 1.0)):
        row |= {"kernels": {}, "launches": 1, "synchronisations": 0, "peak_memory": 100}
        for clock in ("device", "warm", "eager"):
            for quantile, spread in (("p20", 0.99), ("p50", 1.0), ("p80", 1.01)):
                row[f"{clock}_{quantile}_us"] = 100 * factor * spread
    return [ours | columns, peer]


def test_what_does_other_work_is_not_lost_to() -> None:
    ours, peer = pair()
    assert [loss.peer for loss in causes.losses([ours, peer])] == [peer]
    assert causes.losses([ours, peer | {"unlike": "it has no masks"}]) == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, "Nothing that was recorded explains it."),
        ({"kernels": {"k": 50.0}, "clock": "events"},
         "The profiler sees kernels run for 50.0 of 200 us; for the rest the GPU idles, waiting "
         "for the host."),
        ({"kernels": {"k": 50.0}, "clock": "graph"}, "the GPU idles, between kernels."),
        ({"kernels": {"a": 150.0, "b": 50.0}}, "Of the kernels' time a takes 75%."),
        ({"launches": 7}, "7 kernels a call against 1 of torchvision."),
        ({"synchronisations": 2}, "A call waits for the GPU twice. 2 waits for the GPU a call "
         "against 0 of torchvision."),
        ({"eager_p20_us": 900.0, "eager_p50_us": 900.0},
         "For the caller a call takes 900 us, and the device works for 200 of them"),
        ({"peak_memory": 5_000_000}, "It holds 5.00 MB beside its inputs, torchvision 100 B."),
        ({"sm_clock_mhz": 990}, "The GPU's clock was 990 MHz, and 1,980 MHz for torchvision."),
        ({"warm_p20_us": 90.0}, "The samples of the two overlap (device, warm L2)."),
        ({"bytes": 4.2e6 * 190}, "It is at 95% of the floor"),
    ],
)  # fmt: skip
def test_causes(columns: dict[str, object], words: str) -> None:
    rows = pair(**columns)
    said = causes.cause(rows[0], rows)
    assert words in said
    assert columns == {} or "Nothing that was recorded" not in said


def test_a_cause_is_of_the_clock_that_lost() -> None:
    rows = pair(kernels={"k": 20.0}, eager_p20_us=90, eager_p50_us=90.0)
    assert "For the caller" not in causes.cause(rows[0], rows)
    hosts = [rows[0] | {"device_p50_us": 40.0, "warm_p50_us": 40.0, "eager_p50_us": 120.0}, rows[1]]
    said = causes.cause(hosts[0], hosts)
    assert "For the caller a call takes 120 us" in said
    assert "profiler" not in said


def test_the_prediction_is_part_of_the_cause() -> None:
    rows = pair()
    guess = next(row for row in invented.predicted() if row["case"] == "square-10k")
    guess |= {"predicted_us": 180.0, "limit": "special functions"}
    assert causes.cause(rows[0], [*rows, guess]) == (
        "The prediction is 180 us, limited by exponentials, logarithms and reciprocals, which "
        "accounts for it."
    )
    wrong = guess | {"predicted_us": 50.0}
    assert "4.0 times that, which the model does not explain" in causes.cause(
        rows[0], [*rows, wrong]
    )


def test_losses_by_any_clock() -> None:
    rows = pair(warm_p50_us=50.0, eager_p50_us=90.0)
    (loss,) = causes.losses(rows)
    assert loss.peer["provider"] == "torchvision"
    assert loss.ratios == pytest.approx({"device": 2.0, "warm": 0.5, "eager": 0.9})
    assert causes.losses(pair(device_p50_us=99.0, warm_p50_us=50.0, eager_p50_us=90.0)) == []
    assert len(causes.losses(pair(device_p50_us=99.0, warm_p50_us=50.0))) == 1
    assert causes.losses([rows[0], rows[1] | {"left_out": "why"}]) == []
    assert causes.losses([rows[0], rows[1] | {"gpu": OTHER}]) == []
