"""What checkpoints, the run's lock and its identity promise, one test a promise."""

import copy
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from tests.faults.processes import in_a_process
from training.run import checkpoint as module
from training.run import folder as folder_module
from training.run.checkpoint import (
    Checkpoints,
    flatten_optimizer_state,
    gather_training_state,
    restore_training_state,
    unflatten_optimizer_state,
)
from training.run.folder import RunLock, check_identity, file_record, move_aside, write_atomic

REPOSITORY = Path(__file__).parents[3]


def some_tensors(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"weight": torch.randn(8, 8, generator=generator), "bias": torch.randn(8, generator=generator)},
        "optimizer": {"weight.exp_avg": torch.randn(8, 8, generator=generator)},
    }


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    """Two sound checkpoints, of steps 20 and 40."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    for step in (20, 40):
        checkpoints.save(step, some_tensors(step), {"seen": step})
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


# ---- saving and loading ----


def test_a_saved_checkpoint_is_read_back_exactly(checkpoints):
    path, skipped = checkpoints.newest_verified()
    loaded = checkpoints.load(path)
    assert (path.name, skipped, loaded.step, loaded.state) == ("step-000040", [], 40, {"seen": 40})
    for stem, tensors in some_tensors(40).items():
        torch.testing.assert_close(loaded.tensors(stem), tensors, rtol=0, atol=0)


def test_tied_overlapping_and_transposed_tensors_are_restored(checkpoints):
    buffer = torch.arange(12.0)
    tied = torch.randn(3, 4)
    tensors = {
        "embed": tied,
        "lm_head": tied,
        "left": buffer[:8],
        "right": buffer[4:],
        "transposed": tied.T,
        "bf16": tied.bfloat16(),
        "number": torch.tensor(7),
        "empty": torch.empty(0),
        "empty too": torch.empty(0),
    }
    loaded = checkpoints.load(checkpoints.save(60, {"model": tensors, "nothing": {}}, {}))
    torch.testing.assert_close(loaded.tensors("model"), tensors, rtol=0, atol=0)
    assert loaded.tensors("model")["lm_head"] is not None and loaded.tensors("nothing") == {}
    assert b"lm_head" in (loaded.path / "model.safetensors").read_bytes()[:2000]


def test_only_the_newest_are_kept(checkpoints):
    checkpoints.save(60, some_tensors(60), {})
    assert names(checkpoints.folder) == ["step-000040", "step-000060"]


def test_the_best_is_kept_beside_the_newest_until_there_is_a_better_one(checkpoints):
    for step, best in ((60, 20), (80, 20), (100, 20)):
        checkpoints.save(step, some_tensors(step), {}, best=best)
    assert names(checkpoints.folder) == ["step-000020", "step-000080", "step-000100"]
    Checkpoints(checkpoints.folder).save(120, some_tensors(120), {}, best=120)
    assert names(checkpoints.folder) == ["step-000100", "step-000120"]
    Checkpoints(checkpoints.folder, keep=1).save(140, some_tensors(140), {}, best=120)
    assert names(checkpoints.folder) == ["step-000120", "step-000140"]


def test_no_checkpoint_at_all_is_no_error(tmp_path):
    assert Checkpoints(tmp_path / "absent").newest_verified() == (None, [])


def test_a_sound_checkpoint_of_the_same_step_is_left_and_a_damaged_one_replaced(checkpoints):
    path = checkpoints.folder / "step-000040"
    checkpoints.save(40, some_tensors(1), {"seen": "other"})
    assert checkpoints.load(path).state == {"seen": 40}
    flip_a_bit(path / "model.safetensors")
    reopened = Checkpoints(checkpoints.folder)
    reopened.save(40, some_tensors(1), {"seen": "other"})
    assert reopened.load(reopened.newest_verified()[0]).state == {"seen": "other"}
    assert names(checkpoints.folder) == ["step-000020", "step-000040"]


def test_other_users_may_read_a_checkpoint_as_they_may_its_folder(checkpoints):
    for file in (checkpoints.folder / "step-000040").iterdir():
        assert file.stat().st_mode & 0o777 == file.parent.stat().st_mode & 0o666


# ---- faults ----


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", flip_a_bit, "model.safetensors has the wrong sha256 (a damaged file)"),
        ("optimizer.safetensors", truncate, "optimizer.safetensors has"),
        ("state.json", flip_a_bit, "state.json has the wrong sha256 (a damaged file)"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", truncate, "manifest.json is damaged"),
        ("manifest.json", flip_a_bit, "manifest.json is damaged"),
    ],
)
def test_a_damaged_file_falls_back_to_the_checkpoint_before_and_says_so(checkpoints, name, damage, said):
    damage(checkpoints.folder / "step-000040" / name)
    path, [line] = Checkpoints(checkpoints.folder).newest_verified()
    assert path.name == "step-000020"
    assert line.startswith(f"step-000040: {said}")


def test_every_single_byte_of_a_manifest_matters(checkpoints):
    path = checkpoints.folder / "step-000040" / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert module.find_damage(path.parent), position


def test_damage_everywhere_is_an_error_and_never_a_silent_restart(checkpoints):
    for step in ("step-000020", "step-000040"):
        truncate(checkpoints.folder / step / "model.safetensors")
    with pytest.raises(ValueError, match=r"step-000040: model.*step-000020: model.*--restart"):
        Checkpoints(checkpoints.folder).newest_verified()


def test_rotation_never_counts_a_damaged_checkpoint_as_one_to_fall_back_to(checkpoints):
    flip_a_bit(checkpoints.folder / "step-000040" / "model.safetensors")
    resumed = Checkpoints(checkpoints.folder)
    resumed.newest_verified()
    resumed.save(30, some_tensors(30), {})
    assert names(resumed.folder) == ["step-000020", "step-000030"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_on_call(number: int, function, failure):
    """`function`, but its `number`-th call fails."""
    calls = iter(range(1, 1000))

    def wrapped(*arguments, **options):
        return failure() if next(calls) == number else function(*arguments, **options)

    return wrapped


def full_disk_in_safetensors():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


# Two tensor files; fsync of these, state.json, manifest.json, the folder, its parent and the parent of that.
WRITES = [("save_file", n) for n in (1, 2)] + [("fsync", n) for n in range(1, 8)] + [("open", n) for n in range(1, 6)]


@pytest.mark.parametrize(("call", "number"), WRITES + [("mkdir", 2), ("rename", 1)])
def test_a_full_disk_at_every_write_keeps_the_checkpoints_before(checkpoints, monkeypatch, call, number):
    if call == "save_file":
        monkeypatch.setattr(module, call, fail_on_call(number, module.save_file, full_disk_in_safetensors))
    elif call == "open":
        monkeypatch.setattr(folder_module, call, fail_on_call(number, open, full_disk), raising=False)
    else:
        monkeypatch.setattr(os, call, fail_on_call(number, getattr(os, call), full_disk))
    with pytest.raises(OSError, match=r"step 60.*No space left on device.*still stands.*repeat the command") as raised:
        checkpoints.save(60, some_tensors(60), {})
    monkeypatch.undo()
    assert "\n" not in str(raised.value)
    assert not list(checkpoints.folder.glob(".tmp-*"))
    stands = "step-000060" if (call, number) in {("fsync", 6), ("fsync", 7)} else "step-000040"  # after the rename
    assert Checkpoints(checkpoints.folder).newest_verified() == (checkpoints.folder / stands, [])
    assert {"step-000020", "step-000040"} <= set(names(checkpoints.folder))
    checkpoints.save(60, some_tensors(60), {})  # there is room again
    assert checkpoints.newest_verified()[0].name == "step-000060"


def test_a_really_full_disk_is_reported_in_one_line(checkpoints):
    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # past the limit a write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        with pytest.raises(OSError, match="step 60: writing model.safetensors.*too large.*step-000040 still stands"):
            checkpoints.save(60, {"model": {"a": torch.zeros(1_000_000)}}, {})

    assert in_a_process(fill) == 0
    assert names(checkpoints.folder) == ["step-000020", "step-000040"]


@pytest.mark.parametrize(
    ("owner", "call", "stands"),
    [
        (module, "save_file", "step-000040"),
        (os, "rename", "step-000040"),
        (Checkpoints, "_rotate", "step-000060"),
        (shutil, "rmtree", "step-000060"),
    ],
)
def test_a_kill_at_any_moment_of_a_save_leaves_a_sound_checkpoint(checkpoints, owner, call, stands):
    def save():
        setattr(owner, call, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        checkpoints.save(60, some_tensors(60), {})

    assert in_a_process(save) == -signal.SIGKILL
    after = Checkpoints(checkpoints.folder)
    assert after.newest_verified() == (after.folder / stands, [])
    after.save(80, some_tensors(80), {})
    assert names(after.folder) == [stands, "step-000080"]  # and what the dead process left is gone


# ---- files that a checkpoint needs but does not contain ----


def test_an_external_file_is_verified_with_the_checkpoint(checkpoints):
    shard = checkpoints.folder.parent / "shards" / "0.bin"
    shard.parent.mkdir()
    shard.write_bytes(b"tokens")
    checkpoints.save(60, some_tensors(60), {}, external={"shards/0.bin": file_record(shard)})
    checkpoints.save(70, some_tensors(70), {}, external={str(shard): file_record(shard)})
    assert Checkpoints(checkpoints.folder).newest_verified()[0].name == "step-000070"
    flip_a_bit(shard)
    with pytest.raises(ValueError, match=r"step-000060: shards/0.bin has the wrong sha256"):
        Checkpoints(checkpoints.folder).newest_verified()


# ---- single files ----


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "old" and names(tmp_path) == ["a.json"]


# ---- the lock ----

HOLD_LOCK = """
    import sys
    from training.run.folder import RunLock
    with RunLock({!r}):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD_LOCK.format(str(tmp_path)))],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_held_by_a_live_process_is_refused_naming_it(tmp_path, holder):
    for _ in range(2):  # a refusal does not free the lock
        with pytest.raises(ValueError, match=rf"process {holder.pid} on .*another --output_dir"), RunLock(tmp_path):
            pass
    write_atomic(tmp_path / "run.json", "{}")
    with pytest.raises(ValueError, match=f"process {holder.pid}"):
        move_aside(tmp_path)
    holder.stdin.close()
    holder.wait()
    with RunLock(tmp_path):
        pass


def test_a_lock_is_free_after_kill_9_of_its_holder(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert str(holder.pid) in (tmp_path / ".lock").read_text()
    with RunLock(tmp_path):
        assert str(os.getpid()) in Path(tmp_path / ".lock").read_text()


def test_a_forked_child_does_not_hold_its_dead_parents_lock(tmp_path):
    wait, release = os.pipe()

    def hold_and_die_leaving_a_child():
        os.close(release)
        RunLock(tmp_path).__enter__()
        if os.fork() == 0:
            os.read(wait, 1)  # lives, with its copy of the descriptor, until the test ends
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(hold_and_die_leaving_a_child) == -signal.SIGKILL
    with RunLock(tmp_path):
        pass
    os.close(release)


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="--output_dir .*file.* cannot be written"), RunLock(folder):
            pass


# ---- the identity ----


def test_a_run_is_continued_by_the_same_command_and_refused_to_another(tmp_path):
    identity = {"seed": 0, "model": {"layers": 2, "betas": (0.9, 0.95)}, "data": "a"}
    with RunLock(tmp_path / "run"):
        check_identity(tmp_path / "run", identity)
        before = (tmp_path / "run" / "run.json").read_bytes()
        check_identity(tmp_path / "run", copy.deepcopy(identity))
        other = {"seed": 1, "model": {"layers": 3, "betas": (0.9, 0.95)}, "optimizer": "muon"}
        with pytest.raises(ValueError) as raised:
            check_identity(tmp_path / "run", other)
    said = str(raised.value)
    for line in (
        "seed: this run has 1, --output_dir holds 0",
        "model.layers: this run has 3, --output_dir holds 2",
        "data: this run has nothing, --output_dir holds a",
        "optimizer: this run has muon, --output_dir holds nothing",
        "--restart",
    ):
        assert line in said
    assert "betas" not in said and (tmp_path / "run" / "run.json").read_bytes() == before


def test_an_earlier_version_did_not_say_its_precision(tmp_path):
    check_identity(tmp_path, {"seed": 0})
    check_identity(tmp_path, {"seed": 0, "mixed_precision": "bf16"})
    check_identity(tmp_path / "new", {"seed": 0, "mixed_precision": "bf16"})
    with pytest.raises(ValueError, match="mixed_precision: this run has no, --output_dir holds bf16"):
        check_identity(tmp_path / "new", {"seed": 0, "mixed_precision": "no"})


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    for refused in (lambda: check_identity(tmp_path, {}), lambda: move_aside(tmp_path)):
        with pytest.raises(ValueError, match="not a run of this script"):
            refused()
    assert names(tmp_path) == ["thesis.tex"]


def test_a_run_killed_before_its_identity_was_written_starts_again(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on nowhere")
    (tmp_path / ".tmp-run.json-0123").write_text("{")
    check_identity(tmp_path, {"seed": 0})
    assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 0}


def test_a_damaged_identity_is_an_error_naming_the_way_out(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged; --restart"):
        check_identity(tmp_path, {})


def test_restart_moves_the_old_run_aside_and_deletes_nothing(tmp_path):
    run = tmp_path / "run"
    assert move_aside(run) is None
    for number in (1, 2):
        with RunLock(run):
            check_identity(run, {"number": number})
        assert move_aside(run) == tmp_path / f"run.old-{number}"
        assert json.loads((tmp_path / f"run.old-{number}" / "run.json").read_text()) == {"number": number}
        assert not run.exists()


def test_restart_of_a_link_moves_what_it_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "run.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert move_aside(tmp_path / "link") == tmp_path / "disk.old-1"
    with RunLock(tmp_path / "link"):
        assert (tmp_path / "disk" / ".lock").exists()


# ---- training state ----


class Tiny(nn.Module):
    """Tied embedding and head, one matrix, a buffer, and a parameter that never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.module = nn.Linear(6, 6)  # a name that wrappers use too
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.unused = nn.Linear(2, 2)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(()))

    def forward(self, tokens):
        self.count += 1
        return self.lm_head(torch.tanh(self.module(self.embed(tokens))))


def create(seed: int, *, muon: bool):
    torch.manual_seed(seed)
    model = Tiny()
    matrices = [model.module.weight] if muon else []
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": others[:1], "weight_decay": 0.1, "initial_lr": 0.01}, {"params": others[1:], "lr": 0.02}]
    optimizers = [torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    return model, optimizers + ([torch.optim.Muon(matrices, lr=0.02)] if muon else [])


def train(model, optimizers, steps):
    for step in steps:
        tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def everything(model, optimizers) -> dict:
    tensors, state = gather_training_state(model, optimizers)
    tensors = {stem: {name: tensor.clone() for name, tensor in named.items()} for stem, named in tensors.items()}
    return {**tensors, "state": state}


def assert_identical(one: dict, other: dict) -> None:
    assert one["state"] == other["state"]
    for stem in ("model", "optimizer"):
        assert one[stem].keys() == other[stem].keys()
        for name in one[stem]:
            assert one[stem][name].dtype == other[stem][name].dtype
            assert torch.equal(one[stem][name], other[stem][name]), name


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("saved_at", [0, 5])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, muon, compiled, saved_at):
    def wrap(model):
        return torch.compile(model, backend="eager") if compiled else model

    model, optimizers = create(0, muon=muon)
    train(wrap(model), optimizers, range(10))
    expected = everything(model, optimizers)

    model, optimizers = create(0, muon=muon)
    train(wrap(model), optimizers, range(saved_at))
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(saved_at, *gather_training_state(wrap(model), optimizers))

    train(wrap(model), optimizers, range(saved_at, 10))  # saving changed nothing
    assert_identical(everything(model, optimizers), expected)

    model, optimizers = create(1, muon=muon)  # other weights: all must come from the checkpoint
    restore_training_state(wrap(model), optimizers, checkpoints.load(path))
    assert model.lm_head.weight is model.embed.weight
    assert isinstance(optimizers[0].param_groups[0]["betas"], tuple)
    train(wrap(model), optimizers, range(saved_at, 10))
    assert_identical(everything(model, optimizers), expected)


def test_a_parameter_without_gradient_stays_without_optimizer_state():
    model, optimizers = create(0, muon=False)
    train(model, optimizers, range(3))
    tensors, _ = gather_training_state(model, optimizers)
    assert not any(name.startswith("unused") for name in tensors["optimizer"])
    assert model.unused.weight not in optimizers[0].state


def test_without_optimizers_only_the_weights_are_put_back(tmp_path):
    model, optimizers = create(0, muon=False)
    train(model, optimizers, range(3))
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(3, *gather_training_state(model, optimizers))
    other, others = create(1, muon=False)
    restore_training_state(other, [], checkpoints.load(path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert not others[0].state


def test_other_optimizer_groups_are_refused(tmp_path):
    model, optimizers = create(0, muon=True)
    train(model, optimizers, range(1))
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, *gather_training_state(model, optimizers))
    model, optimizers = create(0, muon=False)
    with pytest.raises(ValueError, match="other optimizer groups"):
        restore_training_state(model, optimizers, checkpoints.load(path))


def test_optimizer_state_goes_through_json_exactly():
    model, optimizers = create(0, muon=True)
    optimizers[0].param_groups[0] |= {"lr": 0.1 + 0.2, "betas": (1 / 3, 0.95), "names": ["a", None], "flag": True}
    train(model, optimizers, range(1))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_optimizer_state_dict(model, optimizers, options=options)
    tensors, scalars = flatten_optimizer_state(state_dict)
    again = unflatten_optimizer_state(tensors, json.loads(json.dumps(scalars)))
    assert again["param_groups"] == state_dict["param_groups"]
    assert again["state"].keys() == state_dict["state"].keys()
    for name, entries in state_dict["state"].items():
        assert again["state"][name] is not entries and again["state"][name] == entries
    state_dict["param_groups"][0]["lr"] = torch.tensor(0.1)
    with pytest.raises(ValueError, match="lr is a Tensor"):
        flatten_optimizer_state(state_dict)


# ---- several processes ----


def in_two_processes(rank: int, folder: str, layout: str) -> None:
    """Train `layout` for 3 steps, save, restore into a fresh one, and compare after 3 more steps."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    checkpoints = Checkpoints(Path(folder) / layout)

    def start(seed):
        model, optimizers = create(seed, muon=False)
        if layout == "ddp":
            return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), optimizers
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        matrices = [model.module.weight]
        others = [p for p in model.parameters() if p is not matrices[0]]
        return model, [torch.optim.AdamW(others, fused=True), torch.optim.Muon(matrices, lr=0.02)]

    model, optimizers = start(0)
    train(model, optimizers, range(3))
    tensors, state = gather_training_state(model, optimizers)
    assert bool(tensors) == (rank == 0)
    if rank == 0:
        checkpoints.save(3, tensors, state)
        assert "module.weight" in tensors["model"] and "module.module.weight" not in tensors["model"]
    train(model, optimizers, range(3, 6))
    expected = everything(model, optimizers)

    model, optimizers = start(1)
    loaded = checkpoints.load(checkpoints.newest_verified()[0]) if rank == 0 else None
    restore_training_state(model, optimizers, loaded)
    train(model, optimizers, range(3, 6))
    resumed = everything(model, optimizers)
    if rank == 0:
        assert_identical(resumed, expected)
        (Path(folder) / "done").touch()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_processes_resume_bit_identical_and_one_process_reads_their_checkpoint(tmp_path, layout):
    torch.multiprocessing.spawn(in_two_processes, (str(tmp_path), layout), nprocs=2)
    assert (tmp_path / "done").exists()
    checkpoints = Checkpoints(tmp_path / layout)
    loaded = checkpoints.load(checkpoints.newest_verified()[0])
    model, optimizers = create(1, muon=layout == "fsdp2")
    if layout == "fsdp2":
        others = [p for p in model.parameters() if p is not model.module.weight]
        optimizers[0] = torch.optim.AdamW(others, fused=True)
    restore_training_state(model, optimizers, loaded)
    again, state = gather_training_state(model, optimizers)
    assert_identical(
        {**again, "state": state}, {stem: loaded.tensors(stem) for stem in again} | {"state": loaded.state}
    )
    header = (loaded.path / "model.safetensors").read_bytes()[:1000]
    assert b"aliases" in header and b'"lm_head.weight":{"dtype"' not in header  # the tied weight is stored once
