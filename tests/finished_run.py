"""A folder as a finished run leaves it, without the training."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_models.verify import write_checksums

RESULTS = {
    "eval_loss": 1.59134567,
    "eval_bits_per_byte": 2.29,
    "sample": "The end.",
    "family": "ZooGPTForCausalLM",
    "parameters": 1234567,
    "task": "text-generation",
    "command": "accelerate launch training/train_gpt.py --max_steps 5",
    "recipe": "training/recipes/quickstart.yaml",
    "data": {"source": "embedded", "fingerprint": "0a1b2c", "licence": "PSF-2.0"},
    "hardware": "2 CPU cores",
    "wall_time_seconds": 900.0,
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}
CODE = "\n".join(f"line_{number} = {number}" for number in range(50))
# What of it is for others, besides README.md and SHA256SUMS, which a push writes.
CHECKPOINT = ["config.json", "gpt.py", "merges.txt", "model.safetensors"]
MEASURED = ["curves.png", "eval_results.json", "metrics.jsonl"]
PUBLISHED = sorted([*CHECKPOINT, *MEASURED])
# What is not.
PRIVATE = ["run.json", ".lock", ".tmp-config.json-1", "train.log", "notes.md", "optimizer.safetensors"]
PRIVATE += ["checkpoints/step-000005/optimizer.safetensors", "wandb/config.json", ".export/config.json"]


def write_run(folder: Path, seed: int = 0) -> Path:
    """A run with weights of its own for each seed."""
    weights = torch.randn(2000, generator=torch.Generator().manual_seed(seed))
    contents = {
        "config.json": json.dumps({"model_type": "zoo_gpt", "seed": seed}),
        "gpt.py": CODE,
        "merges.txt": "a b\n",
        "curves.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "metrics.jsonl": "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6)),
        "eval_results.json": json.dumps({**RESULTS, "eval_loss": 1.5 + seed}),
        **{name: f"private {name}" for name in PRIVATE},
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    save_file({"weight": weights}, folder / "model.safetensors", metadata={"format": "pt"})
    write_checksums(folder)
    return folder
