"""Reads tables from files and the Hub for tasks with labels. Columns are in memory, and every row has an address.

    train, validation = read_tables("reviews/")  # train.csv and dev.csv in a folder
    train.column("label")[4], train.where(4)  # ("1", "reviews/train.csv, row 5")

Values stay as they are written: no type is guessed, and "NA" is a text.
"""

import csv
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data.embedded import embedded_docstrings
from training.data.sources import load_hub, split_of


@dataclass
class Table:
    """Columns of equal length. A Hub data set also names its classes."""

    columns: Mapping[str, Any]
    parts: list[tuple[str, int]]  # the files that it comes from, and the number of rows of each
    class_names: dict[str, list[str]] = field(default_factory=dict)
    version: str = ""  # of SQuAD's format
    license: str | None = None

    def __len__(self) -> int:
        return sum(size for _, size in self.parts)

    def column(self, name: str, option: str) -> list:
        """The values of a column.

        Raises:
            ValueError: there is no such column; the message lists the columns and names the option that chooses one.
        """
        if name not in self.columns:
            source = self.parts[0][0]
            raise ValueError(f"{source}: no column {name!r}; choose one of {sorted(self.columns)} with --{option}")
        return list(self.columns[name])

    def where(self, row: int) -> str:
        """The address of a row for error messages: its file and its number there, from 1. `row` counts from 0."""
        for source, size in self.parts:
            if row < size:
                return f"{source}, row {row + 1}"
            row -= size
        raise IndexError(row)


def read_tables(data: str, validation_data: str | None = None) -> tuple[Table, Table | None]:
    """Reads the training part of what `data` names, and its validation part if it has one.

    Args:
        data: a .csv, .tsv, .json, .jsonl, .parquet or CoNLL (.txt, .conll) file; a folder of such files whose names
            begin with the split (train*, and val* or dev*; test* is left out); or a Hub data set, "name" or
            "name:config".
        validation_data: another file to validate on.

    Raises:
        ValueError: something is missing, broken or ambiguous; the message names it.
    """
    path = Path(data).expanduser()
    if not path.exists():
        train, validation = read_hub(data)
    elif path.is_dir():
        train, validation = _read_folder(path)
    else:
        train, validation = _read_files([path]), None
    if validation_data is not None:
        if not Path(validation_data).expanduser().is_file():
            raise ValueError(f"no such file: --validation_data {validation_data}")
        validation = _read_files([Path(validation_data).expanduser()])
    return train, validation


def read_hub(data: str, validation_split: str = "validation") -> tuple[Table, Table | None]:
    """Reads the splits of a Hub data set.

    Raises:
        ValueError: the data set cannot be loaded or has no split to train on.
    """
    import datasets

    splits = load_hub(data)

    def table(split: str) -> Table:
        dataset = splits[split]
        names = {
            column: inner.names
            for column, feature in dataset.features.items()
            if isinstance(inner := getattr(feature, "feature", feature), datasets.ClassLabel)
        }
        columns = {column: dataset[column] for column in dataset.column_names}
        return Table(columns, [(f"{data}, split {split}", len(dataset))], names, license=dataset.info.license or None)

    return table("train"), table(validation_split) if validation_split in splits else None


def read_embedded(num_classes: int = 10) -> Table:
    """Reads the docstrings of the largest packages of CPython's standard library, each labelled with its package."""
    packages: dict[str, list[str]] = {}
    for module, docstrings in embedded_docstrings():
        if "/" in module:
            packages.setdefault(module.split("/")[0], []).extend(docstrings)
    largest = sorted(packages, key=lambda name: (-len(packages[name]), name))[:num_classes]
    columns = {
        "text": [text for name in largest for text in packages[name]],
        "label": [name for name in largest for _ in packages[name]],
    }
    source = f"docstrings of CPython {platform.python_version()}'s {num_classes} largest packages"
    return Table(columns, [(source, len(columns["text"]))], license="PSF-2.0")


def _read_folder(folder: Path) -> tuple[Table, Table | None]:
    groups: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "": []}
    for file in sorted(folder.iterdir()):
        if file.suffix in READERS and file.is_file() and not file.name.startswith("."):
            groups[split_of(file.name)].append(file)
    train = groups["train"] or groups[""]
    if not train:
        raise ValueError(f"{folder}: the folder holds no {', '.join(READERS)} file to train on")
    for files in (train, groups["val"]):
        if len({file.suffix for file in files}) > 1:
            raise ValueError(
                f"{folder} holds {', '.join(file.name for file in files)}, files of several kinds: name one with "
                "--data, and one to validate on with --validation_data"
            )
    return _read_files(train), _read_files(groups["val"]) if groups["val"] else None


def _read_files(files: list[Path]) -> Table:
    """Reads files that have the same columns into one table."""
    columns: dict[str, list] = {}
    parts, version = [], ""
    for file in files:
        if file.suffix not in READERS:
            raise ValueError(f"{file}: expected a file of the kind {', '.join(READERS)}")
        try:
            rows, version = READERS[file.suffix](file)
        except (UnicodeDecodeError, csv.Error, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read ({error}): it is damaged or not what its name says") from error
        if not rows:
            raise ValueError(f"{file} has no rows")
        names = list(rows[0])
        if parts and set(names) != set(columns):
            raise ValueError(f"{file} has the columns {sorted(names)}, but {parts[0][0]} has {sorted(columns)}")
        for number, row in enumerate(rows, start=1):
            if row.keys() != rows[0].keys():
                raise ValueError(f"{file}, row {number}: has the fields {sorted(row)}, but row 1 has {sorted(names)}")
        for name in names:
            columns.setdefault(name, []).extend(row[name] for row in rows)
        parts.append((str(file), len(rows)))
    return Table(columns, parts, version=version)


def _read_csv(path: Path) -> tuple[list[dict], str]:
    """Reads a file of values separated by commas, or by tabs as in GLUE, where a quote is a normal character."""
    is_tabbed = path.suffix == ".tsv"
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tabbed else {"strict": True}
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(sys.maxsize)  # the default refuses fields of 131,072 characters
        lines = csv.reader(file, **form)
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: two columns have the same name, of {header}; rename one")
        rows = []
        for number, line in enumerate(filter(None, lines), start=1):
            if len(line) != len(header):
                raise ValueError(f"{path}, row {number}: {len(line)} fields, but the header has {len(header)}")
            rows.append(dict(zip(header, line, strict=True)))
    return rows, ""


def _read_json(path: Path) -> tuple[list[dict], str]:
    """Reads a list of objects, an object with such a list as "data" (SQuAD's files), or an object on each line."""
    text = path.read_text(encoding="utf-8-sig")
    version = ""
    try:
        rows = json.loads(text)
    except ValueError:
        rows = [_json_line(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        if isinstance(rows, dict) and isinstance(rows.get("data"), list):
            version = str(rows.get("version", ""))
            rows = [row for entry in rows["data"] for row in _squad_rows(entry)]
        elif isinstance(rows, dict):
            rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected JSON objects, one a row")
    return rows, version


def _json_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _squad_rows(entry: dict) -> list[dict]:
    """Turns SQuAD's nested form, article > paragraph > question, into rows; a flat row stays as it is."""
    if not isinstance(entry, dict) or "paragraphs" not in entry:
        return [entry]
    return [
        {name: question.get(name) for name in ("id", "question", "answers")} | {"context": paragraph["context"]}
        for paragraph in entry["paragraphs"]
        for question in paragraph["qas"]
    ]


def _read_parquet(path: Path) -> tuple[list[dict], str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist(), ""
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or not what its name says") from error


def _read_conll(path: Path) -> tuple[list[dict], str]:
    """Reads a word and its tag, in the last column, from each line; an empty line ends a sentence."""
    rows: list[dict] = []
    words, tags = [], []
    for number, line in enumerate([*path.read_text(encoding="utf-8-sig").splitlines(), ""], start=1):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2:
                raise ValueError(f"{path}, line {number}: expected a word and its tag, found {line!r}")
            words.append(fields[0])
            tags.append(fields[-1])
        elif words:
            rows.append({"tokens": words, "ner_tags": tags})
            words, tags = [], []
    return rows, ""


# Each returns the rows of a file and, for SQuAD's files, the version of their format.
READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_conll,
    ".conll": _read_conll,
}
