"""DETR: where cells and boxes are, what each option does, and what is refused."""

import math

import pytest
import torch
from transformers import AutoModelForObjectDetection, ResNetConfig
from transformers.models.resnet.modeling_resnet import ResNetBackbone

from hf_models import ZooDetrConfig, ZooDetrForObjectDetection, ZooDetrModel, ZooViTConfig, backbones, create_model
from hf_models.cells import SpatialPrior, correct, locate_cells
from hf_models.matching import count_items

TINY = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_queries": 6,
    "num_channels": 1,
    "num_labels": 3,
    "backbone": "resnet-mini",
    "backbone_norm": "group",
    "hidden_dropout": 0.0,
    "attn_implementation": "eager",
}
ANCHORS = {"anchor_queries": True, "classification_loss": "focal"}
ALL = {**ANCHORS, "spatial_prior": True, "query_selection": True, "num_denoising_groups": 2}
OPTIONS = {
    "paper": {},
    "learned positions": {"position_embedding_type": "learned"},
    "pre-norm": {"norm_position": "pre"},
    "anchors": ANCHORS,
    "varifocal": {**ANCHORS, "classification_loss": "varifocal"},
    "spatial prior": {**ANCHORS, "spatial_prior": True},
    "query selection": {**ANCHORS, "query_selection": True},
    "denoising": {"anchor_queries": True, "num_denoising_groups": 2},
    "all": ALL,
}


def tiny(model_class=ZooDetrForObjectDetection, **options):
    torch.manual_seed(0)
    attention = {**TINY, **options}.pop("attn_implementation")
    fields = {name: value for name, value in {**TINY, **options}.items() if name != "attn_implementation"}
    config = ZooDetrConfig(**fields)
    config._attn_implementation = attention
    model = model_class(config).eval()
    with torch.no_grad():  # corrections of boxes start at zero, and would hide what depends on them
        for name, parameter in model.named_parameters():
            if "box_head.layers.2" in name:
                parameter.normal_(std=0.2)
    return model


def batch():
    torch.manual_seed(1)
    pixels, mask = torch.randn(2, 1, 48, 64), torch.ones(2, 48, 64)
    mask[1, 40:], mask[1, :, 32:] = 0, 0
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.4, 0.5]])},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    return pixels * mask[:, None], mask, labels


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_predicts_boxes_in_the_image_and_trains_every_parameter(options):
    model, (pixels, mask, labels) = tiny(**options).train(), batch()
    outputs = model(pixels, mask, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 6, 4) and outputs.pred_boxes.shape == (2, 6, 4)
    assert (outputs.pred_boxes >= 0).all() and (outputs.pred_boxes <= 1).all()
    assert len(outputs.auxiliary_outputs) == 1 and outputs.loss.isfinite()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_of_a_global_batch_is_the_sum_over_its_parts(options):
    model, (pixels, mask, labels) = tiny(**options).train(), batch()
    noise = [torch.rand(2, len(label["boxes"]), 5) for label in labels]
    labels = [{**label, "noise": drawn} for label, drawn in zip(labels, noise, strict=True)]
    items = count_items(labels, model.config)
    whole = model(pixels, mask, labels=labels, num_items_in_batch=items).loss
    parts = [
        model(pixels[i : i + 1], mask[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(model(pixels, mask, labels=labels).loss, whole)  # alone, a batch counts for itself


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padding_is_never_looked_at(options):
    model, (pixels, mask, _) = tiny(**options), batch()
    maps = model(pixels, mask, output_attentions=True)
    is_padding = torch.ones(6, 8, dtype=torch.bool)
    is_padding[:5, :4] = False
    for attention in (*maps.encoder_attentions, *maps.cross_attentions):
        assert attention[1, ..., is_padding.flatten()].max() == 0
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize("options", [{"anchor_queries": True, "num_denoising_groups": 2}, ALL], ids=["anchors", "all"])
def test_denoising_queries_tell_the_others_nothing(options):
    model, (pixels, mask, labels) = tiny(**options).train(), batch()
    with_denoising = model(pixels, mask, labels=labels)
    model.config.num_denoising_groups = 0
    without = model(pixels, mask, labels=labels)
    torch.testing.assert_close(with_denoising.logits, without.logits)
    torch.testing.assert_close(with_denoising.pred_boxes, without.pred_boxes)
    assert with_denoising.loss > without.loss


def test_denoising_is_a_function_of_the_noise_in_the_labels():
    model, (pixels, mask, labels) = tiny(**ALL).train(), batch()
    labels = [{**label, "noise": torch.rand(2, len(label["boxes"]), 5)} for label in labels]
    torch.testing.assert_close(
        model(pixels, mask, labels=labels).loss, model(pixels, mask, labels=labels).loss, rtol=0, atol=0
    )


def test_every_layer_corrects_the_box_of_the_one_before():
    model, (pixels, mask, _) = tiny(ZooDetrModel, **ANCHORS), batch()
    outputs = model(pixels, mask)
    x, y, width, height = model.anchors.weight.sigmoid().unbind(-1)
    for states, boxes in zip(outputs.intermediate_hidden_states, outputs.boxes, strict=True):
        right, down, wider, higher = model.decoder.box_head(states).unbind(-1)
        expected = (x + right * width, y + down * height, width * wider.exp(), height * higher.exp())
        torch.testing.assert_close(
            boxes, torch.stack(expected, dim=-1).clamp(torch.tensor([0, 0, 1e-3, 1e-3]), torch.ones(4))
        )
        x, y, width, height = boxes.unbind(-1)


def test_selected_queries_are_the_likeliest_cells():
    model, (pixels, mask, _) = tiny(ZooDetrModel, **ALL), batch()
    outputs = model(pixels, mask)
    assert outputs.proposal_logits.shape == (2, 48, 4) and (outputs.proposal_logits[..., -1] == 0).all()
    scores = outputs.proposal_logits[..., :-1].amax(-1)
    is_token = torch.ones(2, 48, dtype=torch.bool)
    is_token[1] = False
    is_token[1].view(6, 8)[:5, :4] = True
    chosen = model.select(outputs.proposal_logits, outputs.proposal_boxes, is_token)
    for image in range(2):
        best = scores[image].masked_fill(~is_token[image], -math.inf).topk(6).indices
        torch.testing.assert_close(chosen[image], outputs.proposal_boxes[image, best])


class Patches(torch.nn.Module):
    """A backbone whose cells do not see what is around them."""

    stride = 8

    def __init__(self, num_channels):
        super().__init__()
        self.convolution = torch.nn.Conv2d(1, num_channels, kernel_size=8, stride=8)

    def forward(self, pixel_values):
        return self.convolution(pixel_values)


@pytest.mark.parametrize("num_boxes", [3, 25], ids=["few boxes", "more boxes than cells"])
@pytest.mark.parametrize("kind", ["focal", "varifocal"])
def test_the_loss_of_an_image_does_not_depend_on_its_padding(kind, num_boxes):
    model, (pixels, mask, _) = tiny(**{**ALL, "classification_loss": kind}), batch()
    model.model.backbone = Patches(model.model.input_projection.in_channels)
    boxes = torch.cat((torch.rand(num_boxes, 2), 0.1 + 0.4 * torch.rand(num_boxes, 2)), dim=1)
    labels = [{"class_labels": torch.randint(3, (num_boxes,)), "boxes": boxes}]
    alone = model(pixels[1:, :, :40, :32], labels=labels).loss_dict
    padded = model(pixels[1:], mask[1:], labels=labels).loss_dict
    assert "loss_ce_encoder" in alone
    torch.testing.assert_close(padded, alone)


def test_the_same_sight_is_corrected_alike_in_images_of_any_size():
    boxes, correction = torch.tensor([[0.4, 0.6, 0.2, 0.1]]), torch.tensor([[0.5, -0.1, 0.3, -0.2]])
    whole = correct(boxes, correction)
    torch.testing.assert_close(correct(boxes / 2, correction), whole / 2)  # the same pixels, in an image twice as large
    torch.testing.assert_close(correct(boxes, torch.zeros(1, 4)), boxes)


def test_an_image_with_fewer_cells_than_queries_gets_as_many_queries():
    outputs = tiny(**ALL)(torch.randn(1, 1, 16, 8))
    assert outputs.logits.shape == (1, 2, 4)


def test_cells_are_where_their_pixels_are():
    _, mask, _ = batch()
    cells = locate_cells(mask, torch.zeros(2, 1, 48, 64), torch.zeros(2, 5, 6, 8), stride=8)
    torch.testing.assert_close(cells.columns[0], (torch.arange(8) * 8 + 4) / 64)
    torch.testing.assert_close(cells.columns[1, :4], (torch.arange(4) * 8 + 4) / 32)  # of the unpadded width
    torch.testing.assert_close(cells.rows[1, :5], (torch.arange(5) * 8 + 4) / 40)
    torch.testing.assert_close(cells.size, torch.tensor([[8 / 64, 8 / 48], [8 / 32, 8 / 40]]))
    assert cells.is_image[1].sum() == 20 and cells.is_image[0].all()


def test_the_spatial_prior_is_a_gaussian_of_the_size_of_the_box():
    config = ZooDetrConfig(**{**TINY, "attn_implementation": None})
    prior = SpatialPrior(config)
    prior.initialise(config)
    cells = locate_cells(None, torch.zeros(1, 1, 48, 64), torch.zeros(1, 5, 6, 8), stride=8)
    found = prior(torch.tensor([[[0.4, 0.6, 0.2, 0.3]]]), cells)  # (1, heads, 1, cells)
    for head in range(4):
        x, y = (torch.tensor([0.4, 0.6]) + prior.centres[head] * torch.tensor([0.2, 0.3])).tolist()
        expected = [
            -2 * (((column - x) / 0.2) ** 2 + ((row - y) / 0.3) ** 2)
            for row in cells.rows[0].tolist()
            for column in cells.columns[0].tolist()
        ]
        torch.testing.assert_close(found[0, head, 0], torch.tensor(expected))


def test_a_grey_model_takes_colour_images():
    model, (pixels, mask, _) = tiny(), batch()
    torch.testing.assert_close(model(pixels.expand(-1, 3, -1, -1), mask).logits, model(pixels, mask).logits)


def test_a_softmax_over_a_focal_models_scores_is_the_sigmoid_of_a_single_likely_class():
    model, (pixels, mask, _) = tiny(**ANCHORS), batch()
    logits = model(pixels, mask).logits
    assert (logits[..., -1] == 0).all()
    alone = logits.clone()
    alone[..., 1:-1] = -30
    torch.testing.assert_close(alone.softmax(-1)[..., 0], logits[..., 0].sigmoid())


def test_published_models_keep_stem_and_first_stage_as_they_are():
    model = create_model("detr-resnet-50", backbone="resnet18", num_encoder_layers=1, num_decoder_layers=1)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(name.startswith(("model.backbone.stem.", "model.backbone.stages.0.")) for name in frozen)


BACKBONES = {
    "vit": ZooViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=16, num_attention_heads=2, num_hidden_layers=1
    ),
    "stock resnet": ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    ),
}


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_any_backbone_of_transformers_or_our_vit_serves(backbone, tmp_path):
    model, (pixels, mask, labels) = tiny(backbone_config=backbone), batch()
    assert model(pixels, mask, labels=labels).loss.isfinite()
    assert model(pixels[..., 3:, 1:]).logits.isfinite().all()  # of any size
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixels, mask).logits, model(pixels, mask).logits, rtol=0, atol=0)
    assert (tmp_path / "vit.py").exists()  # so that a checkpoint with a ViT in it stands alone


def test_frozen_batch_norm_computes_what_a_trained_one_does_in_evaluation():
    stock = ResNetBackbone(BACKBONES["stock resnet"])
    for module in stock.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.running_mean, module.weight.data, module.bias.data):
                values.normal_()
            module.running_var.uniform_(0.5, 2)
    model = tiny(ZooDetrModel, backbone_config=BACKBONES["stock resnet"])
    model.backbone.load_state_dict(stock.state_dict(), strict=False)
    pixels, _, _ = batch()
    torch.testing.assert_close(model.backbone(pixels).feature_maps[-1], stock.eval()(pixels).feature_maps[-1])


class NormAndActivation(torch.nn.BatchNorm2d):
    def forward(self, images):
        return super().forward(images).relu()


def test_frozen_batch_norm_keeps_the_eps_and_takes_no_others_place(monkeypatch):
    def make(norm):
        backbone = ResNetBackbone(BACKBONES["stock resnet"])
        backbone.embedder.embedder.normalization = norm
        monkeypatch.setattr(backbones.AutoBackbone, "from_config", lambda config: backbone)
        return tiny(ZooDetrModel, backbone_config=BACKBONES["stock resnet"]).backbone

    frozen = make(torch.nn.BatchNorm2d(8, eps=0.5)).embedder.embedder.normalization
    torch.testing.assert_close(frozen(torch.ones(1, 8, 1, 1)), torch.full((1, 8, 1, 1), 1.5**-0.5))
    with pytest.raises(ValueError, match="backbone_config: embedder.embedder.normalization .* NormAndActivation"):
        make(NormAndActivation(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet7"}, "resnet7.*resnet50"),
        ({"hidden_size": 30, "num_attention_heads": 2}, "not 30"),
        ({"num_queries": 0}, "num_queries"),
        ({"spatial_prior": True}, "spatial_prior needs anchor_queries"),
        ({"num_denoising_groups": 1}, "num_denoising_groups needs anchor_queries"),
        ({"anchor_queries": True, "query_selection": True}, "query_selection needs classification_loss"),
        ({"class_weights": [1.0, 2.0, 3.0]}, "no_object_weight"),
        ({"encoder_ffn_dim": 8, "decoder_ffn_dim": 16}, "encoder_ffn_dim.*decoder_ffn_dim"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(Exception, match=message):
        tiny(**options)


def test_inputs_that_do_not_fit_are_named():
    model, (pixels, mask, labels) = tiny(**ALL), batch()
    with pytest.raises(ValueError, match="num_channels is 1"):
        model(pixels.expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match="pixel_mask has shape"):
        model(pixels, mask[:, 1:])
    with pytest.raises(ValueError, match="image 0|labels\\[0\\]"):
        model(pixels, mask, labels=[{**labels[0], "class_labels": torch.tensor([0, 3])}, labels[1]])
    with pytest.raises(ValueError, match="noise has shape"):
        model.train()(pixels, mask, labels=[{**labels[0], "noise": torch.rand(3, 2, 5)}, labels[1]])
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="spatial_prior"):
        model(pixels, mask)
    learned = tiny(position_embedding_type="learned")
    with pytest.raises(ValueError, match="51 cells"):
        learned(torch.zeros(1, 1, 8, 8 * 51))


def test_the_decoder_sees_queries_as_a_set():
    model, (pixels, mask, _) = tiny(), batch()
    order = torch.randperm(6)
    before = model(pixels, mask)
    model.model.query_embed.weight.data = model.model.query_embed.weight.data[order]
    after = model(pixels, mask)
    torch.testing.assert_close(after.logits, before.logits[:, order])
    torch.testing.assert_close(after.pred_boxes, before.pred_boxes[:, order])
