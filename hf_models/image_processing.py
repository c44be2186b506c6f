"""The image processors of ViT, masked autoencoders and DETR, which resize images as the evaluation of a training does.

transformers chooses other processors if torchvision is installed, and these resize to slightly different pixels. The
processors of this file always resize with Pillow. Every checkpoint carries this file, so that a pipeline gives the
evaluation's answers on every machine.

    C  channels, 1 (grey) or 3 (colour)    H, W  height and width of an image
"""

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import DetrImageProcessorPil, ViTImageProcessorPil
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import ChannelDimension, SizeDict, infer_channel_dimension_format


class PixelReader:
    """Reads images as a training does: upright, without transparency, and grey or in colour as the model needs."""

    image_mean: Any
    _auto_class = "AutoImageProcessor"  # so `save_pretrained` copies this file and names the class in the config

    @property
    def num_channels(self) -> int:
        """The number of channels of the model, which is the number of means in `image_mean`."""
        return np.size(self.image_mean)

    def process_image(self, image, input_data_format=None, **kwargs) -> np.ndarray:
        """Returns the pixels of an image, (C, H, W), uint8.

        Args:
            image: a PIL image, whose 16 bits are cut to 8, or an array or tensor of uint8 with 1, 3 or 4 channels.
            input_data_format: position of the channels of an array. Default: found from the shape.

        Raises:
            ValueError: the pixels are not integers from 0 to 255.
        """
        if not isinstance(image, Image.Image):
            pixels = np.asarray(image)
            if np.issubdtype(pixels.dtype, np.integer) and pixels.size and 0 <= pixels.min() <= pixels.max() <= 255:
                pixels = pixels.astype(np.uint8)
            if pixels.dtype != np.uint8:
                raise ValueError(f"an image is an array of {pixels.dtype}: give uint8, from 0 to 255, or a PIL image")
            if pixels.ndim == 2:
                pixels = pixels[None]
            else:
                where = input_data_format or infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
                pixels = np.moveaxis(pixels, -1, 0) if where == ChannelDimension.LAST else pixels
            image = to_image(pixels)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("an image has floating-point pixels, which have no fixed range: convert it to 8 bits")
        return to_pixels(image.convert("L" if self.num_channels == 1 else "RGB"))


class ZooViTImageProcessor(PixelReader, ViTImageProcessorPil):  # type: ignore[misc]  # it overrides stock's methods
    """Crops an image to the aspect ratio of `size` around its centre, resizes it and normalises it.

    Args:
        size: `height` and `width`, in pixels.
        resample: Pillow's number of the filter; trainings use bicubic.
        image_mean, image_std: mean and standard deviation of each channel, as fractions of 255. One value makes images
            grey, three make them coloured.
    """

    def resize(  # type: ignore[override]  # it needs no other options of stock's
        self, image: np.ndarray, size: SizeDict, resample=None, **kwargs
    ) -> np.ndarray:
        """(C, H, W) -> (C, size.height, size.width)."""
        if not size.height or not size.width:
            raise ValueError(f"size must have height and width, not {dict(size)}")
        _, height, width = image.shape
        scale = max(size.height / height, size.width / width)
        across, down = min(width, size.width / scale), min(height, size.height / scale)
        left, top = (width - across) / 2, (height - down) / 2
        box = max(left, 0), max(top, 0), min(left + across, width), min(top + down, height)
        return to_pixels(to_image(image).resize((size.width, size.height), resample, box))


class ZooDetrImageProcessor(PixelReader, DetrImageProcessorPil):  # type: ignore[misc]  # it overrides stock's methods
    """Resizes an image to a length of its shorter side and normalises it; also makes boxes of a DETR's outputs.

    Args:
        size: `shortest_edge`, the length of the shorter side in pixels, and `longest_edge`, the limit of the longer.
        resample, image_mean, image_std: as in `ZooViTImageProcessor`.
    """

    def resize(  # type: ignore[override]  # it passes on the other options of stock's
        self, image: np.ndarray, size: SizeDict, resample=None, **kwargs
    ) -> np.ndarray:
        """(C, H, W) -> (C, h, w), where h and w are at least 1."""
        if size.shortest_edge and size.longest_edge:
            sides = get_size_with_aspect_ratio(image.shape[1:], size.shortest_edge, size.longest_edge)
            size = SizeDict(height=max(1, sides[0]), width=max(1, sides[1]))
        return super().resize(image, size, resample, **kwargs)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Makes a PIL image of (C, H, W), uint8."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def to_pixels(image: Image.Image) -> np.ndarray:
    """Returns a grey or colour image as (C, H, W), uint8."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
