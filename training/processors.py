"""Image processors: reads the settings of a checkpoint's processor, and creates the processor of a trained model."""

from transformers import ImageProcessingMixin
from transformers.image_utils import PILImageResampling

from hf_models import ZooDetrImageProcessor, ZooViTImageProcessor
from training.run.arguments import is_checkpoint


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


def create_image_processor(size: tuple[int, int], mean: list[float], std: list[float]) -> ZooViTImageProcessor:
    """Makes the processor that prepares images as the evaluation of a ViT does.

    It cuts out the largest part in the middle that has the shape of `size` (height, width), resizes it, and normalises
    every channel.
    """
    return ZooViTImageProcessor(
        size={"height": size[0], "width": size[1]},
        resample=PILImageResampling.BICUBIC,
        image_mean=mean,
        image_std=std,
    )


def create_detection_processor(
    shortest_edge: int | None, longest_edge: int | None, mean: list[float], std: list[float]
) -> ZooDetrImageProcessor:
    """Makes the processor that prepares images as the evaluation of a DETR does, and makes boxes of its answers.

    It resizes the shorter side to `shortest_edge` pixels, or to fewer where the longer side would exceed
    `longest_edge`, and normalises every channel. None for the first keeps the size, None for the second sets no limit.
    """
    return ZooDetrImageProcessor(
        do_resize=shortest_edge is not None,
        size={"shortest_edge": shortest_edge or 800, "longest_edge": longest_edge or 10**6},
        resample=PILImageResampling.BICUBIC,
        image_mean=mean,
        image_std=std,
    )
