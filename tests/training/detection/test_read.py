import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training import boxes as written
from tests.training.boxes import IMAGES, NAMES
from tests.training.pictures import picture
from training.detection.canvases import digits_on_canvases, embedded_canvases
from training.detection.read import read_detection
from training.images import decoding
from training.images.formats import embedded_digits
from training.images.rows import BadImages

REAL_DATA = Path(os.environ.get("HF_MODELS_TEST_DATA", "not given"))
needs_real_data = pytest.mark.skipif(not REAL_DATA.exists(), reason="needs HF_MODELS_TEST_DATA")
WHOLE = np.array([0.0, 0.0, 1.0, 1.0])


def read(data, **options):
    return read_detection(str(data), num_workers=0, **options)


def objects_of(rows, names, index):
    """As `boxes.IMAGES` has them."""
    truth = rows.truth(index)
    found = [
        (names[label], *np.round([left, top, right - left, bottom - top], 3).tolist())
        for label, (left, top, right, bottom) in zip(truth["labels"], truth["boxes"], strict=True)
    ]
    return tuple(rows.sizes[index].tolist()), found


WRITERS = {
    "coco": written.write_coco_folder,
    "voc": written.write_voc,
    "yolo": written.write_yolo,
    "saved": written.write_saved,
}


# ------------------------------------------------------------------------------------------------- kinds of data


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_images_boxes_and_classes(kind, tmp_path):
    data = read(WRITERS[kind](tmp_path / "data"))
    expected = {name: IMAGES[:3] for name in ("voc", "yolo", "saved")} | {"coco": IMAGES}
    held_out = IMAGES[1:] if kind == "coco" else IMAGES[3:]
    assert set(data.label_names) == set(NAMES) and data.num_channels == 3
    for rows, images in ((data.train, expected[kind]), (data.validation, held_out)):
        found = [objects_of(rows, data.label_names, index) for index in range(len(rows))]
        assert found == [(size, [tuple(box) for box in objects]) for size, objects in images]
    [pixels], used = data.train.load([1], lambda place, index: (WHOLE, (40, 30)))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture(1, (40, 30)))) and used.tolist() == [1]


def test_classes_are_contiguous_in_the_order_of_their_ids_which_are_kept(tmp_path):
    data = read(written.write_coco(tmp_path), validation_fraction=0.25)
    assert data.label_names == ["dog", "cat"] and data.category_ids == [3, 7]
    assert data.train.category_ids == [3, 7]
    data = read(tmp_path / "boxes.json", label_names=["cat", "owl", "dog"])
    assert data.label_names == ["cat", "owl", "dog"] and data.category_ids == [7, 1, 3]
    with pytest.raises(ValueError, match=r"0.png has a box with the label 'cat', which is none of the 2 classes: "):
        read(tmp_path / "boxes.json", label_names=["owl", "dog"])


def test_numbers_without_names_are_classes_too_whatever_their_gaps(tmp_path):
    data = read(written.write_saved(tmp_path / "saved", named=False))
    assert data.label_names == ["5", "6"] and data.category_ids == [5, 6]
    (tmp_path / "yolo").mkdir()
    written.write_yolo(tmp_path / "yolo")
    (tmp_path / "yolo" / "classes.txt").unlink()
    assert read(tmp_path / "yolo").label_names == ["0", "1"]
    assert read(tmp_path / "yolo", label_names=NAMES).train.classes(0).tolist() == [0, 1]


def test_boxes_of_a_data_set_may_be_written_as_corners(tmp_path):
    data = read(written.write_saved(tmp_path / "corners", box_format="xyxy"), box_format="xyxy")
    same = read(written.write_saved(tmp_path / "sides"))
    assert data.fingerprint == same.fingerprint and not data.notes
    assert read(tmp_path / "sides", box_format="xyxy").fingerprint != data.fingerprint


def test_corners_that_are_read_as_sides_are_refused(tmp_path):
    images = [((30, 40), [("cat", 20, 15, 15, 10), ("dog", 22, 16, 8, 9)]), *IMAGES[1:]]
    written.write_saved(tmp_path / "corners", images=images, box_format="xyxy")
    said = r"2 of 3 boxes, as left, top, width and height, .*split train, row 1, .*: give --box_format xyxy"
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "corners")
    images = [
        ((30, 40), [("cat", 20, 15, 25, 20), ("dog", 20, 9, 18, 29)]),
        *IMAGES[1:],
    ]  # none ends at 18 that begins at 20
    assert len(read(written.write_saved(tmp_path / "sides", images=images)).notes) == 1  # cut at the border
    for options, message in (
        ({"box_format": "cxcywh"}, "box_format must be xywh or xyxy, not 'cxcywh'"),
        ({"box_format": "xyxy"}, "box_format is for data sets with a column of objects, which embedded is not"),
    ):
        with pytest.raises(ValueError, match=message):
            read("embedded", **options)


def test_boxes_are_fractions_with_their_corners(tmp_path):
    rows = read(written.write_voc(tmp_path / "voc")).train
    assert rows.boxes(0).tolist() == [[0.25, pytest.approx(1 / 6), 0.75, pytest.approx(2 / 3)], [0, 0, 0.2, 1]]
    assert rows.boxes(2).shape == (0, 4) and rows.classes(2).shape == (0,)
    assert rows.aspects([0, 1]) == pytest.approx([4 / 3, 3 / 4])


def test_crowds_are_for_the_evaluation_only_and_areas_are_those_of_the_objects(tmp_path):
    content = written.coco()
    content["annotations"][1] |= {"iscrowd": 1, "area": 77.5}
    written.write_images(tmp_path / "images")
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    rows = read(tmp_path / "boxes.json", validation_data=str(tmp_path / "boxes.json")).train
    assert rows.classes(0).tolist() == [1] and len(rows.boxes(0)) == 1 and rows.count_boxes() == 5
    truth = rows.truth(0)
    assert truth["iscrowd"].tolist() == [False, True] and truth["areas"].tolist() == [300, 77.5]


def test_the_split_to_validate_on_is_chosen_or_held_out(tmp_path):
    splits = (("train", (0,)), ("val", (1,)), ("test", (2, 3)))
    root = written.write_voc(tmp_path / "voc", splits)
    assert [len(read(root, validation_split=split).validation) for split in (None, "val", "test")] == [1, 1, 2]
    (tmp_path / "voc/ImageSets/Main/val.txt").unlink()
    assert len(read(root).validation) == 2
    with pytest.raises(ValueError, match="no part 'val': choose another validation_split of train, test"):
        read(root, validation_split="val")
    file = written.write_coco(tmp_path / "coco", IMAGES * 5)
    data = read(file, validation_fraction=0.2)
    assert (len(data.train), len(data.validation)) == (16, 4) and read(file, seed=3).fingerprint != data.fingerprint
    ids = data.train.image_ids + data.validation.image_ids
    assert sorted(ids) == list(range(100, 120))
    assert len(read(file, validation_data=root).validation) == 2


@pytest.mark.parametrize("kind", WRITERS)
def test_data_to_validate_on_alone_has_no_need_of_a_part_to_train_on(kind, tmp_path):
    train = written.write_coco(tmp_path / "train")
    data = tmp_path / "data"
    if kind == "saved":
        written.write_saved(data)
        shutil.rmtree(data / "train")
        (data / "dataset_dict.json").write_text('{"splits": ["validation"]}')
    elif kind == "coco":
        written.write_coco_folder(data, ("val2017",))
    else:
        data.mkdir()
        {"voc": written.write_voc, "yolo": written.write_yolo}[kind](data, (("test", (2, 3)),))
    assert len(read(train, validation_data=data).validation) == {"saved": 1, "coco": 4}.get(kind, 2)
    with pytest.raises(ValueError, match="data has no part to train on, only "):
        read(data)


def test_the_test_part_is_validated_on_where_there_is_no_other_and_that_is_noted(tmp_path):
    root = written.write_voc(tmp_path, (("train", (0, 1)), ("test", (2, 3))))
    assert read(root).notes == ["validating on the test part, since there is no other"]
    assert not read(root, validation_split="test").notes


def test_the_fingerprint_covers_images_boxes_and_names(tmp_path):
    file = Path(written.write_coco(tmp_path))
    known = {read(file).fingerprint}
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(content))
    known.add(read(file).fingerprint)
    picture(9, (30, 40)).save(tmp_path / "images" / "0.png")
    known.add(read(file).fingerprint)
    assert len(known) == 3 and read(file).fingerprint in known


def test_a_yolo_data_set_is_described_by_its_yaml(tmp_path):
    written.write_yolo(tmp_path)
    (tmp_path / "classes.txt").unlink()
    file = tmp_path / "pets.yaml"
    file.write_text("train: ../images/train\nval: images/val\nnames: {0: dog, 1: cat}\n")
    for place in (file, tmp_path):
        data = read(place)
        assert data.label_names == ["dog", "cat"] and len(data.train) == 3 and len(data.validation) == 1
    (tmp_path / "list.txt").write_text("images/train/1.png\nimages/val/3.png\n")
    file.write_text("path: .\ntrain: list.txt\nval: images/val\nnames: [dog, cat]\n")
    assert [len(data) for data in (read(file).train, read(file).validation)] == [2, 1]
    for text, message in (
        ("train: nowhere\nnames: [a]", "train is 'nowhere', but there is no .*nowhere"),
        (
            "train: images/train\nval: nowhere\nnames: [dog, cat]",
            "pets.yaml: val is 'nowhere', but .*; put it there or",
        ),
        ("train: images/train\ntest: nowhere\nnames: [dog, cat]", "pets.yaml: test is 'nowhere', but there is no"),
        ("train: images/train\nnames: {1: a}", "names must be numbered from 0 without a gap, not 1"),
        ("train: images/train\nnames: 7", "names must be a list, not 7"),
        ("train: [a, b]\nnames: [a]", "train must be one folder or list of files"),
        ("train: [", "pets.yaml: broken YAML .*line 1, column 9"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(file)
    file.write_text("train: images/train\nval: images/val\ntest: nowhere\nnames: [dog, cat]")
    assert len(read(file).validation) == 1


def write_side_by_side(root, kind):
    """As some tools export: train/ and valid/, each with its images and what is written of them."""
    for split in ("train", "valid"):
        images = root / split / "images" if kind == "yolo" else root / split
        written.write_images(images)
        if kind == "coco":
            (images / "_annotations.coco.json").write_text(json.dumps(written.coco()))
        for number, (size, objects) in enumerate(IMAGES):
            if kind == "voc":
                (images / f"{number}.xml").write_text(written.voc_xml(size, objects))
            elif kind == "yolo":
                (root / split / "labels").mkdir(exist_ok=True)
                (root / split / "labels" / f"{number}.txt").write_text(written.yolo_lines(size, objects))
    if kind == "yolo":
        (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat, dog]\n")
    return root


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_the_parts_may_lie_side_by_side(kind, tmp_path):
    data = read(write_side_by_side(tmp_path, kind))
    for rows in (data.train, data.validation):
        assert [objects_of(rows, data.label_names, index) for index in range(4)] == [
            (size, [tuple(box) for box in objects]) for size, objects in IMAGES
        ]
    images = ", ".join(f"valid/{number}.png" if kind == "voc" else f"{number}.png" for number in range(3))
    assert data.notes == [f"4 of 4 validation images are training images too: {images}, ..."]


def test_a_list_of_voc_may_name_images_without_annotation(tmp_path):
    written.write_voc(tmp_path, (("trainval", (0, 1, 2, 3)), ("val", (3,)), ("test", (1,))))
    (tmp_path / "Annotations/2.xml").unlink()
    data = read(tmp_path)
    assert len(data.train) == 4 and data.validation.image_ids == ["1"] and not len(data.train.boxes(2))
    assert data.train.sizes[2].tolist() == [30, 40]  # the image's own


def test_the_box_of_a_yolo_polygon_is_around_it(tmp_path):
    written.write_yolo(tmp_path)
    (tmp_path / "labels/train/1.txt").write_text("1 0.1 0.5 0.3 0.2 0.2 0.9\n")
    assert read(tmp_path).train.boxes(1).tolist() == [pytest.approx([0.1, 0.2, 0.3, 0.9])]


@pytest.mark.parametrize(("shape", "keypoints"), [("[3, 2]", "0 0 0.1 1 1 0.2"), ("[1, 3]", "0.1 1 2")])
def test_the_box_of_a_yolo_pose_is_the_one_before_its_keypoints(tmp_path, shape, keypoints):
    written.write_yolo(tmp_path)
    text, settings = tmp_path / "labels/train/1.txt", tmp_path / "pose.yaml"
    text.write_text(f"1 0.5 0.5 0.2 0.4 {keypoints}\n")
    settings.write_text(f"train: images/train\nval: images/val\nkpt_shape: {shape}\nnames: [cat, dog]\n")
    assert read(settings).train.boxes(1).tolist() == [pytest.approx([0.4, 0.3, 0.6, 0.7])]
    text.write_text(f"1 0.5 0.5 0.2 0.4 {keypoints} 0 0\n")
    with pytest.raises(ValueError, match=r"1.txt, line 1: expected a class and 4 numbers, or \d+ with keypoints, not"):
        read(settings)
    settings.write_text("train: images/train\nkpt_shape: many\nnames: [cat, dog]\n")
    with pytest.raises(ValueError, match="pose.yaml: kpt_shape must be a number of keypoints and one of .*not 'many'"):
        read(settings)


# -------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(image_id=5), "boxes.json, annotation 0: there is no image 5; add it"),
        (lambda c: c["annotations"][2].update(category_id=5), "annotation 2: there is no category 5"),
        (
            lambda c: c["annotations"][2].update(bbox=[1, 2, 3]),
            r"annotation 2: bbox must be 4 finite numbers, not \[1,",
        ),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3, float("nan")]), "annotation 2: bbox must be 4 finite"),
        (lambda c: c["annotations"][2].pop("bbox"), "annotation 2: bbox must be 4 finite numbers, not None"),
        (lambda c: c["annotations"][2].update(bbox=7), "annotation 2: bbox must be 4 finite numbers, not"),
        (lambda c: c["annotations"][2].update(image_id=[1]), r"annotation 2: there is no image \[1\]"),
        (lambda c: c["annotations"][2].update(area="big"), "annotation 2: area must be 1 finite number, not"),
        (lambda c: c["annotations"][2].pop("image_id"), "annotation 2: there is no image None"),
        (lambda c: c["annotations"].append({}), r"boxes.json, annotations\[6\]: there is no image None"),
        (lambda c: c["annotations"].append([7]), r"boxes.json: annotations\[6\] must be an object, not \[7\]"),
        (
            lambda c: c["images"][2].pop("id"),
            r"boxes.json: images\[2\] needs an id, a whole number or a text, not None",
        ),
        (lambda c: c["categories"][1].update(id=0.5), r"boxes.json: categories\[1\] needs an id, .*, not 0.5"),
        (lambda c: c.pop("categories"), "no list 'categories', as COCO's format has it"),
        (lambda c: c["images"][2].update(id=100), "several of the images have the same id"),
        (lambda c: c["images"][2].pop("file_name"), "image 102 has no file_name"),
        (lambda c: c["images"][2].update(width="40"), "image 102: height and width must be whole numbers"),
        (lambda c: c["images"][2].update(width=40.5), "image 102: height and width must be whole numbers"),
        (lambda c: c["categories"][1].update(name="cat"), "several categories have the same name; rename them"),
        (
            lambda c: [image.update(file_name="x.png") for image in c["images"]],
            r"its images \(x.png, ...\) are in none",
        ),
        (lambda c: c["annotations"].clear(), "has no box to train on"),
    ],
)
def test_what_is_wrong_in_a_coco_file_is_named(change, message, tmp_path):
    content = written.coco()
    change(content)
    written.write_images(tmp_path / "images")
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "boxes.json")


def test_a_coco_file_may_have_whole_numbers_as_floats_and_annotations_without_ids(tmp_path):
    file = Path(written.write_coco(tmp_path))
    strict, content = read(file), json.loads(file.read_text())
    for key in ("images", "annotations", "categories"):
        for entry in content[key]:
            entry |= {name: float(value) for name, value in entry.items() if isinstance(value, int)}
    for annotation in content["annotations"]:
        del annotation["id"]
    file.write_text(json.dumps(content))
    data = read(file)
    assert data.fingerprint == strict.fingerprint and data.train.image_ids == strict.train.image_ids
    assert [str(number) for number in data.category_ids] == ["3", "7"]


def test_a_broken_file_is_named_with_the_place_where_it_breaks(tmp_path):
    file = tmp_path / "boxes.json"
    file.write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(ValueError, match=r"boxes.json, line 2, column 18: broken JSON \(Expecting value\)"):
        read(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="boxes.json is no JSON"):
        read(file)
    written.write_yolo(tmp_path / "yolo")
    (tmp_path / "yolo/labels/train/1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="1.txt is no text"):
        read(tmp_path / "yolo")
    written.write_voc(tmp_path / "voc")
    xml = tmp_path / "voc/Annotations/1.xml"
    for text, message in (
        ("<annotation>\n<object></annotation>", r"1.xml, line 2, column 11: broken XML \(mismatched tag"),
        (xml.read_text().replace("<xmin>4</xmin>", "<xmin>x</xmin>"), "1.xml, object 1: bndbox needs the numbers xmin"),
        (xml.read_text().replace("<xmin>4</xmin>", ""), "1.xml, object 1: bndbox needs the numbers xmin"),
        (xml.read_text().replace("dog", " "), "1.xml, object 1: it has no name"),
    ):
        before = xml.read_text()
        xml.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "voc")
        xml.write_text(before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", "1.txt, line 2: expected a class and 4 numbers, or those of a polygon, not 3 behind it"),
        ("0 0.5 0.5 0.1 big", "1.txt, line 2: expected numbers, not '0 0.5 0.5 0.1 big'"),
        ("0 0.5 0.5 0.1 nan", "1.txt, line 2: expected numbers"),
        ("2 0.5 0.5 0.1 0.1", "1.txt, line 2: class 2 is none of the 2 classes, 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "1.txt, line 2: class 0.5 is none of"),
    ],
)
def test_what_is_wrong_in_a_yolo_file_is_named(line, message, tmp_path):
    written.write_yolo(tmp_path)
    (tmp_path / "labels/train/1.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_text_without_its_image_is_named(tmp_path):
    written.write_yolo(tmp_path)
    (tmp_path / "images/train/1.png").unlink()
    with pytest.raises(ValueError, match=r"labels/train/1.txt: its image is missing; add it or remove this"):
        read(tmp_path)


def test_boxes_are_cut_at_the_border_and_those_without_area_are_left_out_and_named(tmp_path):
    size, objects = IMAGES[0]
    objects = [*objects, ("cat", 5, 5, 0, 4), ("cat", -10, 20, 15, 30), ("dog", 41, 3, 5, 5), ("dog", 0, 0, 3, -1)]
    images = [(size, objects), *IMAGES[1:]]
    data = read(written.write_coco(tmp_path, images), validation_data=written.write_coco(tmp_path / "val"))
    assert objects_of(data.train, data.label_names, 0)[1] == [*map(tuple, IMAGES[0][1]), ("cat", 0, 20, 5, 10)]
    assert data.notes[-3:] == [
        "2 boxes of zero area left out (0.png)",
        "1 boxes outside of their image left out (0.png)",
        "1 boxes cut at the border of their image (0.png)",
    ]


def test_the_boxes_of_an_unreadable_image_are_not_said_to_be_empty(tmp_path):
    written.write_yolo(tmp_path)
    (tmp_path / "images/train/0.png").write_bytes(b"nothing")
    data = read(tmp_path)
    assert not data.notes and data.train.count_boxes() == 1


def test_what_is_no_data_set_of_boxes_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: neither a COCO .json nor a YOLO .yaml file, nor a folder with"):
        read(tmp_path / "empty")
    for options, message in (
        ({"validation_fraction": 1}, "validation_fraction must be at least 0 and below 1"),
        ({"max_bad_images": 2}, "max_bad_images must lie between 0 and 1"),
        ({"validation_split": "dev"}, "validation_split must be 'val' or 'test', not 'dev'"),
        ({"num_channels": 2}, r"num_channels must be 1 \(grey\) or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            read("embedded", **options)
    written.write_saved(tmp_path / "saved")
    with pytest.raises(ValueError, match="no column 'things'; choose one of .* with --objects_column"):
        read(tmp_path / "saved", objects_column="things")
    with pytest.raises(ValueError, match="column 'image' needs a bbox and a category, but has no fields"):
        read(tmp_path / "saved", objects_column="image")


# ------------------------------------------------------------------------------------------------------ odd images


def whole(rows, indices):
    """The images in half their size."""
    return rows.load(indices, lambda place, index: (WHOLE, tuple((rows.sizes[index] // 2).tolist())))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_missing_or_broken_image_is_replaced_by_the_next_sound_one_and_its_boxes(tmp_path, num_workers, capfd):
    file = written.write_coco(tmp_path, IMAGES * 2)
    (tmp_path / "images/1.png").unlink()
    (tmp_path / "images/7.png").write_bytes(b"nothing")
    data = read_detection(file, validation_data=file, max_bad_images=0.3, num_workers=num_workers)
    images, used = whole(data.train, [0, 1, 7, 3])
    assert used.tolist() == [0, 2, 0, 3]
    assert [tuple(image.shape[1:]) for image in images] == [(15, 20), (15, 20), (15, 20), (12, 24)]
    assert torch.equal(images[0], images[2])
    assert data.train.bad == {1: "No such file or directory", 7: "not an image"}
    assert "bad image, replaced by another: 1.png: No such file or directory" in capfd.readouterr().err
    with pytest.raises(BadImages, match="1 of 16 images are bad, more than the part of 0.01 that max_bad_images"):
        whole(read(file, validation_data=file).train, [1, 7])


def test_an_image_is_as_its_annotation_says_upright_or_not(tmp_path):
    """Some annotate images as they are stored, some as they are seen; where the size tells which, it is heeded."""
    upright = picture(0, (30, 40))
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = 6
    stored = upright.transpose(decoding.UPRIGHT[8])  # (40, 30)
    images = [((30, 40), IMAGES[0][1]), ((40, 30), IMAGES[1][1]), ((31, 40), IMAGES[0][1])]
    file = written.write_coco(tmp_path, images)
    for number in range(3):
        stored.save(tmp_path / f"images/{number}.png", exif=exif)
    rows = read(file, validation_data=file, max_bad_images=0.5).train
    (seen, unturned), _ = rows.load([0, 1], lambda place, index: (WHOLE, tuple(rows.sizes[index].tolist())))
    assert np.array_equal(seen.permute(1, 2, 0), np.asarray(upright))
    assert np.array_equal(unturned.permute(1, 2, 0), np.asarray(stored))
    rows.load([2], lambda place, index: (WHOLE, (8, 8)))
    assert rows.bad == {2: "30x40 pixels, not 40x31 as its annotation says"}


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_grey_and_cmyk_images_and_very_long_ones_are_as_good_as_others(mode, tmp_path):
    images = [((1, 4000), [("cat", 100, 0, 50, 1)]), *IMAGES]
    file = written.write_coco(tmp_path, images)
    for number, (size, _) in enumerate(images):
        picture(number, size).convert(mode).save(tmp_path / f"images/{number}.tiff")
    Path(file).write_text(Path(file).read_text().replace(".png", ".tiff"))
    data = read(file, validation_data=file)
    assert data.num_channels == (1 if mode == "L" else 3)
    [pixels], _ = data.train.load([0], lambda place, index: (WHOLE, (1, 4000)))
    stored = picture(0, (1, 4000)).convert(mode).convert("L" if mode == "L" else "RGB")
    assert np.array_equal(pixels.permute(1, 2, 0).squeeze(2), np.asarray(stored))


# -------------------------------------------------------------------------------------------------------- embedded


def test_digits_lie_on_canvases_in_tight_boxes():
    splits = embedded_canvases(60, 20)
    assert splits["train"].images.contents == embedded_canvases.__wrapped__(60, 20)["train"].images.contents
    for split in splits.values():
        counts = np.bincount([box.image for box in split.boxes], minlength=len(split.sizes))
        assert counts.min() >= 1 and counts.max() <= 6 and set(split.sizes.ravel()) <= set(range(64, 97))
        corners = np.array([box.corners for box in split.boxes])
        extent = corners[:, 2:] - corners[:, :2]
        assert (corners[:, :2] >= 0).all() and (
            corners[:, 2:] <= split.sizes[[box.image for box in split.boxes]][:, ::-1]
        ).all()
        assert extent.min() >= 3 and extent.max() <= 32
    digits = embedded_digits()["train"]
    assert len(digits_on_canvases(digits, 3, seed=4).sizes) == 3


def test_the_ink_of_a_canvas_is_inside_its_boxes():
    data = read("embedded")
    assert (len(data.train), len(data.validation)) == (1000, 200) and data.label_names == list("0123456789")
    assert data.license == "CC-BY-4.0" and data.num_channels == 1 and not data.notes
    for index in range(20):
        [pixels], _ = data.train.load([index], lambda place, index: (WHOLE, tuple(data.train.sizes[index].tolist())))
        is_ink = pixels[0].numpy() > 150
        for left, top, right, bottom in data.train.truth(index)["boxes"].astype(int):
            assert is_ink[top:bottom, left:right].mean() > 0.05
            is_ink[top:bottom, left:right] = False
        assert is_ink.mean() < 0.002


# ---------------------------------------------------------------------------------------------------------- order


def test_a_global_batch_has_images_of_similar_aspect_and_an_epoch_all_of_them():
    data = read("embedded")
    rows = data.train
    steps = [rows.global_batch(step, 20, seed=5) for step in range(48)]
    windows = np.array(steps).reshape(3, -1)
    for number in range(3):
        assert sorted(windows[number]) == sorted(rows.draw(number * 320, 320, 5))
    spread = np.mean([np.ptp(rows.aspects(step)) for step in steps])
    assert spread < np.mean([np.ptp(rows.aspects(rows.draw(20 * step, 20, 5))) for step in range(48)]) / 4
    assert not np.array_equal(np.argsort([rows.aspects(step)[0] for step in steps[:16]]), np.arange(16))
    assert np.array_equal(rows.global_batch(37, 20, seed=5), steps[37])
    assert not np.array_equal(rows.global_batch(37, 20, seed=6), steps[37])


# ------------------------------------------------------------------------------------------------------- real data


@needs_real_data
def test_bccd_is_read():
    data = read(REAL_DATA / "bccd", validation_split="test")
    assert (len(data.train), len(data.validation)) == (205, 72)
    assert data.label_names == ["Platelets", "RBC", "WBC"] and data.num_channels == 3
    counts = [
        np.bincount(np.concatenate([rows.classes(i) for i in range(len(rows))])).tolist()
        for rows in (data.train, data.validation)
    ]
    assert counts == [[209, 2381, 214], [69, 805, 71]]
    assert data.notes == ["1 boxes of zero area left out (JPEGImages/BloodImage_00343.jpg)"]


@needs_real_data
def test_the_annotations_of_coco_are_read(tmp_path):
    file = REAL_DATA / "coco_eval" / "instances_val2014_100.json"
    content = json.loads(file.read_text())
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / file.name).write_text(file.read_text())
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / content["images"][0]["file_name"])
    data = read(tmp_path / "annotations" / file.name, validation_fraction=0.2)
    assert len(data.label_names) == 80 and data.label_names[:2] == ["person", "bicycle"] and data.category_ids[-1] == 90
    truth = [rows.truth(index) for rows in (data.train, data.validation) for index in range(len(rows))]
    assert sum(len(image["labels"]) for image in truth) == 839
    assert sum(image["iscrowd"].sum() for image in truth) == 9
    assert data.train.count_boxes() + data.validation.count_boxes() == 830


@needs_real_data
def test_nlvr_becomes_boxes(tmp_path):
    from tests.benchmarks.nlvr_boxes import convert

    convert(REAL_DATA / "nlvr", tmp_path / "coco")
    data = read(tmp_path / "coco")
    assert (len(data.train), len(data.validation)) == (989, 985) and data.label_names == [
        "square",
        "circle",
        "triangle",
    ]
    assert data.train.count_boxes() == 8876 and data.validation.count_boxes() == 8825
