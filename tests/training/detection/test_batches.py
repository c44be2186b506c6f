import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import get_size_with_aspect_ratio

from tests.training import boxes as written
from training.detection.batches import DetectionBatches, DetectionTransform, evaluation_batches
from training.detection.read import read_detection

CONFIG = {"num_labels": 2, "num_queries": 5, "no_object_weight": 0.1, "num_denoising_groups": 0}
NOTHING = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "shortest_edge": 24, "longest_edge": 60}
NOTHING |= {"flip": 0.0, "crop": 0.0, "color_jitter": 0.0, "scale_jitter": 0.0}
EVERYTHING = {**NOTHING, "flip": 0.5, "crop": 0.7, "color_jitter": 0.4, "scale_jitter": 0.5, "pad_to": 4}


def many_images(count=40):
    """Of many shapes; the boxes show what moves where: a box has a colour of its own."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        height, width = random.integers(20, 60, 2).tolist()
        objects = []
        for number in range(random.integers(0, 4)):
            w, h = random.integers(6, 15, 2).tolist()
            objects.append(
                (written.NAMES[number % 2], int(random.integers(width - w)), int(random.integers(height - h)), w, h)
            )
        images.append(((height, width), objects))
    return images


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = written.write_coco(tmp_path_factory.mktemp("data"), many_images())
    return read_detection(file, validation_data=file, num_workers=0).train


def open_batches(rows, global_batch_size=8, max_steps=0, groups=0, **options):
    transform = DetectionTransform(seed=3, global_batch_size=global_batch_size, **{**EVERYTHING, **options})
    return DetectionBatches(rows, transform, max_steps, SimpleNamespace(**{**CONFIG, "num_denoising_groups": groups}))


def joined(batches):
    """Micro-batches as one, with the labels of each image in one tensor."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "pixel_mask")}
    labels = [label for batch in batches for label in batch["labels"]]
    whole["boxes"] = torch.cat([torch.cat([label["boxes"], label["class_labels"][:, None]], 1) for label in labels])
    whole["counts"] = torch.tensor([len(label["boxes"]) for label in labels])
    whole["noise"] = torch.cat([label["noise"].flatten() for label in labels])
    return whole


# ----------------------------------------------------------------------------------------------------------- batches


def test_a_batch_holds_padded_images_their_masks_and_their_boxes(rows):
    data = open_batches(rows, **NOTHING)
    batch = data.batch(0, range(8))
    places = rows.global_batch(0, 8, seed=3)
    pixels, mask = batch["pixel_values"], batch["pixel_mask"]
    assert pixels.dtype == torch.uint8 and mask.dtype == torch.bool and pixels.shape == (8, 3, *mask.shape[1:])
    assert pixels.shape[2] % 4 == 0 and pixels.shape[3] % 4 == 0
    for number, (place, label) in enumerate(zip(places.tolist(), batch["labels"], strict=True)):
        height, width = data.transform.size(*rows.sizes[place].tolist())
        assert mask[number, :height, :width].all() and mask[number].sum() == height * width
        assert not pixels[number].masked_fill(mask[number], 0).any()
        left, top, right, bottom = rows.boxes(place).T
        expected = np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 1)
        assert np.allclose(label["boxes"], expected) and label["boxes"].dtype == torch.float32
        assert label["class_labels"].tolist() == rows.classes(place).tolist()
        assert label["image_id"] == f"{place}.png" and "noise" not in label
    boxes = sum(len(label["boxes"]) for label in batch["labels"])
    assert data.num_items(batch) == {"boxes": boxes, "class_weights": pytest.approx(boxes + 0.1 * (40 - boxes))}
    assert data.num_units(batch) == 8 and "colour" not in batch


@pytest.mark.parametrize("shares", [2, 4, 8])
def test_micro_batches_are_the_parts_of_the_global_batch(rows, shares):
    data = open_batches(rows, groups=2)
    for step in (0, 7):
        parts = [data.batch(step, range(first, first + 8 // shares)) for first in range(0, 8, 8 // shares)]
        whole = data.batch(step, range(8))
        parts, augmented = joined(parts), joined([data.augment(part) for part in parts])
        for name, values in joined([whole]).items():
            assert torch.equal(parts[name], values)
        for name, values in joined([data.augment(whole)]).items():
            assert torch.equal(augmented[name], values)


def test_what_is_random_depends_on_seed_step_and_position_alone(rows):
    whole = joined([open_batches(rows, groups=2).batch(5, range(8))])
    data = open_batches(rows, groups=2, max_steps=9)  # decodes ahead
    for step in (4, 5):
        again = joined([data.batch(step, range(8))])
    assert all(torch.equal(again[name], values) for name, values in whole.items())
    other = open_batches(rows, groups=2)
    other.transform.seed = 4
    assert not torch.equal(joined([other.batch(5, range(8))])["noise"][:20], whole["noise"][:20])


def test_no_option_changes_what_another_one_draws(rows):
    flips = [open_batches(rows, **{**NOTHING, "flip": 0.5, **more}) for more in ({}, {"color_jitter": 0.3})]
    one, two = (batches.batch(2, range(8)) for batches in flips)
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert "colour" in two and ((two["colour"] >= 0.7) & (two["colour"] <= 1.3)).all()


def test_the_next_step_is_loaded_in_the_background_and_none_behind_the_last(rows, monkeypatch):
    data, loaded, load = open_batches(rows, max_steps=3), [], DetectionBatches._load
    monkeypatch.setattr(DetectionBatches, "_load", lambda self, *key: loaded.append(key) or load(self, *key))
    for step in range(3):
        data.batch(step, range(4))
    assert [step for step, _ in loaded] == [0, 1, 2]


def test_denoising_noise_is_there_for_every_group_and_box(rows):
    labels = open_batches(rows, groups=3).batch(0, range(8))["labels"]
    for label in labels:
        assert label["noise"].shape == (3, len(label["boxes"]), 5) and label["noise"].dtype == torch.float32
    noise = torch.cat([label["noise"].flatten() for label in labels])
    assert noise.min() >= 0 and noise.max() < 1 and len(noise.unique()) == len(noise)


def test_a_bad_image_takes_its_boxes_with_it_whenever_it_is_found(tmp_path):
    file = written.write_coco(tmp_path, many_images())
    for number in (3, 4, 17):
        (tmp_path / f"images/{number}.png").write_bytes(b"nothing")

    def batches():
        rows = read_detection(file, validation_data=file, num_workers=0, max_bad_images=0.1).train
        return rows, open_batches(rows, groups=1)

    rows, data = batches()
    seen = [joined([data.batch(step, range(8))]) for step in range(10)]
    assert rows.bad.keys() == {3, 4, 17}
    for step in (9, 4):  # as after a resume: nothing is known to be bad
        rows, data = batches()
        batch = data.batch(step, range(8))
        assert all(torch.equal(values, seen[step][name]) for name, values in joined([batch]).items())
        named = [label["image_id"] for label in batch["labels"]]
        for place, name in zip(rows.global_batch(step, 8, 3).tolist(), named, strict=True):
            assert name == f"{ {3: 5, 4: 5, 17: 18}.get(place, place) }.png"


# ------------------------------------------------------------------------------------------------ sizes and changes


@pytest.mark.parametrize("edges", [(800, 1333), (24, 60), (24, 24), (480, 640)])
def test_sizes_are_those_of_the_stock_processor(edges):
    shortest, longest = edges
    options = {**NOTHING, "shortest_edge": shortest, "longest_edge": longest}
    transform = DetectionTransform(seed=0, global_batch_size=1, **options)
    random = np.random.default_rng(0)
    for height, width in [*random.integers(10, 2000, (300, 2)).tolist(), (60, 24), (100, 1338), (640, 640)]:
        stock = get_size_with_aspect_ratio((height, width), *edges)
        assert transform.size(height, width) == (max(1, stock[0]), max(1, stock[1]))


def test_sizes_keep_to_their_limits_and_to_a_pixel():
    options = {**NOTHING, "seed": 0, "global_batch_size": 1}
    transform = DetectionTransform(**options)
    assert transform.size(1, 4000) == (1, 60) and transform.size(4000, 1) == (60, 1)
    assert transform.size(30, 40, scale=0.5) == (12, 16) and transform.size(30, 400, 0.5) == (2, 30)
    assert DetectionTransform(**options | {"longest_edge": None}).size(10, 100) == (24, 240)
    own = DetectionTransform(**options | {"shortest_edge": None})
    assert own.size(33, 47) == (33, 47) and own.size(33, 47, 0.5) == (16, 24)
    scales = [DetectionTransform(**options | {"scale_jitter": 0.4}).draw_scale(step) for step in range(100)]
    assert 0.6 <= min(scales) < 0.65 and 0.95 < max(scales) <= 1


def test_boxes_follow_the_pixels_through_crops_and_mirrors(tmp_path):
    """Every object is a rectangle of one colour on black: what is drawn is found where the box says."""
    random, images, colours = np.random.default_rng(1), [], [(255, 0, 0), (0, 255, 0)]
    (tmp_path / "images").mkdir()
    for number in range(24):
        height, width = random.integers(60, 120, 2).tolist()
        w, h = random.integers(20, 40, 2).tolist()
        left, top = int(random.integers(width - w)), int(random.integers(height - h))
        image = np.zeros((height, width, 3), np.uint8)
        image[top : top + h, left : left + w] = colours[number % 2]
        Image.fromarray(image).save(tmp_path / f"images/{number}.png")
        images.append(((height, width), [(written.NAMES[number % 2], left, top, w, h)]))
    (tmp_path / "boxes.json").write_text(json.dumps(written.coco(images)))
    file = str(tmp_path / "boxes.json")
    rows = read_detection(file, validation_data=file, num_workers=0).train
    data = open_batches(rows, 24, **NOTHING | {"shortest_edge": 96, "longest_edge": None, "flip": 0.5, "crop": 0.8})
    cropped, ids = 0, {name: number for number, name in enumerate(["dog", "cat"])}
    for step in range(4):
        batch = data.batch(step, range(24))
        for pixels, mask, label in zip(batch["pixel_values"], batch["pixel_mask"], batch["labels"], strict=True):
            height, width = int(mask[:, 0].sum()), int(mask[0].sum())
            [box], [kind] = label["boxes"].double().tolist(), label["class_labels"].tolist()
            channel = {ids["cat"]: 0, ids["dog"]: 1}[kind]
            seen = pixels[channel, :height, :width] > 127
            rows_seen, columns_seen = (seen.any(axis).nonzero()[:, 0] for axis in (1, 0))
            found = [columns_seen[0], rows_seen[0], columns_seen[-1] + 1, rows_seen[-1] + 1]
            x, y, w, h = box
            expected = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            assert np.allclose(found, expected, atol=1.5)
            place = int(label["image_id"].removesuffix(".png"))
            cropped += abs(width / height - rows.aspects([place])[0]) > 0.05
    assert cropped > 40


def test_a_crop_never_leaves_all_boxes_out_and_keeps_only_what_is_to_be_seen(rows):
    data = open_batches(rows, **NOTHING | {"crop": 1.0}, crop_scale=0.1, crop_visible=0.5)
    transform, lost, whole = data.transform, 0, 0
    for number in range(400):
        index = number % len(rows)
        plan = transform.plan(rows, index, transform.draw(number, 0))
        left, top, width, height = plan.box
        assert left >= 0 and top >= 0 and left + width <= 1 + 1e-9 and top + height <= 1 + 1e-9
        assert width * height >= 0.1 - 1e-9 and 3 / 4 - 1e-9 <= width / height <= 4 / 3 + 1e-9
        assert bool(len(plan.corners)) == bool(len(rows.boxes(index)))
        assert (plan.corners >= 0).all() and (plan.corners <= 1).all()
        extent = (plan.corners[:, 2:] - plan.corners[:, :2]) * [width, height]
        areas = (rows.boxes(index)[:, 2:] - rows.boxes(index)[:, :2]).prod(1)
        assert len(plan.classes) == len(plan.corners)
        lost += len(rows.boxes(index)) - len(plan.corners)
        whole += width * height == 1
        if len(areas) == 1 and len(extent) == 1:
            assert extent.prod() >= areas[0] * 0.5 - 1e-9
    assert lost > 50 and whole < 120


def test_padding_is_exactly_nothing_and_colours_do_not_depend_on_it(rows):
    data = open_batches(rows, color_jitter=0.6)
    batch = data.batch(0, range(8))
    images = data.augment(batch)["pixel_values"]
    assert images.dtype == torch.float32 and not images.masked_fill(batch["pixel_mask"][:, None], 0).any()
    for number in range(8):
        mask = batch["pixel_mask"][number]
        height, width = int(mask[:, 0].sum()), int(mask[0].sum())
        alone = data.transform.normalize(
            batch["pixel_values"][number : number + 1, :, :height, :width],
            mask[None, :height, :width],
            batch["colour"][number : number + 1],
        )
        assert torch.equal(alone[0], images[number, :, :height, :width])
    plain = open_batches(rows, **NOTHING)
    batch = plain.batch(0, range(1))
    expected = batch["pixel_values"] / 255 - torch.tensor(NOTHING["mean"])[:, None, None]
    expected = expected / torch.tensor(NOTHING["std"])[:, None, None] * batch["pixel_mask"][:, None]
    torch.testing.assert_close(plain.augment(batch)["pixel_values"], expected)


def test_evaluation_only_resizes_and_tells_which_images_came(rows):
    transform = open_batches(rows).transform
    parts = [np.array([0, 1, 2]), np.array([3]), np.array([39, 5])]
    found = list(evaluation_batches(rows, transform, parts))
    for part, (used, batch) in zip(parts, found, strict=True):
        assert np.array_equal(used, part)
        for number, place in enumerate(part.tolist()):
            height, width = transform.size(*rows.sizes[place].tolist())
            assert batch["pixel_mask"][number].sum() == height * width
            assert len(batch["labels"][number]["boxes"]) == len(rows.boxes(place))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 2}, "crop must be from 0 to 1, not 2"),
        ({"flip": -1}, "flip must be from 0 to 1"),
        ({"crop_scale": 0}, "crop_scale must be above 0 and at most 1"),
        ({"scale_jitter": 1}, "scale_jitter must be at least 0 and below 1"),
        ({"shortest_edge": 0}, "shortest_edge must be at least 1"),
        ({"longest_edge": 20}, "longest_edge must be at least shortest_edge, 24"),
        ({"std": [0, 1, 1]}, "mean and std must be as many numbers"),
        ({"mean": [0.5]}, "mean and std must be as many numbers"),
    ],
)
def test_an_option_out_of_its_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionTransform(seed=0, global_batch_size=1, **{**NOTHING, **options})
