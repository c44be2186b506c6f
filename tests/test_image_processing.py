"""What prepares images for a model: the same class, and so the same pixels, whether torchvision is installed or not.

That these are the pixels of a training's evaluation, tests/training/test_image_validation.py shows.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, AutoImageProcessor

from hf_models import (
    ZooDetrConfig,
    ZooDetrImageProcessor,
    ZooViTConfig,
    ZooViTImageProcessor,
    ZooViTMAEConfig,
    image_processing,
)

PROCESSORS = {
    "ViT": lambda **options: ZooViTImageProcessor(size={"height": 6, "width": 8}, **options),
    "DETR": lambda **options: ZooDetrImageProcessor(size={"shortest_edge": 6, "longest_edge": 8}, **options),
}
COLOUR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 0.4]}
GREY = {"image_mean": [0.1], "image_std": [0.2]}
every_processor = pytest.mark.parametrize("kind", PROCESSORS)
every_colour = pytest.mark.parametrize("values", [COLOUR, GREY], ids=["colour", "grey"])


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8))


def pixel_values(processor, image) -> torch.Tensor:
    return processor(image, return_tensors="pt").pixel_values


@every_processor
@every_colour
@pytest.mark.parametrize("backend", [None, "pil", "torchvision"])
def test_a_saved_processor_is_opened_as_it_was_whatever_backend_is_there(kind, values, backend, image, tmp_path):
    processor = PROCESSORS[kind](**values)
    processor.save_pretrained(tmp_path)
    opened = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(opened) is type(processor) and opened.to_dict() == processor.to_dict()
    assert torch.equal(pixel_values(opened, image), pixel_values(processor, image))


@every_processor
def test_its_code_travels_with_it(kind, tmp_path):
    processor = PROCESSORS[kind]()
    processor.save_pretrained(tmp_path)
    saved, name = json.loads((tmp_path / "preprocessor_config.json").read_text()), type(processor).__name__
    assert saved["image_processor_type"] == name
    assert saved["auto_map"] == {"AutoImageProcessor": f"image_processing.{name}"}
    assert (tmp_path / "image_processing.py").read_bytes() == Path(image_processing.__file__).read_bytes()


@pytest.mark.parametrize(
    ("config_class", "processor_class"),
    [
        (ZooViTConfig, ZooViTImageProcessor),
        (ZooViTMAEConfig, ZooViTImageProcessor),
        (ZooDetrConfig, ZooDetrImageProcessor),
    ],
)
def test_a_config_has_one_processor_for_every_backend(config_class, processor_class):
    assert IMAGE_PROCESSOR_MAPPING[config_class] == {"pil": processor_class, "torchvision": processor_class}


@every_processor
@every_colour
def test_an_image_may_be_a_picture_an_array_a_tensor_or_a_file(kind, values, image, tmp_path):
    processor = PROCESSORS[kind](**values)
    expected = pixel_values(processor, image)
    assert expected.shape[:3] == (1, len(values["image_mean"]), 6)
    image.save(tmp_path / "image.png")
    array = np.array(image)
    transparent = np.concatenate([array, array[..., :1]], axis=2)  # transparency is left out
    given = [array, torch.from_numpy(array).permute(2, 0, 1), transparent, str(tmp_path / "image.png")]
    for other in (*given, Image.fromarray(transparent)):
        assert torch.equal(pixel_values(processor, other), expected)


@every_processor
def test_a_colour_model_takes_grey_images_and_a_grey_one_colours(kind, image):
    grey = image.convert("L")
    colours = pixel_values(PROCESSORS[kind](), grey)
    assert torch.equal(colours, pixel_values(PROCESSORS[kind](), grey.convert("RGB"))) and colours.shape[1] == 3
    assert torch.equal(pixel_values(PROCESSORS[kind](**GREY), image), pixel_values(PROCESSORS[kind](**GREY), grey))


@every_processor
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5, 3), np.float32), "array of float32: give uint8, from 0 to 255"),
        (Image.fromarray(np.zeros((5, 5), np.float32)), "floating-point pixels, which have no fixed range"),
    ],
)
def test_pixels_without_a_fixed_range_are_refused(kind, image, message):
    with pytest.raises(ValueError, match=message):
        PROCESSORS[kind]()(image)


def test_a_size_without_both_sides_is_refused(image):
    with pytest.raises(ValueError, match="size must have height and width"):
        ZooViTImageProcessor(size={"shortest_edge": 8})(image)


def test_a_vit_sees_the_middle_of_an_image_and_a_detr_all_of_it():
    stripes = np.zeros((10, 30), np.uint8)
    stripes[:, 10:20] = 255
    processor = ZooViTImageProcessor(size={"height": 10, "width": 10}, image_mean=[0.0], image_std=[1.0])
    assert (pixel_values(processor, Image.fromarray(stripes)) == 1).all()
    processor = ZooDetrImageProcessor(do_resize=False, image_mean=[0.0], image_std=[1.0])
    assert torch.equal(pixel_values(processor, Image.fromarray(stripes))[0, 0] * 255, torch.from_numpy(stripes).float())


def test_a_strip_keeps_a_pixel():
    strip = Image.new("RGB", (4000, 1))
    processor = ZooDetrImageProcessor(size={"shortest_edge": 20, "longest_edge": 40})
    assert pixel_values(processor, strip).shape == (1, 3, 1, 40)
