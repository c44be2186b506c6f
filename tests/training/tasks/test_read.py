"""From files and Hub data sets to what a model reads, and what is refused on the way."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from training.data.tables import read_tables
from training.tasks.batches import collate
from training.tasks.read import BENCHMARKS, read_task
from training.text.tokenizer import make_tokenizer
from training.text.tokens import IGNORED_LABEL

REVIEWS = [("a fine day, NA", "good"), ("a bad day", "bad"), ('"so so"', "good"), ("", "bad")]
PAIRS = [
    {"sentence1": "rain", "sentence2": "wet", "label": 1},
    {"sentence1": "rain", "sentence2": "dry", "label": 0},
    {"sentence1": "sun", "sentence2": "dry", "label": 1},
]
TAGGED = [
    {"tokens": ["Ada", "Lovelace", "met", "Bob"], "ner_tags": ["B-PER", "I-PER", "O", "B-PER"]},
    {"tokens": ["London", "calling"], "ner_tags": ["B-LOC", "O"]},
    {"tokens": [], "ner_tags": []},
]
CONTEXT = "Ada Lovelace was born in London. She wrote the first program in 1843."
QUESTIONS = [
    {"id": "1", "question": "Who?", "context": CONTEXT, "answers": {"text": ["Ada"], "answer_start": [0]}},
    {"id": "2", "question": "When?", "context": CONTEXT, "answers": {"text": ["1843"], "answer_start": [64]}},
]


def write_csv(path, rows=REVIEWS, header=("text", "label")):
    quoted = [['"' + value.replace('"', '""') + '"' for value in row] for row in [header, *rows]]
    path.write_text("\n".join(map(",".join, quoted)) + "\n", encoding="utf-8")
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows))
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def both(kind, path, **options):
    """The task with all the file's rows to train on and to validate on."""
    return read_task(kind, str(path), validation_data=str(path), **options)


def tokenizer_of(task, size=200):
    return make_tokenizer("wordpiece", task.corpus(), size, context_length=64)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "write, name", [(write_json, "a.json"), (write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")]
)
def test_every_format_gives_the_same_rows(tmp_path, write, name):
    task = both("pair", write(tmp_path / name, PAIRS))
    assert task.train == [
        {"text": "rain", "pair": "wet", "label": "1"},
        {"text": "rain", "pair": "dry", "label": "0"},
        {"text": "sun", "pair": "dry", "label": "1"},
    ]


def test_json_lines_may_be_in_a_json_file(tmp_path):
    assert len(both("pair", write_jsonl(tmp_path / "a.json", PAIRS)).train) == 3


def test_a_csv_file_is_read_as_it_is_written(tmp_path):
    task = both("classify", write_csv(tmp_path / "a.csv"))
    assert [(example["text"], example["label"]) for example in task.train] == REVIEWS


def test_a_tsv_file_is_glues_a_quote_is_a_character(tmp_path):
    (tmp_path / "a.tsv").write_text('\ufefftext\tlabel\n" an open quote\t1\nnone\t0\n', encoding="utf-8")
    assert both("classify", tmp_path / "a.tsv").train[0]["text"] == '" an open quote'


def test_conll_columns_are_words_and_in_the_last_one_tags(tmp_path):
    text = "-DOCSTART- -X- O O\n\nAda NNP I-NP B-PER\nLovelace NNP I-NP I-PER\n\n\nLondon NNP I-NP B-LOC\n"
    (tmp_path / "a.txt").write_text(text)
    task = both("tag", tmp_path / "a.txt")
    assert task.train == [
        {"words": ["Ada", "Lovelace"], "tags": ["B-PER", "I-PER"]},
        {"words": ["London"], "tags": ["B-LOC"]},
    ]


def test_squad_is_read_nested_and_flat(tmp_path):
    paragraph = {"context": CONTEXT, "qas": []}
    for row in QUESTIONS:
        answers = [{"text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}]
        paragraph["qas"].append({"id": row["id"], "question": row["question"], "answers": answers})
    nested = {"version": "1.1", "data": [{"title": "Ada", "paragraphs": [paragraph]}]}
    tasks = [
        both("qa", write_json(tmp_path / "nested.json", nested)),
        both("qa", write_json(tmp_path / "flat.json", {"version": "1.1", "data": QUESTIONS})),
        both("qa", write_jsonl(tmp_path / "flat.jsonl", QUESTIONS)),
    ]
    assert tasks[0].train == tasks[1].train == tasks[2].train
    assert tasks[0].train[1]["start"] == CONTEXT.index("1843")
    assert not tasks[0].unanswerable


def test_a_folder_gives_its_splits_and_leaves_the_test_out(tmp_path):
    for name, rows in {
        "train-1": REVIEWS[:2],
        "train-2": REVIEWS[2:],
        "dev": REVIEWS[:1],
        "test": [("x", "?")],
    }.items():
        write_csv(tmp_path / f"{name}.csv", rows)
    task = read_task("classify", str(tmp_path))
    assert [example["text"] for example in task.train] == [text for text, _ in REVIEWS]
    assert len(task.validation) == 1


def test_the_rows_of_several_files_keep_their_addresses(tmp_path):
    for number in (1, 2):
        write_csv(tmp_path / f"train-{number}.csv")
    table, _ = read_tables(str(tmp_path))
    assert table.where(1).endswith("train-1.csv, row 2") and table.where(5).endswith("train-2.csv, row 2")


def test_without_a_validation_part_some_rows_are_held_out_whatever_their_order(tmp_path):
    rows = [(f"text {number // 2}", str(number % 3)) for number in range(100)]  # every text twice
    one = read_task("classify", str(write_csv(tmp_path / "one.csv", rows)), validation_fraction=0.2)
    other = read_task("classify", str(write_csv(tmp_path / "other.csv", rows[::-1])), validation_fraction=0.2)
    texts = [{example["text"] for example in split} for split in (one.train, one.validation)]
    assert not texts[0] & texts[1]
    assert len(one.train) + len(one.validation) == 100 and 18 <= len(one.validation) <= 22
    assert sorted(map(str, one.validation)) == sorted(map(str, other.validation))


def test_questions_on_one_context_are_held_out_together(tmp_path):
    rows = [{**QUESTIONS[0], "context": f"Ada {number // 5}"} for number in range(50)]
    task = read_task("qa", str(write_json(tmp_path / "a.json", rows)), validation_fraction=0.2)
    assert not {example["context"] for example in task.train} & {example["context"] for example in task.validation}


def test_the_fingerprint_changes_with_any_row(tmp_path):
    tasks = [
        both("classify", write_csv(tmp_path / f"{number}.csv", rows))
        for number, rows in enumerate([REVIEWS, REVIEWS, [*REVIEWS[:3], ("!", "bad")], [*REVIEWS[:3], ("", "good")]])
    ]
    fingerprints = [task.fingerprint for task in tasks]
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3


# ------------------------------------------------------------------------------------------------------ Hub data sets


@pytest.fixture
def hub(monkeypatch):
    """Data sets of the Hub by name; the name that was asked for last is in `asked`."""
    hub = SimpleNamespace(splits={}, asked=None)

    def load_dataset(name, config=None, streaming=False):
        hub.asked = (name, config)
        if not hub.splits:
            raise FileNotFoundError(f"no {name}")
        return datasets.DatasetDict(hub.splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def dataset(columns, **features):
    plain = datasets.Dataset.from_dict(columns)
    return plain.cast(datasets.Features({**plain.features, **features}))


GLUE_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "mnli-mm": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@pytest.mark.parametrize("name", GLUE_COLUMNS)
def test_glue_tasks_have_their_columns_names_and_measure(hub, name):
    columns = {column: [f"{column} {row}" for row in range(3)] for column in GLUE_COLUMNS[name]}
    columns |= {"idx": [0, 1, 2], "label": [1.5, 2.0, 0.0] if name == "stsb" else [1, 0, 1]}
    classes = {} if name == "stsb" else {"label": datasets.ClassLabel(names=["no", "yes"])}
    split = dataset(columns, **classes)
    validation = {"mnli": "validation_matched", "mnli-mm": "validation_mismatched"}.get(name, "validation")
    hub.splits = {"train": split, validation: split}

    task = read_task(BENCHMARKS[name].kind, name)
    assert hub.asked == ("nyu-mll/glue", name.removesuffix("-mm"))
    assert task.texts(task.validation[1]) == [f"{column} 1" for column in GLUE_COLUMNS[name]]
    assert task.label_names == (["label"] if name == "stsb" else ["no", "yes"])
    assert task.train[0]["label"] == (1.5 if name == "stsb" else "yes")
    measures = task.measure(task.train, [task.reference(example) for example in task.train])
    assert task.monitor.removeprefix("eval_") in measures
    assert measures[task.monitor.removeprefix("eval_")] == pytest.approx(1.0)


def test_conll_2003_has_its_tags_by_name_even_where_the_data_set_only_has_numbers(hub):
    hub.splits = {"train": dataset({"tokens": [["EU", "rejects"]], "ner_tags": [[3, 0]]})}
    hub.splits["validation"] = hub.splits["train"]
    assert read_task("tag", "conll2003").train == [{"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]}]


def test_tags_are_called_as_the_data_set_calls_them(hub):
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-X", "I-X"]))
    hub.splits = {"train": dataset({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, ner_tags=tags)}
    hub.splits["validation"] = hub.splits["train"]
    task = read_task("tag", "someone/tags:german")
    assert hub.asked == ("someone/tags", "german")
    assert (task.label_names, task.train[0]["tags"]) == (["O", "B-X", "I-X"], ["O", "B-X"])


@pytest.mark.parametrize("name, unanswerable", [("squad", False), ("squad_v2", True)])
def test_only_squad_v2_has_questions_without_an_answer(hub, name, unanswerable):
    columns = {field: [row[field] for row in QUESTIONS] for field in QUESTIONS[0]}
    hub.splits = {"train": dataset(columns), "validation": dataset(columns)}
    task = read_task("qa", name)
    assert hub.asked == (f"rajpurkar/{name}", None)
    assert task.unanswerable == unanswerable and task.null_threshold == (0.0 if unanswerable else None)


def test_a_name_that_is_nothing_is_refused(hub):
    with pytest.raises(ValueError, match="'someone/nothing' is no local file or folder, and as a Hub data set"):
        read_task("classify", "someone/nothing")
    hub.splits = {"test": dataset({"text": ["a"], "label": [0]})}
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        read_task("classify", "someone/nothing")


def test_a_benchmark_is_refused_for_another_task():
    with pytest.raises(ValueError, match="mrpc is a data set for --task pair, not classify"):
        read_task("classify", "mrpc")


@pytest.mark.parametrize("option", ["validation_data", "text_column", "pair_column", "label_column"])
@pytest.mark.parametrize("kind, data", [("pair", "mrpc"), ("classify", "embedded")])
def test_data_with_a_name_of_its_own_knows_its_columns_and_its_validation_part(kind, data, option):
    with pytest.raises(ValueError, match=f"{option}: --data {data} has its own; leave --{option} out"):
        read_task(kind, data, **{option: "x"})


def test_without_any_data_docstrings_are_told_apart_by_their_package_offline(hub):
    task = read_task("classify", "embedded")
    assert hub.asked is None
    assert len(task.label_names) == len({example["label"] for example in task.validation}) == 10
    assert "asyncio" in task.label_names and len(task.train) > 1000 and task.license == "PSF-2.0"
    assert not {example["text"] for example in task.train} & {example["text"] for example in task.validation}


@pytest.mark.parametrize("kind", ["pair", "regress", "tag", "qa"])
def test_there_are_embedded_data_to_classify_only(kind):
    with pytest.raises(ValueError, match=f"no embedded data for --task {kind}: name some with --data"):
        read_task(kind, "embedded")


@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_the_numbers_of_a_hub_data_set_are_numbers_even_where_its_names_are_others(hub, kind):
    classes = datasets.ClassLabel(names=["1", "2", "3", "4", "5"])
    if kind == "classify":
        split = dataset({"text": list("abcde"), "label": [0, 1, 2, 3, 4]}, label=classes)
    else:
        split = dataset({"tokens": [list("abcde")], "ner_tags": [[0, 1, 2, 3, 4]]}, ner_tags=datasets.List(classes))
    hub.splits = {"train": split, "validation": split}
    task = read_task(kind, "someone/stars")
    labels = [example["label"] for example in task.train] if kind == "classify" else task.train[0]["tags"]
    assert labels == ["1", "2", "3", "4", "5"]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "kind, rows, options, message",
    [
        ("classify", [{"body": "a", "label": 0}], {}, r"one of \['body', 'label'\] with --text_column"),
        ("classify", [{"text": "a", "sentence": "b", "label": 0}], {}, r"2 of the usual names"),
        ("classify", PAIRS, {"text_column": "body"}, r"no column 'body'; choose one of .*'sentence1'.* --text_column"),
        ("pair", PAIRS, {"label_column": "gold"}, r"no column 'gold'; choose one of \['label', .* --label_column"),
        ("pair", PAIRS, {"text_column": "sentence1"}, "--text_column and --pair_column"),
        ("pair", [{"a": "x", "b": "y", "label": 0}], {}, "--text_column and --pair_column"),
        ("classify", [{"text": 3, "label": 0}, {"text": "a", "label": 1}], {}, "row 1: 'text' holds int, not text"),
        ("classify", [{"text": "\ud800", "label": 0}, {"text": "a", "label": 1}], {}, "row 1: 'text' is not valid"),
        ("classify", [{"text": "a", "label": 0}, {"text": "b", "label": 0}], {}, "several different labels"),
        ("classify", [{"text": "a", "label": None}, *PAIRS], {}, r"row 2: has the fields"),
        ("pair", [*PAIRS, {**PAIRS[0], "label": None}], {}, r"row 4: label None is none of the 2 classes: 0, 1"),
        ("pair", [*PAIRS, {**PAIRS[0], "label": -1}], {"label_names": ["no", "yes"]}, "row 4: label -1 is none of"),
        ("pair", [*PAIRS, {**PAIRS[0], "label": 2}], {"label_names": ["no", "yes"]}, "row 4: label 2 is none of"),
        (
            "pair",
            [*PAIRS, {**PAIRS[0], "label": ["x", "y"]}],
            {},
            r"row 4: 'label' must hold single labels, .*\['x', 'y'\]",
        ),
        ("tag", [*TAGGED, {"tokens": ["a"], "ner_tags": [{"a": 1}]}], {}, "row 4: 'ner_tags' must hold single labels"),
        ("regress", [*PAIRS, {**PAIRS[0], "label": [1]}], {}, r"row 4: 'label' must be a finite number, not \[1\]"),
        ("regress", [*PAIRS, {**PAIRS[0], "label": "NaN"}], {}, "row 4: 'label' must be a finite number, not 'NaN'"),
        ("regress", [*PAIRS, {**PAIRS[0], "label": "many"}], {}, "row 4: 'label' must be a finite number, not 'many'"),
        ("tag", [{"tokens": ["a", "b"], "ner_tags": ["O"]}, *TAGGED], {}, "row 1: 2 words, but 1 tags"),
        ("tag", [{"tokens": "a b", "ner_tags": ["O"]}, *TAGGED], {}, "row 1: 'tokens' must be a list"),
        ("qa", [{**QUESTIONS[0], "answers": {"text": [], "answer_start": []}}], {}, "no answer; give --unanswerable"),
        ("qa", [{**QUESTIONS[0], "answers": {"text": ["x"]}}], {}, "row 1: 'answers' must be"),
        ("qa", [{**QUESTIONS[0], "answers": "Bob"}], {}, "no question is left to train on"),
        (
            "qa",
            [{**QUESTIONS[0], "answers": [{"text": "Ada", "answer_start": "0"}]}],
            {},
            "row 1: answer_start in 'answers' must be a whole number, not '0'",
        ),
        ("tag", [{"tokens": ["a", "b"], "ner_tags": 3}, *TAGGED], {}, "row 1: 'ner_tags' must be a list"),
    ],
)
def test_a_mistake_in_the_data_is_named_with_its_row(tmp_path, kind, rows, options, message):
    path = write_json(tmp_path / "rows.json", rows)
    with pytest.raises(ValueError, match=message) as caught:
        both(kind, path, **options)
    is_in_the_file = (kind, set(options)) != ("pair", {"text_column"})  # what is wrong there are the options
    assert ("rows.json" in str(caught.value)) == is_in_the_file


def test_a_label_that_only_validation_has_is_refused(tmp_path):
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "dev.csv", [("text", "good"), ("text", "middling")])
    with pytest.raises(ValueError, match=r"dev\.csv, row 2: label 'middling' is none of the 2 classes: bad, good"):
        read_task("classify", str(tmp_path))


def test_a_number_is_no_name_where_labels_are_names(tmp_path):
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "dev.csv", [("text", "0")])
    with pytest.raises(ValueError, match="label '0' is none of"):
        read_task("classify", str(tmp_path))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,label\na,b,c\n", "row 1: 3 fields, but the header has 2"),
        ("a.csv", 'text,label\n"a,1\n', "cannot be read"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.tsv", b"text\tlabel\n\xff\t1\n", "cannot be read"),
        ("a.json", '{"text": "a"', "line 1: not valid JSON"),
        ("a.json", "[1, 2]", "expected JSON objects"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"', "line 2: not valid JSON"),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "cannot be read"),
        ("a.json", '{"data": [{"paragraphs": 3}]}', "cannot be read"),
        ("a.json", '{"data": [{"paragraphs": [{"context": "a", "qas": ["b"]}]}]}', "cannot be read"),
        ("a.csv", "text,label,text\na,1,b\n", r"two columns have the same name, of \['text', 'label', 'text'\]"),
        ("a.parquet", b"PAR1 and nothing", "cannot be read"),
        ("a.conll", "Ada B-PER\nLovelace\n", "line 2: expected a word and its tag"),
        ("a.xlsx", "", "expected a file of the kind"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        both("classify", path)
    assert name in str(caught.value)


def test_a_field_of_a_csv_file_may_be_long(tmp_path):
    task = both("classify", write_csv(tmp_path / "a.csv", [("x" * 200_000, "good"), ("y", "bad")]))
    assert len(task.train[0]["text"]) == 200_000


def test_a_folder_without_a_clear_choice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no .csv"):
        read_task("classify", str(tmp_path))
    write_csv(tmp_path / "train.csv")
    (tmp_path / "train.tsv").write_text("text\tlabel\na\t1\n")
    with pytest.raises(ValueError, match=r"train\.csv, train\.tsv, files of several kinds.* --validation_data"):
        read_task("classify", str(tmp_path))
    with pytest.raises(ValueError, match=r"no such file or folder: \./nowhere"):
        read_task("classify", "./nowhere")
    with pytest.raises(ValueError, match="no such file: --validation_data nowhere"):
        read_task("classify", str(tmp_path / "train.csv"), validation_data="nowhere")


def test_nothing_can_be_held_out_of_one_text(tmp_path):
    with pytest.raises(ValueError, match="too few different rows"):
        read_task("classify", str(write_csv(tmp_path / "a.csv", [("same", "a"), ("same", "b")])))


# -------------------------------------------------------------------------------------------------- labels and rows


@pytest.mark.parametrize(
    "labels, names",
    [
        (["b", "a", "B"], ["B", "a", "b"]),
        ([10, 9, -1], ["-1", "9", "10"]),
        (["10", "9", "2"], ["2", "9", "10"]),
        ([1.0, 0.0, 1.0], ["0", "1"]),
        ([True, False, True], ["False", "True"]),
    ],
)
def test_classes_are_the_labels_in_sorted_order(tmp_path, labels, names):
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    assert both("classify", write_json(tmp_path / "a.json", rows)).label_names == names


def test_numbers_get_the_names_that_are_given(tmp_path):
    task = both("pair", write_json(tmp_path / "a.json", PAIRS), label_names=["different", "same"])
    assert [example["label"] for example in task.train] == ["same", "different", "same"]
    assert [row["labels"] for row in task.rows(task.train, tokenizer_of(task), 64)] == [1, 0, 1]


@pytest.mark.parametrize("labels, read", [([0, 1, 2], ["1", "2", "3"]), ([1, 2, 1], ["1", "2", "1"])])
def test_labels_are_all_names_or_all_numbers_where_names_look_like_numbers(tmp_path, labels, read):
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    task = both("classify", write_json(tmp_path / "a.json", rows), label_names=["1", "2", "3"])
    assert [example["label"] for example in task.train] == read


@pytest.mark.parametrize("names", [["a", "a"], ["a"], ["a", ""]])
def test_the_names_of_classes_differ(tmp_path, names):
    with pytest.raises(ValueError, match="label_names must be several different names, not 'a"):
        both("pair", write_json(tmp_path / "a.json", PAIRS), label_names=names)


def test_a_pair_is_read_with_both_texts_and_a_batch_is_padded_to_its_longest_row(tmp_path):
    task = both("pair", write_json(tmp_path / "a.json", [*PAIRS, {**PAIRS[0], "sentence1": "rain rain rain"}]))
    tokenizer = tokenizer_of(task)
    batch = collate(task.rows(task.train, tokenizer, 64), tokenizer.pad_token_id)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (4, 7),
        "token_type_ids": (4, 7),
        "attention_mask": (4, 7),
        "labels": (4,),
    }
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] rain [SEP] wet [SEP] [PAD] [PAD]"
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [5, 5, 5, 7]


def test_regression_targets_are_numbers(tmp_path):
    task = both("regress", write_json(tmp_path / "a.json", PAIRS))
    batch = collate(task.rows(task.train, tokenizer_of(task), 64), 0)
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [1, 0, 1]


def test_long_and_empty_texts_are_counted(tmp_path):
    task = both("classify", write_csv(tmp_path / "a.csv", [*REVIEWS, ("day " * 500, "good"), ("[CLS] [SEP]", "bad")]))
    rows = task.rows(task.train, tokenizer_of(task), 16)
    assert task.notes == ["training: 1 of 6 texts are empty", "training: 1 of 6 texts were cut to 16 tokens"]
    task.rows(task.validation, tokenizer_of(task), 16, "validation")
    assert task.notes[2:] == ["validation: 1 of 6 texts are empty", "validation: 1 of 6 texts were cut to 16 tokens"]
    assert max(len(row["input_ids"]) for row in rows) == 16 and len(rows[3]["input_ids"]) == 2


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_first_token_of_a_word_has_its_tag(tmp_path, kind):
    task = both("tag", write_json(tmp_path / "a.json", TAGGED))
    tokenizer = make_tokenizer(kind, task.corpus(), 300, context_length=64, masked=True)
    for example, row in zip(task.train, task.rows(task.train, tokenizer, 64), strict=True):
        encoding = tokenizer(" ".join(example["words"]), return_offsets_mapping=True)
        spans = [encoding["offset_mapping"][place] for place in np.flatnonzero(row["labels"] != IGNORED_LABEL)]
        text, words = " ".join(example["words"]), example["words"]
        assert row["words"] == list(range(len(words)))
        assert all(word.startswith(text[a:b]) for word, (a, b) in zip(words, spans, strict=True))
        tags = [task.label_names[label] for label in row["labels"] if label != IGNORED_LABEL]
        assert tags == example["tags"]


def test_words_behind_the_cut_are_answered_outside(tmp_path):
    task = both("tag", write_json(tmp_path / "a.json", [{"tokens": ["Ada"] * 20, "ner_tags": ["B-PER"] * 20}, *TAGGED]))
    rows = task.rows(task.train, tokenizer_of(task), 12)
    assert task.notes == ["training: 1 of 4 sentences were cut to 12 tokens; the words behind count as 'O'"]
    person = task.label_names.index("B-PER")
    predictions = [[person] * len(row["words"]) for row in rows]
    answers = task.answers(task.train, rows, predictions)
    assert answers[0] == ["B-PER"] * len(rows[0]["words"]) + ["O"] * (20 - len(rows[0]["words"]))
    assert 0 < len(rows[0]["words"]) < 20 and answers[3] == []


def test_a_word_without_a_token_is_answered_outside(tmp_path):
    rows = [{"tokens": ["", "\u200b", "Ada"], "ner_tags": ["O", "O", "B-PER"]}]
    task = both("tag", write_json(tmp_path / "a.json", rows))
    (row,) = task.rows(task.train, tokenizer_of(task), 64)
    assert task.answers(task.train, [row], [[task.label_names.index("B-PER")] * len(row["words"])])[0][2] == "B-PER"


def test_the_windows_of_a_long_context_point_at_the_answer_where_it_is_and_else_at_the_first_token(tmp_path):
    context = " ".join(f"word{number}" for number in range(60)) + " in 1843 she wrote"
    rows = [
        {**QUESTIONS[1], "context": context, "answers": {"text": ["1843"], "answer_start": [context.index("1843")]}}
    ]
    task = both("qa", write_json(tmp_path / "a.json", rows), stride=8)
    tokenizer = tokenizer_of(task, 400)
    windows = task.rows(task.train, tokenizer, 32)
    assert len(windows) > 2 and {window["example"] for window in windows} == {0}
    for window in windows:
        start, end = window["start_positions"], window["end_positions"]
        text = tokenizer.decode(window["input_ids"][start : end + 1])
        holds_answer = "1843" in tokenizer.decode(window["input_ids"])
        assert (text == "1843") if holds_answer else (start, end) == (0, 0)
    logits = [np.zeros((len(window["input_ids"]), 2), np.float32) for window in windows]
    for window, scores in zip(windows, logits, strict=True):
        if window["start_positions"]:
            scores[window["start_positions"], 0] = scores[window["end_positions"], 1] = 5.0
    assert task.answers(task.train, windows, logits) == ["1843"]


def test_an_answer_at_the_wrong_place_is_found_and_one_that_is_nowhere_is_named(tmp_path):
    rows = [
        {**QUESTIONS[0], "answers": {"text": ["London"], "answer_start": [3]}},
        {**QUESTIONS[0], "answers": {"text": ["Paris"], "answer_start": [3]}},
        {**QUESTIONS[0], "answers": [{"text": "1843", "answer_start": 64}]},
        {**QUESTIONS[0], "answers": "Ada"},
    ]
    path = write_json(tmp_path / "a.json", [{**row, "question": f"{n}"} for n, row in enumerate(rows)])
    task = both("qa", path)
    assert [example["start"] for example in task.train] == [CONTEXT.index("London"), 64, 0]
    assert len(task.validation) == 4  # the measure needs no place
    assert task.notes == [
        f"{split}: 1 of 4 answers are not in their context, {outcome}: 'Paris' ({path}, row 2)"
        for split, outcome in (("training", "and not trained on"), ("validation", "where the model looks for them"))
    ]


def test_the_first_of_several_answers_that_is_in_the_context_is_trained_on(tmp_path):
    answers = {"text": ["in Paris", "in London", "London"], "answer_start": [5, 7, 25]}
    (example,) = both("qa", write_json(tmp_path / "a.json", [{**QUESTIONS[0], "answers": answers}])).train
    assert CONTEXT[example["start"] : example["end"]] == "in London"


def test_spaces_around_an_answer_are_not_part_of_it(tmp_path):
    context = "London is where"
    rows = [{**QUESTIONS[0], "context": context, "answers": {"text": [" where "], "answer_start": [9]}}]
    task = both("qa", write_json(tmp_path / "a.json", rows))
    assert task.train[0]["answers"] == [("where", 10)]
    tokenizer = tokenizer_of(task)
    (window,) = task.rows(task.train, tokenizer, 64)
    assert tokenizer.decode(window["input_ids"][window["start_positions"] : window["end_positions"] + 1]) == "where"


def test_a_question_of_squad_v2_may_have_no_answer(tmp_path):
    nothing = {"text": [], "answer_start": []}
    rows = {"version": "v2.0", "data": [*QUESTIONS, {**QUESTIONS[0], "answers": nothing}]}
    task = both("qa", write_json(tmp_path / "a.json", rows))
    assert task.unanswerable and task.train[2]["answers"] == []
    row = task.rows(task.train, tokenizer_of(task), 64)[2]
    assert (row["start_positions"], row["end_positions"]) == (0, 0)
    assert task.measure(task.train, ["Ada", "1843", ""])["no_answer_accuracy"] == 1.0
    assert "-> no answer (labelled no answer)" in task.show(task.train[2], "")


def test_no_answer_has_to_win_by_the_threshold_that_is_given(tmp_path):
    path = write_json(tmp_path / "a.json", {"version": "1.1", "data": QUESTIONS})
    task = both("qa", path, unanswerable=True, null_threshold=3.0)
    windows = task.rows(task.train, tokenizer_of(task), 64)
    logits = [np.zeros((len(window["input_ids"]), 2), np.float32) for window in windows]
    for window, scores, lead in zip(windows, logits, (2.0, 4.0), strict=True):
        scores[window["start_positions"], 0] = scores[window["end_positions"], 1] = 5.0
        scores[0] = 5.0 + lead / 2
    assert task.answers(task.train, windows, logits) == ["Ada", ""]
    with pytest.raises(ValueError, match="null_threshold: every question of this data has an answer"):
        both("qa", path, null_threshold=3.0)
