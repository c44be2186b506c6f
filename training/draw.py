"""Pictures of a model: where it looks, what it reconstructs, what it has learnt.

    python -m training.draw CHECKPOINT [--image FILE ...] [--text TEXT] [--output_dir DIR]

writes every figure that fits the checkpoint, which is a folder or a Hub repository of a GPT, a BERT, a ViT, a masked
autoencoder or a DETR, ours or stock. Each function here returns a matplotlib Figure; `figure.savefig(path)` keeps it.

L layers, B images, C channels, N heads, T tokens, P patches, Q queries
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from PIL.Image import Image
from transformers import AutoConfig, AutoModel, AutoTokenizer, DetrImageProcessorPil
from transformers.image_utils import load_image
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # in 5.17 `transformers` has another
from transformers.utils import logging

from hf_models import ZooDetrForObjectDetection, ZooViTMAEForPreTraining, ZooViTModel
from training import figures
from training.detection.canvases import embedded_canvases
from training.figures import curves
from training.images.decoding import decode_all
from training.images.read import read_images
from training.images.rows import ArrayRows
from training.models import normalisation_of
from training.run.arguments import one_line, user_errors

TEXT = "The list is empty because nobody has put anything into it."


def attention_maps(model, pixel_values: torch.Tensor, mean=0.5, std=0.5) -> Figure:
    """What each head of the last layer looks at, and attention rollout through all layers, over the images.

    The attention is that of the class token, or where there is none the mean over all patches: what the image as a
    whole is represented by. What goes to the class token and to registers is left out.

    Args:
        model: a `ZooViTModel` or a model with one inside; a masked autoencoder is shown the whole image.
        pixel_values: (B, C, H, W), normalised with `mean` and `std`, numbers or one for each channel.
    """
    encoder, config = model.base_model, model.config
    with evaluating(encoder):
        attentions = ZooViTModel.forward(encoder, pixel_values.to(encoder.device), output_attentions=True).attentions
    attentions = torch.stack(attentions).float().cpu()  # (L, B, N, T, T)
    prefix = config.num_prefix_tokens
    grid = [side // config.patch_size for side in pixel_values.shape[2:]]

    def onto_patches(weights):  # (..., T, T) -> (..., rows, columns)
        weights = weights[..., 0, :] if config.pooling != "mean" else weights[..., prefix:, :].mean(-2)
        return weights[..., prefix:].unflatten(-1, grid).numpy()

    rollout = onto_patches(attention_rollout(attentions))
    return figures.image_attention(displayable(pixel_values, mean, std), rollout, onto_patches(attentions[-1]))


def attention_rollout(attentions: torch.Tensor) -> torch.Tensor:
    """How much of each token of the last layer comes from each token of the input, (..., T, T).

    A layer mixes tokens by the mean of its heads' attention; the residual connection adds the token itself, in equal
    parts. The product over the layers follows the tokens through all of them (Abnar and Zuidema 2020, section 3).

    attentions: (L, ..., N, T, T).
    """
    mixing = attentions.mean(-3)
    mixing = mixing + torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
    mixing = mixing / mixing.sum(-1, keepdim=True)
    rollout = mixing[0]
    for layer in mixing[1:]:
        rollout = layer @ rollout
    return rollout


def reconstructions(
    model: ZooViTMAEForPreTraining, pixel_values: torch.Tensor, noise: torch.Tensor | None = None, mean=0.5, std=0.5
) -> Figure:
    """Images, their visible patches, and what the masked autoencoder makes of them.

    A model that paints pixels normalised within each patch does not say how light a patch is and how strong its
    contrast: both are then taken from the image itself.

    Args:
        pixel_values: (B, C, H, W), normalised with `mean` and `std`, numbers or one for each channel.
        noise: (B, P), as the model takes it; by default the same at every call.
    """
    size = tuple(pixel_values.shape[2:])
    pixel_values = pixel_values.float().cpu()
    patches = model.patchify(pixel_values)  # (B, P, p p C)
    if noise is None:
        noise = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        outputs = model(pixel_values.to(model.device), noise=noise.to(model.device))
    painted, is_masked = outputs.logits.float().cpu(), outputs.mask.cpu()[..., None] > 0
    if model.config.norm_pix_loss:
        painted = painted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    visible = model.unpatchify(patches.masked_fill(is_masked, torch.nan), size)
    painted = model.unpatchify(patches.where(~is_masked, painted), size)
    return figures.reconstruction_triples(
        *(displayable(images, mean, std) for images in (pixel_values, visible, painted))
    )


def detections(model, processor, images: Sequence[Image], threshold: float = 0.5) -> Figure:
    """What a DETR finds in images.

    Args:
        model: with its head for boxes.
        processor: the image processor of the checkpoint.
        threshold: the least score of what is drawn.
    """
    found = [keep(detect(model, processor, image)[0], threshold) for image in images]
    return figures.detections([pixels_of(image) for image in images], found, label_names(model))


def query_slots(model, processor, images: Sequence[Image]) -> Figure:
    """Where each query of a DETR looks (Carion et al. 2020, figure 7), from its boxes in all these images. With
    `query_selection` a query has no place of its own: the first one is the likeliest object of each image."""
    return figures.query_slots(stack_slots([detect(model, processor, image)[0]["boxes"] for image in images]))


def decoder_attention(model, processor, image: Image, threshold: float = 0.5, most: int = 11) -> Figure:
    """What the last decoder layer looks at for each box that a DETR finds in an image, mean over the heads.

    threshold, most: the boxes with at least this score, so many at most; if there is none, the best one.
    """
    found, weights, reach = detect(model, processor, image, with_attention=True)
    best = np.argsort(-found["scores"], kind="stable")[:most]
    chosen = best[: max(1, int((found["scores"][best] >= threshold).sum()))]
    found = {name: values[chosen] for name, values in found.items()}
    return figures.box_attention(pixels_of(image), found, weights[chosen], label_names(model), reach)


def detect(model, processor, image: Image, with_attention: bool = False):
    """The answers of all queries to one image, as the processor reads them: `scores` (Q,), `labels` (Q,) and `boxes`
    (Q, 4), left, top, right and bottom as parts of the image.

    Besides, if asked for, the attention (Q, rows, columns) of the last decoder layer, mean over the heads, and the
    height and width of these rows and columns as parts of the image's: they may go beyond it.
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
    """Those answers with at least this score."""
    return {name: values[found["scores"] >= threshold] for name, values in found.items()}


def stack_slots(boxes: Sequence[np.ndarray]) -> np.ndarray:
    """Each image's boxes (Q, 4) as (B, Q, 4), NaN where an image has fewer than others."""
    slots = np.full((len(boxes), max(map(len, boxes)), 4), np.nan)
    for place, found in enumerate(boxes):
        slots[place, : len(found)] = found
    return slots


def pixels_of(image: Image) -> np.ndarray:
    """An image (H, W, C) with values from 0 to 1, made smaller if it is large."""
    image = image.copy()
    image.thumbnail((1000, 1000))
    return np.atleast_3d(np.asarray(image)) / 255


def label_names(model) -> list[str]:
    return [model.config.id2label[label] for label in range(model.config.num_labels)]


def position_similarity(model) -> Figure:
    """How similar the learned position of each patch is to all others (Dosovitskiy et al. 2021, figure 7, centre).

    Raises ValueError if the positions are fixed functions of the place.
    """
    kind = model.config.position_embedding_type
    if not kind.startswith("learned"):
        raise ValueError(f"position_embedding_type={kind!r} has no learned positions to compare")
    rows, columns = model.config.grid_size
    vectors = model.base_model.positions.vectors(rows, columns, torch.float32, model.device)
    return figures.similarity_of_positions(vectors.detach().float().cpu().view(rows, columns, -1).numpy())


def first_filters(model) -> Figure:
    """Principal components of the filters that see the pixels, those of the patches or of the convolutional stem
    (Dosovitskiy et al. 2021, figure 7, left)."""
    embedding = model.base_model.patch_embed
    first = next(module for module in embedding.modules() if isinstance(module, torch.nn.Conv2d))
    return figures.principal_filters(first.weight.detach().float().cpu().numpy())


def token_attention(model, tokenizer, text: str, layer: int | None = None, max_tokens: int = 40) -> Figure:
    """Which token of a text looks at which: every head of every layer, or those of one layer with the tokens' names.

    Args:
        model: any model of text that gives attention maps, ours or stock.
        layer: counted from 0, or from the end if negative; None: all layers.
        max_tokens: what is longer is cut.

    Raises:
        ValueError: a text without tokens, or no such layer.
    """
    max_tokens = min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens))
    inputs = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ValueError(f"text {text!r} has no tokens: give a longer one")
    with evaluating(model):
        attentions = model(**inputs.to(model.device), output_attentions=True).attentions
    attentions = torch.cat(attentions).float().cpu().numpy()  # (L, N, T, T)
    if layer is None:
        return figures.token_attention_overview(attentions)
    if not -len(attentions) <= layer < len(attentions):
        raise ValueError(f"layer {layer} of a model with {len(attentions)} layers")
    return figures.token_attention_heads(attentions[layer], token_names(tokenizer, inputs["input_ids"][0].tolist()))


def token_names(tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token looks like, white space as signs, and parts of a letter in the tokenizer's spelling."""
    names = []
    for number in ids:
        name = tokenizer.decode([number])
        if not name or "\N{REPLACEMENT CHARACTER}" in name:
            name = tokenizer.convert_ids_to_tokens(number)
        names.append(name.strip() or name.translate({ord(" "): "␣", ord("\n"): "⏎", ord("\t"): "⇥"}))
    return names


def displayable(pixel_values: torch.Tensor, mean, std) -> np.ndarray:
    """Images (B, H, W, C) from 0 to 1 of normalised ones (B, C, H, W)."""
    mean, std = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std))
    return (pixel_values.detach().float().cpu() * std + mean).permute(0, 2, 3, 1).numpy()


@contextmanager
def evaluating(model) -> Iterator[None]:
    """For the time of the block: no gradients, no dropout, and attention as the backend that forms its maps."""
    was_training, backend = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(backend)
        model.train(was_training)


# -------------------------------------------------------------------------------------------------- the command


def draw_text(checkpoint: str, config, images: Sequence[str], text: str | None) -> Iterator[tuple[str, Figure]]:
    """The figures of a GPT or BERT by name."""
    if images:
        raise ValueError(f"--image: {checkpoint} is a model of text, give --text")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager")
    yield "token_attention", token_attention(model, tokenizer, text or TEXT)
    yield "token_attention_last_layer", token_attention(model, tokenizer, text or TEXT, layer=-1)


def draw_images(checkpoint: str, config, images: Sequence[str], text: str | None) -> Iterator[tuple[str, Figure]]:
    """The figures of a ViT or masked autoencoder by name."""
    if text is not None:
        raise ValueError(f"--text: {checkpoint} is a model of images, give --image")
    is_mae = config.model_type in ("zoo_vit_mae", "vit_mae")
    if is_mae:
        model = ZooViTMAEForPreTraining.from_pretrained(checkpoint)
    else:
        model = ZooViTModel.from_pretrained(checkpoint, add_pooling_layer=False)
    mean, std = normalisation_of(checkpoint, model.config.num_channels) or (0.5, 0.5)
    pixels = open_images(images, model.config)
    shape = (-1, 1, 1)
    pixel_values = (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    if is_mae:
        yield "reconstructions", reconstructions(model, pixel_values, None, mean, std)
    yield "attention_maps", attention_maps(model, pixel_values, mean, std)
    yield "first_filters", first_filters(model)
    try:
        yield "position_similarity", position_similarity(model)
    except ValueError as error:
        print(f"no position_similarity: {error}")


def draw_detections(checkpoint: str, config, images: Sequence[str], text: str | None) -> Iterator[tuple[str, Figure]]:
    """The figures of a DETR by name."""
    if text is not None:
        raise ValueError(f"--text: {checkpoint} is a model of images, give --image")
    model = ZooDetrForObjectDetection.from_pretrained(checkpoint)
    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    except OSError:  # a model without one: that of the paper
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
    """An image as pipelines open it, in its own size."""
    try:
        return load_image(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--image {file}: {one_line(error)}") from error


def open_images(files: Sequence[str], config) -> torch.Tensor:
    """Images (B, C, H, W), uint8, cut and resized to what the model was made for; without files some that come with
    scikit-learn, digits for a model of grey images and photographs for one of colour."""
    num_channels, size = config.num_channels, tuple(side * config.patch_size for side in config.grid_size)
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels is {num_channels}: only models of grey (1) or colour images (3) can be drawn")
    if files:
        pixels = np.zeros((len(files), num_channels, *size), np.uint8)
        failures, _ = decode_all(files, None, num_channels, pixels)
        for place, reason in failures.items():
            raise ValueError(f"--image {files[place]}: {reason}")
        return torch.from_numpy(pixels)
    if num_channels == 1:
        return read_images("embedded").validation.images(range(8, 12), size=size)
    from sklearn.datasets import load_sample_images

    photographs = np.stack(load_sample_images().images).transpose(0, 3, 1, 2)
    return ArrayRows(photographs, None, num_channels=3).images(range(2), size=size)


FAMILIES = {
    **dict.fromkeys(("zoo_gpt", "gpt2", "zoo_bert", "bert"), draw_text),
    **dict.fromkeys(("zoo_vit", "vit", "zoo_vit_mae", "vit_mae"), draw_images),
    **dict.fromkeys(("zoo_detr", "detr"), draw_detections),
}


def draw(checkpoint: str, images: Sequence[str] = (), text: str | None = None) -> Iterator[tuple[str, Figure]]:
    """Every figure that fits the checkpoint, by name.

    Raises ValueError or OSError for a checkpoint that does not load or is of none of the families, images or text that
    do not suit it, and an image that cannot be read.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{checkpoint} is a {config.model_type}; there are figures of {', '.join(FAMILIES)}")
    yield from FAMILIES[config.model_type](checkpoint, config, images, text)
    metrics_file = Path(checkpoint, "metrics.jsonl")
    if metrics_file.exists():
        yield "curves", curves(metrics_file)


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m training.draw", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder or Hub repository")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="images to draw for a model of images")
    parser.add_argument("--text", help="text to draw for a model of text")
    parser.add_argument("--output_dir", help="where to; default: 'figures' in the checkpoint's folder, or here")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # of heads that are left out, which is no matter here
    logging.disable_progress_bar()
    output_dir = Path(args.output_dir or Path(args.checkpoint if Path(args.checkpoint).is_dir() else ".", "figures"))
    with user_errors():
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in draw(args.checkpoint, args.image, args.text):
            figure.savefig(output_dir / f"{name}.png")
            print(output_dir / f"{name}.png")


if __name__ == "__main__":
    main()
