"""Trust: rows and warnings from files made by hand, but for one short run; and what is said of them."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from raypfk import cli, descriptor_files, loop, pfk, progress, status, store, trust
from raypfk.errors import UserError
from raypfk.pfk import Descriptors, reference
from raypfk.pool import Pool
from raypfk.run import ImageSpec, Run
from raypfk.schema import LABELS, SELECTION
from tests import tiny

LENGTHS = (10, 20, 50)  # LeNet's conv1, conv2, fc1
CLASSES = list("abcdefghij")
P = 10


def vectors(n: int, seed: int, shift: float = 0.0) -> Descriptors:
    """Standardised; `shift` moves the first scale's directions."""
    x = torch.randn(n, sum(LENGTHS), generator=torch.Generator().manual_seed(seed))
    x[:, :5] += shift
    return Descriptors(*(pfk.standardise(x, LENGTHS) for _ in "zg"))


def histogram(**counts: int) -> dict[str, int]:
    return dict.fromkeys(CLASSES, 40) | counts


class Made:
    """A run of 10 labels a round, its files written as the stages do: a pool of 120 images in two shards."""

    def __init__(self, folder, pool=True, trusted=True, **changes):
        splits = {"pool": self._split("p", 60, 60), "validation": {"rows": 400, "files": [], "shards": []}}
        splits["pool"]["label_histogram"] = histogram() if pool is True else pool
        splits["validation"]["label_histogram"] = histogram() if trusted is True else trusted
        image = ImageSpec(16, 16, 1, (0.5,), (0.5,), 10**6)
        manifest = {"fingerprint": "0", "classes": CLASSES, "splits": splits}
        settings = tiny.config(budget=P, **changes)
        self.run = Run(str(folder), "ab" * 16, settings, Pool(str(folder), manifest), image, 10)

    @staticmethod
    def _split(letter: str, *rows: int) -> dict:
        first, shards = 0, []
        for i, n in enumerate(rows):
            name = f"{i:05d}.parquet"
            ids = [f"{letter}{first:03d}", f"{letter}{first + n - 1:03d}"]
            shards.append({"name": name, "rows": n, "first_id": ids[0], "last_id": ids[1], "files": [name]})
            first += n
        files = [{"name": shard["name"], "rows": shard["rows"], "sha256": ""} for shard in shards]
        return {"rows": first, "files": files, "shards": shards}

    def extract(self, number: int, missed: list[bool], first: int = 0, shift=0.0, estimates=range(10)) -> None:
        """validation.parquet of len(missed) images from number `first` on, and the pool's files."""
        run, files, n = self.run, self.run.round(number), len(missed)
        full = descriptor_files.full_origin(run, "0" * 16)
        trusted, pool = vectors(n, number), vectors(120, 100 + number, shift)
        classes = pa.array([0] * n, pa.int64())
        table = {"image_id": pa.array([f"v{first + i:03d}" for i in range(n)])}
        table |= dict.fromkeys(("predicted", "estimated_label", "label"), classes)
        table |= dict.fromkeys(("missed", "center"), pa.array(missed))
        descriptor_files.write(files.validation, descriptor_files.encode(table, trusted, full), run.id, full)
        directions = descriptor_files.fit_directions(run, number, trusted)
        origin = descriptor_files.stored_origin(run, full, directions)
        pool = directions.project(pool) if directions else pool
        for i, shard in enumerate(run.pool.shards("pool")):
            rows = slice(60 * i, 60 * i + 60)
            estimated = pa.array(np.resize(np.array(estimates), 120)[rows], pa.int64())
            columns = {"image_id": pa.array([f"p{j:03d}" for j in range(rows.start, rows.stop)])}
            columns |= {"predicted": estimated, "estimated_label": estimated}
            table = descriptor_files.encode(columns, pool.rows(rows), origin)
            descriptor_files.write(store.join(files.descriptors, shard.name), table, run.id, origin)
        run.mark(number, "extract", {"seconds": 0.0})

    def buy(self, number: int, images: range | None = None, labels=range(10)) -> list[str]:
        """A selection and its labels."""
        run, files = self.run, self.run.round(number)
        ids = [f"p{i:03d}" for i in images or range(P * number, P * number + P)]
        rows = [{"position": i, "image_id": image_id} for i, image_id in enumerate(ids)]
        run.write(files.selection, pa.Table.from_pylist(rows, SELECTION))
        label = np.resize(np.array(labels), len(ids))
        run.write(
            files.labels, pa.table([pa.array(ids), pa.array(label), pa.array(["file"] * len(ids))], schema=LABELS)
        )
        for stage in ("acquire", "label"):
            run.mark(number, stage, {"seconds": 0.0})
        return ids


def first_missed(n: int, images: int = 100) -> list[bool]:
    return [i < n for i in range(images)]


@pytest.fixture
def make(tmp_path):
    return lambda **changes: Made(tmp_path, **changes)


def rows(made: Made) -> list[dict]:
    return trust.of(made.run).to_pylist()


# ---------------------------------------------------------------------------------------------------------------- rows


def test_a_curve_by_hand(make):
    """Misses 90, 40, 20, 10 of 100 after 0, 10, 20, 30 labels: each row says what was known by then, and no more."""
    made, counts = make(), (90, 40, 20, 10)
    for number, count in enumerate(counts, 1):
        made.extract(number, first_missed(count))
        made.buy(number)
    found = rows(made)
    assert trust.of(made.run).schema == trust.TRUST
    assert [row["bought"] for row in found] == [0, 10, 20, 30]
    assert [row["validation_accuracy"] for row in found] == [0.1, 0.6, 0.8, 0.9]
    assert [row["plateau"] for row in found] == [None, None, pytest.approx(2 / 2**70), pytest.approx(2 / 2**30)]
    assert [row["worth_buying"] for row in found[:3]] == [row["expected_gain"] for row in found[:3]] == [None] * 3
    log_a, b = reference.power_law([10, 20, 30], [0.4, 0.2, 0.1])
    gain = np.exp(log_a) * (30.0**-b - 40.0**-b)
    assert found[3]["expected_gain"] == pytest.approx(gain)
    bought, standard_error = 30, np.sqrt(0.1 * 0.9 / 100)
    while np.exp(log_a) * (bought**-b - (bought + P) ** -b) >= standard_error:
        bought += 1
    assert found[3]["worth_buying"] == bought - 30 > 0
    assert trust.latest(made.run)[0] == found[3]


def test_images_that_are_left_out_are_said(make):
    """Of the validation set in the last round that looked, of the test set in the last that was evaluated."""
    made = make()
    made.run.pool.manifest["splits"]["test"] = {"rows": 50}
    made.extract(1, first_missed(30, 398))
    made.run.mark(1, "extract", {"seconds": 0.0, "validation_rejected": 2})
    said = trust.warnings(made.run)
    assert [text for text in said if "read" in text] == [
        "2 of 400 validation images could not be read in round 1 and are left out: why in "
        + made.run.round(1).rejects("validation")
    ]
    made.run.mark(1, "evaluate", {"seconds": 0.0, "rejected": 5})
    made.buy(1)
    made.extract(2, first_missed(10))
    assert any(text.startswith("5 of 50 test images could not be read in round 1") for text in trust.warnings(made.run))


def test_a_plateau_is_over_the_images_that_both_were_shown(make):
    """Images rejected in either round do not count, and answers are matched by id, not by place."""
    made = make()
    made.extract(1, first_missed(30, 60))  # v000 to v059, misses v000 to v029
    made.buy(1)
    made.extract(2, first_missed(0, 60))
    made.buy(2)
    made.extract(3, first_missed(10, 60), first=20)  # v020 to v079, misses v020 to v029
    assert rows(made)[2]["plateau"] == 1.0
    made.extract(3, [False] * 60, first=20)
    assert rows(made)[2]["plateau"] == pytest.approx(2 / 2**10)


def test_an_error_that_does_not_fall_tells_nothing(make):
    """Four rounds of the same misses: no gain is claimed, none is denied, and p says that nothing changed."""
    made = make()
    for number in range(1, 5):
        made.extract(number, first_missed(30))
        made.buy(number)
    last = rows(made)[3]
    assert (last["expected_gain"], last["worth_buying"], last["plateau"]) == (None, None, 1.0)


@pytest.mark.parametrize("strategy", ["random", "bald", "badge"])
def test_a_strategy_that_does_not_look_at_the_validation_set(make, strategy):
    """Labels are counted; the rest is null. Before any round is extracted there is no row."""
    made = make(strategy=strategy, model__dropout=0.5)
    assert rows(made) == [] and trust.latest(made.run) == (None, [])
    for number in (1, 2):
        made.run.mark(number, "extract", {"seconds": 0.0})
        made.buy(number)
    nothing = dict.fromkeys(trust.TRUST.names)
    assert rows(made) == [nothing | {"round": 1, "bought": 0}, nothing | {"round": 2, "bought": 10}]


# --------------------------------------------------------------------------------------------------------------- shift


@pytest.mark.parametrize(
    "stored", [{}, {"dtype": "int8"}, {"pca": 6}, {"dtype": "int8", "pca": 6}], ids=["full", "int8", "pca", "both"]
)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_selection_is_compared_as_it_is_stored(make, stored, shift):
    """Images of the validation set's distribution, in any storage, are no shift; others are, and that is said."""
    made = make(descriptors=stored)
    made.extract(1, first_missed(50), shift=shift)
    assert rows(made)[0]["shift"] is None  # not chosen yet
    made.buy(1, range(30, 90))  # of both shards
    row = rows(made)[0]
    said = [text for text in trust.warnings(made.run) if "differs from the validation set" in text]
    assert (row["shift_p"] < 0.01) == (shift > 0) == bool(said)
    if said:
        assert f"what round 1 selected differs from the validation set (MMD^2 {row['shift']:.3f}, p 0.001)" in said[0]


def test_the_shift_is_of_a_sample_that_does_not_depend_on_order(make, monkeypatch):
    """At most SAMPLE of either side, drawn by their ids: the same images for a selection in another order."""
    made = make()
    made.extract(1, first_missed(50))
    made.buy(1, range(0, 120))
    monkeypatch.setattr(trust, "SAMPLE", 25)
    taken = []
    monkeypatch.setattr(pfk, "kernel_two_sample", lambda x, y, seed: taken.append((x, y)) or pfk.TwoSample(0.0, 1.0))
    rows(made)
    made.buy(1, range(119, -1, -1))
    rows(made)
    (x, y), (again_x, again_y) = taken
    assert x.shape == y.shape == (25, 80) and torch.equal(x, again_x) and torch.equal(y, again_y)
    whole = vectors(120, 101).z
    where = [int((whole == row).all(1).nonzero()) for row in y]
    assert where == sorted(where) and where != list(range(25))


def test_one_image_is_no_sample(make):
    """A selection of one, as an exhausted pool leaves: no shift, and no error."""
    made = make()
    made.extract(1, first_missed(50))
    made.buy(1, range(7, 8))
    assert rows(made)[0]["shift"] is None


def test_a_damaged_file_is_named(make):
    """Features of another network than the validation set's are refused, not compared."""
    made = make()
    made.extract(1, first_missed(50))
    made.buy(1)
    path = store.join(made.run.round(1).descriptors, "00000.parquet")
    origin = descriptor_files.origin_of(path, store.read_table(path))
    made.run.write(path, store.read_table(path).replace_schema_metadata())
    with pytest.raises(UserError, match=r"00000\.parquet: no raypfk\.descriptors"):
        rows(made)
    assert origin.weights == "0" * 16


# ------------------------------------------------------------------------------------------------------------ warnings

AT_START = {
    "nothing": ({}, []),
    "few of two classes": (
        {"trusted": histogram(c=9, a=16)},
        [
            "the validation set has fewer than 30 images of 2 classes (a, c): one standard error of the accuracy of "
            "class c, with 9, is up to 17 points"
        ],
    ),
    "few of all": ({"trusted": dict.fromkeys(CLASSES, 29)}, ["images of 10 classes (a, b, c, d, e and 5 more): "]),
    "smaller than the budget": (
        {"budget": 401}, ["the validation set has 400 images, fewer than the 401 bought a round"],
    ),
    "the pool lacks a class": ({"pool": histogram(d=0)}, ["no image of the pool is of class d, which the validation"]),
    "the validation set lacks classes": (
        {"trusted": histogram(b=0, j=0)}, ["the pool has 2 classes (b, j), of which the validation set has no image"],
    ),
    "both lack one": ({"trusted": histogram(b=0), "pool": histogram(b=0)}, []),
    "no labels": ({"pool": None}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_START)
def test_what_the_pool_alone_shows(make, name):
    """Each kind, with its classes and numbers, before any round; and nothing where nothing is wrong."""
    changes, expected = AT_START[name]
    budget = changes.get("budget", P)
    made = make(**{key: value for key, value in changes.items() if key != "budget"})
    run = made.run
    object.__setattr__(run, "config", run.config.model_copy(update={"budget": budget}))
    said = trust.at_start(run)
    assert len(said) == len(expected) and all(part in text for part, text in zip(expected, said, strict=True))
    assert trust.warnings(run) == said


BY_LABELS = {
    "all are bought": (range(10), [0], histogram(), []),
    "all are bought or estimated": (range(8), [0, 8, 9], histogram(), []),
    "one is neither": (
        range(8), [0, 9], histogram(),
        ["none of the 10 labels bought, and no image of the pool by its estimated label, is of class i, which"],
    ),
    "one is not wanted": (range(8), [0, 9], histogram(i=0), []),
    "one was bought that the validation set lacks": (
        range(10), [0], histogram(e=0), ["labels were bought of class e, of which the validation set has no image"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_LABELS)
def test_classes_of_a_pool_without_labels(make, name):
    """Known by what was bought, this round included, and by what is estimated."""
    bought, estimates, trusted, expected = BY_LABELS[name]
    made = make(pool=None, trusted=trusted, oracle="file")
    made.extract(1, first_missed(50), estimates=estimates)
    made.buy(1, labels=bought)
    said = [text for text in trust.warnings(made.run) if "class" in text]
    assert len(said) == len(expected) and all(part in text for part, text in zip(expected, said, strict=True))


def test_no_miss_is_left(make):
    made = make()
    made.extract(1, first_missed(0))
    said = trust.warnings(made.run)
    assert len(said) == 1 and said[0].startswith("the network of round 1 gets all 100 validation images right")


# -------------------------------------------------------------------------------------------------------------- status

ROW = {"round": 4, "bought": 30, "validation_accuracy": 0.9, "plateau": None, "expected_gain": None}
ROW |= {"worth_buying": None, "shift": None, "shift_p": None}
GAIN = {"expected_gain": 0.0123, "worth_buying": 0}
OUTLOOKS = [
    ({}, "gets 90.0 % of the validation set right; what more labels would bring is not known yet"),
    (
        {"plateau": 0.6, **GAIN},
        "it may be no other than the one 2 rounds before (p = 0.6); the next 10 labels may gain",
    ),
    ({"plateau": 0.001}, "it differs from the one 2 rounds before (p = 0.001)"),
    (GAIN, "the next 10 labels may gain 1.23 points, less than the validation set can show"),
    (GAIN | {"worth_buying": 1234}, "may gain 1.23 points, about 1,234 labels are worth buying"),
]


@pytest.mark.parametrize(("changes", "words"), OUTLOOKS)
def test_status_says_it_in_words(capsys, changes, words):
    """One line of the last row, then the warnings; nothing of a strategy that does not look."""
    state = {"run": "r", "strategy": "pfk", "label_estimator": "neighbour", "seed": 1, "budget": P, "rounds": 4}
    state |= {"finished": False, "done": [], "warnings": ["too few images"]}
    status.show(state | {"trust": ROW | changes})
    out = capsys.readouterr().out
    assert words in out and out.endswith("\nwarning: too few images\n")
    status.show(state | {"trust": ROW | {"validation_accuracy": None}})
    assert "round 4" not in capsys.readouterr().out


def test_a_run_says_what_its_validation_set_lacks(ray_session, tmp_path, monkeypatch, capsys):
    """Once, at its start; status has it with the last row; and no file of the test set, nor of its scores, is read."""
    said = []
    monkeypatch.setattr(progress.Progress, "say", lambda _, text: said.append(text))
    settings, out = tiny.config(data__validation=200, train__epochs=1), str(tmp_path / "run")
    for _ in range(2):
        run = loop.run(settings, out)
    warned = [text for text in said if text.startswith("warning: ")]
    assert len(warned) == 1 and "fewer than 30 images of 10 classes (0, 1, 2, 3, 4 and 5 more)" in warned[0]
    with pytest.raises(SystemExit):
        cli.run_command(cli.cli, ["status", out, "--json"])
    state = json.loads(capsys.readouterr().out)
    before = trust.of(run)
    assert state["trust"] == before.to_pylist()[0] and state["trust"]["shift_p"] is not None
    assert warned[0].removeprefix("warning: ") in state["warnings"]
    for path in (*store.paths(store.join(run.pool.uri, "test")), run.round(1).metrics):
        store.delete(path)
    assert trust.of(run) == before and trust.latest(run)[1] == state["warnings"]
