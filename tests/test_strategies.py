"""Every strategy through the same stages, on real images: what is chosen, from what, and by whom it may be lost."""

import math
import os
import sys

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from raypfk import descriptor_files, loop, models, pfk, store, strategies
from raypfk.errors import UserError
from raypfk.pfk import Kernel, uncertainty
from raypfk.pfk import greedy as parts
from raypfk.run import Run
from raypfk.schema import LABELS, SCORES, SELECTION, last_layers
from raypfk.stages import extract, greedy
from raypfk.stages.train import _meta
from raypfk.verify import verify
from tests import tiny

pytestmark = pytest.mark.usefixtures("ray_session")

DROPOUT = {"model__dropout": 0.5, "uncertainty": {"passes": 4}}
SETTINGS = {
    "random": {},
    "class-balanced": {},
    "variation-ratio": DROPOUT,
    "max-entropy": {"uncertainty": {"members": 2}},
    "bald": DROPOUT,
    "margin": {},
    "least-confidence": {},
    "core-set": {},
    "badge": {},
    "similar": {},
}
ELSEWHERE = {"pfk", "pfk-sum", "pcc", "vaal"}  # test_loop.py, test_vaal.py


def test_every_strategy_is_tried_here():
    assert set(SETTINGS) | ELSEWHERE == set(strategies.names())


@pytest.fixture(scope="module")
def pool(tmp_path_factory, ray_session) -> str:
    """Of tiny.TREE, built once."""
    from raypfk.stages.pool import build

    settings = tiny.config()
    return build(settings.data, str(tmp_path_factory.mktemp("pools") / "digits"), settings.seed).uri


def start(pool: str, out, strategy: str, **changes) -> Run:
    """A run of the strategy on the pool, with its initial weights."""
    changes = {**SETTINGS.get(strategy, {}), **changes}
    return tiny.begin(tiny.config(data={"pool": pool}, strategy=strategy, **changes), out)


def select(run: Run, round: int = 1) -> list[str]:
    for stage in ("extract", "score", "acquire"):
        loop.do_stage(run, round, stage)
    return run.read(run.round(round).selection, SELECTION)["image_id"].to_pylist()


@pytest.mark.parametrize("strategy", ["class-balanced", "bald", "core-set", "similar"])
def test_two_rounds_verify(pool, tmp_path, strategy):
    """12 images a round, none twice; `verify` finds nothing wrong with what was written."""
    run = start(pool, tmp_path / "run", strategy, rounds=2, train__epochs=1)
    loop.run(run.config, run.uri)
    labels = run.labelled(3)
    assert labels.num_rows == 24 and len(set(labels["image_id"].to_pylist())) == 24
    assert verify(run.uri) == []


@pytest.mark.parametrize("strategy", ["class-balanced", "variation-ratio"])
def test_the_selection_does_not_depend_on_actors(pool, tmp_path, strategy):
    """One actor or three: the same images in the same order. (Of holders: test_holders_choose_what_one_part_would.)"""
    few, many = ({"extract_actors": n, "score_actors": n} for n in (1, 3))
    first = select(after_a_round(start(pool, tmp_path / "few", strategy, resources=few)), 2)
    assert first == select(after_a_round(start(pool, tmp_path / "many", strategy, resources=many)), 2)
    assert len(set(first)) == 12


def table_of(run: Run, schema: pa.Schema, round: int = 1) -> pa.Table:
    paths = store.paths(run.round(round).descriptors, ".parquet")
    return pa.concat_tables(run.read(path, schema) for path in paths).combine_chunks()


@pytest.mark.parametrize("strategy", ["variation-ratio", "vaal"])
def test_the_first_round_is_drawn_by_chance(pool, tmp_path, strategy):
    """The images that `random` draws: a network that no image has taught says nothing."""
    run = start(pool, tmp_path / "run", strategy)
    assert select(run) == select(start(pool, tmp_path / "random", "random"))
    assert "no image is labelled yet" in run.done(1, "extract")["skipped"]


@pytest.mark.parametrize("strategy", ["margin", "max-entropy", "least-confidence"])
def test_the_largest_scores_are_selected(pool, tmp_path, strategy):
    """The selection is that of all scores sorted, each with the class that was predicted, and no center."""
    run = after_a_round(start(pool, tmp_path / "run", strategy))
    chosen = select(run, 2)
    table = table_of(run, SCORES, 2)
    score = table["score"].to_numpy()
    best = table.take(pa.array(np.argsort(-score, kind="stable")[:12]))["image_id"].to_pylist()
    assert set(best) == set(chosen) and len(np.unique(score)) > 600
    selection = run.read(run.round(2).selection)
    assert selection["score"].to_pylist() == sorted(selection["score"].to_pylist(), reverse=True)
    assert selection["center_id"].null_count == 12 == selection["rank"].null_count
    predicted = dict(zip(table["image_id"].to_pylist(), table["predicted"].to_pylist(), strict=True))
    assert selection["estimated_label"].to_pylist() == [predicted[i] for i in chosen]


def test_passes_are_counted(pool, tmp_path):
    """An ensemble of 2, 4 passes of dropout each: 2 forward passes an image, 8 from the first dropout, no backward."""
    run = after_a_round(start(pool, tmp_path / "run", "bald", uncertainty={"passes": 4, "members": 2}))
    select(run, 2)
    images, facts = run.pool.rows("pool") - 12, run.done(2, "extract")
    assert (facts["forward"], facts["backward"], facts["after_dropout"]) == (2 * images, 0, 8 * images)


def test_members_are_other_networks(pool, tmp_path):
    """An ensemble's members begin with other weights, train to others, and the first is what a single one would be."""
    both, one = (
        start(pool, tmp_path / str(n), "max-entropy", uncertainty={"members": n}, train__epochs=1) for n in (2, 1)
    )
    for run in (both, one):
        label_twelve(run)
        for stage in ("extract", "score", "acquire", "label"):  # as if they were done
            run.mark(1, stage, {"seconds": 0.0})
        loop.do_stage(run, 1, "train")
        assert not store.exists(run.round(1).training) and not store.exists(run.round(1).training_of(1))
    for number in (0, 1):
        first, second, alone = (read_weights(*of) for of in ((both, number, 0), (both, number, 1), (one, number, 0)))
        assert not torch.equal(first, second) and torch.equal(first, alone)


def label_twelve(run: Run) -> None:
    """As if round 1 had selected the first images of the second shard."""
    labels = run.pool.read_shard(run.pool.shards("pool")[1], ["image_id", "label"])[:12]
    run.write(run.round(1).labels, labels.append_column("source", pa.array(["simulated"] * 12)).cast(LABELS))


def after_a_round(run: Run) -> Run:
    """As if round 1 had labelled twelve images and trained the ensemble."""
    label_twelve(run)
    for member in range(run.members):
        weights = models.save(run.architecture.build(5 + member), _meta(run, 1, member))
        store.write_bytes(run.round(1).checkpoint_of(member), weights)
    for stage in loop.STAGES:
        run.mark(1, stage, {"seconds": 0.0})
    return run


def read_weights(run: Run, number: int, member: int) -> torch.Tensor:
    path = run.round(number).checkpoint_of(member)
    return torch.cat([w.flatten() for w in models.load(store.read_bytes(path), path)[0].values()])


def test_an_uncertainty_of_one_prediction_is_refused(pool, tmp_path):
    """`bald` of a network without dropout, alone, would score everything 0: the error says what to set."""
    for passes in ({}, {"uncertainty": {"passes": 1}, "model__dropout": 0.0}):
        with pytest.raises(UserError, match=r"strategy: 'bald' compares predictions of the same image: set"):
            tiny.begin(tiny.config(data={"pool": pool}, strategy="bald", **passes), tmp_path / "run")


def test_samples_that_are_all_the_same_are_refused(pool, tmp_path):
    """By `mc-trace` every class would be as good as another; where no samples are drawn nobody minds."""
    same = {"data": {"pool": pool}, "monte_carlo": {"rotation": 0, "noise": 0}}
    with pytest.raises(UserError, match="monte_carlo: samples that are all the same tell no class"):
        tiny.begin(tiny.config(label_estimator="mc-trace", **same), tmp_path / "run")
    tiny.config(**same)


@pytest.mark.parametrize("strategy", ["core-set", "badge", "similar"])
def test_holders_choose_what_one_part_would(pool, tmp_path, strategy):
    """The second round's choice by actors is that of the mathematics on all of the pool's gradients at once."""
    run = after_a_round(start(pool, tmp_path / "run", strategy))
    select(run, 2)
    origin = descriptor_files.full_origin(run, extract.network_of(run, 1).weights)
    assert origin.lengths == (10, 50)
    files, vectors, ids = run.round(2), [], []
    for shard in run.pool.shards("pool"):
        path = files.described(shard.name)
        run.read(path, last_layers(10, 50))
        table, part = descriptor_files.read_shard(run, path, shard, origin)
        vectors.append(part)
        ids += table["image_id"].to_pylist()
    own = greedy.salts(ids, run.seed("greedy", 2)).view(np.int64)
    given = greedy._given(run, 2, origin)
    part = run.strategy(greedy._joined(vectors), torch.arange(len(ids)), torch.from_numpy(own), **given)
    expected = [ids[proposal.key] for proposal in parts.choose([part], 12)]
    assert run.read(files.selection)["image_id"].to_pylist() == expected
    if strategy == "core-set":
        assert len(given["labelled"].hidden) == 12
    if strategy == "similar":
        missed = run.read(files.validation)["missed"].to_numpy()
        assert len(given["misses"].hidden) == missed.sum() > 0


def test_a_score_that_float32_has_no_number_for_is_its_lowest():
    """Of an image that is the same as one that `badge` has chosen; -inf stays what a vector that is not finite has."""
    found = np.array([greedy._narrow(value) for value in (-2.9e299, -math.inf, -1.5)], np.float32)
    assert found.tolist() == [np.finfo(np.float32).min, -math.inf, -1.5]


def test_gradients_are_those_of_the_last_layer(pool, tmp_path):
    """slope and hidden, outer product: what autograd finds for the last layer's weights with the predicted class."""
    run = start(pool, tmp_path / "run", "badge")
    loop.do_stage(run, 1, "extract")
    network = extract.network_of(run, 0)
    net, _ = network.load()
    net.requires_grad_(True)
    shard = run.pool.shards("pool")[0]
    decoder = extract.Decoder(run.pool, run.image)
    images = decoder({"item": np.array([shard], object)})["image"][:3]
    (_, x), *_ = extract.batches(images, run.image, 3, torch.device("cpu"))
    origin = descriptor_files.full_origin(run, network.weights)
    path = run.round(1).described(shard.name)
    _, found = descriptor_files.read_shard(run, path, shard, origin)
    for i in range(3):
        logits = net(x[i : i + 1])
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
        (wanted,) = torch.autograd.grad(loss, net.fc2.weight)
        torch.testing.assert_close(torch.outer(found.slope[i], found.hidden[i]), wanted, rtol=1e-4, atol=1e-6)


def test_a_lost_holder_begins_anew(pool, tmp_path):
    """A holder that dies between two choices is restarted, told all choices, and the selection is the same."""
    run = start(pool, tmp_path / "run", "badge")
    expected = select(run)

    class Dying(greedy.Holder):
        def propose(self, first, chosen):
            marker = str(tmp_path / "died")
            if len(chosen) and first + len(chosen) == 5 and not os.path.exists(marker):
                open(marker, "w").close()
                os._exit(1)
            return super().propose(first, chosen)

    origin = descriptor_files.full_origin(run, extract.network_of(run, 0).weights)
    actor = ray.remote(Dying).options(num_cpus=1, max_restarts=4, max_task_retries=4)
    numbers = list(range(len(run.pool.shards("pool"))))
    holders = [actor.remote(run, 1, origin, numbers[i::2], {}) for i in range(2)]
    chosen = greedy._choose(holders, 12)
    folder = run.round(1).descriptors
    keys = np.array([proposal.key for proposal in chosen])
    ids = greedy.ids_of(keys, [store.join(folder, shard.name) for shard in run.pool.shards("pool")])
    assert os.path.exists(tmp_path / "died") and ids.to_pylist() == expected


def test_ones_own_strategy_needs_no_change_here(pool, tmp_path, monkeypatch):
    """`package.module:function`: a function of any module under one of the decorators is a strategy like the others."""
    module = type(sys)("somebodys")
    module.darkest = strategies.by_predictions()(lambda logits_TND: -logits_TND.double().mean(0)[:, 0].float())
    monkeypatch.setitem(sys.modules, "somebodys", module)
    assert strategies.named("somebodys:darkest").name == "somebodys:darkest"
    place = "tests.own_strategy:most_alike"
    run = start(pool, tmp_path / "run", place)
    assert len(select(run)) == 12 and run.strategy.name == place


@pytest.mark.parametrize(
    ("decorated", "message"),
    [
        (strategies.by_kernel(lambda lengths, weight: "pfk"), "expected a pfk.Kernel of the lengths .*, found str"),
        (strategies.by_kernel(lambda lengths, weight: Kernel("pfk", (1,))), "of the lengths .*found Kernel"),
        (
            strategies.by_kernel(lambda lengths, weight: Kernel("pfk", lengths, (1.0,))),
            "ValueError: expected . weights",
        ),
        (strategies.by_predictions()(lambda logits: logits.mean(0)), r"\(N,\), found Tensor \(3, 10\) torch.float32"),
        (strategies.by_predictions()(lambda logits: logits.mean(0).argmax(1)), r"found Tensor \(3,\) torch.int64"),
        (strategies.by_gradients()(lambda vectors, keys, salts: vectors), "a pfk.greedy.Part, found LastLayer"),
        (strategies.by_gradients("misses")(lambda vectors, keys, salts: 1), "TypeError: .*'misses'"),
        (strategies.by_adversary(lambda logits: 1 / 0), "ZeroDivisionError: division by zero"),
        (strategies.by_chance("classes")(lambda counts: counts), "a weight for each class.*torch.int64"),
    ],
)
def test_ones_own_strategy_is_rehearsed(pool, tmp_path, monkeypatch, decorated, message):
    """Before anything is done: one that fails, or returns something else, is refused by its name."""
    module = type(sys)("somebodys")
    module.own = decorated
    monkeypatch.setitem(sys.modules, "somebodys", module)
    with pytest.raises(UserError, match=f"strategy: 'somebodys:own': .*{message}"):
        start(pool, tmp_path / "run", "somebodys:own")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("psychic", "strategy: expected badge, bald, .* or package.module:function, found 'psychic'"),
        ("no.such.module:f", "strategy: 'no.such.module:f': ModuleNotFoundError: No module named 'no'"),
        ("raypfk.store:join", "strategy: 'raypfk.store:join': expected a function under by_kernel, .* found function"),
        ("raypfk.store:nothing", "found NoneType"),
    ],
)
def test_no_strategy_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        strategies.named(name)


def test_classes_have_the_same_chance(pool, tmp_path):
    """`class-balanced` by true labels: of 5 rare and 5 common classes about as many are drawn, by `random` few."""
    shares = {}
    for strategy in ("class-balanced", "random"):
        run = start(pool, tmp_path / strategy, strategy, label_estimator="true", budget=60)
        hidden = run.pool.labels_of(select(run))
        shares[strategy] = np.mean([label >= 5 for label in hidden.values()])
    assert shares["class-balanced"] > 0.35 > 0.25 > shares["random"]


def test_a_hybrid_spends_a_share_elsewhere(pool, tmp_path):
    """9 of 12 images are those of `pfk` with a budget of 9, then 3 others at random, which no center asked for."""
    alone = select(start(pool, tmp_path / "alone", "pfk", budget=9))
    run = start(pool, tmp_path / "run", "pfk", elsewhere={"share": 0.25})
    chosen = select(run)
    table = run.read(run.round(1).selection, SELECTION)
    assert chosen[:9] == alone and len(set(chosen)) == 12
    assert table["center_id"].is_null().to_pylist() == table["score"].is_null().to_pylist() == [False] * 9 + [True] * 3
    assert not table["estimated_label"].null_count
    loop.do_stage(run, 1, "label")
    assert verify(run.uri) == []


@pytest.mark.parametrize(
    "strategy, elsewhere, message",
    [
        ("pfk", "margin", "expected random or another by chance, found 'margin'"),
        ("margin", "class-balanced", "strategy 'margin' estimates none"),
    ],
)
def test_a_hybrid_that_cannot_be_is_refused(pool, tmp_path, strategy, elsewhere, message):
    with pytest.raises(UserError, match=message):
        start(pool, tmp_path / "run", strategy, elsewhere={"share": 0.25, "strategy": elsewhere})


@pytest.mark.parametrize("share, spent", [(0.04, 0), (0.96, 12)])
def test_a_hybrid_of_one_strategy_is_refused(pool, tmp_path, share, spent):
    with pytest.raises(UserError, match=f"elsewhere.share: expected .* found {share} of 12, which is {spent}"):
        start(pool, tmp_path / "run", "pfk", elsewhere={"share": share})


def test_scores_come_from_the_masks_of_each_image(pool, tmp_path):
    """A score of `variation-ratio` is that of McDropout's logits with the image's own salt."""
    run = after_a_round(start(pool, tmp_path / "run", "variation-ratio"))
    select(run, 2)
    net, _ = extract.network_of(run, 1).load()
    shard = run.pool.shards("pool")[0]
    images = extract.Decoder(run.pool, run.image)({"item": np.array([shard], object)})
    table = run.read(store.join(run.round(2).descriptors, shard.name))
    size = run.config.model.batch_size
    (count, x), *_ = extract.batches(images["image"], run.image, size, torch.device("cpu"))
    own = greedy.salts(images["image_id"][:count], run.seed("dropout", 2, 0)).view(np.int64)
    with torch.inference_mode():
        logits = pfk.McDropout(net, 4)(x, torch.from_numpy(own.copy()))
    assert table["score"].to_pylist()[:count] == uncertainty.variation_ratio(logits).tolist()
    assert len(set(table["score"].to_pylist())) > 1
