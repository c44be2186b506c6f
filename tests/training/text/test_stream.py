import hashlib
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from tests.training.corpora import LINES
from training.data import documents
from training.data.documents import stream_corpus
from training.text.stream import StreamedTokens
from training.text.tokenizer import encode_documents, make_tokenizer
from training.text.tokens import tokenize_documents


def open_stream(num_documents=200, seed=0, context_length=16, rows_per_shard=10, **options):
    """200 numbered documents, the first 5 held out, an empty one among them, as characters."""
    contents = [line if n != 50 else "" for n, line in enumerate(LINES[:num_documents])]
    dataset = datasets.Dataset.from_dict({"text": contents}).to_iterable_dataset(num_shards=4)
    corpus = stream_corpus(dataset, source="numbers", num_held_out=5)
    whole = documents._split(documents.Documents.of(lambda: LINES), None, 0.1, "numbers")
    tokenizer = make_tokenizer("char", whole, context_length=context_length)
    options = {"rows_per_shard": rows_per_shard, **options}
    return StreamedTokens(corpus, tokenizer, context_length, seed, **options), corpus, tokenizer


def whole_stream(corpus, tokenizer):
    return np.concatenate(list(encode_documents(tokenizer, corpus.train)))


def test_a_stream_gives_every_row_once_in_shards_of_arrival():
    stream, corpus, tokenizer = open_stream()
    tokens = whole_stream(corpus, tokenizer)
    assert list(corpus.validation) == LINES[:5] and next(iter(corpus.train)) == LINES[5]
    assert stream.num_rows is None
    stream.rows(0, 10)
    assert len(stream.found) == 2  # one ahead
    num_rows = (len(tokens) - 1) // 16
    stream.rows(0, num_rows + 1)
    assert stream.num_rows == num_rows
    for epoch in range(2):
        batch = stream.rows(epoch * num_rows, num_rows)
        for shard in range(0, num_rows, 10):
            got = torch.cat([batch["input_ids"], batch["shift_labels"][:, -1:]], dim=1)[shard : shard + 10]
            expected = [tokens[r * 16 : r * 16 + 17].tolist() for r in range(shard, min(shard + 10, num_rows))]
            assert sorted(got.tolist()) == sorted(expected)
    assert not torch.equal(stream.rows(0, num_rows)["input_ids"], batch["input_ids"])
    files = stream.external_files()
    assert len(files) == len(stream.found)
    for path, record in files.items():
        stored = Path(path).read_bytes()
        assert record == {"size": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}


@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_stopped_after_some_shards_a_stream_goes_on_without_loss(num_shards, tmp_path, monkeypatch):
    uninterrupted, *_ = open_stream()
    expected = uninterrupted.rows(0, 300)["input_ids"]
    manifest = uninterrupted.found
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "other"))
    stopped, *_ = open_stream()
    while len(stopped.found) < num_shards:
        stopped.write_shard()
    # As a kill between the two files leaves it, and in the middle of one.
    (stopped.folder / f"shard-{num_shards:05d}.bin").write_bytes(b"half")
    (stopped.folder / f"shard-{num_shards:05d}.bin.1.unfinished").write_bytes(b"ha")
    resumed, *_ = open_stream()
    assert len(resumed.found) == num_shards
    assert torch.equal(resumed.rows(40, 260)["input_ids"], expected[40:])
    assert torch.equal(resumed.rows(0, 300)["input_ids"], expected)
    assert resumed.found == manifest
    again, *_ = open_stream()
    assert again.num_rows == resumed.num_rows and torch.equal(again.rows(7, 9)["input_ids"], expected[7:16])


def test_a_damaged_shard_is_written_again():
    stream, *_ = open_stream()
    expected, manifest = stream.rows(0, 300)["input_ids"], stream.found
    (stream.folder / "shard-00003.bin").write_bytes(b"short")
    (stream.folder / "shard-00006.json").write_text("{")
    repaired, *_ = open_stream()
    assert len(repaired.found) == 3
    assert torch.equal(repaired.rows(0, 300)["input_ids"], expected) and repaired.found == manifest


def test_other_processes_wait_for_the_writer(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    reader, *_ = open_stream(timeout=20)
    impatient, *_ = open_stream(timeout=0.2)
    with pytest.raises(TimeoutError, match=r"shard-00000\.bin did not appear in 0 s"):
        impatient.rows(0, 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    writer, *_ = open_stream()
    read = {}
    waiting = threading.Thread(target=lambda: read.update(reader.rows(5, 10)))
    waiting.start()
    expected = writer.rows(0, 5)  # the reader's rows reach into the next shard, which the writer keeps ready
    waiting.join(timeout=20)
    assert torch.equal(read["input_ids"], writer.rows(5, 10)["input_ids"]) and len(expected["input_ids"]) == 5


@pytest.mark.parametrize("surplus", [-1, 0, 1, 16])
def test_a_stream_may_end_at_any_place_in_a_shard(surplus):
    """Two full shards of ten rows are 321 tokens."""
    target = 2 * 10 * 16 + 1 + surplus
    dataset = datasets.Dataset.from_dict({"text": ["held out", "x" * (target - 1)]}).to_iterable_dataset()
    corpus = stream_corpus(dataset, source=f"{target}", num_held_out=1)
    tokenizer = open_stream()[2]
    stream = StreamedTokens(corpus, tokenizer, 16, 0, rows_per_shard=10)
    stream.rows(0, 60)
    assert stream.num_rows == (target - 1) // 16
    assert [s["num_rows"] for s in stream.found] == {-1: [10, 9], 0: [10, 10], 1: [10, 10], 16: [10, 10, 1]}[surplus]


def test_a_stream_shorter_than_the_context_or_without_a_tokenizer_is_refused():
    stream, corpus, _ = open_stream(num_documents=6, context_length=500)
    with pytest.raises(
        ValueError, match=r"a row of 500 tokens \(context_length or row_length\) needs 501, but the stream 'numbers'"
    ):
        stream.rows(0, 1)
    nothing = datasets.Dataset.from_dict({"text": LINES}).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="nothing: the stream has no documents"):
        stream_corpus(nothing, source="nothing")
    with pytest.raises(ValueError, match="would read the whole stream; name an existing one, like 'gpt2'"):
        make_tokenizer("bpe", corpus, context_length=8)
    for kind in ("bpe", "wordpiece"):  # GPT-2's has no [MASK]
        with pytest.raises(ValueError, match="name an existing one, like 'google-bert/bert-base-uncased'"):
            make_tokenizer(kind, corpus, context_length=8, masked=kind == "bpe")


def test_only_the_validation_split_of_a_stream_is_tokenised_whole():
    _, corpus, tokenizer = open_stream()
    cache = tokenize_documents(corpus, tokenizer)
    assert list(cache.meta["splits"]) == ["validation"]
    assert len(cache.tokens("validation")) == sum(len(line) + 1 for line in LINES[:5])
