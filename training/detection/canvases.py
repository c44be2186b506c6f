"""Makes the embedded data with boxes: handwritten digits on canvases, with exact boxes, in a second."""

import functools

import numpy as np
from PIL import Image

from training.detection.formats import Box, BoxSet
from training.images.formats import ImageSet, StoredImages, embedded_digits
from training.run.seeds import generator


class Canvases(StoredImages):
    """Canvases as the contents of image files."""

    def __init__(self, contents: list[bytes], numbers: np.ndarray | None = None):
        self.contents, self.num_bytes = contents, sum(map(len, contents))
        self.numbers = np.arange(len(contents)) if numbers is None else numbers

    def __len__(self):
        return len(self.contents)

    def select(self, indices):
        return Canvases([self.contents[index] for index in indices], self.numbers[indices])

    def encoded(self, indices):
        return [self.contents[index] for index in indices]

    def name(self, index):
        return f"canvas {self.numbers[index]}"


@functools.cache
def embedded_canvases(num_train: int = 1000, num_validation: int = 200) -> dict[str, BoxSet]:
    """Puts scikit-learn's handwritten digits on canvases, the same ones at every call.

    Training digits go on training canvases, and held-out digits on validation canvases.
    """
    digits = embedded_digits()
    return {
        "train": digits_on_canvases(digits["train"], num_train, seed=0),
        "val": digits_on_canvases(digits["val"], num_validation, seed=1),
    }


def digits_on_canvases(digits: ImageSet, count: int, seed: int) -> BoxSet:
    """Makes grey canvases with sides of 64 to 96 pixels.

    Each has one to six digits, enlarged two- to fourfold (16 to 32 pixels) and lighter than the noisy ground. A box is
    the smallest that holds all pixels of a digit with at least a quarter of its ink. Two boxes overlap by at most a
    tenth of the smaller one.
    """
    random = generator(seed, count)
    contents, sizes, boxes = [], [], []
    for number in range(count):
        height, width = random.integers(64, 97, 2)
        ink, placed = np.zeros((height, width), np.float32), []
        for _ in range(random.integers(1, 7)):
            chosen = int(random.integers(len(digits.images)))
            digit, tight = _enlarge(digits.images.pixels[chosen, 0], int(random.integers(16, 33)))
            strength = random.uniform(0.6, 1)
            for _ in range(10):  # after ten tries the digit is left out
                top, left = random.integers(0, [height - len(digit) + 1, width - len(digit) + 1])
                corners = tuple((tight + [left, top, left, top]).tolist())
                if all(_overlap(corners, other.corners) <= 0.1 for other in placed):
                    part = ink[top : top + len(digit), left : left + len(digit)]
                    np.maximum(part, strength * digit, out=part)
                    placed.append(Box(number, str(digits.labels[chosen]), corners))
                    break
        ground = random.uniform(20, 80)
        pixels = ground + (250 - ground) * ink + random.normal(0, 10, (height, width))
        contents.append(b"P5 %d %d 255\n" % (width, height) + pixels.round().clip(0, 255).astype(np.uint8).tobytes())
        sizes.append((height, width))
        boxes += placed
    names = [str(digit) for digit in range(10)]
    return BoxSet(Canvases(contents), np.array(sizes), boxes, list(range(count)), names, license=digits.license)


def _enlarge(digit: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Enlarges a digit. Returns its ink (side, side), from 0 to 1, and the box around it."""
    ink = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    rows, columns = (np.flatnonzero((ink >= 0.25).any(axis)) for axis in (1, 0))
    return ink, np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _overlap(a: tuple, b: tuple) -> float:
    """The fraction of the smaller box that lies in the other."""
    across, down = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return across * down / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
