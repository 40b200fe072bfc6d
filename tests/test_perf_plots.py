"""The pictures of the benchmarks, drawn from invented rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")
pytest.importorskip("matplotlib", reason="perf needs the extra 'perf'")

import matplotlib as mpl
from matplotlib import image

from dlops_triton.perf import OPS, ink, marks, plots, points, roofline
from dlops_triton.perf.rows import Row, slug

from . import invented_rows as invented

OTHER = "Some GPU nobody has"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """One GPU that was measured and predicted, and one that was predicted only."""
    other = [row for row in invented.predicted(gpu=OTHER) if row["op"] == "nms"]
    return [invented.probe(), *invented.measured(), *invented.predicted(), *other]


@pytest.fixture(scope="module")
def said(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return list(roofline.draw(rows, tmp_path_factory.mktemp("drawn")))


@pytest.fixture(scope="module")
def drawn(said: list[str]) -> dict[str, ElementTree.Element]:
    """The files, by name."""
    files = [Path(text) for text in said if text.endswith(".svg")]
    return {file.stem: ElementTree.parse(file).getroot() for file in files}


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def tips(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}title")]


def test_every_figure_is_drawn(drawn: dict[str, ElementTree.Element]) -> None:
    gpu, other = "invented-gpu-9000", "some-gpu-nobody-has"
    figures = ("roofline", "floor", "latency", "memory")
    assert set(drawn) == {
        *(f"{figure}-{gpu}" for figure in figures),
        *(f"speed-up-{gpu}-{slug(op)}" for op in OPS),
        *(f"predicted-{figure}-{name}" for figure in figures for name in (gpu, other)),
        f"predicted-against-measured-{gpu}",
    }
    for name, svg in drawn.items():
        marked = len(list(svg.iter(f"{SVG}use"))) + len(list(svg.iter(f"{SVG}path")))
        assert marked > 15, name


def test_titles_say_what_was_measured_and_where(drawn: dict[str, ElementTree.Element]) -> None:
    for name, svg in drawn.items():
        (title,) = [text for text in texts(svg) if invented.GPU in text or OTHER in text]
        source = "; ".join(text for text in texts(svg) if "torch 2" in text)
        assert "torch 2.11.0, Triton 3.6.0, commit abcdef012345, 2001-02-03" in source
        if name == "predicted-against-measured-invented-gpu-9000":
            assert title.startswith("Predicted against measured: ")
        elif "nobody" in name:
            assert ", predicted, not yet measured: " in title
        elif name.startswith("predicted"):
            assert ", predicted: " in title
        else:
            assert ", measured: " in title
            assert "driver 570.1" in source


def test_measurements_and_predictions_have_pictures_of_their_own(
    drawn: dict[str, ElementTree.Element],
) -> None:
    for name, svg in drawn.items():
        text = ElementTree.tostring(svg).decode()
        used = set(re.findall(r"var\(--(measured|predicted)\d\)", text))
        assert used == {"predicted" if name.startswith("predicted") else "measured"}, name
    both = tips(drawn["predicted-against-measured-invented-gpu-9000"])
    assert both
    assert all("predicted" in tip and "measured" in tip for tip in both)


def test_in_part_measured_predictions_say_so(rows: list[Row]) -> None:
    predicted = [row for row in rows if row["kind"] == "predicted" and row["gpu"] == invented.GPU]
    half = [row for row in rows if row["kind"] == "measured" and row["op"] == "iou"]
    assert points.status(predicted, half) == "predicted, in part not yet measured"
    assert points.status(predicted, []) == "predicted, not yet measured"
    assert points.status(half, rows) == "measured"


def test_what_cannot_be_drawn_has_a_reason(said: list[str], tmp_path: Path) -> None:
    assert [text for text in said if not text.endswith(".svg")] == [
        f"speed-ups, {OTHER}: not drawn, speed-ups are only ever measured",
        f"predicted against measured, {OTHER}: not drawn, no case was both on this GPU",
    ]
    focal = [row for row in invented.measured(roofs={}) if row["op"] == "focal"]
    few = invented.some(focal, "retinanet")
    alone = [row for row in few if row["provider"] == "ours"]
    reasons = [text for text in roofline.draw(alone, tmp_path) if not text.endswith(".svg")]
    assert [reason.partition(": not drawn, ")[2] for reason in reasons] == [
        "its roofs are not known",
        "no peer was measured beside ours",
        "its roofs are not known",
        "no op has its peak memory at three sizes",
        "no case was both on this GPU",
    ]
    timeless = [row | {"device_p50_us": None} for row in alone]
    assert "no row has a time" in next(roofline.draw(timeless, tmp_path))


def test_the_same_rows_give_the_same_bytes(rows: list[Row]) -> None:
    few = [row for row in rows if row.get("op") == "nms" and row["gpu"] == invented.GPU]
    for picture in roofline.pictures(few):
        if isinstance(picture, ink.Picture):
            with mpl.rc_context({"xtick.major.pad": 40, "svg.fonttype": "path"}):
                first = ink.svg(picture)
            assert first == ink.svg(picture), picture.name


def test_ink_follows_the_ground(said: list[str]) -> None:
    for text in (Path(name).read_text() for name in said if name.endswith(".svg")):
        head, style, body = re.split(r"<style>|</style>", text, maxsplit=2)
        assert "@media screen and (prefers-color-scheme: dark)" in style
        assert not re.search(r"#[0-9a-f]{6}\b", body), "a colour that stays on either ground"
        for role in set(re.findall(r"var\(--(\w+)\)", body)):
            assert style.count(f"--{role}: #") == 2
        assert "metadata" not in head + body
        assert len(re.findall(r'\bid="([^"]*)"', body)) == len(
            set(re.findall(r'\bid="([^"]*)"', body))
        )


@pytest.mark.parametrize("theme", ink.THEMES)
def test_pngs_for_either_ground(rows: list[Row], tmp_path: Path, theme: str) -> None:
    few = [row for row in rows if row.get("op") == "nms" and row["kind"] == "measured"]
    (file,) = [
        text
        for text in roofline.draw(few, tmp_path, "png", theme)
        if Path(text).name == "speed-up-invented-gpu-9000-nms.png"
    ]
    assert Path(file).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(file)
    corner = pixels[0, 0]
    assert (corner[:3].mean() > 0.9) == (theme == "light")
    assert corner[3:].tolist() in ([], [1.0])  # opaque
    assert 0.02 < (abs(pixels - corner).max(axis=-1) > 0.1).mean() < 0.8


def test_no_other_formats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="svg or png, not gif"):
        next(roofline.draw([], tmp_path, "gif"))


def test_losing_bars_are_marked(rows: list[Row], drawn: dict[str, ElementTree.Element]) -> None:
    times = {
        row["provider"]: row["device_p50_us"]
        for row in rows
        if row["kind"] == "measured" and row["case"] == "10k-staircase" and "error" in row
    }
    factor = times["torchvision"] / times["ours"]
    assert factor < 0.9
    slow = drawn["speed-up-invented-gpu-9000-nms"]
    assert sum("slower than" in text for text in texts(slow)) == 5  # three staircases
    assert f"10k-staircase fp32 fwd: {factor:.3g} times as fast as torchvision" in tips(slow)
    text = ElementTree.tostring(slow).decode()
    assert "var(--alert)" in text
    assert text.count("fill: url(#") == 6  # hatched: five bars, and one in the legend
    fast = drawn["speed-up-invented-gpu-9000-focal"]
    assert not any("slower" in text for text in texts(fast))
    assert "var(--alert)" not in ElementTree.tostring(fast).decode()
    assert "fill: url(#" not in ElementTree.tostring(fast).decode()


def test_every_measured_row_is_a_point_under_the_roofs(
    rows: list[Row], drawn: dict[str, ElementTree.Element]
) -> None:
    measured = [row for row in rows if row["kind"] == "measured" and not row.get("left_out")]
    svg = drawn["roofline-invented-gpu-9000"]
    found = tips(svg)
    assert len(found) == len(set(found)) == len(measured)
    assert sum(tip.startswith("nms 100k-keep-10k fp32 fwd, ours: ") for tip in found) == 1
    assert {"DRAM copy 4.20 TB/s", "28.0 T instructions/s"} <= set(texts(svg))


def test_latency_has_three_clocks_and_the_least_problems(
    drawn: dict[str, ElementTree.Element],
) -> None:
    said = tips(drawn["latency-invented-gpu-9000"])
    ours = [tip for tip in said if tip.startswith("iou 256x256 fp32 fwd, ours")]
    assert [tip.rpartition(" us, ")[2] for tip in ours] == [
        "device, warm L2",
        "device, cold L2",
        "eager, wall clock",
    ]
    assert not any(tip.startswith("iou 512x512") for tip in said)
    assert "one launch, 2.40 us" in texts(drawn["latency-invented-gpu-9000"])
    predicted = tips(drawn["predicted-latency-invented-gpu-9000"])
    assert "iou 256x256 fp32 fwd, ours: 2.50 us, limited by launches" in predicted


def test_memory_of_nms_is_beside_that_of_a_bitmask(drawn: dict[str, ElementTree.Element]) -> None:
    for name in ("memory-invented-gpu-9000", "predicted-memory-some-gpu-nobody-has"):
        assert "bitmask of all pairs, N\u00b2/8" in texts(drawn[name])
    assert "ours 1000000-keep-tenth fp32 fwd: 73.6 MB" in tips(drawn["memory-invented-gpu-9000"])


# --- numbers ---------------------------------------------------------------------------------


def test_the_floor_is_of_bytes_or_of_operations() -> None:
    row = invented.measured()[0] | {"bytes": 42_000, "operations": 1, "device_p50_us": 0.02}
    point = points.point(row)
    assert point is not None
    assert point.share == pytest.approx(0.5)  # 42 kB at 4.2 TB/s take 0.01 us
    assert point.bound == "bytes"
    assert point.seconds == pytest.approx(2e-8)
    executing = points.point(row | {"operations": 560_000})
    assert executing is not None
    assert executing.share == pytest.approx(1)  # 0.56 M at 28 T/s
    assert executing.bound == "instructions"
    multiplying = row | {"operations": 28_000, "products": 7_000_000, "precision": "bf16"}
    tensor = points.point(multiplying)
    assert tensor is not None
    assert tensor.share == pytest.approx(0.5)  # 7 MFLOP at 700 TFLOP/s, as the bytes
    assert points.point(multiplying | {"precision": "fp8"}) is None
    tensor = points.point(multiplying | {"products": 14_000_000})
    assert tensor is not None
    assert tensor.share == pytest.approx(1)
    assert tensor.bound == "matrix products"
    guess = points.point(invented.predicted()[0] | {"predicted_us": 7.0})
    assert guess is not None
    assert guess.seconds == pytest.approx(7e-6)
    assert guess.predicted
    assert points.point(row | {"roofs": {"copy_bytes_per_s": 1e12}}) is None
    assert points.point({**row, "device_p50_us": None, "left_out": "why"}) is None


def test_rows_come_in_the_order_of_the_benchmarks() -> None:
    rows = invented.measured()
    assert points.ordered(rows[::-1]) == points.ordered(rows)
    first = points.ordered(rows[::-1])[:5]
    assert [row["provider"] for row in first[:4]] == ["ours", "eager", "compile", "torchvision"]
    assert {row["case"] for row in first} == {"retinanet"}
    assert points.real(rows[0])
    assert not points.real(rows[0] | {"case": "1024x80"})
    assert points.real(rows[0] | {"op": "of another world"})


def test_lines_join_sweeps_only() -> None:
    def names(kept: Iterable[str]) -> list[list[str]]:
        rows = [row for row in invented.predicted() if row["op"] == "nms" and row["case"] in kept]
        return [[row["case"] for row in line] for line in marks.sweeps(rows)]

    tenths = ["2000-keep-tenth", "4000-keep-tenth", "16000-keep-tenth"]
    real = ["1k-keep-100", "10k-keep-1k", "100k-keep-10k"]
    assert names([*tenths, *real, "10k-staircase"]) == [tenths]
    assert names(tenths[:2]) == []
    assert names(["128-keep-16", "512-keep-64", "10k-keep-100", "10k-keep-10k"]) == []


def test_matched_predictions(rows: list[Row]) -> None:
    measured = [row for row in rows if row["kind"] == "measured"]
    pairs = plots.matched(invented.predicted(), measured)
    assert len(pairs) == len(invented.WORK)
    assert all(points.same(guess) == points.same(truth) for guess, truth in pairs)
    assert all(truth["provider"] == "ours" for _, truth in pairs)
    assert plots.matched(invented.predicted(gpu=OTHER), measured) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00123, "0.0012"), (0.0567, "0.057"), (0.5, "0.50"), (9.994, "9.99"),
     (12.34, "12.3"), (99.96, "100"), (12345.6, "12,346")],
)  # fmt: skip
def test_digits(value: float, text: str) -> None:
    assert points.digits(value) == text


def test_thousands_go_into_the_unit() -> None:
    assert points.si(4.2e12, "B/s") == "4.20 TB/s"
    assert points.si(999.9, "B") == "1.00 kB"
    assert points.si(12.0) == "12.0"


def test_sources_name_what_differs() -> None:
    rows = [
        {"torch": f"2.{i}", "driver": None, "commit": "abc", "date": f"2001-01-0{i}T"}
        for i in (1, 2)
    ]
    assert points.source(rows) == "torch 2.1 and 2.2, commit abc, 2001-01-01 to 2001-01-02"
    many: list[dict[str, Any]] = [rows[0] | {"torch": str(i)} for i in range(6)]
    assert points.source(many).startswith("torch 0, 1 and 4 more, ")
