"""What ends a run early by itself: SIGTERM, Ctrl-C, a loss that is not a number, a full disk."""

import os
import shutil
import signal
import time

import pytest

from tests.faults.processes import assert_same_result, checkpoint_names, files, is_alive, trainers_of, wait_for

pytestmark = pytest.mark.xdist_group("faults")  # see test_kill.py

# ---- signals ----


@pytest.mark.parametrize(
    ("action", "script"), [("terminate", "train_gpt"), ("interrupt", "train_gpt"), ("interrupt", "train_vit")]
)
def test_a_signal_saves_and_exits_with_code_0(trainers, uninterrupted, tmp_path, action, script):
    options = {"script": script, "dropout": 0.1}
    stopped = trainers.run(tmp_path / "run", "--fault", f"{action}:step:9", **options, expected=0)
    name = {"terminate": "SIGTERM", "interrupt": "SIGINT"}[action]
    assert f"stopped by {name} after step 9; the same command goes on from there" in stopped.output
    assert checkpoint_names(tmp_path / "run") == ["step-000006", "step-000009"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    trainers.run(tmp_path / "run", **options)
    assert_same_result(tmp_path / "run", uninterrupted(0.1, script))


def test_a_signal_to_one_of_two_processes_stops_both_in_the_same_step(trainers, tmp_path):
    trainers.run_ranks(tmp_path / "expected", 2)
    first, second = trainers.run_ranks(tmp_path / "run", 2, "--fault", "terminate:step:9@1", expected=0)
    assert "stopped by another process after step 9" in first.output and not second.output
    trainers.run_ranks(tmp_path / "run", 2)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_during_an_evaluation_ends_the_run_after_it_and_that_step_is_evaluated_once(
    trainers, uninterrupted, tmp_path, number
):
    stopped = trainers.run(tmp_path / "run", "--fault", f"terminate:evaluation:{number}", expected=0)
    assert f"stopped by SIGTERM after step {12 * number}; the same" in stopped.output
    assert checkpoint_names(tmp_path / "run")[-1] == f"step-{12 * number:06d}"
    assert not (tmp_path / "run" / "model.safetensors").exists()
    trainers.run(tmp_path / "run")
    assert_same_result(tmp_path / "run", uninterrupted())


def test_a_signal_during_an_evaluation_of_one_of_two_processes_stops_both(trainers, tmp_path):
    trainers.run_ranks(tmp_path / "expected", 2)
    first, _ = trainers.run_ranks(tmp_path / "run", 2, "--fault", "terminate:evaluation:1@1", expected=0)
    assert "stopped by another process after step 12" in first.output
    trainers.run_ranks(tmp_path / "run", 2)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


def test_a_second_ctrl_c_interrupts_at_once(trainers, uninterrupted, tmp_path):
    faults = ["--fault", "interrupt:step:9", "--fault", "interrupt:update:9"]
    assert "KeyboardInterrupt" in trainers.run(tmp_path / "run", *faults, expected=1).errors
    assert checkpoint_names(tmp_path / "run") == ["step-000006"]
    trainers.run(tmp_path / "run")
    assert_same_result(tmp_path / "run", uninterrupted())


def test_a_signal_in_the_last_step_saves_it_and_the_repeated_command_only_exports(trainers, uninterrupted, tmp_path):
    trainers.run(tmp_path / "run", "--fault", "terminate:step:24")
    trainers.run(tmp_path / "run")
    assert_same_result(tmp_path / "run", uninterrupted())


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_and_sigterm_of_the_launcher_save(trainers, tmp_path):
    """Launched: Ctrl-C goes to the whole process group, SIGTERM to the launcher alone."""
    long = {"max_steps": 3000, "save_every": 0, "eval_every": 0}
    for processes in (1, 2):
        launch = trainers.launch if processes == 1 else trainers.launch_processes
        for send in (lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGTERM)):
            folder = tmp_path / f"{processes}-{send.__code__.co_names[1]}"
            run = launch(folder, *([processes] if processes > 1 else []), **long)
            wait_for(lambda: "vocabulary" in run.output, what="the start")  # noqa: B023
            time.sleep(2)
            trainer_ids = trainers_of(run.pid)
            send(run.pid)
            run.wait()
            wait_for(lambda: not any(map(is_alive, trainer_ids)), what="the end of the trainers")  # noqa: B023
            assert "the same command goes on from there" in run.output, run.errors
            assert len(checkpoint_names(folder)) == 1


# ---- not a number ----


def test_a_loss_that_is_not_a_number_ends_the_run_and_is_never_saved(trainers, uninterrupted, tmp_path):
    ended = trainers.run(tmp_path / "run", "--fault", "nan:forward:5", expected=3, save_every=1)
    [line] = ended.errors.splitlines()
    assert line.startswith(
        "error: the loss of step 5 is not finite, from positions 0..7 of its global batch (samples 32"
    )
    assert checkpoint_names(tmp_path / "run") == ["step-000003", "step-000004"]
    trainers.run(tmp_path / "run")
    assert_same_result(tmp_path / "run", uninterrupted())


def test_a_loss_that_is_not_a_number_on_one_process_ends_all_in_the_same_step(trainers, tmp_path):
    # The second pass of step 3, two of the four positions of this process; one pass came before the first step.
    runs = trainers.run_ranks(tmp_path / "run", 2, "--fault", "nan:forward:7@1", expected=3, micro_batch_size=2)
    assert "the loss of step 3 is not finite, from positions 6..7 of" in runs[0].errors
    assert len(runs[0].errors.splitlines()) == 1 and not runs[1].errors


def test_a_gradient_that_is_not_a_number_ends_the_run_before_it_moves_the_weights(trainers, tmp_path):
    ended = trainers.run(tmp_path / "run", "--fault", "nan:clip:6", expected=3)
    assert "error: the gradient of step 6 is not finite" in ended.errors
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- a full disk ----

# Of the second checkpoint: its three tensor files, some of its twelve forced writes, its rename; a line of
# metrics.jsonl; the export.
FULL = ["file:4", "file:5", "file:6", "fsync:14", "fsync:19", "rename:2", "log:3", "curves:1"]


@pytest.mark.parametrize("place", FULL)
def test_a_full_disk_ends_the_run_with_one_line_and_loses_nothing_that_was_saved(
    trainers, uninterrupted, tmp_path, place
):
    uninterrupted()  # the tokens are in the cache
    ended = trainers.run(tmp_path / "run", "--fault", f"full:{place}", expected=2)
    [line] = ended.errors.splitlines()
    assert line.startswith("error: ") and "No space left on device" in line
    assert not list(tmp_path.rglob(".tmp-*"))
    saved = checkpoint_names(tmp_path / "run")
    repeated = trainers.run(tmp_path / "run")
    assert f"resuming from {tmp_path}/run/checkpoints/{saved[-1]}" in repeated.output
    assert_same_result(tmp_path / "run", uninterrupted())


def test_a_full_disk_of_the_first_process_ends_the_others_too(trainers, tmp_path):
    runs = trainers.run_ranks(tmp_path / "run", 2, "--fault", "full:file:4@0", expected=2)
    [line] = runs[0].errors.splitlines()
    assert "checkpoint of step 12" in line and "step-000006 still stands" in line
    assert not runs[1].errors


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename", "file", "log", "curves"])
def test_a_full_disk_at_every_single_write(trainers, uninterrupted, tmp_path, call):
    expected = uninterrupted()
    for number in range(1, 1000):
        folder = tmp_path / str(number)
        run = trainers.start(folder, "--fault", f"full:{call}:{number}")
        if run.wait() == 0:
            break
        assert len(run.errors.splitlines()) == 1 and "No space left on device" in run.errors, run.errors
        trainers.run(folder)
        assert_same_result(folder, expected)
    assert number > {"fsync": 30, "rename": 4, "file": 12, "log": 10, "curves": 1}[call]


# ---- damage on the disk ----


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": (flip_a_bit, "model.safetensors has the wrong sha256"),
    "a truncated file": (lambda path: os.truncate(path, 1000), "model.safetensors has 1000 bytes instead of"),
    "a missing file": (os.unlink, "model.safetensors is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(trainers, uninterrupted, stopped, tmp_path, damage):
    shutil.copytree(stopped, tmp_path / "run")
    do, said = DAMAGE[damage]
    do(tmp_path / "run/checkpoints/step-000018/model.safetensors")
    resumed = trainers.run(tmp_path / "run")
    assert f"skipped step-000018: {said}" in resumed.output
    assert f"resuming from {tmp_path}/run/checkpoints/step-000012" in resumed.output
    assert_same_result(tmp_path / "run", uninterrupted())


def test_damage_to_every_checkpoint_is_an_error_and_never_a_silent_restart(trainers, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    flip_a_bit(tmp_path / "run/checkpoints/step-000018/optimizer.safetensors")
    (tmp_path / "run/checkpoints/step-000012/state.json").unlink()
    before = files(tmp_path / "run")
    refused = trainers.run(tmp_path / "run", expected=2)
    [line] = refused.errors.splitlines()
    assert "step-000018: optimizer.safetensors" in line and "step-000012: state.json is missing" in line
    assert "--restart" in line and files(tmp_path / "run") == before
    trainers.run(tmp_path / "run", restart=True)
    assert files(tmp_path / "run.old-1") == before
