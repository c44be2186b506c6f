"""Rows for BERT: documents laid end to end without padding, some tokens hidden, and pairs of sentences to tell apart.

    rows = MaskedRows(cache.tokens("train"), tokenizer, row_length=128, seed=0, next_sentence=True)
    rows.rows(first=0, count=8)  # {"input_ids": (8, 128), "labels": (8, 128), "masked_positions": (8, 19), ...}

As in Devlin et al. 2019, sections 3.1 and A.2, but packed: a row holds as many sequences as fit, each with position ids
from 0, and the model keeps attention within a sequence. Masks and pairs are drawn anew in every epoch.

B rows of a batch, T positions of a row, M scored positions of a row, S pairs of a row
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

MIN_PAIR = 8  # tokens; a shorter sequence is not split into two


class MaskedRows:
    """Rows of T positions with masked tokens. A row depends only on the seed and its number over all epochs.

    An epoch permutes the documents, lays them end to end, cuts the whole into `num_rows` rows, and permutes the rows.
    The part of a document that falls into one row is a sequence, [CLS] tokens [SEP]. So every token is used once. Only
    the few positions that special tokens leave over, and the end of the last row, are padding, which has position ids
    of its own from 0, so that nothing attends to it. The epoch begins at a random cut (see `short_probability`), so
    that rows do not cut the text at the same tokens every time; there is at least one random cut, unless no document
    has two tokens.

    Args:
        tokens: (num_tokens,), documents ended by `separator_id(tokenizer)`, as a `TokenCache` has them.
        row_length: T.
        seed: one number, or several, such as (seed, shard) for a shard of a stream.
        next_sentence: turns a sequence of at least 8 tokens into [CLS] A [SEP] B [SEP], split at the end of a sentence
            if it has one. With probability 1/2, B is then replaced by as many tokens of another document that is long
            enough, from the beginning of a sentence if one is near; the replaced tokens are left out of that epoch. A
            single document replaces B by a part of its own, at least an eighth of its length away, unless it has less
            than eight times as many tokens.
        mask_probability: the part of the tokens of each row that is scored, rounded, but at least one token; special
            tokens ([UNK] too) never are. Of the scored tokens 80 % become [MASK], 10 % a random token, 10 % stay.
        whole_words: scores all pieces of a word or none. A piece that begins with "##" continues a word; without word
            pieces a word is letters and digits that follow each other. If no word is short enough for the rest of the
            budget, a row has a few scored tokens less.
        short_probability: the number of random cuts within documents, as a part of the number of rows, so that the
            model sees short sequences too.
        shuffle: False leaves the documents and rows in order and without cuts, the same in every epoch.

    Raises:
        ValueError: the tokenizer lacks a token that this needs, the text is empty, or an option is out of its range.
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

        # On the line of an epoch, each document takes up as many positions as its tokens and special tokens. A row
        # covers `span` positions of the line. Its other positions are spare: where a row cuts a document, the second
        # part needs special tokens of its own.
        self.num_special = 3 if next_sentence else 2  # the most special tokens of a sequence
        self.span = row_length - self.num_special
        num_tokens, num_documents = int(self.lengths.sum()), len(self.lengths)
        num_positions = num_tokens + int(self._num_special(self.lengths).sum())
        self.num_cuts = 0
        if shuffle:
            wanted = max(1, round(short_probability * num_positions / self.span))
            self.num_cuts = min(num_tokens - num_documents, wanted)
        # The line ends with the special tokens of the last sequence. They need no row, because a row adds its own. With
        # cuts, the epoch ends before a cut, where there are always `num_special` (see `_lay_out`).
        num_trailing = self.num_special if self.num_cuts else int(self._num_special(self.lengths[-1]))
        self.num_rows = -(-(num_positions + self.num_special * self.num_cuts - num_trailing) // self.span)
        self.max_masked = max(1, _rounded(mask_probability * self.span))  # M
        self.max_pairs = row_length // (MIN_PAIR + 3)  # S
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Makes rows `first` to `first + count`.

        Returns:
            int64 tensors. input_ids, token_type_ids, position_ids and labels are (B, T); a label is -100 where nothing
            is scored. masked_positions (B, M) are the scored positions of each row, then -1. With `next_sentence`,
            sequence_positions (B, S) are the positions of each pair's [CLS], then -1, and next_sentence_label (B, S) is
            0 if B continues A, 1 if B is random, then -100.
        """
        numbers, size = range(first, first + count), self.row_length
        found = [self._sequences(number) for number in numbers]
        num_draws = 7 if self.next_sentence else 3  # for each position
        draws = np.stack([self._generator(number, 2).random((num_draws, size)) for number in numbers], axis=1)

        # From here on the batch is one flat line: row r covers the positions from r T to (r + 1) T.
        # For each sequence: its row, its first token in the text, its length in tokens, its document.
        row = np.repeat(np.arange(count), [len(begin) for begin, _, _ in found])
        begin, length, document = map(np.concatenate, zip(*found, strict=True))
        is_pair = (length >= MIN_PAIR) & self.next_sentence
        extent = length + 2 + is_pair  # positions of a sequence
        used = np.bincount(row, extent, count).astype(np.int64)  # positions of each row that are no padding
        row_start = np.arange(count) * size
        padding_before = row_start - np.cumsum(used) + used  # in all rows before
        start = np.cumsum(extent) - extent + padding_before[row]  # the position of the sequence's [CLS]

        # For each token: its sequence, its number in the sequence, its index in the text, whether it is in B.
        sequence = np.repeat(np.arange(len(length)), length)
        within = np.arange(len(sequence)) - (np.cumsum(length) - length)[sequence]
        source = begin[sequence] + within
        in_second = np.zeros(len(sequence), np.int64)
        if self.next_sentence:
            draw = draws[3].ravel()[start[sequence] + within]
            num_first = np.where(is_pair, self._length_of_first(source, sequence, within, length, draw), length)
            moved, is_random = self._random_second(begin, length, document, num_first, draws[4:, row, start % size])
            in_second += within >= num_first[sequence]
            source += in_second * moved[sequence]
        position = start[sequence] + 1 + within + in_second  # behind [CLS], and in B behind [SEP] too

        input_ids = np.full(count * size, self.vocabulary.pad)
        token_type_ids, starts = np.zeros_like(input_ids), np.zeros_like(input_ids)
        input_ids[position], token_type_ids[position] = self.tokens[source], in_second
        input_ids[start], starts[start] = self.vocabulary.cls, start % size
        input_ids[start + extent - 1], token_type_ids[start + extent - 1] = self.vocabulary.sep, is_pair
        starts[(row_start + used)[used < size]] = used[used < size]  # the padding counts as a sequence
        starts = np.maximum.accumulate(starts.reshape(count, size), axis=1)  # of the sequence at each position
        batch = {"token_type_ids": token_type_ids.reshape(count, size), "position_ids": np.arange(size) - starts}
        if self.next_sentence:
            input_ids[(start + 1 + num_first)[is_pair]] = self.vocabulary.sep
            pairs = row[is_pair]
            batch["sequence_positions"] = _padded(pairs, start[is_pair] % size, count, self.max_pairs, -1)
            batch["next_sentence_label"] = _padded(pairs, is_random[is_pair], count, self.max_pairs, IGNORED_LABEL)
        batch |= self._mask(input_ids.reshape(count, size), draws[:3])
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _num_special(self, length):
        """The number of special tokens of a document. A document that is too short to be a pair has no second [SEP]."""
        return np.where(length < MIN_PAIR, 2, self.num_special)

    def _generator(self, number: int, purpose: int) -> np.random.Generator:
        return generator(*self.seed, number, purpose)

    def _lay_out(self, epoch: int) -> "_Layout":
        """Lays the documents of an epoch end to end, split at the random cuts."""
        num_documents = len(self.lengths)
        if not self.shuffle:
            order, cuts, rows = np.arange(num_documents), np.empty(0, np.int64), np.arange(self.num_rows)
        else:
            random = self._generator(epoch, 1)
            order, rows = random.permutation(num_documents), random.permutation(self.num_rows)
            # A cut is before a token that does not begin a document, so that no part is empty.
            lengths = self.lengths[order]
            cuts = np.sort(random.choice(lengths.sum() - num_documents, self.num_cuts, replace=False, shuffle=False))
            cuts += 1 + np.searchsorted(np.cumsum(lengths - 1), cuts, side="right")
        # Indices count the tokens of this epoch, in the order of its documents.
        document_ends = np.cumsum(self.lengths[order])
        document_starts = document_ends - self.lengths[order]
        starts = np.sort(np.concatenate([document_starts, cuts]), kind="stable")  # of the parts
        length = np.diff(starts, append=document_ends[-1])
        position = np.searchsorted(document_ends, starts, side="right")
        document = order[position]
        begin = self.begins[document] + starts - document_starts[position]
        # A part before a cut gets the most special tokens, whatever its length, so that all epochs are equally long.
        is_before_cut = starts + length < document_ends[position]
        num_special = np.where(is_before_cut, self.num_special, self._num_special(self.lengths[document]))
        if len(cuts):  # begin the epoch at the first cut
            first = np.searchsorted(starts, cuts[0])
            begin, length, document, num_special = (
                np.roll(array, -first) for array in (begin, length, document, num_special)
            )
        extent = length + num_special
        return _Layout(begin, length, document, np.cumsum(extent) - extent, rows)

    def _sequences(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds the sequences of row `number`: for each its first token, its number of tokens, its document."""
        epoch, position = divmod(number, self.num_rows)
        layout = self._epoch(epoch)
        left = int(layout.rows[position]) * self.span
        first, last = np.searchsorted(layout.start, [left + 1, left + self.span])
        parts = slice(first - 1, last)
        skipped = np.maximum(left - layout.start[parts], 0)  # tokens that an earlier row has
        length = np.minimum(left + self.span - layout.start[parts], layout.length[parts]) - skipped
        kept = length > 0
        return (layout.begin[parts] + skipped)[kept], length[kept], layout.document[parts][kept]

    def _length_of_first(self, source, sequence, within, length, draw) -> np.ndarray:
        """Chooses for each sequence how many tokens A has; at least one token is left for B.

        A ends with a random sentence of the sequence, or at a random token if no sentence ends in it.
        """
        score = draw + self.vocabulary.ends_sentence[self.tokens[source]]
        score[np.cumsum(length) - 1] = -1
        best = np.flatnonzero(score == np.maximum.reduceat(score, np.cumsum(length) - length)[sequence])
        num_first = np.empty_like(length)
        num_first[sequence[best]] = within[best] + 1
        return num_first

    def _random_second(self, begin, length, document, num_first, draws) -> tuple[np.ndarray, np.ndarray]:
        """Chooses for each sequence whether B is random, and how far in the text it is moved (0: it continues A)."""
        label, choice, where = draws
        needed, own = length - num_first, begin + num_first
        if len(self.lengths) > 1:
            # Choose another document that is long enough. Sorted by length, these are the last documents, and A's own
            # document is left out by counting past it.
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
        # In a single document B is at least a quarter away; going back to a sentence may use up half of that.
        most = 63 if len(self.lengths) > 1 else min(63, whole // 8)
        start = self._sentence_start(self.begins[other] + np.maximum(offset, 0), self.begins[other], most)
        return np.where(is_random, start - own, 0), is_random

    def _sentence_start(self, index: np.ndarray, begin: np.ndarray, most: int) -> np.ndarray:
        """Goes back in the text, by at most `most` tokens, to the beginning of a sentence or of the document.

        Returns:
            The indices of these beginnings; `index` where there is none near.
        """
        candidates = np.maximum(index[:, None] - np.arange(most + 1), begin[:, None])
        is_start = self.vocabulary.ends_sentence[self.tokens[candidates - 1]] | (candidates == begin[:, None])
        return np.where(is_start.any(1), candidates[np.arange(len(index)), is_start.argmax(1)], index)

    def _mask(self, input_ids: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Chooses the scored tokens of each row and hides most of them: input_ids, labels, masked_positions."""
        vocabulary, (num_rows, num_positions) = self.vocabulary, input_ids.shape
        is_ordinary = vocabulary.is_ordinary[input_ids]
        num_ordinary = is_ordinary.sum(1, keepdims=True)
        budget = np.maximum(_rounded(self.mask_probability * num_ordinary), 1) * (num_ordinary > 0)
        positions = np.arange(num_positions)
        lots = np.where(is_ordinary, draws[0], 2.0)  # the tokens with the lowest lots are scored
        if not self.whole_words:
            order = np.argsort(lots, axis=1)
            chosen = positions < budget  # in this order
        else:
            # All pieces of a word have the lot of its first piece, so they stay side by side in the order of the lots.
            word_start = np.maximum.accumulate(np.where(vocabulary.later_pieces(input_ids), 0, positions), axis=1)
            order = np.argsort(np.take_along_axis(lots, word_start, axis=1), axis=1, kind="stable")
            word = np.take_along_axis(word_start, order, axis=1)
            begins = np.diff(word, axis=1, prepend=-1) != 0
            first = np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
            number = np.cumsum(begins).reshape(begins.shape)
            length = np.bincount(number.ravel())[number]
            chosen = first + length <= budget  # a word is chosen if its last piece is within the budget
            single = ~chosen & (length == 1) & (positions < num_ordinary)
            chosen |= single & (np.cumsum(single, axis=1) <= budget - chosen.sum(1, keepdims=True))
            chosen |= (positions < budget) & ~chosen.any(1, keepdims=True)  # if all words are too long, part of one
        is_scored = np.zeros_like(is_ordinary)
        np.put_along_axis(is_scored, order, chosen, axis=1)

        row, position = np.nonzero(is_scored)
        hidden = input_ids[row, position]
        labels = np.full_like(input_ids, IGNORED_LABEL)
        labels[row, position] = hidden
        action, random = draws[1][row, position], draws[2][row, position]
        replaced = vocabulary.ordinary[(random * len(vocabulary.ordinary)).astype(np.int64)] if len(row) else hidden
        input_ids[row, position] = np.select([action < 0.8, action < 0.9], [vocabulary.mask, replaced], hidden)
        masked_positions = _padded(row, position, num_rows, self.max_masked, -1)
        return {"input_ids": input_ids, "labels": labels, "masked_positions": masked_positions}


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
    """Yields batches of a whole split, in order, as `MaskedRows.rows` makes them.

    Masks and pairs are the same every time, and the last batch may be smaller. With `next_sentence`, the tokens that a
    random B replaces are left out.
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
    """Says for each token id, (vocab_size,), whether a sentence may end with it: a full stop or line break, say."""
    return _vocabulary(tokenizer).ends_sentence


def later_pieces(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Says for each of the tokens (..., T) whether it continues the word of the token before it."""
    return _vocabulary(tokenizer).later_pieces(ids)


@dataclass(frozen=True)
class _Layout:
    """The documents of an epoch in order. A part is a document, or what cuts leave of one."""

    begin: np.ndarray  # of each part the index of its first token in the text
    length: np.ndarray  # its tokens
    document: np.ndarray  # its document
    start: np.ndarray  # its position on the line, on which special tokens take up positions too
    rows: np.ndarray  # the order of the rows


@dataclass(frozen=True)
class _Vocabulary:
    """What masking has to know of the tokens, by their ids."""

    pad: int
    cls: int
    sep: int
    mask: int
    is_ordinary: np.ndarray  # whether a token is not special
    ordinary: np.ndarray  # the ids of these tokens
    ends_sentence: np.ndarray  # whether a sentence may end with it
    goes_on: np.ndarray  # whether it may continue a word
    may_go_on: np.ndarray  # whether a word may continue behind it

    def later_pieces(self, ids: np.ndarray) -> np.ndarray:
        is_ordinary = self.is_ordinary[ids]
        later = self.goes_on[ids] & is_ordinary
        later[..., 1:] &= self.may_go_on[ids[..., :-1]] & is_ordinary[..., :-1]
        later[..., :1] = False
        return later


@functools.lru_cache(maxsize=2)  # every shard of a stream needs it
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
    else:  # "\ufffd" is part of a character; a space belongs to the word behind it, as in a longer token
        goes_on = np.array([text[:1].isalnum() or text[:1] == "\ufffd" for text in texts])
        # SentencePiece marks the beginning of a word, and decoding removes the mark.
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
    """Finds where each document begins and how many tokens it has, without its separator. Empty ones are left out."""
    size = 2**24  # tokens at a time, because all of them may not fit into memory
    ends = [first + np.flatnonzero(tokens[first : first + size] == separator) for first in range(0, len(tokens), size)]
    ends = np.concatenate([*ends, [len(tokens)]]).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1])
    kept = ends > begins
    return begins[kept], (ends - begins)[kept]


def _padded(row: np.ndarray, values: np.ndarray, num_rows: int, size: int, padding: int) -> np.ndarray:
    """Puts the values of each row side by side, (num_rows, size), then padding; `row` must ascend."""
    padded = np.full((num_rows, size), padding, np.int64)
    padded[row, np.arange(len(row)) - np.searchsorted(row, row)] = values
    return padded


def _rounded(number):
    """Rounds to the nearest whole number, and halves up."""
    return np.floor(number + 0.5).astype(np.int64)
