"""Rows for BERT: documents laid end to end without padding, some tokens hidden, and pairs of sentences to tell apart.

    rows = MaskedRows(cache.tokens("train"), tokenizer, row_length=128, seed=0, next_sentence=True)
    rows.rows(first=0, count=8)  # {"input_ids": (8, 128), "labels": (8, 128), "masked_positions": (8, 19), ...}

After Devlin et al. 2019, sections 3.1 and A.2, but packed: a row holds as many sequences as fit, each with position
ids from 0, and a model keeps attention within a sequence. Masks and pairs are drawn anew in every epoch.
Dimensions: B rows of a batch, T places of a row, M scored places of a row, S pairs of a row.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from training.run.seeds import generator
from training.text.tokenizer import missing_tokens, separator_id
from training.text.tokens import IGNORED_LABEL

MIN_PAIR = 8  # tokens; a shorter sequence is too short to be parted in two


class MaskedRows:
    """Rows of T places with masked tokens, each a pure function of the seed and its number over all epochs.

    tokens: (num_tokens,), documents ended by `separator_id(tokenizer)`, as a `TokenCache` has them.
    seed: one number, or several, as (seed, shard) for a shard of a stream.
    short_probability: as many cuts as that part of the rows fall at random places within documents, so that the model
        sees short sequences as well.
    mask_probability: that part of the tokens of each row is scored, rounded, but at least one; special tokens ([UNK]
        too) never. Of the scored ones 80 % become [MASK], 10 % a random token, 10 % stay.
    whole_words: score all pieces of a word or none: "##", or without word pieces letters and digits that follow each
        other. Where no word is short enough for the rest, a row has a few scored tokens less.
    next_sentence: a sequence of at least 8 tokens becomes [CLS] A [SEP] B [SEP], parted at the end of a sentence if it
        has one. With probability 1/2, B is replaced by as many tokens of another document that is long enough, from
        the beginning of a sentence if one is near; the tokens it replaces are left out of that epoch. A single document
        gives B itself, from an eighth of its length away or more, unless it has less than eight times as many tokens.
    shuffle: False leaves the documents and rows in order and without cuts, the same in every epoch.

    An epoch permutes the documents, lays them end to end, and cuts the whole into `num_rows` rows, which it permutes
    too. What falls into a row of one document is a sequence, [CLS] tokens [SEP]. So every token is used once, and the
    padding is the few places that special tokens leave over, and the end of the last row; it has position ids of its
    own, from 0, so that nothing attends to it. The epoch begins at one of the random cuts, so that the text is not
    cut at the same places every time; there is at least one, unless no document has two tokens.
    Raises ValueError for a tokenizer without the tokens this needs, an empty text, and an option out of its range.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        tokenizer: PreTrainedTokenizerFast,
        row_length: int,
        seed: int | Sequence[int],
        *,
        next_sentence: bool,
        mask_probability: float = 0.15,
        whole_words: bool = False,
        short_probability: float = 0.1,
        shuffle: bool = True,
    ):
        if row_length < 16:
            raise ValueError(f"row_length must be at least 16, not {row_length}")
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must lie between 0 and 1, not {mask_probability}")
        if not 0 <= short_probability <= 1:
            raise ValueError(f"short_probability must lie between 0 and 1, not {short_probability}")
        self.tokens, self.row_length, self.seed = np.asarray(tokens), row_length, np.atleast_1d(seed).tolist()
        self.next_sentence, self.mask_probability, self.whole_words = next_sentence, mask_probability, whole_words
        self.shuffle, self.vocabulary = shuffle, _vocabulary(tokenizer)
        self.begins, self.lengths = document_borders(self.tokens, separator_id(tokenizer))  # of documents, in tokens
        if len(self.lengths) == 0:
            raise ValueError("the text has no tokens: give data with at least one non-empty document")
        if next_sentence:
            self.by_length = np.argsort(self.lengths, kind="stable")
            self.sorted_lengths = self.lengths[self.by_length]
            self.rank = np.argsort(self.by_length, kind="stable")

        # Documents lie end to end, each with places for its special tokens. A row covers `span` places of these, and
        # the places it has besides are for the special tokens of a document that it cuts.
        self.num_special = 3 if next_sentence else 2  # at most
        self.span = row_length - self.num_special
        num_tokens, num_documents = int(self.lengths.sum()), len(self.lengths)
        num_places = num_tokens + int(self._num_special(self.lengths).sum())
        self.num_cuts = 0
        if shuffle:
            self.num_cuts = min(num_tokens - num_documents, max(1, round(short_probability * num_places / self.span)))
        # The special tokens behind the last token, which is before a cut if there is one, need no row.
        num_behind = self.num_special if self.num_cuts else int(self._num_special(self.lengths[-1]))
        self.num_rows = -(-(num_places + self.num_special * self.num_cuts - num_behind) // self.span)
        self.max_masked = max(1, _rounded(mask_probability * self.span))  # M
        self.max_pairs = row_length // (MIN_PAIR + 3)  # S
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Rows `first` to `first + count` as int64 tensors.

        input_ids, token_type_ids, position_ids, labels (B, T), -100 where not scored; masked_positions (B, M), the
        scored places of each row, then -1. With `next_sentence`, sequence_positions (B, S), the place of each pair's
        [CLS], then -1, and next_sentence_label (B, S): 0 if B continues A, 1 if it is random, then -100.
        """
        numbers, size = range(first, first + count), self.row_length
        found = [self._sequences(number) for number in numbers]
        row = np.repeat(np.arange(count), [len(begin) for begin, _, _ in found])
        begin, length, document = map(np.concatenate, zip(*found, strict=True))
        is_pair = (length >= MIN_PAIR) & self.next_sentence
        num_draws = 7 if self.next_sentence else 3  # of each place
        draws = np.stack([self._generator(number, 2).random((num_draws, size)) for number in numbers], axis=1)

        # Places are counted through the batch: row r begins at r T, and a sequence begins with its [CLS] at `place`.
        extent = length + 2 + is_pair
        used = np.bincount(row, extent, count).astype(np.int64)
        row_place = np.arange(count) * size
        place = np.cumsum(extent) - extent + (row_place - np.cumsum(used) + used)[row]
        # Flat over all tokens of the batch: the sequence each is of, and its number in it.
        sequence = np.repeat(np.arange(len(length)), length)
        within = np.arange(len(sequence)) - (np.cumsum(length) - length)[sequence]
        source = begin[sequence] + within  # its index in the text
        in_second = np.zeros(len(sequence), np.int64)
        if self.next_sentence:
            draw = draws[3].ravel()[place[sequence] + within]
            num_first = np.where(is_pair, self._part(source, sequence, within, length, draw), length)
            moved, is_random = self._random_second(begin, length, document, num_first, draws[4:, row, place % size])
            in_second += within >= num_first[sequence]
            source += in_second * moved[sequence]
        token_place = place[sequence] + 1 + within + in_second

        input_ids = np.full(count * size, self.vocabulary.pad)
        token_type_ids, begins = np.zeros_like(input_ids), np.zeros_like(input_ids)
        input_ids[token_place], token_type_ids[token_place] = self.tokens[source], in_second
        input_ids[place], begins[place] = self.vocabulary.cls, place % size
        input_ids[place + extent - 1], token_type_ids[place + extent - 1] = self.vocabulary.sep, is_pair
        begins[(row_place + used)[used < size]] = used[used < size]  # of the padding
        begins = np.maximum.accumulate(begins.reshape(count, size), axis=1)
        batch = {"token_type_ids": token_type_ids.reshape(count, size), "position_ids": np.arange(size) - begins}
        if self.next_sentence:
            input_ids[(place + 1 + num_first)[is_pair]] = self.vocabulary.sep
            pairs = row[is_pair]
            batch["sequence_positions"] = _padded(pairs, place[is_pair] % size, count, self.max_pairs, -1)
            batch["next_sentence_label"] = _padded(pairs, is_random[is_pair], count, self.max_pairs, IGNORED_LABEL)
        batch |= self._mask(input_ids.reshape(count, size), draws[:3])
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _num_special(self, length):
        """Special tokens of a document: one that is too short to be parted has no second [SEP]."""
        return np.where(length < MIN_PAIR, 2, self.num_special)

    def _generator(self, number: int, purpose: int) -> np.random.Generator:
        return generator(*self.seed, number, purpose)

    def _lay_out(self, epoch: int) -> "_Layout":
        """The documents of an epoch end to end, parted at the cuts."""
        num_documents = len(self.lengths)
        if not self.shuffle:
            order, cuts, rows = np.arange(num_documents), np.empty(0, np.int64), np.arange(self.num_rows)
        else:
            random = self._generator(epoch, 1)
            order, rows = random.permutation(num_documents), random.permutation(self.num_rows)
            # Cuts are drawn from the tokens that do not begin a document, so that no part is empty.
            lengths = self.lengths[order]
            cuts = np.sort(random.choice(lengths.sum() - num_documents, self.num_cuts, replace=False, shuffle=False))
            cuts += 1 + np.searchsorted(np.cumsum(lengths - 1), cuts, side="right")
        ends = np.cumsum(self.lengths[order])
        begins = ends - self.lengths[order]
        starts = np.sort(np.concatenate([begins, cuts]), kind="stable")  # of the parts, in tokens of this epoch
        length = np.diff(starts, append=ends[-1])
        position = np.searchsorted(ends, starts, side="right")
        document = order[position]
        begin = self.begins[document] + starts - begins[position]
        # Whatever its length a part before a cut gets as many, so that all epochs have the same number of places.
        is_cut = starts + length < ends[position]
        num_special = np.where(is_cut, self.num_special, self._num_special(self.lengths[document]))
        if len(cuts):
            first = np.searchsorted(starts, cuts[0])
            begin, length, document, num_special = (
                np.roll(array, -first) for array in (begin, length, document, num_special)
            )
        extent = length + num_special
        return _Layout(begin, length, document, np.cumsum(extent) - extent, rows)

    def _sequences(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What row `number` holds: for each sequence its first token, its number of tokens, its document."""
        epoch, position = divmod(number, self.num_rows)
        layout = self._epoch(epoch)
        left = int(layout.rows[position]) * self.span
        first, last = np.searchsorted(layout.place, [left + 1, left + self.span])
        parts = slice(first - 1, last)
        skipped = np.maximum(left - layout.place[parts], 0)
        length = np.minimum(left + self.span - layout.place[parts], layout.length[parts]) - skipped
        kept = length > 0
        return (layout.begin[parts] + skipped)[kept], length[kept], layout.document[parts][kept]

    def _part(self, source, sequence, within, length, draw) -> np.ndarray:
        """How many tokens A has: to the end of a random sentence, or anywhere, with at least one token left for B."""
        score = draw + self.vocabulary.ends_sentence[self.tokens[source]]
        score[np.cumsum(length) - 1] = -1
        best = np.flatnonzero(score == np.maximum.reduceat(score, np.cumsum(length) - length)[sequence])
        num_first = np.empty_like(length)
        num_first[sequence[best]] = within[best] + 1
        return num_first

    def _random_second(self, begin, length, document, num_first, draws) -> tuple[np.ndarray, np.ndarray]:
        """How far from its own place each B begins (0: it continues A), and whether it is random."""
        label, choice, where = draws
        needed, own = length - num_first, begin + num_first
        if len(self.lengths) > 1:
            # Another document of those that are long enough: the last ones by length, without A's own.
            rank, shortest = self.rank[document], np.searchsorted(self.sorted_lengths, needed)
            num_others = len(self.rank) - shortest - (rank >= shortest)
            chosen = shortest + (choice * num_others).astype(np.int64)
            chosen += (rank >= shortest) & (chosen >= rank)
            other = self.by_length[np.minimum(chosen, len(self.rank) - 1)]
            offset = (where * (self.lengths[other] - needed + 1)).astype(np.int64)
        else:
            num_others, other, whole = self.lengths[0] >= 8 * needed, document, int(self.lengths[0])
            offset = (own - self.begins[0] + (whole * (0.25 + 0.5 * where)).astype(np.int64)) % (whole - needed + 1)
        is_random = (label < 0.5) & (needed > 0) & (num_others > 0)
        # Of a single document B is a quarter away, of which it may give back half.
        most = 63 if len(self.lengths) > 1 else min(63, whole // 8)
        start = self._sentence_start(self.begins[other] + np.maximum(offset, 0), self.begins[other], most)
        return np.where(is_random, start - own, 0), is_random

    def _sentence_start(self, position: np.ndarray, begin: np.ndarray, most: int) -> np.ndarray:
        """Back, by so many tokens at most, to where a sentence or the document begins; `position` if none does."""
        candidates = np.maximum(position[:, None] - np.arange(most + 1), begin[:, None])
        is_start = self.vocabulary.ends_sentence[self.tokens[candidates - 1]] | (candidates == begin[:, None])
        return np.where(is_start.any(1), candidates[np.arange(len(position)), is_start.argmax(1)], position)

    def _mask(self, input_ids: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Choose the scored tokens of each row and hide most of them: input_ids, labels, masked_positions."""
        vocabulary, (num_rows, num_places) = self.vocabulary, input_ids.shape
        is_ordinary = vocabulary.is_ordinary[input_ids]
        num_ordinary = is_ordinary.sum(1, keepdims=True)
        budget = np.maximum(_rounded(self.mask_probability * num_ordinary), 1) * (num_ordinary > 0)
        places = np.arange(num_places)
        order = np.where(is_ordinary, draws[0], 2.0)
        if not self.whole_words:
            order = np.argsort(order, axis=1)
            chosen = places < budget
        else:
            word_start = np.maximum.accumulate(np.where(vocabulary.later_pieces(input_ids), 0, places), axis=1)
            order = np.argsort(np.take_along_axis(order, word_start, axis=1), axis=1, kind="stable")
            # In this order the pieces of a word stay side by side: a word fits if its last one does.
            word = np.take_along_axis(word_start, order, axis=1)
            begins = np.diff(word, axis=1, prepend=-1) != 0
            first = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
            number = np.cumsum(begins).reshape(begins.shape)
            length = np.bincount(number.ravel())[number]
            chosen = first + length <= budget
            single = ~chosen & (length == 1) & (places < num_ordinary)
            chosen |= single & (np.cumsum(single, axis=1) <= budget - chosen.sum(1, keepdims=True))
            chosen |= (places < budget) & ~chosen.any(1, keepdims=True)  # only long words: a part of one
        is_scored = np.zeros_like(is_ordinary)
        np.put_along_axis(is_scored, order, chosen, axis=1)

        row, place = np.nonzero(is_scored)
        hidden = input_ids[row, place]
        labels = np.full_like(input_ids, IGNORED_LABEL)
        labels[row, place] = hidden
        action, random = draws[1][row, place], draws[2][row, place]
        replaced = vocabulary.ordinary[(random * len(vocabulary.ordinary)).astype(np.int64)] if len(row) else hidden
        input_ids[row, place] = np.select([action < 0.8, action < 0.9], [vocabulary.mask, replaced], hidden)
        positions = _padded(row, place, num_rows, self.max_masked, -1)
        return {"input_ids": input_ids, "labels": labels, "masked_positions": positions}


def masked_evaluation_rows(
    tokens: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    row_length: int,
    batch_size: int,
    *,
    next_sentence: bool,
    mask_probability: float = 0.15,
    whole_words: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """The whole split once, in order, as `MaskedRows.rows` gives it, with the same masks and pairs every time.

    The last batch is smaller. With `next_sentence`, the tokens that a random B replaces are left out.
    """
    rows = MaskedRows(
        tokens,
        tokenizer,
        row_length,
        seed=0,
        next_sentence=next_sentence,
        mask_probability=mask_probability,
        whole_words=whole_words,
        shuffle=False,
    )
    for first in range(0, rows.num_rows, batch_size):
        yield rows.rows(first, min(batch_size, rows.num_rows - first))


def sentence_ends(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """For each token id whether a sentence may end with it, (vocab_size,): a full stop and its like, a line break."""
    return _vocabulary(tokenizer).ends_sentence


def later_pieces(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """For each of the tokens (..., T) whether it goes on with the word of the one before it, (..., T)."""
    return _vocabulary(tokenizer).later_pieces(ids)


@dataclass(frozen=True)
class _Layout:
    """An epoch: its documents, or parts of them, in order."""

    begin: np.ndarray  # index of a part's first token
    length: np.ndarray  # tokens
    document: np.ndarray  # the document it is of
    place: np.ndarray  # where it begins, its predecessors' special tokens counted
    rows: np.ndarray  # the order of the rows


@dataclass(frozen=True)
class _Vocabulary:
    """What the rows have to know of each token, by its id."""

    pad: int
    cls: int
    sep: int
    mask: int
    is_ordinary: np.ndarray  # not special
    ordinary: np.ndarray  # ids of these
    ends_sentence: np.ndarray
    goes_on: np.ndarray  # may be a later piece of a word
    may_go_on: np.ndarray  # may have a later piece behind it

    def later_pieces(self, ids: np.ndarray) -> np.ndarray:
        is_ordinary = self.is_ordinary[ids]
        later = self.goes_on[ids] & is_ordinary
        later[..., 1:] &= self.may_go_on[ids[..., :-1]] & is_ordinary[..., :-1]
        later[..., :1] = False
        return later


@functools.lru_cache(maxsize=2)  # a stream asks for each of its shards
def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> _Vocabulary:
    if missing := missing_tokens(tokenizer):
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)}: masking needs them")
    size = max(tokenizer.get_vocab().values()) + 1
    backend = tokenizer.backend_tokenizer
    texts = backend.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    is_ordinary = ~np.isin(np.arange(size), tokenizer.all_special_ids)
    if isinstance(backend.model, WordPiece):
        prefix = backend.model.continuing_subword_prefix
        goes_on, may_go_on = np.array([text.startswith(prefix) for text in texts]), is_ordinary
    else:  # "\ufffd" is a part of a character's bytes; a space belongs to the word behind it, as in a longer token
        goes_on = np.array([text[:1].isalnum() or text[:1] == "\ufffd" for text in texts])
        # Sentencepiece marks the beginning of a word, and decoding takes the mark off.
        goes_on &= [not (backend.id_to_token(token) or "").startswith("\u2581") for token in range(size)]
        may_go_on = np.array([text[-1:].isalnum() or text[-1:] == "\ufffd" or text == " " for text in texts])
    return _Vocabulary(
        pad=tokenizer.pad_token_id,
        cls=tokenizer.cls_token_id,
        sep=tokenizer.sep_token_id,
        mask=tokenizer.mask_token_id,
        is_ordinary=is_ordinary,
        ordinary=np.flatnonzero(is_ordinary),
        ends_sentence=np.array([text.endswith((".", "!", "?", "\n", "。", "！", "？")) for text in texts]),
        goes_on=goes_on,
        may_go_on=may_go_on,
    )


def document_borders(tokens: np.ndarray, separator: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each document begins and how many tokens it has, without its separator; no empty ones."""
    size = 2**24  # at a time, as the tokens may be more than the memory holds
    ends = [first + np.flatnonzero(tokens[first : first + size] == separator) for first in range(0, len(tokens), size)]
    ends = np.concatenate([*ends, [len(tokens)]]).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1])
    kept = ends > begins
    return begins[kept], (ends - begins)[kept]


def _padded(row: np.ndarray, values: np.ndarray, num_rows: int, size: int, padding: int) -> np.ndarray:
    """The values of each row side by side, (num_rows, size), then padding; `row` ascends."""
    padded = np.full((num_rows, size), padding, np.int64)
    padded[row, np.arange(len(row)) - np.searchsorted(row, row)] = values
    return padded


def _rounded(number):
    """To the nearest whole number, halves up."""
    return np.floor(number + 0.5).astype(np.int64)
