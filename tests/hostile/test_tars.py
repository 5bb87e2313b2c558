"""Tars that reach outside, lie about what they hold, or are no tars: nothing of them is lost in silence."""

import gzip
import os
import re
import tarfile

import pytest

from raypfk import sources
from raypfk.config import DataConfig
from tests.folders import png
from tests.hostile import refusal
from tests.test_file_sources import special, tar

pytestmark = pytest.mark.usefixtures("limits")
END = bytes(1024)


# ------------------------------------------------------------------------------------------------------ makers


def header(name: bytes, size: bytes = b"00000000005", kind: bytes = b"0", link: bytes = b"") -> bytes:
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block = (block + b" " * 8 + kind + link.ljust(100, b"\0") + b"ustar\x0000").ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: bytes, data: bytes = b"data!", **fields: bytes) -> bytes:
    return header(name, **{"size": b"%011o" % len(data)} | fields) + data + bytes(-len(data) % 512)


def pax(keyword: bytes, value: bytes, name: bytes = b"next.png") -> bytes:
    """A member and the extended header before it."""
    rest = len(keyword) + len(value) + 3
    size = next(n for n in range(rest, rest + 9) if len(str(n)) + rest == n)
    return member(b"PaxHeader", b"%d %s=%s\n" % (size, keyword, value), kind=b"x") + member(name)


GOOD = member(b"good.png", png(1))
LOST = member(b"lost.png", png(2))
BROKEN = bytes([GOOD[0] ^ 1]) + GOOD[1:]
WHOLE = r"x\.tar: expected a whole tar file: "

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", WHOLE + "empty"),
    "no tar": (b"no tar at all" * 100, WHOLE),
    "gzip": (gzip.compress(GOOD + END), WHOLE),
    "checksum of the first header": (BROKEN + END, WHOLE + "bad checksum"),
    "checksum of a later header": (GOOD + BROKEN + LOST + END, WHOLE + "at byte 1024, after 1 members, is neither"),
    "garbage between members": (GOOD + b"\xaa" * 512 + LOST + END, WHOLE + "at byte 1024, after 1 members"),
    "two tars in one": (GOOD + END + LOST + END, WHOLE + "at byte 1024, after 1 members"),
    "bytes behind the end": (GOOD + END + b"\xde\xad" * 99, WHOLE + "at byte 1024, after 1 members"),
    "cut between members": (GOOD, WHOLE + "it ends after 1 members without a tar's end mark"),
    "cut in a member": ((GOOD + LOST)[:1600], WHOLE + "it ends within 'lost.png'"),
    "cut in a header": ((GOOD + LOST)[:1100], WHOLE + "at byte 1024, after 1 members"),
    "member of 8 GiB": (GOOD + header(b"big.png", b"77777777777") + END, WHOLE + "it ends within 'big.png'"),
    "member of 2^87 bytes": (GOOD + header(b"big.png", b"\x80" + b"\x7f" * 11) + END, WHOLE + "it ends within"),
    "negative size": (GOOD + header(b"less.png", b"\xff" * 12) + END, WHOLE + "'less.png' has the size -1"),
    "negative size, back to itself": (
        GOOD + header(b"loop.png", b"\xff" * 10 + b"\xfe\x00") + END, WHOLE + "'loop.png' has the size -512",
    ),
    "size that is no number": (GOOD + header(b"x.png", b"many") + END, WHOLE + "at byte 1024, after 1 members"),
    "extended header, negative size": (GOOD + pax(b"size", b"-512") + END, WHOLE + "'next.png' has the size -512"),
    "extended header, size no number": (GOOD + pax(b"size", b"many") + END, WHOLE + "at byte 2560, after 2 members"),
    "extended header, length lies": (
        GOOD + member(b"PaxHeader", b"0 path=x\n", kind=b"x") + LOST + END, WHOLE + "at byte 1024, after 1 members",
    ),
    "extended header of 8 GiB": (
        GOOD + header(b"PaxHeader", b"77777777777", b"x") + END, WHOLE + "a header of 8589934592 bytes, expected",
    ),
    "long name of 8 GiB": (
        GOOD + header(b"././@LongLink", b"77777777777", b"L") + END, WHOLE + "a header of 8589934592 bytes",
    ),
    "extended headers of extended headers": (
        member(b"PaxHeader", b"6 a=b\n", kind=b"x") * 3000 + GOOD + END, WHOLE + "headers of headers, nested too deep",
    ),
    "sparse map that is none": (GOOD + pax(b"GNU.sparse.map", b"a,b,c") + END, WHOLE + "invalid literal"),
    "label, binary": (tar(("1.png", png(1)), ("1.cls", b"\xff\xfe")), r"x\.tar: 1\.cls: .* found b'\\xff\\xfe'"),
    "label, empty": (tar(("1.png", png(1)), ("1.cls", b"")), r"x\.tar: 1\.cls: expected a class name .* found b''"),
    "label, two lines": (tar(("1.png", png(1)), ("1.cls", b"cat\ndog")), r"1\.cls: .* on one line, found b'cat\\ndog'"),
    "label, a NUL": (tar(("1.png", png(1)), ("1.cls", b"c\0t")), r"1\.cls: expected .* found b'c\\x00t'"),
    "label, too long": (tar(("1.png", png(1)), ("1.cls", b"x" * 5000)), r"1\.cls: expected .* found 5000 bytes"),
    "label, negative": (tar(("1.png", png(1)), ("1.cls", b"-1")), "the label '-1', expected class indices from 0"),
    "label, a trillion": (tar(("1.png", png(1)), ("1.cls", b"999999999999")), "the label '999999999999', expected"),
    "label, 1,000 digits": (tar(("1.png", png(1)), ("1.cls", b"9" * 1000)), r"the label '9+\.\.\.9+', expected"),
}  # fmt: skip


def listed(folder, data: bytes):
    (folder / "x.tar").write_bytes(data)
    config = DataConfig(source="webdataset", root=str(folder))
    return sources.of(config), sources.listing(config)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tar_is_refused_by_its_name(tmp_path, name):
    """Whatever cannot be read to its end is an error: a part of a tar is not taken for the whole."""
    data, message = BAD[name]
    refusal(lambda: listed(tmp_path, data), message, str(tmp_path))


REJECTED: dict[str, tuple[bytes | tarfile.TarInfo, str, str]] = {
    "up": (member(b"../evil.png"), "x/../evil.png", "a path that leaves the tar"),
    "down and up": (member(b"a/../../evil.png"), "x/a/../../evil.png", "a path that leaves the tar"),
    "up, with backslashes": (member(b"a\\..\\evil.png"), "x/a\\..\\evil.png", "a path that leaves the tar"),
    "up, in an extended header": (pax(b"path", b"../../evil.png"), "x/../../evil.png", "a path that leaves the tar"),
    "absolute": (member(b"/etc/evil.png"), "x//etc/evil.png", "an absolute path"),
    "absolute, with a drive": (member(b"C:/evil.png"), "x/C:/evil.png", "an absolute path"),
    "symbolic link": (header(b"l.png", b"0", b"2", b"/etc/passwd"), "x/l.png", "a link to /etc/passwd"),
    "symbolic link, not UTF-8": (header(b"l.png", b"0", b"2", b"/\xff"), "x/l.png", r"a link to /\\udcff"),
    "hard link": (header(b"h.png", b"0", b"1", b"good.png"), "x/h.png", "a link to good.png"),
    "label that is a link": (header(b"good.cls", b"0", b"2", b"/etc/passwd"), "x/good.cls", "a link to /etc/passwd"),
    "device": (header(b"d.png", b"0", b"3"), "x/d.png", "neither a file nor a folder"),
    "disk": (header(b"d.png", b"0", b"4"), "x/d.png", "neither a file nor a folder"),
    "pipe": (header(b"p.png", b"0", b"6"), "x/p.png", "neither a file nor a folder"),
    "unknown kind": (member(b"u.png", kind=b"Z"), "x/u.png", "neither a file nor a folder"),
    "sparse": (header(b"s.png", b"0", b"S"), "x/s.png", "a sparse file"),
    "name, not UTF-8": (member(b"caf\xe9.png"), r"x/caf\udce9.png", "its name is not text in UTF-8"),
    "name with a NUL": (pax(b"path", b"a\0b.png"), r"x/a\x00b.png", "its name is not text in UTF-8"),
    "no name": (member(b""), "x/", "the suffix is no image's"),
    "program": (member(b"run.exe"), "x/run.exe", "the suffix is no image's"),
    "the same name": (member(b"good.png"), "x/good.png (again)", "there twice in its tar: the first one counts"),
    "two labels": (
        member(b"good.cls", b"cat") + member(b"good.cls", b"dog"), "x/good.cls (again)", "there twice in its tar",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_a_bad_member_is_rejected_and_the_others_go_on(tmp_path, name):
    """It stands in the rejects under its own name, with the reason; nothing is written or read for it."""
    data, reject_id, reason = REJECTED[name]
    source, listing = listed(tmp_path, GOOD + data + LOST + END)
    assert list(source.read(listing.train.keys.to_pylist())) == [png(1), png(2)]
    ((found, why),) = listing.rejects
    assert found == reject_id and re.search(reason, why), (found, why)
    assert found.encode() and why.encode()  # both can be written to Parquet
    assert listing.classes == (["cat"] if name == "two labels" else None)


def make_folder(path) -> None:
    path.mkdir()


def make_zero(path) -> None:
    path.symlink_to("/dev/zero")


def make_pipe(path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_folder, make_zero, make_pipe])
def test_what_is_no_file_is_never_opened(tmp_path, make):
    """A folder, a device without end, a pipe that nobody writes to: refused at once."""
    make(tmp_path / "x.tar")
    config = DataConfig(source="webdataset", root=str(tmp_path / "x.tar"))
    refusal(lambda: sources.listing(config), r"x\.tar: expected a file, found (a folder|neither a file nor a folder)")


def test_a_link_back_has_an_end(tmp_path):
    """A folder that links to itself, and two that link to each other: each tar is met once by every way in."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    _, listing = listed(tmp_path, GOOD + END)
    assert listing.train.ids.to_pylist() == ["x/good.png"]


def test_a_special_member_is_made_as_tarfile_makes_it():
    """The makers above write what tarfile writes: a link and a pipe are read back as such."""
    data = tar(special("l", tarfile.SYMTYPE, "t"), special("p", tarfile.FIFOTYPE))
    assert data[156:157] == b"2" and data[512 + 156 : 512 + 157] == b"6"
