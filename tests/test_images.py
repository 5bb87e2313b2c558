"""Pixels in and out: every format and mode, and every way in which a file can be bad."""

import io
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from raypfk import images, isolated
from raypfk.images import BadImage, decode, encode_png, fit, load

DATA = Path(os.environ.get("RAYPFK_DATA") or Path(__file__).parents[2] / "shared" / "data")
IMAGENET = sorted((DATA / "imagenet-samples").glob("*"))
MAX = 10**8


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth colour picture in which no flip or turn looks like another."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) * 255 // (width + 2 * height)], -1)
    return Image.fromarray(rgb.astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def expected(data: bytes, mode: str) -> np.ndarray:
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))
    return pixels.transpose(2, 0, 1) if mode == "RGB" else pixels[None]


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims these dimensions."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


def cases() -> dict[str, bytes]:
    rgb = picture()
    alpha = rgb.convert("RGBA")
    alpha.putalpha(rgb.convert("L"))
    return {
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg-progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg-grey": encoded(rgb.convert("L"), "JPEG"),
        "jpeg-cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "png": encoded(rgb, "PNG"),
        "png-grey": encoded(rgb.convert("L"), "PNG"),
        "png-palette": encoded(rgb.quantize(16), "PNG"),
        "png-palette-transparent": encoded(rgb.quantize(16), "PNG", transparency=3),
        "png-alpha": encoded(alpha, "PNG"),
        "png-grey-alpha": encoded(alpha.convert("LA"), "PNG"),
        "png-bits": encoded(rgb.convert("1"), "PNG"),
        "bmp": encoded(rgb, "BMP"),
        "bmp-grey": encoded(rgb.convert("L"), "BMP"),
        "webp": encoded(rgb, "WEBP"),
        "webp-alpha": encoded(alpha, "WEBP", lossless=True),
        "gif": encoded(rgb, "GIF"),
        "tiff": encoded(rgb, "TIFF"),
        "tiff-cmyk": encoded(rgb.convert("CMYK"), "TIFF"),
        "ppm": encoded(rgb, "PPM"),
    }


CASES = cases()
GREY = {"jpeg-grey", "png-grey", "png-grey-alpha", "png-bits", "bmp-grey"}


@pytest.mark.parametrize("name", CASES)
def test_every_format_gives_the_pixels_that_pil_gives(name):
    """Any format and mode decodes to uint8 (C,H,W), in colour exactly as PIL's convert, in grey within rounding."""
    rgb, grey = decode(CASES[name], 3, MAX), decode(CASES[name], 1, MAX)
    assert rgb.dtype == grey.dtype == torch.uint8
    assert rgb.shape == (3, 30, 40)
    assert grey.shape == (1, 30, 40)
    assert np.array_equal(rgb.numpy(), expected(CASES[name], "RGB"))
    assert np.abs(grey.numpy().astype(int) - expected(CASES[name], "L")).max() <= 3


@pytest.mark.parametrize("name", CASES)
def test_channels_none_is_what_the_file_has(name):
    """One channel for greyscale files (with alpha too), three for the rest."""
    assert decode(CASES[name], None, MAX).shape[0] == (1 if name in GREY else 3)


def test_alpha_is_dropped_and_not_composited():
    """The colour under a fully transparent pixel stays."""
    image = Image.new("RGBA", (4, 4), (200, 10, 20, 0))
    assert decode(encoded(image, "PNG"), 3, MAX)[:, 0, 0].tolist() == [200, 10, 20]


def test_sixteen_bits_are_cut_to_the_upper_eight():
    """PIL's own convert would clip everything above 255 to white."""
    values = np.array([[0, 255, 256], [0x8000, 0xFEFF, 0xFFFF]], np.uint16)
    assert decode(encoded(Image.fromarray(values), "PNG"), 1, MAX)[0].tolist() == [[0, 0, 1], [128, 254, 255]]
    assert decode(encoded(Image.fromarray(values), "TIFF"), 3, MAX)[2].tolist() == [[0, 0, 1], [128, 254, 255]]


def test_animation_gives_its_first_frame():
    """A GIF and a WebP of two frames decode to the first."""
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for format in ("GIF", "WEBP"):
        data = encoded(red, format, save_all=True, append_images=[blue], duration=100)
        assert decode(data, 3, MAX)[0].float().mean() > 200


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_by_every_decoder(format, orientation):
    """All eight orientations come out as PIL's exif_transpose turns them, JPEG and the others alike."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), format, exif=exif)
    assert np.array_equal(decode(data, 3, MAX).numpy(), expected(data, "RGB"))


def test_unreadable_exif_does_not_lose_the_image():
    """Garbage in the EXIF block leaves the pixels as they are stored."""
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert decode(data, 3, MAX).shape == (3, 30, 40)


def test_phone_jpeg_with_a_second_picture_inside_decodes():
    """MPO (a JPEG with a preview behind it) is read as the JPEG it begins with."""
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(8, 8)])
    assert decode(data, 3, MAX).shape == (3, 30, 40)


def noise(format: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), format, **options)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_truncated_files_are_refused(format, share):
    """A file cut off anywhere is refused with one line, never filled up with grey."""
    data = noise(format)
    with pytest.raises(BadImage) as error:
        decode(data[: int(len(data) * share)], 3, MAX)
    assert "\n" not in str(error.value)


def test_truncated_jpeg_padded_with_zeros_or_without_its_end_is_refused():
    """A download that was allocated but not finished; a missing end-of-image marker; a progressive JPEG cut off."""
    data = noise("JPEG")
    half = len(data) // 2
    for bad in (data[:half] + bytes(len(data)), data[:-2], noise("JPEG", progressive=True)[:half]):
        with pytest.raises(BadImage, match="damaged or truncated JPEG"):
            decode(bad, 3, MAX)


@pytest.mark.parametrize("data", [b"", b"hello, I am a text file", bytes(1000), b"%PDF-1.7\n", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(data):
    """Empty files and foreign bytes give BadImage with a reason."""
    with pytest.raises(BadImage, match="empty file|not an image|unsupported JPEG header"):
        decode(data, 3, MAX)


def test_enormous_image_is_refused_unread():
    """The header is enough: 10 gigapixels of RGB are never allocated, whatever PIL's own limit."""
    with pytest.raises(BadImage, match="100000x100000 pixels, more than max_pixels=100000000"):
        decode(png_header(100_000, 100_000), 3, MAX)


def test_max_pixels_is_the_limit_and_not_pils():
    """A limit below and one above PIL's are both kept, and PIL's setting is left as it was."""
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match="more than max_pixels=1199"):
        decode(CASES["jpeg"], 3, 1199)
    assert decode(CASES["jpeg"], 3, 1200).shape == (3, 30, 40)
    with pytest.raises(BadImage, match="damaged or truncated PNG"):  # past the limit, then no pixels are there
        decode(png_header(20_000, 10_000), 1, 10**9)
    assert before == Image.MAX_IMAGE_PIXELS


def test_damaged_png_is_refused_and_does_not_crash():
    """torchvision 0.29's PNG decoder ends the process on such bytes. Ours refuses them, or they do no harm."""
    data, refused = CASES["png"], 0
    good = decode(data, 3, MAX)
    for position in range(50, len(data) - 20, 7):
        try:
            bad = decode(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :], 3, MAX)
        except BadImage:
            refused += 1
        else:
            assert torch.equal(bad, good)
    assert refused > 10


def test_pil_is_not_told_to_accept_truncated_images():
    """The global switch that fills up truncated images stays off."""
    assert images.decode is decode
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_fit_is_the_identity_where_nothing_is_to_do():
    """An image that fits is not copied."""
    image = decode(CASES["png"], 3, MAX)[:, :, :30]
    assert fit(image, 30, 30).data_ptr() == image.data_ptr()
    assert torch.equal(fit(image, 30, 30), image)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30), (33, 97), (300, 20)])
def test_fit_resizes_the_shorter_side_and_crops_the_centre(height, width):
    """The same picture as torchvision's Resize and CenterCrop, within rounding; uint8 (C,size,size)."""
    from torchvision.transforms.v2 import functional as T

    image = torch.from_numpy(np.asarray(picture(width, height)).copy()).permute(2, 0, 1)
    if max(height, width) > 8 * min(height, width):
        image = T.center_crop(image, [min(height, 8 * width), min(width, 8 * height)])
    ours = fit(image, 24, 20)
    theirs = T.center_crop(T.resize(image, [24], antialias=True), [20, 20])
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, 20, 20)
    offset = 1 if (24 * max(height, width) // min(height, width)) % 2 else 0  # odd sides round to either centre
    assert (ours.int() - theirs.int()).abs().max() <= 1 + offset * 16


def test_fit_of_a_line_does_not_blow_up():
    """1 x 100,000 pixels would be 224 x 22 million; only the centre is resized."""
    assert fit(torch.zeros(3, 1, 100_000, dtype=torch.uint8), 224, 224).shape == (3, 224, 224)


def test_fit_refuses_a_crop_larger_than_the_resized_image():
    """size > resize would need padding."""
    with pytest.raises(ValueError, match="a crop of 32 pixels"):
        fit(torch.zeros(1, 40, 40, dtype=torch.uint8), 28, 32)


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (8, 8), (1, 5)])
def test_encode_png_keeps_every_pixel(shape):
    """Array -> PNG -> the same pixels, grey as 1 channel and colour as 3."""
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    back = decode(encode_png(array), None, MAX).permute(1, 2, 0).numpy()
    assert np.array_equal(back.reshape(shape), array)
    assert back.shape[2] == (3 if len(shape) == 3 else 1)


def test_load_is_decode_and_fit():
    """load gives what a network takes: uint8 (C,size,size)."""
    got = load(CASES["webp"], size=16, resize=20, channels=1, max_pixels=MAX)
    assert torch.equal(got, fit(decode(CASES["webp"], 1, MAX), 20, 16))
    assert got.shape == (1, 16, 16)


@pytest.mark.skipif(not IMAGENET, reason=f"no ImageNet samples under {DATA} (set RAYPFK_DATA)")
def test_real_imagenet_files_decode_as_pil_decodes_them():
    """Real JPEGs: the same pixels as PIL, the greyscale ones recognised."""
    channels = []
    for path in IMAGENET[::8]:
        data = path.read_bytes()
        assert np.array_equal(decode(data, 3, MAX).numpy(), expected(data, "RGB"))
        channels.append(decode(data, None, MAX).shape[0] == 1)
        assert (Image.open(path).mode == "L") == channels[-1]


def test_a_process_decodes_a_small_image_once(monkeypatch):
    """The same pixels the next time, of each size that is asked for; a large image, or a bad one, is tried again."""
    small = encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8) + 91)  # of no other test
    large = encode_png(np.random.default_rng(0).integers(0, 256, (70, 70), np.uint8))
    tried = []
    monkeypatch.setattr(images, "load", lambda data, **how: tried.append(data) or load(data, **how))

    def decoded(size: int) -> list[torch.Tensor | BadImage]:
        how = {"size": size, "resize": size, "channels": 1, "max_pixels": 10**6}
        return list(isolated.decoded([small, large, b"none"], how, None))

    first, again, smaller = decoded(8), decoded(8), decoded(4)
    assert len(large) > isolated.SMALL
    assert Counter(tried) == {small: 2, large: 3, b"none": 3}
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and smaller[0].shape == (1, 4, 4)
    assert all(isinstance(found[2], BadImage) for found in (first, again, smaller))
