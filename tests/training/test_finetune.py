"""Fine-tuning from end to end: every task, every kind of model, what a run leaves, what it refuses."""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_models
from tests.training.cards import code_of
from tests.training.tasks.test_read import CONTEXT, PAIRS, QUESTIONS, TAGGED, write_csv, write_json
from training import finetune_bert
from training.finetune_bert import FineTuningArguments, plan_steps
from training.models import create_text_model
from training.run import loop
from training.run.arguments import parse_arguments

REAL_DATA = Path(os.environ.get("HF_MODELS_TEST_DATA", "not given"), "hf_fixtures")

needs_real_data = pytest.mark.skipif(
    not REAL_DATA.exists(), reason="HF_MODELS_TEST_DATA does not name a folder with hf_fixtures"
)

# Large first weights: a tiny model then learns by heart in seconds.
TINY = "hidden_size=64,num_attention_heads=2,intermediate_size=128,norm_position=pre,initializer_range=0.1"
FAST = ["--model", "bert-tiny", "--config", TINY, "--vocab_size", "1000", "--max_length", "128", "--weight_decay", "0"]
FAST += ["--learning_rate", "3e-3", "--global_batch_size", "16"]

SENTIMENT = [(f"{how} {what}", "good" if how in ("fine", "great") else "bad")
             for how in ("fine", "great", "poor", "dull") for what in ("day", "film", "book")]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """A small file for each task."""
    return {
        "classify": write_csv(tmp_path / "reviews.csv", SENTIMENT),
        "pair": write_json(tmp_path / "pairs.json", PAIRS),
        "regress": write_json(tmp_path / "numbers.json", PAIRS),
        "tag": write_json(tmp_path / "tagged.json", TAGGED),
        "qa": write_json(tmp_path / "questions.json", {"version": "2.0", "data": [
            *QUESTIONS, {**QUESTIONS[0], "question": "Which river?", "answers": {"text": [], "answer_start": []}}
        ]}),
    }  # fmt: skip


@pytest.fixture
def finetune(tmp_path, monkeypatch):
    """Runs the script in this process and returns its results; by default it validates on what it trains on."""

    def finetune(task, path, *options, folder="run", validation_data="the same"):
        output_dir = tmp_path / folder
        argv = ["--task", task, "--data", path, *FAST]
        if validation_data is not None:
            argv += ["--validation_data", path if validation_data == "the same" else validation_data]
        argv += ["--output_dir", output_dir, "--max_steps", "40", *options]
        monkeypatch.setattr(sys, "argv", ["training/finetune_bert.py", *map(str, argv)])
        finetune_bert.main()
        return json.loads((output_dir / "eval_results.json").read_text())

    return finetune


MEASURE = {"classify": "accuracy", "pair": "accuracy", "regress": "pearson", "tag": "f1", "qa": "exact_match"}


# ----------------------------------------------------------------------------------------------------- every task


@pytest.mark.parametrize("task", MEASURE)
def test_a_task_is_learnt_and_its_snippet_runs(finetune, data, task, tmp_path):
    results = finetune(task, data[task], "--max_steps", "60")
    assert results[f"eval_{MEASURE[task]}"] >= 0.95
    assert "eval_loss" in results and "->" in results["sample"]
    assert str(tmp_path) not in json.dumps(results)  # the results are for others too
    card = (tmp_path / "run" / "README.md").read_text()
    header = card.split("---")[1]
    assert {"regress": "text-classification", "pair": "text-classification"}.get(task, results["task"]) in header
    CHECKS[task](*run_snippet(code_of(tmp_path / "run")), hf_models.ZooBertConfig.from_pretrained(tmp_path / "run"))


def run_snippet(snippet: str) -> tuple[str, dict]:
    """What it prints, and the names it sets."""
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet, names)
    return printed.getvalue(), names


def test_spaces_around_the_names_of_classes_are_not_part_of_them(finetune, data, tmp_path):
    finetune("classify", data["classify"], "--label_names", "good, bad", "--max_steps", "1")
    assert hf_models.ZooBertConfig.from_pretrained(tmp_path / "run").id2label == {0: "good", 1: "bad"}


def check_classes(names):
    def check(printed, variables, config):
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {name: number for number, name in enumerate(names)}
        assert any(repr(name) in printed for name in names)

    return check


def check_number(printed, variables, config):
    assert config.problem_type == "regression" and config.num_labels == 1 and "'label'" in printed
    rain = {"text": "rain", "text_pair": "wet"}  # not squeezed between 0 and 1, where the score of a class would be
    assert variables["classify"](rain, function_to_apply="none") == variables["classify"](rain)


def check_entities(printed, variables, config):
    assert config.id2label == {0: "B-LOC", 1: "B-PER", 2: "I-PER", 3: "O"}
    found = variables["tag"]("Ada Lovelace met Bob", aggregation_strategy="first")
    assert [(entity["entity_group"], entity["word"]) for entity in found] == [("PER", "ada lovelace"), ("PER", "bob")]


def check_answers(printed, variables, config):
    model, tokenizer = variables["model"], variables["tokenizer"]
    assert model.answer(tokenizer, "When?", CONTEXT)[0].text == "1843"
    assert model.answer(tokenizer, "Which river?", CONTEXT)[0].text == ""  # the config knows that there may be none


CHECKS = {
    "classify": check_classes(["bad", "good"]),
    "pair": check_classes(["0", "1"]),
    "regress": check_number,
    "tag": check_entities,
    "qa": check_answers,
}


FIXTURES = {
    "classify": ["MRPC/train.csv", "--text_column", "sentence2"],
    "pair": ["MRPC/train.csv"],
    "regress": ["STS-B/train.tsv"],
    "tag": ["conll/sample.json"],
    "qa": ["SQUAD/sample.json"],
}


@needs_real_data
@pytest.mark.parametrize("task", FIXTURES)
def test_real_samples_are_learnt_by_heart(finetune, task):
    name, *options = FIXTURES[task]
    results = finetune(task, REAL_DATA / name, *options, "--max_steps", "125", "--eval_every", "25")
    assert results[f"eval_{MEASURE[task]}"] >= 0.95


@needs_real_data
def test_real_folders_and_columns_are_read(finetune):
    assert (
        finetune("regress", REAL_DATA / "STS-B", "--max_steps", "2", validation_data=None)["data"]["source"] == "STS-B"
    )
    tags = (REAL_DATA / "GermEval" / "labels.txt").read_text().split()
    options = ["--label_names", ",".join(tags), "--max_steps", "2"]
    assert finetune("tag", REAL_DATA / "GermEval", *options, folder="tags", validation_data=None)["eval_recall"] < 1
    columns = ["--text_column", "#1 String", "--pair_column", "#2 String", "--label_column", "Quality"]
    finetune("pair", REAL_DATA / "MRPC" / "train.tsv", *columns, "--max_steps", "2", folder="columns")


# ------------------------------------------------------------------------------------------- models to start from


@pytest.fixture
def gpt(tmp_path, tokenizer):
    """A folder with a stock GPT-2 and a tokenizer that has no padding token."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "gpt")
    return tmp_path / "gpt"


@pytest.mark.parametrize("task", ["classify", "pair", "regress"])
def test_a_gpt_is_fine_tuned_with_the_same_script(finetune, data, gpt, task, tmp_path):
    results = finetune(task, data[task], "--model", gpt, "--config", "", "--max_steps", "80")
    assert results["family"] == "ZooGPTForSequenceClassification"
    assert results["started_from"] == ["gpt"] and results["model"] is None
    assert results[f"eval_{MEASURE[task]}"] >= 0.9
    assert "score" in run_snippet(code_of(tmp_path / "run"))[0]
    again = finetune(task, data[task], "--model", tmp_path / "run", "--config", "", "--max_steps", "2", folder="again")
    assert again[f"eval_{MEASURE[task]}"] >= 0.9  # its head came along


def test_a_gpt_answers_at_the_end_of_a_text_with_and_without_a_mask(finetune, data, gpt, tmp_path):
    finetune("classify", data["classify"], "--model", gpt, "--config", "", "--max_steps", "2")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", trust_remote_code=True).eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "run")("fine day", return_tensors="pt")
    with torch.no_grad():
        masked, plain = model(**inputs).logits, model(inputs["input_ids"]).logits
    assert torch.equal(masked, plain)


def test_a_stock_bert_is_the_start_with_its_own_tokenizer(finetune, data, tmp_path):
    finetune("classify", data["classify"], "--max_steps", "1", folder="tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    stock = transformers.BertForPreTraining(transformers.BertConfig(vocab_size=len(tokenizer), **sizes))
    stock.save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")

    finetune("classify", data["classify"], "--model", tmp_path / "stock", "--config", "", "--max_steps", "1",
             "--learning_rate", "1e-9")  # fmt: skip
    tuned = load_file(tmp_path / "run" / "model.safetensors")
    start = stock.bert.encoder.layer[0].attention.self.query.weight
    torch.testing.assert_close(tuned["bert.layers.0.attention.q_proj.weight"], start, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tokenizer.get_vocab()


@pytest.fixture
def tuned(finetune, data, tmp_path):
    """A folder with a BERT of 128 positions."""
    finetune("classify", data["classify"], "--max_steps", "1", folder="tuned")
    return tmp_path / "tuned"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--config", "intermediate_size=64"],
            r"config: bert\.layers\.0\..* of .*tuned has another size; leave its size",
        ),
        (["--config", "hiden_size=64"], r"ZooBertConfig has no field 'hiden_size'; did you mean hidden_size\?"),
        (
            ["--config", "", "--max_length", "200"],
            "max_length 200 is more than the 128 positions of .*: give at most 128",
        ),
    ],
)
def test_a_checkpoint_keeps_its_sizes(finetune, data, tuned, capsys, options, message):
    with pytest.raises(SystemExit):
        finetune("classify", data["classify"], "--model", tuned, *options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error)


def test_a_head_of_another_size_is_only_replaced_where_it_may_be(tuned):
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    options = {"device": torch.device("cpu"), "num_labels": 3}
    model_class = hf_models.ZooBertForSequenceClassification
    assert create_text_model(str(tuned), model_class, tokenizer, 16, new_head=True, **options).num_labels == 3
    with pytest.raises(ValueError, match=r"config: classifier\.bias of .* has another size"):
        create_text_model(str(tuned), model_class, tokenizer, 16, **options)


def test_a_head_of_another_size_is_replaced(finetune, data, tmp_path):
    finetune("classify", data["classify"], "--max_steps", "1")
    rows = [(f"text {number}", str(number % 3)) for number in range(6)]
    three = write_csv(tmp_path / "three.csv", rows)
    finetune("classify", three, "--model", tmp_path / "run", "--config", "", "--max_steps", "1", folder="three")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "three").config.num_labels == 3


# ------------------------------------------------------------------------------------------ the global batch, resuming


@pytest.mark.parametrize("task", MEASURE)
def test_the_loss_does_not_depend_on_the_micro_batch(finetune, data, task, tmp_path):
    def losses(size):
        folder = f"micro-{size}"
        options = ["--micro_batch_size", str(size), "--max_steps", "5", "--log_every", "1"]
        if task in ("classify", "pair", "tag"):
            options += ["--class_weights", "balanced"]
        finetune(task, data[task], *options, folder=folder)
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    assert losses(16) == pytest.approx(losses(2), abs=1e-5)


def test_a_run_that_was_cut_off_ends_with_the_same_weights(finetune, data, tmp_path, monkeypatch):
    options = ["--max_steps", "20", "--save_every", "5", "--eval_every", "4", "--config", f"{TINY},hidden_dropout=0.1"]
    finetune("classify", data["classify"], *options, folder="whole")
    step = loop.accumulate_gradients

    def cut_off(args, accelerator, model, forward, data, number, *others):
        if number == 13:
            raise InterruptedError("cut off")
        return step(args, accelerator, model, forward, data, number, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", cut_off)
        with pytest.raises(SystemExit):
            finetune("classify", data["classify"], *options)
    finetune("classify", data["classify"], *options)
    whole, resumed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_epochs_set_the_number_of_steps(finetune, data, tmp_path):
    finetune("classify", data["classify"], "--epochs", "2.5", "--global_batch_size", "4")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8  # 2.5 * 12 rows / 4


def planned(*options, num_rows=1000):
    args = parse_arguments(FineTuningArguments, ["--task", "classify", "--global_batch_size", "10", *options])
    args = plan_steps(args, num_rows)
    return args.max_steps, args.warmup_steps


def test_a_tenth_of_the_steps_warms_up_once_their_number_is_known():
    assert planned("--epochs", "2") == (200, 20)
    assert planned("--max_steps", "50") == (50, 5)
    assert planned("--epochs", "2", "--warmup_steps", "7") == (200, 7)
    with pytest.raises(ValueError, match="warmup_steps is 200, but there are only 200 steps"):
        planned("--epochs", "2", "--warmup_steps", "200")


def test_a_cooldown_is_compared_with_the_steps_of_the_epochs():
    constant = ["--schedule", "constant", "--cooldown_steps", "1500"]
    assert planned(*constant, "--epochs", "20") == (2000, 200)
    with pytest.raises(ValueError, match="cooldown_steps is 1500, more than the 100 of max_steps"):
        planned(*constant, "--epochs", "1")


def test_evaluation_measures_every_row_once_whatever_its_batches(finetune, data, monkeypatch):
    seen = []
    measure = finetune_bert.TaskValidation.results
    monkeypatch.setattr(
        finetune_bert.TaskValidation, "results", lambda self, found: seen.append(found) or measure(self, found)
    )
    results = [
        finetune("classify", data["classify"], "--max_steps", "1", "--eval_batch_size", size, folder=f"run-{size}")
        for size in ("5", "100")
    ]
    assert sorted(number for batch in seen[0] for number in batch[2]) == list(range(12))
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("classify", ["--class_weights", "1,2,3"], "must be 'balanced' or 2 positive numbers, for bad, good"),
        ("classify", ["--class_weights", "1,-2"], "positive numbers"),
        ("regress", ["--class_weights", "balanced"], "--task regress has no classes"),
        ("classify", ["--monitor", "eval_bleu"], "monitor 'eval_bleu' is not measured here, only loss, accuracy, f1"),
        ("classify", ["--max_length", "4"], "max_length must be at least 8"),
        ("classify", ["--epochs", "0"], "epochs must be above 0"),
        ("classify", ["--model", "bert-tni"], "no model named 'bert-tni' in the zoo; did you mean bert-tiny"),
        ("classify", ["--model", "/nowhere/bert"], "--model /nowhere/bert is no checkpoint that loads"),
        ("classify", ["--text_column", "words"], r"no column 'words'; choose one of \['label', 'text'\]"),
        ("tag", ["--model", "gpt-tiny", "--config", ""], r"a GPT has no head .*: start from a BERT"),
        ("qa", ["--stride", "100"], "stride must lie between 0 and half of max_length 128, not 100"),
        ("qa", ["--max_length", "16", "--stride", "4"], "max_length must be at least 24, not 16"),
        ("qa", ["--max_answer_tokens", "0"], "max_answer_tokens must be at least 1"),
        ("qa", ["--null_threshold=-inf"], "null_threshold must be a number or infinity, not -inf"),
        ("qa", ["--label_names", "a,b"], "label_names: --task qa has no classes"),
        ("regress", ["--label_names", "a,b"], "label_names: --task regress has no classes"),
        ("classify", ["--pair_column", "b"], "pair_column: --task classify reads one text"),
        ("tag", ["--pair_column", "b"], "pair_column: --task tag reads one text"),
        ("pair", ["--unanswerable"], "unanswerable belongs to --task qa"),
        ("pair", ["--stride", "0"], "stride belongs to --task qa"),
        ("pair", ["--max_answer_tokens", "5"], "max_answer_tokens belongs to --task qa"),
        ("pair", ["--null_threshold", "0"], "null_threshold belongs to --task qa"),
        ("pair", ["--label_names", "a,a"], "label_names must be several different names, not 'a,a'"),
        ("pair", ["--data", "mrpc"], "validation_data: --data mrpc has its own"),
        ("classify", ["--warmup_steps", "40"], "warmup_steps is 40, but there are only 40 steps"),
        ("guess", [], "--task must be classify or pair or regress or tag or qa"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_one_line(finetune, data, capsys, task, options, message):
    with pytest.raises(SystemExit) as ended:
        finetune(task, data.get(task, "x"), *options)
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error)


def test_a_task_has_to_be_named():
    with pytest.raises(ValueError, match="say what to learn: --task classify, pair, regress, tag or qa"):
        parse_arguments(FineTuningArguments, [])
    assert parse_arguments(FineTuningArguments, ["--task", "classify"]).data == "embedded"
