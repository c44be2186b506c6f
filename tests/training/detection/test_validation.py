from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import pipeline
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

from hf_models import ZooDetrConfig, ZooDetrForObjectDetection
from tests.training.pictures import content, picture
from training.detection import validation as detection_validation
from training.detection.batches import DetectionTransform
from training.detection.canvases import Canvases
from training.detection.formats import Box, BoxSet
from training.detection.read import DetectionRows
from training.detection.validation import DetectionValidation
from training.images.rows import BadImageLimit, Decoder
from training.processors import create_detection_processor
from training.run.processes import take_turns

NAMES = ["cat", "dog", "cow"]
# Height and width of each image, and its boxes.
IMAGES = [
    ((40, 60), [("cat", (5, 5, 30, 20)), ("dog", (20, 10, 50, 39))]),
    ((60, 40), [("cat", (0, 0, 40, 60))]),
    ((40, 60), []),
    ((40, 60), [("dog", (30.5, 2, 41, 33))]),
    ((47, 53), [("dog", (3, 4, 20, 30)), ("dog", (25, 4, 50, 44))]),
]


def make_rows(images=IMAGES, num_channels=3, bad=(), crowds=()):
    """Rows of pictures; those numbered in `bad` cannot be read, and all boxes of those in `crowds` are crowds."""
    contents = [b"no image" if n in bad else content(picture(n, size)) for n, (size, _) in enumerate(images)]
    boxes = [Box(n, name, box, None, n in crowds) for n, (_, found) in enumerate(images) for name, box in found]
    sizes = np.array([size for size, _ in images])
    boxes = BoxSet(Canvases(contents), sizes, boxes, list(range(len(images))), NAMES)
    ids = {name: number for number, name in enumerate(NAMES)}
    options = {"num_channels": num_channels, "decoder": Decoder(0), "limit": BadImageLimit(0.5)}
    return DetectionRows(boxes, ids, [0, 1, 2], [], **options)


def make_validation(rows=None, batch_size=2, model=None, accelerator=None, **options):
    rows = make_rows() if rows is None else rows
    mean = {"mean": [0.4] * rows.num_channels, "std": [0.25] * rows.num_channels}
    options = {"seed": 0, "global_batch_size": 2, "shortest_edge": 48, "longest_edge": 64, **mean, **options}
    config = model.config if model else SimpleNamespace(num_queries=5, no_object_weight=0.1)
    accelerator = accelerator or Accelerator(cpu=True)
    return DetectionValidation(accelerator, rows, NAMES, DetectionTransform(**options), config, batch_size)


@pytest.fixture
def make_detr():
    def make(**fields):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 2}
        backbone = {"backbone": "resnet-mini", "backbone_norm": "group"}
        labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: n for n, name in enumerate(NAMES)}}
        config = ZooDetrConfig(**{"num_attention_heads": 2, "num_queries": 5, **sizes, **backbone, **labels, **fields})
        return ZooDetrForObjectDetection(config).eval()

    return make


def perfect(pixel_values, labels, num_items_in_batch):
    """A model that knows the labels."""
    most = max(1, *(len(label["boxes"]) for label in labels))
    logits, boxes = torch.zeros(len(labels), most, 4), torch.full((len(labels), most, 4), 0.5)
    logits[..., 3] = 100
    for image, label in enumerate(labels):
        count = len(label["boxes"])
        boxes[image, :count] = label["boxes"]
        logits[image, torch.arange(count), label["class_labels"]] = 200
    return DetrObjectDetectionOutput(loss=torch.tensor(0.0), logits=logits, pred_boxes=boxes)


# ----------------------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("num_batches", [0, 1, 4, 7])
def test_every_batch_counts_on_one_process_and_all_run_as_often(num_processes, num_batches):
    shares = [
        list(take_turns(SimpleNamespace(process_index=rank, num_processes=num_processes), range(num_batches)))
        for rank in range(num_processes)
    ]
    assert {len(share) for share in shares} == {-(-num_batches // num_processes)}
    assert sorted(batch for share in shares for batch, counts in share if counts) == list(range(num_batches))


# -------------------------------------------------------------------------------------------------------- measures


def test_who_finds_every_box_scores_one():
    results = make_validation().measure(perfect)
    assert results["eval_map"] == results["eval_map_50"] == results["eval_mar_100"] == pytest.approx(1)
    assert "eval_map_large" not in results  # no box is that large


def test_crowds_are_neither_found_nor_missed():
    results = make_validation(make_rows(crowds=[1])).measure(perfect)
    assert results["eval_map"] == pytest.approx(1)


def test_who_finds_nothing_scores_zero():
    def blind(pixel_values, labels, num_items_in_batch):
        outputs = perfect(pixel_values, labels, num_items_in_batch)
        outputs.pred_boxes = outputs.pred_boxes * 1e-3
        return outputs

    assert make_validation().measure(blind)["eval_map"] == 0


def test_measures_do_not_depend_on_batch_or_process(make_detr, monkeypatch):
    model = make_detr()
    expected = make_validation(model=model, batch_size=1).results(model)
    together = make_validation(model=model, batch_size=8)
    assert [part.tolist() for part in together.parts()] == [[0, 2, 3], [4], [1]]  # no two sizes in one batch
    results = together.results(model)
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert results["map"] == pytest.approx(expected["map"], abs=1e-5)

    monkeypatch.setattr(detection_validation, "gather_object", lambda values: values)
    monkeypatch.setattr(DetectionValidation, "score", lambda *_: {})
    ranks = [
        SimpleNamespace(process_index=rank, num_processes=2, device="cpu", is_main_process=True) for rank in range(2)
    ]
    shares = [make_validation(model=model, batch_size=8, accelerator=rank).results(model) for rank in ranks]
    assert sorted([*shares[0]["found"], *shares[1]["found"]]) == [0, 1, 2, 3, 4]
    assert sum(share["loss"] for share in shares) == pytest.approx(results["loss"])


def test_the_loss_is_that_of_all_images_in_one_batch(make_detr):
    model = make_detr()
    rows = make_rows([IMAGES[0], IMAGES[2], IMAGES[3]])
    validation = make_validation(rows, model=model, batch_size=3)
    ((_, pixel_values, labels, _),) = validation.batches()
    with torch.no_grad():
        expected = float(model(pixel_values, labels=labels).loss)
    assert make_validation(rows, model=model, batch_size=1).measure(model)["eval_loss"] == pytest.approx(expected)


def test_bad_images_are_left_out():
    validation = make_validation(make_rows(bad=[2, 4]), batch_size=4)
    results = validation.results(perfect)
    assert list(results["found"]) == [0, 1, 3] and results["map"] == pytest.approx(1)


def test_a_line_of_pixels_is_an_image():
    rows = make_rows([*IMAGES, ((1, 4000), [("cow", (1000, 0, 3000, 1))])])
    assert make_validation(rows).measure(perfect)["eval_map"] == pytest.approx(1)


def test_without_boxes_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="no image to validate on has a box: raise validation_fraction"):
        make_validation(make_rows([IMAGES[2]]))


# ------------------------------------------------------------------------------------------------------- pipelines


def test_images_get_the_size_that_the_processor_gives_them():
    random = np.random.default_rng(0)
    for height, width, edge, most in random.integers(8, 300, (2000, 4)).tolist():
        edge, most = min(edge, most), max(edge, most)
        transform = DetectionTransform(
            seed=0, global_batch_size=1, mean=[0.5], std=[0.5], shortest_edge=edge, longest_edge=most
        )
        expected = get_size_with_aspect_ratio((height, width), edge, most)
        assert transform.size(height, width) == tuple(max(1, side) for side in expected), (height, width, edge, most)


@pytest.mark.parametrize("options", [{}, {"shortest_edge": None}, {"longest_edge": None}])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_pipeline_finds_what_the_evaluation_finds(make_detr, tmp_path, num_channels, options):
    model = make_detr(num_channels=num_channels)
    rows = make_rows(num_channels=num_channels)
    validation = make_validation(rows, batch_size=8, model=model, **options)
    found = validation.results(model)["found"]
    model.save_pretrained(tmp_path)
    validation.processor.save_pretrained(tmp_path)
    detect = pipeline("object-detection", model=str(tmp_path), trust_remote_code=True)
    for place, image in enumerate(validation.images(range(len(rows)))):
        height, width = rows.sizes[place]
        answers = detect(image, threshold=0)
        np.testing.assert_allclose([answer["score"] for answer in answers], found[place]["scores"], atol=1e-5)
        assert [answer["label"] for answer in answers] == [NAMES[label] for label in found[place]["labels"]]
        boxes = [[answer["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for answer in answers]
        expected = found[place]["boxes"] * [width, height, width, height]
        assert np.abs(boxes - expected).max() < 1.01  # a pipeline cuts off what is behind the point


def test_a_processor_takes_grey_and_transparent_images():
    processor = create_detection_processor(32, None, [0.4] * 3, [0.2] * 3)
    for mode in ("L", "RGBA", "P"):
        assert processor(picture(0, (20, 30), mode), return_tensors="pt").pixel_values.shape == (1, 3, 32, 48)
    grey = create_detection_processor(32, None, [0.4], [0.2])
    assert grey(picture(0, (20, 30), "L"), return_tensors="pt").pixel_values.shape == (1, 1, 32, 48)


# ------------------------------------------------------------------------------------------------------ the closer look


def test_a_closer_look_has_each_class_and_the_pictures(make_detr, tmp_path):
    model = make_detr()
    validation = make_validation(model=model)
    results = validation.measure(model)
    validation.results = None  # nothing is measured twice
    measured, pictures = validation.look_closer(model, results)
    assert list(measured["eval_per_class_map"]) == NAMES and measured["eval_per_class_map"]["cow"] is None
    assert measured["eval_per_class_map"]["cat"] >= 0
    assert list(pictures) == ["detections.png", "query_slots.png", "decoder_attention.png", "example.png"]
    for name, figure in pictures.items():
        if name != "example.png":
            figure.savefig(tmp_path / name)
    assert pictures["example.png"].size == (60, 40)
    true, found = pictures["detections.png"].axes[:2]
    assert [text.get_text() for text in true.texts] == ["cat", "dog"]


def test_other_weights_are_measured_again(make_detr):
    model = make_detr()
    validation = make_validation(model=model)
    results = validation.measure(model)
    validation.latest = {**validation.latest, "loss": 0.0, "per_class_map": [0.5] * 3}
    measured, _ = validation.look_closer(model, results)
    assert measured["eval_per_class_map"]["cat"] != 0.5
