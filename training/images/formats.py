"""Reads images from folders of classes, idx files, tables of paths and data sets of the `datasets` library.

A reader returns an `ImageSet` for each split that it finds. Nothing is decoded here.
"""

import gzip
import hashlib
import io
import math
import os
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.sources import split_of
from training.data.tables import Table
from training.images.decoding import is_bad_image

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"}
IMAGE_SUFFIXES |= {".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
HASHED_BYTES = 2**31  # if all images have more, a digest covers only the size and the first bytes of each
FIRST_BYTES = 2**12

Splits = dict[str, "ImageSet"]  # "train", and "val" or else "test" if there is one


# ------------------------------------------------------------------------------------------- images of one split


class ArrayImages:
    """Pixels in memory, (N, C, H, W) uint8."""

    def __init__(self, pixels: np.ndarray, source: str, numbers: np.ndarray | None = None):
        self.pixels, self.source = pixels, source
        self.numbers = np.arange(len(pixels)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, indices: np.ndarray) -> "ArrayImages":
        return ArrayImages(self.pixels[indices], self.source, self.numbers[indices])

    def name(self, index: int) -> str:
        return f"{self.source}, image {self.numbers[index]}"

    def digests(self) -> list[bytes]:
        return [hashlib.sha256(image.tobytes()).digest() for image in self.pixels]

    def look(self, index: int) -> tuple[int, tuple[int, int]]:
        """The number of channels, and height and width, of an image."""
        return self.pixels.shape[1], self.pixels.shape[2:]


class StoredImages(ABC):
    """Images that have to be decoded; see `rows.EncodedImages`."""

    num_bytes: int  # of all images together

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, indices: np.ndarray) -> list[str | bytes]: ...

    def digests(self) -> list[bytes]:
        """The sha256 of each image: of its content, or of size and first bytes if all are large, or of an unreadable
        image's name."""
        is_whole = self.num_bytes <= HASHED_BYTES
        chunks = (np.arange(i, min(i + 256, len(self))) for i in range(0, len(self), 256))
        files = ((index, file) for chunk in chunks for index, file in zip(chunk, self.encoded(chunk), strict=True))
        return [_digest(file, is_whole) or self._digest_of_name(index) for index, file in files]

    def _digest_of_name(self, index: int) -> bytes:
        return hashlib.sha256(self.name(index).encode(errors="replace")).digest()

    def look(self, index: int) -> tuple[int, tuple[int, int]] | None:
        """Reads the number of channels, and height and width, from the image's header; None if it cannot be read."""
        [file] = self.encoded(np.array([index]))
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                is_grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
                return 1 if is_grey else 3, image.size[::-1]
        except Exception:  # decoding it will say what is wrong
            return None


class ImageFiles(StoredImages):
    """Image files under a folder."""

    def __init__(self, paths: list[str], root: Path):
        self.paths, self.root = paths, root

    def __len__(self):
        return len(self.paths)

    def select(self, indices):
        return ImageFiles([self.paths[index] for index in indices], self.root)

    def encoded(self, indices):
        return [os.path.join(self.root, self.paths[index]) for index in indices]

    def name(self, index):
        return os.fsencode(self.paths[index]).decode(errors="backslashreplace")

    @cached_property
    def num_bytes(self):
        return sum(os.path.getsize(path) for path in self.encoded(np.arange(len(self))) if os.path.exists(path))


class DatasetImages(StoredImages):
    """The undecoded images in a column of a `datasets.Dataset`."""

    def __init__(self, dataset, column: str, source: str, numbers: np.ndarray | None = None):
        self.dataset, self.column, self.source = dataset.select_columns([column]), column, source
        self.numbers = np.arange(len(dataset)) if numbers is None else numbers

    def __len__(self):
        return len(self.dataset)

    def select(self, indices):
        return DatasetImages(self.dataset.select(indices), self.column, self.source, self.numbers[indices])

    def encoded(self, indices):
        return [content_of(row) for row in self.dataset[indices.tolist()][self.column]]

    def name(self, index):
        path = (self.dataset[int(index)][self.column] or {}).get("path")
        return f"{self.source}, {os.path.basename(path) if path else f'row {self.numbers[index] + 1}'}"

    @property
    def num_bytes(self):
        return self.dataset.data.nbytes


def content_of(image: dict | str | None) -> str | bytes:
    """The bytes of an undecoded image of the `datasets` library, or else its path; b"" if it is missing."""
    if isinstance(image, str):
        return image
    image = image or {}
    return image["path"] if image.get("bytes") is None and image.get("path") else image.get("bytes") or b""


def _digest(file: str | bytes, is_whole: bool) -> bytes | None:
    """The sha256 of a file; None if it cannot be read."""
    if isinstance(file, bytes):
        content, size = file, len(file)
    else:
        try:
            with open(file, "rb", buffering=0) as opened:
                content, size = opened.read(-1 if is_whole else FIRST_BYTES), os.fstat(opened.fileno()).st_size
        except OSError as error:
            if not is_bad_image(error):
                raise
            return None
    return hashlib.sha256(content if is_whole else b"%d " % size + content[:FIRST_BYTES]).digest()


@dataclass
class ImageSet:
    """The images of one split, and their labels as the data has them: class names or numbers."""

    images: ArrayImages | ImageFiles | DatasetImages
    labels: list | None
    class_names: list[str] | None = None
    license: str | None = None

    def select(self, indices: np.ndarray) -> "ImageSet":
        labels = None if self.labels is None else [self.labels[index] for index in indices]
        return ImageSet(self.images.select(indices), labels, self.class_names, self.license)


# --------------------------------------------------------------------------------------------------- embedded


def embedded_digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels. Every fifth digit is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    everything = ImageSet(ArrayImages(pixels, "digits"), digits.target.tolist(), license="CC-BY-4.0")
    is_held_out = np.arange(len(pixels)) % 5 == 0
    return {
        "train": everything.select(np.flatnonzero(~is_held_out)),
        "val": everything.select(is_held_out.nonzero()[0]),
    }


# --------------------------------------------------------------------------------------------------- idx files


def is_idx(path: Path) -> bool:
    return bool(re.search(r"images.*idx\d", path.name)) and path.is_file()


def read_idx(files: list[Path], labelled: bool) -> Splits:
    """Reads files of the MNIST format, gzipped or not, and the labels beside them."""
    splits: dict[str, ImageSet] = {}
    for path in sorted(files):
        is_test = len(files) > 1 and re.search(r"t10k|test|val", path.name)
        split = "test" if is_test else "train"
        if split in splits:
            raise ValueError(f"{path.parent} has several idx files for {split}ing: name one of them with --data")
        pixels = _read_array(path)
        if pixels.ndim == 4 and pixels.shape[3] in (1, 3, 4):
            pixels = pixels.transpose(0, 3, 1, 2)
        elif pixels.ndim == 3:
            pixels = pixels[:, None]
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3, 4) or 0 in pixels.shape:
            raise ValueError(f"{path}: an array {pixels.shape} is no set of images (N, height, width[, channels])")
        splits[split] = ImageSet(ArrayImages(np.array(pixels, order="C"), path.name), None)
        if labelled:
            splits[split].labels = _read_labels(path, len(pixels))
    if "train" not in splits:
        raise ValueError(f"{files[0].parent} has no idx file of training images, only {files[0].name}")
    return splits


def _read_labels(images: Path, count: int) -> list[int]:
    stem = re.sub(r"idx\d", "idx1", images.name.removesuffix(".gz").replace("images", "labels"))
    beside = [images.with_name(stem + suffix) for suffix in ("", ".gz")]
    path = next((path for path in beside if path.exists()), None)
    if path is None:
        raise ValueError(f"{images} has no labels: {beside[0]}[.gz] is missing")
    labels = _read_array(path)
    if labels.shape != (count,):
        raise ValueError(f"{path} has labels {labels.shape}, but {images.name} has {count} images")
    return labels.tolist()


def _read_array(path: Path) -> np.ndarray:
    """Reads an array of unsigned bytes from an idx file (LeCun's description of MNIST)."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        zero, kind, num_dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{num_dimensions}I", content, 4)
    except (gzip.BadGzipFile, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or not what its name says") from error
    if zero or kind != 8:
        raise ValueError(f"{path} is no idx file of unsigned bytes: it begins with {content[:4].hex(' ')}")
    begin = 4 + 4 * num_dimensions
    if len(content) - begin != math.prod(shape):
        raise ValueError(f"{path} is damaged: {len(content) - begin} values, but its head says {shape}")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


# ----------------------------------------------------------------------------------------------- folders of files


def read_folder(root: Path, labelled: bool) -> Splits:
    """Reads folders that each hold a class, at the top or under train/ and val/ (valid*, dev*, test*)."""
    top = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    names = {name: split_of(name) for name in top if split_of(name) or any(_image_files(root / name))}
    if not names or not all(names.values()):
        return {"train": _read_classes(root, labelled)}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{root} has several folders for one split: {', '.join(names)}; leave one of each")
    folders = {split: root / name for name, split in names.items()}
    return {split: _read_classes(folders[split], labelled) for split in needed(folders)}


def needed(splits: Container[str], validation: str = "val") -> list[str]:
    """Chooses the splits to read. The test part validates if there is no validation part."""
    held_out = [split for split in (validation, "test") if split in splits]
    return ["train"] * ("train" in splits) + held_out[:1]


def _read_classes(root: Path, labelled: bool) -> ImageSet:
    paths = [path.relative_to(root) for path in _image_files(root)]
    if not paths:
        raise ValueError(f"{root} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    files = ImageFiles([str(path) for path in paths], root)
    if not labelled:
        return ImageSet(files, None)
    if outside := [path.name for path in paths if len(path.parts) == 1]:
        raise ValueError(
            f"{root} holds {len(outside)} images outside of its class folders ({', '.join(outside[:3])}): move them "
            "into the folders of their classes"
        )
    labels = [path.parts[0] for path in paths]
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if empty := sorted(set(folders) - set(labels)):
        raise ValueError(f"{root}: the class folder {empty[0]!r} holds no image; fill or remove it")
    return ImageSet(files, labels, folders)


def _image_files(root: Path) -> Iterator[Path]:
    """Yields the images under a folder, sorted, without hidden ones. Links to a folder above are not followed."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        above = [Path(folder).resolve(), *Path(folder).resolve().parents]
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and Path(folder, name).resolve() not in above
        )
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(folder, name)


# -------------------------------------------------------------------------------------------------------- tables


def read_table(table: Table, root: Path, image_column: str, label_column: str | None) -> ImageSet:
    """Reads a table of labels and of image paths, which are relative to `root`."""
    paths = table.column(image_column, "image_column")
    missing = []
    for row, path in enumerate(paths):
        if not isinstance(path, str) or not path:
            raise ValueError(f"{table.where(row)}: {image_column} must be the path of an image, not {path!r}")
        if not (root / path).is_file():
            missing.append(f"{table.where(row)}: {path}")
    if missing:
        shown = "; ".join(missing[:5]) + ("; ..." if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} of {len(paths)} images are missing: {shown}; paths are relative to {root}")
    labels = None if label_column is None else table.column(label_column, "label_column")
    for row, label in enumerate(labels or []):
        if label is None or label == "":
            raise ValueError(f"{table.where(row)}: no label")
    return ImageSet(ImageFiles(paths, root), labels)


def read_dataset(dataset, source: str, image_column: str, label_column: str | None, root: Path) -> ImageSet:
    """Reads one split of a Hub data set or of a parquet file. Paths in it are relative to `root`."""
    dataset, class_names = undecoded(dataset, source, image_column, label_column)
    if class_names is None and label_column is not None:
        labels = list(dataset[label_column])
    elif label_column is not None:
        labels = [name_of(label, class_names, f"{source}, row {n}") for n, label in enumerate(dataset[label_column], 1)]
    else:
        labels = None
    if any(label is None for label in labels or []):
        raise ValueError(f"{source}, row {labels.index(None) + 1}: no label")
    if not isinstance(dataset.features[image_column], _image_type()):
        table = Table({image_column: list(dataset[image_column])}, [(source, len(dataset))])
        images = read_table(table, root, image_column, None).images
    else:
        images = DatasetImages(dataset, image_column, source)
    return ImageSet(images, labels, class_names, dataset.info.license or None)


def undecoded(dataset, source: str, image_column: str, label_column: str | None):
    """Makes a data set return images as they are stored.

    Returns:
        The data set, and the names of its classes if it has them.

    Raises:
        ValueError: a column is missing or holds something else; the message lists the columns.
    """
    import datasets

    features = dataset.features or {}
    for name, what in ((image_column, "image_column"), (label_column, "label_column")):
        if name is not None and name not in features:
            raise ValueError(f"{source}: no column {name!r}; choose one of {sorted(features)} with --{what}")
    stored = features[image_column]
    is_stored = isinstance(stored, dict) and set(stored) == {"bytes", "path"}
    if isinstance(stored, datasets.Image) or is_stored or stored in map(datasets.Value, ("binary", "large_binary")):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    elif stored not in map(datasets.Value, ("string", "large_string")):
        raise ValueError(f"{source}: column {image_column!r} holds {stored}, not images: choose another --image_column")
    label = features.get(label_column)
    return dataset, label.names if isinstance(label, datasets.ClassLabel) else None


def _image_type() -> type:
    import datasets

    return datasets.Image


def name_of(label: int | None, class_names: list[str], where: str) -> str:
    """The name of a class id. Raises ValueError if the id is out of range."""
    if label is None or not 0 <= label < len(class_names):
        raise ValueError(
            f"{where}: label {label} is outside of the {len(class_names)} classes, 0 to {len(class_names) - 1}"
        )
    return class_names[label]


def label_ids(names: list[str], labels: list | None = None) -> dict[str, int]:
    """Maps every label, as text, to its class id.

    Args:
        names: the classes in the order of their ids.
        labels: if none of them is a name, labels are taken for ids, as in idx files.
    """
    by_name = {name: number for number, name in enumerate(names)}
    if labels and not by_name.keys() & set(map(str, labels)):
        return {str(number): number for number in range(len(names))}
    return by_name


def unknown_label(label, ids: dict[str, int]) -> str:
    """The part of an error message that names an unknown label and the classes."""
    shown = ", ".join(list(ids)[:20]) + (", ..." if len(ids) > 20 else "")
    return f"the label {label!r}, which is none of the {len(ids)} classes: {shown}"
