"""Pictures of a training: one function a figure. Each returns a matplotlib Figure; `figure.savefig(path)` keeps it."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no window system, no global state


def curves(metrics_file: str | Path) -> Figure:
    """The course of a run: training loss (raw and smoothed) and evaluation loss over the learning rate.

    metrics_file: JSON lines with "step" and any of "loss", "learning_rate", "eval_loss". A torn last line, left by a
    run that was killed while writing, is passed over. Raises ValueError if no line has a loss.
    """
    lines = _read_lines(Path(metrics_file))
    losses, rates, evaluations = (_series(lines, key) for key in ("loss", "learning_rate", "eval_loss"))
    if not losses[0] and not evaluations[0]:
        raise ValueError(f"{metrics_file}: no line has a loss, nothing to draw")

    figure = Figure(figsize=(7, 4.6), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    if losses[0]:
        steps, values = losses
        upper.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        upper.plot(steps, _smooth(values), color="tab:blue", linewidth=1.6, label="training (smoothed)")
    if evaluations[0]:
        steps, values = evaluations
        upper.plot(steps, values, color="tab:orange", marker="o", markersize=4, linewidth=1.2, label="evaluation")
        upper.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), (0, 7), textcoords="offset points", ha="center")
    upper.set_ylabel("loss")
    upper.legend(frameon=False)
    lower.plot(*rates, color="tab:gray", linewidth=1.2)
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.align_ylabels()
    return figure


def _read_lines(path: Path) -> list[dict]:
    texts = [text for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if text.strip()]
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    return lines


def _series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """The steps that have `key`, in order, and its values. A step that was repeated after a resume counts once."""
    series = {line["step"]: line[key] for line in lines if key in line}
    steps = sorted(series)
    return steps, [series[step] for step in steps]


def _smooth(values: list[float]) -> np.ndarray:
    """The mean over a twentieth of the course around each point (fewer at the ends), so the curve does not lag."""
    index = np.arange(len(values))
    half = np.minimum(np.minimum(index, index[::-1]), len(values) // 40)
    totals = np.concatenate([[0.0], np.cumsum(values)])
    return (totals[index + half + 1] - totals[index - half]) / (2 * half + 1)
