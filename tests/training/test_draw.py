import json

import pytest

from training.draw import curves


def write(tmp_path, lines, tail=""):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


TRAINING = [{"step": step, "loss": 4 / (step + 1), "learning_rate": 1e-3} for step in range(0, 50, 10)]


def test_curves_show_training_evaluation_and_learning_rate(tmp_path):
    figure = curves(write(tmp_path, [*TRAINING, {"step": 40, "eval_loss": 1.25}]))
    upper, lower = figure.axes
    raw, smoothed, evaluation = upper.lines
    assert list(raw.get_ydata()) == [line["loss"] for line in TRAINING]
    assert smoothed.get_ydata()[0] == pytest.approx(4)
    assert list(evaluation.get_xdata()) == [40]
    assert list(lower.lines[0].get_ydata()) == [1e-3] * 5
    assert (upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel()) == ("loss", "learning rate", "step")
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_torn_last_line_is_passed_over_and_a_broken_one_before_is_named(tmp_path):
    figure = curves(write(tmp_path, TRAINING, tail='{"step": 50, "lo'))
    assert len(figure.axes[0].lines[0].get_xdata()) == 5
    with pytest.raises(ValueError, match="line 6: not JSON"):
        curves(write(tmp_path, TRAINING, tail='{"step": 50, "lo\n{"step": 60, "loss": 1}\n'))


def test_a_step_repeated_after_a_resume_counts_once_with_its_last_value(tmp_path):
    figure = curves(write(tmp_path, [*TRAINING, {"step": 40, "loss": 9.0}]))
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 10, 20, 30, 40]
    assert figure.axes[0].lines[0].get_ydata()[-1] == 9.0


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="no line has a loss"):
        curves(write(tmp_path, [{"step": 1, "learning_rate": 1}]))
