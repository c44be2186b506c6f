"""Training on images: what a batch is a function of, what is refused, and what a run leaves for the next one."""

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

import hf_models
from tests.training.cards import code_of
from training import train_vit
from training.images.read import read_images
from training.models import create_image_model
from training.processors import normalisation_of

pytestmark = pytest.mark.xdist_group("train_vit")  # these tests share one run, so one worker runs them all

TINY = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,patch_size=4"
TINY_DECODER = ",decoder_hidden_size=16,decoder_num_hidden_layers=1,decoder_num_attention_heads=2"
OPTIONS = {"max_steps": 2, "global_batch_size": 8, "warmup_steps": 1, "mixed_precision": "no", "num_workers": 0}
MODELS = {
    "classify": {"model": "vit-mini-patch4-28", "config": TINY, "image_size": 8},
    "mae": {"model": "vit-mae-mini-patch4-28", "config": TINY + TINY_DECODER, "image_size": 8},
}


def run(folder, monkeypatch, objective="classify", **options) -> str:
    """What a training, cut short and on the digits unless told otherwise, prints."""
    options = {**OPTIONS, **MODELS[objective], "objective": objective, "output_dir": folder, **options}
    given = {name: value for name, value in options.items() if value is not None}
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["train_vit.py", *options])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with redirect_stdout(io.StringIO()) as printed:
        train_vit.main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A masked autoencoder, a classifier that began from it with images of another size, and what both printed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        printed = {"mae": run(folder / "mae", monkeypatch, "mae", labelled_fraction=0.1)}
        options = {"model": folder / "mae", "config": None, "image_size": 12, "layer_decay": 0.5}
        printed["classify"] = run(folder / "classify", monkeypatch, **options, drop_path=0.1, cutmix=1.0)
    return SimpleNamespace(**{name: folder / name for name in printed}, printed=printed)


@pytest.fixture(scope="module")
def digits():
    return read_images("embedded")


# ---- what a run leaves ----


def test_a_masked_autoencoder_leaves_its_loss_its_probes_and_its_reconstructions(runs):
    results = json.loads((runs.mae / "eval_results.json").read_text())
    assert results["eval_loss"] > 0 and results["family"] == "ZooViTMAEForPreTraining"
    assert 0.1 < results["eval_knn_accuracy"] <= 1 and 0.1 < results["eval_linear_probe_accuracy"] <= 1
    assert (runs.mae / "reconstructions.png").exists() and not (runs.mae / "confusion_matrix.png").exists()
    assert "(reconstructions.png)" in (runs.mae / "README.md").read_text()


def test_a_classifier_begins_from_a_masked_autoencoder_at_another_resolution(runs):
    results = json.loads((runs.classify / "eval_results.json").read_text())
    assert {"eval_loss", "eval_accuracy", "eval_top5_accuracy"} < set(results)
    assert list(results["eval_per_class_accuracy"]) == [str(digit) for digit in range(10)]
    assert (runs.classify / "confusion_matrix.png").exists() and "(confusion_matrix.png)" in (
        runs.classify / "README.md"
    ).read_text()
    model = hf_models.ZooViTForImageClassification.from_pretrained(runs.classify)
    assert (model.config.image_size, model.config.drop_path, model.config.num_labels) == (12, 0.1, 10)
    assert normalisation_of(str(runs.classify), 1) == normalisation_of(str(runs.mae), 1)


def test_a_run_that_is_complete_says_again_what_its_best_weights_are_worth(tmp_path, monkeypatch):
    for _ in range(2):
        run(tmp_path, monkeypatch, eval_every=1, patience=3)
        results = json.loads((tmp_path / "eval_results.json").read_text())
        assert len(results["eval_per_class_accuracy"]) == 10
        (tmp_path / "eval_results.json").unlink()


def test_the_encoder_of_an_autoencoder_is_where_training_begins(runs):
    device = torch.device("cpu")
    fresh = hf_models.ZooViTMAEForPreTraining.from_pretrained(runs.mae).vit.state_dict()
    model = create_image_model(
        str(runs.mae), hf_models.ZooViTForImageClassification, device, label_names=["a", "b"], image_size=8
    )
    ours = model.vit.state_dict()
    assert all(torch.equal(ours[name], fresh[name]) for name in ours) and ours.keys() == fresh.keys()
    assert model.config.problem_type == "single_label_classification" and model.config.id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize("kind", ["ViT", "ViTMAE"])
def test_stock_checkpoints_are_gone_on_from(tmp_path, kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 1}
    if kind == "ViT":
        ViTForImageClassification(ViTConfig(**sizes, num_labels=3)).save_pretrained(tmp_path)
    else:
        decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        stock = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, decoder_intermediate_size=32))
        stock.save_pretrained(tmp_path)
    model = create_image_model(
        str(tmp_path),
        hf_models.ZooViTForImageClassification,
        torch.device("cpu"),
        label_names=["a", "b"],
        image_size=16,
    )
    assert model(torch.zeros(1, 1, 16, 16)).logits.shape == (1, 2)
    assert normalisation_of(str(tmp_path), 1) is None


@pytest.mark.parametrize("name", ["mae", "classify"])
def test_the_last_printed_lines_load_the_result_and_use_it(runs, name):
    code = runs.printed[name].split("To use it:\n\n")[1]
    assert code.strip() == code_of(getattr(runs, name))
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert ("score" if name == "classify" else "tensor(") in printed.getvalue()


def test_a_stream_trains_and_goes_on_where_it_was(tmp_path, monkeypatch, digits):
    pixels = digits.train.images(np.arange(1200), size=(8, 8))[:, 0].numpy()
    images = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "label": digits.train.labels[:1200].tolist()},
        datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"digit {n}" for n in range(10)])}
        ),
    )
    images.to_parquet(tmp_path / "digits.parquet")
    options = {"data": tmp_path / "digits.parquet", "streaming": True, "max_steps": 30, "num_channels": 1}
    printed = run(tmp_path / "whole", monkeypatch, **options)
    assert "a stream of images of 8x8 pixels to train on and 1,000 to validate on" in printed
    run(tmp_path / "run", monkeypatch, **options, save_every=10)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000030")
    assert "resuming from" in run(tmp_path / "run", monkeypatch, **options, save_every=10)
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert whole == resumed


# ---- what is refused ----


def refuse(folder, monkeypatch, capsys, **options) -> str:
    with pytest.raises(SystemExit) as ended:
        run(folder / "run", monkeypatch, **options)
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not (folder / "run" / "run.json").exists()
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 10}, "image_size 10 is not a multiple of patch_size 4"),
        (
            {"cutmix": 1.0, "micro_batch_size": 1},
            "mixup and cutmix mix pairs, which range(0, 1) parts: make micro_batch_size even",
        ),
        ({"streaming": True, "global_batch_size": 4096}, "global_batch_size of a stream is at most 2048, not 4096"),
        ({"labelled_fraction": 0}, "labelled_fraction must be above 0 and at most 1"),
        ({"objective": "mae", "mixup": 0.5}, "mixup changes labels, which --objective mae does not use"),
        ({"objective": "mae", "model": "vit-mini-patch4-28"}, "vit-mini-patch4-28 is no ZooViTMAEForPreTraining"),
        ({"model": "bert-tiny"}, "bert-tiny is no ZooViTForImageClassification"),
        ({"config": "hidden_sise=16"}, "no field 'hidden_sise'; did you mean hidden_size?"),
        ({"num_channels": 4}, "num_channels must be 1 (grey) or 3 (colour), not 4"),
        ({"validation_fraction": 1}, "validation_fraction must be at least 0 and below 1"),
        ({"translate": 8}, "translate must be from 0 to below the 8 pixels"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, capsys, options, said):
    assert said in refuse(tmp_path, monkeypatch, capsys, **options)


def test_a_checkpoint_of_another_family_is_refused(tmp_path, monkeypatch, capsys):
    hf_models.create_model("bert-tiny").save_pretrained(tmp_path / "bert")
    said = refuse(tmp_path, monkeypatch, capsys, model=tmp_path / "bert", config=None)
    assert "is a 'zoo_bert'; a ZooViTForImageClassification starts from zoo_vit, vit, zoo_vit_mae, vit_mae" in said
    (tmp_path / "empty").mkdir()
    said = refuse(tmp_path, monkeypatch, capsys, model=tmp_path / "empty")
    assert f"--model {tmp_path}/empty is no checkpoint that loads" in said


def test_images_without_labels_pre_train_and_are_not_probed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(random.integers(0, 256, (9, 11), dtype=np.uint8)).save(folder / f"{number}.png")
    assert "images outside of its class folders" in refuse(tmp_path, monkeypatch, capsys, data=folder)
    printed = run(tmp_path / "run", monkeypatch, "mae", data=folder)
    assert "note: without labels, so features will not be probed" in printed
    assert "eval_knn_accuracy" not in json.loads((tmp_path / "run" / "eval_results.json").read_text())
    said = refuse(tmp_path / "other", monkeypatch, capsys, objective="mae", data=folder, labelled_fraction=0.5)
    assert "labelled_fraction chooses among all labels, which are not known" in said


def test_what_changes_images_is_part_of_a_runs_identity(runs, monkeypatch, capsys):
    options = {"model": runs.mae, "config": None, "image_size": 12, "layer_decay": 0.5, "drop_path": 0.1, "cutmix": 1.0}
    with pytest.raises(SystemExit):
        run(runs.classify, monkeypatch, **{**options, "cutmix": 0.5}, flip=0.5)
    said = capsys.readouterr().err
    assert "cutmix: this run has 0.5, --output_dir holds 1.0" in said and "flip: this run has 0.5" in said
