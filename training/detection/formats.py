"""Reads boxes in the formats of COCO (JSON), Pascal VOC (XML) and YOLO (text).

A reader returns a `BoxSet` for one split. Nothing is decoded here.
"""

import json
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from training.data.sources import split_of
from training.images.formats import IMAGE_SUFFIXES, ImageFiles, StoredImages


class Box(NamedTuple):
    """An annotated object."""

    image: int  # its index in the `BoxSet`
    label: str
    corners: tuple[float, float, float, float]  # left, top, right, bottom
    area: float | None = None  # of the object in pixels; None: that of the box
    is_crowd: bool = False  # many objects in one box; whether a model finds it does not count
    is_difficult: bool = False


@dataclass
class BoxSet:
    """The images of one split, their sizes and their boxes, both as they are annotated."""

    images: StoredImages
    sizes: np.ndarray  # (N, 2), height and width; 0 where the data does not say
    boxes: list[Box]  # image after image
    image_ids: list[int | str]
    class_names: list[str] | None = None  # in the order of their ids, if the data has an order
    category_ids: list[int | str] | None = None  # the data's own ids of the classes
    in_fractions: bool = False  # whether corners are fractions of width and height, not pixels
    license: str | None = None
    box_format: str | None = None  # one of `columns.BOX_FORMATS`, for data that does not say it

    def select(self, indices: np.ndarray) -> "BoxSet":
        new = {int(index): number for number, index in enumerate(indices)}
        boxes = [box._replace(image=new[box.image]) for box in self.boxes if box.image in new]
        image_ids = [self.image_ids[index] for index in indices]
        rest = (self.class_names, self.category_ids, self.in_fractions, self.license, self.box_format)
        return BoxSet(self.images.select(indices), self.sizes[indices], boxes, image_ids, *rest)


Splits = dict[str, BoxSet]  # "train", and "val" or "test" where one of them is there


def choose_splits(found: Container[str], wanted: str | None, source: object, trains: bool = True) -> list[str]:
    """Chooses the splits to read.

    Args:
        found: the splits of the data.
        wanted: the split to validate on; None: "val", or else "test".
        source: the data's name for errors.
        trains: whether to read "train" too. Without it "train" is read only if there is no other split.
    """
    if wanted is not None and wanted not in found:
        raise ValueError(f"{source} has no part {wanted!r}: choose another validation_split of {', '.join(found)}")
    held_out = [wanted] if wanted else [split for split in ("val", "test") if split in found][:1]
    if held_out and not trains:
        return held_out
    if "train" not in found:
        raise ValueError(f"{source} has no part to {'train' if trains else 'validate'} on, only {', '.join(found)}")
    return ["train", *held_out]


# ---------------------------------------------------------------------------------------------------------- COCO


def find_coco(root: Path) -> dict[str, Path]:
    """Finds annotation files by split, such as annotations/instances_train2017.json or train/_annotations.json."""
    found = sorted({*root.glob("*.json"), *root.glob("annotations/*.json"), *root.glob("*/_annotations*.json")})
    found = [path for path in found if path.name.startswith("instances")] or found
    by_split: dict[str, list[Path]] = {}
    for path in found:
        name = path.stem.removeprefix("instances_")
        split = split_of(name) or (split_of(path.parent.name) if path.parent != root else "")
        by_split.setdefault(split, []).append(path)
    if by_split.keys() == {""} and len(found) == 1:
        return {"train": found[0]}
    for split, paths in by_split.items():
        if split and len(paths) > 1:
            named = ", ".join(str(path.relative_to(root)) for path in paths)
            raise ValueError(f"{root} has several files for {split}: {named}; leave one, or name one of them")
    return {split: paths[0] for split, paths in by_split.items() if split}


def read_coco(path: Path) -> BoxSet:
    """Reads one annotation file of COCO's format (Lin et al. 2014, "object instances"), and finds its images.

    Classes get ids from 0 in the order of their category ids. Annotations need no ids.

    Raises:
        ValueError: the JSON is broken or an entry is wrong; the message names file and line or entry.
    """
    content = _read_json(path)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: no list {key!r}, as COCO's format has it")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: {key}[{index}] must be an object, not {entry!r}")
            if key != "annotations" and _id(entry, "id") is None:
                raise ValueError(
                    f"{path}: {key}[{index}] needs an id, a whole number or a text, not {entry.get('id')!r}"
                )
    categories = {_id(entry, "id"): str(entry.get("name", _id(entry, "id"))) for entry in content["categories"]}
    images = {_id(entry, "id"): entry for entry in content["images"]}
    for key, known in (("categories", categories), ("images", images)):
        if len(known) < len(content[key]):
            raise ValueError(f"{path}: several of the {key} have the same id; give each its own")
    if len(set(categories.values())) < len(categories):
        raise ValueError(f"{path}: several categories have the same name; rename them")
    names = []
    for image_id, image in images.items():
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise ValueError(f"{path}: image {image_id} has no file_name")
        names.append(image["file_name"])
    positions = {image_id: position for position, image_id in enumerate(images)}
    boxes: list[list[Box]] = [[] for _ in names]
    for number, annotation in enumerate(content["annotations"]):
        where = f"{path}, annotation {annotation['id']}" if "id" in annotation else f"{path}, annotations[{number}]"
        image_id, category_id = _id(annotation, "image_id"), _id(annotation, "category_id")
        if image_id not in positions:
            raise ValueError(f"{where}: there is no image {annotation.get('image_id')!r}; add it or remove this")
        if category_id not in categories:
            raise ValueError(f"{where}: there is no category {annotation.get('category_id')!r}; add it or remove this")
        left, top, width, height = numbers(annotation.get("bbox"), 4, f"{where}: bbox")
        area = annotation.get("area")
        image = positions[image_id]
        boxes[image].append(
            Box(
                image,
                categories[category_id],
                (left, top, left + width, top + height),
                None if area is None else numbers([area], 1, f"{where}: area")[0],
                bool(annotation.get("iscrowd")),
            )
        )
    sizes = [size_of(image, f"{path}, image {image_id}") for image_id, image in images.items()]
    ids = sorted(categories, key=lambda number: (isinstance(number, str), number))
    return BoxSet(
        ImageFiles(names, _folder_of_images(path, names)),
        np.array(sizes, np.int64).reshape(-1, 2),
        [box for found in boxes for box in found],
        list(images),
        [categories[number] for number in ids],
        ids,
    )


def _id(entry: dict, key: str) -> int | str | None:
    value = _whole(entry.get(key))
    return value if isinstance(value, int | str) else None


def _whole(value: Any) -> Any:
    """Turns a float that is a whole number into an int; returns anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def numbers(values: Any, count: int, where: str) -> list[float]:
    is_list = isinstance(values, list | tuple) and len(values) == count
    if not is_list or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError(f"{where} must be {count} finite number{'s' * (count > 1)}, not {values!r}")
    return values


def size_of(entry: dict, where: str) -> tuple[int, int]:
    """Height and width of an entry; zeros if it does not say both."""
    size = _whole(entry.get("height")) or 0, _whole(entry.get("width")) or 0
    if not all(isinstance(side, int) and side >= 0 for side in size):
        raise ValueError(f"{where}: height and width must be whole numbers, not {size}")
    return size if all(size) else (0, 0)


def _folder_of_images(annotations: Path, names: list[str]) -> Path:
    """Finds the folder of the images: beside the annotations, or nearby with their name or the name "images"."""
    beside, split = annotations.parent, annotations.stem.removeprefix("instances_")
    roots = [beside, beside.parent] if beside.name == "annotations" else [beside]
    inner = ("", split, "images", f"images/{split}", split_of(split), f"images/{split_of(split)}", "JPEGImages")
    folders = [root / name for root in roots for name in inner]
    for folder in folders:
        if any((folder / name).is_file() for name in names[:20]):
            return folder
    if not names:
        return beside
    raise ValueError(f"{annotations}: its images ({names[0]}, ...) are in none of {', '.join(map(str, folders))}")


# ----------------------------------------------------------------------------------------------------- Pascal VOC


def find_voc(root: Path) -> dict[str, list[Path]]:
    """Finds annotation files by split.

    A split is a list in ImageSets/Main, or a folder train/, valid/ or test/; without either all files are to train on.
    An image in a list needs no annotation.
    """
    annotations, lists = root / "Annotations", root / "ImageSets" / "Main"
    if not any(annotations.glob("*.xml")):
        folders = sorted({path.parent for path in root.glob("*/*.xml") if split_of(path.parent.name)})
        folders = {split_of(folder.name): folder for folder in folders} or {"train": root}
        found = {split: sorted(folder.glob("*.xml")) for split, folder in folders.items()}
        return {split: files for split, files in found.items() if files}
    listed = {name: lists / f"{name}.txt" for name in ("train", "trainval", "val", "test")}
    listed = {name: path for name, path in listed.items() if path.is_file()}
    if "train" not in listed and "trainval" in listed:
        listed = {"train": listed["trainval"]} | {name: path for name, path in listed.items() if name == "test"}
    found = {}
    for name, path in listed.items():
        found[name] = [annotations / f"{line.split()[0]}.xml" for _, line in _lines(path)]
    return found or {"train": sorted(annotations.glob("*.xml"))}


def read_voc(root: Path, files: list[Path]) -> BoxSet:
    """Reads annotation files of Pascal VOC's format (Everingham et al. 2010), and finds their images.

    Pixels are counted from 1, and xmax and ymax lie inside a box, so a box reaches from xmin - 1 to xmax. A box whose
    xmax is not above its xmin has no area.

    Raises:
        ValueError: the XML is broken or an object is wrong; the message names file and line or object.
    """
    folder = root / "JPEGImages" if (root / "JPEGImages").is_dir() else None
    images: dict[Path, dict[str, str]] = {}  # of each folder, the file of each stem
    names, sizes, boxes = [], [], []
    for index, path in enumerate(files):
        beside = folder or path.parent
        if beside not in images:
            images[beside] = {name.stem: name.name for name in _images_in(beside)}
        objects, file_name, size = _read_xml(path) if path.is_file() else ([], "", (0, 0))
        name = images[beside].get(path.stem) or file_name or f"{path.stem}.jpg"
        names.append(str((beside / name).relative_to(root)))
        sizes.append(size)
        boxes += [box._replace(image=index) for box in objects]
    sizes = np.array(sizes, np.int64).reshape(-1, 2)
    return BoxSet(ImageFiles(names, root), sizes, boxes, [path.stem for path in files])


def _images_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_xml(path: Path) -> tuple[list[Box], str, tuple[int, int]]:
    """Reads the boxes, the name of the image, and its height and width."""
    try:
        annotation = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        line, column = error.position
        raise ValueError(f"{path}, line {line}, column {column + 1}: broken XML ({error})") from error
    boxes = []
    for number, item in enumerate(annotation.iter("object"), 1):
        where, name = f"{path}, object {number}", (item.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{where}: it has no name")
        texts = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = numbers([float(text) for text in texts], 4, where)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: bndbox needs the numbers xmin, ymin, xmax and ymax, not {texts}") from error
        if right > left and bottom > top:
            left, top = left - 1, top - 1
        boxes.append(Box(0, name, (left, top, right, bottom), is_difficult=item.findtext("difficult") == "1"))
    height, width = (annotation.findtext(f"size/{side}") or "0" for side in ("height", "width"))
    size = {"height": int(height), "width": int(width)} if height.isdecimal() and width.isdecimal() else {}
    return boxes, Path((annotation.findtext("filename") or "").strip()).name, size_of(size, str(path))


# ---------------------------------------------------------------------------------------------------------- YOLO


def find_yolo(path: Path) -> tuple[dict[str, Path], list[str] | None, int]:
    """Finds the images of a YOLO data set.

    Args:
        path: a data set's .yaml file, or a folder with one; or a folder with images/ and labels/, either of which may
            have folders train/ and val/; or a folder with train/images/, train/labels/ and so on. Classes are named in
            the .yaml file, or one a line in classes.txt. Only a .yaml file can mention keypoints.

    Returns:
        For each split its folder of images or its list of files; the names of the classes; and how many numbers a line
        has for keypoints.
    """
    settings = [path] if path.is_file() else sorted({*path.glob("*.yaml"), *path.glob("*.yml")})
    settings = [
        (file, content) for file in settings if isinstance(content := _read_yaml(file), dict) and "names" in content
    ]
    if len(settings) > 1:
        raise ValueError(f"{path} has several data sets, {', '.join(file.name for file, _ in settings)}: name one")
    if settings:
        return _read_settings(*settings[0])
    if path.is_file():
        raise ValueError(f"{path}: no names of classes, as a YOLO data set has them")
    root = path / "images"
    roots = {split_of(folder.name): folder for folder in sorted(root.glob("*/"))} if (path / "labels").is_dir() else {}
    roots = roots or {split_of(folder.parent.name): folder for folder in sorted(path.glob("*/images/"))}
    roots.pop("", None)
    if not roots and root.is_dir() and (path / "labels").is_dir():
        roots = {"train": root}
    lists = [file for file in (path / "classes.txt", path / "labels" / "classes.txt") if file.is_file()]
    return roots, [name for file in lists[:1] for _, name in _lines(file)] or None, 0


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers from 1."""
    try:
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    return [(number, line.strip()) for number, line in lines if line.strip()]


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: broken YAML ({' '.join(str(error).split())})") from error


def _read_settings(path: Path, settings: dict) -> tuple[dict[str, Path], list[str], int]:
    names = settings["names"]
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{path}: names must be numbered from 0 without a gap, not {', '.join(map(str, names))}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise ValueError(f"{path}: names must be a list, not {names!r}")
    root = path.parent / str(settings.get("path") or "")
    roots = {}
    for split in ("train", "val", "test"):
        if not (written := settings.get(split)):
            continue
        if not isinstance(written, str):
            raise ValueError(f"{path}: {split} must be one folder or list of files, not {written!r}")
        # A file from elsewhere may name a folder of another machine, or a folder one level too high.
        tried = [root / written, path.parent / written, path.parent / written.removeprefix("../")]
        if (found := next((folder for folder in tried if folder.exists()), None)) is not None:
            roots[split] = found
        elif split != "test" or "val" not in roots:  # a missing test part does not matter if there is "val"
            raise ValueError(
                f"{path}: {split} is {written!r}, but there is no {' or '.join(map(str, dict.fromkeys(tried)))}; put "
                "it there or remove the line"
            )
    shape = settings.get("kpt_shape") or [0]
    if not isinstance(shape, list) or not all(isinstance(count, int) and count >= 0 for count in shape):
        raise ValueError(f"{path}: kpt_shape must be a number of keypoints and one of values of each, not {shape!r}")
    return roots, list(map(str, names)), math.prod(shape)


def read_yolo(root: Path, names: list[str] | None, num_keypoint_values: int = 0) -> BoxSet:
    """Reads the images of a folder or of a list of files, and the text files beside them or in labels/.

    A line has the number of the class and, as fractions of the image, either the centre x and y, width and height of a
    box and then `num_keypoint_values` numbers, which are not used; or the corners of a polygon, whose box is taken.

    Raises:
        ValueError: a line is neither, or a text has no image; the message names file and line.
    """
    if root.is_file():
        paths, folder = [root.parent / line for _, line in _lines(root)], root.parent
    else:
        paths, folder = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES), root
    boxes, texts = [], [_text_of(path) for path in paths]
    if len(set(texts)) < len(texts):
        repeated = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"{repeated} belongs to several images: give each image a name of its own")
    for index, text in enumerate(texts):
        if text.is_file():
            for number, line in _lines(text):
                boxes.append(_read_line(line, index, names, num_keypoint_values, f"{text}, line {number}"))
    if root.is_dir():
        known = {*texts, *(text.parent / "classes.txt" for text in texts)}
        folders = {text.parent for text in texts}
        if orphans := sorted(text for folder in folders for text in folder.glob("*.txt") if text not in known):
            raise ValueError(f"{orphans[0]}: its image is missing{_and_more(orphans)}; add it or remove this")
    relative = [os.path.relpath(path, folder) for path in paths]
    sizes = np.zeros((len(paths), 2), np.int64)
    return BoxSet(ImageFiles(relative, folder), sizes, boxes, relative, names, in_fractions=True)


def _and_more(found: list) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _text_of(image: Path) -> Path:
    """The text file of an image: the last "images" of its path becomes "labels"; without one it is beside the image."""
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts)


def _read_line(line: str, image: int, names: list[str] | None, num_keypoint_values: int, where: str) -> Box:
    try:
        number, *values = map(float, line.split())
        values = numbers(values, len(values), where)
    except ValueError as error:
        raise ValueError(f"{where}: expected numbers, not {line[:80]!r}") from error
    if number != int(number) or number < 0 or (names and number >= len(names)):
        known = f"the {len(names)} classes, 0 to {len(names) - 1}" if names else "the whole numbers from 0"
        raise ValueError(f"{where}: class {number:g} is none of {known}")
    if len(values) in (4, 4 + num_keypoint_values):
        x, y, width, height = values[:4]
        corners = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    elif len(values) >= 6 and len(values) % 2 == 0 and not num_keypoint_values:
        corners = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    else:
        others = f"{4 + num_keypoint_values} with keypoints" if num_keypoint_values else "those of a polygon"
        raise ValueError(f"{where}: expected a class and 4 numbers, or {others}, not {len(values)} behind it")
    return Box(image, names[int(number)] if names else str(int(number)), corners)
