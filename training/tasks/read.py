"""Reads the task that `--task` and `--data` name.

task = read_task("pair", "mrpc")  # GLUE's, SQuAD and CoNLL 2003 by name; or a file, a folder, a Hub data set
task.train[0]  # {"text": "Amrozi accused ...", "pair": "Referring to ...", "label": "equivalent"}
"""

from pathlib import Path
from typing import NamedTuple

from training.data.tables import Table, read_embedded, read_hub, read_tables
from training.tasks.classification import RegressionTask, TaggingTask, TextTask
from training.tasks.questions import QuestionTask
from training.tasks.task import Columns, Task

TASKS = {"classify": TextTask, "pair": TextTask, "regress": RegressionTask, "tag": TaggingTask, "qa": QuestionTask}


class Benchmark(NamedTuple):
    """A data set of the literature: its name on the Hub, its columns, and the measure that counts."""

    kind: str
    hub: str
    columns: Columns
    monitor: str
    validation_split: str = "validation"
    label_names: list[str] | None = None


def _glue(kind: str, name: str, text: str, pair: str | None, monitor: str = "accuracy", **more) -> Benchmark:
    return Benchmark(kind, f"nyu-mll/glue:{name}", Columns(text, pair, "label"), f"eval_{monitor}", **more)


def _squad(name: str) -> Benchmark:
    return Benchmark("qa", f"rajpurkar/{name}", Columns("question", "context", "answers"), "eval_f1")


CONLL_TAGS = ["O", *(f"{place}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for place in "BI")]

# Wang et al. 2018 (GLUE, with the measures of its table 1), Rajpurkar et al. 2016 and 2018, Tjong Kim Sang and De
# Meulder 2003.
BENCHMARKS = {
    "cola": _glue("classify", "cola", "sentence", None, "matthews_correlation"),
    "sst2": _glue("classify", "sst2", "sentence", None),
    "mrpc": _glue("pair", "mrpc", "sentence1", "sentence2", "f1"),
    "stsb": _glue("regress", "stsb", "sentence1", "sentence2", "pearson"),
    "qqp": _glue("pair", "qqp", "question1", "question2", "f1"),
    "mnli": _glue("pair", "mnli", "premise", "hypothesis", validation_split="validation_matched"),
    "mnli-mm": _glue("pair", "mnli", "premise", "hypothesis", validation_split="validation_mismatched"),
    "qnli": _glue("pair", "qnli", "question", "sentence"),
    "rte": _glue("pair", "rte", "sentence1", "sentence2"),
    "wnli": _glue("pair", "wnli", "sentence1", "sentence2"),
    "squad": _squad("squad"),
    "squad_v2": _squad("squad_v2"),
    "conll2003": Benchmark(
        "tag", "lhoestq/conll2003", Columns("tokens", None, "ner_tags"), "eval_f1", label_names=CONLL_TAGS
    ),
}

# The usual names of columns. One is taken only if the data has exactly one of them.
TEXTS = ("sentence", "text")
PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
LABELS = {
    "classify": ("label",),
    "pair": ("label",),
    "regress": ("label", "score"),
    "tag": ("ner_tags", "ner", "tags"),
    "qa": ("answers",),
}


def read_task(
    kind: str,
    data: str,
    *,
    validation_data: str | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    label_names: list[str] | None = None,
    validation_fraction: float = 0.1,
    unanswerable: bool = False,
    **options,
) -> Task:
    """Reads the examples of a task.

    Args:
        kind: "classify", "pair", "regress", "tag" or "qa".
        data: one of `BENCHMARKS`, "embedded" (to classify), or what `tables.read_tables` reads.
        validation_data: a file to validate on. `BENCHMARKS` and "embedded" have their own, and their own columns.
        text_column, pair_column, label_column: names of columns; for "qa" the question, the context and the answers.
            None: the usual names.
        label_names: the classes in the order of their ids.
        validation_fraction: the part to hold out where the data has no validation split.
        unanswerable: for "qa", whether a question may have no answer; data that says so itself needs no option.
        **options: options of the task's class.

    Raises:
        ValueError: something is missing, ambiguous or out of range; the message names file and row.
    """
    benchmark = None if Path(data).exists() else BENCHMARKS.get(data)
    monitor = None
    if benchmark is not None or data == "embedded":
        chosen = {"validation_data": validation_data, "text_column": text_column, "pair_column": pair_column}
        for name, value in {**chosen, "label_column": label_column}.items():
            if value is not None:
                raise ValueError(f"{name}: --data {data} has its own; leave --{name} out")
    if benchmark is not None:
        if kind != benchmark.kind:
            raise ValueError(f"{data} is a data set for --task {benchmark.kind}, not {kind}")
        train, validation = read_hub(benchmark.hub, benchmark.validation_split)
        columns, monitor = benchmark.columns, benchmark.monitor
        label_names = label_names or benchmark.label_names
        source = benchmark.hub
    elif data == "embedded":
        if kind != "classify":
            raise ValueError(f"there is no embedded data for --task {kind}: name some with --data")
        train, validation, columns = read_embedded(), None, Columns("text", None, "label")
        source = train.parts[0][0]
    else:
        train, validation = read_tables(data, validation_data)
        columns = choose_columns(kind, train, Columns(text_column, pair_column, label_column))
        source = Path(data).resolve().name if Path(data).exists() else data
    if kind == "qa":
        options["unanswerable"] = unanswerable or train.version.lstrip("v").startswith("2") or data == "squad_v2"
    else:
        options["label_names"] = label_names
    task = TASKS[kind](train, validation, columns, source=source, validation_fraction=validation_fraction, **options)
    task.monitor = monitor or task.monitor
    return task


def choose_columns(kind: str, table: Table, given: Columns) -> Columns:
    """Chooses the columns of a task: the given ones, and for the others the one usual name that the table has.

    Raises:
        ValueError: no column has a usual name, or several have; the message lists the columns of the table.
    """

    def is_there(names) -> bool:
        return {names} <= table.columns.keys() if isinstance(names, str) else table.columns.keys() >= set(names)

    def choose(name: str | None, usual: tuple, option: str):
        if name is not None:
            return name
        there = [names for names in usual if is_there(names)]
        if len(there) == 1:
            return there[0]
        raise ValueError(
            f"{table.parts[0][0]}: which column is it? Choose one of {sorted(table.columns)} with --{option} "
            f"({len(there)} of the usual names {usual} are there)"
        )

    text, pair, label = given
    if kind == "tag":
        text = choose(text, ("tokens", "words"), "text_column")
    elif kind == "qa":
        text, pair = choose(text, ("question",), "text_column"), choose(pair, ("context",), "pair_column")
    elif kind == "classify":
        text, pair = choose(text, TEXTS, "text_column"), None
    elif text is None and pair is None:
        if kind == "regress" and not any(map(is_there, PAIRS)):
            text = choose(None, TEXTS, "text_column")
        else:
            text, pair = choose(None, PAIRS, "text_column and --pair_column")
    elif text is None or (pair is None and kind == "pair"):
        raise ValueError("a pair has two columns: name them with --text_column and --pair_column")
    return Columns(text, pair, choose(label, LABELS[kind], "label_column"))
