"""A run that changes its number of processes on the way, and the ready-made configurations of accelerate."""

import signal

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_models import ZooGPTForCausalLM
from tests.faults.processes import (
    BATCH,
    REPOSITORY,
    STEPS,
    assert_same_result,
    checkpoint_names,
    free_port,
    losses,
    read_metrics,
)

pytestmark = pytest.mark.xdist_group("processes")  # these tests share one run, so one worker runs them all

CONFIGURATIONS = sorted((REPOSITORY / "training" / "accelerate").glob("*.yaml"))
EVERY_STEP = {"log_every": 1}
FSDP2 = {  # what the launcher makes of fsdp2_cpu.yaml
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "TransformerBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def assert_close(folder, expected):
    """The two runs have the same losses to 1e-5, and weights that such losses leave."""
    torch.testing.assert_close(losses(folder), losses(expected), rtol=1e-5, atol=1e-5)
    ours, theirs = (load_file(run / "model.safetensors") for run in (folder, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def saved_names(folder) -> set[str]:
    """Every parameter name in the result and in the last checkpoint."""
    last = folder / "checkpoints" / checkpoint_names(folder)[-1]
    names = set()
    for path in (folder / "model.safetensors", last / "model.safetensors", last / "ema.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


@pytest.fixture(scope="module")
def single(trainers, tmp_path_factory):
    """The folder of a run of one process that logged every step."""
    folder = tmp_path_factory.mktemp("single") / "run"
    trainers.run(folder, **EVERY_STEP)
    return folder


def test_one_two_and_again_one_process_lose_and_repeat_no_sample(trainers, single, tmp_path):
    run, rows = tmp_path / "run", tmp_path / "rows"
    record = ("--record", str(rows))
    trainers.run(run, *record, "--fault", "terminate:step:8", **EVERY_STEP)
    trainers.run_ranks(run, 2, *record, "--fault", "terminate:step:9@1", micro_batch_size=2, **EVERY_STEP)
    assert checkpoint_names(run)[-1] == "step-000017"
    trainers.run(run, *record, micro_batch_size=2, **EVERY_STEP)
    assert sorted(map(int, rows.read_text().split())) == list(range(STEPS * BATCH))
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == list(range(1, STEPS + 1))
    assert_close(run, single)


@pytest.mark.parametrize("script", ["train_bert", "train_vit", "train_vit-mae", "train_detr"])
def test_every_model_is_trained_by_one_two_and_again_one_process(trainers, tmp_path, script):
    options = {"script": script, **EVERY_STEP}
    trainers.run(tmp_path / "single", **options)
    trainers.run(tmp_path / "run", "--fault", "terminate:step:8", **options)
    trainers.run_ranks(tmp_path / "run", 2, "--fault", "terminate:step:9@1", micro_batch_size=2, **options)
    assert checkpoint_names(tmp_path / "run")[-1] == "step-000017"
    trainers.run(tmp_path / "run", micro_batch_size=2, **options)
    assert_close(tmp_path / "run", tmp_path / "single")


@pytest.mark.slow
def test_a_detector_is_trained_on_shards_too(trainers, tmp_path):
    options = {"script": "train_detr", **EVERY_STEP}
    trainers.run(tmp_path / "single", **options)
    trainers.run_ranks(tmp_path / "run", 2, env=FSDP2, **options)
    assert_close(tmp_path / "run", tmp_path / "single")


def test_a_killed_run_goes_on_with_another_number_of_processes(trainers, single, tmp_path):
    runs = trainers.start_ranks(tmp_path / "run", 2, "--fault", "kill:update:10@1", **EVERY_STEP)
    assert [run.wait() for run in runs][1] == -signal.SIGKILL
    trainers.run_ranks(tmp_path / "run", 4, **EVERY_STEP)
    assert_close(tmp_path / "run", single)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_a_configuration_parses_as_accelerate_reads_it(path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config_file training/launch/{path.name}" in line for line in header)
    args = launch_command_parser().parse_args(["--config_file", str(path), "training/train_gpt.py"])
    args, defaults, _ = _validate_launch_command(args)
    written = yaml.safe_load(path.read_text())
    assert args.num_processes == written["num_processes"] and args.mixed_precision == written["mixed_precision"]
    assert args.use_fsdp == path.stem.startswith("fsdp2")
    if args.use_fsdp:
        assert args.fsdp_version == 2 and args.fsdp_transformer_layer_cls_to_wrap == "TransformerBlock"


def test_fsdp2_trains_as_one_process_does_and_one_process_resumes_it(trainers, single, tmp_path):
    """Muon, AdamW with its two groups, and the moving average on shards, through the configuration of accelerate."""
    launched = trainers.launch_processes(
        tmp_path / "run", 2, "--fault", "terminate:step:14@1", config="fsdp2_cpu", **EVERY_STEP
    )
    launched.wait(0)
    assert "stopped by another process after step 14" in launched.output, launched.errors
    trainers.run(tmp_path / "run", "--fault", "terminate:step:4", **EVERY_STEP)
    trainers.run_ranks(tmp_path / "run", 2, env=FSDP2, micro_batch_size=2, **EVERY_STEP)
    assert_close(tmp_path / "run", single)
    assert saved_names(tmp_path / "run") == saved_names(single)
    # The checkpoint is the model's own, code and class: nothing of FSDP is left in it.
    assert {path.name for path in (tmp_path / "run").glob("*.py")} == {path.name for path in single.glob("*.py")}
    assert (tmp_path / "run" / "config.json").read_text() == (single / "config.json").read_text()


def test_fsdp2_resumes_bit_identical(trainers, tmp_path):
    trainers.run_ranks(tmp_path / "expected", 2, env=FSDP2, dropout=0.1)
    runs = trainers.start_ranks(tmp_path / "run", 2, "--fault", "kill:update:10@0", env=FSDP2, dropout=0.1)
    assert all(run.wait() for run in runs)
    trainers.run_ranks(tmp_path / "run", 2, env=FSDP2, dropout=0.1)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


@pytest.mark.parametrize(
    ("environment", "ema_decay"),
    [
        pytest.param({}, 0.9, id="DDP"),
        pytest.param(FSDP2, 0.9, id="FSDP2", marks=pytest.mark.slow),
        pytest.param(FSDP2, 0.0, id="FSDP2 without average"),
    ],
)
def test_processes_agree_when_to_stop_and_end_with_the_best_weights(trainers, tmp_path, environment, ema_decay):
    options = {"env": environment, "ema_decay": ema_decay, "eval_every": 3, "patience": 2, "dropout": 0.1}
    best = ("--best_at", "12")
    first, second = trainers.run_ranks(tmp_path / "expected", 2, *best, **options)
    assert "stopped early, after step 18" in first.output and "stopped early" not in second.output
    # The best one, and the two newest: each evaluated step is saved first.
    assert checkpoint_names(tmp_path / "expected") == ["step-000012", "step-000015", "step-000018"]
    result = load_file(tmp_path / "expected/model.safetensors")
    kept = load_file(tmp_path / f"expected/checkpoints/step-000012/{'ema' if ema_decay else 'model'}.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in result.items())
    runs = trainers.start_ranks(tmp_path / "run", 2, *best, "--fault", "kill:step:14@1", **options)
    assert all(run.wait() for run in runs)
    trainers.run_ranks(tmp_path / "run", 2, *best, **options)
    assert_same_result(tmp_path / "run", tmp_path / "expected")


def test_fsdp_version_1_is_refused(trainers, tmp_path):
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    first, second = trainers.run_ranks(tmp_path / "run", 2, env=env, expected=2)
    assert "error: FSDP version 1 is not supported" in first.errors and "error:" not in second.errors


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_saves_plain_names_and_any_process_resumes_it(trainers, single, tmp_path, backend):
    options = {"compile": True, **EVERY_STEP}
    compiler = ("--compile_with", backend)
    trainers.run_ranks(tmp_path / "run", 2, *compiler, "--fault", "terminate:step:14@1", **options)
    trainers.run(tmp_path / "run", **EVERY_STEP)
    assert_close(tmp_path / "run", single)
    assert saved_names(tmp_path / "run") == saved_names(single)


def test_two_machines(trainers, single, tmp_path):
    """The configuration of several nodes on loopback, one process on each."""
    config = str(REPOSITORY / "training/launch/nodes.yaml")
    launcher = ("--config_file", config, "--num_processes", "2", "--main_process_ip", "127.0.0.1")
    launcher += ("--main_process_port", str(free_port()))
    machines = [
        trainers.launch(tmp_path / "run", launcher=(*launcher, "--machine_rank", str(rank)), **EVERY_STEP)
        for rank in (0, 1)
    ]
    for machine in machines:
        machine.wait(0)
    assert "The model is in" in machines[0].output and "The model" not in machines[1].output
    assert_close(tmp_path / "run", single)


@pytest.mark.parametrize(
    ("processes", "environment", "script"),
    [(1, {}, "train_gpt"), (2, FSDP2, "train_gpt"), (2, FSDP2, "train_detr")],
    ids=["one process", "FSDP2", "FSDP2, a detector"],
)
def test_bf16_with_gradient_checkpointing_keeps_losses_in_float32(trainers, tmp_path, processes, environment, script):
    options = {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_steps": 4, "script": script}
    options |= EVERY_STEP
    if processes == 1:
        runs = [trainers.run(tmp_path / "run", **options)]
    else:
        runs = trainers.run_ranks(tmp_path / "run", processes, env=environment, **options)
    assert not any("FutureWarning" in run.errors for run in runs)
    values = torch.tensor(losses(tmp_path / "run"))
    assert len(values) == 4 and values.isfinite().all()
    assert not torch.equal(values, values.bfloat16().float()), "the losses were rounded to bfloat16"


def test_training_goes_on_from_a_stock_gpt2(trainers, uninterrupted, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted())
    sizes = {"vocab_size": len(tokenizer), "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    options = {"model": tmp_path / "stock", "tokenizer": tmp_path / "stock", "learning_rate": 1e-2}
    trainers.run(tmp_path / "run", **options, **EVERY_STEP)
    first, *_, last = losses(tmp_path / "run")
    assert last < first - 0.5
    assert ZooGPTForCausalLM.from_pretrained(tmp_path / "run").config.model_type == "zoo_gpt"
