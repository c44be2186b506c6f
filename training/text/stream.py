"""Rows from a stream of documents, which may be larger than the disk or still on its way."""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from training.data.documents import Corpus
from training.data.fingerprints import fingerprint_of
from training.data.shards import ShardFolder
from training.text.tokenizer import encode_documents, tokenizer_fingerprint
from training.text.tokens import TokenRows, token_folder, token_type


class Rows(Protocol):
    """`TokenRows`, or `masking.MaskedRows`."""

    num_rows: int

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]: ...


class StreamedTokens(ShardFolder):
    """Rows of a stream, whose tokens are written to the token folder, shard by shard, as documents arrive.

    With R = rows_per_shard and T = context_length, shard k holds the tokens from k R T to (k + 1) R T, and one more,
    which the last label needs. The JSON file beside it says where in the stream the shard and the next one begin, as
    (document, token in the document), so that another process can go on exactly there. Shards are used in order of
    arrival, and the rows of a shard in a new order in each epoch. When the stream has ended, `num_rows` is known and
    the next epoch begins; fewer than T tokens at the end are left over.

    Args:
        rows_of: makes the rows of a shard from its tokens and number; None: `TokenRows`.
        timeout: seconds to wait for a shard that another process writes.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        context_length: int,
        seed: int,
        separator_id: int | None = None,
        *,
        rows_of: Callable[[np.ndarray, int], Rows] | None = None,
        rows_per_shard: int = 8192,
        timeout: float = 600.0,
    ):
        self.corpus, self.tokenizer, self.context_length = corpus, tokenizer, context_length
        self.rows_per_shard, self.dtype = rows_per_shard, token_type(tokenizer)
        key = fingerprint_of(corpus.fingerprint, tokenizer_fingerprint(tokenizer), context_length, rows_per_shard, 1)
        self._rows_of = rows_of or (
            lambda tokens, shard: TokenRows(tokens, context_length, seed, separator_id, shard=shard)
        )
        self._documents: Iterator[np.ndarray] | None = None  # the open stream; it continues behind _pending
        self._pending: deque[np.ndarray] = deque()
        self._shard_rows = functools.lru_cache(maxsize=4)(self._open_shard)
        super().__init__(token_folder() / f"stream-{key[:32]}", timeout)

    @property
    def num_rows(self) -> int | None:
        """The number of rows of an epoch; None until the stream has ended."""
        return self.ends[-1] if self.has_ended else None

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Makes rows `first` to `first + count`. Writes the shards that are needed, or waits for them."""
        self.provide(first + count)
        parts, end = [], first + count
        while first < end:
            epoch, row = divmod(first, self.num_rows) if self.has_ended else (0, first)
            shard, begin = self.shard_of(row)
            rows, position = self._shard_rows(shard), row - begin
            taken = min(end - first, rows.num_rows - position)
            parts.append(rows.rows(epoch * rows.num_rows + position, taken))
            first += taken
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _open_shard(self, shard: int) -> Rows:
        return self._rows_of(np.asarray(np.memmap(self.path(shard), self.dtype, mode="r")), shard)

    def take_in(self, shard):
        return self._shard_rows(shard).num_rows

    def forget(self):
        self._documents = None
        self._pending.clear()

    def make_shard(self):
        begin = self.found[-1]["next"] if self.found else {"document": 0, "token": 0}
        document, token = begin["document"], begin["token"]
        if self._documents is None:
            self._documents = encode_documents(self.tokenizer, self.corpus.train.skip(document))
        available = sum(map(len, self._pending)) - token
        # Read one row more than the shard holds: if there is none, this shard is the last.
        while available < (self.rows_per_shard + 1) * self.context_length + 1:
            if (tokens := next(self._documents, None)) is None:
                break
            self._pending.append(tokens)
            available += len(tokens)
        num_possible = (available - 1) // self.context_length
        if num_possible < 1:
            raise ValueError(
                f"a row of {self.context_length} tokens (context_length or row_length) needs "
                f"{self.context_length + 1}, but the stream {self.corpus.source!r} has {available}: shorten the row or "
                "give more text"
            )
        num_rows = min(num_possible, self.rows_per_shard)
        size = num_rows * self.context_length
        content = np.concatenate(self._pending)[token : token + size + 1].astype(self.dtype).tobytes()
        token += size
        while self._pending and token >= len(self._pending[0]):
            token -= len(self._pending.popleft())
            document += 1
        return content, {
            "num_rows": num_rows,
            "begin": begin,
            "next": {"document": document, "token": token},
            "is_last": num_possible <= self.rows_per_shard,
        }
