import pytest

from training.data.sources import split_of


@pytest.mark.parametrize(
    "name, split",
    [("train-1.csv", "train"), ("Training", "train"), ("valid.txt", "val"), ("validation", "val"), ("dev.jsonl", "val"),
     ("development", "val"), ("test_b.txt", "test"), ("testament.txt", ""), ("device.txt", ""), ("notes.txt", "")],
)  # fmt: skip
def test_a_name_begins_with_its_split(name, split):
    assert split_of(name) == split
