"""Reads images with boxes to train on: digits on canvases, COCO, Pascal VOC, YOLO, a Hub data set.

    data = read_detection("coco/", num_workers=2)  # coco/annotations/instances_train2017.json, coco/train2017/, ...
    data.train.boxes(0), data.train.classes(0)  # (n, 4), (n,): corners as fractions of the image, class ids

`formats.py`, `columns.py` and `canvases.py` read the boxes, and `batches.py` makes batches of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from training.data.fingerprints import digest_of, fingerprint_of
from training.data.sources import has_parquet, is_saved, load_hub, load_local, split_of
from training.detection.canvases import embedded_canvases
from training.detection.columns import BOX_FORMATS, read_objects
from training.detection.formats import (
    BoxSet,
    Splits,
    choose_splits,
    find_coco,
    find_voc,
    find_yolo,
    read_coco,
    read_voc,
    read_yolo,
)
from training.images import decoding
from training.images.formats import StoredImages, label_ids, unknown_label
from training.images.read import check_ranges, choose_validation, look_at, overlap
from training.images.rows import BadImageLimit, Decoder, EncodedRows, permutation

WINDOW = 16  # global batches that are sorted by aspect together
ORDER = 1  # purpose of a seed, besides the order of the images


class DetectionRows(EncodedRows):
    """Images and their boxes. A bad image is replaced, together with its boxes, by the next sound one.

    Attributes:
        sizes: (N, 2), height and width of the images as they are annotated.
        image_ids: (N,), the data's own ids of the images.
        category_ids: (C,), the data's own ids of the classes.
    """

    def __init__(self, boxes: BoxSet, ids: dict[str, int], category_ids: list[int | str], notes: list[str], **options):
        super().__init__(boxes.images, None, **options)
        self.image_ids, self.category_ids = boxes.image_ids, category_ids
        self.sizes, kept = _clean(boxes, notes)
        images = np.array([box.image for box in kept], np.int64)
        self._corners = np.array([box.corners for box in kept], np.float64).reshape(-1, 4)
        self._classes = np.array([ids[box.label] for box in kept], np.int64)
        self._areas = np.array([box.area for box in kept], np.float64)
        self._is_crowd = np.array([box.is_crowd for box in kept], bool)
        self._starts = np.searchsorted(images, np.arange(len(self) + 1))

    def _of(self, index: int) -> slice:
        return slice(self._starts[index], self._starts[index + 1])

    def boxes(self, index: int) -> np.ndarray:
        """The boxes to train on, without crowds: (n, 4) float64, left, top, right and bottom as fractions."""
        found = self._of(index)
        return self._corners[found][~self._is_crowd[found]] / self.sizes[index][[1, 0, 1, 0]]

    def classes(self, index: int) -> np.ndarray:
        """Class ids (n,) of `boxes`."""
        found = self._of(index)
        return self._classes[found][~self._is_crowd[found]]

    def truth(self, index: int) -> dict[str, np.ndarray]:
        """The objects that detections are measured against.

        Returns:
            boxes (m, 4) in pixels, left, top, right, bottom; labels (m,); areas (m,) in pixels, of the objects if the
            data has them, else of the boxes; iscrowd (m,).
        """
        found = self._of(index)
        names = ("boxes", "labels", "areas", "iscrowd")
        return {
            name: values[found]
            for name, values in zip(names, (self._corners, self._classes, self._areas, self._is_crowd), strict=True)
        }

    def digest(self) -> str:
        """The sha256 over all sizes, boxes and classes."""
        arrays = (self.sizes, self._starts, self._corners, self._classes, self._is_crowd)
        return digest_of(values.tobytes() for values in arrays)

    def count_boxes(self) -> int:
        return int((~self._is_crowd).sum())

    def aspects(self, indices) -> np.ndarray:
        height, width = self.sizes[indices].T
        return width / height

    def global_batch(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """The numbers of the images of a step, (batch_size,), which depend on the arguments only.

        Every epoch has an order of its own. The next `WINDOW` batches of it (or one epoch of a small data set) are
        sorted by aspect together, so that a batch has images of similar shape and little has to be padded.
        """
        window = min(WINDOW, max(1, len(self) // batch_size))
        number, batch = divmod(step, window)
        return self._window(number, window, batch_size, seed)[batch]

    def _window(self, number: int, window: int, batch_size: int, seed: int) -> np.ndarray:
        drawn = self.draw(number * window * batch_size, window * batch_size, seed)
        by_aspect = drawn[np.argsort(self.aspects(drawn), kind="stable")].reshape(window, batch_size)
        return by_aspect[permutation(window, seed, number, ORDER)]

    def load(self, indices: np.ndarray, view: Callable[[int, int], tuple]) -> tuple[list[Tensor], np.ndarray]:
        """Loads images, and others in the place of bad ones.

        Args:
            view: called with a position in the batch and the number of the image there; returns the part to cut out
                (left, top, width and height as fractions), and the height and width to which it is resized, bicubic.

        Returns:
            Images (C, h, w), uint8 on the CPU, and the numbers (B,) of the images that they are.
        """

        def request(positions, chosen):
            boxes, sizes = zip(*map(view, positions.tolist(), chosen.tolist()), strict=True)
            return np.array(boxes), np.array(sizes), self.sizes[chosen]

        return self._decode(np.asarray(indices, np.int64), request)


@dataclass
class DetectionData:
    """The data that `--data` names. `notes` are for a person; `fingerprint` covers images, boxes and split."""

    train: DetectionRows
    validation: DetectionRows
    label_names: list[str]  # in the order of their ids
    category_ids: list[int | str]  # the data's own ids of them
    num_channels: int  # 1 grey, 3 colour
    fingerprint: str
    source: str
    license: str | None = None
    notes: list[str] = field(default_factory=list)


def read_detection(
    data: str,
    *,
    validation_data: str | None = None,
    validation_split: str | None = None,
    validation_fraction: float = 0.1,
    image_column: str = "image",
    objects_column: str = "objects",
    box_format: str = "xywh",
    label_names: list[str] | None = None,
    num_channels: int | None = None,
    max_bad_images: float = 0.01,
    num_workers: int = 2,
    seed: int = 0,
) -> DetectionData:
    """Reads the images and boxes that `data` names.

    Boxes are cut at the borders of their image; boxes without area or outside of it are left out and noted. Crowds are
    used in the evaluation only. An image is turned as its EXIF data says, unless its annotated size is the unturned
    one.

    Args:
        data: "embedded" (scikit-learn's digits on canvases); a .json file of COCO's format, or a folder of such files
            and of the images; a folder of Pascal VOC's or of YOLO's layout, or a YOLO data set's .yaml file; a folder
            that `datasets` has saved; parquet files; or a Hub data set, "name" or "name:config".
        validation_data: other data of these kinds to validate on: its validation part, or else its training part.
        validation_split: the part to validate on, "val" or "test"; None: "val" if there is one, or else "test".
        validation_fraction: the part to hold out where the data has neither; see `choose_validation`.
        image_column, objects_column, box_format: of a data set with a column of objects; see `read_objects`.
        label_names: the classes in the order of their ids; None: in the order of the data's own ids, or sorted.
        num_channels: 1 makes all images grey, 3 colour; None: grey if all images are.
        max_bad_images: the part of the images that may be missing or unreadable and is then replaced.
        num_workers: processes that decode; 0: this process does.
        seed: chooses the images to hold out.

    Raises:
        ValueError: something is missing, broken or ambiguous; the message names it.
    """
    check_ranges(validation_fraction, max_bad_images, num_channels)
    if validation_split not in (None, "val", "test"):
        raise ValueError(f"validation_split must be 'val' or 'test', not {validation_split!r}")
    if box_format not in BOX_FORMATS:
        raise ValueError(f"box_format must be {' or '.join(BOX_FORMATS)}, not {box_format!r}")
    columns, notes = (image_column, objects_column, box_format), []
    path = Path(data).expanduser()
    source = path.resolve().name if path.exists() else data
    splits = _read(data, validation_split if validation_data is None else None, columns)
    train = splits.pop("train")
    if validation_data is not None:
        splits = _read(validation_data, validation_split, columns, trains=False)
    elif "test" in splits and validation_split is None:
        notes.append("validating on the test part, since there is no other")
    if box_format != "xywh" and not any(part.box_format for part in (train, *splits.values())):
        raise ValueError(f"box_format is for data sets with a column of objects, which {data} is not: leave it out")
    digests = train.images.digests()
    if splits:
        [validation] = splits.values()
        held_out_digests = validation.images.digests()
    else:
        is_held_out = choose_validation(digests, None, validation_fraction, seed)
        parts = [np.flatnonzero(is_held_out == held_out) for held_out in (False, True)]
        train, validation = [train.select(part) for part in parts]
        digests, held_out_digests = [[digests[index] for index in part] for part in parts]
    notes += overlap(digests, held_out_digests, validation)
    names, ids, category_ids = _number_classes(train, validation, label_names, data)
    channels, _ = look_at(train, num_channels, data)
    options = {"num_channels": channels, "decoder": Decoder(num_workers), "limit": BadImageLimit(max_bad_images)}
    rows = [
        DetectionRows(part, ids, category_ids, notes, quick=part is train, **options) for part in (train, validation)
    ]
    if not rows[0].count_boxes():
        raise ValueError(f"{data} has no box to train on")
    hashed = [digest_of(part) for part in (digests, held_out_digests)]
    fingerprint = fingerprint_of("detection", names, hashed, [part.digest() for part in rows])
    if data == "embedded":
        source = "scikit-learn's handwritten digits on canvases"
    return DetectionData(*rows, names, category_ids, channels, fingerprint, source, train.license, notes)


# ------------------------------------------------------------------------------------------------- kinds of data


def _read(data: str, validation_split: str | None, columns: tuple[str, str, str], trains: bool = True) -> Splits:
    """Reads the part to train on, and a part to validate on if there is one; without `trains` only the latter."""
    path = Path(data).expanduser()

    def chosen(found: dict[str, Any], read: Callable[[Any], BoxSet]) -> Splits:
        return {split: read(found[split]) for split in choose_splits(found, validation_split, data, trains)}

    def from_datasets(found) -> Splits:
        found = found if isinstance(found, dict) else {"train": found}
        found = {split_of(name): (name, part) for name, part in found.items()}
        return chosen(found, lambda part: read_objects(part[1], f"{data}, split {part[0]}", *columns))

    if data == "embedded":
        return chosen(embedded_canvases(), lambda boxes: boxes)
    if path.suffix == ".json" and path.is_file():
        return {"train": read_coco(path)}
    if is_saved(path) or has_parquet(path):
        return from_datasets(load_local(path))
    if path.is_dir() and (found := find_voc(path)):
        return chosen(found, lambda files: read_voc(path, files))
    if path.is_dir() and (found := find_coco(path)):
        return chosen(found, read_coco)
    if path.is_dir() or (path.suffix in (".yaml", ".yml") and path.is_file()):
        found, *rest = find_yolo(path)
        if found:
            return chosen(found, lambda folder: read_yolo(folder, *rest))
    if path.exists():
        raise ValueError(
            f"{path}: neither a COCO .json nor a YOLO .yaml file, nor a folder with annotations/*.json (COCO), "
            "Annotations/*.xml (Pascal VOC), images/ and labels/ (YOLO) or a saved data set"
        )
    return from_datasets(load_hub(data, trains=False))


# -------------------------------------------------------------------------------------------------------- classes


def _number_classes(
    train: BoxSet, validation: BoxSet, given: list[str] | None, data: str
) -> tuple[list[str], dict[str, int], list[int | str]]:
    """Returns the names of the classes, the id of each name, and the data's own ids."""
    names, labels = given or train.class_names, {box.label for box in train.boxes}
    if names is None:
        names = sorted(labels, key=int if all(name.isdecimal() for name in labels) else None)
    if len(set(names)) < len(names):
        raise ValueError(f"{data}: label_names must all be different, not {', '.join(names)}")
    ids = label_ids(names, list(labels) if train.class_names is None else None)
    for part in (train, validation):
        for box in part.boxes:
            if box.label not in ids:
                named = part.images.name(box.image)
                raise ValueError(f"{data}: {named} has a box with {unknown_label(box.label, ids)}")
    known = dict(zip(train.class_names or [], train.category_ids or [], strict=False))
    is_number = train.class_names is None and all(name.isdecimal() for name in ids)
    return list(names), ids, [int(name) if is_number else known.get(name, position) for name, position in ids.items()]


# ---------------------------------------------------------------------------------------------------------- boxes


def _clean(boxes: BoxSet, notes: list[str]) -> tuple[np.ndarray, list]:
    """Cuts boxes at the borders of their images, leaves out empty ones, and notes both.

    Returns:
        Sizes (N, 2) of all images, and the boxes in pixels, with their areas.
    """
    sizes = boxes.sizes.copy()
    unknown = np.flatnonzero((sizes == 0).any(1))
    for first in range(0, len(unknown), 256):
        part = unknown[first : first + 256]
        found = map(decoding.upright_size, boxes.images.encoded(part))
        sizes[part] = [size or (0, 0) for size in found]
    is_sound = (sizes > 0).all(1)
    images = np.array([box.image for box in boxes.boxes], np.int64)
    limits = sizes[images][:, [1, 0, 1, 0]].reshape(-1, 4)
    corners = np.array([box.corners for box in boxes.boxes], np.float64).reshape(-1, 4)
    corners = corners * limits if boxes.in_fractions else corners
    if boxes.box_format == "xywh":
        chosen = is_sound[images]
        _refuse_corners(corners[chosen], limits[chosen], images[chosen], boxes.images)
    cut = np.clip(corners, 0, limits)
    is_empty = (corners[:, 2:] <= corners[:, :2]).any(1)
    is_outside = ~is_empty & (cut[:, 2:] <= cut[:, :2]).any(1)
    is_over = ~is_empty & ~is_outside & (abs(cut - corners) > 1).any(1)
    is_difficult = np.array([box.is_difficult for box in boxes.boxes], bool)
    for chosen, what in (
        (is_empty, "boxes of zero area left out"),
        (is_outside, "boxes outside of their image left out"),
        (is_over, "boxes cut at the border of their image"),
        (is_difficult, "boxes marked as difficult used like the others"),
    ):
        chosen &= is_sound[images]  # nothing is known of bad images
        if chosen.any():
            named = list(dict.fromkeys(boxes.images.name(image) for image in images[chosen][:50].tolist()))
            notes.append(f"{chosen.sum()} {what} ({', '.join(named[:3] + ['...'] * (len(named) > 3))})")
    kept = []
    for number in np.flatnonzero(~(is_empty | is_outside) & is_sound[images]).tolist():
        box = boxes.boxes[number]
        left, top, right, bottom = cut[number].tolist()
        area = (right - left) * (bottom - top) if box.area is None else box.area
        kept.append(box._replace(corners=(left, top, right, bottom), area=area))
    sizes[~is_sound] = 1  # bad images, which are replaced
    return sizes, kept


def _refuse_corners(corners: np.ndarray, limits: np.ndarray, images: np.ndarray, source: StoredImages):
    """Refuses boxes that were read as xywh and seem to be xyxy.

    Args:
        corners: (n, 4), as they were read.
        limits: (n, 4), width and height of their images, twice.
        images: (n,), the numbers of their images.

    Raises:
        ValueError: most boxes reach out of their images, and as xyxy all would be sound.
    """
    written = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    reach_out = (corners > limits + 1).any(1)
    is_sound = ((written >= -1) & (written <= limits + 1)).all(1) & (written[:, 2:] > written[:, :2]).all(1)
    if is_sound.all() and reach_out.sum() > len(corners) / 2:
        raise ValueError(
            f"{reach_out.sum()} of {len(corners)} boxes, as left, top, width and height, reach out of their images "
            f"({source.name(images[reach_out][0])}, ...), but none as left, top, right and bottom: give "
            "--box_format xyxy"
        )
