import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from hf_models import ZooViTMAEForPreTraining, ZooViTModel
from training.images.pictures import (
    attention_maps,
    attention_rollout,
    first_filters,
    open_images,
    position_similarity,
    reconstructions,
)

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]

# ---------------------------------------------------------------------------------------------------- attention


def test_rollout_follows_tokens_through_the_layers():
    looks_at_first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    swaps = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    first, second = torch.stack((looks_at_first, swaps)), torch.stack((swaps, swaps))  # two heads each
    # With the residual half: 0.5 I + 0.5 mean of the heads; the second layer mixes what the first has mixed.
    layers = [torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])]
    rollout = attention_rollout(torch.stack((first, second)))
    torch.testing.assert_close(rollout, layers[1] @ layers[0])
    batched = attention_rollout(torch.stack((first, second))[:, None].expand(-1, 3, -1, -1, -1))
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
    drawn = np.stack(maps_of(attention_maps(model, images))).reshape(3, 5, 4, 4)  # rollout, then four heads
    np.testing.assert_allclose(drawn[:, 1:], rows[..., prefix:].unflatten(-1, (4, 4)).detach(), atol=1e-6)


def test_maps_cover_the_whole_image_whatever_its_shape(make_vit):
    figure = attention_maps(make_vit(), torch.randn(2, 3, 8, 20))
    shown, *overlays = figure.axes[:6]
    assert [axes.images[1].get_array().shape for axes in overlays] == [(2, 5)] * 5
    assert all(axes.images[1].get_extent() == shown.images[0].get_extent() for axes in overlays)
    width, height = figure.get_size_inches()
    for axes in figure.axes:
        place = axes.get_position()
        assert place.width * width / (place.height * height) == pytest.approx(20 / 8)


def test_images_are_shown_as_they_were_before_they_were_normalised(make_vit):
    pixels = torch.rand(1, 3, 16, 16)
    shape = (3, 1, 1)
    normalised = (pixels - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)
    shown = attention_maps(make_vit(), normalised, MEAN, STD).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, pixels[0].permute(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_model_is_left_as_it_was(make_vit, images, backend):
    model = make_vit(attn_implementation=backend, hidden_dropout=0.5).train()
    once, twice = (maps_of(attention_maps(model, images[:1])) for _ in range(2))
    np.testing.assert_array_equal(once, twice)  # without dropout
    assert model.training and model.vit.layers.training and model.config._attn_implementation == backend


def test_a_masked_autoencoder_is_shown_the_whole_image(make_vit, images):
    model = make_vit(ZooViTMAEForPreTraining)
    attentions = ZooViTModel.forward(model.vit, images[:1], output_attentions=True).attentions
    drawn = np.stack(maps_of(attention_maps(model, images[:1]))).reshape(1, 5, 4, 4)
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
    triples = triples_of(reconstructions(model, pixel_values))
    np.testing.assert_allclose(triples[:, 2], triples[:, 0], atol=1e-5)
    np.testing.assert_allclose(triples[:, 0], (pixel_values * 0.5 + 0.5).permute(0, 2, 3, 1), atol=1e-6)


def test_what_is_masked_is_grey_and_what_is_visible_stays(make_vit):
    model, pixel_values = make_vit(ZooViTMAEForPreTraining), torch.rand(1, 3, 16, 16) - 0.5
    noise = torch.arange(16.0)[None]  # the first row of patches stays
    image, visible, painted = triples_of(reconstructions(model, pixel_values, noise))[0]
    np.testing.assert_array_equal(visible[:4], image[:4])
    np.testing.assert_array_equal(visible[4:], np.full((12, 16, 3), 0.6, np.float32))
    np.testing.assert_allclose(painted[:4], image[:4], atol=1e-6)
    assert np.abs(painted[4:] - image[4:]).max() > 0.1


def test_the_same_patches_are_masked_at_every_call(make_vit, images):
    model = make_vit(ZooViTMAEForPreTraining)
    once, twice = (triples_of(reconstructions(model, images[:1])) for _ in range(2))
    np.testing.assert_array_equal(once, twice)


# ------------------------------------------------------------------------------------------- positions and filters


@pytest.mark.parametrize("kind", ["learned", "learned_2d"])
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_each_patch_has_a_tile_in_which_its_own_place_is_most_similar(make_vit, kind, pooling):
    model = make_vit(position_embedding_type=kind, pooling=pooling, image_size=[8, 12])  # 2 x 3 patches
    vectors = torch.nn.functional.normalize(model.vit.positions.vectors(2, 3, torch.float32, "cpu")[0], dim=-1)
    board = position_similarity(model).axes[0].images[0].get_array().filled(np.nan)
    assert board.shape == (2 * 2 + 1, 3 * 3 + 2)  # with a line between tiles
    for patch, expected in enumerate((vectors @ vectors.T).unflatten(1, (2, 3)).detach()):
        row, column = divmod(patch, 3)
        tile = board[3 * row : 3 * row + 2, 4 * column : 4 * column + 3]
        np.testing.assert_allclose(tile, expected, atol=1e-5)
        assert tile.argmax() == patch


@pytest.mark.parametrize("kind", ["rotary", "sinusoidal"])
def test_positions_that_are_not_learnt_are_not_drawn(make_vit, kind):
    with pytest.raises(ValueError, match=f"position_embedding_type='{kind}' has no learned positions"):
        position_similarity(make_vit(position_embedding_type=kind))


@pytest.mark.parametrize("fields, num_filters", [({}, 28), ({"num_channels": 1}, 16), ({"num_channels": 2}, 28)])
def test_filters_of_any_number_of_channels(make_vit, fields, num_filters):
    assert len(first_filters(make_vit(hidden_size=64, **fields)).axes) == num_filters


def test_with_a_stem_its_first_filters_are_shown(make_vit):
    figure = first_filters(make_vit(stem_channels=[32]))
    assert figure.axes[0].images[0].get_array().shape == (3, 3, 3)


# ---------------------------------------------------------------------------------------------------- from files


def test_the_images_given_are_drawn_upright_and_in_their_shape(make_vit, tmp_path):
    photograph = Image.fromarray(load_sample_images().images[0])  # 640 x 427
    photograph.convert("CMYK").save(tmp_path / "china.jpg")
    pixels = open_images([str(tmp_path / "china.jpg")], make_vit(image_size=[32, 64]).config)
    assert pixels.shape == (1, 3, 32, 64)
    middle = photograph.crop((0, 53.5, 640, 373.5)).resize((64, 32), Image.Resampling.BICUBIC)
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - np.asarray(middle, float)).mean() < 12
