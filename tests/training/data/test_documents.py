import gzip
import os
import random
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.training.corpora import LINES, STORY, write_jsonl, write_text
from training.data.documents import read_documents
from training.data.embedded import embedded_documents

REAL_DATA = Path(os.environ.get("HF_MODELS_TEST_DATA", "not given"))
SHAKESPEARE = REAL_DATA / "tinyshakespeare" / "input.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tinyshakespeare")


def test_embedded_text_is_real_and_the_same_every_time():
    corpus = read_documents("embedded")
    train, validation = list(corpus.train), list(corpus.validation)
    assert corpus.num_documents == len(train) + len(validation) > 300
    assert 0.05 <= len(validation) / corpus.num_documents <= 0.10 + 1 / corpus.num_documents
    assert 1_000_000 < corpus.num_bytes == sum(len(t.encode()) for t in train + validation)
    assert any("Read and write ZIP files" in t for t in train + validation)
    assert not set(train) & set(validation)
    assert corpus.license == "PSF-2.0" and "CPython" in corpus.source
    embedded_documents.cache_clear()
    again = read_documents("embedded")
    assert again.fingerprint == corpus.fingerprint and list(again.train) == train


def test_a_text_file_is_cut_at_its_last_tenth_and_kept_exactly(tmp_path):
    corpus = read_documents(write_text(tmp_path / "story.txt"))
    (train,), (validation,) = corpus.train, corpus.validation
    assert corpus.source == "story.txt"
    assert train == STORY[: int(len(STORY) * 0.9)] and train + validation == STORY


@needs_shakespeare
def test_shakespeare_is_cut_where_nanogpt_cuts_it():
    corpus = read_documents(str(SHAKESPEARE))
    assert [len(t) for t in corpus.train] == [1_003_854] and [len(t) for t in corpus.validation] == [111_540]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "folder of txt"])
def test_documents_of_every_kind_of_file(tmp_path, kind):
    if kind == "folder of txt":
        for number, line in enumerate(LINES):
            write_text(tmp_path / f"{number:03d}.txt", line)
        corpus = read_documents(str(tmp_path))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [*LINES, None, ""]}), tmp_path / "a.parquet")
        corpus = read_documents(str(tmp_path / "a.parquet"))
    else:
        path = Path(write_jsonl(tmp_path / "a.jsonl", [*LINES, ""]))
        if kind == "jsonl.gz":
            path = tmp_path / "b.jsonl.gz"
            path.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
        corpus = read_documents(str(path))
    train, validation = list(corpus.train), list(corpus.validation)
    assert len(validation) == 20 and sorted(train + validation) == sorted(LINES)
    assert train == [line for line in LINES if line in train]  # in the order of the file
    assert list(corpus.train.skip(3)) == train[3:]


def test_held_out_documents_depend_on_their_content_only(tmp_path):
    shuffled = random.Random(0).sample(LINES + LINES[:50], 250)
    one = read_documents(write_jsonl(tmp_path / "a.jsonl", LINES + LINES[:50]))
    other = read_documents(write_jsonl(tmp_path / "b.jsonl", shuffled))
    assert set(one.validation) == set(other.validation) and one.fingerprint != other.fingerprint
    assert not set(one.train) & set(one.validation)


def test_a_folder_names_its_splits(tmp_path):
    write_text(tmp_path / "train.txt", "to learn")
    write_text(tmp_path / "test.txt", "to test")
    write_text(tmp_path / "notes.txt", "about it")
    (tmp_path / "valid").mkdir()
    write_text(tmp_path / "valid" / "b.txt", "second")
    write_text(tmp_path / "valid" / "a.txt", "first")
    corpus = read_documents(str(tmp_path))
    assert list(corpus.train) == ["to learn"] and list(corpus.validation) == ["first", "second"]
    (tmp_path / "train.txt").rename(tmp_path / "testament.txt")
    assert list(read_documents(str(tmp_path)).train) == ["about it", "to learn"]


def test_development_documents_are_not_trained_on(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["to learn"])
    write_jsonl(tmp_path / "dev.jsonl", ["to validate"])
    corpus = read_documents(str(tmp_path))
    assert (list(corpus.train), list(corpus.validation)) == (["to learn"], ["to validate"])


def test_any_changed_character_changes_the_fingerprint(tmp_path):
    one, other = (read_documents(write_text(tmp_path / "a.txt", STORY + end)) for end in (".", "!"))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint != read_documents(write_text(tmp_path / "a.txt", STORY + "."), validation_fraction=0.2)


def broken_files(folder):
    write_text(folder / "empty.txt", "")
    yield "empty.txt", r"empty\.txt: the text is empty"
    yield "missing.txt", r"no such file or folder: .*missing\.txt"
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    yield "bad.jsonl", r"bad\.jsonl, line 2: not valid JSON"
    (folder / "list.jsonl").write_text("[1]\n")
    yield "list.jsonl", r"list\.jsonl, line 1: expected a JSON object"
    write_jsonl(folder / "column.jsonl", LINES, column="content")
    yield "column.jsonl", r"column\.jsonl, line 1: no column 'text'; name one of \['content'\] with --text_column"
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    yield "number.jsonl", r"number\.jsonl, line 1: column 'text' holds int"
    (folder / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    yield "surrogate.jsonl", r"surrogate\.jsonl: document 0 is not valid Unicode"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"]}), folder / "column.parquet")
    yield "column.parquet", r"column\.parquet: no column 'text'; name one of \['a'\]"
    (folder / "bad.parquet").write_bytes(b"PAR1 nonsense")
    yield "bad.parquet", r"bad\.parquet cannot be read"
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    yield "latin.txt", r"latin\.txt cannot be read"
    (folder / "cut.txt.gz").write_bytes(gzip.compress(STORY.encode())[:-20])
    yield "cut.txt.gz", r"cut\.txt\.gz cannot be read"
    (folder / "image.png").write_bytes(b"")
    yield "image.png", r"image\.png: expected a \.txt"
    (folder / "nothing").mkdir()
    yield "nothing", r"nothing: the folder holds no"
    write_text(folder / "one.txt", "x")
    yield "one.txt", r"one\.txt: too little text"
    write_jsonl(folder / "same.jsonl", ["the same"] * 9)
    yield "same.jsonl", r"same\.jsonl: too little text"


def test_broken_data_is_named(tmp_path):
    for name, message in broken_files(tmp_path):
        with pytest.raises(ValueError, match=message):
            read_documents(str(tmp_path / name))
    with pytest.raises(ValueError, match="validation_fraction"):
        read_documents("embedded", validation_fraction=1.0)
    with pytest.raises(ValueError, match="leave streaming off"):
        read_documents("embedded", streaming=True)


def test_a_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(name, config, streaming):
        asked.append((name, config))
        found = datasets.DatasetDict(train=datasets.Dataset.from_dict({"body": LINES, "id": range(200)}))
        if config == "split":
            found["validation"] = datasets.Dataset.from_dict({"body": ["held out"]})
        if name == "someone/nothing":
            raise datasets.exceptions.DatasetNotFoundError("it does not exist")
        return found if not streaming else {k: v.to_iterable_dataset() for k, v in found.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = read_documents("someone/text", text_column="body")
    assert sorted([*corpus.train, *corpus.validation]) == sorted(LINES)
    assert list(read_documents("someone/text:split", text_column="body").validation) == ["held out"]
    assert asked == [("someone/text", None), ("someone/text", "split")]
    streamed = read_documents("someone/text:split", text_column="body", streaming=True)
    assert list(streamed.train) == LINES and list(streamed.validation) == ["held out"]
    with pytest.raises(ValueError, match=r"no column 'text'; name one of \['body', 'id'\]"):
        read_documents("someone/text")
    with pytest.raises(ValueError, match=r"no column 'text'; name one of \['body', 'id'\]"):
        read_documents("someone/text", streaming=True)
    with pytest.raises(ValueError, match="'someone/nothing' is no local file or folder"):
        read_documents("someone/nothing")
