"""What a run refuses, with one line on stderr and exit code 2, and nothing overwritten; and what it may change."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import (
    TRAIN_GPT,
    assert_same_result,
    checkpoint_names,
    files,
    is_alive,
    kill,
    losses,
    wait_for,
)

pytestmark = pytest.mark.xdist_group("faults")  # see test_kill.py


def refuse(trainers, output_dir, *, env=None, **options) -> str:
    """The one line that a run is refused with."""
    run = trainers.start(output_dir, env=env, **options)
    run.wait(2)
    [line] = run.errors.splitlines()
    assert line.startswith("error: ")
    return line


# ---- a second writer ----


def test_a_second_writer_is_refused_by_the_holders_id_and_a_dead_ones_lock_is_taken(trainers, uninterrupted, tmp_path):
    holder = trainers.start(tmp_path / "run", "--fault", "stop:step:9")
    state = Path(f"/proc/{holder.pid}/stat")
    wait_for(lambda: state.read_text().rsplit(")", 1)[1].split()[0] == "T", what="the pause of the first")
    before = files(tmp_path / "run")
    for restart in ({}, {"restart": True}):
        assert f"is being written by process {holder.pid}" in refuse(trainers, tmp_path / "run", **restart)
    assert files(tmp_path / "run") == before and is_alive(holder.pid)
    kill(holder.pid)
    holder.wait(-signal.SIGKILL)
    assert str(holder.pid) in (tmp_path / "run/.lock").read_text()
    trainers.run(tmp_path / "run")
    assert_same_result(tmp_path / "run", uninterrupted())


# ---- another run ----


OTHER = {
    "seed": ({"seed": 7}, "seed: this run has 7, --output_dir holds 1337"),
    "batch": ({"global_batch_size": 4}, "global_batch_size: this run has 4, --output_dir holds 8"),
    "model": ({"config": {"hidden_size": 16}}, "model.hidden_size: this run has 16, --output_dir holds 32"),
    "dropout": ({"dropout": 0.1}, "model.hidden_dropout: this run has 0.1, --output_dir holds 0.0"),
    "optimizer": ({"optimizer": "adamw"}, "optimizer: this run has adamw, --output_dir holds muon"),
    "learning rate": ({"learning_rate": 0.1}, "learning_rate: this run has 0.1, --output_dir holds 0.003"),
    "schedule": ({"schedule": "linear"}, "schedule: this run has linear, --output_dir holds cosine"),
    "cosine's end": ({"max_steps": 30}, "max_steps: this run has 30, --output_dir holds 24"),
    "context": ({"context_length": 8}, "context_length: this run has 8, --output_dir holds 16"),
    "data": ({"validation_fraction": 0.2}, "data: this run has"),
}


@pytest.mark.parametrize("field", OTHER)
def test_another_run_in_the_folder_is_refused_naming_what_differs(trainers, stopped, field):
    options, said = OTHER[field]
    before = files(stopped)
    assert said in refuse(trainers, stopped, **options)
    assert files(stopped) == before


def test_restart_moves_the_old_run_aside(trainers, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    before = files(tmp_path / "run")
    restarted = trainers.run(tmp_path / "run", restart=True, seed=7)
    assert f"moved the earlier run to {tmp_path}/run.old-1" in restarted.output
    assert "resuming" not in restarted.output
    assert files(tmp_path / "run.old-1") == before
    assert json.loads((tmp_path / "run/run.json").read_text())["seed"] == 7


def test_logging_saving_and_micro_batch_may_change(trainers, uninterrupted, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    options = {"log_every": 1, "save_every": 2, "eval_every": 0, "keep_checkpoints": 3, "micro_batch_size": 2}
    trainers.run(tmp_path / "run", **options)
    assert checkpoint_names(tmp_path / "run") == ["step-000020", "step-000022", "step-000024"]
    assert losses(tmp_path / "run")[:6] == losses(uninterrupted())[:6]  # those of the first 18 steps


# ---- more steps ----

CONSTANT = {"schedule": "constant", "warmup_steps": 4}


def test_max_steps_may_grow_under_a_constant_schedule(trainers, tmp_path):
    trainers.run(tmp_path / "expected", **CONSTANT)
    trainers.run(tmp_path / "run", max_steps=12, **CONSTANT)
    trainers.run(tmp_path / "run", **CONSTANT)
    assert_same_result(tmp_path / "run", tmp_path / "expected")
    said = refuse(trainers, tmp_path / "run", max_steps=20, **CONSTANT)
    assert "step-000024 is already behind max_steps 20: give at least 24" in said


def test_max_steps_may_grow_only_before_the_cooldown(trainers, tmp_path):
    options = {**CONSTANT, "cooldown_steps": 6}
    trainers.run(tmp_path / "expected", max_steps=30, **options)
    for stop in (20, 18):
        run = tmp_path / str(stop)
        trainers.run(run, "--fault", f"terminate:step:{stop}", **options)
        if stop == 20:
            said = refuse(trainers, run, max_steps=30, **options)
            assert "is in the cooldown before step 24, so max_steps cannot become 30" in said
            assert "remove the checkpoints after step 18" in said
            shutil.rmtree(run / "checkpoints/step-000020")
        trainers.run(run, max_steps=30, **options)
        assert_same_result(run, tmp_path / "expected")
    trainers.run(tmp_path / "complete", **options)
    assert "is in the cooldown before step 24" in refuse(trainers, tmp_path / "complete", max_steps=30, **options)


# ---- complete ----


def test_a_complete_run_repeated_trains_nothing_and_has_the_same_results(trainers, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted(0.1), tmp_path / "run")
    before = files(tmp_path / "run")
    repeated = trainers.run(tmp_path / "run", "--fault", "kill:step:1", dropout=0.1)
    assert "resuming from" in repeated.output
    after = files(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    # These hold the speed of the last evaluation, which is repeated because the checkpoint was saved before it.
    assert changed <= {"eval_results.json", "README.md", "curves.png", "metrics.jsonl"}
    lines = [[json.loads(line) for line in version["metrics.jsonl"].splitlines()] for version in (before, after)]
    for line in (*lines[0], *lines[1]):
        line.pop("eval_tokens_per_second", None)
    assert lines[0] == lines[1]
    results = [json.loads(version["eval_results.json"]) for version in (before, after)]
    for result in results:
        del result["command"]
        for name in [name for name in result if name.endswith(("_seconds", "_per_second", "_kwh"))]:
            del result[name]  # what the last evaluation took
    assert results[0] == results[1]


# ---- what cannot be trained ----


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_data_that_cannot_be_trained_on(trainers, tmp_path):
    empty, short = write(tmp_path / "empty.txt", ""), write(tmp_path / "short.txt", "the maps of dawn")
    assert "empty.txt" in refuse(trainers, tmp_path / "run", data=empty)
    assert "context_length 16 needs 17 tokens" in refuse(trainers, tmp_path / "run", data=short)
    assert "nowhere.txt" in refuse(trainers, tmp_path / "run", data=tmp_path / "nowhere.txt")
    tiny = write(tmp_path / "tiny.txt", "the zebra folded maps before dawn.")
    assert "validation" in refuse(trainers, tmp_path / "run", data=tiny, validation_fraction=0.01)
    assert not [name for name in files(tmp_path / "run") if not name.startswith(".tmp")]


def test_a_checkpoint_with_another_vocabulary(trainers, uninterrupted, tmp_path):
    options = {"model": uninterrupted(), "tokenizer": "bpe", "vocab_size": 300}
    assert f"give --tokenizer {uninterrupted()}" in refuse(trainers, tmp_path / "run", **options)
    other = write(tmp_path / "other.txt", "abc ABC 123 ." * 300)
    said = refuse(trainers, tmp_path / "run", model=uninterrupted(), tokenizer="char", data=other)
    assert f"give --tokenizer {uninterrupted()}" in said
    assert files(tmp_path / "run") == {}
    trainers.run(tmp_path / "run", model=uninterrupted(), tokenizer=uninterrupted(), max_steps=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rat": 1}, "unknown option --learning_rat; did you mean --learning_rate?"),
        ({"micro_batch_size": 3}, "does not divide by micro_batch_size 3"),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1"),
        ({"config": {"num_attention_heads": 5}}, "num_attention_heads"),
    ],
)
def test_options_that_do_not_fit(trainers, tmp_path, options, said):
    assert said in refuse(trainers, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists() or files(tmp_path / "run") == {}


def test_a_folder_that_cannot_be_written_or_holds_something_else(trainers, tmp_path):
    thesis = write(tmp_path / "thesis.tex", "years")
    assert "cannot be written" in refuse(trainers, thesis)
    assert "cannot be written" in refuse(trainers, thesis / "below")
    assert "holds files that are not a run" in refuse(trainers, tmp_path)
    assert thesis.read_text() == "years"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed of accelerate owns optimizer, checkpoint or data"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "megatron_lm of accelerate"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision 'fp16' is not supported: use 'bf16' or 'no'"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "leave gradient_accumulation_steps of accelerate at 1"),
    ],
)
def test_configurations_of_accelerate_under_which_a_run_could_not_resume(trainers, tmp_path, env, said):
    run = trainers.start_argv([a for a in trainers.command(tmp_path / "run") if "mixed" not in a], env)
    run.wait(2)
    [line] = run.errors.splitlines()
    assert said in line and not (tmp_path / "run").exists()


def test_of_two_processes_only_the_first_says_what_is_wrong(trainers, stopped):
    before = files(stopped)
    for options in ({"global_batch_size": 7}, {"seed": 7}):
        first, second = trainers.run_ranks(stopped, 2, expected=2, **options)
        assert len(first.errors.splitlines()) == 1 and second.errors == ""
    assert files(stopped) == before
    holder = trainers.start(stopped.parent / "other", "--fault", "stop:step:3")
    wait_for(lambda: (stopped.parent / "other/metrics.jsonl").exists())
    first, second = trainers.run_ranks(stopped.parent / "other", 2, expected=2)
    assert f"process {holder.pid}" in first.errors and second.errors == ""
    kill(holder.pid)
    holder.wait()


def test_the_script_itself_exits_with_code_2(trainers, tmp_path):
    command = [sys.executable, TRAIN_GPT, *trainers.command(tmp_path / "run"), "--seeed=1"]
    run = subprocess.run(command, env=trainers.environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "error: unknown option --seeed; did you mean --seed?\n"
    assert not (tmp_path / "run").exists()
