"""What the loop promises about a step: the same whoever shares the work, the same seed everywhere, exact sums."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.faults.conftest import trainers  # noqa: F401
from tests.faults.processes import losses
from training.arguments import RunArguments
from training.loop import identify, micro_batches, seed_from, speed_up_cpu_matmul
from training.results import MetricsLog

FIFTY = {"max_steps": 50, "log_every": 1, "eval_every": 0, "save_every": 0, "ema_decay": 0.0}


@pytest.mark.parametrize(
    ("optimizer", "layouts"),
    [
        ("muon", [(1, 2), (2, 4), (2, 1)]),
        pytest.param("adamw", [(1, 2), (2, 4), (2, 1), (4, 2), (4, 1)], marks=pytest.mark.slow),
        pytest.param("muon", [(4, 2), (4, 1)], marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_have_the_same_losses_however_the_batch_is_shared(trainers, tmp_path, optimizer, layouts):  # noqa: F811
    def train(processes: int, micro_batch_size: int) -> list[float]:
        folder = tmp_path / f"{processes}-{micro_batch_size}"
        options = {**FIFTY, "optimizer": optimizer, "micro_batch_size": micro_batch_size}
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
    progress = {"step": 4, "seconds": 1.0, "interval_seconds": 0.0, "loss_sum": 0.0, "num_items": 0, "num_steps": 0}
    log = MetricsLog(accelerator, RunArguments(max_steps=6), tmp_path, progress)
    assert path.read_text() == "".join(lines[:2])
    log.add(1.0, 10, 0.5)
    progress["step"] = 5
    log.add(2.0, 10, 0.5)
    log.write_training(0.1, None, "tokens")
    log.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {
        "step": 5,
        "loss": 1.5,
        "learning_rate": 0.1,
        "tokens_per_second": 20.0,
    }
    assert progress == {**progress, "seconds": 1.0, "interval_seconds": 0.0, "loss_sum": 0.0, "num_steps": 0}
