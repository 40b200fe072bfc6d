"""The report: its page, opened in a browser where there is one, and its Markdown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")
pytest.importorskip("matplotlib", reason="perf needs the extra 'perf'")

from dlops_triton.perf import page, report
from dlops_triton.perf.points import digits
from dlops_triton.perf.rows import RESULTS, Row, read, said, slug

from . import invented_rows as invented

ROOT = Path(__file__).parents[1]
OTHER = "Some GPU nobody has"
LOSSES = ("focal", "softmax_focal", "ghm")  # which have a case of the same name
PLANTED = "<script>throw 1</script>"
VOID = {"meta", "link", "br", "img"}


class Reader(HTMLParser):
    """Checks that all that is opened is closed, and keeps what a test may ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.words: list[tuple[str, str]] = []  # the innermost tag, and the text in it
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self.open[-1] if self.open else "", data.strip()))

    def text(self, *without: str) -> str:
        return "\n".join(words for tag, words in self.words if tag not in without)

    def all(self, tag: str) -> list[str]:
        return [words for inner, words in self.words if inner == tag]


def outside(text: str) -> list[str]:
    """What a page would fetch from elsewhere."""
    found = [
        value
        for _, name, value in Reader(text).attributes
        if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action")
        and not value.startswith(("#", "data:"))
    ]
    found += re.findall(r"url\((?!#)[^)]*\)|@import[^;]*", text)
    return found


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """A few cases of each op, measured and predicted, and a GPU that was predicted only."""
    cases = ("retinanet", "1024x80", "square-10k", "1k-keep-100", "10k-keep-1k", "10k-staircase")
    mine = [
        *invented.some(invented.measured(), *cases),
        *invented.some(invented.predicted(), *cases),
    ]
    return [invented.probe(), *mine, *invented.some(invented.predicted(gpu=OTHER), *cases)]


@pytest.fixture(scope="module")
def html(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> str:
    notes = tmp_path_factory.mktemp("notes") / "notes.json"
    notes.write_text(json.dumps({"nms/10k-staircase/fwd/fp32": "Decisions hang on one another."}))
    page, _ = report.write(rows, notes.parent / "report", notes)
    return page.read_text(encoding="utf-8")


# --- the page --------------------------------------------------------------------------------


def test_the_page_is_whole_and_fetches_nothing(html: str) -> None:
    assert html.startswith("<!DOCTYPE html>")
    assert outside(html) == []
    assert "http:" not in html
    assert "https:" not in html
    for planted in (
        '<img src="http://example.org/a.png">',
        '<link href="//example.org/a.css" rel="stylesheet">',
        '<p style="background: url(http://example.org/a.png)"></p>',
        "<style>@import 'a.css';</style>",
    ):
        assert len(outside(html.replace("</main>", planted + "</main>"))) == 1, planted
    with pytest.raises(AssertionError):
        Reader(html.replace("</main>", "<b></main>"))


def test_identities_are_unique(html: str) -> None:
    attributes = Reader(html).attributes
    names = [value for _, name, value in attributes if name == "id"]
    assert len(names) == len(set(names))
    links = {value[1:] for _, name, value in attributes if name == "href" and value[:1] == "#"}
    assert links <= set(names)


def test_what_speaks_against_ours_comes_first(html: str) -> None:
    read = Reader(html)
    headings = read.all("h2")
    assert headings[0] == "Slower than a peer"
    assert headings[-1] == "How to read this"
    section = html[html.index("Slower than a peer</h2>") : html.index(f">{headings[1]}</h2>")]
    cells = Reader(section.partition("</h2>")[2].rpartition("</section>")[0]).all("td")
    assert cells[:2] == ["nms 10k-staircase fp32 fwd", "torchvision"]
    assert cells.count("nms 10k-staircase fp32 fwd") == 2
    cause = next(cell for cell in cells if "hang on" in cell)
    assert cause.startswith("Decisions hang on one another. The profiler sees kernels run for ")
    assert "10k-keep-1k" not in section


def test_everything_says_how_it_was_come_by(html: str) -> None:
    for table in re.findall(r"<caption>.*?</caption>", html, re.DOTALL):
        assert re.search(r'class="pill (measured|predicted)"', table), table
        for words in ("torch 2.11.0", "Triton 3.6.0", "commit abcdef012345", "2001-02-03",
                      "python -m dlops_triton.perf run --cases full"):  # fmt: skip
            assert words in table
        assert invented.GPU in table or OTHER in table
        assert "driver 570.1" in table or 'pill measured"' not in table
    pictures = re.findall(r'<svg[^>]*aria-label="([^"]*)"', html)
    assert len(pictures) == 8 + 1 + 2 * 3  # no memory: nms has but two sizes
    assert all("measured" in title or "predicted" in title for title in pictures)
    assert html.count("<figcaption><code>python -m") == len(pictures)


def test_all_rows_are_there(html: str, rows: list[Row]) -> None:
    section = html.split("Every measured row", 1)[1].split("</table>")[0]
    measured = [row for row in rows if row["kind"] == "measured"]
    assert section.split("<tbody>")[1].count("<tr>") == len(measured)
    assert section.count(invented.LEFT_OUT) == 3
    assert "Predictions: " + OTHER in html
    assert "not drawn, speed-ups are only ever measured" not in html  # of the report: no section
    read = Reader(html).text()
    for words in ("4.20 TB/s", "4.10 TB/s", "700 TFLOP/s", "focal_bwd_kernel", "BLOCK=1024"):
        assert words in read


def test_the_makers_numbers_stand_beside_the_roofs() -> None:
    known = report.html([invented.probe(gpu="NVIDIA H200")])
    cells = Reader(known).all("td")
    at = cells.index("copy, read and written")
    assert cells[at + 1 : at + 4] == ["4.20 TB/s", "4.80 TB/s", "88%"]
    assert "absent" in cells


def test_what_rows_say_is_text(rows: list[Row]) -> None:
    few = invented.some(rows[1:], "1k-keep-100")
    planted = [row | {"gpu": PLANTED, "command": PLANTED, "commit": PLANTED} for row in few]
    for row in planted:
        if "left_out" in row:
            row["left_out"] = PLANTED
        if row["kind"] == "predicted":
            row["limit"] = PLANTED
    html = report.html([invented.probe(gpu=PLANTED), *planted])
    assert html.count("<script>") == html.count("</script>") == 1
    assert Reader(html).text("script").count(PLANTED) > 10
    markdown = report.markdown(planted)
    assert "<script>" not in re.sub(r"`[^`]*`", "", markdown)


def test_before_anything_is_measured(rows: list[Row]) -> None:
    few = invented.some([row for row in rows if row.get("gpu") == OTHER], "1k-keep-100")
    read = Reader(report.html(few))
    assert read.all("h2") == [f"Predictions: {OTHER}", "How to read this"]
    assert "No speed has been measured yet." in read.text()
    assert "predicted, not yet measured" in read.all("span")


def test_ours_left_out_is_told_among_the_losses(rows: list[Row]) -> None:
    few = invented.some([row for row in rows[1:] if row["kind"] == "measured"], "retinanet")
    won = Reader(report.html(few)).text("script")
    assert "No row of ours is slower than a peer's, by any of the clocks." in won
    refused = [
        row | {"left_out": "WRONG, so not timed"}
        if (row["provider"], row["mode"]) == ("ours", "fwd")
        else row
        for row in few
    ]
    read = Reader(report.html(refused))
    assert read.all("caption")[0] == "Ours was left out"
    assert read.all("td").count("WRONG, so not timed") == 12  # three ops, two dtypes, two tables


# --- Markdown --------------------------------------------------------------------------------


def test_markdown_of_measurements(rows: list[Row]) -> None:
    text = report.markdown(rows)
    assert text.startswith(f"**{invented.GPU}, measured.** Comparisons lost by one clock at least")
    assert (
        "driver 570.1, torch 2.11.0, Triton 3.6.0, commit abcdef012345, 2001-02-03"
        in text.lower().replace("triton", "Triton")
    )
    assert "`python -m dlops_triton.perf run --cases full`" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [name.strip("| ") for name in lines[0]] == [
        "op", "case", "dtype", "mode", "us", "of floor", "over eager", "over compile",
        "over torchvision", "over mmdet",
    ]  # fmt: skip
    assert all(len(line) == 10 for line in lines)
    works = [(line[0].strip("| ").replace("\\", ""), *line[1:4]) for line in lines[2:]]
    assert works == [
        *((op, "retinanet", dtype, "fwd+bwd") for op in LOSSES for dtype in ("bf16", "fp32")),
        ("iou", "square-10k", "bf16", "fwd+bwd"),
        ("iou", "square-10k", "fp32", "fwd+bwd"),
        ("nms", "1k-keep-100", "fp32", "fwd"),
        ("nms", "10k-keep-1k", "fp32", "fwd"),
    ]
    assert "predicted" not in text.lower()
    slow = report.markdown(invented.some(invented.measured(losing=("square",)), "square-10k"))
    assert "x, slower** |" in slow


def test_markdown_of_predictions(rows: list[Row]) -> None:
    text = report.markdown([row for row in rows if row["kind"] == "predicted"])
    assert text.startswith("**Predicted, not yet measured.** ")
    assert f"| op | case | dtype | mode | {invented.GPU} | {OTHER} |" in text
    assert text.count("\n| ") == 2 + 10
    assert report.markdown([]) == "Nothing is measured.\n"


def test_the_readme_is_brought_up_to_date(rows: list[Row], tmp_path: Path) -> None:
    file, folder = tmp_path / "README.md", tmp_path / "perf" / "results"
    file.write_text("# Before\n\n<!-- perf:begin -->\nold\n<!-- perf:end -->\n\nAfter\n")
    picture = folder / f"roofline-{slug(invented.GPU)}.svg"
    assert report.update_readme(file, rows, folder) == [file, picture]
    once = file.read_text()
    shown = f"![Roofline, measured: {invented.GPU}](perf/results/{picture.name})"
    block = f"{report.markdown(rows)}\n{shown}\n"
    assert once == f"# Before\n\n<!-- perf:begin -->\n{block}<!-- perf:end -->\n\nAfter\n"
    assert picture.read_text().startswith("<svg ")
    report.update_readme(file, rows, folder)
    assert file.read_text() == once
    for text in ("no marker", "<!-- perf:begin -->", "<!-- perf:end --><!-- perf:begin -->"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"README\.md must have a line <!-- perf:begin -->"):
            report.update_readme(file, rows, folder)
        assert file.read_text() == text


def test_the_readme_shows_what_its_rows_say(tmp_path: Path) -> None:
    """Otherwise: python -m dlops_triton.perf report --readme README.md perf/results/*.jsonl"""
    changes = said("git", "-C", str(ROOT), "status", "--porcelain", "perf/results")
    if changes or said("git", "-C", str(ROOT), "rev-parse", "HEAD") is None:
        pytest.skip("the rows in perf/results are not those of a commit")
    readme = (ROOT / "README.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text(readme)
    results = tmp_path / "perf" / "results"
    _, picture = report.update_readme(copy, read(sorted(RESULTS.glob("*.jsonl"))), results)
    assert copy.read_text() == readme
    kept = (RESULTS / picture.name).read_text()
    assert re.findall('aria-label=.*?"', kept) == re.findall('aria-label=.*?"', picture.read_text())


# --- in a browser ----------------------------------------------------------------------------

# Clicks on headers and writes what came of it into the page. Runs before the page's own script, and
# so hears of its errors.
_WITNESS = """<script>
const heard = [];
addEventListener("error", (event) => heard.push(String(event.message)), true);
addEventListener("load", () => {
  const table = [...document.querySelectorAll("table")].find(
    (t) => t.caption.textContent.startsWith("Every measured row"));
  const heads = [...table.tHead.rows[0].cells];
  const at = heads.findIndex((head) => head.textContent === "device us");
  const column = (k) => [...table.tBodies[0].rows].map((row) => row.cells[k].textContent);
  const seen = { before: column(at), buttons: document.querySelectorAll("th button").length };
  const button = heads[at].querySelector("button");
  button.focus();
  seen.focused = document.activeElement === button;
  button.click();
  seen.up = column(at);
  seen.sort = heads.map((head) => head.getAttribute("aria-sort"));
  button.click();
  seen.down = column(at);
  seen.now = heads[at].getAttribute("aria-sort");
  heads[0].querySelector("button").click();
  seen.ops = column(0);
  const factors = heads.findIndex((head) => head.textContent === "speed-up");
  heads[factors].querySelector("button").click();
  seen.rising = column(factors);
  heads[factors].querySelector("button").click();
  seen.falling = column(factors);
  heads.at(-1).querySelector("button").click();
  seen.reasons = column(heads.length - 1);
  seen.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.errors = heard;
  const note = document.createElement("pre");
  note.id = "witness";
  note.textContent = JSON.stringify(seen);
  document.body.append(note);
});
</script>
"""


def browse(html: str, folder: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the witness wrote, what the console said, and the hosts that were asked for."""
    browser = next(
        (
            b
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (b := shutil.which(name))
        ),
        None,
    )
    if browser is None:
        pytest.skip("no Chromium here")
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "page.html", folder / "net.json"
    file.write_text(html.replace("<meta charset", f"{_WITNESS}<meta charset", 1), encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    witness = re.search(r'<pre id="witness">(.*?)</pre>', done.stdout, re.DOTALL)
    assert witness is not None, done.stderr
    said = json.loads(Reader(f"<pre>{witness[1]}</pre>").text())
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    hosts = set(re.findall(r'"url":"https?://([^/"]+)', log.read_text(errors="replace")))
    own = (".google.com", ".googleapis.com", ".gvt1.com")  # a browser asks its maker about itself
    return said, console, sorted(host for host in hosts if not host.endswith(own))


def test_a_browser_opens_the_page(html: str, rows: list[Row], tmp_path: Path) -> None:
    seen, console, hosts = browse(html, tmp_path / "page")
    assert console == []
    assert seen["errors"] == []
    assert seen["resources"] == []
    assert hosts == []
    assert seen["buttons"] == html.count("<th ")
    assert seen["focused"] is True
    # In order of the device's time, each way, with what was left out last.
    shown = [row for row in rows if row["kind"] == "measured"]
    times = sorted(row["device_p50_us"] for row in shown if "left_out" not in row)
    left_out = ["left out"] * (len(shown) - len(times))
    assert seen["up"] == [*map(digits, times), *left_out] != seen["before"]
    assert seen["down"] == [*map(digits, times[::-1]), *left_out]
    assert (seen["now"], seen["sort"].count("ascending")) == ("descending", 1)
    assert seen["ops"] == sorted(row["op"] for row in shown)
    none = [text for text in seen["rising"] if text == ""]
    assert 0 < len(none) < len(shown)
    for name in ("rising", "falling"):
        assert seen[name][-len(none) :] == none
    ours = next(r for r in shown if (r["case"], r["provider"]) == ("10k-staircase", "ours"))
    peers = [r for r in shown if r["case"] == "10k-staircase" and r["provider"] != "ours"]
    least = min(r["device_p50_us"] for r in peers if "left_out" not in r) / ours["device_p50_us"]
    assert seen["rising"][0] == f"{least:.2f}x"
    assert (seen["reasons"][0], seen["reasons"][-1]) == (invented.LEFT_OUT, "")
    assert float(seen["falling"][0][:-1]) > float(seen["rising"][1][:-1])


def test_the_browser_would_have_told(html: str, tmp_path: Path) -> None:
    planted = '<img src="http://planted.invalid/a.png"><script>throw new Error("planted")</script>'
    open_ = re.sub(r"<meta http-equiv[^>]*>", "", html)
    assert open_ != html
    seen, console, hosts = browse(open_.replace("</main>", f"{planted}</main>"), tmp_path / "bad")
    assert any("planted" in str(error) for error in seen["errors"])
    assert any("planted" in line for line in console)
    assert hosts == ["planted.invalid"]
    assert seen["resources"] == ["http://planted.invalid/a.png"]


def test_the_pages_policy_allows_nothing() -> None:
    text = page.document("title", "<p>body</p>")
    policy = next(
        value for tag, name, value in Reader(text).attributes if (tag, name) == ("meta", "content")
        and "default-src" in value
    )  # fmt: skip
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
