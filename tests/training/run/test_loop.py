"""What the loop promises about a step: the same whoever shares the work, the same seed everywhere, exact sums; and
about a run: what it logs, and the weights of which evaluation it ends with."""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.faults.conftest import trainers  # noqa: F401
from tests.faults.processes import checkpoint_names, files, in_a_process, losses, read_metrics
from training.run import loop, resume
from training.run.arguments import RunArguments
from training.run.checkpoint import Checkpoints
from training.run.folder import identify
from training.run.log import MetricsLog
from training.run.loop import count, move, train
from training.run.processes import fastest_attention, keep_inputs, micro_batches, speed_up_cpu_matmul
from training.run.seeds import seed_from

multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # imported once for all kills

FIFTY = {"max_steps": 50, "log_every": 1, "eval_every": 0, "save_every": 0, "ema_decay": 0.0}


@pytest.mark.parametrize(
    ("script", "optimizer", "layouts"),
    [
        ("train_gpt", "muon", [(1, 2), (2, 4), (2, 1)]),
        ("train_bert", "muon", [(2, 2)]),
        ("finetune_bert", "adamw", [(2, 2)]),
        ("train_vit", "muon", [(2, 2)]),
        ("train_vit-mae", "adamw", [(2, 2)]),
        ("train_detr", "adamw", [(2, 2)]),
        pytest.param("train_gpt", "adamw", [(1, 2), (2, 4), (2, 1), (4, 2), (4, 1)], marks=pytest.mark.slow),
        pytest.param("train_gpt", "muon", [(4, 2), (4, 1)], marks=pytest.mark.slow),
        pytest.param("train_vit", "muon", [(1, 2), (1, 4), (2, 4), (4, 2)], marks=pytest.mark.slow),
        pytest.param("train_vit-mae", "muon", [(1, 1), (1, 4), (4, 1)], marks=pytest.mark.slow),
        pytest.param("train_detr", "muon", [(1, 2), (2, 4), (4, 2)], marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_have_the_same_losses_however_the_batch_is_shared(trainers, tmp_path, script, optimizer, layouts):  # noqa: F811
    def train(processes: int, micro_batch_size: int) -> list[float]:
        folder = tmp_path / f"{processes}-{micro_batch_size}"
        options = {**FIFTY, "script": script, "optimizer": optimizer, "micro_batch_size": micro_batch_size}
        if processes == 1:
            trainers.run(folder, **options)
        else:
            trainers.run_ranks(folder, processes, **options)
        return losses(folder)

    expected = train(1, 8)
    assert len(expected) == 50
    for processes, micro_batch_size in layouts:
        torch.testing.assert_close(train(processes, micro_batch_size), expected, rtol=0, atol=1e-5)


def test_positions_are_shared_without_gap_or_overlap():
    for processes, micro in ((1, None), (2, 3), (4, 1), (3, 4)):
        args = RunArguments(global_batch_size=12, micro_batch_size=micro)
        shares = [positions for rank in range(processes) for positions in micro_batches(args, rank, processes)]
        assert [position for positions in shares for position in positions] == list(range(12))
    with pytest.raises(ValueError, match="global_batch_size 12 does not divide by 5 processes"):
        micro_batches(RunArguments(global_batch_size=12), 0, 5)
    with pytest.raises(ValueError, match="6 samples.*does not divide by micro_batch_size 4"):
        micro_batches(RunArguments(global_batch_size=12, micro_batch_size=4), 0, 2)


def test_seeds_depend_on_every_number_and_on_nothing_else():
    assert seed_from(1337, 5, 0, 1) == seed_from(1337, 5, 0, 1)
    seeds = [seed_from(*numbers) for numbers in [(1,), (2,), (1, 0), (0, 1), (1, 2), (1, 2, 0), (2, 1), (1, 2, 0, 0)]]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_from(1, 2) == 1826972086523782664


def test_what_an_fsdp2_model_is_given_is_not_rounded(tmp_path):
    """Though its weights and what its blocks are given are: 261 would become 260."""

    def forward():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model, given = torch.nn.Sequential(torch.nn.Linear(1, 1)), {}
        for name, module in (("block", model[0]), ("model", model)):
            module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        keep_inputs(model)
        model(torch.tensor([261.0]))
        assert given["model"].dtype == torch.float32 and given["model"] == 261
        assert given["block"].dtype == torch.bfloat16

    assert in_a_process(forward) == 0


def test_the_faster_products_are_as_exact():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        is_kept = speed_up_cpu_matmul()
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == is_kept
        for shape in ((256, 384, 1536), (1024, 128, 512), (3, 1000, 7)):
            left, right = torch.randn(shape[0], shape[1]), torch.randn(shape[1], shape[2])
            exact = left.double() @ right.double()
            torch.testing.assert_close((left @ right).double(), exact, rtol=1e-4, atol=1e-4)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cpu", "AVX2", "sdpa"), ("cpu", "AVX512", "eager"), ("cpu", "DEFAULT", "sdpa"), ("cuda", "AVX512", "sdpa")],
)
def test_the_attention_of_a_training_is_the_one_that_is_fast_there(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert fastest_attention(device) == expected


def test_max_steps_is_part_of_a_run_only_where_earlier_steps_depend_on_it():
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(to_dict=lambda: {"hidden_size": 1, "transformers_version": "5"})
    assert "max_steps" in identify(RunArguments(schedule="cosine"), model, "data")
    identity = identify(RunArguments(schedule="constant"), model, "data", tokenizer="t")
    assert "max_steps" not in identity
    assert identity["model"] == {"hidden_size": 1} and identity["data"] == "data" and identity["tokenizer"] == "t"


def test_the_log_of_a_resumed_run_keeps_what_came_before_and_cuts_what_comes_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)]
    path.write_text("".join(lines) + '{"step": 8, "lo')  # torn by a kill
    accelerator = SimpleNamespace(is_main_process=True, log=lambda *_, **__: None)
    progress = {"step": 4, "evaluated_step": 4, "seconds": 1.0}
    progress |= {"interval_seconds": 0.0, "loss_sum": 0.0, "num_units": 0, "num_steps": 0}
    log = MetricsLog(accelerator, RunArguments(max_steps=6, global_batch_size=2), tmp_path, progress, "tokens", 8)
    assert path.read_text() == "".join(lines[:2])
    log.add(1.0, 10, 0.5, 0.2)
    progress["step"] = 5
    log.add(2.0, 10, 0.5, 0.1)
    log.write_training()
    log.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {
        "step": 5,
        "loss": 1.5,
        "learning_rate": 0.1,
        "tokens_per_second": 20.0,
        "fill": 20 / (2 * 2 * 8),
    }
    assert progress == {**progress, "seconds": 1.0, "interval_seconds": 0.0, "loss_sum": 0.0, "num_steps": 0}


# ---- a small training, in this process ----


class Line(torch.nn.Module):
    """y = weight x, whose loss is a sum of squared errors over what it is divided by; it counts its steps."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x, num_items_in_batch):
        self.steps += self.training
        terms = num_items_in_batch if isinstance(num_items_in_batch, dict) else {"loss": num_items_in_batch}
        assert all(divisor.dtype == torch.float32 and divisor.ndim == 0 for divisor in terms.values())
        return SimpleNamespace(loss=sum(((self.weight - 3) * x).pow(2).sum() / divisor for divisor in terms.values()))


class Points:
    """Two points in each step, and how often they count."""

    def __init__(self, num_items=len):
        self.step, self.num_items = 0, lambda batch: num_items(batch["x"])

    def batch(self, step, positions):
        self.step = step + 1
        return {"x": torch.tensor([1.0 + step % 3 + position for position in positions])}

    def num_units(self, batch):
        return int(batch["x"].sum())

    def external_files(self):
        return {}


SCORES = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.9, 10: 0.8, 12: 0.6}  # the best is that of step 4
OPTIONS = {"max_steps": 12, "global_batch_size": 2, "log_every": 3, "eval_every": 2, "save_every": 3}
OPTIONS |= {"learning_rate": 0.05, "warmup_steps": 0, "weight_decay": 0.0, "keep_checkpoints": 1, "ema_decay": 0.9}


def train_line(
    folder, scores=SCORES, monitor="eval_score", measured=None, data=None, evaluating=None, after_step=None, **options
):
    """Results and weight of a training in which the evaluation after step n measures `scores[n]`.

    evaluating: called in each evaluation with the step.
    """
    data = data or Points()
    measured = measured or monitor or "eval_score"

    def evaluate(model):
        if evaluating:
            evaluating(int(model.steps))
        return {measured: scores.get(int(model.steps), 0.0), "eval_weight": model.weight.item()}

    args = RunArguments(output_dir=str(folder), **{**OPTIONS, **options})
    validation = SimpleNamespace(measure=evaluate)
    keywords = {"unit": "units", "row_length": 10, "monitor": monitor, "after_step": after_step}
    model, results = train(args, Accelerator(cpu=True), Line(), data, validation, {}, **keywords)
    for cost in ("wall_time_seconds", "processor_time_seconds"):
        del results[cost]
    return results, model.weight.item()


def evaluations(folder) -> dict[int, float]:
    """The weight that each evaluation saw."""
    return {line["step"]: line["eval_weight"] for line in read_metrics(folder) if "eval_weight" in line}


# ---- batches ----


def test_a_batch_moves_to_the_device_with_the_lists_and_dicts_in_it():
    labels = [{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(0, 4)}]
    moved = move({"x": torch.ones(3), "labels": labels}, torch.device("meta"))
    assert [tensor.is_meta for tensor in (moved["x"], *(label["boxes"] for label in moved["labels"]))] == [True] * 3
    assert moved["labels"][1]["boxes"].shape == (0, 4)


def test_a_batch_that_the_model_refuses_ends_the_run_and_is_named(tmp_path, capsys):
    data = Points()
    data.batch = lambda step, positions: {"x": torch.ones(1), **({"unknown": torch.ones(1)} if step == 3 else {})}
    refuse, forward = ValueError("image 1 (image_id 7) of the batch: no box"), Line.forward

    def refusing(self, x, num_items_in_batch, unknown=None):
        if unknown is not None:
            raise refuse
        return forward(self, x, num_items_in_batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Line, "forward", refusing)
        patch.setattr(data, "num_units", lambda batch: 1)
        train_line(tmp_path, data=data, monitor=None)
    assert ended.value.code == 3
    assert "step 4, positions 0..1 of its global batch: image 1 (image_id 7) of the batch" in capsys.readouterr().err


# ---- what a loss is divided by ----


def test_each_term_of_a_loss_is_divided_by_its_count_over_all_micro_batches_and_by_1_where_nothing_counts():
    data = SimpleNamespace(num_items=lambda batch: batch["counts"], num_units=lambda batch: 5)
    one_process = SimpleNamespace(num_processes=1, device="cpu")
    batches = [{"counts": {"masked": 3, "pairs": 0.5, "none": 0}}, {"counts": {"masked": 4, "pairs": 1, "none": 0}}]
    divisors, num_units = count(one_process, data, batches)
    assert divisors == {"masked": 7, "pairs": 1.5, "none": 1} and num_units == 10
    divisor, _ = count(one_process, data, [{"counts": 3}, {"counts": 4}])
    assert divisor == 7 and divisor.dtype == torch.float32 and divisor.ndim == 0
    assert count(one_process, data, [{"counts": 0}])[0] == 1


def test_terms_with_a_divisor_each_add_up(tmp_path):
    plain, _ = train_line(tmp_path / "plain")
    two_terms, _ = train_line(tmp_path / "two", data=Points(lambda x: {"a": 2 * len(x), "b": 2 * len(x)}))
    assert two_terms == plain
    assert losses(tmp_path / "two") == losses(tmp_path / "plain")


def test_a_step_in_which_nothing_is_scored_has_loss_0_and_moves_nothing(tmp_path):
    data = Points(lambda x: 0)
    data.batch = lambda step, positions: {"x": torch.zeros(len(positions))}
    _, weight = train_line(tmp_path / "run", monitor=None, data=data)
    assert weight == 0 and losses(tmp_path / "run") == [0.0] * 4


def test_fill_is_the_used_part_of_the_room_in_a_row(tmp_path):
    train_line(tmp_path / "run", max_steps=4)
    lines = [line["fill"] for line in read_metrics(tmp_path / "run") if "fill" in line]
    assert lines == [(3 + 5 + 7) / (3 * 2 * 10), 3 / (2 * 10)]


# ---- what a script adds to a step ----


def test_what_is_called_after_a_step_sees_its_weights_before_the_average_does(tmp_path):
    seen = []

    def after_step(model, step):
        seen.append((step, model.weight.item()))
        with torch.no_grad():
            model.weight.fill_(1)

    train_line(tmp_path, monitor=None, max_steps=2, after_step=after_step)
    assert [step for step, _ in seen] == [0, 1] and 0 < seen[0][1] < 1 < seen[1][1]
    average = torch.tensor(0.0).lerp(torch.tensor(1.0), 9 / 10).lerp(torch.tensor(1.0), 9 / 11)
    assert evaluations(tmp_path) == {2: pytest.approx(average.item(), abs=1e-6)}


# ---- a step is saved, then evaluated ----


def test_every_evaluated_step_is_saved_before(tmp_path):
    found = {}

    def evaluating(step):
        found[step] = checkpoint_names(tmp_path)[-1]

    train_line(tmp_path, monitor=None, evaluating=evaluating, eval_every=5, save_every=0)
    assert found == {5: "step-000005", 10: "step-000010", 12: "step-000012"}


@pytest.mark.parametrize("monitor", [None, "eval_score"])
@pytest.mark.parametrize("stopped_at", [2, 4, 12])
def test_a_signal_during_an_evaluation_ends_the_run_and_the_next_one_evaluates_that_step_once(
    tmp_path, capsys, stopped_at, monitor
):
    def evaluating(step):
        if step == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)

    expected = train_line(tmp_path / "expected", monitor=monitor)
    with pytest.raises(SystemExit) as ended:
        train_line(tmp_path / "run", monitor=monitor, evaluating=evaluating)
    assert ended.value.code == 0 and f"stopped by SIGTERM after step {stopped_at}" in capsys.readouterr().out
    assert checkpoint_names(tmp_path / "run")[-1] == f"step-{stopped_at:06d}"
    assert train_line(tmp_path / "run", monitor=monitor) == expected
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "expected")


def test_a_run_of_version_0_1_goes_on_and_measures_nothing_twice(tmp_path):
    """That version evaluated a step before it saved it, and its checkpoints have no `evaluated_step`."""

    def stop_at_6(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    expected = train_line(tmp_path / "expected", monitor=None)
    with pytest.raises(SystemExit):
        train_line(tmp_path / "run", monitor=None, evaluating=stop_at_6)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    path = checkpoints.path(6)
    state = checkpoints.load(path).state
    tensors = {file.stem: checkpoints.load(path).tensors(file.stem) for file in path.glob("*.safetensors")}
    for name in ("evaluated_step", "learning_rate", "gradient_norm"):
        del state["progress"][name]
    shutil.move(path, tmp_path / "new")
    checkpoints.save(6, tensors, state)
    measured = []
    assert train_line(tmp_path / "run", monitor=None, evaluating=measured.append) == expected
    assert measured == [8, 10, 12]
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "expected")


# ---- the best evaluation ----


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize(
    ("monitor", "best"), [("eval_score", 4), ("eval_loss", 2), ("eval_perplexity", 2), ("eval_mean_squared_error", 2)]
)
def test_with_a_monitor_the_result_has_the_weights_and_values_of_the_best_evaluation(
    tmp_path, capsys, monitor, best, ema_decay
):
    results, weight = train_line(tmp_path, monitor=monitor, ema_decay=ema_decay)
    assert results == {monitor: SCORES[best], "eval_weight": weight, "best_step": best}
    assert weight == evaluations(tmp_path)[best] != evaluations(tmp_path)[12]
    assert f"the result has the weights of step {best}, the best by {monitor}" in capsys.readouterr().out
    assert checkpoint_names(tmp_path) == [f"step-{best:06d}", "step-000012"]
    results, weight = train_line(tmp_path / "without", monitor=None, ema_decay=ema_decay)
    assert results == {"eval_score": SCORES[12], "eval_weight": weight}


def test_patience_ends_the_training_after_evaluations_that_were_no_better(tmp_path, capsys):
    expected = train_line(tmp_path / "run", patience=3)
    assert expected[0]["best_step"] == 4
    assert list(evaluations(tmp_path / "run")) == [2, 4, 6, 8, 10]
    assert "stopped early, after step 10: 3 evaluations had no better eval_score" in capsys.readouterr().out
    before = files(tmp_path / "run")
    data = Points()
    assert train_line(tmp_path / "run", patience=3, data=data) == expected
    assert data.step == 0 and files(tmp_path / "run") == before
    assert train_line(tmp_path / "run", patience=4)[0]["best_step"] == 4  # more patience: it goes on
    assert list(evaluations(tmp_path / "run")) == [2, 4, 6, 8, 10, 12]


def test_the_steps_before_an_end_for_want_of_patience_are_logged_too(tmp_path):
    train_line(tmp_path, patience=3)
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == [3, 6, 9, 10]


def test_a_run_that_ended_early_and_lost_its_best_checkpoint_goes_on(tmp_path, capsys):
    train_line(tmp_path, patience=3)
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    results, _ = train_line(tmp_path, patience=3)
    assert results["best_step"] == 10 and list(evaluations(tmp_path)) == [2, 4, 6, 8, 10, 12]
    assert "lost the best weights so far, those of step-000004" in capsys.readouterr().out


def test_patience_counts_only_evaluations_in_a_row(tmp_path):
    results, _ = train_line(tmp_path, scores={2: 0.5, 4: 0.4, 6: 0.6, 8: 0.5, 10: 0.7, 12: 0.1}, patience=2)
    assert list(evaluations(tmp_path)) == [2, 4, 6, 8, 10, 12] and results["best_step"] == 10


def test_an_evaluation_that_is_not_a_number_is_never_the_best(tmp_path, capsys):
    assert train_line(tmp_path / "some", scores={2: math.nan, 4: 0.1, 6: math.nan}, max_steps=6)[0]["best_step"] == 4
    results, weight = train_line(tmp_path / "all", scores=dict.fromkeys(SCORES, math.nan), patience=2)
    assert "best_step" not in results and results["eval_weight"] == weight
    assert "the result has the last weights, those of step 4: there are no best ones" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("measured", "options", "said"),
    [
        ("eval_loss", {}, "error: monitor: 'eval_score' is not measured, only eval_loss, eval_weight"),
        ("eval_score", {"monitor": None, "patience": 2}, "error: patience waits for a better evaluation"),
    ],
)
def test_a_monitor_that_is_not_measured_and_patience_without_one_are_refused(tmp_path, capsys, measured, options, said):
    with pytest.raises(SystemExit) as ended:
        train_line(tmp_path, measured=measured, **options)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_what_was_best_by_another_measure_does_not_count(tmp_path):
    train_line(tmp_path, max_steps=6, schedule="constant")
    results, _ = train_line(tmp_path, monitor="eval_other", scores={8: 0.1, 10: 0.2, 12: 0.0}, schedule="constant")
    assert results["best_step"] == 10 and results["eval_other"] == 0.2
    assert checkpoint_names(tmp_path) == ["step-000010", "step-000012"]


def kill_at(call: int, owner, name: str):
    """The process ends without a word before the call of this number."""
    function, calls = getattr(owner, name), iter(range(1, 10_000))

    def counted(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, counted)


MOMENTS = {
    "a step": (loop, "accumulate_gradients"),
    "an evaluation": (Line, "eval"),
    "the log of an evaluation": (MetricsLog, "write_evaluation"),
    "the comparison, after the evaluation was logged": (loop, "compare_with_best"),
    "a save": (loop, "gather_training_state"),
    "a write to disk": (os, "fsync"),
    "the rename that makes a checkpoint stand": (os, "rename"),
    "a rotation": (Checkpoints, "_rotate"),
    "the way back to the best": (loop, "return_to_best"),
    "its loading": (resume, "restore"),
}


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=[pytest.mark.slow] * ("write" in moment)) for moment in MOMENTS]
)
def test_killed_before_each_such_moment_and_repeated_the_best_is_the_same(tmp_path, moment):
    expected = train_line(tmp_path / "expected", patience=3)
    for number in itertools.count(1):
        run = tmp_path / str(number)
        code = in_a_process(train_line_and_die, run, moment, number, method="forkserver")
        assert code in (0, -signal.SIGKILL)
        assert train_line(run, patience=3) == expected
        assert read_metrics(run) == read_metrics(tmp_path / "expected")
        assert {"step-000004", "step-000010"} <= set(checkpoint_names(run))
        if code == 0:  # a whole run has fewer such moments
            break
    assert number > 1, "it was never killed"


def train_line_and_die(run, moment: str, call: int):
    """A training that ends without a word before this call of the moment's function; if it has so many."""
    kill_at(call, *MOMENTS[moment])
    train_line(run, patience=3)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "damaged": (lambda path: flip_a_bit(path / "ema.safetensors"), "wrong sha256"),
    "gone": (shutil.rmtree, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_lost_best_checkpoint_is_named_and_the_best_of_what_follows_takes_its_place(tmp_path, capsys, damage):
    do, said = DAMAGE[damage]
    train_line(tmp_path, max_steps=6, schedule="constant")
    do(tmp_path / "checkpoints/step-000004")
    results, weight = train_line(tmp_path, schedule="constant")
    assert "lost the best weights so far, those of step-000004: " in (out := capsys.readouterr().out) and said in out
    assert results["best_step"] == 8 and weight == evaluations(tmp_path)[8]


@pytest.mark.parametrize("damage", DAMAGE)
def test_where_no_best_checkpoint_stands_at_the_end_the_last_weights_are_the_result_and_it_says_so(
    tmp_path, capsys, damage
):
    do, said = DAMAGE[damage]

    class Damaging(Points):
        def batch(self, step, positions):
            if step == 11:
                do(tmp_path / "run/checkpoints/step-000004")
            return super().batch(step, positions)

    results, weight = train_line(tmp_path / "run", data=Damaging())
    assert results == {"eval_score": SCORES[12], "eval_weight": weight}
    out = capsys.readouterr().out
    assert said in out and "the result has the last weights, those of step 12" in out
    again, weight_again = train_line(tmp_path / "run")  # a finished run, repeated: measured again
    assert weight_again == weight and again["best_step"] == 12
