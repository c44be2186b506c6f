"""What the scripts that pre-train refuse before the first step, what makes one run another, and a whole run of BERT."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from tests.training.corpora import LINES, write_jsonl, write_text
from training import train_bert, train_gpt
from training.data.documents import read_documents, stream_corpus
from training.text.tokenizer import make_tokenizer
from training.train_bert import BertArguments, Validation

SCRIPTS = {
    train_bert: ["--model=bert-tiny", "--config=hidden_size=16,num_attention_heads=2", "--row_length=16"],
    train_gpt: ["--model=gpt-tiny", "--config=hidden_size=16,num_attention_heads=2", "--context_length=16"],
}
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.split(".")[-1])


def run(script, folder, monkeypatch, *options):
    """The identity of the run that the script would train."""
    started = {}

    def train(args, accelerator, model, data, evaluate, identity, **_):
        started.update(identity)
        raise SystemExit("trained")

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(sys, "argv", ["train", *SCRIPTS[script], f"--output_dir={folder}", *options])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert started or ended.value.code == 2
    return started


@by_script
def test_what_a_run_starts_from_is_part_of_its_identity(script, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "lines.jsonl", LINES)
    identity = run(script, tmp_path / "run", monkeypatch, f"--data={data}", "--vocab_size=300")
    assert identity["start"] == SCRIPTS[script][0].removeprefix("--model=")


@by_script
def test_a_stream_that_is_too_short_is_refused_with_one_line(script, tmp_path, monkeypatch, capsys):
    whole = read_documents(write_jsonl(tmp_path / "lines.jsonl", LINES))
    make_tokenizer("bpe", whole, 300, context_length=16, masked=script is train_bert).save_pretrained(tmp_path / "bpe")
    short = datasets.Dataset.from_dict({"text": [*LINES[:5], "a"]}).to_iterable_dataset()
    monkeypatch.setattr(script, "read_documents", lambda *_, **__: stream_corpus(short, source="s", num_held_out=5))
    assert not run(script, tmp_path / "run", monkeypatch, f"--tokenizer={tmp_path / 'bpe'}")
    said = "error: a row of 16 tokens (context_length or row_length) needs 17, but the stream 's' has 2"
    assert said in capsys.readouterr().err


TOWNS = ["London", "Deptford", "Chatham", "Portsmouth", "Greenwich"]
DIARY = "".join(
    f"He went to {TOWNS[n % 5]} and then home to {TOWNS[n % 3]} very late on day {n}.\n" for n in range(400)
)
WITHOUT_PAIRS = ["--no-next_sentence", "--whole_words", "--tokenizer=bpe"]


@pytest.mark.parametrize("options", [[], WITHOUT_PAIRS], ids=["defaults", "without pairs"])
def test_a_run_ends_with_its_measures_and_lines_that_fill_a_mask(options, tmp_path, monkeypatch):
    given = {
        "data": write_text(tmp_path / "diary.txt", DIARY),
        "validation_fraction": 0.2,
        "output_dir": tmp_path / "run",
        "config": "hidden_size=32,num_attention_heads=2,num_hidden_layers=2",
        "vocab_size": 400,
        "row_length": 64,
        "max_steps": 4,
        "warmup_steps": 1,
        "eval_every": 2,
        "scored_rows": 1,
    }
    given = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["train_bert.py", *given, *options])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_bert.main()
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    losses = [results[f"eval_{name}_loss"] for name in ("masked", "next_sentence") if f"eval_{name}_loss" in results]
    assert results["eval_loss"] == pytest.approx(sum(losses)) and len(losses) == (1 if options else 2)
    accuracies = [results[name] for name in results if name.endswith("_accuracy")]
    assert len(accuracies) == len(losses) and all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert 1 < results["eval_pseudo_perplexity"] < 1000
    sample = results["sample"].splitlines()
    assert len(sample) == 20 and all("[MASK]" in line for line in sample[::2])
    guessed = {line.split("(")[-1].rstrip(")").capitalize() for line in sample[1::2]}
    assert guessed <= {*TOWNS, "Went", "Then", "Home", "Very", "Late"}

    lines = printed.getvalue().splitlines()
    snippet = lines[next(number for number, line in enumerate(lines) if line.startswith("from transformers")) :]
    with contextlib.redirect_stdout(io.StringIO()) as filled:
        exec("\n".join(snippet), {})
    assert filled.getvalue().strip() and "[MASK]" not in filled.getvalue()


def validate(tokens, masking_tokenizer, **options):
    cache = SimpleNamespace(tokens=lambda split: np.array(tokens, np.uint16))
    args = BertArguments(row_length=16, **options)
    return Validation(args, SimpleNamespace(process_index=0, num_processes=1), masking_tokenizer, cache)


@pytest.mark.parametrize("next_sentence", [False, True])
def test_held_out_text_without_a_token_to_mask_is_refused(masking_tokenizer, next_sentence):
    unknown = masking_tokenizer.unk_token_id
    with pytest.raises(ValueError, match="the validation text has no token to mask"):
        validate([unknown] * 50, masking_tokenizer, next_sentence=next_sentence)
    validate([5, *[unknown] * 50], masking_tokenizer, next_sentence=next_sentence)


def test_a_short_held_out_text_has_a_pseudo_perplexity(masking_tokenizer):
    class Even(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = torch.nn.Parameter(torch.zeros(34))

        def forward(self, input_ids, logits_to_keep):
            return (self.scores.expand(len(input_ids), 1, -1),)

    closer = validate([5, 6, 7, 1], masking_tokenizer, scored_rows=4).look_closer(Even())
    assert closer == {"eval_pseudo_perplexity": pytest.approx(34), "sample": ""}
