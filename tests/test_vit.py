"""ZooViT: what it alone promises of images, positions, pooling and its backbone. See also test_families.py and
test_runtimes.py."""

import json

import numpy
import peft
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    ViTImageProcessor,
    pipeline,
    set_seed,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_models import ZooViTBackbone, ZooViTConfig, ZooViTForImageClassification, ZooViTModel, __version__
from hf_models.positions import sinusoidal_encoding_2d
from tests.families import VIT_OPTIONS, checkpoint_activations, gradients

SAME = {"rtol": 1e-5, "atol": 1e-5}
POSITIONS = pytest.mark.parametrize("positions", ["learned", "learned_2d", "sinusoidal", "rotary"])


@pytest.fixture(params=VIT_OPTIONS)
def options(request):
    """The fields of each tiny ViT in turn."""
    return VIT_OPTIONS[request.param]


# -------------------------------------------------------------------------------------------------------- config


def test_the_defaults_are_vit_base():
    config = ZooViTConfig()
    assert (config.image_size, config.patch_size, config.num_channels) == (224, 16, 3)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.norm_position, config.norm_eps, config.pooling) == ("pre", 1e-12, "class")
    assert (config.layer_scale, config.drop_path, config.qkv_bias) == (None, 0.0, True)
    assert config.zoo_version == __version__


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image_size": 30}, "image_size 30 .*patch_size 4"),
        ({"image_size": [16, 18]}, "image_size .*16, 18.* patch_size 4"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": [16, 16, 16]}, "image_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": [4, 2]}, "patch_size"),
        ({"num_channels": 0}, "num_channels"),
        ({"stem_channels": [8, 8, 8]}, "patch_size 4 .*stem_channels"),
        ({"stem_channels": [0]}, "stem_channels"),
        ({"num_register_tokens": -1}, "num_register_tokens"),
        ({"position_grid": [4]}, "position_grid"),
        ({"position_embedding_type": "learned_2d", "hidden_size": 33, "head_dim": 8}, "learned_2d.*hidden_size"),
        ({"position_embedding_type": "rotary", "head_dim": 6}, "rotary.*head_dim"),
        ({"pooling": "max"}, "pooling"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_is_named(fields, named):
    with pytest.raises((ValueError, StrictDataclassError), match=rf"(?s){named}"):
        ZooViTConfig(**{"hidden_size": 32, "num_attention_heads": 4, "image_size": 16, "patch_size": 4, **fields})


@pytest.mark.parametrize(
    ("image_size", "grid"), [(32, (4, 4)), ([16, 32], (2, 4)), ((16, 32), (2, 4)), ([32], (4, 4))], ids=str
)
def test_an_image_size_is_a_side_or_height_and_width(image_size, grid, tmp_path):
    config = ZooViTConfig(image_size=image_size, patch_size=[8, 8])
    assert (config.grid_size, config.patch_size) == (grid, 8)
    config.save_pretrained(tmp_path)
    again = ZooViTConfig.from_pretrained(tmp_path)
    assert (again.grid_size, again.position_grid) == (grid, list(grid))


@pytest.mark.parametrize(
    ("fields", "num_prefix"),
    [({}, 1), ({"pooling": "mean"}, 0), ({"pooling": "both", "num_register_tokens": 3}, 4)],
    ids=str,
)
def test_class_token_and_registers_come_before_the_patches(make_vit, images, fields, num_prefix):
    model = make_vit(ZooViTModel, **fields)
    assert model.config.num_prefix_tokens == num_prefix
    tokens = model.embed(images)[0]
    assert tokens.shape == (3, num_prefix + 16, 32)
    if num_prefix:
        assert_close(tokens[:, 0], (model.tokens.cls + model.positions.class_vector())[0].expand(3, -1))
    if num_prefix > 1:
        assert torch.equal(tokens[:, 1:4], model.tokens.registers.expand(3, -1, -1))


# ------------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_a_patch_is_projected_as_by_a_convolution_row_by_row(make_vit, num_channels):
    model, images = make_vit(ZooViTModel, num_channels=num_channels), torch.randn(2, num_channels, 12, 20)
    projection = model.patch_embed.projection
    expected = F.conv2d(images, projection.weight, projection.bias, stride=4)  # (B, D, 3, 5)
    assert_close(model.patch_embed(images), expected.flatten(2).transpose(1, 2), **SAME)


def test_every_patch_sees_every_other(make_vit, options, images):
    model = make_vit(ZooViTModel, **options)
    before = model(images).last_hidden_state
    for row, column in ((0, 0), (1, 3), (3, 2)):
        other = images.clone()
        other[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        assert ((model(other).last_hidden_state - before).abs().amax(-1) > 1e-6).all()


@POSITIONS
def test_where_a_patch_is_matters(make_vit, positions):
    """In rows and in columns: an image and the same turned over, or upside down, are not the same to it."""
    model, images = make_vit(position_embedding_type=positions, pooling="mean"), torch.randn(2, 3, 16, 16)
    before = model(images).logits
    patches = images.unflatten(3, (4, 4)).unflatten(2, (4, 4))  # (B, C, rows, p, columns, p)
    for axes in ((2,), (4,), (2, 4)):
        other = patches.flip(axes).flatten(4).flatten(2, 3)
        assert (model(other).logits - before).abs().max() > 1e-4


def test_the_images_of_a_batch_do_not_depend_on_each_other(make_vit, options, images):
    model = make_vit(**options).train()
    assert_close(model(images).logits, torch.cat([model(image[None]).logits for image in images]), **SAME)


def test_a_stem_halves_the_resolution_for_each_width(make_vit):
    model, images = make_vit(ZooViTModel, stem_channels=[8, 12]), torch.randn(2, 3, 16, 24)
    shapes, states = [], images
    for stage in model.patch_embed.stem:
        states = stage(states)
        shapes.append(tuple(states.shape))
    assert shapes == [(2, 8, 8, 12), (2, 12, 4, 6)]
    assert model.patch_embed.projection.weight.shape == (32, 12, 1, 1)
    assert model(images).last_hidden_state.shape == (2, 1 + 24, 32)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((2, 1, 16, 16), r"shape \(2, 1, 16, 16\), but num_channels is 3"),
        ((2, 3, 16, 18), "16 x 18 do not divide into patches of 4"),
        ((2, 3, 2, 2), "2 x 2 do not divide"),
        ((3, 16, 16), r"shape \(3, 16, 16\).*\(batch, 3, height, width\)"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(make_vit, shape, named):
    with pytest.raises(ValueError, match=named):
        make_vit()(torch.randn(shape))


# ----------------------------------------------------------------------------------------------------- positions


def test_positions_are_counted_in_rows_and_columns(make_vit):
    """On a grid that is not square, where the two cannot be mixed up."""
    grid = {"image_size": [8, 16], "pooling": "mean"}
    images = torch.zeros(1, 3, 8, 16)
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(4), indexing="ij")

    def added(**fields):
        model = make_vit(ZooViTModel, **grid, **fields)
        torch.nn.init.zeros_(model.patch_embed.projection.bias)
        return model, model.embed(images)[0][0].unflatten(0, (2, 4))

    model, vectors = added(position_embedding_type="learned")
    assert torch.equal(vectors, model.positions.weight[0].unflatten(0, (2, 4)))
    model, vectors = added(position_embedding_type="learned_2d")
    assert torch.equal(vectors, model.positions.halves(2, 4))
    model, vectors = added(position_embedding_type="sinusoidal")
    assert_close(vectors, sinusoidal_encoding_2d(rows, columns, 32))
    model, vectors = added(position_embedding_type="rotary")
    assert (vectors == 0).all()


def test_rotary_attention_knows_only_how_far_apart_two_patches_are(make_vit):
    """Moved together over the grid, two patches mean the same to each other."""
    model = make_vit(ZooViTModel, position_embedding_type="rotary", num_hidden_layers=1, num_register_tokens=1)
    noise = torch.randn(2, 3, 4, 4)

    def attention(first, second):
        image = torch.zeros(1, 3, 32, 32)
        for (row, column), patch in zip((first, second), noise, strict=True):
            image[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = patch
        weights = model(image, output_attentions=True).attentions[0][0]
        one, other = (2 + 8 * row + column for row, column in (first, second))
        return weights[:, one, other].log() - weights[:, one, one].log()

    expected = attention((1, 2), (3, 1))
    assert_close(attention((4, 6), (6, 5)), expected, rtol=1e-3, atol=1e-3)
    assert (attention((1, 2), (1, 3)) - expected).abs().max() > 0.01


@POSITIONS
def test_an_image_of_another_size_gets_positions_in_between(make_vit, positions):
    """The grid of patches is laid over the one the positions were made for: it has the same middle, and a grid of
    twice the patches has each old place between two new ones."""
    model = make_vit(ZooViTModel, position_embedding_type=positions, pooling="mean", image_size=16)
    assert model(torch.randn(2, 3, 24, 12)).last_hidden_state.shape == (2, 18, 32)
    rows, columns = model.positions.coordinates(8, 4, "cpu")
    assert_close(rows.unflatten(0, (8, 4))[:, 0], torch.arange(8) / 2 - 0.25)
    assert_close(columns.unflatten(0, (8, 4))[0], torch.arange(4.0))
    if positions != "rotary":
        vectors = [model.positions.vectors(*size, torch.float32, "cpu").mean(1) for size in ((4, 4), (8, 8))]
        middle = torch.nn.functional.cosine_similarity(*vectors)
        assert middle > (0.95 if positions != "sinusoidal" else 0.9)


def test_other_sizes_can_be_forbidden(make_vit):
    model = make_vit()
    with pytest.raises(ValueError, match="image_size"):
        model(torch.randn(1, 3, 24, 16), interpolate_pos_encoding=False)
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(images, interpolate_pos_encoding=False).logits, model(images).logits)


@pytest.mark.parametrize("image_size", [24, [8, 24], [8, 32]], ids=str)
def test_a_checkpoint_opens_at_another_image_size(make_vit, options, image_size, tmp_path):
    """It computes what the old model does on images of that size, and is saved as a checkpoint of its own."""
    model = make_vit(**options)
    model.save_pretrained(tmp_path / "old")
    larger = ZooViTForImageClassification.from_pretrained(tmp_path / "old", image_size=image_size)
    height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
    images = torch.randn(2, 3, height, width)
    assert larger.config.grid_size == (height // 4, width // 4)
    assert_close(larger(images).logits, model(images).logits, **SAME)
    larger.save_pretrained(tmp_path / "new")
    again, report = ZooViTForImageClassification.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again(images).logits, larger(images).logits)
    assert again.config.image_size == image_size
    smaller = ZooViTForImageClassification.from_pretrained(tmp_path / "new", image_size=16)
    images = torch.randn(2, 3, 16, 16)
    assert_close(smaller(images).logits, larger(images).logits, **SAME)


def test_an_image_size_at_load_time_has_to_fit(make_vit, tmp_path):
    make_vit().save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match="image_size 18"):
        ZooViTForImageClassification.from_pretrained(tmp_path, image_size=18)


@pytest.mark.parametrize("image_size", [16, [16, 8]], ids=str)
def test_a_checkpoint_for_oblong_images_opens_at_another_size_by_every_door(make_vit, image_size, tmp_path):
    """2 x 8 positions, as many as 4 x 4 would be."""
    model = make_vit(image_size=[8, 32])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, image_size=image_size)
    images = torch.randn(2, 3, *config.grid_size).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for other in (
        ZooViTForImageClassification.from_pretrained(tmp_path, image_size=image_size),
        AutoModelForImageClassification.from_pretrained(tmp_path, image_size=image_size),
        ZooViTForImageClassification.from_pretrained(tmp_path, config=config),
    ):
        assert_close(other(images).logits, model(images).logits, **SAME)


def test_a_checkpoint_opens_with_another_pooling(make_vit, images, tmp_path):
    """As an autoencoder with a class token is fine-tuned by the mean of its patches (He et al. 2022, appendix A.1)."""
    model = make_vit(ZooViTModel, pooling="class")
    model.save_pretrained(tmp_path / "class")
    mean = ZooViTModel.from_pretrained(tmp_path / "class", pooling="mean")
    assert torch.equal(mean.embed(images)[0], model.embed(images)[0][:, 1:])
    mean.save_pretrained(tmp_path / "mean")
    again, report = ZooViTModel.from_pretrained(tmp_path / "mean", pooling="class", output_loading_info=True)
    assert report["missing_keys"] == {"tokens.cls"} and not report["mismatched_keys"]
    assert torch.equal(again.embed(images)[0][:, 1:], mean.embed(images)[0])
    assert not again.positions.class_vector().any()


# ----------------------------------------------------------------------------------------------- pooling, classifier


@pytest.mark.parametrize("pooling", ["class", "mean", "both"])
@pytest.mark.parametrize("model_class", [ZooViTModel, ZooViTForImageClassification])
def test_only_the_first_token_is_computed_only_where_nobody_reads_others(make_vit, images, model_class, pooling):
    model = make_vit(model_class, pooling=pooling)
    answer, expected = model(images, only_first=True), model(images, only_first=False)
    name = "pooler_output" if model_class is ZooViTModel else "logits"
    assert_close(answer[name], expected[name], **SAME)


def test_pooling_is_the_class_token_or_the_mean_of_the_patches_or_both(make_vit, images):
    for pooling in ("class", "mean", "both"):
        model = make_vit(pooling=pooling, num_register_tokens=2)
        states = model.vit(images).last_hidden_state
        first, mean = states[:, 0], states[:, -16:].mean(1)
        pooled = {"class": first, "mean": mean, "both": torch.cat((first, mean), -1)}[pooling]
        assert_close(model(images).logits, model.classifier(pooled))
        base = make_vit(ZooViTModel, pooling=pooling, num_register_tokens=2)
        assert base(images).pooler_output.shape == (3, 32)


def test_the_last_block_computes_what_the_classifier_reads(make_vit, images):
    """The class token alone, unless somebody wants to see the others."""
    seen = []
    for pooling, num_tokens in (("class", 1), ("mean", 16), ("both", 17)):
        model, labels = make_vit(pooling=pooling), torch.tensor([0, 2, 1])
        model.vit.layers[-1].feed_forward.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].shape))
        loss = model(images, labels=labels).loss
        loss.backward()
        expected = model(images, labels=labels, output_hidden_states=True)
        found = gradients(model)
        expected.loss.backward()
        assert_close((loss, found), (expected.loss, gradients(model)), **SAME)
        assert seen == [(3, num_tokens, 32), (3, 16 + (pooling != "mean"), 32)]
        assert (expected.hidden_states[-1] != 0).any(-1).all()
        seen.clear()


def test_the_pooler_is_a_choice(make_vit, images):
    with_pooler = make_vit(ZooViTModel)
    without = ZooViTModel(with_pooler.config, add_pooling_layer=False).eval()
    assert without.pooler is None and without(images).pooler_output is None
    without.load_state_dict({k: v for k, v in with_pooler.state_dict().items() if not k.startswith("pooler.")})
    assert torch.equal(without(images).last_hidden_state, with_pooler(images).last_hidden_state)


def test_labels_may_be_probabilities(make_vit, images):
    """As mixup and label smoothing make them; certain ones are class ids."""
    model, labels = make_vit(problem_type="single_label_classification"), torch.tensor([0, 2, 1])
    certain = F.one_hot(labels, 3).float()
    assert_close(model(images, labels=certain).loss, model(images, labels=labels).loss)
    soft = torch.rand(3, 3).softmax(-1)
    expected = -(soft * model(images).logits.log_softmax(-1)).sum()
    assert_close(model(images, labels=soft).loss, expected / 3)
    assert_close(model(images, labels=soft, num_items_in_batch=12).loss, expected / 12)


def test_classes_can_be_weighed(make_vit, images):
    model = make_vit(class_weights=[1.0, 2.0, 4.0], problem_type="single_label_classification")
    labels = torch.tensor([0, 2, 1])
    losses = -model(images).logits.log_softmax(-1)[range(3), labels]
    assert_close(model(images, labels=labels).loss, (losses * torch.tensor([1.0, 4.0, 2.0])).sum() / 7)
    assert_close(model(images, labels=F.one_hot(labels, 3).float()).loss, model(images, labels=labels).loss)


def test_several_classes_at_once_are_a_yes_or_no_each(make_vit, images):
    model, labels = make_vit(), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    expected = F.binary_cross_entropy_with_logits(model(images).logits, labels)
    assert_close(model(images, labels=labels).loss, expected)
    assert model.config.problem_type == "multi_label_classification"


# ------------------------------------------------------------------------------------------------------ backbone


def test_a_backbone_gives_maps_of_the_blocks_asked_for(make_vit, options, tmp_path):
    model = make_vit(ZooViTModel, **options)
    model.save_pretrained(tmp_path)
    backbone = ZooViTBackbone.from_pretrained(tmp_path, out_features=["stem", "stage2"])
    images = torch.randn(2, 3, 8, 20)
    outputs = backbone(images)
    assert [one.shape for one in outputs.feature_maps] == [(2, 32, 2, 5)] * 2
    assert backbone.channels == [32, 32] and outputs.hidden_states is None
    patches = model(images).last_hidden_state[:, model.config.num_prefix_tokens :]
    assert_close(outputs.feature_maps[-1], patches.transpose(1, 2).reshape(2, 32, 2, 5), **SAME)
    assert len(backbone(images, output_hidden_states=True).hidden_states) == 3


def test_a_backbone_by_the_numbers_of_its_blocks_and_by_its_config(make_vit, images):
    config = make_vit().config
    config.set_output_features_output_indices(out_features=None, out_indices=[1, -1])
    backbone = AutoBackbone.from_config(config)
    assert type(backbone) is ZooViTBackbone and backbone.out_features == ["stage1", "stage2"]
    assert len(backbone(images).feature_maps) == 2
    with pytest.raises(ValueError, match="stage9"):
        ZooViTConfig(num_hidden_layers=2, out_features=["stage9"])


def test_what_a_config_gives_out_is_saved(tmp_path):
    ZooViTConfig(num_hidden_layers=4, out_features=["stage1", "stage3"]).save_pretrained(tmp_path)
    assert ZooViTConfig.from_pretrained(tmp_path).out_features == ["stage1", "stage3"]
    assert ZooViTConfig.from_pretrained(tmp_path, out_features=["stage2"]).out_indices == [2]


def test_a_backbone_takes_images_that_do_not_divide_into_patches(make_vit):
    backbone, images = make_vit(ZooViTBackbone), torch.randn(2, 3, 13, 18)
    (found,) = backbone(images).feature_maps
    assert found.shape == (2, 32, 4, 5) and backbone.stride == 4
    assert torch.equal(found, backbone(F.pad(images, (0, 2, 0, 3))).feature_maps[0])


def test_a_backbone_is_trained_through_its_maps(make_vit, images):
    backbone = make_vit(ZooViTBackbone, out_features=["stage1", "stage2"]).train()
    sum(one.square().mean() for one in backbone(images).feature_maps).backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


# ----------------------------------------------------------------------------------------------------- drop path


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_one_seed_drops_the_same_paths_again_and_another_seed_others(make_vit, use_reentrant):
    model = make_vit(drop_path=0.5).train()
    inputs = {"pixel_values": torch.randn(16, 3, 16, 16), "labels": torch.arange(16) % 3}

    def step(seed):
        set_seed(seed)
        loss = model(**inputs).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    first, other = step(1), step(2)
    assert not torch.equal(first["loss"], other["loss"])
    assert_close(step(1), first, rtol=0, atol=0)
    checkpoint_activations(model, use_reentrant)  # computed again, dropped alike
    assert_close(step(1), first, **SAME)


# ----------------------------------------------------------------------------- adapters, processors, pipelines, export


def test_the_projection_of_patches_can_be_adapted(make_vit, images):
    """As the convolution that it is in stock, by LoRA's convolution."""
    model = make_vit()
    before = model(images).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["projection"], init_lora_weights=False))
    changed = adapted.eval()(images).logits
    assert (changed - before).abs().max() > 1e-4
    assert_close(adapted.merge_and_unload()(images).logits, changed, **SAME)


@pytest.fixture
def saved(make_vit, tmp_path):
    """A classifier saved with a stock image processor: the model and its folder."""
    model = make_vit(id2label={0: "cat", 1: "dog", 2: "owl"})
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    return model, tmp_path


@pytest.fixture
def pictures():
    noise = numpy.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), dtype=numpy.uint8)
    return [Image.fromarray(one) for one in noise]


def test_a_stock_image_processor_serves_too(saved, pictures, tmp_path):
    _, folder = saved
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor).__name__.startswith("ViTImageProcessor")
    pixel_values = processor(pictures, return_tensors="pt").pixel_values
    assert pixel_values.shape == (3, 3, 16, 16)
    again = json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
    assert again.startswith("ViTImageProcessor")


@torch.no_grad()
def test_image_classification_pipeline(saved, pictures):
    model, folder = saved
    processor = AutoImageProcessor.from_pretrained(folder)
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    for picture, answers in zip(pictures, classify(pictures, batch_size=2, top_k=2), strict=True):
        scores = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
        assert [answer["label"] for answer in answers] == [
            model.config.id2label[number] for number in scores.topk(2).indices.tolist()
        ]
        assert [answer["score"] for answer in answers] == pytest.approx(scores.topk(2).values.tolist(), abs=1e-5)


@torch.no_grad()
def test_image_feature_extraction_pipeline(make_vit, saved, pictures):
    model, folder = saved
    extract = pipeline("image-feature-extraction", model=str(folder), device="cpu")
    processor = AutoImageProcessor.from_pretrained(folder)
    expected = model.vit(**processor(pictures[0], return_tensors="pt")).last_hidden_state
    assert_close(torch.tensor(extract(pictures[0])), expected, **SAME)


def test_the_auto_class_opens_it_with_other_labels(saved, images):
    _, folder = saved
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert model(images).logits.shape == (3, 5) and model(images).logits.isfinite().all()


def test_a_model_is_compiled_for_each_image_size(make_vit):
    torch._dynamo.reset()
    model = make_vit(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for shape in ((2, 3, 16, 16), (2, 3, 24, 12)):
        images = torch.randn(shape)
        assert_close(compiled(images).logits, model(images).logits, **SAME)


def test_a_model_of_grey_images_takes_colour_as_its_luminance(make_vit):
    """As pipelines open every image; the mean of normalised channels is the normalised mean."""
    model = make_vit(num_channels=1)
    grey, colour = torch.randn(2, 1, 16, 16), torch.randn(2, 3, 16, 16)
    assert_close(model(grey.expand(-1, 3, -1, -1)).logits, model(grey).logits)
    luminance = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    assert_close(model(colour).logits, model(luminance).logits)
