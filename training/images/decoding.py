"""Decodes image files to pixels; run as a script, this is a process that decodes for another one.

It needs only Pillow and numpy, so that such a process starts in a fraction of a second and stays small. A request comes
on standard input: its length, JSON, and the contents of images that are no files. The answer goes to standard output in
the same form. The process ends when its input ends, and the system closes the input however the other process dies.
"""

import io
import json
import math
import os
import signal
import struct
import sys
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

Box = tuple[float, float, float, float]  # left, top, width, height, as fractions of the upright image

LENGTH = struct.Struct("!Q")
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
KINDS = {"1": "1-bit", "P": "palette", "PA": "palette", "LA": "transparent", "RGBA": "transparent", "I": "16-bit"}


def decode(
    file: str | bytes,
    box: Box | None,
    size: tuple[int, int],
    num_channels: int,
    annotated: tuple[int, int] | None = None,
    quick: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Decodes one image.

    Args:
        file: its path or its content. The first frame of an animation is taken.
        box: the part to cut out. None: the largest part in the middle that has the shape of `size`.
        size: height and width, to which the part is resized, bicubic.
        num_channels: 1 for grey, 3 for RGB. Transparency is dropped, and 16 bits are cut to 8.
        annotated: height and width of the image that boxes were drawn on. An image that has this size only before it
            is turned upright is not turned; an image that has it neither before nor after is bad.
        quick: whether a JPEG of at least four times the size is decoded at a fraction of its own, which changes its
            pixels a little and is good enough to train on. Otherwise the pixels are those that a pipeline sees.

    Returns:
        (C, h, w), uint8, and the names of the conversions.

    Raises:
        Exception: any kind, for a corrupt image; `is_bad_image` tells it from a failure of the system.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        conversions = []
        if ";16" in image.mode or ";16" in str(image.tile):
            conversions.append("16-bit")
        elif image.mode != ("L" if num_channels == 1 else "RGB"):
            conversions.append(KINDS.get(image.mode, {"L": "grey", "RGB": "colour"}.get(image.mode, image.mode)))
        orientation = _annotated_orientation(image, annotated)
        if quick and image.format in ("JPEG", "MPO"):
            _shrink(image, orientation, box, size)
        image.load()
        turn = UPRIGHT.get(orientation)
        if turn is not None:
            conversions.append("EXIF-rotated")
            image = image.transpose(turn)
        return view(image, box, size, num_channels), conversions


def view(image: Image.Image, box: Box | None, size: tuple[int, int], num_channels: int) -> np.ndarray:
    """Cuts out and resizes a part of an upright image to (C, h, w), uint8; see `decode`."""
    image = _convert(image, num_channels)
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, _pixel_box(image.size, box, size))
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def aspect(file: str | bytes) -> float:
    """Reads width / height of the upright image from its header; 1 for a bad image."""
    height, width = upright_size(file) or (1, 1)
    return width / height


def upright_size(file: str | bytes) -> tuple[int, int] | None:
    """Reads height and width of the upright image from its header; None for a bad image."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return _turned(image.size, _orientation(image))[::-1]
    except Exception as error:
        if not is_bad_image(error):
            raise
        return None


def is_bad_image(error: Exception) -> bool:
    """Whether an error is the image's fault, and not that of the memory or of a disk that may recover."""
    if isinstance(error, OSError) and error.errno is not None:
        return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
    return not isinstance(error, MemoryError)


def decode_all(
    files: Sequence[str | bytes],
    boxes: Sequence[Box] | None,
    num_channels: int,
    pixels: Sequence[np.ndarray],
    annotated: Sequence[tuple[int, int]] | None = None,
    quick: bool = False,
) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Decodes a batch into `pixels`, B arrays (C, h, w).

    Returns:
        By position in the batch, why an image is bad, and what was converted.
    """
    failures, conversions = {}, {}
    for position, file in enumerate(files):
        try:
            if not file:
                raise ValueError("no content")
            box = None if boxes is None else boxes[position]
            size = None if annotated is None else tuple(annotated[position])
            pixels[position][:], converted = decode(file, box, pixels[position].shape[1:], num_channels, size, quick)
            if converted:
                conversions[position] = converted
        except Exception as error:  # Pillow's readers raise nearly everything
            if not is_bad_image(error):
                raise
            failures[position] = _reason(error)
    return failures, conversions


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"  # Pillow's text has an address in memory
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """Reads the orientation from the EXIF data; Pillow turns a TIFF itself."""
    try:
        # image.getexif() would decode a whole PNG first.
        return 1 if image.format == "TIFF" else Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # damaged EXIF in a sound image
        return 1


def _annotated_orientation(image: Image.Image, annotated: tuple[int, int] | None) -> int:
    """Finds the orientation in which an image is as it was when boxes were drawn on it."""
    orientation = _orientation(image)
    if annotated is None or _turned(image.size, orientation) == annotated[::-1]:
        return orientation
    if image.size == annotated[::-1]:
        return 1
    raise ValueError(f"{image.width}x{image.height} pixels, not {annotated[1]}x{annotated[0]} as its annotation says")


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation in SIDEWAYS else size


def _pixel_box(image_size: tuple[int, int], box: Box | None, size: tuple[int, int]) -> Box:
    """Turns a box into left, top, right and bottom in pixels of an image of this width and height."""
    width, height = image_size
    if box is None:
        scale = max(size[0] / height, size[1] / width)
        across, down = min(width, size[1] / scale), min(height, size[0] / scale)
        left, top = (width - across) / 2, (height - down) / 2
    else:
        left, top, across, down = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    return max(left, 0), max(top, 0), min(left + across, width), min(top + down, height)


def _shrink(image: Image.Image, orientation: int, box: Box | None, size: tuple[int, int]) -> None:
    """Makes Pillow decode a JPEG at a fraction of its size, if that leaves twice the pixels that are needed."""
    left, top, right, bottom = _pixel_box(_turned(image.size, orientation), box, size)
    spare = min((right - left) / size[1], (bottom - top) / size[0]) / 2
    if spare >= 2:
        image.draft(image.mode, (math.ceil(image.width / spare), math.ceil(image.height / spare)))


def _convert(image: Image.Image, num_channels: int) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels, which have no fixed range")
    return image.convert("L" if num_channels == 1 else "RGB")


# ------------------------------------------------------------------------------------------------ as a process


def write_message(file: BinaryIO, message: dict, *contents: bytes | memoryview) -> None:
    text = json.dumps(message).encode()
    file.write(LENGTH.pack(len(text)) + text)
    for content in contents:
        file.write(content)
    file.flush()


def read_message(file: BinaryIO) -> dict:
    """Reads one message.

    Raises:
        EOFError: the file has ended.
    """
    head = file.read(LENGTH.size)
    size = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else 0
    if not size or len(text := file.read(size)) < size:
        raise EOFError
    return json.loads(text)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more."""
    while True:
        try:
            request = read_message(requests)
            files = [file if isinstance(file, str) else requests.read(file) for file in request["files"]]
            num_channels = request["num_channels"]
            pixels = [np.zeros((num_channels, *size), np.uint8) for size in request["sizes"]]
            try:
                failures, conversions = decode_all(
                    files, request["boxes"], num_channels, pixels, request["annotated"], request["quick"]
                )
            except OSError as error:
                write_message(answers, {"error": [error.errno, error.strerror, error.filename]})
            else:
                contents = [image.data for image in pixels]
                write_message(answers, {"failures": failures, "conversions": conversions}, *contents)
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the whole process group gets these while the trainer still saves
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    serve(sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)  # a normal exit would try again to send what nobody reads
