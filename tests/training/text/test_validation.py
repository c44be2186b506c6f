import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.training.corpora import write_jsonl
from training.data.documents import read_documents
from training.text.tokenizer import BERT_TOKENS, encode_documents, make_tokenizer, separator_id
from training.text.validation import guess_words, pseudo_perplexity

UNK, CLS, SEP, MASK, END, STOP = 1, 2, 3, 4, 5, 6
WORD = 7  # and above


def make(**more):
    names = [*BERT_TOKENS.values(), "<end>", ".", *(f"word{n}" for n in range(WORD, 300))]
    names = [name.translate(str.maketrans("0123456789", "abcdefghij")) for name in names]
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **BERT_TOKENS, **more)


class Recorder(torch.nn.Module):
    """Finds every token equally likely, and keeps the rows that it was asked about."""

    def __init__(self):
        super().__init__()
        self.scores, self.rows = torch.nn.Parameter(torch.zeros(300)), []

    def forward(self, input_ids, logits_to_keep):
        assert (input_ids.gather(1, logits_to_keep) == MASK).all()
        self.rows += [(row.tolist(), int(place)) for row, place in zip(input_ids, logits_to_keep[:, 0], strict=True)]
        return (self.scores.expand(len(input_ids), 1, -1),)


@pytest.mark.parametrize("more", [{}, {"eos_token": "<end>"}])
def test_each_token_is_masked_alone_in_its_document_and_unknown_ones_are_not_scored(more):
    tokenizer, model = make(**more), Recorder()
    end = separator_id(tokenizer)
    assert end == (END if more else SEP)
    tokens = np.array([10, 11, UNK, 12, end, 13, end, UNK, end, *range(20, 35), end], np.uint16)
    assert pseudo_perplexity(model, tokenizer, tokens, 12, 1000, 2) == pytest.approx(300)
    documents = [[10, 11, UNK, 12], [13], list(range(20, 30)), list(range(30, 35))]
    expected = []
    for document in documents:
        row = [CLS, *document, SEP]
        expected += [([*row[:n], MASK, *row[n + 1 :]], n) for n, token in enumerate(row) if token >= WORD]
    assert model.rows == expected and len(expected) == 3 + 1 + 15


def test_so_many_tokens_are_scored_as_were_asked_for():
    for num_tokens, scored in ((1, 1), (4, 4), (7, 7), (8, 8), (9, 8)):
        model = Recorder()
        pseudo_perplexity(model, make(), np.array([10, 11, 12, SEP, 13, 14, 15, 16, 17], np.uint16), 16, num_tokens, 3)
        assert len(model.rows) == scored


def test_the_mean_is_over_tokens_and_not_over_rows():
    model = Recorder()
    with torch.no_grad():
        model.scores[10] = 5
    total = math.log(299 + math.exp(5))
    found = pseudo_perplexity(model, make(), np.array([10, SEP, 11, 12, 13], np.uint16), 16, 100, 8)
    assert found == pytest.approx(math.exp((4 * total - 5) / 4), rel=1e-5)


@pytest.mark.parametrize("row_length", [16, 20, 26, 128])
def test_a_sentence_to_guess_in_fits_into_a_row_and_is_of_one_document(row_length):
    tokenizer, model = make(), Recorder()
    lengths = [*range(6, 30)] * 3
    sentences = [[WORD + (n + k) % 200 for k in range(length - 1)] + [STOP] for n, length in enumerate(lengths)]
    ends = [[SEP] * (n % 2) for n in range(len(lengths))]
    without_stop = [WORD + 201, *range(50, 54), SEP, WORD + 202, *range(60, 64), SEP]  # eleven, were they one
    tokens = np.array(sum((s + e for s, e in zip(sentences, ends, strict=True)), []) + without_stop, np.uint16)
    sample = guess_words(model, tokenizer, tokens, row_length, num_sentences=1000)
    assert len(sample.splitlines()) == 2 * len(model.rows) and "[MASK]" in sample
    found = {len(row) - 2 for row, _ in model.rows}
    assert found == set(range(8, min(24, row_length - 2) + 1))
    assert all(SEP not in row[1:-1] and row[-2] == STOP for row, _ in model.rows)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_what_is_to_be_guessed_is_a_word_and_not_a_piece_of_one(kind, tmp_path):
    lines = [f"They read the text and they read the text number {n}." for n in range(99)]
    lines.append("able to label all, a dual ball")
    corpus = read_documents(write_jsonl(tmp_path / "lines.jsonl", lines))
    tokenizer = make_tokenizer(kind, corpus, 300 if kind == "bpe" else 90, context_length=64, masked=True)
    assert tokenizer.tokenize(" readable")[0] in ("read", "Ġread") and len(tokenizer.tokenize(" read text")) == 2
    tokens = next(encode_documents(tokenizer, ["the readable textual and the readable text."]))
    model = Recorder()
    model.scores = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    masked, guesses = guess_words(model, tokenizer, tokens, 64).splitlines()
    assert masked.count("readable") == 2 and "textual" in masked and guesses.endswith("  (text)")


def test_a_text_without_sentences_has_no_guesses():
    assert guess_words(Recorder(), make(), np.array([10, 11, SEP], np.uint16), 16) == ""
