"""Our ResNet computes what transformers' and timm's compute, reads both their files, and says what does not fit."""

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.testing import assert_close

from hf_models import ZooDetrConfig, ZooDetrForObjectDetection, ZooDetrModel, resnet
from hf_models.resnet import (
    RESNETS,
    FrozenBatchNorm,
    ResNet,
    ResNetGroupNorm,
    find_resnet,
    initialise_resnet,
    load_backbone_weights,
    rename,
    stock_renamings,
    stock_resnet_fields,
    timm_renamings,
)
from tests.resnets import TINY_RESNETS, dilate_last_stage, randomise_norms, to_timm_names

SAME = {"rtol": 1e-5, "atol": 1e-5}
every_kind = pytest.mark.parametrize("kind", TINY_RESNETS)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, shape in TINY_RESNETS.items():
        monkeypatch.setitem(RESNETS, name, shape)


def stock(kind, model_class=transformers.ResNetModel):
    """A tiny stock ResNet in evaluation mode."""
    return randomise_norms(model_class(transformers.ResNetConfig(**stock_resnet_fields(kind)))).eval()


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dilation", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (70, 37)], ids=str)
@every_kind
def test_the_feature_map_is_that_of_the_stock_class(kind, size, dilation):
    theirs, ours = stock(kind), ResNet(kind, dilation=dilation)
    load_backbone_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, *size)
    expected = (dilate_last_stage(theirs) if dilation else theirs)(images).last_hidden_state
    actual = ours(images)
    assert_close(actual, expected, **SAME)
    assert ours.num_channels_out == expected.shape[1]
    assert actual.shape[2:] == tuple(-(-side // ours.stride) for side in size)


@pytest.mark.parametrize("has_avx512", [False, True])  # which decides on the layout
@every_kind
def test_the_gradients_are_those_of_frozen_batch_norms(kind, has_avx512, monkeypatch):
    monkeypatch.setattr(resnet, "HAS_AVX512", has_avx512)
    theirs, ours = stock(kind), ResNet(kind)
    load_backbone_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, 40, 40)
    theirs(images).last_hidden_state.square().mean().backward()
    ours(images).square().mean().backward()
    renamings = stock_renamings("^", ["^"])
    gradients = {rename(name, renamings): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():  # convolutions alone: a frozen norm has none
        assert_close(parameter.grad, gradients[name], **SAME)


@pytest.mark.parametrize("name", RESNETS)
def test_a_place_of_the_map_stands_for_as_many_pixels_as_told(name):
    for dilation, factor in ((False, 1), (True, 2)):
        with torch.device("meta"):
            model = ResNet(name, dilation=dilation)
            shape = model(torch.empty(1, 3, 192, 100)).shape
        assert model.stride == RESNETS[name].stride // factor
        assert shape == (1, RESNETS[name].widths[-1], 192 // model.stride, -(-100 // model.stride))


# He et al. 2016, table 1, without the classifier.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032), ("resnet101", 42_500_160)],
)
def test_the_published_sizes_are_met_to_the_parameter(name, parameters):
    with torch.device("meta"):
        model = ResNet(name)
    norms = sum(module.weight.numel() * 2 for module in model.modules() if isinstance(module, FrozenBatchNorm))
    assert sum(parameter.numel() for parameter in model.parameters()) + norms == parameters


def test_group_norm_looks_at_one_image_and_starts_blocks_as_the_identity():
    """So a fresh network hands on what its shortcuts do, whatever the convolutions are."""
    model = ResNet("resnet-mini", norm="group")
    for module in model.modules():
        initialise_resnet(module)
    images = torch.randn(2, 3, 32, 32)
    alone = model(images[:1])
    assert_close(model(images)[:1], alone, **SAME)
    for block in (block for stage in model.stages for block in stage):
        assert (block.norm2.weight == 0).all() and (block.norm1.weight == 1).all()
        states = torch.rand(1, block.conv1.in_channels, 8, 8)
        kept = states if block.shortcut is None else block.shortcut(states)
        assert_close(block(states), kept.relu(), rtol=0, atol=0)
    channels = {2048: 32, 64: 32, 32: 16, 6: 1}  # Wu and He 2018, table 3: 32; fewer where there are few channels
    assert {number: ResNetGroupNorm(number, False).num_groups for number in channels} == channels


@pytest.mark.parametrize("norm", ["frozen_batch", "group"])
def test_convolutions_start_as_in_their_paper(norm):
    """With a variance of 2 / outputs, He et al. 2015."""
    model = ResNet("resnet18", norm=norm)
    for module in model.modules():
        initialise_resnet(module)
    weight = model.stages[3][1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_half_precision_stays_near():
    model, images = ResNet("resnet-nano"), torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(images).float(), expected, rtol=0.1, atol=0.1)
    actual = model.bfloat16()(images)
    assert actual.dtype == torch.bfloat16
    assert_close(actual.float(), expected, rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------------------------ weights of others


LAYOUTS = {
    "transformers": lambda weights: weights,
    "transformers with a classifier": lambda weights: {
        **{f"resnet.{name}": tensor for name, tensor in weights.items()},
        "classifier.1.weight": torch.ones(1000, 64),
    },
    "timm": lambda weights: {**to_timm_names(weights), "fc.weight": torch.ones(1000, 64), "fc.bias": torch.ones(1000)},
    "a detector of today": lambda weights: {f"model.backbone.model.{name}": one for name, one in weights.items()},
    "a detector as published": lambda weights: {
        **{f"model.backbone.conv_encoder.model.{name}": one for name, one in to_timm_names(weights).items()},
        "model.encoder.layers.0.self_attn.k_proj.weight": torch.ones(8, 8),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_kind
def test_weights_are_read_under_the_names_of_any_of_these(kind, layout, tmp_path):
    theirs, ours = stock(kind), ResNet(kind)
    save_file(LAYOUTS[layout](theirs.state_dict()), tmp_path / "weights.safetensors")
    load_backbone_weights(ours, tmp_path / "weights.safetensors")
    images = torch.randn(1, 3, 40, 40)
    assert_close(ours(images), theirs(images).last_hidden_state, **SAME)


@every_kind
def test_weights_are_read_from_files_and_folders_of_any_kind(kind, tmp_path):
    theirs = stock(kind, transformers.ResNetForImageClassification)
    theirs.save_pretrained(tmp_path / "folder")
    (tmp_path / "older").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "older" / "pytorch_model.bin")
    torch.save({"epoch": 3, "state_dict": to_timm_names(theirs.resnet.state_dict())}, tmp_path / "training.pth")
    first, *others = (ResNet(kind) for _ in range(4))
    load_backbone_weights(first, theirs.state_dict())
    for model, source in zip(others, ["folder", "older", "training.pth"], strict=True):
        load_backbone_weights(model, tmp_path / source)
        assert all(torch.equal(model.state_dict()[name], weight) for name, weight in first.state_dict().items())


def test_our_own_weights_are_read_too():
    one, other = (ResNet("resnet-nano", norm="group") for _ in range(2))
    load_backbone_weights(other, one.state_dict())
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in one.state_dict().items())


@pytest.mark.parametrize("model_class", [ZooDetrModel, ZooDetrForObjectDetection])
def test_the_backbone_of_our_own_detector_is_read_too(model_class, tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_queries": 3}
    config = ZooDetrConfig(backbone="basic", num_encoder_layers=1, num_decoder_layers=1, **sizes)
    theirs, ours = randomise_norms(model_class(config)), ResNet("basic")
    theirs.save_pretrained(tmp_path)
    load_backbone_weights(ours, tmp_path)
    backbone = getattr(theirs, "model", theirs).backbone.state_dict()
    assert all(torch.equal(ours.state_dict()[name], weight) for name, weight in backbone.items())


@every_kind
def test_the_names_go_back(kind):
    names = list(ResNet(kind).state_dict())
    for renamings in (timm_renamings("^", ["^"]), stock_renamings("^", ["^"])):
        back = [renaming.reverse_transform() for renaming in renamings[::-1]]
        theirs = [rename(name, back) for name in names]
        assert not set(theirs) & set(names)
        assert [rename(name, renamings) for name in theirs] == names
    stock = transformers.ResNetModel(transformers.ResNetConfig(**stock_resnet_fields(kind)))
    counters = {name for name in stock.state_dict() if name.endswith("num_batches_tracked")}
    assert set(theirs) == set(stock.state_dict()) - counters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.stages.1.layers.0.layer.0.convolution.weight": None}, r"stages\.1\.0\.conv1\.weight is missing"),
        ({"encoder.stages.5.layers.0.layer.0.convolution.weight": torch.ones(1)}, r"5\.0\.conv1\.weight has no place"),
        ({"embedder.embedder.convolution.weight": torch.ones(16, 1, 7, 7)}, r"\(16, 1, 7, 7\), not \(16, 3, 7, 7\)"),
        ({f"layer1.{block}.conv1.weight": torch.ones(1) for block in range(2, 6)}, "and .* more"),
    ],
    ids=["missing", "left over", "another shape", "another ResNet"],
)
def test_weights_that_do_not_fit_are_named(change, message):
    weights = {name: one for name, one in (stock("basic").state_dict() | change).items() if one is not None}
    model = ResNet("basic")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_backbone_weights(model, weights)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_weights_of_batch_norm_are_no_good_for_group_norm():
    with pytest.raises(ValueError, match="backbone_norm='frozen_batch'"):
        load_backbone_weights(ResNet("basic", norm="group"), stock("basic").state_dict())


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load_backbone_weights(ResNet("resnet-nano"), tmp_path / "nowhere")
    (tmp_path / "weights.pth").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"weights\.pth"):
        load_backbone_weights(ResNet("resnet-nano"), tmp_path / "weights.pth")


# ---------------------------------------------------------------------------------------------------- stock configs


@pytest.mark.parametrize("name", [name for name, shape in RESNETS.items() if shape.stem == "pool"])
def test_a_stock_config_tells_the_name(name):
    fields = stock_resnet_fields(name)
    assert find_resnet(transformers.ResNetConfig(**fields).to_dict()) == name
    assert find_resnet(fields) == name


def test_the_default_of_a_stock_config_is_resnet50():
    assert find_resnet({}) == "resnet50"
    assert find_resnet({"out_features": ["stage1", "stage2", "stage3", "stage4"]}) == "resnet50"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("depths", [1, 2, 3, 4]),
        ("hidden_act", "gelu"),
        ("downsample_in_bottleneck", True),
        ("out_features", ["stage3"]),
    ],
    ids=str,
)
def test_a_stock_config_of_none_of_ours_is_refused(option, value):
    with pytest.raises(ValueError, match=rf"no ResNet of this package.*{option}.*resnet101"):
        find_resnet({option: value})


def test_a_small_stem_has_no_stock_config():
    with pytest.raises(ValueError, match="resnet-mini"):
        stock_resnet_fields("resnet-mini")
