"""Exports a run as it was after an earlier step, from one of its checkpoints."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

import hf_models
from training.figures import curves
from training.hub.card import read_results
from training.run.arguments import one_line
from training.run.checkpoint import Checkpoint, Checkpoints, find_damage, restore_training_state
from training.run.costs import measured_costs
from training.run.folder import write_atomic
from training.run.log import read_metrics, to_json_lines
from training.run.optim import parameter_names

MAX_SHARD_SIZE = "5GB"  # the largest file of weights
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

# What eval_results.json contains besides measurements; it is the same at every step.
DESCRIPTION = ["family", "parameters", "task", "model", "started_from", "command", "recipe", "recipe_fingerprint"]
DESCRIPTION += ["data", "hardware", "versions"]


def export_step(run: Path, step: int, names: list[str], destination: Path):
    """Exports a finished run into the new folder `destination` as if it had ended after `step`.

    The folder gets the weights of that checkpoint, the metrics up to that step, and the evaluation of that step if
    there was one.

    Args:
        names: files of the finished run that are the same at every step, such as config, code and processor.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or its model is not the one that the config describes.
        OSError: a file cannot be written.
    """
    checkpoints = Checkpoints(run / "checkpoints")
    path = checkpoints.path(step)
    if damage := find_damage(path):
        others = ", ".join(sorted(other.name for other in path.parent.glob("step-*"))) or "none"
        raise ValueError(f"{path}: {damage}; the checkpoints that there are: {others}")
    checkpoint = checkpoints.load(path)
    destination.mkdir()
    for name in names:
        if not WEIGHTS.fullmatch(name):
            shutil.copyfile(run / name, destination / name)
    if (run / "README.md").exists():  # a person may have written in it
        shutil.copyfile(run / "README.md", destination / "README.md")
    try:
        model = load_model(checkpoint, run)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be loaded into the model of {run}: {one_line(error)}") from error
    try:
        model.save_pretrained(destination, max_shard_size=MAX_SHARD_SIZE)
    except SafetensorError as error:  # a full disk, in its words
        raise OSError(f"writing the weights of {path} to {destination} failed: {one_line(error)}") from error

    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] <= step]
    write_atomic(destination / "metrics.jsonl", to_json_lines(lines))
    curves(destination / "metrics.jsonl").savefig(destination / "curves.png")
    results = measured_costs(checkpoint.state["progress"])
    for line in lines:
        if line["step"] == step:
            results |= {name: value for name, value in line.items() if name.startswith("eval_") or name == "sample"}
    at_the_end = read_results(run / "eval_results.json")
    results |= {name: at_the_end[name] for name in DESCRIPTION if name in at_the_end}
    write_atomic(destination / "eval_results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def load_model(checkpoint: Checkpoint, run: Path) -> PreTrainedModel:
    """Returns the model with the weights of a checkpoint, or with their moving average if the run keeps one: these were
    the weights that its evaluations measured."""
    config = AutoConfig.from_pretrained(run)
    model = getattr(hf_models, config.architectures[0])(config)
    restore_training_state(model, [], checkpoint)
    if (checkpoint.path / "ema.safetensors").exists():
        parameters = {names[0]: parameter for parameter, names in parameter_names(model).items()}
        with torch.no_grad():
            for name, average in checkpoint.tensors("ema").items():
                parameters[name].copy_(average)
    return model
