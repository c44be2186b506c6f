"""Random changes of a batch of images, on the device where the model trains.

    augment = Augmentation(seed=0, global_batch_size=128, image_size=32, num_labels=10, mean=[0.5], std=[0.25],
                           translate=4, rand_augment_ops=2, cutmix=1.0, label_smoothing=0.1)
    draws = augment.draw(step, range(0, 128))           # on the host: all that is random
    images, targets = augment(pixels, labels, draws)    # on the device: (B, C, H, W), (B, num_labels)

Augmentation depends only on seed, step and position in the global batch, so micro-batches, processes and resuming
change nothing. kornia has the same operations, but each takes a pass of its own over the batch and rounds differently
from PIL. Here operations of one kind share one pass, with a parameter for each image, and sums are exact in any order.

Dimensions: B images, C channels, H and W pixels, N operations of RandAugment. Images are float tensors of whole values
from 0 to 255 up to the normalisation, so that each operation gives what PIL's gives.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.run.arguments import bounded, check_bounds
from training.run.seeds import uniform_rows

OPERATIONS = (
    *("identity", "autocontrast", "equalize", "solarize", "posterize"),
    *("color", "contrast", "brightness", "sharpness"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
MAX_MAGNITUDE = 10
# A number for each kind of draw, from 1, because a seed that ends with 0 gives the same numbers as one without the 0.
STREAMS = {name: number for number, name in enumerate(("crop", "shift", "colour", "operations", "erase", "mix"), 1)}


@dataclass(kw_only=True)
class Augmentation:
    """All random changes of a batch; with the defaults, half of the images are mirrored and nothing else changes.

    Args:
        image_size: pixels of a side, or (height, width), after the crop.
        num_labels: number of classes; needed for soft labels (mixup, cutmix, label_smoothing).
        mean, std: of each channel, as fractions of 255; the result is (pixels / 255 - mean) / std.
        crop_scale: smallest and largest part of an image's area that a random crop keeps (Szegedy et al. 2015, section
            6); None: no random crop. The crop is made where images are decoded, at the boxes that `boxes` gives.
        crop_ratio: smallest and largest width / height of a crop.
        translate: largest shift down or right, up or left, in pixels; what comes in is black (He et al. 2016, section
            4.2).
        flip: probability of a mirror image.
        rand_augment_ops, rand_augment_magnitude: N and M of RandAugment (Cubuk et al. 2019, section 3): N operations,
            each any of the 14 `OPERATIONS`, of magnitude M from 0 to 10. At 10, images are sheared by 0.3, shifted by
            150/331 of their size, rotated by 30 degrees, changed in colour, contrast, brightness and sharpness by the
            factor 1.9 or 0.1, inverted from value 0 on (solarize), or cut to 4 bits (posterize). Unlike in the authors'
            code, a larger magnitude is always a stronger change.
        color_jitter: brightness, contrast and saturation, in this order, are each multiplied by 1 - x to 1 + x.
        erasing: probability that a rectangle of 2 to 40 % of the area gets the mean colour (Zhong et al. 2017, RE-M).
        mixup, cutmix: alpha of the Beta distribution of a mixture of images 2k and 2k + 1 (Zhang et al. 2018), and of
            the area of a rectangle they exchange (Yun et al. 2019); 0: never. With both, a pair gets either with
            probability 1/2. A pair shares its draws.
        mix_probability: part of the pairs that are mixed.
        label_smoothing: part of each target that is spread over all classes (Szegedy et al. 2016, section 7).

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    seed: int
    global_batch_size: int
    image_size: int | tuple[int, int]
    mean: list[float]
    std: list[float]
    num_labels: int | None = None
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    translate: int = 0
    flip: float = bounded(0.5, at_least=0, at_most=1)
    rand_augment_ops: int = bounded(0, at_least=0)
    rand_augment_magnitude: float = bounded(9, at_least=0, at_most=MAX_MAGNITUDE)
    color_jitter: float = bounded(0.0, at_least=0, at_most=1)
    erasing: float = bounded(0.0, at_least=0, at_most=1)
    mixup: float = bounded(0.0, at_least=0)
    cutmix: float = bounded(0.0, at_least=0)
    mix_probability: float = bounded(1.0, at_least=0, at_most=1)
    label_smoothing: float = bounded(0.0, at_least=0, below=1)

    def __post_init__(self):
        size = self.image_size
        self.height, self.width = (size, size) if isinstance(size, int) else size
        check_bounds(self)
        smallest = min(self.height, self.width)
        _check("translate", self.translate, f"from 0 to below the {smallest} pixels", lambda x: 0 <= x < smallest)
        if self.crop_scale is not None:
            _check(
                "crop_scale", self.crop_scale, "two fractions, 0 < low <= high <= 1", lambda x: 0 < x[0] <= x[1] <= 1
            )
        _check("crop_ratio", self.crop_ratio, "two numbers, 0 < low <= high", lambda x: 0 < x[0] <= x[1] < np.inf)
        _check("mean and std", (self.mean, self.std), "as many numbers", lambda x: len(x[0]) == len(x[1]))
        _check("std", self.std, "above 0", lambda x: min(x) > 0)
        if self.mixes:
            _check("global_batch_size", self.global_batch_size, "even for mixup and cutmix", lambda x: x % 2 == 0)
        if self.num_labels is None and (self.mixes or self.label_smoothing):
            raise ValueError("mixup, cutmix and label_smoothing need labels: set them to 0 without num_labels")
        self._mean, self._std = (torch.tensor(values)[:, None, None] * 255 for values in (self.mean, self.std))

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed; then a micro-batch must hold whole pairs."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0

    def draw(self, step: int, positions: range) -> dict[str, Tensor]:
        """Draws all random numbers for the images at these positions of the global batch.

        They depend only on the seed, the step and each position.

        Returns:
            Small tensors, for the kinds of changes that are in use:
            crop (B, 4): see `boxes`.
            shift (B, 3): shift down and right in pixels, and 1 for a mirror image.
            colour (B, 3): factors of brightness, contrast and saturation.
            operations (B, N): indices into OPERATIONS; parameters (B, N, 9): see `operate`.
            erased (B, 4): left, top, right, bottom in pixels.
            mix (B, 6): the part of an image and the part of its label that stay its own, the rest being its partner's;
                then the rectangle that shows its partner, as in erased.

        Raises:
            ValueError: positions lie outside the global batch or split a pair.
        """
        if not 0 <= positions.start < positions.stop <= self.global_batch_size or positions.step != 1:
            raise ValueError(f"{positions} lies outside the global batch of {self.global_batch_size} images")
        if self.mixes and (positions.start % 2 or positions.stop % 2):
            raise ValueError(f"mixup and cutmix mix pairs, which {positions} parts: make micro_batch_size even")

        def uniforms(name: str, count: int, positions: range = positions) -> np.ndarray:
            """Draws (count, B) numbers from 0 to 1, which do not depend on the other positions."""
            return uniform_rows(positions, count, self.seed, step, STREAMS[name]).T

        draws = {}
        if self.crop_scale is not None:
            draws["crop"] = uniforms("crop", 4)
        if self.translate or self.flip:
            *shifts, flip = uniforms("shift", 3)
            shifts = [np.floor(shift * (2 * self.translate + 1)) - self.translate for shift in shifts]
            draws["shift"] = np.stack([*shifts, flip < self.flip])
        if self.color_jitter:
            draws["colour"] = 1 + self.color_jitter * (2 * uniforms("colour", 3) - 1)
        if self.rand_augment_ops:
            chosen, sign = np.split(uniforms("operations", 2 * self.rand_augment_ops), 2)
            draws["operations"] = np.floor(chosen * len(OPERATIONS)).astype(np.int64)
            magnitude = self.rand_augment_magnitude / MAX_MAGNITUDE * np.where(sign < 0.5, -1, 1)
            draws["parameters"] = operation_parameters(draws["operations"], magnitude, self.height, self.width)
        if self.erasing:
            erases, *rectangle = uniforms("erase", 5)
            left, top, width, height = rectangles(rectangle, (0.02, 0.4), (0.3, 1 / 0.3), self.width / self.height)
            box = np.stack([left, top, left + width, top + height]) * (erases < self.erasing)
            draws["erased"] = self._whole_pixels(box)
        if self.mixes:
            pairs = range(positions.start // 2, positions.stop // 2)
            draws["mix"] = self._draw_mix(*uniforms("mix", 5, pairs)).repeat(2, axis=1)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values.T)) for name, values in draws.items()}
        return {name: tensor if name == "operations" else tensor.float() for name, tensor in tensors.items()}

    def _whole_pixels(self, box: np.ndarray) -> np.ndarray:
        return np.round(box * np.array([self.width, self.height] * 2)[:, None])

    def _draw_mix(self, mixes: np.ndarray, kind: np.ndarray, own: np.ndarray, x: np.ndarray, y: np.ndarray):
        """Turns uniform numbers into the `mix` of each pair, (6, pairs), see `draw`."""
        from scipy.special import betaincinv

        is_mixed = mixes < self.mix_probability
        cuts = is_mixed & (kind < (self.cutmix > 0) / (1 + (self.mixup > 0)))
        own = np.where(cuts, *(betaincinv(alpha or 1, alpha or 1, own) for alpha in (self.cutmix, self.mixup)))
        half = np.sqrt(1 - own) / 2 * cuts
        box = self._whole_pixels(np.clip([x - half, y - half, x + half, y + half], 0, 1))  # its centre is anywhere
        rest = 1 - (box[2] - box[0]) * (box[3] - box[1]) / (self.height * self.width)
        own = np.where(is_mixed & ~cuts, own, 1)
        return np.stack([own, own * rest, *box])

    def boxes(self, draws: dict[str, Tensor], aspect: float | Tensor = 1.0) -> Tensor | None:
        """Computes the random crops, or returns None without random crops.

        Args:
            draws: from `draw`.
            aspect: width / height of the images, one for all or (B,); with it `crop_ratio` is a ratio of pixels.

        Returns:
            (B, 4), left, top, width and height as fractions of the image.
        """
        if self.crop_scale is None:
            return None
        boxes = rectangles(draws["crop"].double().numpy().T, self.crop_scale, self.crop_ratio, np.asarray(aspect))
        return torch.from_numpy(boxes.T.copy()).float()

    def __call__(self, pixels: Tensor, labels: Tensor | None, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Changes and normalises images on the device. The host never waits.

        Args:
            pixels: uint8 (B, C, H, W).
            labels: class ids (B,), or None.
            draws: from `draw`, on the same device.

        Returns:
            float32 (B, C, H, W), and soft labels, float32 (B, num_labels), if pairs are mixed or labels smoothed, or
            else the labels as they are.
        """
        if "shift" in draws:
            pixels = shift_and_mirror(pixels, *draws["shift"].unbind(1), self.translate)
        if "colour" in draws or "operations" in draws:
            pixels = pixels.float()
        if "colour" in draws:
            pixels = jitter_colours(pixels, draws["colour"])
        for number in range(self.rand_augment_ops):
            pixels = operate(pixels, draws["operations"][:, number], draws["parameters"][:, number])
        images = self.normalize(pixels)
        if "erased" in draws:
            images = images.masked_fill(inside(draws["erased"], images), 0.0)
        if "mix" in draws:
            images = mix(images, draws["mix"])
        if labels is not None and (self.mixes or self.label_smoothing):
            labels = self._soft_labels(labels, draws)
        return images, labels

    def normalize(self, pixels: Tensor) -> Tensor:
        """Subtracts the mean of (B, C, H, W), from 0 to 255, and divides by the standard deviation, in float32.

        In an evaluation nothing else is done to an image.
        """
        if self._mean.device != pixels.device:
            self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return (pixels.float() - self._mean) / self._std

    def _soft_labels(self, labels: Tensor, draws: dict[str, Tensor]) -> Tensor:
        targets = (labels[:, None] == torch.arange(self.num_labels, device=labels.device)).float()
        if "mix" in draws:
            own = draws["mix"][:, 1:2]
            targets = own * targets + (1 - own) * partners(targets)
        return targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels


def _check(name, value, bound, holds):
    if not holds(value):
        raise ValueError(f"{name} must be {bound}, not {value}")


def rectangles(uniforms, scale: tuple[float, float], ratio: tuple[float, float], aspect) -> np.ndarray:
    """Places rectangles inside images of width / height `aspect`.

    The area is uniform in `scale`, as a fraction. The logarithm of width / height is uniform in the part of `ratio`
    that fits into the image, so that no rectangle has to be drawn twice; if nothing fits, the nearest ratio that fits
    is taken.

    Args:
        uniforms: (4, B), from 0 to 1.

    Returns:
        (4, B): left, top, width and height as fractions.
    """
    area, shape, x, y = uniforms
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = (np.clip(bound, area * aspect, aspect / area) for bound in ratio)  # else a side is longer than 1
    root = np.sqrt(low * (high / low) ** shape / aspect)
    width, height = np.minimum(np.sqrt(area) * root, 1), np.minimum(np.sqrt(area) / root, 1)
    return np.stack([x * (1 - width), y * (1 - height), width, height])


def operation_parameters(operations: np.ndarray, magnitude: np.ndarray, height: int, width: int) -> np.ndarray:
    """Computes the nine `parameters` that `operate` takes.

    Args:
        operations: indices into OPERATIONS.
        magnitude: from -1 to 1. The sign is the direction of a change that has two directions.

    Returns:
        (9, *operations.shape).
    """

    def when(*names):
        return np.isin(operations, [OPERATIONS.index(name) for name in names])

    strength = np.abs(magnitude)
    factor = 1 + 0.9 * magnitude * when("color", "contrast", "brightness", "sharpness")
    threshold = 256 * (1 - strength * when("solarize"))
    step = 2 ** np.round(4 * strength * when("posterize"))
    angle = np.radians(30) * magnitude * when("rotate")
    cosine, sine = np.cos(angle), np.sin(angle)
    shift = 150 / 331 * magnitude
    rows = [
        (cosine, sine + 0.3 * magnitude * when("shear_x"), width, shift * when("translate_x")),
        (0.3 * magnitude * when("shear_y") - sine, cosine, height, shift * when("translate_y")),
    ]
    matrix = []
    for (a, b, size, moved), centre in zip(rows, (width / 2, height / 2), strict=True):
        # A rotation is about the centre; a shear, as in PIL, about the upper left corner.
        fixed = np.where(when("rotate"), centre - a * width / 2 - b * height / 2, 0)
        matrix += [a, b, fixed + moved * size]
    return np.stack([factor, threshold, step, *matrix])


def operate(images: Tensor, operations: Tensor, parameters: Tensor) -> Tensor:
    """Applies one operation of RandAugment to each image, (B, C, H, W) from 0 to 255.

    All images go through all operations; the parameters of an operation that is not chosen leave an image unchanged.

    Args:
        operations: (B,), indices into OPERATIONS.
        parameters: (B, 9): the factor of a blend, the threshold of solarize, the step of posterize, and the affine map
            from the coordinates of a pixel to those of its source, row by row.
    """
    chosen = operations[:, None, None, None]
    factor, threshold, step, *matrix = parameters[..., None, None, None].unbind(1)
    is_chosen = {name: chosen == number for number, name in enumerate(OPERATIONS)}
    base = torch.where(is_chosen["color"], grey(images), mean_grey(images))
    base = torch.where(is_chosen["sharpness"], smooth(images), base.masked_fill(is_chosen["brightness"], 0.0))
    images = blend(base, images, factor)
    images = torch.where(is_chosen["autocontrast"], autocontrast(images), images)
    images = torch.where(is_chosen["equalize"], equalize(images), images)
    images = torch.where(images < threshold, images, 255 - images)  # solarize
    images = (images / step).floor() * step  # posterize
    return warp(images, matrix)


def shift_and_mirror(pixels: Tensor, down: Tensor, right: Tensor, mirrored: Tensor, largest: int) -> Tensor:
    """Shifts images by whole pixels, at most `largest`, fills up with black (0), and then mirrors some of them."""
    batch, channels, height, width = pixels.shape
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(mirrored[:, None] > 0, width - 1 - columns, columns)
    if largest:
        pixels = F.pad(pixels, [largest] * 4)
        columns = columns + (largest - right[:, None]).long()
        rows = torch.arange(height, device=pixels.device) + (largest - down[:, None]).long()
        pixels = pixels.gather(2, rows[:, None, :, None].expand(-1, channels, -1, pixels.shape[3]))
    return pixels.gather(3, columns[:, None, None].expand(-1, channels, height, -1))


def blend(base: Tensor | float, images: Tensor, factor: Tensor) -> Tensor:
    """base + factor (images - base) in whole values from 0 to 255, as PIL's ImageEnhance."""
    return (base + factor * (images - base)).floor().clamp(0, 255)


def grey(images: Tensor) -> Tensor:
    """Computes (B, 1, H, W): the luminance of PIL's mode L for three channels, else the mean of the channels."""
    if images.shape[1] != 3:
        return images if images.shape[1] == 1 else images.mean(1, keepdim=True).round()
    red, green, blue = images.split(1, dim=1)
    # These are whole numbers below 2^24, so the sum is exact in any order.
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()


def mean_grey(images: Tensor, num_pixels: Tensor | None = None) -> Tensor:
    """Computes the mean luminance, rounded, (B, 1, 1, 1).

    num_pixels: (B, 1, 1, 1), the pixels of each image without its padding, which is 0; None: there is no padding.
    """
    total = grey(images).sum((1, 2, 3), dtype=torch.int32, keepdim=True)  # whole numbers, so exact in any order
    return (total / (images[0, 0].numel() if num_pixels is None else num_pixels) + 0.5).floor()


def jitter_colours(images: Tensor, factors: Tensor, num_pixels: Tensor | None = None) -> Tensor:
    """Changes brightness, contrast and saturation of images (B, C, H, W), in this order.

    Args:
        images: from 0 to 255.
        factors: (B, 3), what the three are multiplied by.
        num_pixels: see `mean_grey`.
    """
    brightness, contrast, saturation = factors[..., None, None, None].unbind(1)
    images = blend(0, images, brightness)
    images = blend(mean_grey(images, num_pixels), images, contrast)
    return blend(grey(images), images, saturation)


def smooth(images: Tensor) -> Tensor:
    """PIL's SMOOTH: each pixel inside the border becomes a mean of nine pixels, in which it counts five times."""
    if min(images.shape[2:]) < 3:
        return images
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    result = images.clone()
    result[..., 1:-1, 1:-1] = ((sums + 4 * images[..., 1:-1, 1:-1]) / 13).round()
    return result


def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel to the whole range from 0 to 255."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = ((images - low) * 255 / (high - low).clamp(min=1) + 1e-3).floor()  # 1e-3: where division is inexact
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor) -> Tensor:
    """Spreads the values of each channel so that all are about as frequent, as PIL's ImageOps.equalize does."""
    values = images.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values, dtype=torch.float32))
    is_last = images.amax((2, 3))[..., None] == torch.arange(256, device=images.device)
    num_others = values.shape[2] - (counts * is_last).sum(2, keepdim=True)
    step = (num_others / 255).floor()
    below = counts.cumsum(2) - counts
    table = ((below + (step / 2).floor()) / step.clamp(min=1) + 1e-6).floor().clamp(max=255)
    return torch.where(step[..., None] > 0, table.gather(2, values).view_as(images), images)


def warp(images: Tensor, matrix: list[Tensor]) -> Tensor:
    """Maps each image by an affine map, bilinear, and fills up with black (0).

    Args:
        matrix: a, b, c, d, e, f of shape (B, 1, 1, 1) as in PIL: the pixel at (x, y) comes from
            (ax + by + c, dx + ey + f), where the centre of the first pixel is (0.5, 0.5).
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    a, b, c, d, e, f = (entry[:, 0] for entry in matrix)
    x, y = a * x + b * y + c, d * x + e * y + f  # (B, H, W)
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x.clamp(0.5, width - 0.5), y.clamp(0.5, height - 0.5)  # the border's colour reaches to its edge
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=3)
    return F.grid_sample(images, grid, align_corners=False).round() * is_inside[:, None]


def inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Says which pixels, (B, 1, H, W), lie in boxes (B, 4) of left, top, right and bottom in pixels."""
    height, width = images.shape[2:]
    left, top, right, bottom = boxes[:, :, None, None].unbind(1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    return ((x >= left) & (x < right) & (y >= top) & (y < bottom))[:, None]


def partners(rows: Tensor) -> Tensor:
    """Swaps the rows of each pair: rows 1, 0, 3, 2, ..."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix(images: Tensor, draws: Tensor) -> Tensor:
    """Mixes pairs of images, one over the other or by exchanging a rectangle; see `mix` of `Augmentation.draw`."""
    own, others = draws[:, 0, None, None, None], partners(images)
    return torch.where(inside(draws[:, 2:], images), others, own * images + (1 - own) * others)
