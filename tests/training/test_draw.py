import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

from hf_models import (
    ZooBertModel,
    ZooDetrConfig,
    ZooDetrForObjectDetection,
    ZooGPTModel,
    ZooViTMAEForPreTraining,
    ZooViTModel,
)
from training import draw, figures
from training.figures import confusion_matrix, curves
from training.models import create_detection_processor

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


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


def test_accuracy_has_a_panel_where_it_was_measured(tmp_path):
    evaluations = [{"step": step, "eval_loss": 1.0, "eval_accuracy": step / 50} for step in (20, 40)]
    upper, middle, lower = curves(write(tmp_path, [*TRAINING, *evaluations])).axes
    assert [axes.get_ylabel() for axes in (upper, middle, lower)] == ["loss", "accuracy", "learning rate"]
    assert list(middle.lines[0].get_ydata()) == [0.4, 0.8]


def test_average_precision_has_that_panel_for_boxes(tmp_path):
    evaluations = [{"step": 40, "eval_loss": 1.0, "eval_map": 0.25, "eval_map_50": 0.5}]
    middle = curves(write(tmp_path, [*TRAINING, *evaluations])).axes[1]
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


# ------------------------------------------------------------------------------------------ attention over images


def test_rollout_follows_tokens_through_the_layers():
    looks_at_first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    swaps = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    first, second = torch.stack((looks_at_first, swaps)), torch.stack((swaps, swaps))  # two heads each
    # With the residual half: 0.5 I + 0.5 mean of the heads; the second layer mixes what the first has mixed.
    layers = [torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])]
    rollout = draw.attention_rollout(torch.stack((first, second)))
    torch.testing.assert_close(rollout, layers[1] @ layers[0])
    batched = draw.attention_rollout(torch.stack((first, second))[:, None].expand(-1, 3, -1, -1, -1))
    torch.testing.assert_close(batched, rollout.expand(3, -1, -1))


def maps_of(figure):
    """The maps (rows, columns) drawn over images, in their order."""
    return [axes.images[1].get_array() for axes in figure.axes if len(axes.images) == 2]


@pytest.mark.parametrize("pooling", ["class", "mean", "both"])
def test_attention_maps_show_the_last_layer_from_where_the_image_is_pooled(make_vit, images, pooling):
    model = make_vit(pooling=pooling, num_register_tokens=2)
    weights = model(images, output_attentions=True).attentions[-1]  # (B, N, T, T)
    prefix = model.config.num_prefix_tokens
    rows = weights[:, :, prefix:].mean(2) if pooling == "mean" else weights[:, :, 0]
    drawn = np.stack(maps_of(draw.attention_maps(model, images))).reshape(3, 5, 4, 4)  # rollout, then four heads
    np.testing.assert_allclose(drawn[:, 1:], rows[..., prefix:].unflatten(-1, (4, 4)).detach(), atol=1e-6)


def test_maps_cover_the_whole_image_whatever_its_shape(make_vit):
    figure = draw.attention_maps(make_vit(), torch.randn(2, 3, 8, 20))
    shown, *overlays = figure.axes[:6]
    assert [axes.images[1].get_array().shape for axes in overlays] == [(2, 5)] * 5
    assert all(axes.images[1].get_extent() == shown.images[0].get_extent() for axes in overlays)
    width, height = figure.get_size_inches()
    for axes in figure.axes:
        place = axes.get_position()
        assert place.width * width / (place.height * height) == pytest.approx(20 / 8)


@pytest.mark.parametrize("num_heads, num_lines", [(1, 1), (3, 1), (12, 2), (20, 3)])
def test_many_heads_are_wrapped(num_heads, num_lines):
    figure = figures.image_attention(np.zeros((1, 8, 8, 1)), np.ones((1, 2, 2)), np.ones((1, num_heads, 2, 2)))
    heads = [axes for axes in figure.axes if axes.get_title().startswith("head")]
    assert len(heads) == num_heads and len({round(axes.get_position().y0, 6) for axes in heads}) == num_lines


def test_images_are_shown_as_they_were_before_they_were_normalised(make_vit):
    pixels = torch.rand(1, 3, 16, 16)
    shape = (3, 1, 1)
    normalised = (pixels - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)
    shown = draw.attention_maps(make_vit(), normalised, MEAN, STD).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, pixels[0].permute(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_model_is_left_as_it_was(make_vit, make_gpt, tokenizer, images, backend):
    model = make_vit(attn_implementation=backend, hidden_dropout=0.5).train()
    once, twice = (maps_of(draw.attention_maps(model, images[:1])) for _ in range(2))
    np.testing.assert_array_equal(once, twice)  # without dropout
    assert model.training and model.vit.layers.training and model.config._attn_implementation == backend
    model = make_gpt(attn_implementation=backend)
    draw.token_attention(model, tokenizer, "a word")
    assert not model.training and model.config._attn_implementation == backend


def test_a_masked_autoencoder_is_shown_the_whole_image(make_vit, images):
    model = make_vit(ZooViTMAEForPreTraining)
    attentions = ZooViTModel.forward(model.vit, images[:1], output_attentions=True).attentions
    drawn = np.stack(maps_of(draw.attention_maps(model, images[:1]))).reshape(1, 5, 4, 4)
    np.testing.assert_allclose(drawn[:, 1:], attentions[-1][:, :, 0, 1:].unflatten(-1, (4, 4)).detach(), atol=1e-6)


# ------------------------------------------------------------------------------------------------ reconstructions


def triples_of(figure):
    """Image, visible part and reconstruction of each image, (B, 3, H, W, C)."""
    shown = np.stack([axes.images[0].get_array() for axes in figure.axes])
    return shown.reshape(-1, 3, *shown.shape[1:])


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_reconstruction_is_the_image(make_vit, monkeypatch, norm_pix_loss):
    model = make_vit(ZooViTMAEForPreTraining, norm_pix_loss=norm_pix_loss)
    pixel_values = torch.rand(3, 3, 8, 24) * 2 - 1  # not the size it was made for
    monkeypatch.setattr(model.decoder, "forward", lambda *args, **kwargs: model.normalized_pixels(pixel_values))
    triples = triples_of(draw.reconstructions(model, pixel_values))
    np.testing.assert_allclose(triples[:, 2], triples[:, 0], atol=1e-5)
    np.testing.assert_allclose(triples[:, 0], (pixel_values * 0.5 + 0.5).permute(0, 2, 3, 1), atol=1e-6)


def test_what_is_masked_is_grey_and_what_is_visible_stays(make_vit):
    model, pixel_values = make_vit(ZooViTMAEForPreTraining), torch.rand(1, 3, 16, 16) - 0.5
    noise = torch.arange(16.0)[None]  # the first row of patches stays
    image, visible, painted = triples_of(draw.reconstructions(model, pixel_values, noise))[0]
    np.testing.assert_array_equal(visible[:4], image[:4])
    np.testing.assert_array_equal(visible[4:], np.full((12, 16, 3), 0.6, np.float32))
    np.testing.assert_allclose(painted[:4], image[:4], atol=1e-6)
    assert np.abs(painted[4:] - image[4:]).max() > 0.1


def test_the_same_patches_are_masked_at_every_call(make_vit, images):
    model = make_vit(ZooViTMAEForPreTraining)
    once, twice = (triples_of(draw.reconstructions(model, images[:1])) for _ in range(2))
    np.testing.assert_array_equal(once, twice)


# ------------------------------------------------------------------------------------------- positions and filters


@pytest.mark.parametrize("kind", ["learned", "learned_2d"])
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_each_patch_has_a_tile_in_which_its_own_place_is_most_similar(make_vit, kind, pooling):
    model = make_vit(position_embedding_type=kind, pooling=pooling, image_size=[8, 12])  # 2 x 3 patches
    vectors = torch.nn.functional.normalize(model.vit.positions.vectors(2, 3, torch.float32, "cpu")[0], dim=-1)
    board = draw.position_similarity(model).axes[0].images[0].get_array().filled(np.nan)
    assert board.shape == (2 * 2 + 1, 3 * 3 + 2)  # with a line between tiles
    for patch, expected in enumerate((vectors @ vectors.T).unflatten(1, (2, 3)).detach()):
        row, column = divmod(patch, 3)
        tile = board[3 * row : 3 * row + 2, 4 * column : 4 * column + 3]
        np.testing.assert_allclose(tile, expected, atol=1e-5)
        assert tile.argmax() == patch


def test_of_a_fine_grid_only_some_tiles_are_drawn():
    axes = figures.similarity_of_positions(np.random.default_rng(0).normal(size=(40, 5, 8))).axes[0]
    rows = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert len(rows) == 14 and rows[0] == 1 and rows[-1] == 40
    assert len(axes.get_xticklabels()) == 5


@pytest.mark.parametrize("kind", ["rotary", "sinusoidal"])
def test_positions_that_are_not_learnt_are_not_drawn(make_vit, kind):
    with pytest.raises(ValueError, match=f"position_embedding_type='{kind}' has no learned positions"):
        draw.position_similarity(make_vit(position_embedding_type=kind))


def test_filters_are_shown_by_what_distinguishes_them_most():
    vertical, horizontal = np.zeros((2, 3, 4, 4))
    vertical[:, :, :2], horizontal[:, :2] = 1, 1
    random = np.random.default_rng(0).normal(size=(2, 64, 1, 1, 1))
    first, second = figures.principal_filters(3 * random[0] * vertical + random[1] * horizontal).axes
    image = first.images[0].get_array()
    assert np.ptp(image[:, :2]) < 0.2 and image[:, 0].mean() > image[:, -1].mean() + 0.2  # nearly `vertical`
    assert len(second.images) == 1


@pytest.mark.parametrize("fields, num_filters", [({}, 28), ({"num_channels": 1}, 16), ({"num_channels": 2}, 28)])
def test_filters_of_any_number_of_channels(make_vit, fields, num_filters):
    assert len(draw.first_filters(make_vit(hidden_size=64, **fields)).axes) == num_filters


def test_with_a_stem_its_first_filters_are_shown(make_vit):
    figure = draw.first_filters(make_vit(stem_channels=[32]))
    assert figure.axes[0].images[0].get_array().shape == (3, 3, 3)


def test_filters_that_are_all_the_same_are_said():
    with pytest.raises(ValueError, match="no principal components"):
        figures.principal_filters(np.ones((8, 3, 4, 4)))


# ---------------------------------------------------------------------------------------------------------- boxes


@pytest.fixture
def make_detr():
    """A tiny DETR whose cells have 8 pixels."""

    def make_detr(**fields):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 2}
        backbone = {"backbone": "resnet-mini", "backbone_norm": "group"}
        labels = {"id2label": {0: "cat", 1: "dog", 2: "$x$"}}
        config = ZooDetrConfig(**{"num_attention_heads": 2, "num_queries": 5, **sizes, **backbone, **labels, **fields})
        return ZooDetrForObjectDetection(config).eval()

    return make_detr


@pytest.fixture
def processor():
    return create_detection_processor(40, 100, MEAN, STD)


PHOTOGRAPHS = [Image.fromarray(photograph) for photograph in load_sample_images().images]
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


def test_detections_are_what_the_processor_makes_of_the_answers(make_detr, processor):
    model = make_detr()
    inputs = processor(PHOTOGRAPHS[0], return_tensors="pt")
    expected = processor.post_process_object_detection(model(**inputs), threshold=0)[0]
    found, *_ = draw.detect(model, processor, PHOTOGRAPHS[0])
    for name in ("scores", "labels", "boxes"):
        np.testing.assert_allclose(found[name], expected[name].detach(), atol=1e-6)
    threshold = float(np.median(found["scores"]))
    (axes,) = draw.detections(model, processor, PHOTOGRAPHS[:1], threshold).axes
    assert len(axes.patches) == len(axes.texts) == 3


def test_each_query_has_a_panel_of_where_its_boxes_are():
    small, wide, tall = [0.1, 0.1, 0.2, 0.2], [0, 0.25, 1, 0.75], [0.5, 0, 1, 1]
    boxes = np.array([[small, small], [wide, tall], [tall, [np.nan] * 4]])
    figure = figures.query_slots(boxes)
    panels = [[points.get_offsets().tolist() for points in axes.collections] for axes in figure.axes]
    np.testing.assert_allclose(np.concatenate(panels[0]), [[0.15, 0.15], [0.5, 0.5], [0.75, 0.5]])
    assert [len(points) for points in panels[1]] == [1, 0, 1]  # small; large and wide; large and tall
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["small", "large, wide", "large, tall"]
    assert len(figures.query_slots(np.random.default_rng(0).random((2, 300, 4))).axes) == 100


@pytest.mark.parametrize(
    "fields", [{}, {"classification_loss": "focal", "anchor_queries": True, "spatial_prior": True}]
)
def test_attention_is_that_of_the_last_layer_for_each_box_found(make_detr, processor, fields):
    model = make_detr(**fields)
    figure = draw.decoder_attention(model, processor, PHOTOGRAPHS[0], threshold=0)
    outputs = model.eval()(**processor(PHOTOGRAPHS[0], return_tensors="pt"), output_attentions=True)
    scores = outputs.logits.softmax(-1)[0, :, :-1].max(-1).values
    expected = outputs.cross_attentions[-1][0].mean(0)[scores.argsort(descending=True)]
    whole, *panels = figure.axes
    assert len(whole.patches) == len(panels) == 5
    np.testing.assert_allclose(
        np.stack([axes.images[1].get_array() for axes in panels]), expected.unflatten(1, (5, 8)).detach(), atol=1e-5
    )
    # 59 pixels are 7.4 cells, so the eighth column reaches out of the image.
    left, right, *_ = panels[0].images[1].get_extent()
    assert (right - left) / PHOTOGRAPHS[0].width == pytest.approx(64 / 59) and panels[0].get_xlim()[1] == 639.5


def test_without_a_likely_box_the_best_one_is_drawn(make_detr, processor):
    assert len(draw.decoder_attention(make_detr(), processor, PHOTOGRAPHS[0], threshold=1.1).axes) == 2


# ------------------------------------------------------------------------------------------------ token attention


def test_the_overview_shows_every_head_of_every_layer(make_gpt, tokenizer):
    model = make_gpt(num_hidden_layers=3)
    attentions = model(**tokenizer("a word", return_tensors="pt"), output_attentions=True).attentions
    *maps, bar = draw.token_attention(model, tokenizer, "a word").axes
    drawn = np.stack([axes.images[0].get_array() for axes in maps])
    np.testing.assert_allclose(drawn, torch.cat(attentions).flatten(0, 1).detach(), atol=1e-6)
    assert bar.get_ylabel() == "attention"


def test_the_heads_of_a_layer_have_the_tokens_beside_them(make_bert, masking_tokenizer):
    model = make_bert(ZooBertModel)
    figure = draw.token_attention(model, masking_tokenizer, "a bc!", layer=-1)
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes[:4]]
    assert names == [["[CLS]", "a", "b", "c", "!", "[SEP]"]] + [[]] * 3
    last = model(**masking_tokenizer("a bc!", return_tensors="pt"), output_attentions=True).attentions[-1][0]
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), last[1].detach(), atol=1e-6)


def test_white_space_and_dollars_are_shown_as_they_are(tokenizer, make_gpt):
    assert draw.token_names(tokenizer, tokenizer("a \n.")["input_ids"]) == ["a", "␣", "⏎", "."]
    figures.token_attention_heads(np.ones((1, 2, 2)), ["$\\frac$", "$"]).draw_without_rendering()


def test_a_long_text_is_cut(make_gpt, make_bert, tokenizer, masking_tokenizer):
    figure = draw.token_attention(make_gpt(), tokenizer, "word " * 100, layer=0)
    assert len(figure.axes[0].get_yticklabels()) == 40
    figure = draw.token_attention(make_bert(max_position_embeddings=8), masking_tokenizer, "word " * 100, layer=0)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 8 and labels[-1] == "[SEP]"


def test_what_there_is_not_is_said(make_gpt, tokenizer):
    with pytest.raises(ValueError, match="text '' has no tokens"):
        draw.token_attention(make_gpt(), tokenizer, "")
    with pytest.raises(ValueError, match="layer 2 of a model with 2 layers"):
        draw.token_attention(make_gpt(), tokenizer, "a", layer=2)


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(tmp_path, capsys):
    """Saves a model, and a tokenizer if given, and draws it: the names of the pictures, and what was printed."""

    def run(model, *options, tokenizer=None):
        model.save_pretrained(tmp_path / "checkpoint")
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / "checkpoint")
        draw.main([str(tmp_path / "checkpoint"), *map(str, options)])
        pictures = sorted((tmp_path / "checkpoint" / "figures").iterdir())
        assert all(Image.open(picture).size[0] > 300 for picture in pictures)
        return [picture.stem for picture in pictures], capsys.readouterr().out

    return run


VIT_FIGURES = ["attention_maps", "first_filters", "position_similarity"]
TEXT_FIGURES = ["token_attention", "token_attention_last_layer"]


def test_a_vit_is_drawn_on_photographs_and_its_training_beside_it(run, make_vit, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    write(tmp_path / "checkpoint", TRAINING)
    assert run(make_vit())[0] == sorted([*VIT_FIGURES, "curves"])


def test_a_vit_of_grey_images_is_drawn_on_digits(run, make_vit):
    assert run(make_vit(num_channels=1, position_embedding_type="learned_2d"))[0] == VIT_FIGURES


def test_why_a_figure_is_missing_is_said(run, make_vit):
    pictures, printed = run(make_vit(position_embedding_type="rotary"))
    assert pictures == ["attention_maps", "first_filters"]
    assert "no position_similarity: position_embedding_type='rotary'" in printed


def test_a_masked_autoencoder_is_drawn_with_its_reconstructions(run, make_vit):
    assert run(make_vit(ZooViTMAEForPreTraining))[0] == sorted([*VIT_FIGURES, "reconstructions"])


@pytest.mark.parametrize("model_class", [transformers.ViTForImageClassification, transformers.ViTMAEForPreTraining])
def test_stock_models_of_images_are_drawn(run, stock_vit, model_class):
    assert set(VIT_FIGURES) <= set(run(stock_vit(model_class))[0])


DETR_FIGURES = ["decoder_attention", "detections"]


def test_a_detr_is_drawn_on_photographs(run, make_detr, processor, tmp_path):
    processor.save_pretrained(tmp_path / "checkpoint")
    pictures, printed = run(make_detr())
    assert pictures == DETR_FIGURES
    assert "no query_slots: 2 images are too few" in printed


def test_a_detr_of_grey_images_is_drawn_on_digits(run, make_detr, tmp_path):
    create_detection_processor(32, 48, [0.5], [0.5]).save_pretrained(tmp_path / "checkpoint")
    assert run(make_detr(num_channels=1))[0] == [*DETR_FIGURES, "query_slots"]


def test_a_stock_detr_is_drawn(run, tmp_path):
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    backbone = transformers.ResNetConfig(**resnet, out_features=["stage2"])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}
    stock = transformers.DetrImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 100})
    stock.save_pretrained(tmp_path / "checkpoint")
    config = transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes)
    assert run(transformers.DetrForObjectDetection(config))[0] == DETR_FIGURES


def test_models_of_text_are_drawn(run, make_gpt, tokenizer):
    assert run(make_gpt(ZooGPTModel), "--text", "a cat", tokenizer=tokenizer)[0] == TEXT_FIGURES


def test_stock_models_of_text_are_drawn(run, stock_bert, masking_tokenizer):
    assert run(stock_bert(), tokenizer=masking_tokenizer)[0] == TEXT_FIGURES


def test_the_images_given_are_drawn_upright_and_in_their_shape(make_vit, tmp_path):
    photograph = Image.fromarray(load_sample_images().images[0])  # 640 x 427
    photograph.convert("CMYK").save(tmp_path / "china.jpg")
    pixels = draw.open_images([str(tmp_path / "china.jpg")], make_vit(image_size=[32, 64]).config)
    assert pixels.shape == (1, 3, 32, 64)
    middle = photograph.crop((0, 53.5, 640, 373.5)).resize((64, 32), Image.Resampling.BICUBIC)
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - np.asarray(middle, float)).mean() < 12


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image", "nowhere.png"], "--image nowhere.png: "),
        (["--image", __file__], "test_draw.py: not an image"),
        (["--text", "a"], "is a model of images, give --image"),
    ],
)
def test_what_does_not_suit_is_refused_in_one_line(run, make_vit, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        run(make_vit(), *options)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_other_checkpoints_are_refused(run, make_gpt, make_vit, tokenizer, tmp_path, capsys):
    refused = {
        "is a model of text, give --text": lambda: run(make_gpt(), "--image", "a.png", tokenizer=tokenizer),
        "num_channels is 4: only models of grey": lambda: run(make_vit(num_channels=4)),
        "is a t5; there are figures of": lambda: draw.main([str(tmp_path / "t5")]),
        "nowhere": lambda: draw.main([str(tmp_path / "nowhere")]),
    }
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    for message, command in refused.items():
        with pytest.raises(SystemExit, match="2"):
            command()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
