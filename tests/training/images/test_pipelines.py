"""A pipeline on a checkpoint sees the pixels, and gives the answers, that the evaluation of its training measured."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import pipeline
from transformers.image_utils import load_image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_models import ZooViTConfig, ZooViTForImageClassification
from tests.training.images.test_rows import ODD, open_rows
from tests.training.pictures import content, picture
from training.detection.batches import DetectionTransform
from training.images import decoding
from training.images.augment import Augmentation
from training.images.rows import ArrayRows
from training.images.validation import ClassValidation
from training.processors import create_detection_processor, create_image_processor

TURNED = Image.Exif()
TURNED[decoding.ORIENTATION] = 6
FILES = {kind: file for kind, (file, _, _) in ODD.items()}
FILES["larger"] = content(picture(1, (61, 47)))
FILES["turned"] = content(picture(1, (40, 24)), "JPEG", exif=TURNED)
FILES["photograph"] = content(picture(1, (900, 700)), "JPEG")  # which a training decodes at a fraction of its size
SIZES = [(12, 12), (16, 24)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
every_colour = pytest.mark.parametrize("num_channels", [1, 3])


def normalisation(num_channels: int) -> dict[str, list[float]]:
    return {"mean": [0.1, 0.2, 0.3][:num_channels], "std": [0.2, 0.3, 0.4][:num_channels]}


def make_augmentation(size, num_channels) -> Augmentation:
    return Augmentation(seed=0, global_batch_size=1, image_size=size, **normalisation(num_channels))


def as_a_pipeline_sees(processor, image, folder) -> torch.Tensor:
    processor.save_pretrained(folder)
    return AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values


@every_colour
@every_size
@pytest.mark.parametrize("kind", FILES)
def test_a_pipeline_sees_the_pixels_of_the_evaluation(kind, size, num_channels, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(FILES[kind])
    rows = open_rows([str(path)], num_channels=num_channels)
    expected = make_augmentation(size, num_channels).normalize(rows.images([0], size=size))
    # Of 16 bits a pipeline makes 8 by itself, and not well.
    image = Image.open(path) if "16-bit" in kind else load_image(str(path))
    processor = create_image_processor(size, **normalisation(num_channels))
    torch.testing.assert_close(as_a_pipeline_sees(processor, image, tmp_path), expected, rtol=0, atol=1e-5)


@every_colour
@pytest.mark.parametrize("edges", [(20, 40), (20, None), (None, None)], ids=str)
@pytest.mark.parametrize("kind", FILES)
def test_so_does_one_that_finds_objects(kind, edges, num_channels, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(FILES[kind])
    rows = open_rows([str(path)], num_channels=num_channels)
    image = Image.open(path) if "16-bit" in kind else load_image(str(path))
    values = normalisation(num_channels)
    edges = dict(zip(("shortest_edge", "longest_edge"), edges, strict=True))
    transform = DetectionTransform(seed=0, global_batch_size=1, **values, **edges)
    pixels = rows.images([0], np.array([[0, 0, 1, 1]]), transform.size(*decoding.upright_size(str(path))))
    expected = transform.normalize(pixels, torch.ones(1, *pixels.shape[2:], dtype=torch.bool))
    processor = create_detection_processor(*edges.values(), **values)
    torch.testing.assert_close(as_a_pipeline_sees(processor, image, tmp_path), expected, rtol=0, atol=1e-5)


@every_colour
@every_size
@pytest.mark.parametrize("channels", [1, 3])
def test_so_does_one_of_images_that_were_in_memory(channels, size, num_channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, channels, 13, 17), np.uint8)
    rows = ArrayRows(pixels, None, num_channels=num_channels)
    expected = make_augmentation(size, num_channels).normalize(rows.images([0], size=size))
    image = load_image(Image.fromarray(pixels[0].transpose(1, 2, 0).squeeze()))
    processor = create_image_processor(size, **normalisation(num_channels))
    torch.testing.assert_close(as_a_pipeline_sees(processor, image, tmp_path), expected, rtol=0, atol=1e-5)


@every_colour
def test_a_pipeline_gives_the_probabilities_of_the_evaluation(num_channels, tmp_path):
    size, names = (16, 24), ["cat", "dog", "cow"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    config = ZooViTConfig(image_size=size, num_channels=num_channels, id2label=dict(enumerate(names)), **sizes)
    torch.manual_seed(0)
    model = ZooViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    create_image_processor(size, **normalisation(num_channels)).save_pretrained(tmp_path)
    paths = [tmp_path / f"{number}.image" for number in range(4)]
    for path, kind in zip(paths, ("larger", "turned", "photograph", "palette"), strict=True):
        path.write_bytes(FILES[kind])
    rows = open_rows(list(map(str, paths)), [0, 1, 2, 0], num_channels=num_channels)
    validation = ClassValidation(Accelerator(cpu=True), rows, names, make_augmentation(size, num_channels), 2)
    with torch.no_grad():
        expected = torch.cat([model(pixel_values).logits.softmax(1) for _, pixel_values, _ in validation.batches()])
    classify = pipeline("image-classification", model=str(tmp_path), trust_remote_code=True)
    for path, probabilities in zip(paths, expected.tolist(), strict=True):
        found = {answer["label"]: answer["score"] for answer in classify(str(path))}
        assert [found[name] for name in names] == pytest.approx(probabilities, abs=1e-5)
