"""The report's page: what it says, that it needs nothing beside it, and that a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from raypfk import cli, descriptor_files, store
from raypfk.errors import UserError
from raypfk.pfk import Descriptors
from raypfk.report import report
from tests import studies

VOID = {"meta", "img", "br", "link", "input", "hr"}
KERNEL = {1: (0.25, 0.75), 2: (0.5, 1.0)}
CHANCE = {1: (0.25, 0.5), 2: (0.25, 0.25)}


class Page(HTMLParser):
    """Refuses tags that are not closed in order; keeps attributes, and the text of the cells of tables by row."""

    def __init__(self, path: str):
        super().__init__()
        self.open, self.attributes, self.rows, self.text, self.ids = [], [], [], "", []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def column(self, head: str) -> list[str]:
        """What stands below a column's name, in the first table that has it."""
        for at, row in enumerate(self.rows):
            if head in row:
                below = self.rows[at + 1 :]
                end = next((i for i, other in enumerate(below) if len(other) != len(row)), len(below))
                return [other[row.index(head)] for other in below[:end]]
        raise AssertionError(f"no column {head!r}")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return studies.pool(str(tmp_path_factory.mktemp("pool")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pool) -> str:
    """The page on a finished experiment of two cells."""
    folder = str(tmp_path_factory.mktemp("studies") / "finished")
    record = {"figure": "4b", "command": "raypfk experiment x.yaml"}
    cells = {"pfk": {"published": "PFK S=phat L80", "seeds": [1, 2]}, "random": {"seeds": [1, 2]}}
    studies.experiment(folder, pool, {"pfk": KERNEL, "random": CHANCE}, [1, 2], cells=cells, **record)
    return report.write(folder, None, "raypfk report 'a b'")


def test_the_page_needs_nothing_beside_it(finished):
    """Well-formed HTML; no script, no link, no file or place that is fetched: every image is in the page."""
    page = Page(finished)
    assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe", "object"}
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "poster")]
    assert len(sources) > 20 and all(value.startswith(("data:image/", "#")) for value in sources)
    assert "url(" not in page.source and "http" not in re.sub(r"data:[^\"]*", "", page.source)
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert {value[1:] for value in sources if value.startswith("#")} <= anchors
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))


def test_its_figures_lie_beside_it(finished):
    """Each figure of the page is a PNG of its own too."""
    names = store.names(Path(finished).parent.as_posix())
    assert names == [
        *("accuracy.png", "bought-1-pfk.png", "bought-2-random.png", "classes.png", "confusion-1-pfk.png"),
        *("confusion-2-random.png", "estimates.png", "features-1-pfk.png", "index.html", "minority-estimates.png"),
        *("minority-share.png", "minority.png", "published.png"),
    ]


def test_the_numbers_are_the_runs(finished):
    """Means and deviations over seeds of the last epoch, the best one apart; areas; labels saved; n beside every p."""
    page = Page(finished)
    assert page.column("accuracy, last epoch") == ["87.5 ± 17.7 %", "37.5 ± 17.7 %"]
    assert page.column("best on test (as published)")[0] == "95.8 ± 5.9 %"
    assert page.column("area under curve") == ["62.5 ± 17.7 %", "31.2 ± 8.8 %"]
    assert page.column("labels saved at the accuracy of random") == ["50 %: 3 for 6", "the baseline"]
    assert page.column("labels bought")[0] == "6"
    assert page.column("validation labels") == ["36, used", "36, not used"]
    assert page.column("area: difference") == ["+31.2"] and page.column("n") == ["2"]
    assert page.column("round 2") == ["+50.0 (p 0.295, n 2)"]
    assert page.column("M + N")[:1] == [f"{36 + 24 - 3}"] == page.column("forward")[:1]
    assert "This study has other data (digits, 4x)" in page.text
    assert "Not finished" not in page.text
    assert "raypfk report 'a b'" in page.text and "raypfk experiment x.yaml" in page.text


def test_ours_is_held_against_the_papers_own_points(finished):
    """At the labels that a cell and its curve have in common, by the best epoch on the test set."""
    page = Page(finished)
    rows = [row for row in page.rows if row[:2] == ["pfk", "PFK S=phat L80"]]
    assert rows == [
        ["pfk", "PFK S=phat L80", "3", "37.5 ± 17.7 %", "54.2 ± 17.7 %", "71.6 %", "\N{MINUS SIGN}17.4"],
        ["pfk", "PFK S=phat L80", "6", "87.5 ± 17.7 %", "95.8 ± 5.9 %", "83.8 %", "+12.0"],
    ]


def test_what_the_validation_set_says_is_shown(finished):
    """Rounds of the cells that look at the validation set, and each warning once with the cells it is of."""
    page = Page(finished)
    assert page.column("validation accuracy") == ["66.7 %", "66.7 %"]
    assert page.text.count("validation set has fewer than 30 images") == 1
    assert "(pfk, random)" in page.text


def test_what_was_selected_says_why(finished):
    """A choice shows its score, rank and label, and the miss that asked for it with what the network took it for."""
    page = Page(finished)
    text = " ".join(page.text.split())
    assert f"label bought: cat, estimated: {studies.CLASSES[1]} score 0.5, rank 0" in text
    assert f"asked for by a miss: true class {studies.CLASSES[2]}, taken for cat" in text
    assert "drawn at random" in text


def test_names_cannot_break_the_page(finished):
    """A class called <script>, an experiment with & in its title: text, not markup."""
    page = Page(finished)
    assert studies.CLASSES[1] in page.text and "<script" not in page.source
    assert "A & B" in page.text


def test_an_unfinished_experiment_is_reported_as_far_as_it_is(tmp_path, pool):
    """What is missing is named; what is compared is the last round that every cell has, and n says of how many."""
    cells = {"pfk": KERNEL, "random": {1: (0.25,)}, "pcc": {}, "margin": {1: ()}}
    studies.experiment(str(tmp_path), pool, cells, seeds=[1, 2])
    page = Page(report.write(str(tmp_path), str(tmp_path / "page"), "raypfk report"))
    for what in (
        "random, seed 2: not begun",
        "random, seed 1: 1 of 2",
        "pcc, seed 1: not begun",
        "margin, seed 1: 0 of",
    ):
        assert what in page.text
    assert page.column("accuracy, last epoch") == ["37.5 ± 17.7 %", "25.0 %"] and page.column("seeds") == ["2", "1"]
    assert page.column("p") == ["not known"]
    assert ["2", "6", "87.5 ± 17.7 %", "not done"] in page.rows


def test_labels_saved_are_of_the_same_seeds(tmp_path, pool):
    """A cell that is run on a seed that is easy for all saves nothing by it, and n says of how many seeds that is."""
    cells = {"pfk": {1: (0.5, 0.75)}, "random": {1: (0.5, 0.75), 2: (0.25, 0.5)}}
    uri = studies.experiment(str(tmp_path), pool, cells, seeds=[1, 2])
    page = Page(report.write(uri, str(tmp_path / "page"), "raypfk report"))
    assert page.column("labels saved at the accuracy of random") == ["0 %: 6 for 6 (n 1)", "the baseline"]
    assert ["2", "6", "75.0 % (n 1)", "62.5 ± 17.7 %"] in page.rows


def test_features_that_are_all_the_same_have_no_map(tmp_path, pool):
    """As of a network that has died."""
    run = studies.run(str(tmp_path / "run"), pool, "pfk", 1, (0.5, 0.75))
    path = run.round(2).validation
    table, described, origin = descriptor_files.read_validation(run, 2)
    dead = Descriptors(torch.zeros_like(described.z), described.g)
    columns = {name: table[name] for name in table.column_names if name not in origin.vectors}
    descriptor_files.write(path, descriptor_files.encode(columns, dead, origin), run.id, origin)
    assert "No map" in Page(report.write(run.uri, None, "raypfk report")).text


def test_an_experiment_without_a_round(tmp_path, pool):
    """Nothing is compared, and the page says so."""
    studies.experiment(str(tmp_path), pool, {"pfk": {1: ()}}, seeds=[1])
    page = Page(report.write(str(tmp_path), None, "raypfk report"))
    assert "No round is evaluated yet" in page.text and "pfk, seed 1: 0 of 2 rounds" in page.text


def test_a_run_alone_and_what_is_not_known(tmp_path, pool):
    """One run has no deviation, no baseline and no test; without train.monitor the best epoch is not known."""
    run = studies.run(str(tmp_path / "run"), pool, "pfk", 4, (0.5, 0.75))
    for number in (1, 2):
        path = run.round(number).metrics
        store.write_json(path, store.read_json(path) | {"monitored": None})
    record = f"{run.uri}/run.json"
    store.write_json(record, store.read_json(record) | {"command": "raypfk run x.yaml --out y"})
    page = Page(report.write(run.uri, None, "raypfk report"))
    assert "raypfk run x.yaml --out y" in page.text and "not recorded" not in page.text
    assert page.column("accuracy, last epoch") == ["75.0 %"]
    assert page.column("best on test (as published)") == ["not known"]
    assert "Significance" not in page.text and "baseline" not in page.text
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)


def test_images_that_cannot_be_read_are_said_so(tmp_path, pool):
    """A thumbnail that cannot be decoded is a sentence on the page, not the end of the report."""
    own = studies.pool(str(tmp_path / "pool"))
    run = studies.run(str(tmp_path / "run"), own, "random", 1, (0.5,))
    shard = own.shards("pool")[0]
    table = store.read_table(shard.uri)
    broken = table.set_column(1, table.schema.field("image"), [[b"no image"] * len(table)])
    store.write_table(shard.uri, broken)
    page = Page(report.write(run.uri, None, "raypfk report"))
    assert "cannot be read: not an image in a known format" in page.text and "no image" in page.text


def test_the_command(tmp_path, pool, capsys, monkeypatch):
    """`raypfk report RUN --out DIR` prints where the page is, which names the command; without a run, UserError."""
    run = studies.run(str(tmp_path / "run"), pool, "random", 1, (0.5,))
    arguments = ["report", run.uri, "--out", str(tmp_path / "my page")]
    monkeypatch.setattr("sys.argv", ["raypfk", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run_command(cli.cli, arguments)
    index = f"{tmp_path}/my page/index.html"
    assert not stop.value.code and capsys.readouterr().out == f"{index}\n"
    assert f"raypfk report {run.uri} --out '{tmp_path}/my page'" in Page(index).text
    with pytest.raises(UserError, match="no run and no experiment here"):
        report.write(str(tmp_path / "nothing"), None, "")


def test_runs_and_report_may_lie_in_a_store(s3):
    """Of a run in s3:// the report is written beside it there."""
    of = studies.pool(f"s3://{s3.bucket}/pool")
    run = studies.run(f"s3://{s3.bucket}/run", of, "random", 1, (0.5,))
    index = report.write(run.uri, None, "raypfk report")
    assert index == f"s3://{s3.bucket}/run/report/index.html"
    assert b"50.0 %" in store.read_bytes(index) and "accuracy.png" in store.names(f"s3://{s3.bucket}/run/report")


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it(finished, tmp_path, width):
    """Chromium opens it from disk without an error, shows every image, and has nothing to scroll sideways."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium (apt-get install chromium)")
    facts = _in_browser(chromium, finished, tmp_path, width)
    assert facts["width"] == width and facts["needed"] <= width and facts["errors"] == [] and facts["broken"] == 0


def _in_browser(chromium: str, index: str, folder: Path, width: int) -> dict:
    """What a frame of this width says of a copy of the page, which a script measures once it is loaded."""
    measure = """<script>
    const errors = []; addEventListener("error", e => errors.push(e.message || "of " + e.target.tagName), true);
    addEventListener("load", () => { const d = document.documentElement; parent.postMessage(JSON.stringify({
      errors, width: innerWidth, needed: d.scrollWidth,
      broken: [...document.images].filter(i => !i.naturalWidth).length}), "*"); });</script>"""
    page = Path(index).read_text(encoding="utf-8").replace("<head>", f"<head>{measure}")
    (folder / "page.html").write_text(page, encoding="utf-8")
    frame = f'<iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe><pre></pre>'
    hear = "<script>addEventListener('message', e => document.querySelector('pre').textContent = e.data)</script>"
    (folder / "frame.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{hear}{frame}")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    waiting = ["--virtual-time-budget=10000", "--window-size=1400,900", "--dump-dom"]
    command = [chromium, *options, *waiting, (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>(.*)</pre>", done.stdout)
    assert found and found[1], done.stderr[-2000:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
