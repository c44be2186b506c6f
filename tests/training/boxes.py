"""Small data sets with boxes, in every format, for the tests of detection."""

import json

from tests.training.pictures import content, picture

NAMES = ["cat", "dog"]
# Of each image its height and width, and the class, left, top, width and height in pixels of every object.
IMAGES = [
    ((30, 40), [("cat", 10, 5, 20, 15), ("dog", 0, 0, 8, 30)]),
    ((40, 30), [("dog", 3, 4, 6, 8)]),
    ((30, 40), []),
    ((24, 48), [("cat", 12, 6, 24, 12), ("cat", 0, 0, 48, 24), ("dog", 40, 20, 8, 4)]),
]


def write_images(folder, images=IMAGES, first=0, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (size, _) in enumerate(images, first):
        picture(number, size).save(folder / f"{number}.{suffix}")


def coco(images=IMAGES, category_ids=(7, 3), **changes) -> dict:
    """An annotation file's content. Categories are in no order, their ids have gaps."""
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, NAMES, strict=True)]
    entries = [
        {"id": 100 + number, "file_name": f"{number}.png", "height": size[0], "width": size[1]}
        for number, (size, _) in enumerate(images)
    ]
    annotations = [
        {"image_id": 100 + number, "category_id": category_ids[NAMES.index(name)], "bbox": box, "iscrowd": 0}
        for number, (_, objects) in enumerate(images)
        for name, *box in objects
    ]
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(annotations)]
    return {"images": entries, "annotations": annotations, "categories": categories, **changes}


def write_coco(root, images=IMAGES, **changes) -> str:
    """A file and its images in images/ beside it."""
    write_images(root / "images", images)
    (root / "boxes.json").write_text(json.dumps(coco(images, **changes)))
    return str(root / "boxes.json")


def write_coco_folder(root, splits=("train2017", "val2017")) -> str:
    (root / "annotations").mkdir(parents=True)
    for first, split in enumerate(splits):
        write_images(root / split, IMAGES[first:])
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco(IMAGES[first:])))
    return str(root)


def voc_xml(size, objects, name="0.png") -> str:
    boxes = [
        f"<object><name>{kind}</name><difficult>0</difficult><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
        f"<xmax>{left + width}</xmax><ymax>{top + height}</ymax></bndbox></object>"
        for kind, left, top, width, height in objects
    ]
    head = f"<filename>{name}</filename><size><width>{size[1]}</width><height>{size[0]}</height></size>"
    return f"<annotation>{head}{''.join(boxes)}</annotation>"


def write_voc(root, splits=(("train", (0, 1, 2)), ("val", (3,)))) -> str:
    write_images(root / "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for number, (size, objects) in enumerate(IMAGES):
        (root / "Annotations" / f"{number}.xml").write_text(voc_xml(size, objects))
    for split, numbers in splits:
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{number}\n" for number in numbers))
    return str(root)


def yolo_lines(size, objects) -> str:
    lines = []
    for name, left, top, width, height in objects:
        values = (left + width / 2) / size[1], (top + height / 2) / size[0], width / size[1], height / size[0]
        lines.append(" ".join(map(str, [NAMES.index(name), *values])))
    return "\n".join(lines) + "\n"


def write_yolo(root, splits=(("train", (0, 1, 2)), ("val", (3,)))) -> str:
    """images/train, labels/train, ...; the image without objects has no text."""
    for split, numbers in splits:
        write_images(root / "images" / split, [IMAGES[number] for number in numbers], numbers[0])
        (root / "labels" / split).mkdir(parents=True)
        for number in numbers:
            if IMAGES[number][1]:
                (root / "labels" / split / f"{number}.txt").write_text(yolo_lines(*IMAGES[number]))
    (root / "classes.txt").write_text("cat\ndog\n")
    return str(root)


def write_saved(root, named=True, images=IMAGES, box_format="xywh") -> str:
    """What `datasets` saves, with the column "objects" of a Hub data set."""
    import datasets

    category = datasets.ClassLabel(names=NAMES) if named else datasets.Value("int64")
    kind = {"bbox": datasets.List(datasets.Value("float32"), length=4), "category": category}
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.List(kind)})

    def written(left, top, width, height):
        return [left, top, *((width, height) if box_format == "xywh" else (left + width, top + height))]

    rows = [
        {
            "image": {"bytes": content(picture(number, size)), "path": None},
            "objects": [
                {"bbox": written(*box), "category": NAMES.index(name) + (0 if named else 5)} for name, *box in objects
            ],
        }
        for number, (size, objects) in enumerate(images)
    ]
    parts = {"train": rows[:3], "validation": rows[3:]}
    saved = {name: datasets.Dataset.from_list(part, features=features) for name, part in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(str(root))
    return str(root)
