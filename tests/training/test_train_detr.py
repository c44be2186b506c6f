"""Training a DETR: what a run begins with, what it refuses, and what it leaves."""

import io
import json
import random
import re
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessorPil, ResNetConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import hf_models
from tests.faults.processes import draw_shapes
from tests.training.cards import code_of
from training import train_detr
from training.models import create_image_model
from training.processors import edges_of
from training.run.arguments import parse_arguments
from training.train_detr import DetrArguments, choose_edges, choose_normalisation

pytestmark = pytest.mark.xdist_group("train_detr")  # these tests share one run, so one worker runs them all

TINY = "hidden_size=16,num_attention_heads=2,intermediate_size=16,num_encoder_layers=1,num_decoder_layers=1"
TINY += ",num_queries=6,num_denoising_groups=1"
OPTIONS = {"model": "detr-mini", "config": TINY, "max_steps": 2, "global_batch_size": 4, "warmup_steps": 1}
OPTIONS |= {"mixed_precision": "no", "num_workers": 0, "shortest_edge": 32, "eval_every": 0, "save_every": 0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of pictures with ellipses and rectangles, in YOLO's layout."""
    folder, choose = tmp_path_factory.mktemp("data") / "shapes", random.Random(0)
    for number in range(12):
        draw_shapes(folder, str(number), choose)
    (folder / "classes.txt").write_text("ellipse\nrectangle\n")
    return folder


def run(folder, monkeypatch, **options) -> str:
    """What a training, cut short, prints."""
    given = {name: value for name, value in {**OPTIONS, "output_dir": folder, **options}.items() if value is not None}
    monkeypatch.setattr(sys, "argv", ["train_detr.py", *(f"--{name}={value}" for name, value in given.items())])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with redirect_stdout(io.StringIO()) as printed:
        train_detr.main()
    return printed.getvalue()


def refuse(folder, monkeypatch, capsys, **options) -> str:
    with pytest.raises(SystemExit) as ended:
        run(folder / "run", monkeypatch, **options)
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not (folder / "run" / "run.json").exists()
    return line


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory):
    """A run from scratch, one that goes on from it with other classes, and what both printed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        changes = {"scale_jitter": 0.3, "crop": 0.5, "flip": 0.5, "color_jitter": 0.2, "ema_decay": 0.9}
        printed = {"scratch": run(folder / "scratch", monkeypatch, data=shapes, **changes)}
        other = shutil.copytree(shapes, folder / "other")
        (other / "classes.txt").write_text("ellipse\nrectangle\nstar\n")
        options = {"data": other, "model": folder / "scratch", "config": None, "shortest_edge": None}
        printed["tuned"] = run(folder / "tuned", monkeypatch, **options, backbone_learning_rate=0)
    return SimpleNamespace(**{name: folder / name for name in printed}, printed=printed)


# ---- what a run leaves ----


def test_a_run_leaves_cocos_measures_and_pictures(runs):
    results = json.loads((runs.scratch / "eval_results.json").read_text())
    assert {"eval_loss", "eval_map", "eval_map_50", "eval_map_75", "eval_mar_100"} < set(results)
    assert list(results["eval_per_class_map"]) == ["ellipse", "rectangle"]
    assert results["family"] == "ZooDetrForObjectDetection" and results["task"] == "object-detection"
    card = (runs.scratch / "README.md").read_text()
    for name in ("detections.png", "decoder_attention.png", "query_slots.png", "curves.png"):
        assert (runs.scratch / name).exists() and f"({name})" in card
    assert "pipeline_tag: object-detection" in card
    said = (
        r"11 images with 32 pixels on the shorter side and \d+ boxes of 2 classes to train on, 1 images to validate on"
    )
    assert re.search(said, runs.printed["scratch"])


@pytest.mark.parametrize("name", ["scratch", "tuned"])
def test_the_last_printed_lines_load_the_result_and_find_objects(runs, name):
    code = runs.printed[name].split("To use it:\n\n")[1]
    assert code.strip() == code_of(getattr(runs, name))
    with redirect_stdout(io.StringIO()) as printed:
        exec(code.replace('png")', 'png", threshold=0.0)'), {})
    lines = printed.getvalue().splitlines()
    assert len(lines) == 6 and all("'score'" in line and "'label'" in line and "'box'" in line for line in lines)


def test_a_run_that_is_complete_says_again_what_its_best_weights_are_worth(shapes, tmp_path, monkeypatch):
    for _ in range(2):
        run(tmp_path, monkeypatch, data=shapes, eval_every=1, patience=3)
        results = json.loads((tmp_path / "eval_results.json").read_text())
        assert set(results["eval_per_class_map"]) == {"ellipse", "rectangle"}
        (tmp_path / "eval_results.json").unlink()


def test_a_run_goes_on_from_a_checkpoint_at_its_size_and_with_other_classes(runs):
    assert edges_of(str(runs.tuned)) == edges_of(str(runs.scratch)) == (32, 53)
    config = hf_models.ZooDetrConfig.from_pretrained(runs.tuned)
    assert config.id2label == {0: "ellipse", 1: "rectangle", 2: "star"} and config.num_queries == 6
    before, after = (load_file(folder / "model.safetensors") for folder in (runs.scratch, runs.tuned))
    assert after["class_head.weight"].shape == after["model.label_embed.weight"].shape == (3, 16)
    backbone = [name for name in before if name.startswith("model.backbone.")]
    assert backbone and all(torch.equal(before[name], after[name]) for name in backbone)  # its rate was 0
    encoder = "model.encoder.layers.0.attention.o_proj.weight"
    assert not torch.equal(before[encoder], after[encoder])


# ---- what it begins with ----


class Begun(Exception):
    """A training that was about to take its first step."""


def begin(folder, monkeypatch, **options) -> SimpleNamespace:
    """What `train` is called with, and what was printed before."""
    calls = []
    names = ("args", "accelerator", "model", "data", "evaluate", "identity")

    def begun(*values, **more):
        printed = sys.stdout.getvalue()
        calls.append(SimpleNamespace(**dict(zip(names, values, strict=True)), **more, printed=printed))
        raise Begun

    monkeypatch.setattr(train_detr, "train", begun)
    with pytest.raises(Begun):
        run(folder / "run", monkeypatch, **options)
    return calls[0]


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ([], 1.0),
        (["--backbone_learning_rate=2e-3"], 2.0),
        (["--model=a/checkpoint"], 0.1),
        (["--backbone_weights=a/resnet"], 0.1),
        (["--backbone_weights=a/resnet", "--backbone_learning_rate=0"], 0.0),
    ],
)
def test_a_trained_backbone_has_a_tenth_of_the_rate_unless_told_otherwise(given, rate):
    assert parse_arguments(DetrArguments, ["--learning_rate=1e-3", *given]).backbone_rate == rate


def test_trained_weights_of_a_resnet_are_where_a_fresh_model_begins(shapes, tmp_path, monkeypatch):
    trained = hf_models.create_model("detr-small", backbone="resnet-mini", backbone_norm="frozen_batch").model.backbone
    weights = {name: torch.rand_like(tensor) for name, tensor in trained.state_dict().items()}
    save_file(weights, tmp_path / "resnet.safetensors")
    options = {"config": f"{TINY},backbone=resnet-mini,backbone_norm=frozen_batch", "model": "detr-small"}
    found = begin(tmp_path, monkeypatch, data=shapes, **options, backbone_weights=tmp_path / "resnet.safetensors")
    ours = found.model.model.backbone.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights.items())
    assert found.rate_scales == {"model.backbone": 0.1} and found.identity["backbone_rate"] == 0.1
    assert found.model.config.num_channels == 3  # though the images are grey
    assert (found.identity["mean"], found.identity["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_from_scratch_images_are_normalised_by_their_own_statistics(shapes, tmp_path, monkeypatch):
    found = begin(tmp_path, monkeypatch, data=shapes)
    pixels = found.data.augment(found.data.batch(0, range(4)))
    inside = pixels["pixel_values"][:, 0][pixels["pixel_mask"]]
    assert found.model.config.num_channels == 1 and abs(inside.mean()) < 0.3 and 0.5 < inside.std() < 2
    assert found.rate_scales == {"model.backbone": 1.0} and found.monitor is None


def save_stock_detr(folder: Path, **options):
    widths = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2] * 4}  # a ResNet-18
    backbone = ResNetConfig(**widths, layer_type="basic", out_features=["stage4"])
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5, "num_labels": 4}
    stock = DetrForObjectDetection(
        DetrConfig(backbone_config=backbone, use_timm_backbone=False, **sizes, **heads, **options)
    )
    stock.save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 60}).save_pretrained(folder)


def test_stock_checkpoints_are_gone_on_from(tmp_path):
    save_stock_detr(tmp_path)
    model_class = hf_models.ZooDetrForObjectDetection
    model = create_image_model(str(tmp_path), model_class, CPU, label_names=["a", "b"], num_channels=3)
    assert model(torch.zeros(1, 3, 40, 40)).logits.shape == (1, 5, 3) and model.config.id2label == {0: "a", 1: "b"}
    args, images = DetrArguments(model=str(tmp_path)), SimpleNamespace(num_channels=3)
    assert choose_edges(args, images) == (40, 60)
    assert choose_normalisation(args, images) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize(
    ("saved", "given", "trained"), [(False, None, True), (False, "auxiliary_loss=false", False), (True, None, True)]
)
def test_all_decoder_layers_of_a_stock_checkpoint_are_trained(shapes, tmp_path, monkeypatch, saved, given, trained):
    save_stock_detr(tmp_path / "stock", auxiliary_loss=saved)
    options = {"data": shapes, "model": tmp_path / "stock", "config": given, "shortest_edge": None}
    found = begin(tmp_path, monkeypatch, **options)
    assert (found.model.config.auxiliary_loss, found.model.config.repeats_norm) == (trained, saved)
    assert ("note: auxiliary_loss is true, though false in" in found.printed) == (trained and not saved)


@pytest.mark.parametrize(
    ("options", "edges"),
    [
        ({}, (None, None)),
        ({"data": "photos"}, (480, 800)),
        ({"data": "photos", "longest_edge": 500}, (480, 500)),
        ({"shortest_edge": 64}, (64, 107)),
        ({"data": "photos", "shortest_edge": 800, "longest_edge": 1333}, (800, 1333)),
    ],
)
def test_images_keep_about_their_size_unless_told_otherwise(options, edges):
    sizes = [[480, 640], [300, 200], [1000, 1000], [500, 480], [480, 481]]
    images = SimpleNamespace(train=SimpleNamespace(sizes=torch.tensor(sizes).numpy()))
    assert choose_edges(DetrArguments(**options), images) == edges


@pytest.mark.parametrize(
    ("saved", "edges"),
    [
        ({"size": 800, "max_size": 1333}, (800, 1333)),  # as the first published ones
        ({"do_resize": False, "size": {"shortest_edge": 800}}, (None, None)),
        ({"size": {"height": 512, "width": 512}}, None),
        (None, None),
    ],
)
def test_what_a_checkpoints_processor_says_of_sizes(tmp_path, saved, edges):
    if saved is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    assert edges_of(str(tmp_path)) == edges


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "vit-mini-patch4-28"}, "vit-mini-patch4-28 is no ZooDetrForObjectDetection"),
        ({"config": "num_querys=6"}, "no field 'num_querys'; did you mean num_queries?"),
        ({"config": f"{TINY},backbone_norm=frozen_batch"}, "detr-mini has frozen batch norms, which without trained"),
        ({"layer_decay": 0.9}, "layer_decay is for one stack of layers, which a DETR is not"),
        ({"backbone_learning_rate": -1}, "backbone_learning_rate must be at least 0, not -1.0"),
        ({"validation_fraction": 0}, "raise validation_fraction or give validation_data"),
        ({"label_names": "ellipse"}, "rectangle"),
        ({"crop": 2}, "crop must be from 0 to 1, not 2"),
        ({"shortest_edge": 0}, "shortest_edge must be at least 1, not 0"),
        ({"shortest_edge": 64, "longest_edge": 32}, "longest_edge must be at least shortest_edge, 64"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_options_that_do_not_fit(shapes, tmp_path, monkeypatch, capsys, options, said):
    assert said in refuse(tmp_path, monkeypatch, capsys, data=shapes, **options)


def test_weights_that_do_not_fit_the_backbone_are_refused(shapes, tmp_path, monkeypatch, capsys):
    save_file({"stem.conv.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "resnet.safetensors")
    said = refuse(tmp_path, monkeypatch, capsys, data=shapes, backbone_weights=tmp_path / "resnet.safetensors")
    assert "resnet.safetensors does not fit the backbone: stem.norm.weight is missing" in said


def write_coco(folder: Path, text: str | None = None, **changes) -> Path:
    """Four grey images with a box each, as COCO writes them."""
    (folder / "images").mkdir(parents=True)
    entries = [{"id": number, "file_name": f"{number}.png", "height": 20, "width": 30} for number in range(4)]
    for entry in entries:
        Image.new("L", (30, 20), 10 * entry["id"]).save(folder / "images" / entry["file_name"])
    boxes = [{"id": n, "image_id": n, "category_id": 7, "bbox": [1, 2, 10, 10], "area": 100} for n in range(4)]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 7, "name": "x"}], **changes}
    (folder / "boxes.json").write_text(text if text is not None else json.dumps(content))
    return folder / "boxes.json"


def test_a_broken_json_is_named_with_its_place(tmp_path, monkeypatch, capsys):
    file = write_coco(tmp_path / "coco", '{"images": [\n  {"id": 0,]}')
    said = refuse(tmp_path, monkeypatch, capsys, data=file)
    assert str(file) in said and "line 2" in said


def test_a_box_of_no_image_is_named(tmp_path, monkeypatch, capsys):
    lost = [{"id": 5, "image_id": 99, "category_id": 7, "bbox": [1, 2, 10, 10], "area": 100}]
    said = refuse(tmp_path, monkeypatch, capsys, data=write_coco(tmp_path / "coco", annotations=lost))
    assert "boxes.json" in said and "99" in said


def test_a_missing_image_is_replaced_and_too_many_are_refused(tmp_path, monkeypatch, capsys):
    file = write_coco(tmp_path / "coco")
    (tmp_path / "coco" / "images" / "2.png").unlink()
    assert "2.png" in refuse(tmp_path, monkeypatch, capsys, data=file, validation_data=file)
    printed = run(tmp_path / "run", monkeypatch, data=file, validation_data=file, max_bad_images=0.5)
    assert "2.png" in printed


def test_numbers_that_are_not_finite_end_the_run_and_name_the_image(shapes, tmp_path, monkeypatch, capsys):
    forward = hf_models.ZooDetrForObjectDetection.forward

    def diverged(self, pixel_values, **inputs):
        pixel_values[1] = torch.nan
        return forward(self, pixel_values, **inputs)

    monkeypatch.setattr(hf_models.ZooDetrForObjectDetection, "forward", diverged)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "run", monkeypatch, data=shapes)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 3 and "step 1, positions 0..3 of its global batch" in line and ".png" in line


def test_what_changes_images_and_rates_is_part_of_a_runs_identity(runs, shapes, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(runs.scratch, monkeypatch, data=shapes, crop=0.4, ema_decay=0.9, backbone_learning_rate=1e-4)
    said = capsys.readouterr().err
    assert "crop: this run has 0.4, --output_dir holds 0.5" in said and "backbone_rate: this run has" in said
