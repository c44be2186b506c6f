import gzip
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.pictures import content, picture, write_classes, write_idx
from training.images.formats import ImageFiles
from training.images.read import read_images
from training.images.rows import BadImages

FASHION = Path(os.environ.get("HF_MODELS_TEST_DATA", "not given"), "fashion_mnist")
needs_fashion = pytest.mark.skipif(not FASHION.exists(), reason="needs fashion_mnist")


def all_pixels(rows, size=(12, 10)):
    return rows.images(range(len(rows)), size=size)


def same_images(one, other, size=(12, 10)) -> bool:
    """Whether both have the same images with the same labels, in whatever order."""

    def keys(rows):
        labels = [-1] * len(rows) if rows.labels is None else rows.labels.tolist()
        return sorted((label, pixels.tolist()) for label, pixels in zip(labels, all_pixels(rows, size), strict=True))

    return keys(one) == keys(other)


ZERO = [
    "  .#o   ",
    "  ##o#. ",
    "  #  oo ",
    " .o  oo ",
    " .o  oo ",
    " .o  o. ",
    "  #.oo  ",
    "  .#o   ",
]


def test_embedded_digits_are_real_and_split_for_ever():
    images = read_images("embedded")
    assert (len(images.train), len(images.validation)) == (1437, 360)
    assert images.label_names == list("0123456789") and images.image_size == (8, 8) and images.num_channels == 1
    assert images.train.labels.dtype == np.int64 and images.notes == [] and images.license
    pixels = images.validation.images([0], size=(8, 8))
    assert pixels.dtype == torch.uint8 and images.validation.labels[:3].tolist() == [0, 5, 0]
    shown = ["".join(" .o#"[min(int(value) // 64, 3)] for value in row) for row in pixels[0, 0]]
    assert shown == ZERO and int(pixels.max()) > 230
    assert read_images("embedded").fingerprint == images.fingerprint
    assert read_images("embedded", num_channels=3).train.images([0], size=(8, 8)).shape == (1, 3, 8, 8)
    assert read_images("embedded", labelled=False).train.labels is None


# ------------------------------------------------------------------------------------------------ folders of classes


def test_a_folder_of_classes_holds_out_a_part_of_each(tmp_path):
    images = read_images(write_classes(tmp_path / "pets", {"dog": 20, "cat": 30, "eel": 2, "gnu": 1}))
    assert images.label_names == ["cat", "dog", "eel", "gnu"] and images.num_channels == 3
    assert np.bincount(images.validation.labels).tolist() == [3, 2, 1]  # of one gnu, none
    assert np.bincount(images.train.labels).tolist() == [27, 18, 1, 1]
    assert images.image_size == (12, 10) and images.source == "pets" and images.notes == []
    seen = {
        tuple(pixels.flatten().tolist()) for rows in (images.train, images.validation) for pixels in all_pixels(rows)
    }
    assert len(seen) == 53
    other = read_images(str(tmp_path / "pets"), seed=1)
    assert other.fingerprint != images.fingerprint and not same_images(other.validation, images.validation)


def test_what_is_held_out_depends_on_the_images_and_not_on_their_names(tmp_path):
    first = read_images(write_classes(tmp_path / "a", {"x": 20, "y": 20}))
    write_classes(tmp_path / "b", {"x": 20, "y": 20})
    for number in range(20):
        (tmp_path / "b" / "x" / f"{number}.png").rename(tmp_path / "b" / "x" / f"{(number * 7) % 20}-b.PNG")
    second = read_images(str(tmp_path / "b"))
    assert same_images(first.train, second.train) and same_images(first.validation, second.validation)
    for path in (tmp_path / "a" / "y").glob("1*.png"):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    assert all("validation" not in note for note in read_images(str(tmp_path / "a")).notes)


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev", "test"])
@pytest.mark.parametrize("train", ["train", "training"])
def test_a_folder_names_its_splits(tmp_path, train, validation):
    write_classes(tmp_path / train, {"cat": 2, "dog": 3})
    write_classes(tmp_path / validation, {"dog": 2, "cat": 1}, first=100)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("about it")
    images = read_images(str(tmp_path))
    assert images.train.labels.tolist() == [0, 0, 1, 1, 1] and images.validation.labels.tolist() == [0, 1, 1]
    is_test = ["validating on the test part, since there is no other"]
    assert images.notes == (is_test if validation == "test" else [])
    if validation != "test":
        write_classes(tmp_path / "test", {"cat": 4}, first=200)
        assert len(read_images(str(tmp_path)).validation) == 3


def test_parts_without_one_to_train_on_are_no_classes(tmp_path):
    for part in ("val", "test"):
        write_classes(tmp_path / part, {"cat": 2, "dog": 3})
    with pytest.raises(ValueError, match="has no part to train on, only val"):
        read_images(str(tmp_path))


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    write_classes(tmp_path / "all", {"cat": 4, "dog": 4})
    (tmp_path / "all" / "cat" / "loop").symlink_to(tmp_path / "all")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "all")
    assert len(read_images(str(tmp_path / "elsewhere"), validation_fraction=0.0, labelled=False).train) == 8


def test_a_class_may_be_called_train(tmp_path):
    images = read_images(write_classes(tmp_path, {"car": 3, "train": 3, "tram": 2}))
    assert images.label_names == ["car", "train", "tram"]


def test_validation_data_may_lie_elsewhere(tmp_path):
    train = write_classes(tmp_path / "a", {"cat": 4, "dog": 4})
    other = write_classes(tmp_path / "b", {"dog": 3}, first=50)
    images = read_images(train, validation_data=other)
    assert (len(images.train), images.validation.labels.tolist()) == (8, [1, 1, 1])
    write_classes(tmp_path / "b", {"emu": 1})
    with pytest.raises(ValueError, match=r"emu/0.png has the label 'emu', which is none of the 2 classes: cat, dog"):
        read_images(train, validation_data=other)


def test_images_without_labels_may_lie_anywhere(tmp_path):
    write_classes(tmp_path, {"a/b/c": 5, "d": 4})
    picture(100).save(tmp_path / "top.png")
    images = read_images(str(tmp_path), labelled=False, validation_fraction=0.2)
    assert (len(images.train), len(images.validation)) == (8, 2)
    assert images.label_names == [] and images.train.labels is None
    with pytest.raises(ValueError, match=r"holds 1 images outside of its class folders \(top.png\)"):
        read_images(str(tmp_path))


def test_the_names_of_the_classes_may_be_given(tmp_path):
    data = write_classes(tmp_path, {"cat": 4, "dog": 4})
    images = read_images(data, label_names=["dog", "emu", "cat"])
    assert images.label_names == ["dog", "emu", "cat"] and set(images.train.labels) == {0, 2}
    with pytest.raises(ValueError, match=r"cat/\d.png has the label 'cat', which is none of the 2 classes: dog, emu"):
        read_images(data, label_names=["dog", "emu"])
    for names in (["dog"], ["dog", "dog"]):
        with pytest.raises(ValueError, match="label_names must be several different names"):
            read_images(data, label_names=names)


def test_images_in_both_parts_are_noted(tmp_path):
    write_classes(tmp_path / "train", {"a": 5, "b": 5})
    write_classes(tmp_path / "val", {"a": 3, "b": 3}, first=3)  # 3 and 4, 5 to 8
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "train/b/again.png")
    images = read_images(str(tmp_path))
    assert images.notes == [
        "6 of 6 validation images are training images too: a/0.png, a/1.png, a/2.png, ...",
        "1 of 11 training images are there twice",
    ]


def test_grey_images_make_a_grey_data_set_and_a_given_number_of_channels_wins(tmp_path):
    write_classes(tmp_path, {"a": 3})
    write_classes(tmp_path, {"b": 3}, size=(20, 10), first=3)
    assert read_images(str(tmp_path)).num_channels == 3 and read_images(str(tmp_path)).image_size is None
    for path in tmp_path.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert read_images(str(tmp_path)).num_channels == 1
    assert all_pixels(read_images(str(tmp_path)).train).shape[1] == 1
    colour = read_images(str(tmp_path), num_channels=3)
    pixels = all_pixels(colour.train)
    assert pixels.shape[1] == 3 and torch.equal(pixels[:, 0], pixels[:, 2])
    assert colour.train.report()[0].startswith("4 grey images converted (a/")
    with pytest.raises(ValueError, match=r"num_channels must be 1 \(grey\) or 3 \(colour\), not 4"):
        read_images(str(tmp_path), num_channels=4)


def test_the_fingerprint_covers_images_labels_and_split(tmp_path):
    write_classes(tmp_path / "a", {"x": 5, "y": 5})
    found = [read_images(str(tmp_path / "a")).fingerprint]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read_images(str(tmp_path / "b")).fingerprint == found[0]
    found.append(read_images(str(tmp_path / "a"), validation_fraction=0.4).fingerprint)
    (tmp_path / "b/x/4.png").rename(tmp_path / "b/y/5.png")
    found.append(read_images(str(tmp_path / "b")).fingerprint)
    picture(77).save(tmp_path / "b/x/0.png")
    found.append(read_images(str(tmp_path / "b")).fingerprint)
    assert len(set(found)) == 4


def test_a_large_set_is_known_by_sizes_and_first_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("training.images.formats.HASHED_BYTES", 100)
    monkeypatch.setattr("training.images.formats.FIRST_BYTES", 150)
    write_classes(tmp_path / "train", {"a": 4, "b": 4})
    write_classes(tmp_path / "val", {"a": 3}, first=3)
    assert read_images(str(tmp_path)).notes[0].startswith("3 of 3 validation images are training images too")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "dog"), "has one class only, 'cat': classifying needs two or more"),
        (lambda root: (root / "emu").mkdir(), "the class folder 'emu' holds no image; fill or remove it"),
        (lambda root: picture(0).save(root / "x.gif"), r"holds 1 images outside of its class folders \(x.gif\)"),
        (lambda root: [shutil.rmtree(root / name) for name in ("cat", "dog")], r"holds no image \(.avif, .bmp"),
        (
            lambda root: [path.write_bytes(b"x") for path in root.rglob("*.png")],
            r"none of the \d images looked at can be identified",
        ),
    ],
)
def test_a_folder_that_cannot_be_classified_is_refused(tmp_path, change, message):
    write_classes(tmp_path / "pets", {"cat": 4, "dog": 4})
    change(tmp_path / "pets")
    with pytest.raises(ValueError, match=message):
        read_images(str(tmp_path / "pets"))


def test_what_cannot_be_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="expected a folder, or an idx, .csv, .json, .jsonl or .parquet file"):
        read_images(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="no such file or folder"):
        read_images(str(tmp_path / "b.csv"))
    for option, value in {"validation_fraction": 1.0, "max_bad_images": -0.1}.items():
        with pytest.raises(ValueError, match=option):
            read_images("embedded", **{option: value})
    with pytest.raises(ValueError, match="streaming needs a Hub data set or parquet files"):
        read_images("embedded", streaming=True)


# ------------------------------------------------------------------------------------------------------- idx files

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 7, 6), np.uint8)
LABELS = np.arange(40) % 4 + 3


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_gzipped_or_not(tmp_path, suffix):
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", PIXELS)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", LABELS)
    file = str(tmp_path / f"train-images-idx3-ubyte{suffix}")
    for data in (str(tmp_path), file):
        images = read_images(data)
        assert (len(images.train), len(images.validation)) == (36, 4)
        assert images.label_names == ["3", "4", "5", "6"] and images.image_size == (7, 6)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", PIXELS[:5])
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", LABELS[:5])
    images = read_images(str(tmp_path))
    assert all_pixels(images.train, (7, 6))[:, 0].tolist() == PIXELS.tolist()
    assert images.validation.labels.tolist() == [0, 1, 2, 3, 0]
    assert images.notes[0] == "validating on the test part, since there is no other"
    assert images.notes[1].startswith(
        f"5 of 5 validation images are training images too: t10k-images-idx3-ubyte{suffix}"
    )
    assert len(read_images(file).validation) == 4


def test_the_numbers_of_idx_files_may_be_given_names(tmp_path):
    write_idx(tmp_path / "train-images.idx3-ubyte", PIXELS)
    write_idx(tmp_path / "train-labels.idx1-ubyte", LABELS - 3)
    images = read_images(str(tmp_path), label_names=["shirt", "shoe", "bag", "coat"], validation_fraction=0)
    assert images.label_names[1] == "shoe" and images.train.labels.tolist() == (LABELS - 3).tolist()
    assert len(images.validation) == 0
    with pytest.raises(ValueError, match=r"image 2 has the label 2, which is none of the 2 classes: 0, 1"):
        read_images(str(tmp_path), label_names=["shirt", "shoe"])


@pytest.mark.parametrize("channels", [1, 3, 4, 2])
def test_idx_files_may_have_channels(tmp_path, channels):
    write_idx(tmp_path / "train-images-idx4-ubyte", np.repeat(PIXELS[..., None], channels, 3))
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS)
    if channels in (1, 3):
        assert read_images(str(tmp_path)).num_channels == channels
    elif channels == 4:
        with pytest.raises(ValueError, match=r"images with 4 channels: set num_channels to 3 \(colour\) or 1 \(grey\)"):
            read_images(str(tmp_path))
        assert read_images(str(tmp_path), num_channels=3).train.images([0], size=(7, 6)).shape[1] == 3
    else:
        with pytest.raises(ValueError, match="is no set of images"):
            read_images(str(tmp_path))


def test_damaged_idx_files_are_refused(tmp_path):
    images = tmp_path / "train-images-idx3-ubyte"
    write_idx(images, PIXELS)
    labels = tmp_path / "train-labels-idx1-ubyte"
    with pytest.raises(ValueError, match=r"has no labels: .*train-labels-idx1-ubyte\[.gz\] is missing"):
        read_images(str(tmp_path))
    assert len(read_images(str(tmp_path), labelled=False).train) == 36
    write_idx(labels, LABELS[:-1])
    with pytest.raises(ValueError, match=r"has labels \(39,\), but train-images-idx3-ubyte has 40 images"):
        read_images(str(tmp_path))
    write_idx(labels, LABELS)
    for damaged, message in {
        images.read_bytes()[:-1]: "is damaged: 1679 values, but its head says",
        b"\0\0\x0d" + images.read_bytes()[3:]: "no idx file of unsigned bytes",
        b"\0": "cannot be read",
    }.items():
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_images(str(tmp_path))
    images.rename(tmp_path / "train-images-idx3-ubyte.gz")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(2000))[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        read_images(str(tmp_path))


@needs_fashion
def test_fashion_mnist_is_what_was_published():
    images = read_images(str(FASHION))
    assert (len(images.train), len(images.validation)) == (60_000, 10_000) and len(images.label_names) == 10
    pixels = images.train.images(range(60_000), size=(28, 28)).float() / 255
    assert float(pixels.mean()) == pytest.approx(0.2860, abs=1e-4)
    assert float(pixels.std()) == pytest.approx(0.3530, abs=1e-4)


# --------------------------------------------------------------------------------------------------- tables, the Hub


def write_pictures(root, count=20):
    """Pictures and their labels; the names are relative to the folder."""
    (root / "png").mkdir(parents=True)
    for number in range(count):
        picture(number).save(root / "png" / f"{number}.png")
    return [f"png/{number}.png" for number in range(count)], ["odd" if n % 2 else "even" for n in range(count)]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_a_table_has_a_path_and_a_label_for_every_image(tmp_path, kind):
    paths, labels = write_pictures(tmp_path)
    rows = [{"file": path, "kind": label} for path, label in zip(paths, labels, strict=True)]
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        path.write_text("file,kind\n" + "".join(f"{row['file']},{row['kind']}\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    columns = {"image_column": "file", "label_column": "kind"}
    images = read_images(str(path), **columns, validation_fraction=0)
    assert images.label_names == ["even", "odd"] and images.train.labels.tolist() == [0, 1] * 10
    assert torch.equal(all_pixels(images.train)[3], torch.tensor(np.array(picture(3))).permute(2, 0, 1))
    with pytest.raises(ValueError, match=r"no column 'image'; choose one of \['file', 'kind'\] with --image_column"):
        read_images(str(path))
    (tmp_path / paths[4]).unlink()
    with pytest.raises(ValueError, match=r"1 of 20 images are missing: .*, row 5: png/4.png; paths are relative to"):
        read_images(str(path), **columns)


def test_what_an_image_is_known_by_does_not_depend_on_where_it_lies_even_if_it_cannot_be_read(tmp_path):
    names = ["0.png", "missing.png", "missing_too.png"]
    digests = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        picture(0).save(folder / "0.png")
        digests.append(ImageFiles(names, folder).digests())
    assert digests[0] == digests[1] and len(set(digests[0])) == 3


def test_a_row_without_image_or_label_is_refused(tmp_path):
    write_pictures(tmp_path, 3)
    for row, message in {"png/1.png,": "row 2: no label", ",odd": "row 2: image must be the path"}.items():
        (tmp_path / "table.csv").write_text(f"image,label\npng/0.png,odd\n{row}\npng/2.png,even\n")
        with pytest.raises(ValueError, match=message):
            read_images(str(tmp_path / "table.csv"))


def make_dataset(count=20, class_names=("even", "odd"), first=0, bad=()):
    files = [b"" if number in bad else content(picture(number)) for number in range(first, first + count)]
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [n % 2 for n in range(count)]}
    label = datasets.ClassLabel(names=list(class_names)) if class_names else datasets.Value("int64")
    return datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": label}))


@pytest.mark.parametrize("form", ["saved", "saved without splits", "folder of parquet", "parquet", "binary column"])
def test_a_data_set_is_read_from_where_it_was_saved(tmp_path, form):
    train, validation = make_dataset(), make_dataset(6, first=100)
    data = tmp_path / "data"
    if form == "saved":
        datasets.DatasetDict({"train": train, "validation": validation}).save_to_disk(data)
    elif form == "saved without splits":
        train.save_to_disk(data)
    elif form == "folder of parquet":
        (data / "data").mkdir(parents=True)
        train.to_parquet(data / "data" / "train-00000-of-00001.parquet")
        validation.to_parquet(data / "data" / "validation-00000-of-00001.parquet")
    else:
        data = tmp_path / "data.parquet"
        if form == "binary column":
            files = [content(picture(number)) for number in range(20)]
            train = datasets.Dataset.from_dict({"image": files, "label": train["label"]})
        train.to_parquet(data)
    images = read_images(str(data), num_workers=1)
    names = ["0", "1"] if form == "binary column" else ["even", "odd"]
    sizes = (20, 6) if form in ("saved", "folder of parquet") else (18, 2)
    assert (len(images.train), len(images.validation)) == sizes and images.label_names == names
    whole = read_images(str(data), validation_data=str(data))
    assert torch.equal(all_pixels(whole.train)[5], torch.tensor(np.array(picture(5))).permute(2, 0, 1))
    assert whole.train.labels.tolist() == [0, 1] * 10
    assert len(whole.validation) == (6 if sizes == (20, 6) else 20)
    if sizes != (20, 6):
        assert whole.notes == ["20 of 20 validation images are training images too: " + whole.notes[0].split(": ")[1]]


def test_data_to_validate_on_alone_has_no_need_of_a_part_to_train_on(tmp_path, monkeypatch):
    train = write_classes(tmp_path / "train", {"even": 4, "odd": 4})
    parts = {"train": make_dataset(6), "validation": make_dataset(2, first=100), "test": make_dataset(4, first=200)}
    for names, count in ((("validation", "test"), 2), (("train", "test"), 4), (("test",), 4), (("train",), 6)):
        data = tmp_path / "-".join(names)
        datasets.DatasetDict({name: parts[name] for name in names}).save_to_disk(data)
        assert len(read_images(train, validation_data=str(data)).validation) == count
    with pytest.raises(ValueError, match="test has no part to train on, only test"):
        read_images(str(tmp_path / "test"))
    datasets.DatasetDict({"other": parts["test"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other has no split 'train', 'validation' or 'test', only \['other'\]"):
        read_images(train, validation_data=str(tmp_path / "other"))
    write_classes(tmp_path / "folder" / "val", {"even": 2, "odd": 1}, first=300)
    assert len(read_images(train, validation_data=str(tmp_path / "folder")).validation) == 3
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(test=parts["test"]))
    assert len(read_images(train, validation_data="somebody/pictures").validation) == 4


def test_the_hub_s_classes_columns_and_splits_are_checked(tmp_path, monkeypatch):
    found = {"train": make_dataset(class_names=("a", "b", "c")), "test": make_dataset(4, ("a", "b", "c"), first=50)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(found))
    with pytest.raises(ValueError, match="no training image has the class 'c'; add some, or give label_names"):
        read_images("someone/pictures")
    images = read_images("someone/pictures", label_names=["b", "a"])
    assert images.source == "someone/pictures" and images.train.labels.tolist() == [1, 0] * 10
    assert images.notes == ["validating on the test part, since there is no other"]
    with pytest.raises(ValueError, match=r"no column 'img'; choose one of \['image', 'label'\] with --image_column"):
        read_images("someone/pictures", image_column="img")
    with pytest.raises(ValueError, match=r"column 'label' holds .*ClassLabel.*, not images"):
        read_images("someone/pictures", image_column="label")
    unlabelled = make_dataset(3).cast_column("label", datasets.Value("int64")).to_dict()
    unlabelled["label"][1] = -1
    found["train"] = datasets.Dataset.from_dict(unlabelled, make_dataset().features)
    with pytest.raises(ValueError, match=r"split train, row 2: label -1 is outside of the 2 classes, 0 to 1"):
        read_images("someone/pictures")
    assert read_images("someone/pictures", labelled=False).label_names == []


def test_a_bad_image_of_a_data_set_is_named_by_its_row(tmp_path):
    datasets.DatasetDict({"train": make_dataset(bad=[4])}).save_to_disk(tmp_path)
    images = read_images(str(tmp_path), validation_fraction=0, max_bad_images=0.1)
    all_pixels(images.train)
    assert images.train.report() == [f"1 bad images replaced by others ({tmp_path}, split train, row 5: no content)"]


def test_bad_images_are_counted_over_training_and_validation_together(tmp_path):
    write_classes(tmp_path / "train", {"a": 40, "b": 40})
    write_classes(tmp_path / "val", {"a": 10, "b": 10}, first=80)
    for name in ("val/a/3.png", "train/b/7.png"):
        (tmp_path / name).write_bytes(b"")
    images = read_images(str(tmp_path), max_bad_images=0.02)
    all_pixels(images.validation), all_pixels(images.train)
    assert images.validation.report() == ["1 bad images replaced by others (a/3.png: not an image)"]
    images = read_images(str(tmp_path), max_bad_images=0.01)
    all_pixels(images.validation)
    with pytest.raises(BadImages, match=r"2 of 100 images are bad, .*: b/7.png: not an image, a/3.png: not an image;"):
        all_pixels(images.train)
