import warnings

import numpy as np
import pytest

from tests.training.runs import TRAINING, write_metrics
from training import figures
from training.figures import confusion_matrix, curves


def test_curves_show_training_evaluation_and_learning_rate(tmp_path):
    figure = curves(write_metrics(tmp_path, [*TRAINING, {"step": 40, "eval_loss": 1.25}]))
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
    figure = curves(write_metrics(tmp_path, TRAINING, tail='{"step": 50, "lo'))
    assert len(figure.axes[0].lines[0].get_xdata()) == 5
    with pytest.raises(ValueError, match="line 6: not JSON"):
        curves(write_metrics(tmp_path, TRAINING, tail='{"step": 50, "lo\n{"step": 60, "loss": 1}\n'))


def test_a_step_repeated_after_a_resume_counts_once_with_its_last_value(tmp_path):
    figure = curves(write_metrics(tmp_path, [*TRAINING, {"step": 40, "loss": 9.0}]))
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 10, 20, 30, 40]
    assert figure.axes[0].lines[0].get_ydata()[-1] == 9.0


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="no line has a loss"):
        curves(write_metrics(tmp_path, [{"step": 1, "learning_rate": 1}]))


def test_accuracy_has_a_panel_where_it_was_measured(tmp_path):
    evaluations = [{"step": step, "eval_loss": 1.0, "eval_accuracy": step / 50} for step in (20, 40)]
    upper, middle, lower = curves(write_metrics(tmp_path, [*TRAINING, *evaluations])).axes
    assert [axes.get_ylabel() for axes in (upper, middle, lower)] == ["loss", "accuracy", "learning rate"]
    assert list(middle.lines[0].get_ydata()) == [0.4, 0.8]


def test_average_precision_has_that_panel_for_boxes(tmp_path):
    evaluations = [{"step": 40, "eval_loss": 1.0, "eval_map": 0.25, "eval_map_50": 0.5}]
    middle = curves(write_metrics(tmp_path, [*TRAINING, *evaluations])).axes[1]
    assert middle.get_ylabel() == "AP" and list(middle.lines[0].get_ydata()) == [0.25]


# ----------------------------------------------------------------------------------------------- confusion matrix


def test_a_confusion_matrix_counts_in_numbers_and_shades_by_fractions_of_the_true_class():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a class without an image divides by nothing
        (axes,) = confusion_matrix([[90, 10, 0], [0, 1, 1], [0, 0, 0]], ["cat", "dog", "$x$"]).axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.9, 0.1, 0], [0, 0.5, 0.5], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts] == ["90", "10", "1", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "$x$"]
    assert axes.get_title() == "89.22% of 102 are right"


def test_a_confusion_matrix_of_many_classes_stays_readable():
    figure = confusion_matrix(np.eye(100, dtype=int), [f"a long name of class {number}" for number in range(100)])
    assert not figure.axes[0].texts and len(figure.axes[0].get_yticklabels()) == 50
    assert max(figure.get_size_inches()) * figure.dpi < 2500


def test_a_confusion_matrix_needs_a_name_for_each_class():
    with pytest.raises(ValueError, match=r"counts of shape \(2, 2\) do not fit 3 label_names"):
        confusion_matrix([[1, 0], [0, 1]], ["a", "b", "c"])


# --------------------------------------------------------------------------------------- images, filters and boxes


@pytest.mark.parametrize("num_heads, num_lines", [(1, 1), (3, 1), (12, 2), (20, 3)])
def test_many_heads_are_wrapped(num_heads, num_lines):
    figure = figures.image_attention(np.zeros((1, 8, 8, 1)), np.ones((1, 2, 2)), np.ones((1, num_heads, 2, 2)))
    heads = [axes for axes in figure.axes if axes.get_title().startswith("head")]
    assert len(heads) == num_heads and len({round(axes.get_position().y0, 6) for axes in heads}) == num_lines


def test_of_a_fine_grid_only_some_tiles_are_drawn():
    axes = figures.similarity_of_positions(np.random.default_rng(0).normal(size=(40, 5, 8))).axes[0]
    rows = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert len(rows) == 14 and rows[0] == 1 and rows[-1] == 40
    assert len(axes.get_xticklabels()) == 5


def test_filters_are_shown_by_what_distinguishes_them_most():
    vertical, horizontal = np.zeros((2, 3, 4, 4))
    vertical[:, :, :2], horizontal[:, :2] = 1, 1
    random = np.random.default_rng(0).normal(size=(2, 64, 1, 1, 1))
    first, second = figures.principal_filters(3 * random[0] * vertical + random[1] * horizontal).axes
    image = first.images[0].get_array()
    assert np.ptp(image[:, :2]) < 0.2 and image[:, 0].mean() > image[:, -1].mean() + 0.2  # nearly `vertical`
    assert len(second.images) == 1


def test_filters_that_are_all_the_same_are_said():
    with pytest.raises(ValueError, match="no principal components"):
        figures.principal_filters(np.ones((8, 3, 4, 4)))


BOXES = {"boxes": np.array([[0, 0, 0.5, 1], [0.25, 0.5, 1, 1]]), "labels": [0, 2], "scores": [0.9, 0.123]}


def outlines_of(axes):
    """The corners of the rectangles drawn: left, top, right, bottom, in pixels."""
    boxes = [patch.get_bbox() for patch in axes.patches]
    return [[box.x0 + 0.5, box.y0 + 0.5, box.x1 + 0.5, box.y1 + 0.5] for box in boxes]


def test_boxes_are_drawn_with_their_names_beside_the_true_ones():
    images = [np.zeros((20, 40, 3)), np.zeros((30, 30, 1)), np.zeros((1, 400, 3))]
    nothing = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}
    true = [{"boxes": BOXES["boxes"][:1], "labels": [0]}, *[{"boxes": [], "labels": []}] * 2]
    figure = figures.detections(images, [BOXES, nothing, nothing], ["cat", "dog", "$x$"], true)
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes] == ["true", "found"] * 2 + [""] * 2
    expected, found = figure.axes[:2]
    assert outlines_of(expected) == [[0, 0, 20, 20]] and outlines_of(found) == [[0, 0, 20, 20], [10, 10, 40, 20]]
    assert [text.get_text() for text in found.texts] == ["cat 90%", "$x$ 12%"]
    assert expected.patches[0].get_edgecolor() == found.patches[0].get_edgecolor() != found.patches[1].get_edgecolor()
    assert len(figures.detections(images, [nothing] * 3, ["cat"]).axes) == 3  # where nothing is known to be true


def test_each_query_has_a_panel_of_where_its_boxes_are():
    small, wide, tall = [0.1, 0.1, 0.2, 0.2], [0, 0.25, 1, 0.75], [0.5, 0, 1, 1]
    boxes = np.array([[small, small], [wide, tall], [tall, [np.nan] * 4]])
    figure = figures.query_slots(boxes)
    panels = [[points.get_offsets().tolist() for points in axes.collections] for axes in figure.axes]
    np.testing.assert_allclose(np.concatenate(panels[0]), [[0.15, 0.15], [0.5, 0.5], [0.75, 0.5]])
    assert [len(points) for points in panels[1]] == [1, 0, 1]  # small; large and wide; large and tall
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["small", "large, wide", "large, tall"]
    assert len(figures.query_slots(np.random.default_rng(0).random((2, 300, 4))).axes) == 100


def test_tokens_with_dollars_are_no_formulas():
    figures.token_attention_heads(np.ones((1, 2, 2)), ["$\\frac$", "$"]).draw_without_rendering()
