"""Encoded images in, uint8 tensors out.

One file is always decoded by one decoder. JPEG by torchvision: a quarter faster than PIL, and it refuses a file
without its end, where PIL may fill up. All else by PIL: torchvision's PNG decoder (0.29) crashes the process on
damaged files.
"""

import io
import math
import re
import threading
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
Channels = Literal[1, 3]

_BEGINNINGS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112
_TILE = (0x0142, 0x0143)
_STRIP = 8  # a longer image keeps its centre of this many squares before it is resized
_limit_lock = threading.Lock()


class BadImage(Exception):
    """Bytes that are no usable image; one line says why."""


def decode(data: bytes, channels: Channels | None, max_pixels: int) -> torch.Tensor:
    """All pixels of an encoded image, uint8 (C,H,W).

    channels: 1 grey, 3 RGB, None what the file has (3 unless it is greyscale). Of an animation the first frame;
    alpha is dropped as PIL's `convert` does (the colour below stays); 16 bits are cut to the upper 8; the EXIF
    orientation is applied. Raises BadImage: empty, not an image, truncated or damaged, over `max_pixels` (unread).
    """
    image = _open(data, max_pixels)
    if channels is None:
        channels = 1 if image.mode in _GREY else 3
    is_jpeg = image.format in ("JPEG", "MPO")
    if is_jpeg and 8 * len(data) < math.ceil(image.width / 8) * math.ceil(image.height / 8):
        # A Huffman code has a bit or more for each block of 8 x 8; the decoder would fill up with grey, silently.
        raise _damaged("JPEG", f"{len(data)} bytes cannot hold {image.width}x{image.height} pixels")
    pixels_CHW = _decode_jpeg(data, channels) if is_jpeg else _decode_pil(image, channels, max_pixels)
    return _upright(pixels_CHW, image)


def fit(image: torch.Tensor, resize: int, size: int) -> torch.Tensor:
    """(C,H,W) to (C,size,size) uint8: shorter side to `resize` (antialiased bilinear), then the centre crop.

    An image that fits already comes back as it is, not copied. A strip longer than 8:1 is cropped to 8:1 first:
    a line of 1 x 10,000 pixels would otherwise be blown up to 224 x 2,240,000.
    """
    if size > resize:
        raise ValueError(f"a crop of {size} pixels does not fit in a shorter side of {resize}")
    height, width = image.shape[-2:]
    shorter = min(height, width)
    if shorter != resize:
        image = _centre(image, min(height, _STRIP * shorter), min(width, _STRIP * shorter))
        target = [resize * side // shorter for side in image.shape[-2:]]
        image = F.interpolate(image[None], target, mode="bilinear", antialias=True, align_corners=False)[0]
    return _centre(image, size, size)


def load(data: bytes, *, size: int, resize: int, channels: Channels, max_pixels: int) -> torch.Tensor:
    """`decode`, then `fit`: uint8 (C,size,size)."""
    return fit(decode(data, channels, max_pixels), resize, size)


def encode_png(array: np.ndarray) -> bytes:
    """uint8 (H,W) or (H,W,3) as PNG. Stored, not compressed: fast, and the same bytes whatever zlib is installed."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The header, read: format, mode and size; the pixels are still untouched."""
    if len(data) == 0:
        raise BadImage("empty file")
    try:
        with _limit_lock:  # PIL's own limit is a global: max_pixels takes its place while the header is read
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(io.BytesIO(data), formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except Image.UnidentifiedImageError:
        raise BadImage(_foreign(data)) from None
    except MemoryError:
        raise
    except Exception as error:  # a plugin raises anything on foreign bytes
        raise _damaged("image header", error) from None
    if image.width * image.height > max_pixels:
        raise BadImage(f"{image.width}x{image.height} pixels, more than max_pixels={max_pixels}")
    return image


def _foreign(data: bytes) -> str:
    """Why PIL knows no format for it."""
    kind = next((name for beginning, name in _BEGINNINGS.items() if data.startswith(beginning)), None)
    if kind:
        return f"damaged, truncated or unsupported {kind} header"
    return f"not an image in a known format ({', '.join(FORMATS)}): it begins with {data[:16]!r}"


def _decode_jpeg(data: bytes, channels: Channels) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg  # 2 s to import, in every process: only where it is needed

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
    except RuntimeError as error:
        raise _damaged("JPEG", re.split(r"\.cpp:\d+, |: ", str(error).split("\n")[0])[-1]) from None


def _decode_pil(image: Image.Image, channels: Channels, max_pixels: int) -> torch.Tensor:
    try:
        if image.format == "TIFF" and math.prod(image.tag_v2.get(side, 1) for side in _TILE) > max_pixels:
            raise ValueError(f"tiles of more than max_pixels={max_pixels}")  # PIL allocates one, whatever the image is
        if image.format == "PNG":  # PIL passes over the checksums when it reads pixels; verify() uses the image up
            _open(image.fp.getvalue(), image.width * image.height).verify()
            if image.mode == "P" and image.palette is None:
                raise ValueError("indices without a palette")
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray(_upper_byte(np.asarray(image)))
        elif image.mode == "F":
            raise ValueError("floating-point pixels")
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise _damaged(image.format or "image", error) from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _upper_byte(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("pixels of more than 16 bits")
    return (values.astype(np.uint16) >> 8).astype(np.uint8)


def _upright(pixels_CHW: torch.Tensor, image: Image.Image) -> torch.Tensor:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable EXIF data do not make the pixels unusable
        return pixels_CHW
    if orientation in (5, 7):
        pixels_CHW = pixels_CHW.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 7: (1, 2)}
    turns = {6: -1, 8: 1}
    if orientation in flips:
        return pixels_CHW.flip(flips[orientation])
    return torch.rot90(pixels_CHW, turns[orientation], (1, 2)) if orientation in turns else pixels_CHW


def _centre(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def _damaged(what: str, error: object) -> BadImage:
    return BadImage(f"damaged or truncated {what}: {' '.join(str(error).split()) or type(error).__name__}"[:300])
