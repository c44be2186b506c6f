"""Reads boxes from a data set of the `datasets` library: a column of images, and a column of the objects in each."""

import numpy as np

from training.detection.formats import Box, BoxSet, numbers, size_of
from training.images.formats import DatasetImages, name_of, undecoded

BOX_FORMATS = ("xywh", "xyxy")  # left, top, width and height, or left, top, right and bottom
BOX_KEYS = ("bbox", "boxes", "box", "bboxes")
LABEL_KEYS = ("category", "label", "category_id", "labels", "categories", "class")


def read_objects(dataset, source: str, image_column: str, objects_column: str, box_format: str = "xywh") -> BoxSet:
    """Reads one split of a data set with a column of images and a column of objects.

    An object has a bbox in pixels, in one of `BOX_FORMATS`, and a category (a class, a number or a name); it may have
    area and iscrowd.

    Raises:
        ValueError: a column is missing or holds something else, or a row is wrong; the message names it.
    """
    import datasets

    dataset, _ = undecoded(dataset, source, image_column, None)
    if objects_column not in dataset.features:
        found = sorted(dataset.features)
        raise ValueError(f"{source}: no column {objects_column!r}; choose one of {found} with --objects_column")
    kinds = _object_features(dataset.features[objects_column])
    box_key, label_key = (next((key for key in keys if key in kinds), None) for keys in (BOX_KEYS, LABEL_KEYS))
    if box_key is None or label_key is None:
        found = ", ".join(map(str, kinds)) or "no fields"
        raise ValueError(f"{source}: column {objects_column!r} needs a bbox and a category, but has {found}")
    if not isinstance(dataset.features[image_column], datasets.Image):
        raise ValueError(f"{source}: column {image_column!r} holds no images: choose another with --image_column")
    kind = kinds[label_key]
    class_names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    boxes = []
    for index, found in enumerate(dataset[objects_column]):
        if found is None:
            continue
        objects = found if isinstance(found, list) else _rows_of(found, box_key, f"{source}, row {index + 1}")
        for item in objects:
            where = f"{source}, row {index + 1}"
            left, top, right, bottom = numbers(item[box_key], 4, f"{where}: {box_key}")
            if box_format == "xywh":
                right, bottom = left + right, top + bottom
            label, area = item[label_key], item.get("area")
            if label is None:
                raise ValueError(f"{where}: a box without {label_key}")
            boxes.append(
                Box(
                    index,
                    str(label) if class_names is None else name_of(label, class_names, where),
                    (left, top, right, bottom),
                    None if area is None else numbers([area], 1, f"{where}: area")[0],
                    bool(item.get("iscrowd")),
                )
            )
    sizes = np.zeros((len(dataset), 2), np.int64)
    if {"height", "width"} <= dataset.features.keys():
        rows = zip(dataset["height"], dataset["width"], strict=True)
        sizes = [size_of({"height": h, "width": w}, f"{source}, row {n}") for n, (h, w) in enumerate(rows, 1)]
    image_ids = list(dataset["image_id"]) if "image_id" in dataset.features else list(range(len(dataset)))
    images = DatasetImages(dataset, image_column, source)
    sizes = np.array(sizes, np.int64).reshape(-1, 2)
    license = dataset.info.license or None
    return BoxSet(images, sizes, boxes, image_ids, class_names, license=license, box_format=box_format)


def _object_features(feature) -> dict:
    """The fields of an object. The column holds lists of objects, or objects of lists, as `datasets` may store them."""
    import datasets

    if isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
        return feature if isinstance(feature, dict) else {}
    if not isinstance(feature, dict):
        return {}
    return {key: kind.feature for key, kind in feature.items() if isinstance(kind, datasets.List | datasets.LargeList)}


def _rows_of(objects: dict[str, list | None], box_key: str, where: str) -> list[dict]:
    """Turns an object of lists into a list of objects."""
    count = len(objects[box_key] or [])
    columns = {key: values for key, values in objects.items() if values}
    if uneven := next((key for key, values in columns.items() if len(values) != count), None):
        raise ValueError(f"{where}: {count} of {box_key}, but {len(columns[uneven])} of {uneven}")
    return [{key: values[number] for key, values in columns.items()} for number in range(count)]
