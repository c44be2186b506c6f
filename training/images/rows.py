"""Images by number: from memory, or decoded from files in processes of their own.

    rows = EncodedRows(files, labels, num_channels=3, decoder=Decoder(num_workers=2))
    indices = rows.draw(first=0, count=128, seed=0)  # the first batch of the training
    pixels, labels = rows.images(indices, boxes, (224, 224)), rows.labels[indices]

Dimensions: B images of a batch, C channels (1 or 3), H and W of an image as it is, h and w as it is asked for.
"""

import contextlib
import copy
import functools
import subprocess
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from training.data.prefetch import Prefetcher
from training.images import decoding
from training.images.augment import grey
from training.run.seeds import generator


class BadImages(OSError, ValueError):
    """Too many images that cannot be read. An OSError too: it may come up at any step of a training."""


class ImageRows(ABC):
    """Images in a fixed order, and their `labels`, (N,) int64 or None.

    The pixels of an image depend only on the arguments of `images`, not on other images of the batch or on processes.
    """

    def __init__(self, labels: np.ndarray | None):
        self._labels = labels
        self._ahead = Prefetcher()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _load(self, indices: np.ndarray, boxes: np.ndarray | None, size: tuple[int, int]) -> Tensor: ...

    @abstractmethod
    def aspects(self, indices) -> np.ndarray:
        """Width / height of these images when upright, (B,)."""

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    def images(self, indices, boxes=None, size: tuple[int, int] = (224, 224)) -> Tensor:
        """Loads the images with these numbers.

        Args:
            indices: (B,).
            boxes: (B, 4), the part to cut out of each image: left, top, width and height as fractions of the upright
                image. None: the largest part in the middle that has the shape of `size`, as for evaluation.
            size: height and width to which the part is resized, bicubic.

        Returns:
            (B, C, h, w), uint8 on the CPU.
        """
        request = _request(indices, boxes, size)
        return self._ahead.take(_key(*request), self._load, *request)

    def prefetch(self, indices, boxes=None, size: tuple[int, int] = (224, 224)) -> None:
        """Begins to load in the background what `images` will return for the same arguments."""
        request = _request(indices, boxes, size)
        self._ahead.begin(_key(*request), self._load, *request)

    def draw(self, first: int, count: int, seed: int) -> np.ndarray:
        """Says which images are the samples `first` to `first + count` of a training.

        Samples are counted over all epochs (step * global batch + position). Every epoch has an order of its own, which
        depends on seed and epoch only.
        """
        epochs, positions = np.divmod(np.arange(first, first + count), len(self))
        drawn = [permutation(len(self), seed, int(epoch))[positions[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(drawn)

    def among(self, indices: np.ndarray) -> "ImageRows":
        """The same images under the same numbers, but only those at `indices` are used, or replace bad ones."""
        return self

    def report(self, gather: Callable[[list], list] = list) -> list[str]:
        """Counts and names the images that were converted or replaced so far.

        Args:
            gather: concatenates the lists of all processes, each of which has decoded its own images.
        """
        return []

    def external_files(self) -> dict[str, dict]:
        """Files outside the checkpoint that resuming needs: the shards of a stream."""
        return {}


@functools.lru_cache(maxsize=4)
def permutation(count: int, *seed: int) -> np.ndarray:
    return generator(*seed).permutation(count)


def _request(indices, boxes, size) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int]]:
    indices = np.asarray(indices, np.int64)
    if boxes is not None:
        boxes = np.asarray(boxes, np.float64)
        left_top, extent = boxes[:, :2], boxes[:, 2:]
        if boxes.shape != (len(indices), 4) or not (
            (left_top > -1e-4).all() and (extent > 0).all() and (left_top + extent < 1 + 1e-4).all()
        ):
            raise ValueError("boxes must be (B, 4): left, top, width and height, within the image from 0 to 1")
    return indices, boxes, (int(size[0]), int(size[1]))


def _key(indices: np.ndarray, boxes: np.ndarray | None, size: tuple[int, int]) -> tuple:
    return indices.tobytes(), None if boxes is None else boxes.tobytes(), size


# --------------------------------------------------------------------------------------------------- from memory


class ArrayRows(ImageRows):
    """Images of one size in memory, (N, C, H, W) uint8 with 1, 3 or 4 channels; the fourth channel is left out.

    Boxes are cut out and resized by two matrix products, one for each side, which is as exact as Pillow and much
    quicker for small images. Pillow itself resizes whole images, so that a pipeline sees the same pixels.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None, *, num_channels: int):
        super().__init__(labels)
        self.pixels, self.num_channels = torch.from_numpy(pixels), num_channels

    def __len__(self):
        return len(self.pixels)

    def aspects(self, indices):
        return np.full(len(indices), self.pixels.shape[3] / self.pixels.shape[2])

    def _load(self, indices, boxes, size):
        pixels = self.pixels[torch.from_numpy(indices)][:, :3]
        if self.num_channels == 1:
            pixels = grey(pixels.int()).to(torch.uint8)
        if boxes is not None:
            pixels = resize(pixels, boxes, size)
        elif pixels.shape[2:] != size:
            images = [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in pixels]
            views = [decoding.view(image, None, size, pixels.shape[1]) for image in images]
            pixels = torch.from_numpy(np.stack(views))
        return pixels.expand(-1, self.num_channels, -1, -1) if pixels.shape[1] == 1 else pixels


def central_box(shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Returns the box (1, 4) of the largest part in the middle of an image that has the shape of `size`."""
    height, width = shape
    scale = max(size[0] / height, size[1] / width)
    across, down = size[1] / scale / width, size[0] / scale / height
    return np.array([[(1 - across) / 2, (1 - down) / 2, across, down]])


def resize(pixels: Tensor, boxes: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Cuts and resizes (B, C, H, W) uint8 to (B, C, h, w), bicubic with antialiasing; see `ImageRows.images`."""
    height, width = pixels.shape[2:]
    left, top, across, down = torch.from_numpy(boxes).float().T
    rows = _resize_matrix(top * height, down * height, height, size[0])[:, None]  # (B, 1, h, H)
    columns = _resize_matrix(left * width, across * width, width, size[1])[:, None]  # (B, 1, w, W)
    return (rows @ pixels.float() @ columns.mT).round_().clamp_(0, 255).to(torch.uint8)


def _resize_matrix(start: Tensor, extent: Tensor, num_inputs: int, num_outputs: int) -> Tensor:
    """The weights (B, outputs, inputs) of Pillow's bicubic filter (a = -0.5), which is wider where an image shrinks."""
    scale = (extent / num_outputs)[:, None, None]
    centres = start[:, None, None] + (torch.arange(num_outputs)[:, None] + 0.5) * scale
    x = ((torch.arange(num_inputs) + 0.5 - centres) / scale.clamp(min=1)).abs_()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, far * (x < 2))
    return weights / weights.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------- from files


class EncodedImages(Protocol):
    """Image files or their contents."""

    def __len__(self) -> int: ...

    def encoded(self, indices: np.ndarray) -> list[str | bytes]:
        """The paths or the contents of these images."""

    def name(self, index: int) -> str:
        """The name of an image in messages."""


class BadImageLimit:
    """Counts bad images, and refuses to go on when they are more than a part of all images.

    Args:
        part: the fraction of all images, for training and validation together, that may be bad.
    """

    def __init__(self, part: float = 0.01):
        self.part, self.found = part, []
        self.lock = threading.Lock()  # bad images are found in the background as well

    def watch(self, source: EncodedImages) -> dict[int, str]:
        """Returns a dict for the bad images of this source: the reason by number."""
        self.found.append((source, {}))
        return self.found[-1][1]

    def check(self) -> None:
        """Raises BadImages, which names them, if there are more than allowed."""
        total, count = sum(len(source) for source, _ in self.found), sum(len(bad) for _, bad in self.found)
        if count > self.part * total:
            named = [name for source, bad in self.found for name in _reasons(source, bad)]
            raise BadImages(
                f"{count} of {total} images are bad, more than the part of {self.part} that max_bad_images allows: "
                f"{_listing(named, 10)}; mend or remove them"
            )


class EncodedRows(ImageRows):
    """Images that have to be decoded.

    A bad image is replaced by the next sound one with the same label. When there are more bad images than the limit
    allows, `images` raises BadImages. `quick` is for images to train on; see `decoding.decode`.
    """

    def __init__(
        self,
        source: EncodedImages,
        labels: np.ndarray | None,
        *,
        num_channels: int,
        decoder: "Decoder",
        limit: BadImageLimit,
        quick: bool = False,
    ):
        super().__init__(labels)
        self.source, self.num_channels, self.decoder, self.limit = source, num_channels, decoder, limit
        self.quick = quick
        self.bad = limit.watch(source)
        self.converted: dict[str, set[int]] = {}  # numbers, by kind
        self._aspects = np.zeros(0, np.float32)  # 0 where not known yet

    def __len__(self):
        return len(self.source)

    def aspects(self, indices):
        indices = np.asarray(indices, np.int64)
        self._aspects.resize(max(len(self), len(self._aspects)), refcheck=False)  # a stream grows
        unknown = np.unique(indices[self._aspects[indices] == 0])
        self._aspects[unknown] = [decoding.aspect(file) for file in self.source.encoded(unknown)]
        return self._aspects[indices]

    def among(self, indices):
        rows = copy.copy(self)
        rows._ahead = Prefetcher()
        if self.labels is not None:  # the label -1 keeps other images from replacing these
            rows._labels = np.where(np.isin(np.arange(len(self)), indices), self.labels, -1)
        return rows

    def report(self, gather=list):
        lines, bad, converted = [], {}, {}
        for its_bad, its_converted in gather([(self.bad, self.converted)]):
            bad |= its_bad
            for kind, found in its_converted.items():
                converted[kind] = converted.get(kind, set()) | found
        for kind, found in sorted(converted.items()):
            named = [self.source.name(index) for index in sorted(found)[:4]]
            lines.append(f"{len(found)} {kind} images converted ({_listing(named, 3)})")
        if bad:
            lines.append(f"{len(bad)} bad images replaced by others ({_listing(_reasons(self.source, bad), 3)})")
        return lines

    def _load(self, indices, boxes, size):
        return self._decode(indices, lambda positions, chosen: (None if boxes is None else boxes[positions], size))[0]

    def _decode(self, indices: np.ndarray, view: Callable) -> tuple[Tensor | list[Tensor], np.ndarray]:
        """Decodes the images with these numbers, and others in the place of bad ones.

        Args:
            view: called with positions in the batch and the numbers of the images there; returns the arguments of
                `Decoder.decode` for each: boxes, sizes, and if need be the annotated sizes.

        Returns:
            The images, and the numbers of the images that they are.
        """
        chosen = np.array([self._sound(int(index)) for index in indices], np.int64)
        positions = np.arange(len(indices))
        while len(positions):
            files = self.source.encoded(chosen[positions])
            boxes, sizes, *more = view(positions, chosen[positions])
            decoded, failures, conversions = self.decoder.decode(
                files, boxes, sizes, self.num_channels, *more, quick=self.quick
            )
            if len(positions) == len(indices):
                pixels = decoded
            else:
                for position, image in zip(positions, decoded, strict=True):
                    pixels[position] = image
            for position, kinds in conversions.items():
                for kind in kinds:
                    self.converted.setdefault(kind, set()).add(int(chosen[positions[position]]))
            for position, reason in failures.items():
                self._note_bad(int(chosen[positions[position]]), reason)
            positions = positions[sorted(failures)]
            chosen[positions] = [self._sound(int(index)) for index in indices[positions]]
        return pixels, chosen

    def _note_bad(self, index: int, reason: str) -> None:
        with self.limit.lock:
            if index in self.bad:
                return
            self.bad[index] = reason
            self.limit.check()
        tqdm.write(f"bad image, replaced by another: {self.source.name(index)}: {reason}", file=sys.stderr)

    def _sound(self, index: int) -> int:
        """Returns this image's number, or if it is bad that of the next sound one with the same label, going round."""
        if index not in self.bad:
            return index
        alike = self._alike(index)
        behind = np.roll(alike, -int(np.searchsorted(alike, index)))
        for candidate in behind.tolist():
            if candidate not in self.bad:
                return candidate
        named = _listing(_reasons(self.source, self.bad), 10)
        raise BadImages(f"every image like {self.source.name(index)} is bad: {named}; mend them")

    def _alike(self, index: int) -> np.ndarray:
        """The numbers of the images that may replace this one, in order."""
        return np.arange(len(self)) if self.labels is None else np.flatnonzero(self.labels == self.labels[index])


def _reasons(source: EncodedImages, bad: dict[int, str]) -> list[str]:
    return [f"{source.name(index)}: {bad[index]}" for index in sorted(bad)]


def _listing(names: list[str], count: int) -> str:
    return ", ".join(names[:count] + ["..."] * (len(names) > count))


class Decoder:
    """Decodes images in `num_workers` processes, or in this process if that is 0.

    The processes start with the first batch and end with this process, whatever ends it.
    """

    def __init__(self, num_workers: int = 0):
        self.num_workers = num_workers
        self._own = threading.local()  # the process of each thread
        self._threads: ThreadPoolExecutor | None = None

    def decode(
        self,
        files: Sequence[str | bytes],
        boxes: np.ndarray | None,
        sizes: tuple[int, int] | np.ndarray,
        num_channels: int,
        annotated: np.ndarray | None = None,
        quick: bool = False,
    ) -> tuple[Tensor | list[Tensor], dict[int, str], dict[int, list[str]]]:
        """Decodes a batch.

        Args:
            sizes: height and width of all images, or (B, 2) for the height and width of each.
            annotated: (B, 2), see `decoding.decode`.
            quick: one for all, see `decoding.decode`.

        Returns:
            (B, C, h, w), or for sizes of each image B tensors (C, h, w); by position in the batch, why an image is bad;
            by position in the batch, what was converted.
        """
        if isinstance(sizes, tuple):
            pixels = torch.empty(len(files), num_channels, *sizes, dtype=torch.uint8)
            arrays = list(pixels.numpy())
        else:
            pixels = [torch.empty(num_channels, *size, dtype=torch.uint8) for size in sizes.tolist()]
            arrays = [image.numpy() for image in pixels]
        boxes, annotated = (None if values is None else values.tolist() for values in (boxes, annotated))
        if not self.num_workers:
            return pixels, *decoding.decode_all(files, boxes, num_channels, arrays, annotated, quick)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_workers)
        length = max(1, min(32, -(-len(files) // (2 * self.num_workers))))
        parts = [slice(first, first + length) for first in range(0, len(files), length)]
        tasks = [
            self._threads.submit(
                self._ask, files[part], boxes and boxes[part], arrays[part], annotated and annotated[part], quick
            )
            for part in parts
        ]
        failures, conversions = {}, {}
        for part, task in zip(parts, tasks, strict=True):
            for found, answered in zip((failures, conversions), task.result(), strict=True):
                found.update({part.start + int(position): what for position, what in answered.items()})
        return pixels, failures, conversions

    def _ask(self, files, boxes, pixels: list[np.ndarray], annotated, quick: bool) -> tuple[dict, dict]:
        for is_last in (False, True):  # a process may have run out of memory or been killed: try a second one
            if not hasattr(self._own, "process"):
                self._own.process = _DecodingProcess()
            try:
                return self._own.process.decode(files, boxes, pixels, annotated, quick)
            except (EOFError, BrokenPipeError):
                code = self._own.process.end()
                del self._own.process
                if is_last:
                    named = ", ".join(file for file in files if isinstance(file, str))[:500]
                    raise ChildProcessError(
                        f"the process that decodes images died twice (code {code}) over the same ones: {named}"
                    ) from None


class _DecodingProcess:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-P", decoding.__file__],  # -P: modules beside the script hide no library
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.end = weakref.finalize(self, _end, self.process)

    def decode(self, files, boxes, pixels: list[np.ndarray], annotated, quick: bool) -> tuple[dict, dict]:
        contents = [file for file in files if isinstance(file, bytes)]
        request = {
            "files": [file if isinstance(file, str) else len(file) for file in files],
            "boxes": boxes,
            "num_channels": len(pixels[0]),
            "sizes": [image.shape[1:] for image in pixels],
            "annotated": annotated,
            "quick": quick,
        }
        decoding.write_message(self.process.stdin, request, *contents)
        answer = decoding.read_message(self.process.stdout)
        if "error" in answer:
            raise OSError(*answer["error"])
        for image in pixels:
            if self.process.stdout.readinto(memoryview(image).cast("B")) < image.nbytes:
                raise EOFError
        return answer["failures"], answer["conversions"]


def _end(process: subprocess.Popen) -> int:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    return process.wait()
