"""kill -9 at any moment, then the same command again: the result is that of an uninterrupted run, bit for bit."""

import os
import random
import signal
import time

import pytest

from tests.faults.processes import (
    REPOSITORY,
    SCRIPTS,
    STEPS,
    TRAIN_GPT,
    assert_same_result,
    checkpoint_names,
    is_alive,
    kill,
    trainers_of,
    wait_for,
)

# These tests share the run that nothing disturbed, so one worker runs them all.
pytestmark = pytest.mark.xdist_group("faults")

PLACES = {
    "mid-step": ("kill:update:10", ["step-000006"]),
    "mid-save, between two written files": ("kill:file:5", ["step-000006"]),
    "between save and rotation": ("kill:rotation:3", ["step-000006", "step-000012", "step-000018"]),
}


@pytest.mark.parametrize(
    ("script", "dropout"), [("train_gpt", 0.0), *((script, 0.1) for script in SCRIPTS)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_a_place_and_repeated_ends_bit_identical(trainers, uninterrupted, tmp_path, place, script, dropout):
    fault, standing = PLACES[place]
    options = {"script": script, "dropout": dropout}
    trainers.run(tmp_path / "run", "--fault", fault, **options, expected=-signal.SIGKILL)
    found = checkpoint_names(tmp_path / "run")
    assert [name for name in found if name.startswith("step-")] == standing
    assert any(name.startswith(".tmp-") for name in found) == ("two written files" in place)
    repeated = trainers.run(tmp_path / "run", **options)
    assert f"resuming from {tmp_path}/run/checkpoints/{standing[-1]}" in repeated.output
    assert_same_result(tmp_path / "run", expected := uninterrupted(dropout, script))
    assert checkpoint_names(tmp_path / "run") == checkpoint_names(expected)
    assert {"step-000018", "step-000024"} <= set(checkpoint_names(expected))


@pytest.mark.parametrize("number", [1, 2])
def test_killed_during_an_evaluation_nothing_is_lost_and_that_step_is_evaluated_once(
    trainers, uninterrupted, tmp_path, number
):
    fault = f"kill:evaluation:{number}"
    trainers.run(tmp_path / "run", "--fault", fault, save_every=0, expected=-signal.SIGKILL)
    assert checkpoint_names(tmp_path / "run")[-1] == f"step-{12 * number:06d}"
    trainers.run(tmp_path / "run", save_every=0)
    assert_same_result(tmp_path / "run", uninterrupted())


def test_killed_while_it_exports_the_result_and_repeated(trainers, uninterrupted, tmp_path):
    trainers.run(tmp_path / "run", "--fault", "kill:curves:1", expected=-signal.SIGKILL)
    trainers.run(tmp_path / "run")
    assert_same_result(tmp_path / "run", uninterrupted())


def test_several_processes_are_killed_in_different_places_and_resume_bit_identical(trainers, tmp_path):
    trainers.run_ranks(tmp_path / "expected", 2, dropout=0.1)
    for fault in ("kill:update:10@1", "kill:file:5@0", "kill:step:3@0"):
        started = time.monotonic()
        runs = trainers.start_ranks(tmp_path / "run", 2, "--fault", fault, dropout=0.1)
        codes = [run.wait() for run in runs]
        killed = int(fault[-1])
        assert codes[killed] == -signal.SIGKILL and codes[1 - killed] > 0, runs[1 - killed].errors
        assert time.monotonic() - started < 60
    trainers.run_ranks(tmp_path / "run", 2, dropout=0.1)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


@pytest.mark.slow
def test_four_processes_resume_bit_identical(trainers, tmp_path):
    trainers.run_ranks(tmp_path / "expected", 4, dropout=0.1)
    runs = trainers.start_ranks(tmp_path / "run", 4, "--fault", "kill:update:10@2", dropout=0.1)
    assert all(run.wait() for run in runs)
    trainers.run_ranks(tmp_path / "run", 4, dropout=0.1)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


def test_one_of_two_launched_processes_is_killed_and_the_command_repeated(trainers, tmp_path):
    """Through `accelerate launch`, whose agent ends the other process."""
    run = trainers.launch_processes(tmp_path / "run", 2, "--fault", "kill:update:10@1")
    wait_for(lambda: checkpoint_names(tmp_path / "run") if (tmp_path / "run/checkpoints").exists() else None)
    started = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - started < 60
    trainers.launch_processes(tmp_path / "run", 2).wait(0)
    trainers.run_ranks(tmp_path / "expected", 2)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


def test_a_trainer_whose_launcher_was_killed_saves_and_ends(trainers, uninterrupted, tmp_path):
    run = trainers.launch(tmp_path / "run", "--fault", "orphan:step:9")
    [trainer] = wait_for(lambda: trainers_of(run.pid))
    run.wait(-signal.SIGKILL)
    wait_for(lambda: not is_alive(trainer), what="the end of the trainer")
    assert "stopped by the end of its launcher after step 9" in run.output
    assert checkpoint_names(tmp_path / "run")[-1] == "step-000009"
    config = str(REPOSITORY / "training/launch/cpu.yaml")
    repeated = trainers.launch(tmp_path / "run", launcher=("--config_file", config), file=TRAIN_GPT)
    repeated.wait(0)
    assert "resuming from" in repeated.output
    assert_same_result(tmp_path / "run", uninterrupted())


# ---- random kills ----

LONG = {"max_steps": 1500, "save_every": 7, "eval_every": 500, "log_every": 20}


@pytest.mark.slow
def test_random_kills_of_launched_runs(trainers, tmp_path):
    """24 kills: a third while saving, the others of the trainer, of the launcher alone, and of the process group."""
    choose = random.Random(time.time_ns())
    trainers.launch(tmp_path / "expected", dropout=0.1, **LONG).wait(0)
    victims = ["save", "save", "trainer", "launcher", "group", "trainer"] * 4
    choose.shuffle(victims)
    for victim in victims:
        fault = f"kill:{choose.choice(['file', 'fsync', 'rename', 'rotation'])}:{choose.randint(1, 12)}"
        hooks = ["--fault", fault] if victim == "save" else []
        run = trainers.launch(tmp_path / "run", *hooks, dropout=0.1, **LONG)
        [trainer] = wait_for(lambda: trainers_of(run.pid))  # noqa: B023
        if victim != "save":
            wait_for(lambda: "vocabulary" in run.output, what="the start")  # noqa: B023
            time.sleep(choose.uniform(0, 0.8))
            if victim == "group":
                os.killpg(run.pid, signal.SIGKILL)
            else:
                kill(trainer if victim == "trainer" else run.pid)
        assert run.wait() != 0, f"{victim}: the run ended before it was killed"
        wait_for(lambda: not is_alive(trainer), what="the end of the trainer")  # noqa: B023
        if victim == "launcher":
            assert "stopped by the end of its launcher" in run.output and "Traceback" not in run.errors, run.errors
    trainers.launch(tmp_path / "run", dropout=0.1, **LONG).wait(0)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


@pytest.mark.slow
def test_a_hundred_random_kills(trainers, tmp_path):
    choose = random.Random(time.time_ns())
    trainers.run(tmp_path / "expected", dropout=0.1, **LONG)
    for _ in range(100):
        run = trainers.start(tmp_path / "run", dropout=0.1, **LONG)
        time.sleep(choose.uniform(0, 0.8))
        kill(run.pid)
        if run.wait() == 0:
            break
    trainers.run(tmp_path / "run", dropout=0.1, **LONG)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


# ---- streams ----


def test_a_streamed_run_killed_while_training_and_while_writing_a_shard(trainers, uninterrupted, tmp_path):
    options = {"tokenizer": uninterrupted(), "streaming": True, "data": "a/stream"}

    def hooks(name):
        return ["--cache", str(tmp_path / name), "--stream", str(trainers.text)]

    trainers.run(tmp_path / "expected", *hooks("cache"), **options)
    for fault in ("kill:shard:3", "kill:update:10", "kill:shard:4", "kill:file:2"):
        trainers.run(tmp_path / "run", *hooks("other"), "--fault", fault, **options, expected=-signal.SIGKILL)
    trainers.run(tmp_path / "run", *hooks("other"), **options)
    assert_same_result(tmp_path / "run", tmp_path / "expected")
    shards = sorted((tmp_path / "other").rglob("shard-*.bin"))
    assert len(shards) > STEPS * 8 // 16
    # A checkpoint vouches for the shards it was trained on. (The first ones are written anew before it is read.)
    shards[3].write_bytes(b"other")
    refused = trainers.run(tmp_path / "run", *hooks("other"), **options, expected=2)
    assert shards[3].name in refused.errors and len(refused.errors.splitlines()) == 1
