from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.masking_utils import find_packed_sequence_indices

from tests.training.corpora import LINES, write_jsonl
from training.data import documents
from training.data.documents import read_documents, stream_corpus
from training.text.masking import MIN_PAIR, MaskedRows, masked_evaluation_rows, sentence_ends
from training.text.stream import StreamedTokens
from training.text.tokenizer import BERT_TOKENS, encode_documents, make_tokenizer

PAD, UNK, CLS, SEP, MASK = range(5)
FULL_STOP, FIRST_PIECE = 5, 6  # [6, 10) are "##..." pieces of words
FIRST, LAST = 10, 60_000  # every other id is a word


@pytest.fixture(scope="module")
def tokenizer():
    """A vocabulary so large that every token of a test's text can be another one."""
    names = [*BERT_TOKENS.values(), ".", *(f"##{n}" for n in range(4)), *(f"w{n}" for n in range(FIRST, LAST))]
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **BERT_TOKENS)


def numbered(*lengths):
    """Documents of so many tokens, each token another one."""
    ends = np.cumsum(lengths)
    split = np.split(np.arange(FIRST, FIRST + ends[-1]), ends[:-1])
    return np.concatenate([np.append(document, SEP) for document in split]).astype(np.uint16)


VARIED = np.random.default_rng(0).geometric(1 / 150, 300)
TEXT = numbered(*VARIED)


def with_sentences(tokens, every=7):
    """The same text with a full stop at every seventh token."""
    tokens = tokens.copy()
    tokens[every - 1 :: every] = np.where(tokens[every - 1 :: every] == SEP, SEP, FULL_STOP)
    return tokens


def epoch(rows, number=0):
    return rows.rows(number * rows.num_rows, rows.num_rows)


def unmasked(batch):
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def sequences(batch):
    """Every sequence of a batch as a list of its token ids before masking, the padding left out."""
    for ids, positions in zip(unmasked(batch), batch["position_ids"], strict=True):
        begins = [*torch.where(positions == 0)[0].tolist(), len(ids)]
        for begin, end in pairwise(begins):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if ids[begin] != PAD:
                yield ids[begin:end].tolist()


def words_of(ids):
    return [token for token in ids if token > MASK]


# packing


@pytest.mark.parametrize("row_length", [16, 64, 128])
@pytest.mark.parametrize("lengths", [VARIED, [20_000], [1] * 500, [3, 1, 4, 1, 5], [1]])
def test_an_epoch_uses_every_token_once(tokenizer, row_length, lengths):
    text = numbered(*lengths)
    rows = MaskedRows(text, tokenizer, row_length, 0, next_sentence=False)
    for number in range(3):
        seen = words_of(unmasked(epoch(rows, number)).flatten().tolist())
        assert sorted(seen) == sorted(text[text != SEP])


def test_a_text_of_one_document_needs_no_separator(tokenizer):
    text = numbered(1000)[:-1]
    rows = MaskedRows(text, tokenizer, 64, 0, next_sentence=False)
    assert sorted(words_of(unmasked(epoch(rows)).flatten().tolist())) == text.tolist()


@pytest.mark.parametrize("next_sentence", [False, True])
def test_less_than_two_hundredths_of_the_places_are_padding(tokenizer, next_sentence):
    rows = MaskedRows(TEXT, tokenizer, 128, 0, next_sentence=next_sentence)
    for number in range(3):
        assert (epoch(rows, number)["input_ids"] != PAD).float().mean() > 0.98


@pytest.mark.parametrize("next_sentence", [False, True])
@pytest.mark.parametrize("lengths", [[4] * 3000, [MIN_PAIR - 1] * 2000, VARIED // 30 + 1], ids=["4", "7", "varied"])
def test_short_documents_fill_the_rows_almost_as_well(tokenizer, lengths, next_sentence):
    rows = MaskedRows(numbered(*lengths), tokenizer, 128, 0, next_sentence=next_sentence)
    for number in range(3):
        assert (epoch(rows, number)["input_ids"] != PAD).float().mean() > 0.97


@pytest.mark.parametrize("row_length", [16, 37])
def test_no_row_is_empty_however_short_the_documents(tokenizer, row_length):
    for lengths in (VARIED // 30 + 1, [MIN_PAIR - 1] * 60, [1] * 100 + [2], [MIN_PAIR] * 60, [1] * 60):
        rows = MaskedRows(numbered(*lengths), tokenizer, row_length, 0, next_sentence=True, short_probability=1.0)
        for number in range(10):
            assert (epoch(rows, number)["labels"] != -100).any(1).all()


@pytest.mark.parametrize("row_length", [16, 100])
def test_a_sequence_is_a_part_of_one_document_between_special_tokens(tokenizer, row_length):
    documents = np.split(TEXT, np.flatnonzero(TEXT == SEP) + 1)
    document_of = {token: n for n, document in enumerate(documents) for token in document[:-1].tolist()}
    for ids in sequences(epoch(MaskedRows(TEXT, tokenizer, row_length, 0, next_sentence=False))):
        assert ids[0] == CLS and ids[-1] == SEP and len(ids) > 2
        assert all(b == a + 1 for a, b in pairwise(ids[1:-1]))
        assert len({document_of[token] for token in ids[1:-1]}) == 1


@pytest.mark.parametrize("next_sentence", [False, True])
def test_position_ids_keep_sequences_and_padding_apart(tokenizer, next_sentence):
    batch = epoch(MaskedRows(numbered(5, 30, 9, 9, 2), tokenizer, 32, 0, next_sentence=next_sentence))
    is_padding = batch["input_ids"] == PAD
    assert is_padding.any()
    begins = (batch["input_ids"] == CLS) | (is_padding & ~is_padding.roll(1, dims=1))
    expected = begins.long().cumsum(dim=1) - 1
    assert torch.equal(find_packed_sequence_indices(batch["position_ids"]).long(), expected)
    assert (batch["labels"][is_padding] == -100).all()


def test_rows_are_cut_elsewhere_in_every_epoch_even_in_one_long_document(tokenizer):
    rows = MaskedRows(numbered(5000), tokenizer, 64, 0, next_sentence=False, short_probability=0)
    begins = [{ids[1] for ids in sequences(epoch(rows, number))} for number in range(3)]
    assert not set.intersection(*begins) - {FIRST}


def test_there_is_a_cut_unless_no_document_has_two_tokens(tokenizer):
    for lengths, num_cuts in (([1] * 50, 0), ([1] * 50 + [2], 1), ([5000], 1)):
        rows = MaskedRows(numbered(*lengths), tokenizer, 64, 0, next_sentence=False, short_probability=0)
        assert rows.num_cuts == num_cuts


def test_a_part_of_the_rows_is_cut_into_shorter_sequences(tokenizer):
    def num_sequences(probability):
        rows = MaskedRows(numbered(50_000), tokenizer, 128, 0, next_sentence=False, short_probability=probability)
        return len(list(sequences(epoch(rows))))

    assert num_sequences(0.1) == pytest.approx(1.1 * num_sequences(0), rel=0.01)


@pytest.mark.parametrize("next_sentence", [False, True])
@pytest.mark.parametrize("whole_words", [False, True])
def test_rows_depend_on_the_seed_and_their_number_only(tokenizer, next_sentence, whole_words):
    options = {"next_sentence": next_sentence, "whole_words": whole_words}
    text = numbered(*VARIED[:20])
    whole = MaskedRows(text, tokenizer, 64, 3, **options).rows(0, 150)
    for first, count in [(140, 10), (0, 4), (28, 4), (31, 1), (60, 80)]:
        part = MaskedRows(text, tokenizer, 64, 3, **options).rows(first, count)
        assert part.keys() == whole.keys()
        for name, value in part.items():
            assert value.dtype == torch.int64 and torch.equal(value, whole[name][first : first + count]), name
    for seed in (4, (3, 1)):
        other = MaskedRows(text, tokenizer, 64, seed, **options).rows(0, 150)
        assert not torch.equal(unmasked(other), unmasked(whole))


# masks


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_the_given_part_of_the_tokens_is_scored_in_every_row(tokenizer, probability):
    rows = MaskedRows(TEXT, tokenizer, 128, 0, next_sentence=False, mask_probability=probability)
    batch = epoch(rows)
    num_tokens = (unmasked(batch) > MASK).sum(1)
    scored = batch["labels"] != -100
    assert torch.equal(scored.sum(1), (probability * num_tokens + 0.5).floor().long())
    assert (batch["labels"][scored] > MASK).all()
    assert batch["masked_positions"].shape == (rows.num_rows, round(probability * 126))
    for positions, row in zip(batch["masked_positions"], scored, strict=True):
        expected = torch.where(row)[0].tolist()
        assert positions.tolist() == expected + [-1] * (len(positions) - len(expected))


def test_a_row_with_one_token_has_it_scored(tokenizer):
    batch = MaskedRows(numbered(1), tokenizer, 16, 0, next_sentence=False).rows(0, 4)
    assert (batch["labels"] != -100).sum(1).tolist() == [1] * 4
    assert batch["masked_positions"].tolist() == [[1, -1]] * 4


def test_scored_tokens_are_hidden_by_a_mask_a_random_token_or_not_at_all(tokenizer):
    batch = epoch(MaskedRows(TEXT, tokenizer, 128, 0, next_sentence=False))
    scored = batch["labels"] != -100
    shown, labels = batch["input_ids"][scored], batch["labels"][scored]
    parts = [(shown == MASK), (shown == labels), (shown != MASK) & (shown != labels)]
    assert [p.float().mean().item() for p in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.015)
    random = shown[parts[2]]
    assert (random > MASK).all() and random.min() < LAST / 10 and random.max() > LAST * 9 / 10
    assert torch.equal(batch["input_ids"][~scored], unmasked(batch)[~scored])


def test_masks_are_fresh_in_every_epoch(tokenizer):
    text = numbered(*[14] * 200)  # a document a row
    rows = MaskedRows(text, tokenizer, 16, 0, next_sentence=False)
    times_scored = np.zeros(LAST)
    for number in range(20):
        labels = epoch(rows, number)["labels"]
        times_scored[labels[labels != -100]] += 1
    counts = times_scored[FIRST : FIRST + 2800]
    assert counts.max() < 12 and (counts == 0).mean() < 0.1


def test_whole_words_are_scored_whole_or_not_at_all(tokenizer):
    text, random = TEXT.copy(), np.random.default_rng(1)
    pieces = (random.random(len(text)) < 0.3) & (text != SEP)
    text[pieces] = random.integers(FIRST_PIECE, FIRST, pieces.sum())
    batch = epoch(MaskedRows(text, tokenizer, 128, 0, next_sentence=True, whole_words=True))
    ids, scored = unmasked(batch), batch["labels"] != -100
    later_piece = (ids[:, 1:] >= FIRST_PIECE) & (ids[:, 1:] < FIRST) & (ids[:, :-1] > MASK)
    assert later_piece.float().mean() > 0.2
    assert torch.equal(scored[:, 1:][later_piece], scored[:, :-1][later_piece])
    budget = (0.15 * (ids > MASK).sum(1) + 0.5).floor()
    assert (scored.sum(1) <= budget).all() and scored.sum() > 0.99 * budget.sum()


def test_a_word_longer_than_all_that_is_scored_is_scored_in_part(tokenizer):
    text = np.array([FIRST] + [FIRST_PIECE] * 50, np.uint16)
    [batch] = masked_evaluation_rows(text, tokenizer, 64, 1, next_sentence=False, whole_words=True)
    assert (batch["labels"] != -100).sum() == 8


def test_whole_words_of_bytes_go_from_space_to_space(tmp_path):
    lines = [f"Naïveté said {n * 7919} walkers in the café" for n in range(99)]
    corpus = read_documents(write_jsonl(tmp_path / "a.jsonl", lines))
    tokenizer = make_tokenizer("bpe", corpus, 290, context_length=64, masked=True)
    text = np.concatenate(list(encode_documents(tokenizer, corpus.train)))
    batch = epoch(MaskedRows(text, tokenizer, 64, 0, next_sentence=False, whole_words=True))
    ids, scored = unmasked(batch), batch["labels"] != -100
    begins_word = torch.tensor(
        [token.startswith("Ġ") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    )
    later_piece = ~begins_word[ids[:, 1:]] & (ids[:, 1:] > MASK) & (ids[:, :-1] > MASK)
    assert later_piece.float().mean() > 0.2
    assert torch.equal(scored[:, 1:][later_piece], scored[:, :-1][later_piece])


def test_special_tokens_are_never_scored(tokenizer):
    text = np.full(500, UNK, np.uint16)
    batch = MaskedRows(text, tokenizer, 32, 0, next_sentence=True).rows(0, 8)
    assert (batch["labels"] == -100).all() and (batch["masked_positions"] == -1).all()
    assert not (batch["input_ids"] == MASK).any()


# pairs


def pairs(batch):
    """(label, A, B) of every pair."""
    ids = unmasked(batch)
    for row in range(len(ids)):
        for place, label in zip(batch["sequence_positions"][row], batch["next_sentence_label"][row], strict=True):
            assert (place == -1) == (label == -100)
            if label != -100:
                first, second = np.flatnonzero(ids[row, place:] == SEP)[:2] + int(place)
                assert ids[row, place] == CLS
                types = batch["token_type_ids"][row, place : second + 1].tolist()
                assert types == [0] * (first + 1 - int(place)) + [1] * (second - first)
                yield int(label), ids[row, place + 1 : first].tolist(), ids[row, first + 1 : second].tolist()


def test_half_of_the_second_sentences_come_from_another_document(tokenizer):
    document_of = dict(zip(TEXT.tolist(), np.cumsum(TEXT == SEP).tolist(), strict=True))
    batch = epoch(MaskedRows(TEXT, tokenizer, 128, 0, next_sentence=True))
    labels, found = [], list(pairs(batch))
    for label, first, second in found:
        assert first and second and all(b == a + 1 for half in (first, second) for a, b in pairwise(half))
        assert len({document_of[token] for token in second}) == 1
        if label == 0:
            assert second[0] == first[-1] + 1
        else:
            assert document_of[first[0]] != document_of[second[0]]
        labels.append(label)
    assert np.mean(labels) == pytest.approx(0.5, abs=0.05)
    assert len({document_of[second[0]] for label, _, second in found if label}) > 50


def test_pairs_are_parted_where_a_sentence_ends(tokenizer):
    text = with_sentences(TEXT)
    for label, first, second in pairs(epoch(MaskedRows(text, tokenizer, 128, 0, next_sentence=True))):
        if label == 0 and FULL_STOP in [*first, *second[:-1]]:
            assert first[-1] == FULL_STOP
        if label == 1 and FULL_STOP in first:
            assert first[-1] == FULL_STOP
            before = np.flatnonzero(text == next(t for t in second if t != FULL_STOP))[0] - 1
            before -= second[0] == FULL_STOP
            assert before < 0 or text[before] in (FULL_STOP, SEP)


def test_a_sentence_ends_with_a_full_stop_or_a_line_break(tmp_path):
    corpus = read_documents(write_jsonl(tmp_path / "a.jsonl", [f"Is {n} odd? No!\nYes." for n in range(99)]))
    tokenizer = make_tokenizer("bpe", corpus, 300, context_length=64, masked=True)
    ends = sentence_ends(tokenizer)[tokenizer("odd? No!\nYes.", add_special_tokens=False)["input_ids"]]
    assert ends.tolist().count(True) == 4 and ends[-1] and not ends[0]
    assert np.flatnonzero(sentence_ends(make_tokenizer("wordpiece", corpus, 60, context_length=64))).size


def test_the_place_of_the_border_varies(tokenizer):
    batch = epoch(MaskedRows(numbered(30_000), tokenizer, 112, 0, next_sentence=True))
    lengths = [len(first) for _, first, second in pairs(batch) if len(first) + len(second) == 109]
    assert len(lengths) > 100 and min(lengths) < 15 and max(lengths) > 95


@pytest.mark.parametrize("tokens_per_document", [1, MIN_PAIR - 1])
def test_documents_too_short_to_part_are_no_pairs(tokenizer, tokens_per_document):
    batch = epoch(MaskedRows(numbered(*[tokens_per_document] * 50), tokenizer, 32, 0, next_sentence=True))
    assert (batch["next_sentence_label"] == -100).all() and (batch["sequence_positions"] == -1).all()
    assert not batch["token_type_ids"].any()
    assert all(len(ids) <= tokens_per_document + 2 for ids in sequences(batch))
    assert (batch["labels"] != -100).any(1).all()


def test_of_one_document_the_random_second_sentence_is_far_away(tokenizer):
    batch = epoch(MaskedRows(numbered(20_000), tokenizer, 64, 0, next_sentence=True))
    found = list(pairs(batch))
    distances = [abs(second[0] - first[-1]) for label, first, second in found if label]
    assert len(distances) / len(found) == pytest.approx(0.5, abs=0.1)
    assert min(distances) > 20_000 / 8 - 64 and max(distances) > 10_000


def test_of_one_short_document_it_is_never_the_true_continuation(tokenizer):
    text = numbered(200)
    text[20] = FULL_STOP  # the only sentence begins behind it
    rows = MaskedRows(text, tokenizer, 16, 0, next_sentence=True)
    found = [(first, second) for label, first, second in pairs(rows.rows(0, 1500)) if label == 1]
    place = {token: n for n, token in enumerate(text.tolist())}
    assert len(found) > 500
    for first, second in found:
        assert abs(place[second[0]] - (place[first[-1]] + 1)) >= 200 / 8


def test_without_a_document_long_enough_the_second_sentence_stays(tokenizer):
    for lengths in ([40], [40, 1]):
        rows = MaskedRows(numbered(*lengths), tokenizer, 64, 0, next_sentence=True)
        for label, first, second in pairs(rows.rows(0, 50)):
            follows = second[0] == first[-1] + 1
            assert follows if label == 0 else not follows and len(second) <= 40 / 8


# both


@pytest.mark.parametrize("next_sentence", [False, True])
def test_all_batches_of_a_run_have_the_same_shapes(tokenizer, next_sentence):
    for lengths in (VARIED, [MIN_PAIR] * 100, [2]):
        rows = MaskedRows(numbered(*lengths), tokenizer, 64, 0, next_sentence=next_sentence)
        shapes = [{name: tensor.shape for name, tensor in rows.rows(first, 4).items()} for first in range(0, 80, 4)]
        assert all(other == shapes[0] for other in shapes)


@pytest.mark.parametrize("next_sentence", [False, True])
def test_evaluation_is_the_whole_text_in_order_with_the_same_masks(tokenizer, next_sentence):
    def batches():
        return list(masked_evaluation_rows(TEXT, tokenizer, 64, 10, next_sentence=next_sentence))

    one, other = batches(), batches()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)
    assert {len(batch["input_ids"]) for batch in one[:-1]} == {10}
    seen = [token for batch in one for ids in sequences(batch) for token in words_of(ids)]
    if next_sentence:
        kept = {token for batch in one for label, *halves in pairs(batch) for token in halves[0]}
        assert kept <= set(seen)
    else:
        assert seen == TEXT[TEXT != SEP].tolist()


@pytest.mark.parametrize("next_sentence", [False, True])
def test_a_stream_gives_masked_rows_shard_by_shard(next_sentence, tmp_path, monkeypatch):
    dataset = datasets.Dataset.from_dict({"text": LINES}).to_iterable_dataset()
    corpus = stream_corpus(dataset, source="numbers", num_held_out=5)
    whole = documents._split(documents.Documents.of(lambda: LINES), None, 0.1, "numbers")
    tokenizer = make_tokenizer("char", whole, context_length=64, masked=True)

    def open_stream():
        def rows_of(tokens, shard):
            return MaskedRows(tokens[:-1], tokenizer, 64, (0, shard), next_sentence=next_sentence)

        return StreamedTokens(corpus, tokenizer, 64, 0, rows_of=rows_of, rows_per_shard=16)

    stream = open_stream()
    stream.rows(0, 500)
    assert len(stream.found) > 5 and stream.num_rows < 300
    all_rows = stream.rows(0, 2 * stream.num_rows)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "other"))
    resumed = open_stream()
    for name, value in resumed.rows(40, 100).items():
        assert torch.equal(value, all_rows[name][40:140])
    if not next_sentence:
        text = np.concatenate(list(encode_documents(tokenizer, corpus.train)))
        text = text[: sum(shard["num_rows"] for shard in stream.found) * 64]
        for epoch in (0, 1):
            ids = unmasked(all_rows)[epoch * stream.num_rows : (epoch + 1) * stream.num_rows]
            assert sorted(words_of(ids.flatten().tolist())) == sorted(text[text != SEP])


def test_what_it_cannot_work_with_is_named(tokenizer):
    for text in (np.empty(0, np.uint16), np.array([SEP, SEP], np.uint16)):
        with pytest.raises(ValueError, match="the text has no tokens: give data"):
            MaskedRows(text, tokenizer, 64, 0, next_sentence=True)
    with pytest.raises(ValueError, match="row_length must be at least 16, not 8"):
        MaskedRows(TEXT, tokenizer, 8, 0, next_sentence=True)
    with pytest.raises(ValueError, match="mask_probability must lie between 0 and 1, not 15"):
        MaskedRows(TEXT, tokenizer, 64, 0, next_sentence=True, mask_probability=15)
    with pytest.raises(ValueError, match="short_probability must lie between 0 and 1, not -1"):
        MaskedRows(TEXT, tokenizer, 64, 0, next_sentence=True, short_probability=-1)
    unmasking = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", sep_token="[SEP]"
    )
    with pytest.raises(ValueError, match="has no cls_token, mask_token: masking needs them"):
        MaskedRows(TEXT, unmasking, 64, 0, next_sentence=True)


@pytest.mark.parametrize("next_sentence", [False, True])
def test_an_epoch_of_many_documents_has_a_row_for_most_of_its_tokens(tokenizer, next_sentence):
    """`tests/benchmarks/text_rows.py` says how long laying it out takes."""
    random = np.random.default_rng(0)
    text = random.integers(FIRST, LAST, 130_000).astype(np.uint16)
    text[random.integers(0, len(text), 600)] = SEP
    assert MaskedRows(text, tokenizer, 128, 0, next_sentence=next_sentence).num_rows > 1_000
