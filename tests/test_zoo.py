"""The zoo of named sizes: what each is, and how it is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_models import (
    ZooBertForPreTraining,
    ZooBertForTokenClassification,
    ZooGPTForCausalLM,
    ZooGPTForSequenceClassification,
    ZooViTBackbone,
    create_config,
    create_model,
    list_models,
)
from hf_models.__main__ import main
from hf_models.base import TESTED_TRANSFORMERS, ZOO_VERSION
from hf_models.zoo import ZOO, count_parameters

# Name -> parameters as the paper prints them, and how far off that figure is allowed to be. Where ours differs by
# more than rounding, the reason stands beside it.
PAPER = {
    "gpt1": (117e6, 0.005),
    "gpt2-small": (124e6, 0.005),  # the paper's table 2 says 117M; its authors corrected it to 124M later
    "gpt2-medium": (355e6, 0.005),  # table 2: 345M, corrected likewise
    "gpt2-large": (774e6, 0.005),  # table 2: 762M, corrected likewise
    "gpt2-xl": (1558e6, 0.005),  # table 2: 1542M, corrected likewise
    "gpt3-small": (125e6, 0.005),
    "gpt3-medium": (350e6, 0.02),
    "gpt3-large": (760e6, 0.005),
    "gpt3-xl": (1.5e9, 0.02),  # the table's 1.3B is 24 layers of width 2048; its 24 heads of 128 are wider than that
    "gpt3-2.7b": (2.7e9, 0.02),
    "gpt3-6.7b": (6.7e9, 0.01),
    "gpt3-13b": (13.0e9, 0.015),
    "gpt3-175b": (175e9, 0.005),
    # Turc et al. 2019, table 1; Devlin et al. 2019, section 3. Counted there without the heads of pre-training.
    "bert-tiny": (4.4e6, 0.005),
    "bert-mini": (11.2e6, 0.005),  # the table's 11.3M; its authors' release says 11.2M
    "bert-small": (28.8e6, 0.005),  # the table's 29.1M; its authors' release says 28.8M
    "bert-medium": (41.4e6, 0.005),  # the table's 41.7M; its authors' release says 41.4M
    "bert-base": (110e6, 0.005),
    "bert-large": (340e6, 0.02),
    # Dosovitskiy et al. 2021, table 1; Touvron et al. 2021 (DeiT), table 1; He et al. 2022, whose encoder is the ViT.
    # Counted there without the classifier.
    "vit-tiny-patch16-224": (5e6, 0.11),  # printed without a decimal
    "vit-small-patch16-224": (22e6, 0.02),
    "vit-base-patch16-224": (86e6, 0.005),
    "vit-large-patch16-224": (307e6, 0.015),
    "vit-huge-patch14-224": (632e6, 0.005),
}


@pytest.mark.parametrize("name", PAPER)
def test_a_published_size_has_the_parameters_of_its_paper(name):
    published, tolerance = PAPER[name]
    counted = count_parameters(name)
    if name.startswith(("bert", "vit")):
        with torch.device("meta"):
            counted = create_model(name).base_model.num_parameters()
    assert counted == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "exactly"),
    [
        ("gpt1", 116_534_784),
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("bert-base", 109_482_240 + 624_188),  # `BertModel` with its pooler, and the two heads
        ("bert-large", 335_141_888 + 1_084_220),
        ("vit-tiny-patch16-224", 5_717_416),  # with the classifier of ImageNet's 1,000 classes
        ("vit-small-patch16-224", 22_050_664),
        ("vit-base-patch16-224", 86_567_656),
        ("vit-base-patch32-224", 88_224_232),
        ("vit-large-patch16-224", 304_326_632),
        ("vit-huge-patch14-224", 632_045_800),
        ("vit-mae-base-patch16-224", 111_655_680),  # without its fixed positions
        ("vit-mae-large-patch16-224", 329_239_296),
    ],
)
def test_the_released_models_are_met_to_the_parameter(name, exactly):
    with torch.device("meta"):
        assert create_model(name, num_labels=1000).num_parameters() == exactly


# Layers, width, heads, head size: Brown et al. 2020, table 2.1. 13B is 5120 wide, the table's 5140 being a misprint.
GPT3_TABLE = {
    "gpt3-small": (12, 768, 12, 64),
    "gpt3-medium": (24, 1024, 16, 64),
    "gpt3-large": (24, 1536, 16, 96),
    "gpt3-xl": (24, 2048, 24, 128),
    "gpt3-2.7b": (32, 2560, 32, 80),
    "gpt3-6.7b": (32, 4096, 32, 128),
    "gpt3-13b": (40, 5120, 40, 128),
    "gpt3-175b": (96, 12288, 96, 128),
}


@pytest.mark.parametrize("name", GPT3_TABLE)
def test_gpt3_is_its_table(name):
    config = create_config(name)
    assert GPT3_TABLE[name] == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
    )
    assert (config.max_position_embeddings, config.vocab_size) == (2048, 50257)


# Carion et al. 2020, table 1: parameters that train in millions, multiply-adds in billions for an image.
DETR_TABLE = {
    "detr-resnet-50": (41, 86),
    "detr-resnet-50-dc5": (41, 187),
    "detr-resnet-101": (60, 152),
    "detr-resnet-101-dc5": (60, 253),
}
COCO = Path(os.environ.get("HF_MODELS_TEST_DATA", "not given"), "coco_eval", "instances_val2014_100.json")


@pytest.mark.parametrize("name", DETR_TABLE)
def test_detr_has_the_parameters_of_its_table(name):
    with torch.device("meta"):
        model = create_model(name, num_labels=91)  # ids of COCO; there are 80 names
    trained = model.num_parameters(only_trainable=True)
    assert round(trained / 1e6) == DETR_TABLE[name][0]
    assert "101" in name or trained == 41_302_368  # as the published code prints


@pytest.mark.skipif(not COCO.exists(), reason="needs HF_MODELS_TEST_DATA with coco_eval")
@pytest.mark.parametrize("name", DETR_TABLE)
def test_detr_has_the_multiply_adds_of_its_table(name):
    """On average over a hundred images of COCO with a shorter side of 800 pixels, or where that would make the longer
    one more than 1333 pixels, with that as the longer one. Sizes between those counted are interpolated."""
    with torch.device("meta"):
        model = create_model(name, num_labels=91).eval()
    counted = {}
    for width in (800, 1066, 1333):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 800, width, device="meta"))
        counted[800 * width] = counter.get_total_flops() / 2
    at_pixels = numpy.polynomial.Polynomial.fit(list(counted), list(counted.values()), deg=2)
    sizes = [(image["height"], image["width"]) for image in json.loads(COCO.read_text())["images"]]
    scales = [min(800 / min(size), 1333 / max(size)) for size in sizes]
    mean = numpy.mean([at_pixels(h * w * scale**2) for (h, w), scale in zip(sizes, scales, strict=True)])
    assert mean / 1e9 == pytest.approx(DETR_TABLE[name][1], rel=0.05)


@pytest.mark.parametrize("name", [name for name in list_models() if create_config(name).hidden_size <= 1600])
def test_every_name_takes_a_training_step(name):
    """Cut to one layer, a short context or a small image, and a small vocabulary."""
    config = create_config(name)
    if hasattr(config, "vocab_size"):
        model = create_model(name, num_hidden_layers=1, vocab_size=32, max_position_embeddings=16).train()
        tokens = torch.randint(1, 32, (1, 16))
        given = {"input_ids": tokens, "labels": tokens}
        given |= {"next_sentence_label": torch.tensor([0])} if hasattr(model, "nsp_head") else {}
    elif name.startswith("detr"):
        model = create_model(name, num_encoder_layers=1, num_decoder_layers=1).train()
        labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.5, 0.2, 0.3]])}]
        given = {"pixel_values": torch.randn(1, config.num_channels, 64, 96), "labels": labels}
    else:
        side = 2 * config.patch_size
        decoder = {"decoder_num_hidden_layers": 1} if "mae" in name else {}
        model = create_model(name, num_hidden_layers=1, image_size=side, **decoder).train()
        given = {"pixel_values": torch.randn(1, config.num_channels, side, side)}
        given |= {"labels": torch.tensor([1])} if hasattr(model, "classifier") else {}
    loss = model(**given).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# Patches in a row, and pixels: Dosovitskiy et al. 2021, section 4.1, and this package's small ones.
@pytest.mark.parametrize(
    ("name", "grid", "pixels"),
    [
        ("vit-base-patch16-224", 14, 224),
        ("vit-huge-patch14-224", 16, 224),
        ("vit-large-patch32-224", 7, 224),
        ("vit-mini-patch4-28", 7, 28),
        ("vit-mini-patch4-32", 8, 32),
        ("vit-mini-patch8-64", 8, 64),
    ],
)
def test_a_name_says_patch_and_image_size(name, grid, pixels):
    config = create_config(name)
    assert (config.grid_size, config.image_size) == ((grid, grid), pixels)


def test_every_name_names_its_source():
    assert all(entry.paper for entry in ZOO.values())


def test_names_are_listed_sorted_and_by_pattern():
    assert list_models() == sorted(ZOO)
    assert list_models("gpt2*") == ["gpt2-large", "gpt2-medium", "gpt2-small", "gpt2-xl"]
    assert list_models("nothing") == []
    assert set(list_models("bert-*")) >= {
        f"bert-{size}" for size in ("tiny", "mini", "small", "medium", "base", "large")
    }


def test_a_name_can_be_changed_in_fields_and_class():
    model = create_model("gpt-tiny", num_hidden_layers=1, hidden_size=64)
    assert type(model) is ZooGPTForCausalLM
    assert (len(model.transformer.layers), model.config.hidden_size, model.config.head_dim) == (1, 64, 16)
    classifier = create_model("gpt-tiny", ZooGPTForSequenceClassification, num_labels=5)
    assert classifier.score.out_features == 5
    tagger = create_model("bert-tiny", ZooBertForTokenClassification, num_labels=5)
    assert (type(create_model("bert-tiny")), tagger.classifier.out_features) == (ZooBertForPreTraining, 5)
    assert create_config("bert-base", hidden_dropout_prob=0.1).hidden_dropout == 0.1
    assert create_config("gpt2-small", n_layer=3).num_hidden_layers == 3
    backbone = create_model("vit-mini-patch4-32", ZooViTBackbone, out_features=["stage3"])
    assert backbone(torch.randn(1, 3, 32, 32)).feature_maps[0].shape == (1, 192, 8, 8)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"'gpt2-smal'.*gpt2-small"):
        create_model("gpt2-smal")
    with pytest.raises(ValueError, match=r"'llama'.*gpt2-small"):  # nothing is near: all are named
        create_config("llama")


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match=r"num_hiden_layers.*num_hidden_layers"):
        create_model("gpt-tiny", num_hiden_layers=3)


def test_the_command_line_lists_name_parameters_and_paper_and_the_tested_versions():
    command = [sys.executable, "-m", "hf_models", "gpt2-*"]
    *lines, empty, versions = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 5 and not empty
    assert "124,439,808" in lines[3] and "Radford et al. 2019" in lines[3] and lines[3].startswith("gpt2-small")
    assert versions.startswith(f"hf_models {ZOO_VERSION}, tested with transformers {TESTED_TRANSFORMERS[0]}, ")


def test_the_command_line_says_when_nothing_matches():
    with pytest.raises(SystemExit, match=r"llama\*"):
        main("llama*")
