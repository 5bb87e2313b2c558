"""Configurations that run code, grow without end, or are read as another than was written."""

import re

import pytest
import yaml

from raypfk import config
from raypfk.errors import UserError
from tests import tiny
from tests.hostile import refusal

pytestmark = pytest.mark.usefixtures("limits")
TEXT = yaml.safe_dump(tiny.TREE)


def with_line(line: str, replaced: str = "budget: 12") -> str:
    assert TEXT.count(replaced) == 1
    return TEXT.replace(replaced, line)


def laughs(link: str) -> str:
    """Nine levels, each nine times the one before: a billion values in half a kilobyte."""
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    return "a: &a {k: 1}\n" + "".join(f"{b}: &{b} {link.format(','.join([f'*{a}'] * 9))}\n" for a, b in pairs)


YAML = r"run\.yaml: not YAML: "
BAD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"run\.yaml: expected a mapping of settings, found NoneType"),
    "a list": ("- 1\n", "expected a mapping of settings, found list"),
    "a word": ("hello\n", "expected a mapping of settings, found str"),
    "binary": (bytes(range(256)), "expected YAML text, found binary data"),
    "utf-16": (TEXT.encode("utf-16"), "expected YAML text, found binary data"),
    "latin-1": ("a: caf\xe9\n".encode("latin-1"), "expected YAML text, found binary data"),
    "a NUL": ("a: 1\0\n", YAML + "unacceptable character #x0000"),
    "2 MB": ("#" * 2_000_000, "expected a YAML file of at most 1048576 bytes, found more"),
    "tag that calls": ("a: !!python/object/apply:os.system ['touch {mark}']\n", YAML + "could not determine a"),
    "tag that makes": ("!!python/object/new:os.system ['touch {mark}']\n", YAML + "could not determine a constructor"),
    "tag that names": ("a: !!python/name:os.system\n", YAML + "could not .* in line 1, column 4"),
    "tag of another kind": ("a: !!bool maybe\n", YAML),
    "tag of a date": ("a: !!timestamp soon\n", YAML),
    "month 13": (with_line("budget: 2020-13-45"), YAML + "month must be in 1..12"),
    "billion laughs": (laughs("[{}]"), YAML + "more than 32 aliases in line 5"),
    "billion merges": (laughs("{{<<: [{}]}}"), YAML + "more than 32 aliases in line 5"),
    "undefined alias": ("a: *b\n", YAML + "found undefined alias 'b' in line 1"),
    "nested in brackets": ("a: " + "[" * 1200, "run.yaml: not YAML that can be read: nested too deep"),
    "nested in lines": ("".join(" " * i + "a:\n" for i in range(900)), "nested too deep"),
    "tab": ("a:\n\tb: 1\n", YAML + r"found character '\\t' that cannot start any token in line 2, column 1"),
    "two documents": (TEXT + "---\n" + TEXT, YAML + "but found another document"),
    "a key twice": (TEXT + "budget: 3\n", YAML + "the key 'budget' is there twice in line 36, column 1"),
    "a key twice in a section": ("train: {lr: 1, lr: 2}\n", YAML + "the key 'lr' is there twice in line 1, column 16"),
    "a key that is a list": (TEXT + "? [1]\n: 2\n", YAML + "found unhashable key"),
    "a key that is a number": (TEXT + "1: 2\n", "1: Keys should be strings"),
    "unknown key": (TEXT + "budgt: 3\n", r"run\.yaml: budgt: unknown key"),
    "not a number": (with_line("lr: .nan", "lr: 0.05"), r"run\.yaml: train\.lr: expected a finite number, found nan"),
    "infinite": (with_line("lr: .inf", "lr: 0.05"), "train.lr: expected a finite number, found inf"),
    "infinite, by overflow": (with_line("lr: 1e999", "lr: 0.05"), "train.lr: expected a finite number, found inf"),
    "negative": (with_line("budget: -5"), "budget: expected greater than or equal to 1, found -5"),
    "30 digits": (with_line("budget: " + "9" * 30), "budget: expected less than or equal to 2147483647, found 9+$"),
    "5,000 digits": (with_line("budget: " + "9" * 5000), YAML + "Exceeds the limit"),
    "half a megabyte": (with_line("budget: " + "x" * 500_000), r"budget: expected a valid integer, found 'x+\.\.\.x+'"),
    "text for a section": (with_line("train: fast\nrest:", "train:"), "train: expected a valid dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_configuration_is_refused(tmp_path, name):
    """Of several mistakes each has its line, which names the file and the field; no tag's code is run."""
    text, message = BAD[name]
    path, mark = tmp_path / "run.yaml", tmp_path / "mark"
    path.write_bytes(text if isinstance(text, bytes) else text.replace("{mark}", str(mark)).encode())
    with pytest.raises(UserError) as refused:
        config.load(str(path))
    said = str(refused.value)
    assert re.search(message, said, re.M), said
    assert all(line.startswith(str(path)) and len(line) < 1000 for line in said.splitlines())
    assert "Traceback" not in said and not mark.exists()


def test_few_aliases_that_grow_are_not_printed_whole(tmp_path):
    """Fifteen doublings are under the limit; the error that shows them is short."""
    pairs = zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
    taps = "".join(f"  - &{b} [*{a},*{a}]\n" for a, b in pairs)
    (tmp_path / "run.yaml").write_text("model:\n  taps:\n  - &a [x,x]\n" + taps)
    with pytest.raises(UserError) as refused:
        config.load(str(tmp_path / "run.yaml"))
    assert "model.taps.15: expected a valid string" in str(refused.value) and len(str(refused.value)) < 20_000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "expected a YAML file of at most 1048576 bytes, found more"),
        ("/dev/null", "expected a mapping of settings, found NoneType"),
        ("/tmp", "cannot be read: Is a directory"),
        ("/nowhere/run.yaml", "cannot be read: No such file"),
    ],
)
def test_a_configuration_that_is_no_file(path, message):
    """A device without end is not read to it."""
    refusal(lambda: config.load(path), message, path)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lr=[[[", r"--set train\.lr=\[\[\[: not YAML"),
        ("train.lr=!!python/name:os.system", "--set train.lr=.*: not YAML: could not determine a constructor"),
        ("train.lr=.nan", "train.lr: expected a finite number, found nan"),
        ("train.lr.x=1", "train.lr.x: 'lr' is a value, not a section"),
        ("=1", "--set =1: expected dotted.key=value"),
    ],
)
def test_a_bad_assignment_is_refused(tmp_path, assignment, message):
    (tmp_path / "run.yaml").write_text(TEXT)
    refusal(lambda: config.load(str(tmp_path / "run.yaml"), {}, config.assigned((assignment,))), message)
