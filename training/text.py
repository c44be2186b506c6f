"""Text for language models: documents -> tokenizer -> token cache -> rows, each step usable without the next.

    corpus = training.documents.read_documents("embedded")
    tokenizer = make_tokenizer("bpe", corpus, vocab_size=4096, context_length=256)
    cache = tokenize_documents(corpus, tokenizer)  # token ids in memory-mapped files, made once
    rows = TokenRows(cache.tokens("train"), context_length=256, seed=0)
    rows.rows(first=0, count=8)  # {"input_ids": (8, 256), "shift_labels": (8, 256)}

`documents.py` reads the corpus; the other three steps are here, and the same rows from a stream at the end.
Dimensions: B rows of a batch, T tokens of a row (the context length).
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.documents import Corpus, Documents, fingerprint_of
from training.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
IGNORED_LABEL = -100

# --------------------------------------------------------------------------------------------------- tokenizers


def make_tokenizer(
    kind: str, corpus: Corpus, vocab_size: int = 4096, *, context_length: int
) -> PreTrainedTokenizerFast:
    """A tokenizer for `corpus`: "char", "bpe", or the name or folder of an existing one.

    "char": one token for every distinct character of both splits. "bpe": byte-level byte-pair encoding (Sennrich et
    al. 2016; bytes as in GPT-2) with `vocab_size` tokens, learnt from the training split; the same text gives the
    same vocabulary. Both have one special token, `<|endoftext|>`, and decode to exactly the text they encoded.
    """
    if kind not in ("char", "bpe"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(kind, clean_up_tokenization_spaces=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer {kind!r} is neither 'char', 'bpe' nor one that loads: {error}") from error
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer {kind!r} has no fast version; convert it to a tokenizer.json first")
        tokenizer.model_max_length = context_length
        return tokenizer
    if corpus.streamed:
        raise ValueError(f"a {kind!r} tokenizer would read the whole stream; name an existing tokenizer, like 'gpt2'")
    end_of_text = AddedToken(END_OF_TEXT, special=True, normalized=False)
    if kind == "char":
        characters = set()
        for split in (corpus.train, corpus.validation):
            for text in split:
                characters.update(text)
        vocabulary = {character: index for index, character in enumerate(sorted(characters))}
        vocabulary[END_OF_TEXT] = len(vocabulary)
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([end_of_text])
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size <= len(alphabet):
            raise ValueError(f"vocab_size must be above {len(alphabet)} (every byte and {END_OF_TEXT}): {vocab_size}")
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[end_of_text], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator((piece for text in corpus.train for piece in _pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def separator_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends a document: end of text, or BERT's separator."""
    token = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if token is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no eos or sep token to end documents with: set one")
    return token


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    return fingerprint_of(_encoder(tokenizer).to_str(), separator_id(tokenizer))


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the Rust tokenizer that reads everything as plain text, `<|endoftext|>` spelt out included."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """For each document its token ids, ended by the separator; nothing for an empty one. In parallel, inside Rust."""
    encoder, separator = _encoder(tokenizer), np.array([separator_id(tokenizer)], np.uint32)
    cut = _pieces if _may_be_cut(encoder) else lambda text: [text]
    pieces = ((number, piece) for number, text in enumerate(documents) for piece in cut(text))

    def encoded() -> Iterator[tuple[int, np.ndarray]]:
        while batch := list(islice(pieces, 256)):
            encodings = encoder.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (number, _), encoding in zip(batch, encodings, strict=True):
                yield number, np.array(encoding.ids, np.uint32)

    for _, parts in groupby(encoded(), key=lambda part: part[0]):
        tokens = np.concatenate([tokens for _, tokens in parts])
        yield np.concatenate([tokens, separator]) if len(tokens) else tokens


def _may_be_cut(encoder: Tokenizer) -> bool:
    """Whether a text cut before white space gives the same tokens; not where every text gets a space put before it."""
    pieces = ["one", " two", "\nthree"]
    whole, *parts = encoder.encode_batch_fast(["".join(pieces), *pieces], add_special_tokens=False)
    return whole.ids == [token for part in parts for token in part.ids]


# Between a letter or digit and white space neither GPT-2's pattern nor its successors' have a word that goes on.
_BORDER = re.compile(r"(?<=[^\W_])(?=\s)")


def _pieces(text: str, size: int = 4096) -> Iterator[str]:
    """Cut a long text where no token can span the cut, so that the pieces are encoded in parallel."""
    start = 0
    while len(text) - start > size and (border := _BORDER.search(text, start + size)):
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


# -------------------------------------------------------------------------------------------------- token cache


class TokenCache:
    """Token ids of the splits in memory-mapped files, `meta.json` beside them. Raises ValueError if damaged."""

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
        """All tokens of a split, (num_tokens,), read-only, from disk as they are touched."""
        return np.memmap(self.folder / f"{split}.bin", self.meta["dtype"], mode="r")

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the split's text, for bits per byte."""
        return self.meta["splits"][split]["num_bytes"]


def token_folder() -> Path:
    return Path(constants.HF_HOME) / "hf_models" / "tokens"


def tokenize_documents(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> TokenCache:
    """Tokenise a corpus (of a stream: its validation split), or open the cache of an earlier time.

    Every document is followed by the separator, except where a split is one document. All processes may call this:
    the first writes while the others wait. It is written beside its place and renamed, so a kill leaves no half.
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
            pass  # not there yet, or damaged
        unfinished = Path(f"{folder}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        meta |= {"source": corpus.source, "dtype": _token_type(tokenizer), "splits": {}}
        with tqdm(total=corpus.num_bytes, desc="tokenising", unit="B", unit_scale=True, disable=_is_quiet()) as bar:
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

    with open(path, "w+b") as file:
        for tokens in encode_documents(tokenizer, counted()):
            num_documents += len(tokens) > 0
            num_tokens += len(tokens)
            file.write(tokens.astype(dtype).tobytes())
        if num_documents == 1:
            num_tokens -= 1
            file.truncate(num_tokens * np.dtype(dtype).itemsize)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"num_documents": num_documents, "num_tokens": num_tokens, "num_bytes": num_bytes, "sha256": digest}


def _token_type(tokenizer: PreTrainedTokenizerFast) -> str:
    return "uint16" if len(tokenizer) <= 2**16 else "uint32"


def _is_quiet() -> bool:
    return os.environ.get("LOCAL_RANK", "0") != "0"


# --------------------------------------------------------------------------------------------------------- rows


class TokenRows:
    """Training rows of T tokens, in an order that is a pure function of the seed.

    Row number g of the training, counted over all epochs (step * global batch + position), is row
    permutation(seed, epoch)[g % num_rows] of epoch g // num_rows. An epoch begins its rows at an offset of its own,
    so that the text is not cut at the same places every time: row r covers tokens[offset + r T : offset + r T + T + 1].
    With `separator_id`, attention is kept within documents: position ids restart behind each separator (which is
    what transformers' `create_causal_mask` reads borders from) and no token is predicted from another document.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, seed: int, separator_id: int | None = None):
        if len(tokens) < context_length + 1:
            raise ValueError(
                f"context_length {context_length} needs {context_length + 1} tokens, but the training text has "
                f"{len(tokens)}: shorten the context or give more text"
            )
        self.tokens = np.asarray(tokens)  # the same mapped memory; np.memmap itself is slow to slice
        self.context_length, self.seed, self.separator_id = context_length, seed, separator_id
        # As many as fit behind every offset below T, and one where the text is too short for that.
        self.num_rows = max(1, (len(tokens) - context_length) // context_length)
        self._num_offsets = min(context_length, len(tokens) - self.num_rows * context_length)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return int(random.integers(self._num_offsets)), random.permutation(self.num_rows)

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Rows `first` to `first + count`: input_ids (B, T) and shift_labels (B, T), the token after each."""
        windows = []
        for index in range(first, first + count):
            epoch, position = divmod(index, self.num_rows)
            offset, permutation = self._epoch(epoch)
            start = offset + int(permutation[position]) * self.context_length
            windows.append(self.tokens[start : start + self.context_length + 1])
        return _batch(np.stack(windows), self.separator_id)


def _batch(windows: np.ndarray, separator_id: int | None) -> dict[str, torch.Tensor]:
    """Inputs and labels from windows (B, T + 1); a window's padding is the ignored label."""
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
    """The whole split once, in order, in windows of T side by side; the last is padded with ignored labels.

    Every token but the first is predicted exactly once.
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


# ---------------------------------------------------------------------------------------------------- streaming


class StreamedTokens:
    """`TokenRows` for a stream: shards of rows are written to the token folder as their documents arrive.

    Shard k holds rows k R to k R + R (R = rows_per_shard) as R T + 1 tokens; its last token is the first of the next
    shard, so that every token is predicted once. A shard never changes once it is there; a JSON file beside it says
    where in the stream it began and where the next one begins, as (document, token in it). So a new process goes on
    exactly there. Shards are used in order of arrival, rows within one in the order of (seed, epoch, shard).
    When the stream has ended, `num_rows` is known and epochs begin anew; less than a row at its end is left over.

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
        rows_per_shard: int = 8192,
        timeout: float = 600.0,
    ):
        self.corpus, self.tokenizer, self.context_length, self.seed = corpus, tokenizer, context_length, seed
        self.separator_id, self.rows_per_shard, self.timeout = separator_id, rows_per_shard, timeout
        self.dtype, self.is_writer = _token_type(tokenizer), not _is_quiet()
        key = fingerprint_of(corpus.fingerprint, tokenizer_fingerprint(tokenizer), context_length, rows_per_shard, 1)
        self.folder = token_folder() / f"stream-{key[:32]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._found: list[dict] = []  # what the JSON file of each shard says
        self._documents: Iterator[np.ndarray] | None = None  # the open stream, behind the last document of _pending
        self._pending: deque[np.ndarray] = deque()
        self._order = functools.lru_cache(maxsize=4)(self._draw_order)
        self._tokens = functools.lru_cache(maxsize=4)(self._open_shard)
        while self._find(len(self._found)):
            pass

    @property
    def num_rows(self) -> int | None:
        """Rows of an epoch; None until the end of the stream has been seen."""
        return sum(shard["num_rows"] for shard in self._found) if self._has_ended() else None

    def shards(self) -> dict[str, dict]:
        """File name (in `folder`) -> size in bytes and sha256 of every shard so far, for a checkpoint's manifest."""
        return {self._path(k).name: {name: s[name] for name in ("size", "sha256")} for k, s in enumerate(self._found)}

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """As `TokenRows.rows`; writes or waits for the shards that are needed."""
        self._provide((first + count - 1) // self.rows_per_shard)
        windows = []
        for index in range(first, first + count):
            epoch, row = divmod(index, self.num_rows) if self._has_ended() else (0, index)
            shard, position = divmod(row, self.rows_per_shard)
            start = int(self._order(epoch, shard)[position]) * self.context_length
            windows.append(self._tokens(shard)[start : start + self.context_length + 1])
        return _batch(np.stack(windows), self.separator_id)

    def _draw_order(self, epoch: int, shard: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch, shard]))
        return random.permutation(self._found[shard]["num_rows"])

    def _open_shard(self, shard: int) -> np.ndarray:
        return np.asarray(np.memmap(self._path(shard), self.dtype, mode="r"))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.bin"

    def _has_ended(self) -> bool:
        return bool(self._found) and self._found[-1]["is_last"]

    def _find(self, shard: int) -> bool:
        """Take note of the next shard if it is there and whole."""
        if self._has_ended():
            return False
        path = self._path(shard)
        try:
            entry = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if path.stat().st_size != entry["size"]:
                return False
        except (OSError, ValueError):
            return False
        self._found.append(entry)
        self._documents = None  # another process, or an earlier one, wrote it: an open stream is now too far back
        self._pending.clear()
        return True

    def _provide(self, shard: int) -> None:
        """Have every shard up to this one; the writer, one more."""
        deadline = time.monotonic() + self.timeout
        while not self._has_ended() and len(self._found) <= shard + self.is_writer:
            if self._find(len(self._found)):
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
                f"context_length {self.context_length} needs {self.context_length + 1} tokens, but the stream "
                f"{self.corpus.source!r} has {available}: shorten the context or give more text"
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
        self._found.append(entry)
