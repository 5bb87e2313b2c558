"""Images that are none, are damaged, or are made to fill the memory; and odd ones that are good."""

import gzip
import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from raypfk.images import decode
from tests.hostile import refusal
from tests.test_images import encoded, noise, picture, png_header

pytestmark = [
    pytest.mark.usefixtures("limits"),
    pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger", "ignore:.*TorchVision"),
]
MAX = 10**8
JPEG, PNG = encoded(picture(), "JPEG"), encoded(picture(), "PNG")


# ------------------------------------------------------------------------------------------------------ makers


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*extra: bytes, depth: int = 8, kind: int = 2, pixels: bytes | None = bytes(4 * 13)) -> bytes:
    """4 x 4 pixels, `extra` chunks before their data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, kind, 0, 0, 0))
    data = b"" if pixels is None else chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b"")


def bomb(size: int = 1 << 26) -> bytes:
    return zlib.compress(bytes(size), 9)


def tiff(changes: dict[int, tuple[int, int, int]] | None = None, next_at: int = 0) -> bytes:
    """4 x 4 grey pixels at byte 300. changes: tag -> (type, count, value)."""
    tags = {256: (4, 1, 4), 257: (4, 1, 4), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 300)}
    tags |= {277: (3, 1, 1), 278: (4, 1, 4), 279: (4, 1, 16)} | (changes or {})
    entries = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", next_at)
    return head.ljust(300, b"\0") + bytes(range(16))


def jpeg(marker: int | None = None, bits: int = 8, height: int = 30, width: int = 40) -> bytes:
    """JPEG with another frame header."""
    at = JPEG.index(b"\xff\xc0")
    frame = bytes([marker or 0xC0]) + JPEG[at + 2 : at + 4] + struct.pack(">BHH", bits, height, width)
    return JPEG[: at + 1] + frame + JPEG[at + 9 :]


def segment(marker: int, body: bytes) -> bytes:
    """JPEG with one more segment at its beginning."""
    return JPEG[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


def gif(screen: tuple[int, int] = (4, 4), frame: tuple[int, int] = (4, 4)) -> bytes:
    data = bytearray(encoded(picture(4, 4), "GIF"))
    at = data.rindex(b",\0\0\0\0")
    data[6:10], data[at + 5 : at + 9] = struct.pack("<HH", *screen), struct.pack("<HH", *frame)
    return bytes(data)


def bmp(at: int, value: int) -> bytes:
    data = bytearray(encoded(picture(), "BMP"))
    data[at : at + 4] = struct.pack("<i", value)
    return bytes(data)


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.png", PNG)
    return stream.getvalue()


def without_palette() -> bytes:
    data = encoded(picture().quantize(16), "PNG")
    at = data.index(b"PLTE") - 4
    return data[:at] + data[at + 12 + struct.unpack(">I", data[at : at + 4])[0] :]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


FOREIGN = "not an image in a known format .*: it begins with b'"
HUGE = "more than max_pixels=100000000"
CUT = {format: noise(format) for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")}

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "^empty file$"),
    "html, a login page": (b"<!DOCTYPE html><html>Sign in</html>", FOREIGN + "<!DOCTYPE html>"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', FOREIGN + "<svg"),
    "pdf": (b"%PDF-1.7\n1 0 obj", FOREIGN + "%PDF"),
    "zip": (archive(), FOREIGN + "PK"),
    "gzip of a png": (gzip.compress(PNG), FOREIGN),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", FOREIGN + "%!PS"),
    "icon": (encoded(picture(16, 16), "ICO"), FOREIGN),
    "zeros": (bytes(5000), FOREIGN),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", FOREIGN + r".*ftypheic"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", FOREIGN + "version https"),
    **{f"{format} cut at its header": (data[:12], "damaged|not an image") for format, data in CUT.items()},
    **{f"{format} cut in the middle": (data[: len(data) // 2], "damaged or truncated") for format, data in CUT.items()},
    **{f"{format} cut near its end": (data[:-16], "damaged or truncated") for format, data in CUT.items()},
    "png, 100,000 x 100,000": (png_header(100_000, 100_000), f"^100000x100000 pixels, {HUGE}"),
    "png, no width": (png_header(0, 4), "damaged, truncated or unsupported PNG header"),
    "png, zTXt bomb": (png(chunk(b"zTXt", b"Comment\0\0" + bomb())), "Decompressed data too large"),
    "png, iTXt bomb": (png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb())), "Decompressed data too large"),
    "png, profile bomb": (png(chunk(b"iCCP", b"name\0\0" + bomb())), "Decompressed data too large"),
    "png, header's checksum": (flipped(PNG, 30), "damaged, truncated or unsupported PNG header"),
    "png, data's checksum": (flipped(PNG, PNG.index(b"IDAT") + 9), "damaged or truncated PNG: .*checksum"),
    "png, chunk of 2 GiB": (PNG[:33] + b"\x7f\xff\xff\xffIDAT" + PNG[41:], "damaged or truncated PNG"),
    "png, 3 bits": (png(depth=3), "damaged, truncated or unsupported PNG header"),
    "png, no data": (png(pixels=None), "damaged or truncated PNG"),
    "png, too little data": (png(pixels=bytes(20)), "damaged or truncated PNG: image file is truncated"),
    "png, no palette": (without_palette(), "damaged or truncated PNG: indices without a palette"),
    "tiff, strips without number": (tiff({273: (4, 0xFFFFFFF0, 300)}), "damaged|unsupported TIFF header"),
    "tiff, directory outside": (b"II*\0" + struct.pack("<I", 2**31 - 1), "unsupported TIFF header"),
    "tiff, no tags": (b"II*\0" + struct.pack("<IHI", 8, 0, 0), "unsupported TIFF header"),
    "tiff, 2 Gi x 2 Gi": (tiff({256: (4, 1, 2**31 - 1), 257: (4, 1, 2**31 - 1)}), HUGE),
    "tiff, no pixels": (tiff({256: (4, 1, 0)}), "unsupported TIFF header"),
    "tiff, strips without rows": (tiff({278: (4, 1, 0)}), "damaged or truncated TIFF"),
    "tiff, data outside": (tiff({273: (4, 1, 2**31 - 16)}), "damaged or truncated TIFF"),
    "tiff, unknown compression": (tiff({259: (3, 1, 60000)}), "unsupported TIFF header"),
    "tiff, 60,000 samples": (tiff({277: (3, 1, 60000)}), "unsupported TIFF header"),
    "tiff, a tile of 1 GiB": (
        tiff({259: (3, 1, 8), 322: (4, 1, 32768), 323: (4, 1, 32768), 324: (4, 1, 300), 325: (4, 1, 16)}),
        "damaged or truncated TIFF: tiles of more than max_pixels",
    ),
    "tiff, floating point": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point pixels"),
    "tiff, 32 bits": (encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "more than 16 bits"),
    "gif, huge screen": (gif(screen=(65_535, 65_535)), f"65535x65535 pixels, {HUGE}"),
    "gif, huge frame": (gif(frame=(65_535, 65_535)), f"65535x65535 pixels, {HUGE}"),
    "gif, no frame": (b"GIF89a" + struct.pack("<HH", 4, 4) + b"\0\0\0;", "unsupported GIF header"),
    "jpeg, 65,500 x 65,500": (jpeg(height=65_500, width=65_500), f"65500x65500 pixels, {HUGE}"),
    "jpeg, more pixels than data": (jpeg(height=3000, width=3000), r"\d+ bytes cannot hold 3000x3000 pixels"),
    "jpeg, no height": (jpeg(height=0), "unsupported JPEG header"),
    "jpeg, 12 bits": (jpeg(bits=12), "unsupported JPEG header"),
    "jpeg, lossless": (jpeg(marker=0xC3), "damaged or truncated JPEG"),
    "jpeg, hierarchical": (jpeg(marker=0xC5), "damaged|unsupported"),
    "jpeg, its first bytes": (b"\xff\xd8\xff", "unsupported JPEG header"),
    "bmp, 2 Gi x 30": (bmp(18, 2**31 - 1), HUGE),
    "bmp, negative width": (bmp(18, -40), HUGE),
    "bmp, unknown header": (bmp(14, 77), "Unsupported BMP header"),
    "bmp, data outside": (bmp(10, 2**31 - 1), "damaged or truncated BMP"),
    "bmp, unknown compression": (bmp(30, 9), "Unsupported BMP compression"),
    "webp, length lies": (CUT["WEBP"][:4] + struct.pack("<I", 2**31) + CUT["WEBP"][8:], "could not create decoder"),
    "webp, a canvas and no image": (
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff" * 6,
        "could not create decoder",
    ),
    "webp, 16,384 x 16,384": (
        b"RIFF\x1e\0\0\0WEBPVP8L\x0a\0\0\0\x2f" + struct.pack("<I", 16_383 | 16_383 << 14) + bytes(20),
        f"16384x16384 pixels, {HUGE}",
    ),
    "ppm, 1,000,000 x 1,000,000": (b"P6\n1000000 1000000\n255\n", HUGE),
    "ppm, width of 5,000 digits": (b"P6\n" + b"9" * 5000 + b" 4\n255\n", "Token too long"),
    "ppm, black above white": (b"P5\n4 4\n70000\n" + bytes(99), "maxval"),
    "ppm, a value above white": (b"P3\n4 4\n255\n" + b"300 " * 48, "value too large"),
    "ppm, floating point": (b"Pf\n2 2\n-1.0\n" + bytes(16), "floating-point pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_with_its_reason(name):
    """No pixels, no other exception, no path of a build machine: one line that says what came."""
    data, message = BAD[name]
    assert ".cpp" not in refusal(lambda: decode(data, None, MAX), message)


def cmyk(transform: int) -> bytes:
    """CMYK as Adobe writes it: 0 plain, 2 YCCK."""
    data = encoded(picture().convert("CMYK"), "JPEG")
    at = data.index(b"Adobe") + 11
    return data[:at] + bytes([transform]) + data[at + 1 :]


ODD: dict[str, bytes] = {
    "jpeg, cmyk": cmyk(0),
    "jpeg, ycck": cmyk(2),
    "jpeg, broken exif": encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "jpeg, garbage as profile": encoded(picture(), "JPEG", icc_profile=b"garbage" * 50),
    "jpeg, bytes behind it": JPEG + b"\xde\xad" * 500,
    "jpeg and zip in one": JPEG + archive(),
    "jpeg, a script in a comment": segment(0xFE, b"<script>alert(1)</script>"),
    "jpeg, a segment of no length": JPEG[:4] + b"\0\0" + JPEG[6:],
    "png, garbage as profile": encoded(picture(), "PNG", icc_profile=b"garbage" * 50),
    "png, bytes behind it": PNG + b"more" * 500,
    "png, animated": encoded(picture(), "PNG", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "png, last checksum cut": PNG[:-3],
    "gif, no screen": gif(screen=(0, 0)),
    "gif, bytes behind it": encoded(picture(), "GIF") + archive(),
    "tiff, directory after itself": tiff(next_at=8),
    "tiff, 16 bits": encoded(Image.fromarray(np.full((30, 40), 700, np.uint16)), "TIFF"),
    "tiff, rows of a strip without number": tiff({278: (4, 1, 2**32 - 1)}),
    "webp, animated": encoded(picture(), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "bmp, top row first": bmp(22, -30),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_taken_as_what_it_is(name):
    """Bytes behind the image, a second frame, foreign colours or broken metadata do not lose its pixels."""
    pixels = decode(ODD[name], 3, MAX)
    small = name in ("gif, no screen", "tiff, directory after itself", "tiff, rows of a strip without number")
    assert pixels.shape == ((3, 4, 4) if small else (3, 30, 40))
    if name.startswith(("jpeg", "png")) and name != "jpeg, ycck":  # its colours are as strange as its header
        away = (pixels.int() - torch.from_numpy(np.array(picture())).permute(2, 0, 1)).abs()
        assert away.float().mean() < 4


def test_more_data_than_pixels_is_not_unpacked():
    """A PNG of 4 x 4 pixels whose data would be 64 MiB: the pixels come, and of the rest nothing is kept."""
    assert not decode(png(pixels=bytes(1 << 26)), 3, MAX).any()
