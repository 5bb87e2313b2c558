"""Experiments: cells by seeds, side by side, on pools and weights that they share."""

import os
from dataclasses import replace

import pyarrow.csv
import pytest
import ray
import yaml

from raypfk import config as configs
from raypfk import experiment, loop, session, store, study
from raypfk.errors import RunError, UserError, WaitingForLabels
from raypfk.run import Run
from raypfk.schema import SELECTION
from raypfk.stages import pool as pools
from raypfk.stages import train
from tests import tiny
from tests.folders import folder, tree

CELLS = {
    "random": {"set": {"strategy": "random"}},
    "pfk, votes": {"set": {"label_estimator": "vote", "train.epochs": 2}},
    "too fast": {"set": {"strategy": "random", "train.lr": 1e9}},
}
PRETRAIN = {"epochs": 1, "batch_size": 64, "lr": 0.05}


def files(folder, **fields) -> str:
    """An experiment's YAML file beside its base, with changes; a field of None is left out."""
    (folder / "base.yaml").write_text(yaml.safe_dump({**tiny.TREE, "pretrain": PRETRAIN}))
    tree = {"title": "Tiny", "base": "base.yaml", "seeds": [3], "set": {"rounds": 1}, "cells": CELLS, **fields}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in tree.items() if value is not None}, sort_keys=False))
    return str(path)


def refuse(plan: experiment.Plan, out: str) -> None:
    experiment._refuse_others(plan, experiment._begun(plan, out), out)


@pytest.fixture(scope="module")
def done(tmp_path_factory, ray_session):
    """(directory, plan, error) of the experiment of `files`, run to its end."""
    folder = tmp_path_factory.mktemp("experiment")
    plan, out = experiment.load(files(folder), {}), str(folder / "out")
    with pytest.raises(RunError) as error:
        experiment.run(plan, out, 2, "raypfk experiment")
    return out, plan, str(error.value)


def test_a_cell_is_the_run_it_would_be_alone(done, tmp_path):
    """Shared pool, adopted pretraining and neighbours change nothing: the same selection, labels and accuracy."""
    out, plan, _ = done
    job = plan.jobs[1]
    shared, alone = Run.open(study.run_dir(out, job.cell, job.seed)), loop.run(job.config, str(tmp_path / "run"))
    assert shared.done(0, "train")["adopted"].startswith(store.join(out, "starts"))
    selections = [run.read(run.round(1).selection, SELECTION).to_pydict() for run in (shared, alone)]
    assert selections[0] == selections[1]
    metrics = [store.read_json(run.round(1).metrics) for run in (shared, alone)]
    assert metrics[0]["confusion"] == metrics[1]["confusion"]


def test_one_failure_stops_nobody_else(done):
    """A diverging cell is named with its reason; the others are in the results, all columns filled."""
    out, _, error = done
    assert error.startswith("1 of 4 tasks failed") and "too fast, seed 3: " in error and "diverged" in error
    rows = study.table(study.open_study(out)).to_pylist()
    assert [(row["cell"], row["seed"], row["round"], row["bought"]) for row in rows] == [
        ("random", 3, 1, 12), ("pfk, votes", 3, 1, 12),
    ]  # fmt: skip
    pfk = rows[1]
    assert pfk["validation_labels"] == 300 and len(pfk["per_class_accuracy"]) == 10
    for share in ("test_accuracy", "minority_accuracy", "minority_share", "selected_estimates", "pool_estimates"):
        assert 0 <= pfk[share] <= 1
    assert rows[0]["minority_share"] is not None and rows[0]["pool_estimates"] is None
    assert pfk["forward"] == pfk["backward"] == 300 + Run.open(study.run_dir(out, "pfk, votes", 3)).pool.rows("pool")


@pytest.mark.parametrize("retries, tries", [(0, 1), (1, 2), (5, 3)])
def test_a_failed_task_is_tried_again(ray_session, tmp_path, retries, tries):
    """As often as `retries` says, or until it succeeds: here the third time."""
    log = tmp_path / "tries"

    @ray.remote
    def third_time_lucky(others: int) -> None:
        with open(log, "a") as file:
            file.write("x")
        if log.stat().st_size < 3:
            raise RunError("not yet")

    task = experiment.Task("lucky", str(tmp_path), 0, third_time_lucky, (), None)
    failed, waiting = experiment._side_by_side([task], 1, retries, lambda: None)
    assert log.stat().st_size == tries and not waiting
    assert {name: str(error) for name, error in failed.items()} == ({} if tries == 3 else {"lucky": "not yet"})


def test_results_are_files(done):
    """results.parquet is the table, results.csv the same with a column for each class."""
    out, _, _ = done
    rows = store.read_table(store.join(out, "results.parquet"), schema=study.TABLE)
    assert rows.equals(study.table(study.open_study(out)))
    flat = pyarrow.csv.read_csv(os.path.join(out, "results.csv"))
    assert flat["cell"].to_pylist() == ["random", "pfk, votes"]
    assert [flat[f"accuracy_{c}"][1].as_py() for c in range(10)] == rows["per_class_accuracy"][1].as_py()


def test_what_is_done_is_not_done_again(done, tmp_path):
    """The same command again, for cells that are done: no file of theirs is written."""
    out, plan, _ = done
    good = replace(plan, jobs=plan.jobs[:2])
    watched = ("rounds/000/checkpoint/model.pt", "rounds/001/descriptors", "rounds/001/checkpoint/model.pt")
    paths = [os.path.join(study.run_dir(out, "pfk, votes", 3), name) for name in watched]
    before = [os.stat(path).st_mtime_ns for path in paths]
    experiment.run(good, out, 2, "raypfk experiment")
    assert [os.stat(path).st_mtime_ns for path in paths] == before


def test_experiments_share_a_directory(done, tmp_path):
    """A cell of the same name and configuration is another experiment's run."""
    out, plan, _ = done
    marker = os.path.join(study.run_dir(out, "pfk, votes", 3), "rounds/001/done/evaluate.json")
    before = os.stat(marker).st_mtime_ns
    cells = {"pfk, votes": CELLS["pfk, votes"]}
    other = experiment.load(files(tmp_path, title="Other", cells=cells), {})
    experiment.run(other, out, 2, "raypfk experiment")
    assert os.stat(marker).st_mtime_ns == before
    found = study.open_study(out)
    store.write_json(store.join(out, study.RECORD), plan.record)
    assert found.title == "Other" and [cell.name for cell in found.cells] == list(cells)


def test_a_cell_that_was_changed_is_refused_before_anything_is_done(done, tmp_path):
    """Whichever seeds are asked for: what it was would stand beside what it is. What may change is no change."""
    out, plan, _ = done
    record = store.read_json(store.join(out, study.RECORD))
    cells = {"pfk, votes": CELLS["pfk, votes"], "random": {"set": {"strategy": "random", "budget": 13}}}
    other = experiment.load(files(tmp_path, title="Other", cells=cells), {}, seeds="4")
    with pytest.raises(UserError, match="random/seed-003 holds another run: budget: 12 there, 13 now\n.*another name"):
        experiment.run(other, out, 2, "raypfk experiment")
    assert store.read_json(store.join(out, study.RECORD)) == record
    free = {"data.max_rejects": 0.5, "pretrain.threads": 2, "train.checkpoint_every": 7}
    same = experiment.load(files(tmp_path), free)
    assert [experiment._on_pool(job, out).config.data.pool for job in same.jobs] == [
        experiment._on_pool(job, out).config.data.pool for job in plan.jobs
    ]
    starts = [experiment._start(experiment._on_pool(p.jobs[0], out), "", out).uri for p in (same, plan)]
    assert starts[0] == starts[1]
    refuse(same, out)
    cells = {**CELLS, "random": {"set": {"strategy": "random", "train.epochs": 9}}}
    apart = experiment.load(files(tmp_path, cells=cells), {"budget": 99}, only=("too fast",), seeds="5")
    with pytest.raises(UserError, match="too_fast/seed-003 holds another run: budget: 12 there, 99 now"):
        refuse(apart, out)  # and nothing about `random`, which was not asked for


def test_a_seed_that_is_not_asked_for_may_have_more_rounds(done, tmp_path):
    out, _, _ = done
    path = os.path.join(study.run_dir(out, "random", 3), "run.json")
    record = store.read_json(path)
    store.write_json(path, record | {"config": record["config"] | {"rounds": 2}})
    refuse(experiment.load(files(tmp_path), {}, only=("random",), seeds="4"), out)
    with pytest.raises(UserError, match="rounds: 2 there, 1 now"):
        refuse(experiment.load(files(tmp_path), {}, only=("random",), seeds="3"), out)
    store.write_json(path, record)


def test_settings_of_one_cell_are_its_own(tmp_path):
    """A whole section, set for all cells, does not hand on what one cell sets in it, to other cells or seeds."""
    cells = {"a": {}, "b": {"set": {"vote.power": 2.0}}, "c": {}}
    plan = experiment.load(files(tmp_path, seeds=[0, 1], set={"vote": {"neighbours": 5}}, cells=cells), {})
    powers = {str(job): (job.config.vote.neighbours, job.config.vote.power) for job in plan.jobs}
    assert powers == {f"{c}, seed {s}": (5, 2.0 if c == "b" else 1.0) for s in (0, 1) for c in "abc"}


def test_a_person_labels(ray_session, tmp_path):
    """Runs that wait for labels have not failed: all go as far as they can, and what is to be filled in is said."""
    cells = {"random": CELLS["random"], "margin": {"set": {"strategy": "margin"}}}
    out = str(tmp_path / "out")
    plan = experiment.load(files(tmp_path, cells=cells), {"oracle": "file"})
    with pytest.raises(WaitingForLabels) as waiting:
        experiment.run(plan, out, 2, "raypfk experiment")
    for cell in cells:
        assert f"{cell}, seed 3: 12 images wait for a label: fill in {study.run_dir(out, cell, 3)}" in str(
            waiting.value
        )
    (start,) = os.listdir(os.path.join(out, "starts"))
    assert Run.open(os.path.join(out, "starts", start)).config.oracle == "file"  # which needs no hidden labels


def test_a_pool_that_grows_is_taken_as_it_was(ray_session, tmp_path):
    """A cell that is added later has the images, and the weights, of those that were there before."""
    source = folder(tree(tmp_path / "in"), validation=8, test=6)
    pool = pools.build(source, str(tmp_path / "pool"), 0)
    settings = {"data": {"pool": pool.uri}, "image": {"size": 16, "resize": 16, "channels": 3}, "budget": 2}
    out = str(tmp_path / "out")

    def runs(**cells) -> list[Run]:
        experiment.run(experiment.load(files(tmp_path, cells=cells), settings), out, 2, "raypfk experiment")
        return [run for _, _, run in study.open_study(out).runs()]

    (first,) = runs(random=CELLS["random"])
    tree(tmp_path / "in", 20)
    grown = pools.build(source, pool.uri, 0, grow=True)
    before, added = runs(random=CELLS["random"], fast={"set": {"strategy": "random", "train.lr": 0.1}})
    assert added.pool.fingerprint == before.pool.fingerprint == first.pool.fingerprint != grown.fingerprint
    other = Run.create_or_open(first.config, str(tmp_path / "other"), grown)
    with pytest.raises(UserError, match="expected weights of the pool"):
        train.adopt(other, first)


def test_an_unfinished_experiment_says_what_is_missing(done, tmp_path):
    out, plan, _ = done
    store.write_json(store.join(out, study.RECORD), experiment.load(files(tmp_path), {}, seeds="4,5").record)
    found = study.open_study(out)
    store.write_json(store.join(out, study.RECORD), plan.record)
    assert found.missing == [(cell, seed) for cell in CELLS for seed in (4, 5)]
    assert [cell.seeds for cell in found.cells] == [[3, 4, 5]] * 3  # of the seed that was asked for before is all there
    assert study.table(found).equals(study.table(study.open_study(out)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cells": {"a/b": {}}}, "cells: expected names of letters.*found 'a/b'"),
        ({"cells": {}}, "cells"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds: expected each seed once, found .1, 1."),
        ({"strategies": ["pfk"]}, "strategies: unknown key"),
        ({"title": None}, "title: missing"),
        ({"cells": {"a": {"set": {"strategy": "pkf"}}}}, "strategy: .*'pkf'"),
        ({"cells": {"a": {"set": {"budget.x": 1}}}}, "budget.x: 'budget' is a value"),
        ({"set": {"nothing": 1}}, "nothing: unknown key"),
        ({"base": "absent.yaml"}, "absent.yaml: cannot be read"),
        ({"cells": {"a b": {}, "a_b": {}}}, "cells: 'a b' and 'a_b' would have one folder, a_b"),
        ({"figure": "4x"}, "figure: expected one of 4b, .*found '4x'"),
        ({"figure": "4b", "cells": {"a": {"published": "PFK"}}}, "cells.a.published: expected a curve .*, VAAL.*'PFK'"),
        ({"cells": {"a": {"published": "random"}}}, r"cells.a.published: .*\(it has none\), found 'random'"),
    ],
)
def test_a_bad_experiment_is_refused(tmp_path, fields, message):
    """Before anything runs, by one message that names the field."""
    with pytest.raises(UserError, match=message):
        experiment.load(files(tmp_path, **fields), {})


def test_what_is_to_be_run_can_be_chosen(tmp_path):
    """--cell, --seeds and --set; runs come seed by seed."""
    path = files(tmp_path, seeds=[0, 1])
    plan = experiment.load(path, {"rounds": 5}, ("random", "too fast"), "1,7")
    assert [(job.cell, job.seed) for job in plan.jobs] == [
        ("random", 1), ("too fast", 1), ("random", 7), ("too fast", 7),
    ]  # fmt: skip
    assert {job.config.rounds for job in plan.jobs} == {5}
    assert {name: cell["seeds"] for name, cell in plan.record["cells"].items()} == {name: [1, 7] for name in CELLS}
    with pytest.raises(UserError, match="--cell pfk: expected one of 'random'"):
        experiment.load(path, {}, ("pfk",))
    with pytest.raises(UserError, match="--seeds x: expected whole numbers"):
        experiment.load(path, {}, (), "x")


def test_a_dear_cell_may_be_run_on_some_seeds(tmp_path):
    """And is not missing on the others, whichever are asked for."""
    path = files(tmp_path, seeds=[0, 1], cells={"random": CELLS["random"], "dear": {**CELLS["random"], "seeds": [1]}})
    assert [(job.cell, job.seed) for job in experiment.load(path, {}).jobs] == [
        ("random", 0), ("random", 1), ("dear", 1),
    ]  # fmt: skip
    plan = experiment.load(path, {}, (), "1,7")
    assert [(job.cell, job.seed) for job in plan.jobs] == [("random", 1), ("dear", 1), ("random", 7)]
    store.write_json(str(tmp_path / "out" / study.RECORD), plan.record)
    assert study.open_study(str(tmp_path / "out")).missing == [("random", 1), ("random", 7), ("dear", 1)]
    with pytest.raises(UserError, match="--seeds 7: none is among the seeds of 'dear'"):
        experiment.load(path, {}, ("dear",), "7")


def test_experiments_that_come_with_it_are_valid():
    """Each file of configs/experiments, with a place for its data, says runs that can be."""
    folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs", "experiments")
    for name in sorted(os.listdir(folder)):
        settings = {} if name == "digits.yaml" else {"data.root": "/data"}
        assert experiment.load(os.path.join(folder, name), settings).jobs


def test_a_share_of_the_cluster(ray_session, monkeypatch):
    """A process beside three others has a quarter of the CPUs, and at least one."""
    all_of_them = session.cpus()
    monkeypatch.setattr(session, "_sharers", 4)
    assert session.cpus() == max(1, all_of_them // 4)
    assert configs.assigned(("a.b=1e-1", "c=[x]")) == {"a.b": 0.1, "c": ["x"]}
