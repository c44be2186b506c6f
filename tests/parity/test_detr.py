"""Our DETR computes what stock DETR computes: outputs, losses and gradients, in float32, eager."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import DetrForObjectDetection, DetrModel

from hf_models import ZooDetrConfig, ZooDetrForObjectDetection, ZooDetrModel
from hf_models.resnet import RESNETS, rename, stock_resnet_fields, timm_renamings
from tests.resnets import TINY_RESNETS, dilate_last_stage, randomise_norms, to_timm_names

SAME = {"rtol": 1e-5, "atol": 1e-5}

PAIRS = {"model": (DetrModel, ZooDetrModel), "detector": (DetrForObjectDetection, ZooDetrForObjectDetection)}
every_pair = pytest.mark.parametrize(("stock_class", "our_class"), PAIRS.values(), ids=PAIRS.keys())

# Stock options that change shapes or arithmetic, and that our config has to follow.
STOCK_OPTIONS = [
    {},
    {"backbone": "basic"},
    {"position_embedding_type": "learned"},
    {"activation_function": "gelu"},
    {"num_channels": 1},
    {"encoder_layers": 1, "decoder_layers": 3},
    {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    {"auxiliary_loss": False},
    {"eos_coefficient": 0.5, "class_cost": 2, "bbox_cost": 1, "giou_cost": 3},
    {"bbox_loss_coefficient": 2, "giou_loss_coefficient": 7},
]
every_option = pytest.mark.parametrize("fields", STOCK_OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, shape in TINY_RESNETS.items():
        monkeypatch.setitem(RESNETS, name, shape)


def tiny_config(backbone="bottleneck", num_channels=3, **fields):
    sizes = {"d_model": 32, "num_queries": 7, "num_labels": 3, "dropout": 0.0}
    for stack in ("encoder", "decoder"):
        sizes |= {f"{stack}_layers": 2, f"{stack}_attention_heads": 4, f"{stack}_ffn_dim": 64}
    resnet = transformers.ResNetConfig(**stock_resnet_fields(backbone), num_channels=num_channels)
    return transformers.DetrConfig(
        **{**sizes, "auxiliary_loss": True, **fields},
        num_channels=num_channels,
        backbone_config=resnet,
        attn_implementation="eager",
    )


@pytest.fixture
def stock_detr(randomise):
    """A tiny stock DETR in evaluation mode: `stock_detr(transformers.DetrModel, backbone="basic", ...)`. What trains in
    ours, trains in it: all but the stem and the first stage of its backbone, which as it comes is frozen as a whole."""

    def stock_detr(stock_class=DetrForObjectDetection, **fields):
        model = randomise_norms(stock_class(tiny_config(**fields)))
        body = getattr(model, "model", model)
        for name, module in [*model.named_children(), *body.named_children()]:
            if name not in ("model", "backbone"):  # which begins better as it does
                randomise(module)
        with torch.no_grad():
            body.input_projection.weight.mul_(0.1)  # its inputs are large
        body.backbone.requires_grad_(True)
        body.backbone.model.embedder.requires_grad_(False)
        body.backbone.model.encoder.stages[0].requires_grad_(False)
        return model.eval()

    return stock_detr


def images_of(stock, padded=True):
    """Two images of different sizes, padded to one; in (height, width), 96 x 64 and 70 x 50."""
    mask = torch.ones(2, 96, 64, dtype=torch.long)
    if padded:
        mask[1, 70:], mask[1, :, 50:] = 0, 0
    return {"pixel_values": torch.randn(2, stock.config.num_channels, 96, 64) * mask[:, None], "pixel_mask": mask}


LABELS = [
    {
        "class_labels": torch.tensor([0, 2, 2]),
        "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1], [0.7, 0.8, 0.4, 0.3]]),
    },
    {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.4, 0.8, 0.6]])},
]


def compared(outputs):
    """All of an output, the auxiliary answers and the terms of the loss too, but what the last layer gives to the
    heads: stock leaves it out, or without the last norm."""
    return {name: value for name, value in outputs.items() if name != "intermediate_hidden_states"}


# ------------------------------------------------------------------------------------------------ outputs, gradients


@every_option
@every_pair
def test_outputs_are_those_of_the_stock_class(stock_detr, load_as_ours, stock_class, our_class, fields):
    stock = stock_detr(stock_class, **fields)
    ours = load_as_ours(stock, our_class)
    for inputs in (images_of(stock), {"pixel_values": images_of(stock, padded=False)["pixel_values"]}):
        for asked in ({}, {"output_hidden_states": True, "output_attentions": True}):
            expected, actual = stock(**inputs, **asked), ours(**inputs, **asked)
            assert_close(compared(actual), compared(expected), **SAME)


@every_option
def test_losses_and_gradients_are_those_of_the_stock_class(stock_detr, load_as_ours, assert_same_gradients, fields):
    stock = stock_detr(**fields)
    ours, inputs = load_as_ours(stock, ZooDetrForObjectDetection), images_of(stock)
    expected, actual = (model.train()(**inputs, labels=LABELS) for model in (stock, ours))
    assert_close(actual.loss, expected.loss, **SAME)
    assert_close(actual.loss_dict, expected.loss_dict, **SAME)
    assert_close(actual.auxiliary_outputs, expected.auxiliary_outputs, **SAME)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("labels", [[0, 1], [0, 0]], ids=str)
def test_losses_without_boxes_are_those_of_the_stock_class(stock_detr, load_as_ours, labels):
    stock = stock_detr()
    ours, inputs = load_as_ours(stock, ZooDetrForObjectDetection), images_of(stock)
    labels = [{name: value[:number] for name, value in LABELS[0].items()} for number in labels]
    expected, actual = (model(**inputs, labels=labels) for model in (stock, ours))
    assert_close(actual.loss_dict, expected.loss_dict, **SAME)
    assert_close(actual.loss, expected.loss, **SAME)


def test_auxiliary_answers_do_not_change_the_model_as_they_do_in_the_stock_class(stock_detr, load_as_ours):
    """Told to train every layer's answers, stock hands on what the last norm made of each layer's output. The paper's
    code and ours leave the layers alone, but for checkpoints that stock trained so."""
    stock, outputs = stock_detr(auxiliary_loss=False), []
    ours, inputs = load_as_ours(stock, ZooDetrForObjectDetection), images_of(stock)
    ours.config.auxiliary_loss = True
    assert not ours.config.repeats_norm
    for layer in stock.model.decoder.layers:
        layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
    expected, actual = stock(**inputs), ours(**inputs, labels=LABELS)
    assert_close(actual.logits, expected.logits, **SAME)
    first = stock.model.decoder.layernorm(outputs[0])
    (answer,) = actual.auxiliary_outputs
    assert_close(answer["logits"], stock.class_labels_classifier(first), **SAME)
    assert_close(answer["pred_boxes"], stock.bbox_predictor(first).sigmoid(), **SAME)
    assert not ours.to_stock().config.auxiliary_loss  # or it would compute something else


def test_what_trains_is_what_trains_in_the_published_code(stock_detr, load_as_ours):
    """All but the stem and the first stage; stock with this backbone would train none of it."""
    ours = load_as_ours(stock_detr(), ZooDetrForObjectDetection)
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in ours.named_parameters() if ".stem." in name or ".backbone.stages.0." in name}


# ------------------------------------------------------------------------------------- stock checkpoints, both ways


@pytest.mark.parametrize("fields", [*STOCK_OPTIONS[:3], {"auxiliary_loss": False}], ids=str)
@every_pair
def test_to_stock_gives_the_stock_model_back(stock_detr, load_as_ours, stock_class, our_class, fields):
    stock = stock_detr(stock_class, **fields)
    again, inputs = load_as_ours(stock, our_class).to_stock(), images_of(stock)
    assert type(again) is stock_class
    mine, theirs = again.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    again.set_attn_implementation("eager")
    assert_close(again(**inputs)[0], stock(**inputs)[0], rtol=1e-6, atol=1e-6)
    mine, theirs = again.config.to_dict(), stock.config.to_dict()
    assert mine.pop("backbone_config")["hidden_sizes"] == theirs.pop("backbone_config")["hidden_sizes"]
    of_the_file = {"_name_or_path", "architectures", "dtype"}
    assert {name for name in theirs if mine.get(name) != theirs[name]} <= of_the_file


@every_pair
def test_to_stock_and_back_through_a_file(stock_detr, load_as_ours, stock_class, our_class, tmp_path):
    ours = load_as_ours(stock_detr(stock_class), our_class)
    ours.to_stock().save_pretrained(tmp_path / "again")
    again, report = our_class.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in ours.state_dict().items())


def publish(stock, folder, *, timm: bool, dilation: bool = False):
    """Writes a checkpoint as those of the Hub are, with the names and the config of transformers 4, whose ResNet is
    timm's or its own."""
    stock.save_pretrained(folder)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        start, found, end = name.partition("backbone.conv_encoder.model.")
        (end,) = to_timm_names({end: None}) if timm and found else (end,)
        weights[start + found + end] = tensor
    if timm:  # as in facebook/detr-resnet-50
        weights["model.backbone.conv_encoder.model.layer1.0.downsample.1.num_batches_tracked"] = torch.tensor(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if timm:
        config |= {"backbone_config": None, "backbone": stock.config.our_backbone, "use_timm_backbone": True}
        config |= {"dilation": dilation}
    (folder / "config.json").write_text(json.dumps(config))
    return set(weights)


HUB_NAMES = {
    "model.backbone.conv_encoder.model.layer4.1.bn2.running_var",
    "model.encoder.layers.0.self_attn.out_proj.weight",
    "model.encoder.layers.1.fc1.weight",
    "model.decoder.layers.0.encoder_attn_layer_norm.weight",
    "model.decoder.layernorm.weight",
    "model.input_projection.weight",
    "model.query_position_embeddings.weight",
    "class_labels_classifier.weight",
    "bbox_predictor.layers.2.bias",
}


@pytest.mark.parametrize("timm", [True, False], ids=["timm", "transformers"])
@pytest.mark.parametrize("backbone", TINY_RESNETS)
def test_the_checkpoints_of_the_hub_load(stock_detr, backbone, timm, tmp_path):
    stock = stock_detr(backbone=backbone)
    stock.config.our_backbone = backbone
    names = publish(stock, tmp_path, timm=timm)
    assert names >= HUB_NAMES or not timm
    ours, report = ZooDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert (ours.config.backbone, ours.config.dilation) == (backbone, False)
    inputs = images_of(stock)
    assert_close(ours(**inputs).logits, stock(**inputs).logits, **SAME)
    assert_close(ours(**inputs).pred_boxes, stock(**inputs).pred_boxes, **SAME)


@pytest.mark.parametrize("backbone", TINY_RESNETS)
def test_dc5_is_the_stock_class_with_a_dilated_last_stage(stock_detr, assert_same_gradients_of, backbone, tmp_path):
    stock = stock_detr(backbone=backbone)
    stock.config.our_backbone = backbone
    publish(stock, tmp_path, timm=True, dilation=True)
    ours = ZooDetrForObjectDetection.from_pretrained(tmp_path)
    assert ours.config.dilation and ours.model.backbone.stride == 16
    dilate_last_stage(stock.model.backbone.model)
    inputs = images_of(stock)
    expected, actual = (model.train()(**inputs, labels=LABELS) for model in (stock, ours))
    assert actual.encoder_last_hidden_state.shape[1] == 6 * 4
    assert_close(compared(actual), compared(expected), **SAME)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients_of(ours, stock)


@pytest.fixture
def assert_same_gradients_of():
    """Of the backbone: `to_stock` has no model to compare with where timm is not installed."""

    def assert_same_gradients_of(ours, stock):
        back = [renaming.reverse_transform() for renaming in timm_renamings("^", ["^"])[::-1]]
        gradients = {rename(name, back): p.grad for name, p in ours.model.backbone.named_parameters()}
        theirs = to_timm_names({name: p.grad for name, p in stock.model.backbone.model.named_parameters()})
        assert set(gradients) == set(theirs)
        for name, gradient in theirs.items():
            assert (gradient is None) == (gradients[name] is None)
            if gradient is not None:
                assert_close(gradients[name], gradient, **SAME, msg=lambda text, name=name: f"{name}: {text}")

    return assert_same_gradients_of


def test_dc5_goes_back_under_the_names_of_timm(stock_detr, tmp_path):
    stock = stock_detr()
    stock.config.our_backbone = "bottleneck"
    publish(stock, tmp_path, timm=True, dilation=True)
    ours = ZooDetrForObjectDetection.from_pretrained(tmp_path)
    expected = to_timm_names(stock.model.backbone.model.state_dict())
    start = "model.backbone.model."
    actual = {name.removeprefix(start): one for name, one in ours.stock_weights().items() if name.startswith(start)}
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


@pytest.mark.skipif(not transformers.utils.is_timm_available(), reason="timm is not installed here")
def test_dc5_is_the_stock_class_with_timm(load_as_ours):
    config = transformers.DetrConfig(
        use_timm_backbone=True, backbone="resnet18", dilation=True, encoder_layers=1, decoder_layers=1
    )
    stock = randomise_norms(DetrForObjectDetection(config)).eval()
    ours, images = load_as_ours(stock, ZooDetrForObjectDetection), torch.randn(1, 3, 64, 96)
    for model in (ours, ours.to_stock()):
        assert_close(model(images).logits, stock(images).logits, **SAME)


@pytest.mark.skipif(transformers.utils.is_timm_available(), reason="timm is installed here")
def test_a_dilated_model_has_a_stock_counterpart_in_timm_alone(make_model):
    with pytest.raises(ValueError, match="dilation.*timm"):
        make_model(ZooDetrForObjectDetection, dilation=True).to_stock()


@pytest.mark.parametrize(
    "fields",
    [
        {"anchor_queries": True},
        {"classification_loss": "focal"},
        {"backbone_norm": "group"},
        {"backbone": "resnet-mini"},
        {"class_loss_coefficient": 2},
        {"norm_eps": 0.1},
        {"backbone": None, "backbone_config": {"model_type": "zoo_vit", "image_size": 16, "patch_size": 4}},
    ],
    ids=str,
)
def test_to_stock_names_the_option_that_stock_lacks(make_model, fields):
    *_, option = fields
    with pytest.raises(ValueError, match=option):
        make_model(ZooDetrForObjectDetection, **fields).to_stock()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"encoder_attention_heads": 2}, "encoder_attention_heads and decoder_attention_heads"),
        ({"encoder_ffn_dim": 16}, "encoder_ffn_dim and decoder_ffn_dim"),
        ({"activation_dropout": 0.1}, "activation_dropout"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop"),
    ],
    ids=str,
)
def test_a_stock_config_that_ours_has_no_equal_for_is_refused(fields, named, tmp_path):
    tiny_config(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        ZooDetrConfig.from_pretrained(tmp_path)


def test_a_stock_backbone_that_we_do_not_have_is_refused(tmp_path):
    config = tiny_config()
    config.backbone_config.depths = [1, 1, 1, 7]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1, 1, 1, 7"):
        ZooDetrConfig.from_pretrained(tmp_path)


def test_a_stock_config_that_says_little_means_the_stock_defaults(tmp_path):
    """Files leave out what has its default: stock trains the last layer's answers only, ours all of them."""
    (tmp_path / "config.json").write_text('{"model_type": "detr", "d_model": 64}')
    config = ZooDetrConfig.from_pretrained(tmp_path)
    assert (config.auxiliary_loss, config.hidden_size, config.backbone) == (False, 64, "resnet50")
    assert (config.position_embedding_type, config.model_type) == ("sinusoidal", "zoo_detr")


def test_the_spellings_of_detr_are_understood():
    config = ZooDetrConfig(
        d_model=64, encoder_layers=3, decoder_layers=4, encoder_attention_heads=2, eos_coefficient=0.2
    )
    assert (config.hidden_size, config.num_encoder_layers, config.num_decoder_layers) == (64, 3, 4)
    assert (config.num_attention_heads, config.no_object_weight, config.d_model) == (2, 0.2, 64)


@pytest.mark.slow
def test_detr_at_its_published_size_is_the_stock_class(load_as_ours, assert_same_gradients):
    config = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(out_features=["stage4"]),
        auxiliary_loss=True,
        dropout=0.0,
        num_labels=91,
        attn_implementation="eager",
    )
    stock = randomise_norms(DetrForObjectDetection(config))  # its own initialisation elsewhere
    for stage in stock.model.backbone.model.encoder.stages:
        for block in stage.layers:
            block.layer[-1].normalization.weight.mul_(0.2)  # or sixteen blocks add up to very large numbers
    for module in (stock.model.backbone.model.embedder, stock.model.backbone.model.encoder.stages[0]):
        module.requires_grad_(False)
    ours = load_as_ours(stock, ZooDetrForObjectDetection)
    assert ours.config.backbone == "resnet50" and ours.num_parameters() == stock.num_parameters()
    inputs = {"pixel_values": torch.randn(1, 3, 160, 224)}
    expected, actual = (model.train()(**inputs, labels=LABELS[:1]) for model in (stock, ours))
    assert_close(compared(actual), compared(expected), **SAME)
    for model in (stock, ours):
        assert all(not isinstance(module, nn.BatchNorm2d) for module in model.modules())
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(ours, stock)
