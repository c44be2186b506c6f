"""metrics.jsonl, the record of a run: one line of JSON for each `log_every` steps and for each evaluation.

{"step": 10, "loss": 4.1, "learning_rate": 0.001, "tokens_per_second": 20000.0, ...}
{"step": 100, "eval_loss": 3.2, ...}
"""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from training.run.arguments import RunArguments
from training.run.folder import write_atomic
from training.run.processes import on_main_process


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl.

    A last line that is not whole is passed over: a process that is killed while it writes leaves one.

    Raises:
        ValueError: another line is not a JSON object with a "step"; the message names the file and the line.
    """
    path = Path(path)
    texts = [text for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if text.strip()]
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number}: not JSON ({error}); remove this line") from None
            continue
        if not isinstance(line, dict) or "step" not in line:
            raise ValueError(f'{path}, line {number}: not an object with a "step"; remove this line')
        lines.append(line)
    return lines


def to_json_lines(lines: list[dict[str, Any]]) -> str:
    """Returns the text of a file of these lines."""
    return "".join(json.dumps(line) + "\n" for line in lines)


class MetricsLog:
    """Writes metrics.jsonl, the progress bar and the tracker, from the main process.

    Sums since the last line are kept in `progress`, which every checkpoint contains. Lines that the resumed checkpoint
    does not know of are cut off, so the file of a resumed run equals that of an uninterrupted one, except for times.

    Args:
        progress: from `training.run.resume.resume`.
        unit: what a sample consists of, in the plural; "tokens" are logged as `tokens_per_second`.
        row_length: how many units a sample has room for; the used part is logged as `fill`. None: not logged.

    Raises:
        ValueError: metrics.jsonl is damaged.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: RunArguments,
        output_dir: Path,
        progress: dict[str, Any],
        unit: str,
        row_length: int | None = None,
    ):
        self.accelerator, self.progress, self.path = accelerator, progress, output_dir / "metrics.jsonl"
        self.unit, self.room_in_step = unit, (row_length or 0) * args.global_batch_size
        on_main_process(accelerator, self._cut_off_unknown_lines)
        if args.report_to != "none":
            config = {name: value for name, value in vars(args).items() if value is not None}
            accelerator.init_trackers(output_dir.resolve().name, config=config)
        self.bar = tqdm(
            total=args.max_steps,
            initial=progress["step"],
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self.close = self.bar.close

    def _cut_off_unknown_lines(self):
        lines = read_metrics(self.path) if self.path.exists() else []
        write_atomic(self.path, to_json_lines(list(filter(self._is_known, lines))))

    def _is_known(self, line: dict[str, Any]) -> bool:
        """Returns whether the line was written before the checkpoint that the run goes on from was saved."""
        if line["step"] != self.progress["step"]:
            return line["step"] < self.progress["step"]
        if "learning_rate" in line:  # a line of training, after which the sums begin anew
            return self.progress["num_steps"] == 0
        return self.progress["evaluated_step"] == line["step"]

    def add(
        self, loss: float, num_units: float, seconds: float, learning_rate: float, gradient_norm: float | None = None
    ):
        """Counts one step."""
        self.progress.update(learning_rate=learning_rate, gradient_norm=gradient_norm)
        self.progress["loss_sum"] += loss
        self.progress["num_units"] += num_units
        self.progress["num_steps"] += 1
        self.progress["interval_seconds"] += seconds
        self.bar.update()

    def write_training(self):
        """Writes a line about the steps since the last such line."""
        progress, rate_name = self.progress, f"{self.unit}_per_second"
        values = {
            "loss": progress["loss_sum"] / progress["num_steps"],
            "learning_rate": progress["learning_rate"],
            rate_name: round(progress["num_units"] / progress["interval_seconds"], 1),
        }
        if self.room_in_step:
            values["fill"] = progress["num_units"] / (progress["num_steps"] * self.room_in_step)
        if progress["gradient_norm"] is not None:
            values["gradient_norm"] = progress["gradient_norm"]
        progress.update(loss_sum=0.0, num_units=0.0, num_steps=0, interval_seconds=0.0)
        self._write(values)
        self.bar.set_postfix({"loss": f"{values['loss']:.4f}", f"{self.unit}/s": f"{values[rate_name]:,.0f}"})

    def write_evaluation(self, results: dict[str, Any]):
        """Writes a line about an evaluation, and prints its numbers and its sample of text, if it has one."""
        self._write(results)
        if self.accelerator.is_main_process:
            numbers = {name: value for name, value in results.items() if isinstance(value, float)}
            shown = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            sample = results.get("sample")
            tqdm.write(f"step {self.progress['step']}  {shown}" + (f"\n{sample}\n" if sample else ""))

    def _write(self, values: dict[str, Any]):
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, float)}, step=self.progress["step"])
        if self.accelerator.is_main_process:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(to_json_lines([{"step": self.progress["step"], **values}]))
            except OSError as error:  # a full disk: the error does not name the file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
