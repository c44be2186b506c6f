"""Writes NLVR (Suhr et al. 2017) as a data set of boxes in COCO's format: the shapes in its synthetic images.

    python tests/benchmarks/nlvr_boxes.py NLVR OUT
    accelerate launch training/train_detr.py --data OUT ...

NLVR is a folder with dev.json, dev_images.zip, hidden.json and hidden_images.zip; dev is to train on, hidden to
validate on. An image of 400x100 pixels shows three grey fields, 100 pixels wide and 50 apart, with squares, circles and
triangles in three colours. Only the first of an example's six images has the fields in the order in which its
`structured_rep` lists them.
"""

import argparse
import json
import zipfile
from pathlib import Path

CLASSES = ("square", "circle", "triangle")
SPLITS = {"train": "dev", "val": "hidden"}


def boxes_of(example: dict) -> list[tuple[str, list[int]]]:
    """The class and the left, top, width and height in pixels of every shape."""
    return [
        (shape["type"], [150 * number + shape["x_loc"], shape["y_loc"], shape["size"], shape["size"]])
        for number, field in enumerate(example["structured_rep"])
        for shape in field
    ]


def convert(nlvr: Path, out: Path) -> None:
    (out / "annotations").mkdir(parents=True)
    for split, name in SPLITS.items():
        examples = [json.loads(line) for line in (nlvr / f"{name}.json").read_text(encoding="utf-8").splitlines()]
        images, annotations = [], []
        (out / split).mkdir()
        with zipfile.ZipFile(nlvr / f"{name}_images.zip") as archive:
            members = {Path(member).name: member for member in archive.namelist()}
            for example in examples:
                file_name = f"{name}-{example['identifier']}-0.png"
                (out / split / file_name).write_bytes(archive.read(members[file_name]))
                images.append({"id": len(images), "file_name": file_name, "width": 400, "height": 100})
                for kind, box in boxes_of(example):
                    fields = {"image_id": images[-1]["id"], "category_id": CLASSES.index(kind), "bbox": box}
                    annotations.append({"id": len(annotations), **fields, "area": box[2] * box[3], "iscrowd": 0})
        categories = [{"id": number, "name": kind} for number, kind in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        print(f"{split}: {len(images)} images, {len(annotations)} boxes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nlvr", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.nlvr, arguments.out)


if __name__ == "__main__":
    main()
