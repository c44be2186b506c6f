"""Rows from a stream of documents that is larger than the disk, or not yet here."""

import functools
import hashlib
import json
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from training.documents import Corpus, fingerprint_of
from training.files import write_atomic
from training.text import TokenRows, is_local_main_process, token_folder, token_type
from training.tokenizer import encode_documents, tokenizer_fingerprint


class Rows(Protocol):
    """`TokenRows`, or `masking.MaskedRows`."""

    num_rows: int

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]: ...


class StreamedTokens:
    """Rows of a stream: shards of tokens are written to the token folder as their documents arrive.

    Shard k holds tokens k R T to (k + 1) R T, R = rows_per_shard and T = context_length, and the one behind them, which
    a window's last label needs. A shard never changes once it is there; a JSON file beside it says where in the stream
    it began and where the next one begins, as (document, token in it). So a new process goes on exactly there.
    `rows_of(tokens, shard)` makes the rows of a shard, without it `TokenRows`. Shards are used in order of arrival,
    rows within one in an order of each epoch. When the stream has ended, `num_rows` is known and epochs begin anew;
    less than T tokens at its end are left over.

    Only the local main process writes; it keeps one shard ahead, and the others wait for the file. `rows_per_shard`
    must be no smaller than the global batch, so that no process waits for a shard that nobody is about to write.
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
        self.rows_per_shard, self.timeout = rows_per_shard, timeout
        self.dtype, self.is_writer = token_type(tokenizer), is_local_main_process()
        key = fingerprint_of(corpus.fingerprint, tokenizer_fingerprint(tokenizer), context_length, rows_per_shard, 1)
        self.folder = token_folder() / f"stream-{key[:32]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows_of = rows_of or (
            lambda tokens, shard: TokenRows(tokens, context_length, seed, separator_id, shard=shard)
        )
        self._found: list[dict] = []  # what the JSON file of each shard says
        self._ends: list[int] = []  # rows up to the end of each shard
        self._documents: Iterator[np.ndarray] | None = None  # the open stream, behind the last document of _pending
        self._pending: deque[np.ndarray] = deque()
        self._shard_rows = functools.lru_cache(maxsize=4)(self._open_shard)
        while self._find():
            pass

    @property
    def num_rows(self) -> int | None:
        """Rows of an epoch; None until the end of the stream has been seen."""
        return self._ends[-1] if self._has_ended() else None

    def shards(self) -> dict[str, dict]:
        """File name (in `folder`) -> size in bytes and sha256 of every shard so far, for a checkpoint's manifest."""
        return {self._path(k).name: {name: s[name] for name in ("size", "sha256")} for k, s in enumerate(self._found)}

    def external_files(self) -> dict[str, dict]:
        """The same with whole paths, as the training loop asks for them."""
        return {str(self.folder / name): record for name, record in self.shards().items()}

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Rows `first` to `first + count` of the training; writes or waits for the shards that are needed."""
        self._provide(first + count)
        parts, end = [], first + count
        while first < end:
            epoch, row = divmod(first, self.num_rows) if self._has_ended() else (0, first)
            shard = bisect_right(self._ends, row)
            rows = self._shard_rows(shard)
            position = row - self._ends[shard] + rows.num_rows
            taken = min(end - first, rows.num_rows - position)
            parts.append(rows.rows(epoch * rows.num_rows + position, taken))
            first += taken
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _open_shard(self, shard: int) -> Rows:
        return self._rows_of(np.asarray(np.memmap(self._path(shard), self.dtype, mode="r")), shard)

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.bin"

    def _has_ended(self) -> bool:
        return bool(self._found) and self._found[-1]["is_last"]

    def _add(self, entry: dict) -> None:
        self._found.append(entry)
        self._ends.append((self._ends[-1] if self._ends else 0) + self._shard_rows(len(self._ends)).num_rows)

    def _find(self) -> bool:
        """Take note of the next shard if it is there and whole."""
        if self._has_ended():
            return False
        path = self._path(len(self._found))
        try:
            entry = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if path.stat().st_size != entry["size"]:
                return False
        except (OSError, ValueError):
            return False
        self._add(entry)
        self._documents = None  # another process, or an earlier one, wrote it: an open stream is now too far back
        self._pending.clear()
        return True

    def _provide(self, num_rows: int) -> None:
        """Have the shards of the first `num_rows` rows; the writer, one more."""
        deadline = time.monotonic() + self.timeout
        while not self._has_ended() and len(self._ends) <= bisect_left(self._ends, num_rows) + self.is_writer:
            if self._find():
                deadline = time.monotonic() + self.timeout
            elif self.is_writer:
                self._write_shard()
            elif time.monotonic() > deadline:
                path = self._path(len(self._found))
                raise TimeoutError(f"{path} did not appear in {self.timeout:.0f} s: has the main process stopped?")
            else:
                time.sleep(0.1)

    def _write_shard(self) -> None:
        begin = self._found[-1]["next"] if self._found else {"document": 0, "token": 0}
        document, token = begin["document"], begin["token"]
        if self._documents is None:
            self._documents = encode_documents(self.tokenizer, self.corpus.train.skip(document))
        available = sum(map(len, self._pending)) - token
        # One row more than the shard holds: whether there is one tells whether this shard is the last.
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
        entry = {
            "num_rows": num_rows,
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "begin": begin,
            "next": {"document": document, "token": token},
            "is_last": num_possible <= self.rows_per_shard,
        }
        path = self._path(len(self._found))
        write_atomic(path, content)
        write_atomic(path.with_suffix(".json"), json.dumps(entry))  # last: it says that the shard is whole
        self._add(entry)
