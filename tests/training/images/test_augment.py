import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

from training.images.augment import OPERATIONS, Augmentation, operate, operation_parameters, rectangles

BATCH, LABELS = 8, 5
EVERYTHING = {
    "crop_scale": (0.3, 1.0),
    "translate": 2,
    "rand_augment_ops": 2,
    "color_jitter": 0.4,
    "erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_probability": 0.8,
    "label_smoothing": 0.1,
}
EACH = [{name: value} for name, value in EVERYTHING.items() if name != "mix_probability"]


def make(global_batch_size=BATCH, channels=3, seed=0, **options):
    options = {"image_size": (10, 12), "num_labels": LABELS, "flip": 0.0} | options
    mean, std = [0.5, 0.4, 0.3][:channels], [0.25, 0.2, 0.3][:channels]
    return Augmentation(seed=seed, global_batch_size=global_batch_size, mean=mean, std=std, **options)


def make_images(batch=BATCH, channels=3, height=10, width=12):
    """Soft shapes, with all values from 0 to 255 about as frequent."""
    coarse = torch.rand(batch, channels, 4, 4)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine * 255).round().to(torch.uint8), torch.arange(batch) % LABELS


def apply(augment, pixels, labels, step=0, positions=None):
    positions = positions or range(len(pixels))
    part = slice(positions.start, positions.stop)
    return augment(pixels[part], None if labels is None else labels[part], augment.draw(step, positions))


# ------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("options", [*EACH, {"flip": 0.5}, EVERYTHING], ids=str)
def test_what_happens_to_an_image_depends_on_seed_step_and_position_alone(options):
    """Not on the micro-batch it is in, its size, the order of asking, or the size of the global batch: to the bit."""
    pixels, labels = make_images()
    whole = apply(make(**options), pixels, labels, step=3)
    other = make(global_batch_size=100, **options)
    for first, size in ((6, 2), (0, 2), (2, 4)):
        positions = range(first, first + size)
        parts = apply(other, pixels, labels, 3, positions)
        for part, result in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, result[first : first + size], rtol=0, atol=0)
        if "crop_scale" in options:
            boxes = make(**options).boxes(make(**options).draw(3, range(BATCH)))
            assert torch.equal(other.boxes(other.draw(3, positions)), boxes[first : first + size])


@pytest.mark.parametrize("options", [EVERYTHING | {"flip": 0.5}], ids=["everything"])
def test_another_seed_step_or_position_draws_anew(options):
    draws = make(**options).draw(0, range(BATCH))
    assert set(draws) == {"crop", "shift", "colour", "operations", "parameters", "erased", "mix"}
    for other in (make(seed=1, **options).draw(0, range(BATCH)), make(**options).draw(1, range(BATCH))):
        assert all(not torch.equal(draws[name], other[name]) for name in draws)
    assert len({tuple(row) for row in draws["crop"].tolist()}) == BATCH


def test_an_option_changes_no_draw_of_another():
    few, all_ = make(translate=2).draw(0, range(4)), make(**EVERYTHING).draw(0, range(4))
    assert torch.equal(few["shift"], all_["shift"])


def test_with_everything_off_images_are_only_normalised():
    pixels, labels = make_images()
    augment = make()
    assert augment.draw(0, range(BATCH)) == {}
    images, same = augment(pixels, labels, {})
    assert same is labels and images.dtype == torch.float32
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.mean, augment.std))
    torch.testing.assert_close(images, (pixels / 255 - mean) / std)
    assert torch.equal(images, augment.normalize(pixels))
    assert augment.boxes({}) is None


def test_images_without_labels_are_augmented_all_the_same():
    pixels, labels = make_images()
    images, none = apply(make(**EVERYTHING), pixels, None)
    assert none is None and torch.equal(images, apply(make(**EVERYTHING), pixels, labels)[0])


# ---------------------------------------------------------------------------------------- crop, shift, mirror, erase


@pytest.mark.parametrize("aspect", [1.0, 4 / 3, 0.25])
def test_crops_lie_inside_the_image_and_have_the_area_and_shape_asked_for(aspect):
    augment = make(1000, crop_scale=(0.2, 0.9))
    left, top, width, height = augment.boxes(augment.draw(0, range(1000)), aspect).T
    assert min(left.min(), top.min()) >= 0 and max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    area, ratio = width * height, width * aspect / height
    assert area.max() <= 0.9 + 1e-6 and 0.2 - 1e-6 <= area.min() < 0.25
    if aspect > 0.5:  # else a large crop cannot be that wide
        assert 0.75 - 1e-6 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= 4 / 3 + 1e-6
        assert area.max() > 0.85 and abs(area.mean() - 0.55) < 0.03


def test_images_may_have_shapes_of_their_own():
    augment = make(2, crop_scale=(1.0, 1.0))
    boxes = augment.boxes(augment.draw(0, range(2)), np.array([4 / 3, 1.0]))
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))


def test_a_shape_that_does_not_fit_becomes_the_nearest_that_does():
    square_of_a_wide_image = rectangles(np.full((4, 1), 0.5), (1.0, 1.0), (1.0, 1.0), 3.0)
    np.testing.assert_allclose(square_of_a_wide_image[:, 0], [0, 0, 1, 1])


def test_shifts_are_by_whole_pixels_with_black_coming_in():
    pixels, _ = make_images(200)
    augment = make(200, translate=2)
    draws = augment.draw(0, range(200))
    images = augment(pixels, None, draws)[0]
    for image, before, (down, right, _) in zip(images, pixels, draws["shift"].int().tolist(), strict=True):
        padded = torch.nn.functional.pad(before, [2] * 4)
        shifted = padded[:, 2 - down : 12 - down, 2 - right : 14 - right]
        assert torch.equal(image, augment.normalize(shifted[None])[0])
    assert {tuple(row) for row in draws["shift"].tolist()} == {(y, x, 0) for y in range(-2, 3) for x in range(-2, 3)}


@pytest.mark.parametrize("translate", [0, 2])
def test_half_of_the_images_are_mirrored(translate):
    pixels, _ = make_images(200)
    mirrored, plain = make(200, flip=0.5, translate=translate), make(200, translate=translate)
    images, before = apply(mirrored, pixels, None)[0], apply(plain, pixels, None)[0]
    is_mirrored = (images == before.flip(3)).flatten(1).all(1)
    assert (is_mirrored | (images == before).flatten(1).all(1)).all() and 70 < is_mirrored.sum() < 130


def test_a_rectangle_is_erased_to_the_mean_colour():
    pixels, _ = make_images(400, height=32, width=48)
    augment = make(400, erasing=0.25, image_size=(32, 48))
    images = apply(augment, pixels, None)[0]
    is_erased = (images == 0).all(1)
    assert torch.equal(
        images.where(~is_erased[:, None], 7.0), augment.normalize(pixels).where(~is_erased[:, None], 7.0)
    )
    share = is_erased.float().mean((1, 2))
    assert 70 < (share > 0).sum() < 130 and share[share > 0].min() > 0.015 and 0.3 < share.max() < 0.42
    for mask in is_erased[share > 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)  # a rectangle
        assert rows.sum() * 48 + columns.sum() * 32 > 0


# ----------------------------------------------------------------------------------- colours, and RandAugment


def reference(name, image, magnitude):
    """An operation of RandAugment by PIL itself, at a magnitude from -1 to 1."""
    strength, factor = abs(magnitude), 1 + 0.9 * magnitude
    width, height = image.size
    affine = {
        "shear_x": (1, 0.3 * magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * magnitude, 1, 0),
        "translate_x": (1, 0, 150 / 331 * magnitude * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 150 / 331 * magnitude * height),
    }
    if name in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], Image.Resampling.BILINEAR)
    return {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "solarize": lambda: ImageOps.solarize(image, 256 * (1 - strength)),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * strength)),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "rotate": lambda: image.rotate(-30 * magnitude, Image.Resampling.BILINEAR),
    }[name]()


@pytest.mark.parametrize("size", [(32, 32), (20, 36), (2, 5)], ids=str)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_of_randaugment_gives_what_pil_gives(name, channels, size):
    magnitudes = np.array([-1, -0.9, -0.3, 0, 0.3, 0.6, 0.9, 1])
    pixels, _ = make_images(len(magnitudes), channels, *size)
    chosen = np.full(len(magnitudes), OPERATIONS.index(name))
    parameters = torch.from_numpy(operation_parameters(chosen, magnitudes, *size).T.copy()).float()
    found = operate(pixels.float(), torch.from_numpy(chosen), parameters)
    for image, before, magnitude in zip(found, pixels, magnitudes.tolist(), strict=True):
        before = Image.fromarray(before.permute(1, 2, 0).squeeze(2).numpy())
        expected = torch.from_numpy(np.array(reference(name, before, magnitude))).reshape(*size, channels)
        difference = (image - expected.permute(2, 0, 1)).abs()
        if (
            name in OPERATIONS[-5:]
        ):  # PIL drops what is behind the point; a place right on the edge falls to either side
            assert (difference > 1).float().mean() <= 0.02, f"at {magnitude}"
        else:  # PIL stretches by an inexact factor
            assert difference.max() <= (name == "autocontrast"), f"at {magnitude}"


def test_operations_on_one_image_do_not_touch_another():
    magnitudes, chosen = np.full(len(OPERATIONS), 0.9), np.arange(len(OPERATIONS))
    pixels, _ = make_images(len(OPERATIONS), height=20, width=24)
    parameters = torch.from_numpy(operation_parameters(chosen, magnitudes, 20, 24).T.copy()).float()
    together = operate(pixels.float(), torch.from_numpy(chosen), parameters)
    for number, before in enumerate(pixels.split(1)):
        part = slice(number, number + 1)
        alone = operate(before.float(), torch.from_numpy(chosen[part]), parameters[part])
        assert torch.equal(together[part], alone), OPERATIONS[number]
        assert torch.equal(alone, before.float()) == (number == 0)


def test_every_operation_is_as_likely_and_of_the_magnitude_asked_for():
    draws = make(2800, rand_augment_ops=2, rand_augment_magnitude=5).draw(0, range(2800))
    counts = torch.bincount(draws["operations"].flatten(), minlength=len(OPERATIONS))
    assert draws["operations"].shape == (2800, 2) and counts.min() > 320 and counts.max() < 480
    is_brightness = draws["operations"] == OPERATIONS.index("brightness")
    factors = draws["parameters"][..., 0][is_brightness]
    assert {round(factor, 4) for factor in factors.tolist()} == {0.55, 1.45}
    rows = draws["operations"].unique(dim=0)
    assert len(rows) == len(OPERATIONS) ** 2  # the two are independent


def test_colour_jitter_changes_brightness_then_contrast_then_saturation():
    pixels, _ = make_images(64)
    augment = make(64, color_jitter=0.4)
    draws = augment.draw(0, range(64))
    images = augment(pixels, None, draws)[0]
    assert 0.6 <= draws["colour"].min() < 0.65 and 1.35 < draws["colour"].max() <= 1.4
    for image, before, factors in zip(images, pixels, draws["colour"].tolist(), strict=True):
        expected = Image.fromarray(before.permute(1, 2, 0).numpy())
        for kind, factor in zip(("Brightness", "Contrast", "Color"), factors, strict=True):
            expected = getattr(ImageEnhance, kind)(expected).enhance(factor)
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        shown = image * augment._std[:, 0, 0, None, None] + augment._mean
        assert (shown - expected).abs().max() < 2.01


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_that_are_not_of_three_colours_are_augmented_too(channels):
    augment = Augmentation(
        seed=0, global_batch_size=BATCH, image_size=(10, 12), num_labels=LABELS, mean=[0.5], std=[0.5], **EVERYTHING
    )
    images, _ = apply(augment, *make_images(channels=channels))
    assert images.shape == (BATCH, channels, 10, 12) and images.isfinite().all()


def test_values_stay_in_the_range_of_an_image():
    pixels, _ = make_images(64)
    augment = make(64, rand_augment_ops=4, rand_augment_magnitude=10, color_jitter=1.0, translate=3)
    images = apply(augment, pixels, None)[0]
    low, high = (augment.normalize(torch.full((1, 3, 1, 1), value, dtype=torch.uint8)) for value in (0, 255))
    assert (images >= low).all() and (images <= high).all()


# --------------------------------------------------------------------------------------- mixtures and soft labels


def one_hot(labels):
    return torch.nn.functional.one_hot(labels, LABELS).float()


def test_mixup_mixes_neighbours_and_their_labels_alike():
    pixels, labels = make_images()
    augment = make(mixup=0.8)
    images, targets = apply(augment, pixels, labels)
    own = augment.draw(0, range(BATCH))["mix"][:, 0]
    plain, hot, partner = augment.normalize(pixels), one_hot(labels), torch.arange(BATCH) ^ 1
    assert torch.equal(own, own[partner]) and len(set(own.tolist())) == BATCH // 2
    weight = own[:, None, None, None]
    torch.testing.assert_close(images, weight * plain + (1 - weight) * plain[partner])
    torch.testing.assert_close(targets, own[:, None] * hot + (1 - own[:, None]) * hot[partner])


def test_cutmix_exchanges_a_rectangle_and_its_share_of_the_labels():
    pixels, labels = make_images(64)
    augment = make(64, cutmix=1.0)
    images, targets = apply(augment, pixels, labels)
    plain, hot, partner = augment.normalize(pixels), one_hot(labels), torch.arange(64) ^ 1
    left, top, right, bottom = augment.draw(0, range(64))["mix"][:, 2:].int().unbind(1)
    for number in range(64):
        expected = plain[number].clone()
        box = slice(top[number], bottom[number]), slice(left[number], right[number])
        expected[:, *box] = plain[partner[number]][:, *box]
        assert torch.equal(images[number], expected)
        assert (top[number], left[number]) == (top[partner[number]], left[partner[number]])
    share = ((right - left) * (bottom - top) / 120)[:, None]
    torch.testing.assert_close(targets, (1 - share) * hot + share * hot[partner])
    assert share.min() < 0.1 and share.max() > 0.5


@pytest.mark.parametrize("alpha", [0.5, 0.8, 2.0])
def test_the_parts_of_a_mixture_follow_the_beta_distribution(alpha):
    from scipy import stats

    own = make(4000, mixup=alpha).draw(0, range(4000))["mix"][::2, 0].numpy()
    assert stats.kstest(own, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_with_both_a_pair_gets_one_of_them_and_some_pairs_neither():
    mix = make(4000, mixup=0.8, cutmix=1.0, mix_probability=0.6).draw(0, range(4000))["mix"][::2]
    is_mixup, is_cutmix = mix[:, 0] < 1, (mix[:, 0] == 1) & (mix[:, 1] < 1)
    is_neither = mix[:, 1] == 1
    assert 500 < is_mixup.sum() < 700 and 450 < is_cutmix.sum() < 650 and 780 < is_neither.sum() < 950
    assert (mix[is_mixup | is_neither][:, 2:4] == mix[is_mixup | is_neither][:, 4:]).any(1).all()  # without a rectangle


@pytest.mark.parametrize("options", [EVERYTHING, {"label_smoothing": 0.1}, {"mixup": 0.2}, {"cutmix": 0.5}], ids=str)
def test_soft_labels_add_up_to_one(options):
    _, targets = apply(make(**options), *make_images())
    assert targets.shape == (BATCH, LABELS) and targets.min() >= 0
    torch.testing.assert_close(targets.sum(1), torch.ones(BATCH))


def test_label_smoothing_gives_every_class_an_equal_share():
    _, labels = make_images()
    targets = apply(make(label_smoothing=0.1), *make_images())[1]
    torch.testing.assert_close(targets, 0.9 * one_hot(labels) + 0.1 / LABELS)
    logits = torch.randn(BATCH, LABELS)
    loss = torch.nn.functional.cross_entropy
    torch.testing.assert_close(loss(logits, targets), loss(logits, labels, label_smoothing=0.1))


# ------------------------------------------------------------------------------------------------- speed, and errors


class HostReads(TorchDispatchMode):
    """Refuses what makes the host wait for the device: reading a value, shapes that depend on values, copies."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "bincount"), name
        assert not (name == "index" and any(index.dtype == torch.bool for index in args[1] if index is not None))
        return function(*args, **(kwargs or {}))


def test_the_host_never_waits_for_the_device():
    pixels, labels = make_images()
    augment = make(**EVERYTHING | {"flip": 0.5})
    draws = augment.draw(0, range(BATCH))
    with HostReads():
        augment(pixels, labels, draws)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), HostReads():
        float(pixels[0, 0, 0, 0])  # the test would see it


def test_augmentation_works_on_another_device():
    """On `meta` nothing can be read, and no tensor may be left on the host."""
    augment = make(**EVERYTHING | {"flip": 0.5})
    pixels, labels = (tensor.to("meta") for tensor in make_images())
    images, targets = augment(
        pixels, labels, {name: value.to("meta") for name, value in augment.draw(0, range(8)).items()}
    )
    assert images.shape == (BATCH, 3, 10, 12) and targets.shape == (BATCH, LABELS)


def test_no_draw_is_in_double_precision():
    draws = make(**EVERYTHING).draw(0, range(BATCH))
    assert {tensor.dtype for tensor in draws.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"flip": 1.5}, "flip must be from 0 to 1, not 1.5"),
        ({"erasing": -0.1}, "erasing"),
        ({"color_jitter": 2}, "color_jitter"),
        ({"mix_probability": 2}, "mix_probability"),
        ({"mixup": -1}, "mixup must be at least 0"),
        ({"rand_augment_ops": -1}, "rand_augment_ops"),
        ({"rand_augment_magnitude": 11}, "rand_augment_magnitude must be from 0 to 10"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"translate": 10}, "translate must be from 0 to below the 10 pixels"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"mixup": 0.2, "num_labels": None}, "num_labels"),
        ({"label_smoothing": 0.2, "num_labels": None}, "num_labels"),
        ({"cutmix": 0.2, "global_batch_size": 7}, "global_batch_size must be even"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_mean_and_standard_deviation_must_be_of_the_same_channels():
    with pytest.raises(ValueError, match="mean and std"):
        Augmentation(seed=0, global_batch_size=2, image_size=4, mean=[0.5], std=[0.5, 0.5])
    with pytest.raises(ValueError, match="std must be above 0"):
        Augmentation(seed=0, global_batch_size=2, image_size=4, mean=[0.5], std=[0.0])


def test_micro_batches_that_part_a_pair_are_refused():
    with pytest.raises(ValueError, match="micro_batch_size"):
        make(mixup=0.2).draw(0, range(0, 3))
    make().draw(0, range(0, 3))


def test_positions_outside_the_global_batch_are_refused():
    with pytest.raises(ValueError, match="global batch"):
        make().draw(0, range(4, 9))
