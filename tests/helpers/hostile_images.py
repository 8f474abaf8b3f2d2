"""Hostile and broken image files, with the expected error or image."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (12, 8)  # width and height, where there is a picture


def png(
    width: int,
    height: int,
    depth: int = 8,
    colour: int = 0,
    data: bytes = b"",
) -> bytes:
    """Return a PNG with this header; `data` may be too short for it."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data, 9))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, format: str, **kwargs) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **kwargs)
    return stream.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    shape = (
        SIZE[1],
        SIZE[0],
        {
            "RGB": 3,
            "RGBA": 4,
            "CMYK": 4,
        }.get(mode, 1),
    )
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 255, shape, np.uint8).squeeze(), mode
    )


ANIMATED = {"save_all": True, "append_images": [Image.new("RGB", SIZE, "red")]}
EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 8\n%%EndComments\n(%pipe%touch harm) (w) file\n%%EOF\n"

UNKNOWN = "cannot identify image file"
# name: (content of the file, error of the opener or decoder)
REJECTED: dict[str, tuple[bytes, str]] = {
    "bomb_below_the_limit_of_pil.png": (
        png(12_000, 12_000),
        "12,000 x 12,000 px.*MAX_IMAGE_PIXELS.*decompression bomb",
    ),
    "no_bytes.jpg": (b"", UNKNOWN),
    "cut_off.jpg": (encoded(noise(), "JPEG")[:-60], "truncated"),
    "cut_off.png": (encoded(noise(), "PNG")[:-60], "truncated|broken"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNKNOWN),
    "postscript.jpg": (POSTSCRIPT, UNKNOWN),
}
# name: content of an image with more than 8 bits per channel
DEEP: dict[str, bytes] = {
    "grey16.png": encoded(Image.fromarray(np.full((8, 12), 4000, np.uint16)), "PNG"),
    "grey32.tif.png": encoded(Image.fromarray(np.full((8, 12), 70_000, np.int32)), "TIFF"),
    "float.png": encoded(Image.fromarray(np.full((8, 12), 0.5, np.float32)), "TIFF"),
}
# name: content of a file that is read as an image of SIZE
VALID: dict[str, bytes] = {
    "cmyk.jpg": encoded(noise("CMYK"), "JPEG"),
    "rgba.png": encoded(noise("RGBA"), "PNG"),
    "palette.png": encoded(noise().quantize(8), "PNG", transparency=bytes([0, 128, 255])),
    "grey.png": encoded(noise("L"), "PNG"),
    "rgb16.png": png(
        *SIZE,
        depth=16,
        colour=2,
        data=(b"\0" + bytes(range(72))) * 8,
    ),
    "animated.gif": encoded(noise(), "GIF", **ANIMATED),
    "gif_called.jpg": encoded(noise(), "GIF"),
    "turned.jpg": encoded(noise(), "JPEG", exif=EXIF_TURNED),
    "broken_exif.jpg": encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}
