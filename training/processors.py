"""Image processors: reads the settings of a checkpoint's processor, and creates the processor of a trained model."""

from transformers import BaseImageProcessor, DetrImageProcessorPil, ImageProcessingMixin, ViTImageProcessorPil
from transformers.image_utils import PILImageResampling

from training.models import is_checkpoint


def read_image_processor(name: str) -> dict:
    """Reads the settings of a checkpoint's image processor; empty if it has none."""
    if not is_checkpoint(name):
        return {}
    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        return {}


def normalisation_of(name: str, num_channels: int) -> tuple[list[float], list[float]] | None:
    """Reads mean and standard deviation of each channel from a checkpoint's image processor; None if it has none."""
    if not (processor := read_image_processor(name)):
        return None
    values = (processor.get(field, 0.5) for field in ("image_mean", "image_std"))  # 0.5: the default of a stock ViT
    return tuple(value if isinstance(value, list) else [value] * num_channels for value in values)


def edges_of(name: str) -> tuple[int | None, int | None] | None:
    """Reads how the image processor of a detector's checkpoint resizes images.

    Returns:
        The pixels of the shorter side, and the most pixels of the longer side; both None if images keep their size.
        None if there is no processor, or if it makes all images one size.
    """
    processor = read_image_processor(name)
    if not processor.get("do_resize", True):
        return None, None
    size = processor.get("size")
    if isinstance(size, int):  # in older files
        return size, processor.get("max_size")
    return (size["shortest_edge"], size.get("longest_edge")) if size and "shortest_edge" in size else None


def create_image_processor(size: tuple[int, int], mean: list[float], std: list[float]) -> BaseImageProcessor:
    """What a pipeline prepares images with as the evaluation does: the shorter side resized to fit, the middle cut
    out, every channel normalised. Where `size` is no square, no stock processor can cut: images of another shape are
    stretched, so give a pipeline such as have it."""
    height, width = size
    frame = {"height": height, "width": width}
    is_square, is_grey = height == width, len(mean) == 1
    return ViTImageProcessorPil(  # saved under the name that serves torchvision too
        do_convert_rgb=len(mean) == 3,
        size={"shortest_edge": height} if is_square else frame,
        do_center_crop=is_square,
        crop_size=frame,
        resample=PILImageResampling.BICUBIC,
        image_mean=mean[0] if is_grey else mean,  # a number: a pipeline makes a grey image three equal channels first
        image_std=std[0] if is_grey else std,
    )


def create_detection_processor(
    shortest_edge: int | None, longest_edge: int | None, mean: list[float], std: list[float]
) -> DetrImageProcessorPil:
    """What a pipeline prepares images with as the evaluation of a DETR does, and what makes boxes of its answers: the
    shorter side is resized to `shortest_edge` pixels, or to fewer where the longer one would else have more than
    `longest_edge`; every channel is normalised. None: as it is, or without such a limit."""
    is_grey = len(mean) == 1
    return DetrImageProcessorPil(
        do_convert_rgb=len(mean) == 3,
        do_resize=shortest_edge is not None,
        size={"shortest_edge": shortest_edge or 800, "longest_edge": longest_edge or 10**6},
        resample=PILImageResampling.BICUBIC,
        image_mean=mean[0] if is_grey else mean,  # a number, as in `create_image_processor`
        image_std=std[0] if is_grey else std,
    )
