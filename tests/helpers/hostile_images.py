"""Image files made to do harm, or broken as downloads are: what each holds, and what is to be read or said of it."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 8)  # width and height, where there is a picture


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG that claims what it is told to; its data need not be enough."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str, **kwargs) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **kwargs)
    return stream.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    shape = (SIZE[1], SIZE[0], {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1))
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8).squeeze(), mode)


def with_comment(size: int) -> bytes:
    """A PNG whose compressed comment becomes `size` bytes."""
    body = b"Comment\0\0" + zlib.compress(b"a" * size, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    plain = encoded(noise(), "PNG")
    return plain[:33] + chunk + plain[33:]


ANIMATED = {"save_all": True, "append_images": [Image.new("RGB", SIZE, "red")]}
EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 8\n%%EndComments\n(%pipe%touch harm) (w) file\n%%EOF\n"

# name: (what the file holds, what the error says)
REFUSED: dict[str, tuple[bytes, str]] = {
    "bomb.png": (png(60_000, 60_000), "decompression bomb"),
    "bomb_below_the_limit_of_pil.png": (png(12_000, 12_000), "12,000 x 12,000 px.*MAX_IMAGE_PIXELS"),
    "one_row_that_padding_makes_a_bomb.png": (png(60_000, 1, data=bytes(60_001)), "60,000 x 1 px, and a square of"),
    "bomb_in_a_comment.png": (with_comment(80 << 20), "(?i)decompressed data too large|text memory|cannot be read"),
    "zero_size.png": (png(0, 0), "it is n"),
    "no_bytes.jpg": (b"", "it is n"),
    "cut_off.jpg": (encoded(noise(), "JPEG")[:-60], "truncated"),
    "cut_off.png": (encoded(noise(), "PNG")[:-60], "truncated|broken"),
    "cut_within_the_header.jpg": (encoded(noise(), "JPEG")[:20], "it is n|cannot be read"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "it is n"),
    "text.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "it is n"),
    "postscript.jpg": (POSTSCRIPT, "it is n"),
    "grey16.png": (encoded(Image.fromarray(np.full((8, 12), 4000, np.uint16)), "PNG"), "more than 8 bits"),
    "grey32.tif.png": (encoded(Image.fromarray(np.full((8, 12), 70_000, np.int32)), "TIFF"), "more than 8 bits"),
    "float.png": (encoded(Image.fromarray(np.full((8, 12), 0.5, np.float32)), "TIFF"), "more than 8 bits"),
}
# name: what the file holds, of which a picture of SIZE is read
READ: dict[str, bytes] = {
    "cmyk.jpg": encoded(noise("CMYK"), "JPEG"),
    "rgba.png": encoded(noise("RGBA"), "PNG"),
    "palette.png": encoded(noise().quantize(8), "PNG", transparency=bytes([0, 128, 255])),
    "grey.png": encoded(noise("L"), "PNG"),
    "rgb16.png": png(*SIZE, depth=16, colour=2, data=(b"\0" + bytes(range(72))) * 8),
    "animated.gif": encoded(noise(), "GIF", **ANIMATED),
    "animated.webp": encoded(noise(), "WEBP", **ANIMATED),
    "animated.png": encoded(noise(), "PNG", **ANIMATED),
    "gif_called.jpg": encoded(noise(), "GIF"),
    "turned.jpg": encoded(noise(), "JPEG", exif=EXIF_TURNED),
    "broken_exif.jpg": encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "exif_of_something_else.png": encoded(noise(), "PNG", exif=b"no TIFF header"),
    "größe 日本語 🙂.png": encoded(noise(), "PNG"),
    "x" * 240 + ".png": encoded(noise(), "PNG"),
}


def directory(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


# What has the name of an image and is no file: how it is made, what the error says.
NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "directory.jpg": (directory, "no regular file"),
    "pipe.jpg": (pipe, "no regular file"),
    "device.jpg": (device, "no regular file"),
    "loop.jpg": (loop, "symbolic links"),
}
