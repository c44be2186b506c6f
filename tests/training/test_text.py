import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline
from transformers.masking_utils import create_causal_mask

from training import documents, text
from training.documents import read_documents, stream_corpus
from training.text import (
    StreamedTokens,
    TokenCache,
    TokenRows,
    encode_documents,
    evaluation_rows,
    make_tokenizer,
    separator_id,
    tokenize_documents,
)

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("HF_MODELS_TEST_DATA", "not given"))
SHAKESPEARE = REAL_DATA / "tinyshakespeare" / "input.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tinyshakespeare")

STORY = "First line.\r\nSecond  line,\twith  spaces \n\n\n  and an odd é, 漢字, 🙂 and <|endoftext|> spelt out.\n" * 30
LINES = [f"Document {n} says {n * n}, and no more than that." for n in range(200)]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Tokens go to a folder of the test, never to the user's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "hf_home" / "hf_models" / "tokens"


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def write_text(path, content=STORY):
    path.write_bytes(content.encode())
    return str(path)


# documents


def test_embedded_text_is_real_and_the_same_every_time():
    corpus = read_documents("embedded")
    train, validation = list(corpus.train), list(corpus.validation)
    assert corpus.num_documents == len(train) + len(validation) > 300
    assert 0.05 <= len(validation) / corpus.num_documents <= 0.10 + 1 / corpus.num_documents
    assert 1_000_000 < corpus.num_bytes == sum(len(t.encode()) for t in train + validation)
    assert any("Read and write ZIP files" in t for t in train + validation)
    assert not set(train) & set(validation)
    assert corpus.license == "PSF-2.0" and "CPython" in corpus.source
    documents._embedded_documents.cache_clear()
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


# tokenizers


@pytest.fixture
def story(tmp_path):
    return read_documents(write_text(tmp_path / "story.txt"))


@pytest.fixture
def lines(tmp_path):
    return read_documents(write_jsonl(tmp_path / "lines.jsonl", LINES))


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_text_survives_a_tokenizer_and_a_tokenizer_survives_saving(tmp_path, story, kind):
    tokenizer = make_tokenizer(kind, story, vocab_size=400, context_length=64)
    ids = tokenizer.encode(STORY)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.decode(ids) == loaded.decode(ids) == STORY
    assert loaded.encode(STORY) == ids and loaded.model_max_length == 64
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert {loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id, loaded.unk_token_id} == {end}
    assert text.tokenizer_fingerprint(loaded) == text.tokenizer_fingerprint(tokenizer)
    if kind == "char":
        assert len(tokenizer) == len(set(STORY)) + 1 and tokenizer.encode("ß") == [end]
    else:
        assert 256 < len(tokenizer) <= 400 and tokenizer.decode(tokenizer.encode("ß 𝒳")) == "ß 𝒳"


def test_the_same_text_gives_the_same_vocabulary(lines, tmp_path):
    program = textwrap.dedent("""
        import sys
        from training.documents import read_documents
        from training.text import make_tokenizer
        corpus = read_documents(sys.argv[1])
        sys.stdout.write(make_tokenizer("bpe", corpus, 600, context_length=8).backend_tokenizer.to_str())
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "lines.jsonl")]
    here = make_tokenizer("bpe", lines, 600, context_length=8).backend_tokenizer.to_str()
    assert subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout == here


def test_a_tokenizer_serves_the_text_generation_pipeline(story):
    tokenizer = make_tokenizer("char", story, context_length=64)
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=8, n_positions=64)
    generate = pipeline("text-generation", model=GPT2LMHeadModel(config), tokenizer=tokenizer)
    generated = generate("First  line.\n", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert generated.startswith("First  line.\n")


def test_unusable_tokenizers_are_refused(story, tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be above 256"):
        make_tokenizer("bpe", story, vocab_size=256, context_length=8)
    with pytest.raises(ValueError, match="neither 'char', 'bpe' nor one that loads"):
        make_tokenizer(str(tmp_path / "nowhere"), story, context_length=8)


def test_long_documents_are_cut_into_pieces_without_changing_a_token(story):
    tokenizer = make_tokenizer("bpe", story, vocab_size=500, context_length=64)
    whole = tokenizer.backend_tokenizer
    whole.encode_special_tokens = True
    for content in (STORY * 5, "".join(random.Random(0).choices("ab1_. \n\r\t'sé", k=30_000))):
        pieces = list(text._pieces(content, size=50))
        assert "".join(pieces) == content and len(pieces) > 100
        assert [i for piece in pieces for i in whole.encode(piece).ids] == whole.encode(content).ids


# token cache


def test_one_document_is_stored_as_it_is_and_several_are_ended(story, lines):
    tokenizer = make_tokenizer("char", story, context_length=64)
    cache = tokenize_documents(story, tokenizer)
    tokens = cache.tokens("train")
    assert tokens.dtype == np.uint16 and tokenizer.decode(tokens) == next(iter(story.train))
    # "<|endoftext|>" in the text itself is 13 characters, not the border of a document.
    assert separator_id(tokenizer) not in tokens
    assert cache.num_bytes("validation") == len(next(iter(story.validation)).encode())

    tokenizer = make_tokenizer("bpe", lines, 500, context_length=64)
    cache = tokenize_documents(lines, tokenizer)
    decoded = tokenizer.decode(cache.tokens("train"))
    assert decoded == "".join(f"{line}<|endoftext|>" for line in lines.train)
    assert cache.meta["splits"]["train"]["num_documents"] == 180
    stored = (cache.folder / "train.bin").read_bytes()
    assert hashlib.sha256(stored).hexdigest() == cache.meta["splits"]["train"]["sha256"]


def test_a_big_vocabulary_takes_32_bits(lines, monkeypatch):
    tokenizer = make_tokenizer("char", lines, context_length=64)
    tokenizer.add_tokens([f"[{n}]" for n in range(2**16)])
    cache = tokenize_documents(lines, tokenizer)
    assert cache.tokens("train").dtype == np.uint32
    assert tokenizer.decode(cache.tokens("train")[:20]) == next(iter(lines.train))[:20]


def test_the_cache_is_used_again_and_a_damaged_one_rebuilt(lines, cache_folder, monkeypatch):
    tokenizer = make_tokenizer("char", lines, context_length=64)
    cache = tokenize_documents(lines, tokenizer)
    expected = cache.tokens("train").copy()
    assert cache.folder.parent == cache_folder
    with monkeypatch.context() as patch:
        patch.setattr(text, "encode_documents", None)  # would fail if it were called
        assert np.array_equal(tokenize_documents(lines, tokenizer).tokens("train"), expected)
    with open(cache.folder / "train.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"train\.bin is damaged"):
        TokenCache(cache.folder)
    assert np.array_equal(tokenize_documents(lines, tokenizer).tokens("train"), expected)
    other = make_tokenizer("bpe", lines, 300, context_length=64)
    assert tokenize_documents(lines, other).folder != cache.folder


def test_a_tokenizer_that_puts_a_space_before_every_text_gets_long_documents_whole():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("w", -2.0), ("\u2581w", -2.5)], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")
    text = "w " * 5000
    [encoded] = encode_documents(tokenizer, [text])
    assert encoded[:-1].tolist() == backend.encode(text, add_special_tokens=False).ids


KILLED = """
import sys, time
import huggingface_hub.constants
huggingface_hub.constants.HF_HOME = sys.argv[2]
from training import documents, text
real = text._write_tokens
def slow(path, *rest):
    real(path, *rest)
    print("written", flush=True)
    time.sleep(600)
text._write_tokens = slow
corpus = documents.read_documents(sys.argv[1])
text.tokenize_documents(corpus, text.make_tokenizer("char", corpus, context_length=64))
"""


def test_killed_while_writing_the_cache_the_next_process_takes_over(lines, tmp_path, cache_folder):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "lines.jsonl"), str(tmp_path / "hf_home")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout.readline() == b"written\n"
        assert not list(cache_folder.glob("*/meta.json"))
        process.send_signal(signal.SIGKILL)
    tokenizer = make_tokenizer("char", lines, context_length=64)
    cache = tokenize_documents(lines, tokenizer)
    assert sum(len(line) + 1 for line in lines.train) == len(cache.tokens("train"))
    assert not list(cache_folder.glob("*.unfinished"))


# rows


def test_an_epoch_covers_every_row_once_and_labels_are_the_next_tokens():
    rows = TokenRows(np.arange(1003, dtype=np.uint16), context_length=10, seed=3)
    assert rows.num_rows == 99
    for epoch in range(3):
        batch = rows.rows(epoch * 99, 99)
        assert batch["input_ids"].shape == batch["shift_labels"].shape == (99, 10)
        assert batch["input_ids"].dtype == batch["shift_labels"].dtype == torch.int64
        assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)
        starts = batch["input_ids"][:, 0].sort().values
        assert torch.equal(starts, starts[0] + 10 * torch.arange(99)) and 0 <= starts[0] < 10


def test_epochs_differ_in_order_and_offset_and_seeds_too():
    tokens = np.arange(1003, dtype=np.uint16)
    rows, other = (TokenRows(tokens, context_length=10, seed=seed) for seed in (0, 1))
    first_tokens = [rows.rows(epoch * 99, 99)["input_ids"][:, 0] for epoch in range(20)]
    assert len({int(starts.min()) for starts in first_tokens}) > 5
    assert len({tuple((starts // 10).tolist()) for starts in first_tokens}) == 20
    assert not torch.equal(other.rows(0, 99)["input_ids"], rows.rows(0, 99)["input_ids"])


@pytest.mark.parametrize("kept_apart", [False, True])
def test_rows_depend_on_their_number_only(kept_apart):
    """Whatever was asked before (resuming), and however a batch is divided (processes, micro-batches)."""
    tokens = np.random.default_rng(0).integers(0, 5, 500).astype(np.uint16)
    separator = 4 if kept_apart else None
    whole = TokenRows(tokens, 16, 0, separator).rows(0, 120)
    for first, count in [(0, 4), (100, 20), (28, 4), (31, 1), (60, 3)]:
        part = TokenRows(tokens, 16, 0, separator).rows(first, count)
        for name, value in part.items():
            assert torch.equal(value, whole[name][first : first + count])


def test_kept_within_documents_nothing_crosses_a_border():
    end = 9
    tokens = np.array([1, 2, end, 3, end, end, 4, 5, 6, end, 7], dtype=np.uint16)
    batch = TokenRows(tokens, context_length=10, seed=0, separator_id=end).rows(0, 1)
    assert batch["input_ids"].tolist() == [[1, 2, end, 3, end, end, 4, 5, 6, end]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3]]
    assert batch["shift_labels"].tolist() == [[2, end, -100, end, -100, -100, 5, 6, end, -100]]
    document = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    mask = create_causal_mask(
        config=GPT2Config(attn_implementation="sdpa"),
        inputs_embeds=torch.zeros(1, 10, 4),
        attention_mask=None,
        past_key_values=None,
        position_ids=batch["position_ids"],
    )
    assert torch.equal(mask[0, 0], (document[:, None] == document[None, :]).tril())


@pytest.mark.parametrize("num_tokens", [11, 12, 20, 21, 30])
def test_short_texts_have_rows_as_long_as_one_fits(num_tokens):
    rows = TokenRows(np.arange(num_tokens, dtype=np.uint16), context_length=10, seed=0)
    assert rows.num_rows == max(1, (num_tokens - 10) // 10)
    assert rows.rows(0, 50)["shift_labels"].shape == (50, 10)


def test_a_context_longer_than_the_text_is_refused():
    with pytest.raises(ValueError, match="context_length 10 needs 11 tokens, but the training text has 10"):
        TokenRows(np.arange(10, dtype=np.uint16), context_length=10, seed=0)


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 41, 100])
def test_evaluation_predicts_every_token_but_the_first_once(num_tokens):
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint16)
    predicted, seen = [], []
    for batch in evaluation_rows(tokens, context_length=8, batch_size=2):
        assert batch["input_ids"].shape[1] == 8 and len(batch["input_ids"]) <= 2
        scored = batch["shift_labels"] != -100
        predicted += batch["shift_labels"][scored].tolist()
        seen += batch["input_ids"][scored].tolist()
    assert predicted == tokens[1:].tolist() and seen == tokens[:-1].tolist()


def test_evaluation_of_a_single_token_is_refused():
    with pytest.raises(ValueError, match="predicting needs 2"):
        next(evaluation_rows(np.arange(1), 8, 2))


def test_a_batch_takes_well_under_a_millisecond(tmp_path):
    np.arange(10**6, dtype=np.uint16).tofile(tmp_path / "train.bin")
    rows = TokenRows(np.memmap(tmp_path / "train.bin", np.uint16, mode="r"), context_length=64, seed=0)
    rows.rows(0, 12)
    seconds = []
    for step in range(200):
        begin = time.perf_counter()
        rows.rows(step * 12, 12)
        seconds.append(time.perf_counter() - begin)
    assert np.median(seconds) < 1e-3


# streaming


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
    return np.concatenate(list(text.encode_documents(tokenizer, corpus.train)))


def test_a_stream_gives_every_row_once_in_shards_of_arrival():
    stream, corpus, tokenizer = open_stream()
    tokens = whole_stream(corpus, tokenizer)
    assert list(corpus.validation) == LINES[:5] and next(iter(corpus.train)) == LINES[5]
    assert stream.num_rows is None
    stream.rows(0, 10)
    assert len(stream.shards()) == 2  # one ahead
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
    for name, entry in stream.shards().items():
        stored = (stream.folder / name).read_bytes()
        assert entry == {"size": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}


@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_stopped_after_some_shards_a_stream_goes_on_without_loss(num_shards, tmp_path, monkeypatch):
    uninterrupted, *_ = open_stream()
    expected = uninterrupted.rows(0, 300)["input_ids"]
    manifest = uninterrupted.shards()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "other"))
    stopped, *_ = open_stream()
    while len(stopped.shards()) < num_shards:
        stopped._write_shard()
    # As a kill between the two files leaves it, and in the middle of one.
    (stopped.folder / f"shard-{num_shards:05d}.bin").write_bytes(b"half")
    (stopped.folder / f"shard-{num_shards:05d}.bin.1.unfinished").write_bytes(b"ha")
    resumed, *_ = open_stream()
    assert len(resumed.shards()) == num_shards
    assert torch.equal(resumed.rows(40, 260)["input_ids"], expected[40:])
    assert torch.equal(resumed.rows(0, 300)["input_ids"], expected)
    assert resumed.shards() == manifest
    again, *_ = open_stream()
    assert again.num_rows == resumed.num_rows and torch.equal(again.rows(7, 9)["input_ids"], expected[7:16])


def test_a_damaged_shard_is_written_again():
    stream, *_ = open_stream()
    expected, manifest = stream.rows(0, 300)["input_ids"], stream.shards()
    (stream.folder / "shard-00003.bin").write_bytes(b"short")
    (stream.folder / "shard-00006.json").write_text("{")
    repaired, *_ = open_stream()
    assert len(repaired.shards()) == 3
    assert torch.equal(repaired.rows(0, 300)["input_ids"], expected) and repaired.shards() == manifest


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
    assert [s["num_rows"] for s in stream._found] == {-1: [10, 9], 0: [10, 10], 1: [10, 10], 16: [10, 10, 1]}[surplus]


def test_a_stream_shorter_than_the_context_or_without_a_tokenizer_is_refused():
    stream, corpus, _ = open_stream(num_documents=6, context_length=500)
    with pytest.raises(ValueError, match="context_length 500 needs 501 tokens, but the stream 'numbers' has"):
        stream.rows(0, 1)
    nothing = datasets.Dataset.from_dict({"text": LINES}).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="nothing: the stream has no documents"):
        stream_corpus(nothing, source="nothing")
    with pytest.raises(ValueError, match="would read the whole stream"):
        make_tokenizer("bpe", corpus, context_length=8)


def test_only_the_validation_split_of_a_stream_is_tokenised_whole():
    _, corpus, tokenizer = open_stream()
    cache = tokenize_documents(corpus, tokenizer)
    assert list(cache.meta["splits"]) == ["validation"]
    assert len(cache.tokens("validation")) == sum(len(line) + 1 for line in LINES[:5])
