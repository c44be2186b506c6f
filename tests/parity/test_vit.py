"""Our ViT and MAE compute what stock ViT and ViTMAE compute: outputs, losses and gradients, in float32, eager."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from hf_models import (
    ZooViTBackbone,
    ZooViTConfig,
    ZooViTForImageClassification,
    ZooViTMAEConfig,
    ZooViTMAEForPreTraining,
    ZooViTMAEModel,
    ZooViTModel,
    create_model,
)

SAME = {"rtol": 1e-5, "atol": 1e-5}

PAIRS = {
    "model": (ViTModel, ZooViTModel),
    "classifier": (ViTForImageClassification, ZooViTForImageClassification),
    "mae": (ViTMAEModel, ZooViTMAEModel),
    "mae_pretraining": (ViTMAEForPreTraining, ZooViTMAEForPreTraining),
}
every_pair = pytest.mark.parametrize(("stock_class", "our_class"), PAIRS.values(), ids=PAIRS.keys())

# Stock options that change shapes or arithmetic, and that our config has to follow; the last are ViTMAE's alone.
STOCK_OPTIONS = [
    {},
    {"intermediate_size": 48},
    {"hidden_act": "relu"},
    {"layer_norm_eps": 0.1},
    {"qkv_bias": False},
    {"num_channels": 1},
    {"patch_size": 8},
    {"mask_ratio": 0.5},
    {"norm_pix_loss": True},
]
PAIRS_AND_OPTIONS = {
    f"{name}-{fields}": (*pair, fields)
    for name, pair in PAIRS.items()
    for fields in (STOCK_OPTIONS if name.startswith("mae") else STOCK_OPTIONS[:-2])
}
every_pair_with_every_option = pytest.mark.parametrize(
    ("stock_class", "our_class", "fields"), PAIRS_AND_OPTIONS.values(), ids=PAIRS_AND_OPTIONS.keys()
)


def inputs_of(stock, size=16):
    inputs = {"pixel_values": torch.randn(3, stock.config.num_channels, size, size)}
    if "mae" in stock.config.model_type:
        inputs["noise"] = torch.rand(3, (size // stock.config.patch_size) ** 2)
    return inputs


@every_pair_with_every_option
def test_outputs_are_those_of_the_stock_class(stock_vit, load_as_ours, stock_class, our_class, fields):
    stock = stock_vit(stock_class, **fields)
    ours, inputs = load_as_ours(stock, our_class), inputs_of(stock)
    for asked in ({}, {"output_hidden_states": True, "output_attentions": True}):
        expected, actual = stock(**inputs, **asked), ours(**inputs, **asked)
        assert list(actual) == list(expected)
        assert_close(dict(actual), dict(expected), check_dtype=False, **SAME)


@pytest.mark.parametrize(
    ("stock_class", "our_class", "fields"),
    [case for case in PAIRS_AND_OPTIONS.values() if not case[0].__name__.endswith("Model")],
    ids=[name for name, case in PAIRS_AND_OPTIONS.items() if not case[0].__name__.endswith("Model")],
)  # the base models have no loss of their own
def test_losses_and_gradients_are_those_of_the_stock_class(
    stock_vit, load_as_ours, assert_same_gradients, stock_class, our_class, fields
):
    stock = stock_vit(stock_class, **fields)
    ours, inputs = load_as_ours(stock, our_class), inputs_of(stock)
    if stock_class is ViTForImageClassification:
        inputs["labels"] = torch.tensor([0, 2, 1])
    for model in (stock, ours):
        model.train().requires_grad_()  # ViTMAE's positions too, which stock does not train
    losses = [model(**inputs).loss for model in (ours, stock)]
    assert_close(*losses, **SAME)
    sum(losses).backward()
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (3, None, torch.tensor([0, 2, 1])),
        (1, None, torch.tensor([0.5, -1.0, 2.0])),
        (3, "regression", torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.3, 0.2], [-0.1, 1.0, 1.0]])),
        (3, None, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])),
    ],
    ids=["single_label", "regression", "regression of three", "multi_label"],
)
def test_every_kind_of_classification_is_that_of_the_stock_class(
    stock_vit, load_as_ours, assert_same_gradients, num_labels, problem_type, labels
):
    stock = stock_vit(num_labels=num_labels, problem_type=problem_type)
    ours, inputs = load_as_ours(stock, ZooViTForImageClassification), inputs_of(stock)
    losses = [model.train()(**inputs, labels=labels).loss for model in (ours, stock)]
    assert_close(*losses, **SAME)
    assert ours.config.problem_type == stock.config.problem_type
    sum(losses).backward()
    assert_same_gradients(ours, stock)


@every_pair
@pytest.mark.parametrize("size", [(24, 24), (8, 20)], ids=str)
def test_positions_are_interpolated_as_in_the_stock_class(stock_vit, load_as_ours, stock_class, our_class, size):
    stock = stock_vit(stock_class)
    ours = load_as_ours(stock, our_class)
    inputs = {"pixel_values": torch.randn(2, 3, *size)}
    if "mae" in stock.config.model_type:
        inputs["noise"] = torch.rand(2, size[0] * size[1] // 16)
        stock, ours = stock.base_model, ours.base_model  # stock's decoder goes wrong: it interpolates along one line
    expected = stock(**inputs, interpolate_pos_encoding=True)
    assert_close(ours(**inputs)[0], expected[0], **SAME)
    assert_close(ours(**inputs, interpolate_pos_encoding=True)[0], expected[0], **SAME)


@pytest.mark.parametrize("image_size", [24, 8, [24, 8]], ids=str)
@pytest.mark.parametrize("our_class", [ZooViTModel, ZooViTForImageClassification, ZooViTBackbone])
def test_image_size_at_load_time_is_interpolation_once_and_for_all(stock_vit, our_class, image_size, tmp_path):
    stock = stock_vit()
    stock.save_pretrained(tmp_path)
    ours = our_class.from_pretrained(tmp_path, image_size=image_size)
    height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
    images = torch.randn(2, 3, height, width)
    expected = stock.vit(images, interpolate_pos_encoding=True).last_hidden_state
    base = ours.base_model
    assert base.positions.weight.shape == (1, 1 + height * width // 16, 32)
    assert_close(base(images, interpolate_pos_encoding=False).last_hidden_state, expected, **SAME)


# ------------------------------------------------------------------------------------ stock checkpoints, both ways


@every_pair_with_every_option
def test_to_stock_gives_the_stock_model_back(stock_vit, load_as_ours, stock_class, our_class, fields):
    stock = stock_vit(stock_class, **fields)
    again, inputs = load_as_ours(stock, our_class).to_stock(), inputs_of(stock)
    assert type(again) is stock_class
    mine, theirs = again.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    again.set_attn_implementation("eager")
    assert_close(again(**inputs)[0], stock(**inputs)[0], rtol=1e-6, atol=1e-6)
    mine, theirs = again.config.to_dict(), stock.config.to_dict()
    of_the_file = {"_name_or_path", "architectures", "dtype"}
    assert {name for name in theirs if mine.get(name) != theirs[name]} <= of_the_file


@every_pair
def test_to_stock_and_back_through_a_file(stock_vit, load_as_ours, stock_class, our_class, tmp_path):
    ours = load_as_ours(stock_vit(stock_class), our_class)
    ours.to_stock().save_pretrained(tmp_path / "again")
    again, report = our_class.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in ours.state_dict().items())


HUB_NAMES = {
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "encoder.layer.0.attention.attention.query.weight",
    "encoder.layer.0.attention.output.dense.bias",
    "encoder.layer.0.layernorm_before.weight",
    "encoder.layer.0.intermediate.dense.weight",
    "encoder.layer.0.output.dense.bias",
    "layernorm.weight",
}


@every_pair
def test_the_checkpoints_of_the_hub_load(stock_vit, stock_class, our_class, tmp_path):
    """They were published with the names that transformers had then; today's writes the same, but for the decoder of
    ViTMAE, whose blocks it saves under another name than it publishes."""
    stock = stock_vit(stock_class)
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    decoder = {"decoder.decoder_layers.0.attention.attention.query.weight", "decoder.decoder_pos_embed"}
    decoder |= {"decoder.mask_token", "decoder.decoder_embed.weight", "decoder.decoder_pred.bias"}
    renamed = {name.replace("decoder_encoder.layer.", "decoder_layers."): one for name, one in weights.items()}
    assert {name if stock.base_model is stock else f"vit.{name}" for name in HUB_NAMES} <= set(renamed)
    assert stock_class is not ViTMAEForPreTraining or decoder <= set(renamed)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, report = our_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    inputs = inputs_of(stock)
    assert_close(ours(**inputs)[0], stock(**inputs)[0], **SAME)


@pytest.mark.parametrize("our_class", [ours for _, ours in PAIRS.values()] + [ZooViTBackbone])
@pytest.mark.parametrize("saved", PAIRS)
def test_any_class_of_ours_reads_any_stock_checkpoint(stock_vit, saved, our_class, tmp_path):
    """What the file has is read; what it lacks begins anew, and the report says so. Nothing else is."""
    if our_class.config_class is ZooViTMAEConfig and "mae" not in saved:
        pytest.skip("a ViT has no decoder's sizes to make an autoencoder of")
    stock_class, saved_class = PAIRS[saved]
    stock = stock_vit(stock_class)
    stock.save_pretrained(tmp_path)
    ours, report = our_class.from_pretrained(tmp_path, output_loading_info=True)
    begun = {name.split(".")[0] for name in report["missing_keys"]}
    assert begun == set(parts_of(our_class)) - set(parts_of(saved_class))
    assert ours.config.model_type == our_class.config_class.model_type
    theirs = getattr(stock, "vit", stock)
    inputs = inputs_of(theirs)
    base = ours.base_model
    if "mae" in saved and our_class.config_class is ZooViTConfig:  # the whole image where stock sees a part
        theirs.config.mask_ratio = 0.0
        inputs["noise"] = torch.arange(16.0).expand(3, -1)
    given = inputs if our_class.config_class is ZooViTMAEConfig else {"pixel_values": inputs["pixel_values"]}
    assert_close(base(**given).last_hidden_state, theirs(**inputs).last_hidden_state, **SAME)
    assert all(parameter.isfinite().all() for parameter in ours.parameters())


def parts_of(our_class):
    return {
        ZooViTModel: ["pooler"],
        ZooViTForImageClassification: ["classifier"],
        ZooViTBackbone: [],
        ZooViTMAEModel: [],
        ZooViTMAEForPreTraining: ["decoder"],
    }[our_class]


@pytest.mark.parametrize(
    "fields",
    [
        {"pooling": "mean"},
        {"pooling": "both"},
        {"num_register_tokens": 2},
        {"stem_channels": [8]},
        {"layer_scale": 0.1},
        {"position_embedding_type": "learned_2d"},
    ],
    ids=str,
)
def test_to_stock_names_the_option_that_stock_lacks(make_vit, fields):
    (option,) = fields
    with pytest.raises(ValueError, match=option):
        make_vit(**fields).to_stock()


def test_a_backbone_has_no_stock_counterpart(make_vit):
    with pytest.raises(ValueError, match="ZooViTBackbone"):
        make_vit(ZooViTBackbone).to_stock()


@pytest.mark.parametrize("fields", [{"pooler_act": "relu"}, {"pooler_output_size": 16}], ids=str)
def test_a_stock_config_that_ours_has_no_equal_for_is_refused(stock_vit, fields, tmp_path):
    stock_vit(ViTModel, **fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(fields))):
        ZooViTModel.from_pretrained(tmp_path)


def test_a_stock_config_that_says_little_means_the_stock_defaults(tmp_path):
    """Files leave out what has its default: stock MAE does not normalise its pixels, ours does."""
    (tmp_path / "config.json").write_text('{"model_type": "vit_mae", "hidden_size": 32, "num_attention_heads": 4}')
    config = ZooViTMAEConfig.from_pretrained(tmp_path)
    assert (config.norm_pix_loss, config.norm_eps, config.decoder_intermediate_size) == (False, 1e-12, 2048)
    assert (config.intermediate_size, config.model_type) == (3072, "zoo_vit_mae")
    assert ZooViTConfig.from_pretrained(tmp_path).model_type == "zoo_vit"


def test_the_spellings_of_vit_are_understood():
    config = ZooViTConfig(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, layer_norm_eps=1e-6)
    assert (config.hidden_dropout, config.attention_dropout, config.norm_eps) == (0.2, 0.3, 1e-6)
    assert config.hidden_dropout_prob == 0.2


@pytest.mark.slow
def test_vit_at_its_published_size_is_the_stock_class(load_as_ours, assert_same_gradients):
    config = transformers.ViTConfig(num_labels=1000, attn_implementation="eager")
    stock = ViTForImageClassification(config)  # its own initialisation: at this depth, larger weights only saturate
    ours = load_as_ours(stock, ZooViTForImageClassification)
    zoo = create_model("vit-base-patch16-224", num_labels=1000)
    assert ours.num_parameters() == zoo.num_parameters() == stock.num_parameters()
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([3, 999])
    expected, actual = (model.train()(images, labels=labels) for model in (stock, ours))
    assert_close(dict(actual), dict(expected), **SAME)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(ours, stock)
