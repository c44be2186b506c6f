"""Reads texts: CPython's own documentation, local files, a Hub data set, a stream.

`read_documents` turns the value of `--data` into a `Corpus`: documents to train on, documents to validate on, and a
fingerprint of both. Texts stay exactly as they are (UTF-8; line ends, spaces and case); only empty documents are left
out.
"""

import gzip
import hashlib
import json
import platform
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import compress, islice
from pathlib import Path

from training.data.embedded import embedded_documents
from training.data.fingerprints import digest_of, fingerprint_of
from training.data.holdout import hold_out, key_of
from training.data.sources import load_hub, split_of


class Documents:
    """Texts in a fixed order, read anew in every iteration, so that a corpus may be larger than memory.

    Args:
        read: opens the texts from number `first` on, counted from 0.
    """

    def __init__(self, read: Callable[[int], Iterable[str]]):
        self._read = read

    def __iter__(self) -> Iterator[str]:
        return iter(self._read(0))

    def skip(self, count: int) -> Iterator[str]:
        """Iterates over the texts behind the first `count`."""
        return iter(self._read(count))

    @classmethod
    def of(cls, open_texts: Callable[[], Iterable[str]]) -> "Documents":
        """Makes documents of the texts that `open_texts()` iterates over, without the empty ones."""
        return cls(lambda first: islice(filter(None, open_texts()), first, None))


@dataclass(frozen=True)
class Corpus:
    """The data that `--data` names: two splits and where they come from. Sizes are None for a stream."""

    train: Documents
    validation: Documents
    fingerprint: str  # covers every document and the split
    source: str
    license: str | None = None  # an SPDX name, if it is known
    num_documents: int | None = None
    num_bytes: int | None = None  # of UTF-8
    streamed: bool = False


def read_documents(
    data: str, *, text_column: str = "text", validation_fraction: float = 0.1, streaming: bool = False
) -> Corpus:
    """Reads the corpus that `data` names.

    Args:
        data: "embedded"; a .txt (one document), .jsonl or .parquet file (one document a row; .txt.gz and .jsonl.gz
            too); a folder of such files, whose names give the splits (train*, valid* or dev*, and test*, which is left
            out); or a Hub data set, "name" or "name:config".
        text_column: the column of texts in .jsonl and .parquet files and Hub data sets.
        validation_fraction: the part to hold out where the data has no validation split. The last characters of a
            single document validate; for several documents see `hold_out`.
        streaming: whether to read a Hub data set while it downloads, see `stream_corpus`.

    Raises:
        ValueError: something is missing, empty or broken; the message names it.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, not {validation_fraction}")
    path = Path(data).expanduser()
    is_local = data == "embedded" or path.exists()
    if streaming and is_local:
        raise ValueError(f"streaming needs a Hub data set, but {data!r} is on this machine: leave streaming off")
    if data == "embedded":
        source = f"CPython {platform.python_version()}: pydoc topics and the standard library's docstrings"
        return _split(Documents.of(embedded_documents), None, validation_fraction, source, "PSF-2.0")
    if is_local:
        corpus = _split(*_local_splits(path, text_column), validation_fraction, data)
        return replace(corpus, source=path.resolve().name)  # errors name the whole path, results only its name
    return _hub_corpus(data, text_column, validation_fraction, streaming)


def _local_splits(path: Path, text_column: str) -> tuple[Documents, Documents | None]:
    if path.is_file():
        if not _file_kind(path):
            raise ValueError(f"{path}: expected a .txt, .jsonl or .parquet file")
        return _file_documents([path], text_column), None
    groups: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "": []}
    for file in sorted(path.rglob("*")):
        first_name = file.relative_to(path).parts[0]
        if _file_kind(file) and file.is_file() and not first_name.startswith("."):
            groups[split_of(first_name)].append(file)
    train = groups["train"] or groups[""]
    if not train:
        raise ValueError(f"{path}: the folder holds no .txt, .jsonl or .parquet file to train on")
    return _file_documents(train, text_column), _file_documents(groups["val"], text_column) if groups["val"] else None


def _file_kind(path: Path) -> str:
    """The kind of a file: ".txt", ".jsonl" or ".parquet"; "" for another kind."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in (".txt", ".jsonl", ".parquet") else ""


def _file_documents(files: list[Path], text_column: str) -> Documents:
    return Documents.of(lambda: (text for file in files for text in _read_file(file, text_column)))


def _read_file(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet

    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        if _file_kind(path) == ".txt":
            with open_file(path, "rt", encoding="utf-8", newline="") as file:  # newline="" keeps line ends
                yield file.read()
        elif _file_kind(path) == ".jsonl":
            with open_file(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.isspace():
                        yield _json_text(line, column, f"{path}, line {number}")
        else:
            with pyarrow.parquet.ParquetFile(path) as file:
                _check_column(column, file.schema_arrow.names, str(path))
                for batch in file.iter_batches(columns=[column]):
                    yield from (_as_text(value, column, str(path)) for value in batch.column(0).to_pylist())
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or not what its name says") from error


def _json_text(line: bytes, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object with a field {column!r}, found {type(row).__name__}")
    _check_column(column, row, where)
    return _as_text(row[column], column, where)


def _check_column(column: str, columns: Iterable[str], where: str) -> None:
    if column not in columns:
        raise ValueError(f"{where}: no column {column!r}; name one of {sorted(columns)} with --text_column")


def _as_text(value: object, column: str, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"{where}: column {column!r} holds {type(value).__name__}, not text: choose another --text_column")


def _hub_corpus(data: str, text_column: str, validation_fraction: float, streaming: bool) -> Corpus:
    splits = load_hub(data, streaming)
    train, validation = splits["train"], splits.get("validation")
    if streaming:
        return stream_corpus(train, validation, text_column=text_column, source=data)

    def documents(dataset) -> Documents:
        _check_column(text_column, dataset.column_names, data)
        batches = dataset.select_columns([text_column])
        return Documents.of(
            lambda: (_as_text(v, text_column, data) for batch in batches.iter(1000) for v in batch[text_column])
        )

    held_out = None if validation is None else documents(validation)
    return _split(documents(train), held_out, validation_fraction, data, train.info.license or None)


def stream_corpus(
    train, validation=None, *, text_column: str = "text", source: str, num_held_out: int = 1000
) -> Corpus:
    """Makes a corpus of a `datasets.IterableDataset`, which may be larger than the disk; `StreamedTokens` trains on it.

    The first `num_held_out` documents of `validation` validate; without it the first documents of `train` do, and
    training begins behind them. The fingerprint covers the name and these documents, because the others have not
    arrived yet.
    """
    held_out = (train if validation is None else validation).take(num_held_out)
    if validation is None:
        train = train.skip(num_held_out)
    if (row := next(iter(held_out), None)) is None:
        raise ValueError(f"{source}: the stream has no documents; name a data set and split with text")
    _check_column(text_column, row, source)

    def documents(dataset) -> Documents:
        return Documents(lambda first: (_as_text(row[text_column], text_column, source) for row in dataset.skip(first)))

    fingerprint = fingerprint_of("stream", source, _digest(documents(held_out), source)[1])
    license = train.info.license or None
    return Corpus(documents(train), documents(held_out), fingerprint, source, license, streamed=True)


def _split(
    train: Documents, validation: Documents | None, fraction: float, source: str, license: str | None = None
) -> Corpus:
    """Fingerprints the documents, and holds some out if there is no validation split."""
    keys, digest, num_bytes = _digest(train, source)
    num_documents = len(keys)
    if num_documents == 0:
        raise ValueError(f"{source}: the text is empty; give data with at least one non-empty document")
    if validation is not None:
        validation_keys, validation_digest, validation_bytes = _digest(validation, source)
        if len(validation_keys) == 0:
            raise ValueError(f"{source}: the validation split is empty; remove it or put text into it")
        num_documents, num_bytes = num_documents + len(validation_keys), num_bytes + validation_bytes
        fingerprint = fingerprint_of(digest, validation_digest)
    else:
        everything, fingerprint = train, fingerprint_of(digest, "held out", fraction)
        if num_documents == 1:
            cut = int(len(next(iter(everything))) * (1 - fraction))
            is_divided = cut > 0
            train = Documents.of(lambda: (text[:cut] for text in everything))
            validation = Documents.of(lambda: (text[cut:] for text in everything))
        else:
            held_out = hold_out(keys, fraction)
            is_divided = not held_out.all()
            train = Documents.of(lambda: compress(everything, ~held_out))
            validation = Documents.of(lambda: compress(everything, held_out))
        if not is_divided:
            raise ValueError(f"{source}: too little text to hold any out for validation; give more distinct text")
    return Corpus(train, validation, fingerprint, source, license, num_documents, num_bytes)


def _digest(documents: Iterable[str], source: str) -> tuple[array, str, int]:
    """Computes the `key_of` each document, the sha256 over all documents, and their UTF-8 bytes."""
    keys, num_bytes = array("Q"), 0

    def digests() -> Iterator[bytes]:
        nonlocal num_bytes
        for number, text in enumerate(documents):
            try:
                content = text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{source}: document {number} is not valid Unicode ({error}); repair it") from error
            digest = hashlib.sha256(content).digest()
            keys.append(key_of(digest))
            num_bytes += len(content)
            yield digest

    total = digest_of(digests())
    return keys, total, num_bytes
