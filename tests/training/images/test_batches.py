import numpy as np
import pytest
import torch

from training.images.augment import Augmentation
from training.images.batches import ImageBatches, SelectedRows, channel_statistics, choose_labelled
from training.images.read import read_images

EVERYTHING = {"crop_scale": (0.3, 1.0), "translate": 1, "rand_augment_ops": 2, "color_jitter": 0.3, "erasing": 0.5}
EVERYTHING |= {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}


@pytest.fixture(scope="module")
def digits():
    return read_images("embedded")


def make_augmentation(**options) -> Augmentation:
    options = {"seed": 1, "global_batch_size": 8, "image_size": 8, "mean": [0.3], "std": [0.4], **options}
    return Augmentation(**options)


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_is_the_same_in_parts_and_after_any_other(digits, size):
    data = ImageBatches(digits.train, make_augmentation(num_labels=10, **EVERYTHING), max_steps=100)
    masked = ImageBatches(digits.train, make_augmentation(), 100, num_masked=3, num_patches=4)
    for batches in (data, masked):
        whole = batches.batch(5, range(8))
        parts = [batches.batch(5, range(first, first + size)) for first in range(0, 8, size)]
        for name, tensor in whole.items():
            assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name
        changed = [batches.augment(dict(part)) for part in parts]
        for name, tensor in batches.augment(dict(whole)).items():
            torch.testing.assert_close(tensor, torch.cat([part[name] for part in changed]), rtol=0, atol=1e-6)
    assert masked.num_items(whole) == 8 * 3 and data.num_items(whole) == data.num_units(whole) == 8


def test_every_epoch_has_every_image_in_an_order_of_its_own(digits):
    rows = SelectedRows(digits.train, np.arange(0, 160, 10))
    data = ImageBatches(rows, make_augmentation(), max_steps=4)
    places = [data.plan(step, range(8))[0] for step in range(4)]
    epochs = [np.concatenate(places[:2]), np.concatenate(places[2:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(16))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert torch.equal(rows.images(np.array([3]), size=(8, 8)), digits.train.images(np.array([30]), size=(8, 8)))


def test_a_part_of_the_labels_has_its_part_of_each_class_and_lies_within_a_larger_part():
    labels = np.repeat([0, 1, 2], [200, 50, 1])
    few, many = (choose_labelled(labels, fraction, seed=3) for fraction in (0.02, 0.5))
    assert np.bincount(labels[few]).tolist() == [4, 1, 1] and np.bincount(labels[many]).tolist() == [100, 25, 1]
    assert set(few) < set(many) and (np.diff(many) > 0).all()
    assert choose_labelled(labels, 0.02, seed=3).tolist() == few.tolist()
    assert choose_labelled(labels, 0.02, seed=4).tolist() != few.tolist()


def test_images_are_normalised_by_the_statistics_of_the_data(digits):
    mean, std = channel_statistics(digits.train, (8, 8), count=10_000)
    pixels = make_augmentation(mean=mean, std=std).normalize(digits.train.images(np.arange(1437), size=(8, 8)))
    assert abs(pixels.mean()) < 1e-3 and abs(pixels.std() - 1) < 1e-3


def test_statistics_are_those_of_images_resized_as_in_training():
    """They are part of what makes a run this run, so another way to resize would keep old runs from going on."""
    digits = read_images("embedded", seed=1337)
    assert channel_statistics(digits.train, (28, 28)) == ([0.3089], [0.3502])
