"""Token ids on disk, and rows of them to train on: documents -> tokenizer -> token cache -> rows.

    corpus = training.data.documents.read_documents("embedded")
    tokenizer = training.text.tokenizer.make_tokenizer("bpe", corpus, vocab_size=4096, context_length=256)
    cache = tokenize_documents(corpus, tokenizer)  # token ids in memory-mapped files, made once
    rows = TokenRows(cache.tokens("train"), context_length=256, seed=0)
    rows.rows(first=0, count=8)  # {"input_ids": (8, 256), "shift_labels": (8, 256)}

Each step is usable without the next. `masking.py` makes rows with masked tokens, and `stream.py` rows of a stream.

B rows of a batch, T tokens of a row (the context length)
"""

import fcntl
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from training.data.documents import Corpus, Documents
from training.data.fingerprints import fingerprint_of
from training.run.folder import file_record, write_atomic
from training.run.processes import is_local_main_process
from training.run.seeds import generator
from training.text.tokenizer import encode_documents, tokenizer_fingerprint

IGNORED_LABEL = -100

# -------------------------------------------------------------------------------------------------- token cache


class TokenCache:
    """The token ids of each split in a memory-mapped file, and `meta.json` beside them.

    Raises:
        ValueError: a file is missing or of the wrong size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            sizes = {name: (self.folder / f"{name}.bin").stat().st_size for name in self.meta["splits"]}
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.folder} is no token cache: {error}") from error
        for name, split in self.meta["splits"].items():
            if sizes[name] != split["num_tokens"] * np.dtype(self.meta["dtype"]).itemsize:
                raise ValueError(f"{self.folder / name}.bin is damaged: {sizes[name]} bytes; remove the folder")

    def tokens(self, split: str) -> np.ndarray:
        """All tokens of a split, (num_tokens,), read-only. They are read from disk when they are used."""
        return np.memmap(self.folder / f"{split}.bin", self.meta["dtype"], mode="r")

    def num_bytes(self, split: str) -> int:
        """The UTF-8 bytes of a split's text, for bits per byte."""
        return self.meta["splits"][split]["num_bytes"]


def token_folder() -> Path:
    """The folder of all token caches."""
    return Path(constants.HF_HOME) / "hf_models" / "tokens"


def tokenize_documents(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> TokenCache:
    """Tokenises a corpus, or opens the cache of an earlier run; of a stream only the validation split.

    Every document is followed by the separator, unless a split is one document. All processes may call this: the first
    writes and the others wait. The cache is written under another name and then renamed, so a kill leaves no half.
    """
    splits = {"train": corpus.train, "validation": corpus.validation}
    if corpus.streamed:
        del splits["train"]
    meta = {"data": corpus.fingerprint, "tokenizer": tokenizer_fingerprint(tokenizer), "format": 1}
    folder = token_folder() / fingerprint_of(meta, list(splits))[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it when its holder dies
        try:
            return TokenCache(folder)
        except ValueError:
            pass  # the cache does not exist yet, or is damaged
        unfinished = Path(f"{folder}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        meta |= {"source": corpus.source, "dtype": token_type(tokenizer), "splits": {}}
        quiet = not is_local_main_process()
        with tqdm(total=corpus.num_bytes, desc="tokenising", unit="B", unit_scale=True, disable=quiet) as bar:
            for name, documents in splits.items():
                path = unfinished / f"{name}.bin"
                meta["splits"][name] = _write_tokens(path, documents, tokenizer, meta["dtype"], bar)
        write_atomic(unfinished / "meta.json", json.dumps(meta, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        return TokenCache(folder)


def _write_tokens(path: Path, documents: Documents, tokenizer, dtype: str, bar: tqdm) -> dict:
    num_documents = num_tokens = num_bytes = 0

    def counted() -> Iterator[str]:
        nonlocal num_bytes
        for text in documents:
            size = len(text.encode())
            num_bytes += size
            bar.update(size)
            yield text

    with open(path, "wb") as file:
        for tokens in encode_documents(tokenizer, counted()):
            num_documents += len(tokens) > 0
            num_tokens += len(tokens)
            file.write(tokens.astype(dtype).tobytes())
        if num_documents == 1:
            num_tokens -= 1
            file.truncate(num_tokens * np.dtype(dtype).itemsize)
        file.flush()
        os.fsync(file.fileno())
    sizes = {"num_documents": num_documents, "num_tokens": num_tokens, "num_bytes": num_bytes}
    return {**sizes, "sha256": file_record(path)["sha256"]}


def token_type(tokenizer: PreTrainedTokenizerFast) -> str:
    """The smallest type that holds every token id."""
    return "uint16" if len(tokenizer) <= 2**16 else "uint32"


# --------------------------------------------------------------------------------------------------------- rows


class TokenRows:
    """Training rows of T tokens, in an order that depends only on the seed.

    Row number g of the training, counted over all epochs (step * global batch + position), is row
    permutation(seed, epoch)[g % num_rows] of epoch g // num_rows. Every epoch has an offset of its own, so that rows do
    not cut the text at the same tokens every time: row r covers tokens[offset + r T : offset + r T + T + 1].

    Args:
        tokens: (num_tokens,).
        context_length: T.
        separator_id: keeps attention within documents: position ids restart behind each separator (transformers'
            `create_causal_mask` finds the borders there), and no token is predicted from another document.
        shard: the number of the shard of a stream that the tokens are. The order then depends on (seed, epoch, shard),
            and the offset is 0.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        context_length: int,
        seed: int,
        separator_id: int | None = None,
        *,
        shard: int | None = None,
    ):
        if len(tokens) < context_length + 1:
            raise ValueError(
                f"context_length {context_length} needs {context_length + 1} tokens, but the training text has "
                f"{len(tokens)}: shorten the context or give more text"
            )
        self.tokens = np.asarray(tokens)  # the same memory, but np.memmap is slow to slice
        self.context_length, self.seed, self.separator_id = context_length, seed, separator_id
        if shard is None:
            # Rows that fit behind every offset below T, or one row of a text that is too short for that.
            self.num_rows = max(1, (len(tokens) - context_length) // context_length)
            self._num_offsets = min(context_length, len(tokens) - self.num_rows * context_length)
            self._shard = []
        else:
            self.num_rows, self._num_offsets, self._shard = (len(tokens) - 1) // context_length, 1, [shard]
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        random = generator(self.seed, epoch, *self._shard)
        return int(random.integers(self._num_offsets)), random.permutation(self.num_rows)

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Makes rows `first` to `first + count`: input_ids (B, T), and shift_labels (B, T), the token after each."""
        windows = []
        for index in range(first, first + count):
            epoch, position = divmod(index, self.num_rows)
            offset, permutation = self._epoch(epoch)
            start = offset + int(permutation[position]) * self.context_length
            windows.append(self.tokens[start : start + self.context_length + 1])
        return _batch(np.stack(windows), self.separator_id)


def _batch(windows: np.ndarray, separator_id: int | None) -> dict[str, torch.Tensor]:
    """Makes inputs and labels from windows (B, T + 1), whose padding is the ignored label."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    inputs, labels = tokens[:, :-1].clamp(min=0), tokens[:, 1:].contiguous()
    if separator_id is None:
        return {"input_ids": inputs, "shift_labels": labels}
    ends = inputs == separator_id
    labels[ends] = IGNORED_LABEL
    indices = torch.arange(inputs.shape[1]).expand_as(inputs)
    begins = torch.zeros_like(inputs)
    begins[:, 1:] = indices[:, 1:] * ends[:, :-1]
    position_ids = indices - begins.cummax(dim=1).values
    return {"input_ids": inputs, "shift_labels": labels, "position_ids": position_ids}


def evaluation_rows(
    tokens: np.ndarray, context_length: int, batch_size: int, separator_id: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the whole split once, in order, in windows of T tokens side by side.

    Every token but the first is predicted exactly once. The last window is padded with ignored labels.
    """
    if len(tokens) < 2:
        raise ValueError(f"the validation text has {len(tokens)} token(s), and predicting needs 2: give more text")
    starts = range(0, len(tokens) - 1, context_length)
    for first in range(0, len(starts), batch_size):
        windows = np.full((len(starts[first : first + batch_size]), context_length + 1), IGNORED_LABEL, np.int64)
        for window, start in zip(windows, starts[first : first + batch_size], strict=True):
            covered = tokens[start : start + context_length + 1]
            window[: len(covered)] = covered
        yield _batch(windows, separator_id)
