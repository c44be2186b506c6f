import datasets
import numpy as np
import pytest
import torch

from tests.training.pictures import content, picture
from training.images import stream as image_stream
from training.images.read import read_images
from training.images.rows import BadImageLimit, BadImages, Decoder
from training.images.stream import stream_images


def make_stream(count=50, num_shards=4, bad=(), class_names=("even", "odd")):
    files = [b"" if number in bad else content(picture(number)) for number in range(count)]
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [n % 2 for n in range(count)]}
    label = datasets.ClassLabel(names=list(class_names)) if class_names else datasets.Value("int64")
    dataset = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": label}))
    return {"train": dataset.to_iterable_dataset(num_shards)}


def open_stream(splits=None, label_names=None, label_column="label", rows_per_shard=10, max_bad_images=0.2):
    options = {"num_channels": 3, "decoder": Decoder(), "limit": BadImageLimit(max_bad_images)}
    names = ("pictures", "image", label_column, label_names)
    return stream_images(splits or make_stream(), *names, **options, rows_per_shard=rows_per_shard)


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(image_stream, "NUM_HELD_OUT", 5)


def numbers_of(rows, indices):
    """Which pictures these are."""
    known = {tuple(np.array(picture(number)).flatten().tolist()): number for number in range(50)}
    pixels = rows.images(indices, size=(12, 10)).permute(0, 2, 3, 1)
    return [known[tuple(image.flatten().tolist())] for image in pixels]


def test_a_stream_gives_every_image_once_in_shards_of_arrival():
    rows, held_out, names, *_ = open_stream()
    assert names == ["even", "odd"] and held_out.labels.tolist() == [0, 1, 0, 1, 0]
    assert numbers_of(held_out, range(5)) == [0, 1, 2, 3, 4]
    rows.draw(0, 10, seed=0)
    assert len(rows.source.found) == 2 and len(rows) == 20  # one ahead
    drawn = rows.draw(0, 90, seed=0)
    assert [len(entry["ends"]) for entry in rows.source.found] == [10, 10, 10, 10, 5]
    for epoch in (drawn[:45], drawn[45:]):
        found = numbers_of(rows, epoch)
        assert sorted(found) == list(range(5, 50)) and found != sorted(found)
        assert sorted(found[10:20]) == list(range(15, 25))
        assert [number % 2 for number in found] == rows.labels[epoch].tolist()
    assert drawn[:45].tolist() != drawn[45:].tolist()
    assert np.array_equal(rows.draw(13, 50, seed=0), drawn[13:63])
    assert not np.array_equal(rows.draw(0, 45, seed=1), drawn[:45])


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_stopped_after_some_shards_a_stream_goes_on_without_loss(num_shards, tmp_path, monkeypatch):
    uninterrupted, *_, fingerprint = open_stream()
    drawn = uninterrupted.draw(0, 60, seed=0)
    expected, files = numbers_of(uninterrupted, drawn), uninterrupted.external_files()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "other"))
    stopped, *_ = open_stream()
    while len(stopped.source.found) <= num_shards:
        stopped.source.write_shard()
    stopped.source.path(num_shards).with_suffix(".json").unlink()  # as a kill between the two files leaves it
    resumed, *_, again = open_stream()
    assert len(resumed.source.found) == num_shards and again == fingerprint
    assert np.array_equal(resumed.draw(0, 60, seed=0), drawn) and numbers_of(resumed, drawn) == expected
    assert list(resumed.external_files().values()) == list(files.values()) and len(files) == 5


def test_other_processes_wait_for_the_writer(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    reader, *_ = open_stream()
    reader.source.timeout = 0.2
    with pytest.raises(TimeoutError, match=r"shard-00000\.bin did not appear in 0 s"):
        reader.draw(0, 1, seed=0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    writer, *_ = open_stream()
    drawn = writer.draw(0, 10, seed=0)
    assert np.array_equal(reader.draw(0, 10, seed=0), drawn)
    assert np.array_equal(reader.draw(10, 10, seed=0), writer.draw(10, 10, seed=0))


def test_a_bad_image_is_replaced_within_its_shard():
    splits = make_stream(bad=[12, 14])  # the seventh and ninth of the first shard
    found = []
    for ahead in (1, 45):
        rows, *_ = open_stream(splits)
        rows.draw(0, ahead, seed=0)
        found.append(numbers_of(rows, [7, 9]))
        assert rows.bad.keys() == {7, 9} and rows.labels[[7, 9]].tolist() == [0, 0]
    assert found == [[6, 6], [6, 6]]  # counted round: 12, 14, 6
    rows, *_ = open_stream(splits, max_bad_images=0.01)
    rows.draw(0, 45, seed=0)
    with pytest.raises(BadImages, match=r"pictures, row 8 of the stream: no content"):
        rows.images([7], size=(4, 4))


def test_a_stream_names_its_classes_or_is_told_them():
    splits = make_stream(class_names=None)
    with pytest.raises(ValueError, match="a stream does not say which classes will come: name them with label_names"):
        open_stream(splits)
    rows, held_out, names, *_ = open_stream(splits, label_names=["even", "odd"])
    rows.draw(0, 1, seed=0)
    assert names == ["even", "odd"] and rows.labels[:4].tolist() == [1, 0, 1, 0]
    rows, held_out, names, *_ = open_stream(splits, label_column=None)
    rows.draw(0, 1, seed=0)
    assert names == [] and rows.labels is None and held_out.labels is None
    with pytest.raises(ValueError, match="has the label 1, which is none of the 2 classes"):
        open_stream(splits, label_names=["0", "7"])


def test_a_stream_of_parquet_files_is_read_as_a_whole(tmp_path):
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": content(picture(number)), "path": None} for number in range(30)], "label": [0, 1, 2] * 10},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}),
    )
    for split, chosen in {"train": range(24), "test": range(24, 30)}.items():
        dataset.select(chosen).to_parquet(tmp_path / f"{split}.parquet")
    images = read_images(str(tmp_path), streaming=True)
    assert numbers_of(images.validation, range(5)) == [24, 25, 26, 27, 28] and images.label_names == ["a", "b", "c"]
    indices = images.train.draw(0, 48, seed=0)
    assert sorted(numbers_of(images.train, indices)) == sorted([*range(24)] * 2)
    assert images.train.images(indices[:2], size=(8, 8)).dtype == torch.uint8 and images.num_channels == 3


def test_paths_in_a_streamed_file_are_relative_to_it_and_a_missing_one_is_bad(tmp_path):
    paths = [f"{number}.png" for number in range(20)]
    for path, number in zip(paths, range(20), strict=True):
        picture(number).save(tmp_path / path)
    dataset = datasets.Dataset.from_dict({"image": paths, "label": ["a", "b"] * 10})
    dataset.to_parquet(tmp_path / "table.parquet")
    (tmp_path / "7.png").unlink()
    images = read_images(str(tmp_path / "table.parquet"), streaming=True, label_names=["a", "b"], max_bad_images=0.2)
    indices = images.train.draw(0, 15, seed=0)
    assert sorted(numbers_of(images.train, indices)) == [5, 6, 8, 9, 9, *range(10, 20)]
    assert images.train.report()[0].startswith("1 bad images replaced by others")
