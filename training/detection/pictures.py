"""Pictures of a DETR: the boxes that it finds, where each query looks, what its decoder looks at.

B images, Q queries, H and W pixels, C channels
"""

import io
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image
from matplotlib.figure import Figure
from PIL.Image import Image
from transformers import DetrImageProcessorPil, PreTrainedConfig
from transformers.image_utils import load_image
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # in 5.17 `transformers` has another

from hf_models import ZooDetrForObjectDetection
from training import figures
from training.detection.canvases import embedded_canvases
from training.models import evaluating
from training.run.arguments import one_line


def detections(model: ZooDetrForObjectDetection, processor, images: Sequence[Image], threshold: float = 0.5) -> Figure:
    """Draws the boxes that a DETR finds in images.

    Args:
        processor: the image processor of the checkpoint.
        threshold: boxes with a lower score are not drawn.
    """
    found = [keep(detect(model, processor, image)[0], threshold) for image in images]
    return figures.detections([pixels_of(image) for image in images], found, label_names(model))


def query_slots(model: ZooDetrForObjectDetection, processor, images: Sequence[Image]) -> Figure:
    """Draws where each query of a DETR looks, from its boxes in all these images (Carion et al. 2020, figure 7).

    With `query_selection` a query is not tied to a part of the image: the first query is the likeliest object of each
    image.
    """
    return figures.query_slots(stack_slots([detect(model, processor, image)[0]["boxes"] for image in images]))


def decoder_attention(
    model: ZooDetrForObjectDetection, processor, image: Image, threshold: float = 0.5, most: int = 11
) -> Figure:
    """Draws what the last decoder layer looks at for each box that a DETR finds in an image, mean over the heads.

    Args:
        threshold: boxes with a lower score are not drawn; if all scores are lower, the best box is.
        most: the largest number of boxes.
    """
    found, weights, reach = detect(model, processor, image, with_attention=True)
    best = np.argsort(-found["scores"], kind="stable")[:most]
    chosen = best[: max(1, int((found["scores"][best] >= threshold).sum()))]
    found = {name: values[chosen] for name, values in found.items()}
    return figures.box_attention(pixels_of(image), found, weights[chosen], label_names(model), reach)


def detect(model: ZooDetrForObjectDetection, processor, image: Image, with_attention: bool = False):
    """Runs a DETR on one image.

    Returns:
        found: the answers of all queries, as the processor reads them: `scores` (Q,), `labels` (Q,) and `boxes` (Q, 4),
            left, top, right and bottom as fractions of the image.
        weights: (Q, rows, columns), the attention of the last decoder layer, mean over the heads; None without
            `with_attention`.
        reach: height and width of these rows and columns as fractions of the image's, which may be above 1; None
            without `with_attention`.
    """
    inputs, grids = processor(images=image, return_tensors="pt").to(model.device), []
    hook = model.model.input_projection.register_forward_hook(lambda *call: grids.append(call[-1].shape[2:]))
    with evaluating(model), hook:
        outputs = model(**inputs, output_attentions=with_attention)
    (found,) = processor.post_process_object_detection(outputs, threshold=-1)  # all
    found = {name: values.float().cpu().numpy() for name, values in found.items()}
    found["labels"] = found["labels"].astype(int)
    if not with_attention:
        return found, None, None
    weights = outputs.cross_attentions[-1][0].mean(0).float().cpu().unflatten(-1, grids[0]).numpy()
    sides = inputs["pixel_values"].shape[2:]
    stride = getattr(model.model.backbone, "stride", None)
    reach = [1.0, 1.0] if stride is None else [stride * n / side for n, side in zip(grids[0], sides, strict=True)]
    return found, weights, reach


def keep(found: dict[str, np.ndarray], threshold: float) -> dict[str, np.ndarray]:
    """Keeps the answers with at least this score."""
    return {name: values[found["scores"] >= threshold] for name, values in found.items()}


def stack_slots(boxes: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks each image's boxes (Q, 4) to (B, Q, 4), NaN where an image has fewer than others."""
    slots = np.full((len(boxes), max(map(len, boxes)), 4), np.nan)
    for slot, found in zip(slots, boxes, strict=True):
        slot[: len(found)] = found
    return slots


def pixels_of(image: Image) -> np.ndarray:
    """An image's pixels (H, W, C) with values from 0 to 1. A large image is made smaller."""
    image = image.copy()
    image.thumbnail((1000, 1000))
    return np.atleast_3d(np.asarray(image)) / 255


def label_names(model: ZooDetrForObjectDetection) -> list[str]:
    return [model.config.id2label[label] for label in range(model.config.num_labels)]


# ---------------------------------------------------------------------------------------------- for `training.draw`


def draw_detector(
    checkpoint: str, config: PreTrainedConfig, images: Sequence[str], text: str | None
) -> Iterator[tuple[str, Figure]]:
    """Yields each figure of a DETR with its name; see `training.draw`."""
    if text is not None:
        raise ValueError(f"--text: {checkpoint} is a model of images, give --image")
    model = ZooDetrForObjectDetection.from_pretrained(checkpoint)
    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    except OSError:  # the checkpoint has no processor: take the paper's
        processor = DetrImageProcessorPil()
    if images:
        opened = [open_upright(file) for file in images]
    elif model.config.num_channels == 1:
        canvases = embedded_canvases(num_train=1, num_validation=60)["val"].images.contents
        opened = [PIL.Image.open(io.BytesIO(canvas)) for canvas in canvases]
    else:
        from sklearn.datasets import load_sample_images

        opened = [PIL.Image.fromarray(photograph) for photograph in load_sample_images().images]
    yield "detections", detections(model, processor, opened[:6])
    yield "decoder_attention", decoder_attention(model, processor, opened[0])
    if len(opened) < 10:
        print(f"no query_slots: {len(opened)} images are too few to see where a query looks, give 10 or more")
    else:
        yield "query_slots", query_slots(model, processor, opened)


def open_upright(file: str) -> Image:
    """Opens an image in its own size, as pipelines do."""
    try:
        return load_image(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--image {file}: {one_line(error)}") from error
