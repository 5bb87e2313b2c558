"""The whole chain on real images: what always holds (design.md)."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from raypfk import descriptor_files, loop, models, pfk, status, store
from raypfk.config import MonteCarloConfig, VoteConfig
from raypfk.errors import RunError, UserError, WaitingForLabels
from raypfk.pfk import Descriptors, TapReader, TopK
from raypfk.run import Run
from raypfk.schema import CANDIDATES, LABELS, SELECTION, descriptors
from raypfk.stages import acquire, extract, methods, score, stream
from raypfk.stages.acquire import pick
from tests import tiny

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_session) -> Run:
    """Two rounds of pfk, done once for all tests of this file that only look."""
    return loop.run(tiny.config(rounds=2), str(tmp_path_factory.mktemp("runs") / "finished"))


def test_every_file_of_the_contract_is_there(finished):
    """A finished round holds each file that the layout promises, with its schema."""
    length = sum(finished.lengths)
    for number in (1, 2):
        files = finished.round(number)
        for shard in finished.pool.shards("pool"):
            table = finished.read(store.join(files.descriptors, shard.name), descriptors(length))  # float32
            assert table.column_names == ["image_id", "features", "fisher", "predicted", "estimated_label"]
        finished.read(files.validation, descriptors(length, validation=True))
        for path, schema in ((files.candidates, CANDIDATES), (files.selection, SELECTION), (files.labels, LABELS)):
            assert finished.read(path, schema).num_rows
        metrics = store.read_json(files.metrics)
        assert metrics["labelled"] == 12 * number and 0 <= metrics["test_accuracy"] <= 1
        assert np.array(metrics["confusion"]).sum() == finished.pool.rows("test")
        assert len(metrics["per_class_accuracy"]) == 10 and metrics["forward"] > 0 < metrics["backward"]
        assert set(metrics["seconds"]) == set(loop.STAGES)


def test_every_pool_image_is_described_once_unless_labelled(finished):
    """Descriptor shards of a round hold each pool image exactly once, but those labelled in earlier rounds."""
    pool = [
        i
        for s in finished.pool.shards("pool")
        for i in finished.pool.read_shard(s, ["image_id"])["image_id"].to_pylist()
    ]
    for number in (1, 2):
        folder = finished.round(number).descriptors
        found = [
            i for n in store.names(folder) for i in store.read_table(store.join(folder, n))["image_id"].to_pylist()
        ]
        labelled = set(finished.labelled(number)["image_id"].to_pylist())
        assert sorted(found) == sorted(set(pool) - labelled) and len(found) == len(set(found))


def test_no_image_is_labelled_twice_and_exactly_the_budget_is_selected(finished):
    """P images a round, all different over the rounds, labels within the selection and equal to the hidden ones."""
    labels = finished.labelled(3)
    assert labels.num_rows == 24 == pc.count_distinct(labels["image_id"]).as_py()
    hidden = finished.pool.labels_of(labels["image_id"].to_pylist())
    assert [hidden[i] for i in labels["image_id"].to_pylist()] == labels["label"].to_pylist()
    for number in (1, 2):
        selection = finished.read(finished.round(number).selection, SELECTION)
        assert selection["position"].to_pylist() == list(range(12))
        assert set(selection["image_id"].to_pylist()) == set(
            finished.read(finished.round(number).labels)["image_id"].to_pylist()
        )


def test_centers_are_misses_and_every_choice_names_its_center(finished):
    """Centers are at most P of the misses; a selected image's center, rank and score stand in the candidates."""
    files = finished.round(1)
    validation = finished.read(files.validation)
    center, missed = validation["center"].to_numpy(), validation["missed"].to_numpy()
    assert 0 < center.sum() <= 12 and not (center & ~missed).any()
    assert (missed == (validation["predicted"].to_numpy() != validation["label"].to_numpy())).all()
    ids = set(validation.filter(validation["center"])["image_id"].to_pylist())
    rows = {tuple(r.values()) for r in finished.read(files.candidates).to_pylist()}
    for choice in finished.read(files.selection).to_pylist():
        assert choice["center_id"] in ids
        assert (choice["center_id"], choice["rank"], choice["image_id"], choice["score"]) in rows


def test_descriptors_are_unit_length_per_scale(finished):
    """Every scale of every stored vector has length 1 or, where it had no spread, 0; a dot product is a correlation."""
    _, described, _ = descriptor_files.read_validation(finished, 2)
    for x in described:
        for part in x.split(finished.lengths, dim=1):
            norms = part.norm(dim=1)
            assert (((norms - 1).abs() < 1e-5) | (norms == 0)).all()
            assert part.sum(1).abs().max() < 1e-4


def test_a_finished_run_is_not_done_again(finished):
    """The same command on a finished run writes nothing but run.json."""
    before = _times(finished.uri)
    loop.run(finished.config, finished.uri)
    assert _times(finished.uri) == before


def test_status_tells_what_is_done(finished):
    """status.read gives one entry a round, finished, and goes into JSON."""
    state = json.loads(json.dumps(status.read(finished.uri)))
    assert state["finished"] and [r["labelled"] for r in state["done"]] == [None, 12, 24]


def test_another_config_is_refused(finished):
    """Any field that differs is named and refused; `rounds` may grow, not shrink."""
    with pytest.raises(UserError, match=r"train\.epochs: 4 there, 5 now"):
        loop.run(tiny.config(rounds=2, train__epochs=5), finished.uri)
    with pytest.raises(UserError, match=r"rounds: 2 there, 1 now"):
        loop.run(tiny.config(rounds=1), finished.uri)


def test_more_rounds_go_on(tmp_path):
    """The same command with more rounds does the new ones only."""
    settings = {"strategy": "random", "train__epochs": 1}
    run = loop.run(tiny.config(**settings), str(tmp_path / "run"))
    before = _times(run.round(1).root)
    loop.run(tiny.config(**settings, rounds=2), run.uri)
    assert _times(run.round(1).root) == before
    assert run.done(2, "evaluate") and status.read(run.uri)["finished"]


def test_a_stage_asks_for_the_one_before(finished):
    """A stage whose predecessor is not done names the command that does it."""
    with pytest.raises(UserError, match=r"raypfk extract .* --round 3"):
        loop.do_stage(finished, 3, "score")


@pytest.mark.parametrize(
    "changes",
    [
        {"data__shard_rows": 5000},
        {"data__shard_rows": 300, "resources": {"extract_actors": 3, "score_actors": 3}},
        {"resources": {"extract_actors": 1, "score_actors": 1}},
    ],
    ids=["1 shard", "3 shards, 3 actors", "7 shards, 1 actor"],
)
def test_the_selection_does_not_depend_on_shards_or_actors(finished, tmp_path, changes):
    """1, 3 and 7 shards, 1, 2 and 3 actors: the same images in the same order."""
    selection = finished.read(finished.round(1).selection)["image_id"].to_pylist()
    assert tiny.select(tmp_path / "run", **changes) == selection


def test_the_selection_does_not_depend_on_the_order_of_arrival(finished):
    """Shards scored last first, a few at a time: the same candidates' scores and the same images."""
    centers, described, origin = descriptor_files.read_centers(finished, 1)
    paths = [store.join(finished.round(1).descriptors, s.name) for s in finished.pool.shards("pool")]
    scorer = score.Scorer(finished, finished.stored_kernel(), origin, *(x.numpy() for x in described), 1)
    top = TopK(centers.num_rows, 4)
    for shards in np.array_split(np.arange(len(paths))[::-1], 3):
        (scores, keys), _ = scorer.score([(int(i), paths[i]) for i in shards], 4)
        top.merge(TopK.of(torch.from_numpy(scores), torch.from_numpy(keys)))
    picked = pick(score.candidates_table(top, centers, paths), 12)
    selection = finished.read(finished.round(1).selection)
    for column in ("image_id", "center_id", "rank", "score"):
        assert picked[column].to_pylist() == selection[column].to_pylist()


_SLOW = pytest.mark.slow  # one narrow dtype, and one with directions, are tried each time


@pytest.mark.parametrize(
    ("dtype", "pca"),
    [
        pytest.param("float16", None, marks=_SLOW),
        pytest.param("bfloat16", None, marks=_SLOW),
        ("int8", None),
        ("int8", 6),
    ],
)
def test_every_storage_selects_the_budget(finished, tmp_path, dtype, pca):
    """Narrow and projected descriptors go through the same stages, and select mostly what float32 does.

    Files are of the size they promise; the validation set, its centers and the estimated labels are float32's.
    """
    out = str(tmp_path / "run")
    chosen = tiny.select(out, descriptors={"dtype": dtype, "pca": pca})
    run, there = Run.open(out), finished.read(finished.round(1).selection)["image_id"].to_pylist()
    assert len(set(chosen)) == 12 and len(set(chosen) & set(there)) >= (6 if pca else 10)
    assert store.exists(run.round(1).directions) == (pca is not None)
    width = sum(min(pca or 80, length) for length in run.lengths)
    for name in store.names(run.round(1).descriptors):
        table = run.read(store.join(run.round(1).descriptors, name), descriptors(width, dtype))
        there = finished.read(store.join(finished.round(1).descriptors, name))
        assert table["estimated_label"] == there["estimated_label"] and table["image_id"] == there["image_id"]
    assert run.read(run.round(1).validation) == finished.read(finished.round(1).validation)


def test_a_descriptor_shard_that_nobody_sees_stops_the_run(tmp_path):
    """Workers that write where the driver does not look: an error that names the shard, not an empty shard."""
    run = tiny.begin(tiny.config(), tmp_path / "run")
    loop.do_stage(run, 1, "extract")
    lost = store.names(run.round(1).descriptors)[2]
    store.delete(store.join(run.round(1).descriptors, lost))
    with pytest.raises(RunError, match=f"{lost}: absent, though 128 images were described"):
        origin = descriptor_files.read_centers(run, 1)[2]
        extract._complete_empty(run, 1, [], extract.describe(run, 1, origin, "neighbour"))


def test_a_shard_that_is_lost_or_damaged_is_named_and_alone_made_anew(finished, tmp_path):
    """Gone or truncated when it is scored: named, no candidates, the others kept; made again, the same selection."""
    run = tiny.begin(tiny.config(), tmp_path / "run")
    loop.do_stage(run, 1, "extract")
    files = run.round(1)
    whole, bad = store.paths(files.descriptors), store.paths(files.descriptors)[2]
    half = store.read_bytes(bad)[:5000]
    for damage, message in ((store.delete, "no such file"), (lambda p: store.write_bytes(p, half), "a whole Parquet")):
        damage(bad)
        with pytest.raises(UserError, match=f"{bad}: .*{message}"):
            loop.do_stage(run, 1, "score")
        assert not store.exists(files.candidates) and not run.done(1, "score")
    store.delete(bad)
    store.delete(files.marker("extract"))
    before = _times(files.descriptors)
    for stage in ("extract", "score", "acquire"):
        loop.do_stage(run, 1, stage)
    after = _times(files.descriptors)
    assert store.paths(files.descriptors) == whole and {k: after[k] for k in before} == before
    assert run.read(files.selection) == finished.read(finished.round(1).selection)


def test_a_selected_image_that_the_pool_does_not_hold_is_refused(finished, tmp_path):
    """An id within its shard's range that no pool image has: named before anybody is asked to label it."""
    picked = pick(finished.read(finished.round(1).candidates), 3)
    stray = picked["image_id"][1].as_py() + "x"
    ids = pa.array([picked["image_id"][0].as_py(), stray, picked["image_id"][2].as_py()])
    with pytest.raises(UserError, match=f"no image '{stray}', which was selected"):
        acquire._with_estimates(finished, 1, picked.set_column(0, "image_id", ids))


def test_a_shard_whose_images_are_all_labelled_is_done(tmp_path):
    """Nothing left to describe in a shard: an empty descriptor shard, and a selection from the others."""
    run = tiny.begin(tiny.config(data__shard_rows=32, budget=40), tmp_path / "run")
    for stage in ("extract", "score", "acquire", "label"):
        loop.do_stage(run, 1, stage)
    labels = run.read(run.round(1).labels, LABELS)
    first = run.pool.read_shard(run.pool.shards("pool")[0], ["image_id", "label"])
    swapped = pa.table([first["image_id"], first["label"], pa.array(["simulated"] * 32)], schema=LABELS)
    others = labels.filter(pc.invert(pc.is_in(labels["image_id"], first["image_id"].combine_chunks()))).slice(0, 8)
    run.write(run.round(1).labels, pa.concat_tables([swapped, others.replace_schema_metadata()]))
    store.write_bytes(run.round(1).checkpoint, _as_round_1(run))
    for stage in ("train", "evaluate"):
        run.mark(1, stage, {"seconds": 0})
    for stage in ("extract", "score", "acquire"):
        loop.do_stage(run, 2, stage)
    assert run.read(store.join(run.round(2).descriptors, "00000.parquet")).num_rows == 0
    assert run.done(2, "acquire")["selected"] == 40


def _as_round_1(run: Run) -> bytes:
    state, meta = models.load(store.read_bytes(run.round(0).checkpoint), "checkpoint")
    net = models.build(meta["name"], meta["channels"], meta["classes"], meta["size"], seed=0)
    net.load_state_dict(state)
    return models.save(net, meta | {"round": 1})


def test_same_seed_same_weights(finished, tmp_path):
    """Another run of the same config ends with the same confusion matrix and selection, round by round."""
    again = loop.run(tiny.config(rounds=2), str(tmp_path / "again"))
    for number in (1, 2):
        here, there = (store.read_json(r.round(number).metrics)["confusion"] for r in (again, finished))
        assert here == there
        here, there = (r.read(r.round(number).selection)["image_id"] for r in (again, finished))
        assert here == there


@pytest.mark.parametrize(
    ("strategy", "estimator"),
    [("pcc", "predicted"), ("pfk-sum", "true"), ("pfk", "soft"), ("pfk", "mc-trace"), ("pfk", "mc-information")],
)
def test_every_kernel_and_estimator_selects_the_budget(tmp_path, strategy, estimator):
    """Each kernel and label estimator goes through the same stages; `true` estimates are the hidden labels."""
    out = str(tmp_path / "run")
    chosen = tiny.select(out, strategy=strategy, label_estimator=estimator)
    assert len(set(chosen)) == 12
    run = Run.open(out)
    selection, facts = run.read(run.round(1).selection), run.done(1, "extract")
    if estimator == "true":
        hidden = run.pool.labels_of(chosen)
        assert selection["estimated_label"].to_pylist() == [hidden[i] for i in chosen]
    images, pool = run.pool.rows("pool") + run.pool.rows("validation"), run.pool.rows("pool")
    if estimator.startswith("mc-"):  # 8 samples of each pool image, each with a backward pass for each of 10 classes
        assert (facts["forward"], facts["backward"]) == (images + 8 * pool, images + 80 * pool)
    else:
        assert (facts["forward"], facts["backward"]) == (images, 0 if strategy == "pcc" else images)


def test_monte_carlo_samples_are_an_images_own(tmp_path):
    """Other actors and batch mates: the same labels are estimated by `mc-trace`, from the same samples."""
    tables = []
    for name, changes in (("a", {}), ("b", {"data__shard_rows": 300, "resources": {"extract_actors": 1}})):
        run = tiny.begin(tiny.config(label_estimator="mc-trace", **changes), tmp_path / name)
        loop.do_stage(run, 1, "extract")
        paths = store.paths(run.round(1).descriptors, ".parquet")
        tables.append(pa.concat_tables(run.read(p, columns=["image_id", "estimated_label"]) for p in paths))
    same = pc.equal(*(t["estimated_label"].combine_chunks() for t in tables))
    assert tables[0]["image_id"].to_pylist() == tables[1]["image_id"].to_pylist()
    assert pc.mean(same.cast(pa.int8())).as_py() > 0.99  # a batch's rows are elsewhere, and may round elsewhere
    assert len(pc.unique(tables[0]["estimated_label"])) > 1


def test_monte_carlo_asks_a_network_for_as_many_images_each_time(monkeypatch):
    """Where a batch is too large to be asked at once: the same labels, from parts that are all of one size."""
    net, asked = models.build("lenet", 1, 10, 28, 0), []
    reader = pfk.TapReader(net, ["conv2"])

    def spied(x):
        asked.append(len(x))
        return reader(x)

    describer = object.__new__(methods._Describer)
    describer.reader, describer.classes = spied, 10
    describer.told = methods.Describe(None, (), "mc-trace", True, VoteConfig(), MonteCarloConfig(), seed=0)
    x, rows = torch.randn(7, 1, 28, 28), {"image_id": np.array([f"i{n}" for n in range(7)])}
    whole = describer._monte_carlo(x, rows)
    monkeypatch.setattr(methods, "MONTE_CARLO_NUMBERS", 10 * (20 * 4 * 4 + 8 * 20) * 3)
    asked.clear()
    assert describer._monte_carlo(x, rows).tolist() == whole.tolist() and asked == [1, *[3] * 8 * 3]


@pytest.mark.parametrize(
    ("power", "settings"),
    [
        (1.0, {"label_estimator": "vote", "vote": {"neighbours": 5}}),
        (2.0, {"label_estimator": "vote", "vote": {"neighbours": 5, "power": 2.0}}),
        (2.0, {"label_estimator": "discriminant", "discriminant": {"grid": 1, "classes": 5, "power": 2.0}}),
    ],
)
def test_votes_weigh_the_scores(tmp_path, power, settings):
    """A candidate's score is the kernel times the share of its 5 neighbours that have the center's class, or that
    class's probability where it is one of the 5 likeliest."""
    out = str(tmp_path / "run")
    chosen = tiny.select(out, **settings)
    assert len(set(chosen)) == 12
    run = Run.open(out)
    centers, described, origin = descriptor_files.read_centers(run, 1)
    pool, ids, shares = [], [], {}
    for shard in run.pool.shards("pool"):
        path = store.join(run.round(1).descriptors, shard.name)
        table, part = descriptor_files.read_shard(run, path, shard, origin)
        run.read(path, descriptors(80, votes=5))
        ids += table["image_id"].to_pylist()
        pool.append(part)
        for row in table.to_pylist():
            shares[row["image_id"]] = dict(zip(row["vote_classes"], row["vote_shares"], strict=True))
    assert all(0 < sum(of.values()) < 1 + 1e-6 for of in shares.values())
    assert settings["label_estimator"] != "vote" or all(sum(of.values()) > 1 - 1e-6 for of in shares.values())
    pool = Descriptors(*map(torch.cat, zip(*pool, strict=True)))
    row_of, center_of = ({name: i for i, name in enumerate(names)} for names in (ids, centers["image_id"].to_pylist()))
    labels, candidates = centers["label"].to_pylist(), run.read(run.round(1).candidates).to_pylist()
    rows = torch.tensor([center_of[c["center_id"]] for c in candidates])
    scores = run.kernel().pairs(described, pool, rows, torch.tensor([row_of[c["image_id"]] for c in candidates]))
    for candidate, row, score_ in zip(candidates, rows.tolist(), scores.tolist(), strict=True):
        share = shares[candidate["image_id"]].get(labels[row], 0.0)
        assert candidate["score"] == pytest.approx(score_ * share**power, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("estimator", ["vote", "discriminant"])
def test_labels_by_places_of_the_image(tmp_path, estimator):
    """`grid`: labels are estimated by grid features, of one network for the validation set and the pool alike."""
    settings = {"vote": {"neighbours": 5, "grid": 3}, "discriminant": {"grid": 3, "shrinkage": 0.1}}
    run = tiny.begin(tiny.config(label_estimator=estimator, **settings), tmp_path / "run")
    loop.do_stage(run, 1, "extract")
    network = stream.network_of(run, 0)
    reader, taps = TapReader(network.load()[0], run.config.model.taps), run.config.model.taps
    assert run.grid_lengths == (10 * 9, 20 * 1, 50) and len(taps) == 3  # conv2 has one place left of 16 x 16 pixels

    def described(split: str) -> tuple[torch.Tensor, list[str]]:
        found, ids = [], []
        for shard in run.pool.shards(split):
            batch = stream.Decoder(run.pool, run.image)({"item": [shard]})
            parts = []
            for rows, x in stream.batches(batch["image"], run.image, run.config.model.batch_size, torch.device("cpu")):
                parts.append(pfk.standardise(pfk.grid_features(reader(x)[1], 3)[0], run.grid_lengths)[:rows])
            found.append(torch.cat(parts))
            ids += batch["image_id"].tolist()
        return torch.cat(found), ids

    table, _, _ = descriptor_files.read_validation(run, 1)
    trusted, ids = described("validation")
    assert table["image_id"].to_pylist() == ids and descriptor_files.read_grid(run, 1).equal(trusted)
    pool, ids = described("pool")
    labels = torch.from_numpy(table["label"].to_numpy().copy())
    if estimator == "vote":
        voted = pfk.vote(pool, trusted, labels, pfk.Kernel("pcc", run.grid_lengths), 5)
    else:
        voted = pfk.fit_discriminant(trusted, labels, run.classes, 0.1).vote(pool, run.classes)
    expected = voted.labels.tolist()
    paths = store.paths(run.round(1).descriptors, ".parquet")
    estimated = pa.concat_tables(run.read(p, columns=["image_id", "estimated_label"]) for p in paths)
    assert dict(zip(ids, expected, strict=True)) == dict(zip(*estimated.to_pydict().values(), strict=True))


@pytest.mark.parametrize("candidates", [score._CANDIDATES, 300])
def test_candidates_that_run_out_grow(tmp_path, monkeypatch, candidates):
    """Where a short list runs out K grows, for all centers at once or for few at a time: the picks of a full list."""
    run = tiny.begin(tiny.config(top_k=1, budget=60), tmp_path / "run")
    for stage in ("extract", "score"):
        loop.do_stage(run, 1, stage)
    expected = score.picks(run, 1, run.pool.rows("pool"), 60)
    assert expected.num_rows == 60 and expected["rank"].to_pylist()[-1] > 0
    short = run.read(run.round(1).candidates).filter(pc.field("rank") == 0)
    run.write(run.round(1).candidates, short)  # as if K had been 1
    run.mark(1, "score", {**run.done(1, "score"), "k": 1})
    monkeypatch.setattr(score, "_CANDIDATES", candidates)
    loop.do_stage(run, 1, "acquire")
    assert run.done(1, "acquire")["rescans"] > 0
    assert run.read(run.round(1).selection).select(expected.column_names).equals(expected)


def test_an_exhausted_pool_ends_the_run(tmp_path):
    """The last round takes what is left, fewer than P, and no round follows."""
    settings = tiny.config(budget=500, rounds=4, train__epochs=1, strategy="random")
    run = loop.run(settings, str(tmp_path / "run"))
    bought = [run.done(n, "acquire")["selected"] for n in (1, 2)]
    assert sum(bought) == run.pool.rows("pool") and bought[1] < 500
    assert not run.done(3, "extract")


def test_a_persons_labels(tmp_path):
    """oracle: file waits with a list to fill in, refuses answers for other images, takes names or indices."""
    settings = tiny.config(oracle="file", strategy="random")
    out = str(tmp_path / "run")
    with pytest.raises(WaitingForLabels, match="to_label.csv"):
        loop.run(settings, out)
    run = Run.open(out)
    files, chosen = run.round(1), run.read(run.round(1).selection)["image_id"].to_pylist()
    assert store.read_bytes(files.to_label).decode().count("\n") == 13
    store.write_bytes(files.answers, b"image_id,label\nnobody,3\n")
    with pytest.raises(UserError, match="'nobody' was not selected in round 1"):
        loop.run(settings, out)
    store.write_bytes(files.answers, ("image_id,label\n" + "".join(f"{i},3\n" for i in chosen[:-1])).encode())
    with pytest.raises(UserError, match=f"{chosen[-1]}.*found no label"):
        loop.run(settings, out)
    store.write_bytes(files.answers, ("image_id,label\n" + "".join(f"{i},3\n" for i in chosen)).encode())
    loop.run(settings, out)
    assert run.read(files.labels)["label"].to_pylist() == [3] * 12


def test_files_of_another_run_are_refused(finished, tmp_path):
    """A selection, labels or checkpoint copied from another run is refused, naming both runs."""
    other = tiny.begin(tiny.config(), tmp_path / "other")
    store.write_bytes(other.round(0).checkpoint, store.read_bytes(finished.round(0).checkpoint))
    with pytest.raises(UserError, match=f"{finished.id}.*{other.id}"):
        loop.do_stage(other, 1, "extract")
    store.write_bytes(other.round(1).selection, store.read_bytes(finished.round(1).selection))
    for stage in ("extract", "score", "acquire"):
        other.mark(1, stage, {"seconds": 0})
    with pytest.raises(UserError, match=f"{finished.id}.*{other.id}"):
        loop.do_stage(other, 1, "label")


def _times(folder: str) -> dict[str, int]:
    from pathlib import Path

    return {str(p): p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file() and p.name != "run.json"}
