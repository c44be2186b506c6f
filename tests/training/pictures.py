"""Small pictures for the tests of images, and ways to write them to files."""

import gzip
import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(number: int, size=(12, 10), mode="RGB") -> Image.Image:
    """One of height and width `size`, different for every number, smooth so that a JPEG changes little."""
    y, x = np.mgrid[: size[0], : size[1]]
    bands = [127 + 100 * np.sin(number + band + x / 5) * np.cos(number * band + y / 4) for band in range(3)]
    return Image.fromarray(np.stack(bands, 2).astype(np.uint8)).convert(mode)


def content(image: Image.Image, form="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_classes(root, counts: dict[str, int], size=(12, 10), first=0):
    """A folder of PNGs for each class; no two pictures are the same."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(first, size).save(root / name / f"{number}.png")
            first += 1
    return str(root)


def write_idx(path, array: np.ndarray):
    """The format of MNIST; gzipped if the name says so."""
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def png_head(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and has next to nothing in it."""
    return _png(width, height, 8, 0, bytes(100))


def deep_png(image: Image.Image) -> bytes:
    """A PNG with 16 bits for each of three channels, which Pillow reads and does not write."""
    rows = np.asarray(image).astype(">u2") * 257
    return _png(*image.size, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))


def _png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
