"""ZooViTMAE: what it alone promises of masks, targets and its encoder. See also test_families.py and
test_runtimes.py."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from transformers import set_seed

from hf_models import (
    ZooViTBackbone,
    ZooViTConfig,
    ZooViTForImageClassification,
    ZooViTMAEConfig,
    ZooViTMAEForPreTraining,
    ZooViTMAEModel,
    ZooViTModel,
)
from tests.families import MAE_OPTIONS

SAME = {"rtol": 1e-5, "atol": 1e-5}
POSITIONS = pytest.mark.parametrize("positions", ["learned", "learned_2d", "sinusoidal", "rotary"])


@pytest.fixture(params=MAE_OPTIONS)
def options(request):
    """The fields of each tiny MAE in turn."""
    return MAE_OPTIONS[request.param]


@pytest.fixture
def make_mae(make_model):
    """`make_model`, with the masked autoencoder as its default."""
    return lambda model_class=ZooViTMAEForPreTraining, *args, **fields: make_model(model_class, *args, **fields)


# -------------------------------------------------------------------------------------------------------- config


def test_the_defaults_are_the_paper():
    config = ZooViTMAEConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (768, 12, 16)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (512, 8)
    assert (config.decoder_num_attention_heads, config.decoder_intermediate_size) == (16, 2048)
    assert (config.mask_ratio, config.norm_pix_loss, config.num_visible(196)) == (0.75, True, 49)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": 0.99}, "mask_ratio"),
        ({"image_size": 4}, "mask_ratio"),  # a single patch
        ({"stem_channels": [8]}, "stem_channels"),
        ({"decoder_num_attention_heads": 3}, "num_attention_heads"),
        ({"decoder_hidden_size": 0}, "hidden_size"),
        ({"decoder_num_hidden_layers": 0}, "num_hidden_layers"),
        ({"image_size": 18}, "image_size 18 .*patch_size 4"),
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_is_named(fields, named):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    with pytest.raises((ValueError, StrictDataclassError), match=rf"(?s){named}"):
        ZooViTMAEConfig(**{**sizes, **fields})


# --------------------------------------------------------------------------------------------------------- masks


def masked_pixels(mask, images):
    """(B, C, H, W), true where a pixel is of a masked patch."""
    grid = mask.bool().unflatten(1, (images.shape[2] // 4, images.shape[3] // 4))
    return grid.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)


def test_the_patches_with_the_least_noise_stay_visible(make_mae, images):
    model = make_mae(mask_ratio=0.6)  # of 16: 6.4 visible, so six
    noise = torch.rand(3, 16)
    outputs = model(images, noise=noise)
    visible = noise.argsort(1)[:, :6]
    expected = torch.ones(3, 16).scatter(1, visible, 0.0)
    assert torch.equal(outputs.mask, expected)
    assert torch.equal(outputs.ids_restore.gather(1, visible), torch.arange(6).expand(3, -1))
    assert torch.equal(outputs.ids_restore.sort(1).values, torch.arange(16).expand(3, -1))
    assert model.vit(images, noise=noise).last_hidden_state.shape == (3, 1 + 6, 32)


def test_without_noise_every_image_gets_a_mask_of_its_own(make_mae, images):
    model = make_mae()
    set_seed(1)
    first, second = model(images).mask, model(images).mask
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert (first.sum(1) == 12).all()
    set_seed(1)
    assert torch.equal(model(images).mask, first)


def test_nobody_sees_what_is_masked(make_mae, options, images):
    """Neither encoder nor decoder: other pixels there change the loss, and no output."""
    model, noise = make_mae(**options), torch.rand(3, 16)
    before = model(images, noise=noise)
    hidden = masked_pixels(before.mask, images)
    other = model(images.where(~hidden, torch.randn_like(images)), noise=noise)
    assert torch.equal(other.logits, before.logits)
    assert not torch.equal(other.loss, before.loss)
    changed = model(images.where(hidden, torch.randn_like(images)), noise=noise)
    assert ((changed.logits - before.logits).abs().amax(-1) > 1e-6).all()  # and all is painted from what is visible


def test_what_is_visible_is_not_scored(make_mae, images):
    model, noise = make_mae(norm_pix_loss=False), torch.rand(3, 16)
    images.requires_grad_()
    outputs = model(images, noise=noise)
    (gradient,) = torch.autograd.grad(outputs.loss, outputs.logits)
    assert torch.equal(gradient.abs().amax(-1) > 0, outputs.mask.bool())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_is_the_formula(make_mae, images, norm_pix_loss):
    """He et al. 2022, section 3: the mean squared error of masked patches, here one patch after the other."""
    model = make_mae(norm_pix_loss=norm_pix_loss, num_channels=1)
    images = images[:, :1]
    outputs = model(images, noise=torch.rand(3, 16))
    errors = []
    for image, painted, mask in zip(images.double(), outputs.logits.double(), outputs.mask, strict=True):
        for number in mask.nonzero().flatten().tolist():
            row, column = divmod(number, 4)
            pixels = image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
            if norm_pix_loss:
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6) ** 0.5
            errors.append(((painted[number] - pixels) ** 2).mean())
    assert len(errors) == 36
    assert_close(outputs.loss.double(), sum(errors) / 36, **SAME)


def test_images_are_cut_into_patches_and_put_together_again(make_mae):
    model, images = make_mae(image_size=[8, 16]), torch.randn(2, 3, 8, 16)
    patches = model.patchify(images)
    assert patches.shape == (2, 8, 48)
    assert torch.equal(patches[0, 5].unflatten(0, (4, 4, 3)), images[0, :, 4:, 4:8].permute(1, 2, 0))
    assert torch.equal(model.unpatchify(patches), images)
    other = torch.randn(2, 3, 4, 20)
    assert torch.equal(model.unpatchify(model.patchify(other), (4, 20)), other)


@POSITIONS
def test_images_of_other_sizes_are_painted_too(make_mae, positions):
    model, images = make_mae(position_embedding_type=positions), torch.randn(2, 3, 24, 12)
    outputs = model(images, noise=torch.rand(2, 18))
    assert outputs.logits.shape == (2, 18, 48) and outputs.loss.isfinite()
    assert (outputs.mask.sum(1) == 14).all()
    with pytest.raises(ValueError, match="image_size"):
        model(images, interpolate_pos_encoding=False)


def test_every_parameter_learns(make_mae, options, images):
    model = make_mae(**options).train()
    model(images).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_encoder_and_decoder_attend_through_the_same_backend(make_mae, images, monkeypatch):
    model = make_mae()
    asked = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: asked.append(1) or original(*a, **k)
    )
    model(images)
    assert len(asked) == 0
    model.set_attn_implementation("sdpa")
    model(images)
    assert len(asked) == 3  # two blocks and one


# ------------------------------------------------------------------------------------------------------- the encoder


@POSITIONS
def test_the_encoder_is_a_vit_on_the_visible_patches(make_mae, positions, images, tmp_path):
    encoder = make_mae(ZooViTMAEModel, position_embedding_type=positions, num_register_tokens=1)
    encoder.save_pretrained(tmp_path)
    vit = ZooViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    noise = torch.rand(3, 16)
    visible = noise.argsort(1)[:, :4]
    tokens, rotary = vit.embed(images)
    places = torch.cat((torch.tensor([[0, 1]]).expand(3, -1), visible + 2), dim=1)
    tokens = tokens.take_along_dim(places[..., None], 1)
    if rotary is not None:
        rotary = [angles.expand(3, -1, -1, -1).take_along_dim(places[:, None, :, None], 2) for angles in rotary]
    expected = vit.norm(vit.layers(tokens, None, rotary=rotary))
    assert_close(encoder(images, noise=noise).last_hidden_state, expected, **SAME)


@pytest.mark.parametrize("model_class", [ZooViTForImageClassification, ZooViTModel, ZooViTBackbone])
def test_the_encoder_goes_on_as_a_vit(make_mae, options, images, model_class, tmp_path):
    """`from_pretrained` of an autoencoder's checkpoint takes the encoder, and says what begins anew."""
    autoencoder = make_mae(**options)
    autoencoder.save_pretrained(tmp_path)
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model.config) is ZooViTConfig and not hasattr(model.config, "decoder_hidden_size")
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"classifier", "pooler"}
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    theirs = autoencoder.vit.state_dict()
    mine = model.base_model.state_dict()
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    assert all(value.isfinite().all() for value in model(images).values() if isinstance(value, torch.Tensor))


def test_the_encoder_takes_fields_of_a_classifier(make_mae, tmp_path):
    make_mae().save_pretrained(tmp_path)
    model = ZooViTForImageClassification.from_pretrained(
        tmp_path, id2label={0: "a", 1: "b", 2: "c", 3: "d"}, image_size=24, drop_path=0.1, pooling="class"
    )
    assert (model.config.num_labels, model.config.grid_size, model.config.drop_path) == (4, (6, 6), 0.1)
    assert model(torch.randn(2, 3, 24, 24)).logits.shape == (2, 4)
    model.save_pretrained(tmp_path / "classifier")
    assert ZooViTForImageClassification.from_pretrained(tmp_path / "classifier").config.model_type == "zoo_vit"


@POSITIONS
def test_an_autoencoder_opens_at_another_image_size(make_mae, positions, tmp_path):
    """Both its parts get positions in between."""
    model = make_mae(position_embedding_type=positions)
    model.save_pretrained(tmp_path)
    larger = ZooViTMAEForPreTraining.from_pretrained(tmp_path, image_size=24)
    images, noise = torch.randn(2, 3, 24, 24), torch.rand(2, 36)
    assert_close(larger(images, noise=noise).logits, model(images, noise=noise).logits, **SAME)


def test_an_image_of_too_few_patches_to_mask_is_refused(make_mae):
    model = make_mae(pooling="mean")
    with pytest.raises(ValueError, match="mask_ratio 0.75 of 1 patches"):
        model(torch.randn(1, 3, 4, 4))


def test_drop_path_is_the_encoders(make_mae):
    model = make_mae(drop_path=0.5)
    assert any(hasattr(module, "rate") for module in model.vit.modules())
    assert not any(hasattr(module, "rate") for module in model.decoder.modules())


@pytest.mark.parametrize(("residual_init", "expected"), [("scaled", 0.02 / 12**0.5), ("zero", 0.0)])
def test_the_decoder_begins_as_deep_as_it_is(residual_init, expected):
    sizes = {"decoder_hidden_size": 256, "decoder_num_hidden_layers": 6, "decoder_num_attention_heads": 4}
    config = ZooViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        residual_init=residual_init,
        **sizes,
    )
    for block in ZooViTMAEForPreTraining(config).decoder.layers:
        assert block.attention.o_proj.weight.std().item() == pytest.approx(expected, rel=0.05)
