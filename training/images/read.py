"""Reads images to train on: handwritten digits, local files of every kind, a Hub data set, a stream.

    images = read_images("photos/", num_workers=2)  # photos/cat/1.jpg, photos/dog/2.png, ...
    images.train.images([0, 1, 2], size=(224, 224)), images.train.labels[:3], images.label_names

`formats.py` finds the images, `rows.py` loads them, and `stream.py` reads a stream.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training.data.fingerprints import digest_of, fingerprint_of
from training.data.holdout import hold_out, key_of
from training.data.sources import has_parquet, is_saved, load_hub, load_local
from training.data.tables import read_tables
from training.images.formats import (
    ArrayImages,
    ImageSet,
    Splits,
    embedded_digits,
    is_idx,
    label_ids,
    needed,
    read_dataset,
    read_folder,
    read_idx,
    read_table,
    unknown_label,
)
from training.images.rows import ArrayRows, BadImageLimit, Decoder, EncodedRows, ImageRows
from training.images.stream import stream_images

SMALL = 128  # pixels of a side; smaller images of one size keep their size
NUM_LOOKED_AT = 256  # images that channels and size are taken from


@dataclass
class ImageData:
    """The data that `--data` names. `notes` are for a person; `fingerprint` covers images, labels and split."""

    train: ImageRows
    validation: ImageRows
    label_names: list[str]  # in the order of their ids; none without labels
    num_channels: int  # 1 grey, 3 colour
    image_size: tuple[int, int] | None  # height and width, where they are small and one for all
    fingerprint: str
    source: str
    license: str | None = None
    notes: list[str] = field(default_factory=list)


def read_images(
    data: str,
    *,
    validation_data: str | None = None,
    validation_fraction: float = 0.1,
    image_column: str = "image",
    label_column: str = "label",
    label_names: list[str] | None = None,
    labelled: bool = True,
    num_channels: int | None = None,
    streaming: bool = False,
    max_bad_images: float = 0.01,
    seed: int = 0,
    num_workers: int = 0,
) -> ImageData:
    """Reads the images that `data` names.

    Args:
        data: "embedded" (scikit-learn's digits); a folder with a folder for each class, at the top or under train/ and
            val/ or test/; a folder with idx files (the MNIST format), or one such file; a .csv, .json, .jsonl or
            .parquet file with a column of paths, relative to it, or (parquet) of contents; a folder that `datasets` has
            saved; or a Hub data set, "name" or "name:config".
        validation_data: other data of these kinds to validate on: its validation part, or else its training part.
        validation_fraction: the part of each class to hold out where the data has no validation part; see
            `choose_validation`.
        image_column, label_column: columns of a table or data set.
        label_names: the classes in the order of their ids; None: sorted, or as the data set has them. Labels that are
            numbers may be called by other names.
        labelled: whether labels are needed.
        num_channels: 1 makes all images grey, 3 colour; None: grey if all images are, colour for a stream.
        streaming: whether to read a Hub data set or parquet files as they arrive, see `stream_images`.
        max_bad_images: the part of the images that may be unreadable and is then replaced, see `EncodedRows`.
        seed: chooses the images to hold out.
        num_workers: processes that decode; 0: this process does.

    Raises:
        ValueError: something is missing, broken or ambiguous; the message names it.
    """
    check_ranges(validation_fraction, max_bad_images, num_channels)
    if label_names is not None and (len(label_names) < 2 or len(set(label_names)) < len(label_names)):
        raise ValueError(f"label_names must be several different names, not {','.join(label_names)!r}")
    columns = image_column, label_column if labelled else None
    path = Path(data).expanduser()
    source = path.resolve().name if path.exists() else data
    options = {"decoder": Decoder(num_workers), "limit": BadImageLimit(max_bad_images)}
    if streaming:
        if validation_data is not None:
            raise ValueError("validation_data does not go with streaming, which validates on what the data set has")
        train, validation, names, license, fingerprint = stream_images(
            _open_stream(data),
            data,
            *columns,
            label_names,
            root=root_of(path),
            num_channels=num_channels or 3,
            **options,
        )
        return ImageData(train, validation, names, num_channels or 3, None, fingerprint, source, license)

    splits = _read(data, *columns)
    if "train" not in splits:
        raise ValueError(f"{data} has no part to train on, only {', '.join(splits)}")
    notes = []
    if validation_data is not None:
        held_out = _read(validation_data, *columns)
        held_out = next(held_out[split] for split in ("val", "test", "train") if split in held_out)
        splits = {"train": splits["train"], "val": held_out}
    train, validation = splits["train"], splits.get("val") or splits.get("test")
    if validation is not None and "val" not in splits:
        notes.append("validating on the test part, since there is no other")
    digests = train.images.digests()
    if validation is None:
        held_out = choose_validation(digests, train.labels, validation_fraction, seed)
        train, validation = train.select(np.flatnonzero(~held_out)), train.select(np.flatnonzero(held_out))
        digests, held_out_digests = (_where(digests, part) for part in (~held_out, held_out))
    else:
        held_out_digests = validation.images.digests()
    notes += overlap(digests, held_out_digests, validation)
    names, labels = [], [None, None]
    if labelled:
        names = _name_classes(train, label_names, data)
        ids = label_ids(names, train.class_names is None and train.labels)
        labels = [_number_labels(part, ids, data) for part in (train, validation)]
    channels, image_size = look_at(train, num_channels, data)

    def rows(part: ImageSet, labels: np.ndarray | None, quick: bool) -> ImageRows:
        if isinstance(part.images, ArrayImages):
            return ArrayRows(part.images.pixels, labels, num_channels=channels)
        return EncodedRows(part.images, labels, num_channels=channels, quick=quick, **options)

    hashed = [digest_of(part) for part in (digests, held_out_digests)]
    numbers = [None if part is None else part.tolist() for part in labels]
    fingerprint = fingerprint_of("images", names, hashed, numbers)
    if data == "embedded":
        source = "scikit-learn's 1,797 handwritten digits"
    parts = map(rows, (train, validation), labels, (True, False))
    return ImageData(*parts, names, channels, image_size, fingerprint, source, train.license, notes)


def check_ranges(validation_fraction: float, max_bad_images: float, num_channels: int | None):
    """Raises ValueError if an option of a reader of images is out of its range."""
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, not {validation_fraction}")
    if not 0 <= max_bad_images <= 1:
        raise ValueError(f"max_bad_images must lie between 0 and 1, not {max_bad_images}")
    if num_channels not in (None, 1, 3):
        raise ValueError(f"num_channels must be 1 (grey) or 3 (colour), not {num_channels}")


# ------------------------------------------------------------------------------------------------ kinds of data


def _read(data: str, image_column: str, label_column: str | None) -> Splits:
    """Reads the splits of what `data` names, at least one."""
    path, labelled = Path(data).expanduser(), label_column is not None
    if data == "embedded":
        return embedded_digits()
    if is_saved(path):
        return _from_datasets(load_local(path), path, image_column, label_column)
    if idx := [file for file in (path.iterdir() if path.is_dir() else [path]) if is_idx(file)]:
        return read_idx(idx, labelled)
    if has_parquet(path):
        return _from_datasets(load_local(path), path, image_column, label_column)
    if path.is_dir():
        return read_folder(path, labelled)
    if path.suffix in (".csv", ".tsv", ".json", ".jsonl") and path.exists():
        return {"train": read_table(read_tables(str(path))[0], path.parent, image_column, label_column)}
    if path.exists():
        raise ValueError(f"{path}: expected a folder, or an idx, .csv, .json, .jsonl or .parquet file")
    return _from_datasets(load_hub(data, trains=False), path, image_column, label_column, data)


def _from_datasets(found, path: Path, image_column: str, label_column: str | None, source: str = "") -> Splits:
    """Reads the splits of a `datasets.DatasetDict`; a `datasets.Dataset` is one split to train on."""
    source = source or str(path)
    if not isinstance(found, dict):
        found = {"train": found}
    if not (names := needed(found, "validation")):
        raise ValueError(f"{source} has no split 'train', 'validation' or 'test', only {sorted(found)}")
    splits = {
        name: read_dataset(found[name], f"{source}, split {name}", image_column, label_column, root_of(path))
        for name in names
    }
    return {name.replace("validation", "val"): split for name, split in splits.items()}


def root_of(path: Path) -> Path:
    """The folder that paths in a data set are relative to: its own, or the current one for a Hub data set."""
    return path if path.is_dir() else path.parent if path.exists() else Path()


def _open_stream(data: str):
    path = Path(data).expanduser()
    if has_parquet(path):
        return load_local(path, streaming=True)
    if data == "embedded" or path.exists():
        raise ValueError(f"streaming needs a Hub data set or parquet files, which {data!r} is not: leave streaming off")
    return load_hub(data, streaming=True)


# ----------------------------------------------------------------------------------------------- split and labels


def choose_validation(digests: list[bytes], labels: list | None, fraction: float, seed: int) -> np.ndarray:
    """Chooses the images to validate on: a part of each class, and at least one image of a class that has several.

    The choice is by content, so that neither order nor duplicates matter; see `hold_out`. Another seed chooses others.

    Args:
        digests: (N,), the sha256 of each image.
        labels: (N,), or None to take all images for one class.

    Returns:
        (N,) bool.
    """
    held_out = np.zeros(len(digests), bool)
    if fraction == 0:
        return held_out
    keys = np.array([key_of(digest) for digest in digests], np.uint64)
    keys ^= np.random.default_rng(seed).integers(2**64, dtype=np.uint64) if seed else np.uint64(0)
    classes = np.zeros(len(keys), np.int64) if labels is None else np.unique(np.array(labels), return_inverse=True)[1]
    for members in np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes))[:-1]):
        chosen = hold_out(keys[members], fraction)
        if not chosen.all():  # or nothing would be left to train on
            held_out[members[chosen]] = True
    return held_out


def _where(digests: list[bytes], chosen: np.ndarray) -> list[bytes]:
    return [digests[index] for index in np.flatnonzero(chosen)]


def overlap(train: list[bytes], validation: list[bytes], images: ImageSet) -> list[str]:
    """Notes validation images that are training images too, and training images that are repeated."""
    seen = set(train)
    notes = []
    if both := [number for number, digest in enumerate(validation) if digest in seen]:
        named = ", ".join(images.images.name(number) for number in both[:3]) + (", ..." if len(both) > 3 else "")
        notes.append(f"{len(both)} of {len(validation)} validation images are training images too: {named}")
    if repeated := len(train) - len(seen):
        notes.append(f"{repeated} of {len(train)} training images are there twice")
    return notes


def _name_classes(train: ImageSet, given: list[str] | None, data: str) -> list[str]:
    """Names the classes in the order of their ids; numbers are sorted by size."""
    names = given or train.class_names
    if names is None:
        found = {str(label) for label in train.labels}
        names = sorted(found, key=int if all(name.removeprefix("-").isdecimal() for name in found) else None)
    if len(names) < 2:
        raise ValueError(f"{data} has one class only, {', '.join(names)!r}: classifying needs two or more")
    counts = Counter(map(str, train.labels))
    if given is None and train.class_names and (empty := [name for name in names if not counts[name]]):
        raise ValueError(f"{data}: no training image has the class {empty[0]!r}; add some, or give label_names")
    return list(names)


def _number_labels(images: ImageSet, ids: dict[str, int], data: str) -> np.ndarray:
    """Turns labels into class ids, (N,) int64.

    Raises:
        ValueError: a label is none of the classes; the message names the image.
    """
    for number, label in enumerate(images.labels):
        if str(label) not in ids:
            raise ValueError(f"{data}: {images.images.name(number)} has {unknown_label(label, ids)}")
    return np.array([ids[str(label)] for label in images.labels], np.int64)


def look_at(train: ImageSet, num_channels: int | None, data: str) -> tuple[int, tuple[int, int] | None]:
    """Finds the channels of the images, and their size if all are small and of one size, from a few hundred images."""
    if len(train.images) == 0:
        raise ValueError(f"{data} has no image to train on")
    chosen = np.unique(np.linspace(0, len(train.images) - 1, NUM_LOOKED_AT).astype(int))
    found = [seen for index in chosen if (seen := train.images.look(int(index))) is not None]
    if not found:
        raise ValueError(f"{data}: none of the {len(chosen)} images looked at can be identified")
    channels = num_channels or max(seen[0] for seen in found)
    if channels not in (1, 3):
        raise ValueError(f"{data}: images with {channels} channels: set num_channels to 3 (colour) or 1 (grey)")
    sizes = {tuple(seen[1]) for seen in found}
    is_small = len(sizes) == 1 and max(min(sizes)) <= SMALL
    return channels, min(sizes) if is_small else None
