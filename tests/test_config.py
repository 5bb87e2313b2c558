"""A run's YAML: what is shipped is valid, and every mistake is answered with file, dotted path, expected and found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raypfk import config
from raypfk.config import Config, ImageConfig
from raypfk.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))

MINIMAL = """
data: {source: digits}
model: {name: lenet, taps: [conv1, conv2, fc1]}
train: {epochs: 2, batch_size: 10, lr: 0.05}
budget: 20
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def minimal(write):
    """Loads MINIMAL with `--set` assignments."""
    path = write(MINIMAL)
    return lambda *assignments, **overrides: config.load(path, overrides, config.assigned(assignments))


def refused(path: str, *expected: str, assignments: tuple[str, ...] = ()) -> str:
    """The message of the UserError, in which each of `expected` is found."""
    with pytest.raises(UserError) as caught:
        config.load(path, {}, config.assigned(assignments))
    for text in expected:
        assert text in str(caught.value)
    return str(caught.value)


def root_for(name: str) -> tuple[str, ...]:
    return () if name == "digits.yaml" else ("data.root=/data",)


def test_what_is_shipped():
    assert SHIPPED == ["digits.yaml", "folder.yaml", "imagenet.yaml", "mnist.yaml", "svhn.yaml"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_is_valid(name):
    assert isinstance(config.load(str(CONFIGS / name), {}, config.assigned(root_for(name))), Config)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "digits.yaml"])
def test_shipped_files_ask_for_the_root(name):
    """Where the images lie is nobody's default; the message says how to say it."""
    refused(str(CONFIGS / name), name, "data: source", "needs `root`", "--set data.root=")


@pytest.mark.parametrize(
    ("name", "validation", "taps", "budget", "epochs", "batch_size", "lr", "decay_every", "milestones"),
    [
        ("mnist", 10_000, ["conv1", "conv2", "fc1"], 125, 50, 25, 0.05, 15, None),
        ("svhn", 104_000, ["layer3", "layer4"], 1_250, 35, 128, 0.1, 15, None),
        ("imagenet", 50_000, ["layer3", "layer4"], 64_000, 60, 128, 0.1, None, [30, 50, 57]),
    ],
)
def test_the_papers_settings(name, validation, taps, budget, epochs, batch_size, lr, decay_every, milestones):
    """Section 5, number by number."""
    c = config.load(str(CONFIGS / f"{name}.yaml"), {}, {"data.root": "/data"})
    assert (c.data.validation, c.model.taps, c.budget, c.rounds) == (validation, taps, budget, 10)
    assert (c.train.epochs, c.train.batch_size, c.train.lr, c.train.decay) == (epochs, batch_size, lr, 0.1)
    assert (c.train.decay_every, c.train.milestones) == (decay_every, milestones)
    assert c.data.imbalance.ratio == 100
    assert (c.strategy, c.label_estimator, c.scale_weight) == ("pfk", "neighbour", "length")
    assert c.pretrain is not None


def test_the_folder_file_explains_every_key():
    """configs/folder.yaml names all keys there are, live or in a comment."""
    text = (CONFIGS / "folder.yaml").read_text()
    for field, info in Config.model_fields.items():
        assert re.search(rf"^(# )?{field}:", text, re.M), field
        if hasattr(info.annotation, "model_fields"):
            for key in info.annotation.model_fields:
                assert re.search(rf"^  (# )?{key}:", text, re.M), f"{field}.{key}"


def test_defaults(minimal):
    c = minimal()
    assert (c.strategy, c.label_estimator, c.scale_weight, c.rounds, c.seed) == ("pfk", "neighbour", "length", 10, 0)
    assert c.pretrain is None
    assert c.image == ImageConfig()


def test_a_run_is_frozen(minimal):
    with pytest.raises(ValueError, match="frozen"):
        minimal().budget = 3


# Mistakes in the file


def test_unknown_key(write):
    refused(write(MINIMAL + "budgt: 3\n"), "run.yaml: budgt: unknown key")


def test_unknown_key_inside_a_section(write):
    refused(write(MINIMAL + "resources: {cpus: 3}\n"), "run.yaml: resources.cpus: unknown key")


def test_missing_key(write):
    refused(write(MINIMAL.replace("budget: 20\n", "")), "run.yaml: budget: missing")


def test_missing_key_inside_a_section(write):
    refused(write(MINIMAL.replace("lr: 0.05", "momentum: 0.5")), "run.yaml: train.lr: missing")


def test_wrong_type(write):
    refused(write(MINIMAL.replace("budget: 20", "budget: twenty")), "run.yaml: budget: expected", "integer", "'twenty'")


@pytest.mark.parametrize("value", ["'20'", "20.0", "true"])
def test_nothing_is_converted(write, value):
    """A number in quotes, a whole float or a truth value is a slip, not an integer."""
    refused(write(MINIMAL.replace("budget: 20", f"budget: {value}")), "budget: expected", "integer", "found")


def test_wrong_type_in_a_list(write):
    path = write(MINIMAL.replace("[conv1, conv2, fc1]", "[conv1, 2]"))
    refused(path, "run.yaml: model.taps.1: expected", "string", "found 2")


def test_a_value_where_a_section_belongs(write):
    refused(write(MINIMAL + "image: 28\n"), "run.yaml: image: expected", "found 28")


@pytest.mark.parametrize(
    ("line", "where", "bound"),
    [
        ("budget: 0", "budget", "greater than or equal to 1"),
        ("seed: -1", "seed", "greater than or equal to 0"),
        ("image: {std: [0.0]}", "image.std.0", "greater than 0"),
        ("resources: {extract_gpus: -1}", "resources.extract_gpus", "greater than or equal to 0"),
    ],
)
def test_out_of_range(write, line, where, bound):
    found = re.search(r"-?[0-9.]+(?=[\]}]*$)", line).group()
    refused(write(MINIMAL.replace("budget: 20\n", "" if "budget" in line else "budget: 20\n") + line + "\n"),
            f"run.yaml: {where}: expected", bound, f"found {found}")  # fmt: skip


@pytest.mark.parametrize(
    ("assignment", "where", "bound"),
    [("train.lr=0", "train.lr", "greater than 0"), ("train.momentum=1", "train.momentum", "less than 1")],
)
def test_out_of_range_by_assignment(write, assignment, where, bound):
    refused(write(MINIMAL), f"{where}: expected", bound, "found", assignments=(assignment,))


def test_no_taps(write):
    refused(write(MINIMAL), "model.taps: ", "at least 1 item", assignments=("model.taps=[]",))


def test_unknown_strategy(write):
    """The message lists what there is, and how to name one's own."""
    refused(write(MINIMAL), "strategy: expected badge, ", "pfk-sum, ", "package.module:function, found 'psychic'",
            assignments=("strategy=psychic",))  # fmt: skip


@pytest.mark.parametrize(
    ("key", "options"),
    [
        (
            "label_estimator",
            ("true", "predicted", "neighbour", "vote", "soft", "discriminant", "mc-trace", "mc-information"),
        ),
        ("scale_weight", ("length", "length-squared", "equal")),
        ("oracle", ("simulated", "file")),
        ("train.augment", ("none", "flip", "crop-flip")),
    ],
)
def test_unknown_choice(write, key, options):
    """The message lists what there is."""
    wanted = [f"'{option}'" for option in options]
    refused(write(MINIMAL), f"run.yaml: {key}: expected", *wanted, "found 'best'", assignments=(f"{key}=best",))


def test_label_estimator_true_is_a_word(minimal):
    """`true` in YAML is a truth value; the estimator is written in quotes, and without them refused."""
    assert minimal("label_estimator='true'").label_estimator == "true"
    with pytest.raises(UserError, match=r"label_estimator: expected 'true'.*found True"):
        minimal("label_estimator=true")


@pytest.mark.parametrize("data", ["{}", "{pool: a, source: digits}"])
def test_one_origin_of_the_images(write, data):
    refused(write(MINIMAL.replace("{source: digits}", data)), "run.yaml: data: give either `pool`", "`source`")


@pytest.mark.parametrize("source", ["folder", "ilsvrc", "mnist", "svhn", "cifar10"])
def test_a_source_needs_its_root(write, source):
    refused(write(MINIMAL.replace("digits", source)), f"data: source '{source}' needs `root`", "--set data.root=")


@pytest.mark.parametrize("source", ["digits", "ilsvrc"])
def test_roots_of_splits_are_for_folders(write, source):
    """Data sets have splits of their own, or none."""
    message = "data: `validation_root` and `test_root` go with folder, webdataset, parquet, manifest only"
    refused(write(MINIMAL), message, assignments=(f"data.source={source}", "data.root=/r", "data.test_root=/test"))


def test_files_alone_can_be_referred_to(write, minimal):
    """Arrays in memory lie at no place."""
    refused(write(MINIMAL), "data: `by_reference` goes with folder,", "ilsvrc", assignments=("data.by_reference=true",))
    assert minimal("data.source=ilsvrc", "data.root=/r", "data.by_reference=true").data.by_reference


@pytest.mark.parametrize("most", ["-1", "1.5", "-0.1"])
def test_rejects_are_limited_by_a_number_or_a_share(write, most):
    message = "data: `max_rejects` must be a number of images or a share"
    assert refused(write(MINIMAL), message, assignments=(f"data.max_rejects={most}",)).endswith(most)


@pytest.mark.parametrize("share", ["0", "-5", "1.0", "1.5", "0.0"])
def test_a_share_is_a_number_of_images_or_a_fraction(write, share):
    message = refused(write(MINIMAL), "data: `validation` must be", assignments=(f"data.validation={share}",))
    assert message.endswith(share)


@pytest.mark.parametrize("share", ["1", "10000", "0.5"])
def test_shares_that_are_fine(minimal, share):
    assert minimal(f"data.validation={share}").data.validation == yaml.safe_load(share)


@pytest.mark.parametrize("imbalance", ["{ratio: 10}", "{ratio: 10, classes: [1], random_classes: 2}"])
def test_one_way_to_name_rare_classes(write, imbalance):
    refused(write(MINIMAL), "data.imbalance: give either `classes` or `random_classes`",
            assignments=(f"data.imbalance={imbalance}",))  # fmt: skip


def test_one_schedule(write):
    refused(write(MINIMAL), "train: give either `decay_every` or `milestones`",
            assignments=("train.decay_every=3", "train.milestones=[3]"))  # fmt: skip


def test_every_mistake_is_told_at_once(write):
    message = refused(write(MINIMAL + "budgt: 3\nseed: x\n"), "budgt", "seed")
    assert len(message.splitlines()) == 2


# Not a run's file at all


def test_no_such_file(tmp_path):
    refused(str(tmp_path / "none.yaml"), "none.yaml: cannot be read: No such file")


def test_a_folder(tmp_path):
    refused(str(tmp_path), f"{tmp_path}: cannot be read: Is a directory")


@pytest.mark.parametrize(("text", "found"), [("- a\n- b\n", "list"), ("", "NoneType"), ("hello", "str")])
def test_not_a_mapping(write, text, found):
    refused(write(text), f"run.yaml: expected a mapping of settings, found {found}")


def test_a_binary_file(write):
    refused(write(b"\x89PNG\r\n\x1a\n\x00\xff"), "run.yaml: expected YAML text, found binary data")


def test_not_yaml(write):
    refused(write("data: [1\nb: 2}"), "run.yaml: not YAML", "line 2")


def test_yaml_runs_no_code(write):
    refused(write("data: !!python/object/apply:os.getcwd []\n"), "run.yaml: not YAML", "python/object/apply")


# Floats


@pytest.mark.parametrize("text", ["1e-1", "1E-1", "1.0e-1", "0.1", "10e-2", "+1e-1", "100.e-3"])
def test_floats_with_an_exponent(minimal, text):
    """YAML 1.2: an exponent makes a float, with or without a dot or a sign."""
    assert minimal(f"train.lr={text}").train.lr == 0.1


@pytest.mark.parametrize("text", ["e1", "1e", "1e-1x"])
def test_what_only_looks_like_one_is_a_word(write, text):
    refused(write(MINIMAL), "train.lr: expected", f"found '{text}'", assignments=(f"train.lr={text}",))


def test_an_integer_is_a_float_too(minimal):
    assert minimal("train.lr=1").train.lr == 1.0


# --set and command-line fields


def test_assignments(minimal):
    """Values are YAML; a later one wins; absent sections come into being."""
    c = minimal("image.mean=[0.1]", "seed=3", "seed=4", "data.imbalance.ratio=10", "data.imbalance.classes=[1, 2]")
    assert (c.image.mean, c.seed, c.data.imbalance.ratio, c.data.imbalance.classes) == ([0.1], 4, 10, [1, 2])


def test_an_assignment_may_hold_equals_signs(minimal):
    assert minimal("data.source=folder", "data.root=/a=b").data.root == "/a=b"


def test_overrides_win_unless_they_are_none(minimal):
    c = minimal("strategy=pcc", "seed=3", strategy="random", seed=None)
    assert (c.strategy, c.seed) == ("random", 3)


@pytest.mark.parametrize("assignment", ["budget", "=3", ""])
def test_not_an_assignment(write, assignment):
    refused(write(MINIMAL), f"--set {assignment}: expected dotted.key=value", assignments=(assignment,))


def test_assignment_below_a_value(write):
    refused(write(MINIMAL), "budget.images: 'budget' is a value, not a section",
            assignments=("budget.images=3",))  # fmt: skip


def test_assignment_of_an_unknown_key(write):
    refused(write(MINIMAL), "train.epoch: unknown key", assignments=("train.epoch=3",))


def test_assignment_that_is_not_yaml(write):
    refused(write(MINIMAL), "--set model.taps=[a: not YAML", assignments=("model.taps=[a",))


# Paths


def test_relative_paths_are_made_absolute(minimal, tmp_path, monkeypatch):
    """Where the command was given: workers run in other folders."""
    monkeypatch.chdir(tmp_path)
    c = minimal("data.source=folder", "data.root=a/b", "data.validation_root=../v", "data.test_root=~/t")
    assert c.data.root == str(tmp_path / "a/b")
    assert c.data.validation_root == str(tmp_path.parent / "v")
    assert c.data.test_root == os.path.expanduser("~/t")
    assert minimal("data.source=null", "data.pool=pools/x").data.pool == str(tmp_path / "pools/x")


def test_uris_stay(minimal):
    assert minimal("data.source=folder", "data.root=s3://b/train").data.root == "s3://b/train"


def test_what_is_set_is_set_there_alone(write):
    """Not in a section that a YAML alias stands for, nor in the settings themselves; later settings win."""
    path = write(MINIMAL.replace("train: {", "train: &t {") + "pretrain: *t\n")
    sections = {"vote": {"neighbours": 5}}
    found = config.load(path, {}, sections, {"vote.power": 2.0, "train.epochs": 9}, {"vote.neighbours": 7})
    assert (found.vote.neighbours, found.vote.power) == (7, 2.0)
    assert (found.train.epochs, found.pretrain.epochs) == (9, 2)
    assert sections == {"vote": {"neighbours": 5}}


# What makes another run


def test_a_run_is_itself(minimal):
    assert config.differences(minimal(), minimal()) == []


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("budget=21", "budget: 20 there, 21 now"),
        ("strategy=pcc", "strategy: 'pfk' there, 'pcc' now"),
        ("seed=1", "seed: 0 there, 1 now"),
        ("train.lr=0.1", "train.lr: 0.05 there, 0.1 now"),
        ("model.taps=[fc1]", "model.taps: ['conv1', 'conv2', 'fc1'] there, ['fc1'] now"),
        ("data.validation=3", "data.validation: None there, 3 now"),
        ("rounds=9", "rounds: 10 there, 9 now"),
    ],
)
def test_differences_are_named(minimal, assignment, message):
    """Dotted path, the old value, the new one."""
    assert config.differences(minimal(), minimal(assignment)) == [message]


def test_a_section_that_comes_or_goes_is_a_difference(minimal):
    pretrain = "pretrain={epochs: 1, batch_size: 2, lr: 0.1}"
    for old, new in ((minimal(), minimal(pretrain)), (minimal(pretrain), minimal())):
        (found,) = config.differences(old, new)
        assert found.startswith("pretrain: ")


def test_rounds_may_grow_and_resources_are_free(minimal):
    """They are how long and how fast, not what is selected."""
    new = minimal("rounds=11", "resources.extract_actors=7", "resources.score_threads=2")
    assert config.differences(minimal(), new) == []


def test_a_training_may_be_spread_anew(minimal):
    """Machines come and go: a run goes on with what is there."""
    new = minimal("train.workers=4", "train.min_workers=1", "train.threads=2", "train.checkpoint_every=1")
    assert config.differences(minimal(), new) == []
    with pytest.raises(UserError, match="`min_workers` is 3, more than the 2 `workers`"):
        minimal("train.workers=2", "train.min_workers=3")


@pytest.mark.parametrize("name", ["balanced", "monitor"])
def test_pretraining_has_no_labels(minimal, name):
    """Classes to balance and an accuracy to monitor are of `train`."""
    with pytest.raises(UserError, match=f"pretrain: `{name}` goes with `train` only"):
        minimal(f"pretrain={{epochs: 1, batch_size: 2, lr: 0.1, {name}: true}}")


def test_several_differences(minimal):
    assert len(config.differences(minimal(), minimal("budget=21", "train.epochs=3", "rounds=11"))) == 2


def test_the_demos_configuration_is_installed():
    """`raypfk demo` finds its YAML through the package, not through the folder it was started in."""
    script = "import importlib.resources as r; print((r.files('raypfk.configs') / 'digits.yaml').is_file())"
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
