"""Pictures of a ViT or a masked autoencoder: attention maps, reconstructions, filters and positions.

Each function returns a matplotlib Figure; `figure.savefig(path)` keeps it.

L layers, B images, C channels, H and W pixels, N heads, T tokens, P patches
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedConfig, PreTrainedModel

from hf_models import ZooViTMAEForPreTraining, ZooViTModel
from training import figures
from training.images.decoding import decode_all
from training.images.read import read_images
from training.images.rows import ArrayRows
from training.models import evaluating
from training.processors import normalisation_of


def attention_maps(model: PreTrainedModel, pixel_values: torch.Tensor, mean=0.5, std=0.5) -> Figure:
    """Draws over each image where the heads of the last layer look, and attention rollout through all layers.

    The attention is that of the class token, because the class token represents the image; without a class token it is
    the mean over all patches. Attention to the class token and to registers is not drawn.

    Args:
        model: a `ZooViTModel` or a model with one inside. A masked autoencoder is shown the whole image.
        pixel_values: (B, C, H, W), normalised with `mean` and `std`.
        mean, std: one number, or one for each channel.
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
    """Computes how much of each token of the last layer comes from each token of the input.

    A layer mixes tokens by the mean of its heads' attention; the residual connection adds the token itself, in equal
    parts. The product over the layers follows the tokens through all of them (Abnar and Zuidema 2020, section 3).

    Args:
        attentions: (L, ..., N, T, T).

    Returns:
        (..., T, T).
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
    """Draws images, their visible patches, and what the masked autoencoder makes of them.

    A model that predicts pixels normalised within each patch says nothing of a patch's brightness and contrast; both
    are then taken from the image itself.

    Args:
        pixel_values: (B, C, H, W), normalised with `mean` and `std`.
        noise: (B, P), as the model takes it; by default the same at every call.
        mean, std: one number, or one for each channel.
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


def position_similarity(model: PreTrainedModel) -> Figure:
    """Draws how similar each patch's learned position is to all others (Dosovitskiy et al. 2021, figure 7, centre).

    Raises:
        ValueError: the model computes its positions instead of learning them.
    """
    kind = model.config.position_embedding_type
    if not kind.startswith("learned"):
        raise ValueError(f"position_embedding_type={kind!r} has no learned positions to compare")
    rows, columns = model.config.grid_size
    vectors = model.base_model.positions.vectors(rows, columns, torch.float32, model.device)
    return figures.similarity_of_positions(vectors.detach().float().cpu().view(rows, columns, -1).numpy())


def first_filters(model: PreTrainedModel) -> Figure:
    """Draws the principal components of the filters that see the pixels (Dosovitskiy et al. 2021, figure 7, left).

    These are the filters of the patch embedding, or the first ones of a convolutional stem.
    """
    embedding = model.base_model.patch_embed
    first = next(module for module in embedding.modules() if isinstance(module, torch.nn.Conv2d))
    return figures.principal_filters(first.weight.detach().float().cpu().numpy())


def displayable(pixel_values: torch.Tensor, mean, std) -> np.ndarray:
    """Undoes the normalisation of images (B, C, H, W). Returns (B, H, W, C) from 0 to 1."""
    mean, std = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std))
    return (pixel_values.detach().float().cpu() * std + mean).permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------------------- for `training.draw`


def draw_image_model(
    checkpoint: str, config: PreTrainedConfig, images: Sequence[str], text: str | None
) -> Iterator[tuple[str, Figure]]:
    """Yields each figure of a ViT or masked autoencoder with its name; see `training.draw`."""
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


def open_images(files: Sequence[str], config: PreTrainedConfig) -> torch.Tensor:
    """Opens images, and cuts and resizes them to the size that the model was made for.

    Without files it takes images that come with scikit-learn: digits for a model of grey images, photographs for a
    model of colour images.

    Returns:
        (B, C, H, W), uint8.
    """
    num_channels, size = config.num_channels, tuple(side * config.patch_size for side in config.grid_size)
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels is {num_channels}: only models of grey (1) or colour images (3) can be drawn")
    if files:
        pixels = np.zeros((len(files), num_channels, *size), np.uint8)
        failures, _ = decode_all(files, None, num_channels, pixels)
        for index, reason in failures.items():
            raise ValueError(f"--image {files[index]}: {reason}")
        return torch.from_numpy(pixels)
    if num_channels == 1:
        return read_images("embedded").validation.images(range(8, 12), size=size)
    from sklearn.datasets import load_sample_images

    photographs = np.stack(load_sample_images().images).transpose(0, 3, 1, 2)
    return ArrayRows(photographs, None, num_channels=3).images(range(2), size=size)
