"""A task of fine-tuning: its examples, the rows that a model reads, and the measures of the answers.

rows = task.rows(task.train, tokenizer, max_length=128)  # {"input_ids": (T,), ..., "labels": ...} each
batch = collate(rows[:8], tokenizer.pad_token_id)  # tensors, padded to the longest row
predictions = task.predictions(model(**batch), batch)
answers = task.answers(task.train[:8], rows[:8], predictions)
task.measure(task.train[:8], answers)  # {"accuracy": ..., "f1": ...}
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from training.data.documents import Corpus, Documents
from training.data.fingerprints import digest_of, fingerprint_of
from training.data.holdout import hold_out, key_of
from training.data.tables import Table


class Columns(NamedTuple):
    """What a data set calls the columns of a task."""

    text: str
    pair: str | None
    label: str


def chunks(examples: list, size: int = 1000) -> Iterator[list]:
    """Yields the examples in lists of at most `size`."""
    for first in range(0, len(examples), size):
        yield examples[first : first + size]


def token_arrays(encodings, number: int) -> dict[str, np.ndarray]:
    """Takes row `number` out of what a tokenizer returned."""
    names = [name for name in ("input_ids", "token_type_ids") if name in encodings]
    return {name: np.array(encodings[name][number], np.int32) for name in names}


class Task(ABC):
    """Examples to train and to validate on, and everything that depends on the kind of task.

    A subclass defines the abstract methods and the class attributes. An example is a dict of plain values in which a
    label is the name of its class. `notes` collects what a user should know about the data.

    Args:
        train: the table to train on.
        validation: the table to validate on; None: part of `train` is held out.
        columns: the columns of both tables.
        source: what to call the data on the card.
        label_names: the classes in the order of their ids; None: as the data has them.
        validation_fraction: the part to hold out.
    """

    head: str  # the head of the model: "SequenceClassification"
    pipeline: str  # the key of `snippets.USES`
    monitor: str  # the measure that decides which weights are best
    label_names: list[str] | None  # the name of each class id

    def __init__(
        self,
        train: Table,
        validation: Table | None,
        columns: Columns,
        *,
        source: str,
        label_names: list[str] | None = None,
        validation_fraction: float = 0.1,
    ):
        self.columns, self.source, self.license = columns, source, train.license
        self.notes: list[str] = []
        self.name_labels(train, label_names)
        self.train = self.examples(train)
        if validation is not None:
            self.validation = self.examples(validation, "validation")
        else:
            self.train, self.validation = split_examples(self.train, self.key, validation_fraction, train.parts[0][0])
        self.fingerprint = fingerprint_of(
            type(self).__name__, self.label_names, *(_digest(split) for split in (self.train, self.validation))
        )

    def name_labels(self, train: Table, given: list[str] | None):
        """Sets `label_names` before the first example is read. A task without classes has none."""
        self.label_names = None

    @abstractmethod
    def examples(self, table: Table, split: str = "training") -> list[dict]:
        """Turns the rows of a table into examples. Notes name the split.

        Raises:
            ValueError: a row is no example; the message names its file and number.
        """

    def key(self, example: dict) -> Any:
        """The text of an example. Examples with the same key are held out together."""
        return {name: value for name, value in example.items() if name not in ("label", "tags")}

    @abstractmethod
    def texts(self, example: dict) -> list[str]:
        """The texts of an example, which a tokenizer can be made from."""

    @abstractmethod
    def rows(self, examples: list[dict], tokenizer, max_length: int, split: str = "training") -> list[dict]:
        """Turns examples into what a model reads: at most `max_length` token ids, and labels, as arrays and numbers.

        Notes name the split.
        """

    @abstractmethod
    def predictions(self, outputs, batch: dict[str, Tensor]) -> list:
        """Takes out of a model's outputs what `answers` needs, for each row of the batch, on the CPU."""

    @abstractmethod
    def answers(self, examples: list[dict], rows: list[dict], predictions: list) -> list:
        """Makes one answer for each example, in the form of its label, from the predictions for all rows."""

    @abstractmethod
    def reference(self, example: dict):
        """The right answer."""

    @abstractmethod
    def measure(self, examples: list[dict], answers: list) -> dict[str, float]:
        """Computes the task's measures of the answers, by name."""

    @abstractmethod
    def show(self, example: dict, answer) -> str:
        """Writes an example and the answer to it for a person to read."""

    def name_classes(self, train: Table, labels: Iterable, given: list[str] | None):
        """Sets the classes, in the order of their ids.

        These are the given names, or else the data set's own, or else all labels in sorted order (whole numbers by
        size). Where names are given or the data set has its own, a label may also be the number of its class.
        """
        labels = {_spell(label) for label in labels} - {None}
        if given is not None and (len(given) < 2 or len(set(given)) < len(given) or "" in given):
            raise ValueError(f"label_names must be several different names, not {','.join(given)!r}")
        names = given or train.class_names.get(self.columns.label)
        by_number = {str(number): name for number, name in enumerate(names or [])}
        if names is None:
            names = sorted(labels, key=int if all(name.removeprefix("-").isdecimal() for name in labels) else None)
        if len(names) < 2:
            raise ValueError(
                f"{train.parts[0][0]}: column {self.columns.label!r} needs several different labels, not {names}"
            )
        by_name = {name: name for name in names}
        if not by_number.keys() & by_name.keys():
            self.class_of = by_number | by_name
        else:  # names like "1", "2", "3": one reading for the whole column; a Hub data set holds numbers
            is_name = given is not None and self.columns.label not in train.class_names and labels <= by_name.keys()
            self.class_of = by_name if is_name else by_number
        self.label_names = names

    def class_name(self, label, where: str) -> str:
        """Finds the class that a label means, by its name or number."""
        if (name := _spell(label)) in self.class_of:
            return self.class_of[name]
        shown = ", ".join(self.label_names[:20]) + (", ..." if len(self.label_names) > 20 else "")
        raise ValueError(f"{where}: label {label!r} is none of the {len(self.label_names)} classes: {shown}")

    def corpus(self) -> Corpus:
        """All texts of the task, which a tokenizer can be made from."""

        def documents(examples: list[dict]) -> Documents:
            return Documents.of(lambda: (text for example in examples for text in self.texts(example)))

        return Corpus(documents(self.train), documents(self.validation), self.fingerprint, self.source, self.license)

    def note(self, count: int, of: list, what: str, split: str):
        """Adds a note, unless the count is 0."""
        if count:
            self.notes.append(f"{split}: {count} of {len(of)} {what}")


# ------------------------------------------------------------------------------------------------ columns and labels


def text_column(table: Table, name: str, option: str) -> list[str]:
    return [as_text(value, name, table.where(row)) for row, value in enumerate(table.column(name, option))]


def list_column(table: Table, name: str, option: str) -> list[list]:
    values = table.column(name, option)
    for row, value in enumerate(values):
        if not isinstance(value, list):
            raise ValueError(f"{table.where(row)}: {name!r} must be a list, with one entry a word, not {value!r}")
    return values


def as_text(value, column: str, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} holds {type(value).__name__}, not text")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {column!r} is not valid Unicode ({error}); repair it") from error
    return value or ""


def as_label(value, column: str, where: str) -> str | float | None:
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {column!r} must hold single labels, a text or a number each, not {value!r}")
    return value


def _spell(label) -> str | None:
    """Spells a label as text, 1.0 as "1". Returns None for a missing label."""
    if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
        return None
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


# ------------------------------------------------------------------------------------------------------------ splits


def split_examples(
    examples: list[dict], key: Callable[[dict], Any], fraction: float, source: str
) -> tuple[list[dict], list[dict]]:
    """Splits examples into a part to train on and a part to validate on; see `hold_out`.

    Raises:
        ValueError: the fraction is out of range, or nothing would be left to train on.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, not {fraction}")
    is_held_out = hold_out([key_of(bytes.fromhex(_digest([key(example)]))) for example in examples], fraction)
    parts = [], []
    for example, chosen in zip(examples, is_held_out.tolist(), strict=True):
        parts[chosen].append(example)
    if not parts[0]:
        raise ValueError(f"{source}: too few different rows to hold any out; give --validation_data")
    return parts


def _digest(values: Iterable) -> str:
    return digest_of(json.dumps(value, sort_keys=True).encode() for value in values)
