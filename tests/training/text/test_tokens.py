import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config
from transformers.masking_utils import create_causal_mask

from hf_models.base import CACHE_NAME
from training.text import tokens as text
from training.text.tokenizer import make_tokenizer, separator_id
from training.text.tokens import TokenCache, TokenRows, evaluation_rows, tokenize_documents

REPOSITORY = Path(__file__).parents[3]


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


KILLED = """
import sys, time
import huggingface_hub.constants
huggingface_hub.constants.HF_HOME = sys.argv[2]
from training.text import tokens as text
from training.data import documents
from training.text import tokenizer
real = text._write_tokens
def slow(path, *rest):
    real(path, *rest)
    print("written", flush=True)
    time.sleep(600)
text._write_tokens = slow
corpus = documents.read_documents(sys.argv[1])
text.tokenize_documents(corpus, tokenizer.make_tokenizer("char", corpus, context_length=64))
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
        position_ids=batch["position_ids"],
        **{CACHE_NAME: None},
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
