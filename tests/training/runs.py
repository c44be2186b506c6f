"""What a run writes, for the tests that read it."""

import json
from pathlib import Path

TRAINING = [{"step": step, "loss": 4 / (step + 1), "learning_rate": 1e-3} for step in range(0, 50, 10)]


def write_metrics(folder: Path, lines: list[dict], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path
