"""MAE: a ViT that learns from images without labels, by predicting the pixels of three quarters of the patches from the
other quarter (He et al. 2022).

visible, masked = a random quarter of the patches, the others
h    = ViT(visible)                                           the encoder, on a quarter of the tokens
g_0  = W_d [h; mask token for every masked patch] + positions the small decoder, on all tokens
loss = mean over masked patches p of ||W_o g_L[p] - normalised pixels of p||^2

    B  batch    C  channels    P  patches    K  visible patches    p  side of a patch    D  hidden size
"""

import math
from dataclasses import fields
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput, ViTMAEModelOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .layers import TransformerStack, make_norm
from .losses import as_divisor
from .patches import PatchPositions, fit_channels
from .vit import VIT_RENAMINGS, ResizePositions, ZooViTConfig, ZooViTModel, ZooViTPreTrainedModel

# isort: split
# transformers fetches only the modules that this file imports by name; the modules above need these, too.
from .attention import MultiHeadAttention  # noqa: F401
from .base import TransformerModel  # noqa: F401
from .packing import FirstToken  # noqa: F401
from .positions import rotary_angles  # noqa: F401
from .projections import ResidualLinear  # noqa: F401


@strict
class ZooViTMAEConfig(ZooViTConfig):
    """The config of a masked autoencoder. The defaults are those of MAE with ViT-B/16.

    Args:
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: sizes of
            the decoder.
        mask_ratio: part of the patches that are masked: the encoder does not get them.
        norm_pix_loss: whether the pixels to predict are normalised within each patch (section 4.1, table 1d).

    `ZooViTConfig` documents the other fields, which are the encoder's.
    """

    model_type = "zoo_vit_mae"
    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "mae.ZooViTMAEConfig",
        "AutoModel": "mae.ZooViTMAEModel",
        "AutoModelForPreTraining": "mae.ZooViTMAEForPreTraining",
    }
    stock_model_types = ("vit_mae",)

    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int | None = None
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True

    def __post_init__(self, **kwargs):
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size
        super().__post_init__(**kwargs)

    def validate_decoder(self):
        """Checks the decoder's fields, and that some patches are masked and some visible."""
        self.num_visible(math.prod(self.grid_size))
        if self.stem_channels:
            raise ValueError("stem_channels must be empty: its convolutions would mix masked patches into visible ones")
        self.decoder_config().validate()

    def num_visible(self, num_patches: int) -> int:
        """Returns how many of an image's patches the encoder gets; raises a `ValueError` if that is all or none."""
        num_visible = int(num_patches * (1 - self.mask_ratio))
        if not 0 < num_visible < num_patches:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} of {num_patches} patches leaves none masked, or none visible"
            )
        return num_visible

    def decoder_config(self) -> ZooViTConfig:
        """Returns the config of a ViT with the decoder's sizes."""
        values = {one.name: getattr(self, one.name) for one in fields(ZooViTConfig) if not one.name.startswith("_")}
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            values[name] = getattr(self, f"decoder_{name}")
        values |= {"num_key_value_heads": None, "head_dim": None, "drop_path": 0.0}
        return ZooViTConfig(**values)


class ZooViTMAEPreTrainedModel(ZooViTPreTrainedModel):
    config: ZooViTMAEConfig
    config_class = ZooViTMAEConfig
    _keys_to_ignore_on_load_unexpected = []


def random_masking(noise, num_visible: int):
    """Makes the patches with the least noise visible (section 3, "Simple implementation").

    Args:
        noise: (B, P), any numbers.
        num_visible: K.

    Returns:
        `visible` (B, K), indices of the visible patches; `mask` (B, P), 1 for a masked patch and 0 for a visible one;
        `ids_restore` (B, P), the index of each patch in the order [visible; masked].
    """
    order = noise.argsort(dim=1)
    ids_restore = order.argsort(dim=1)
    return order[:, :num_visible], (ids_restore >= num_visible).to(torch.float32), ids_restore


class ZooViTMAEModel(ZooViTMAEPreTrainedModel, ZooViTModel):
    """The encoder: a ViT on a random part of the patches."""

    _auto_class = "AutoModel"

    def __init__(self, config: ZooViTMAEConfig):
        super().__init__(config, add_pooling_layer=False)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> ViTMAEModelOutput:
        """
        Args:
            pixel_values: (B, C, H, W).
            noise: (B, P), which chooses the visible patches, those with the least noise. Default: random.
            interpolate_pos_encoding: as in `ZooViTModel`.

        Returns:
            `last_hidden_state` (B, prefix + K, D), and `mask`, `ids_restore` as in `random_masking`.
        """
        height, width = self.patch_grid(pixel_values)
        if noise is None:
            noise = torch.rand(pixel_values.shape[0], height * width, device=pixel_values.device)
        visible, mask, ids_restore = random_masking(noise, self.config.num_visible(height * width))
        hidden_states, rotary = self.embed(pixel_values, interpolate_pos_encoding, visible)
        outputs = self.encode(hidden_states, rotary, **kwargs)
        return ViTMAEModelOutput(last_hidden_state=outputs.last_hidden_state, mask=mask, ids_restore=ids_restore)


class MAEDecoder(nn.Module):
    """A small ViT from the states of visible patches, and a mask token for the others, to the pixels of all patches."""

    def __init__(self, config: ZooViTMAEConfig):
        super().__init__()
        sizes = config.decoder_config()
        self.num_prefix_tokens = config.num_prefix_tokens
        self.embed = nn.Linear(config.hidden_size, sizes.hidden_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, sizes.hidden_size))
        self.positions = PatchPositions(sizes)
        self.layers = TransformerStack(sizes, sizes.num_hidden_layers, backend_config=config)
        self.norm = make_norm(sizes)
        self.head = nn.Linear(sizes.hidden_size, config.patch_side**2 * config.num_channels)
        self._tp_plan = sizes.base_model_tp_plan  # transformers collects the plans of child modules

    def initialise(self, config):
        init.normal_(self.mask_token, std=config.initializer_range)

    def forward(self, hidden_states, ids_restore, height: int, width: int, **kwargs):
        """(B, prefix + K, D) and (B, P) -> (B, P, p p C)."""
        hidden_states = self.embed(hidden_states)
        prefix, visible = hidden_states.tensor_split([self.num_prefix_tokens], dim=1)
        num_masked = ids_restore.shape[1] - visible.shape[1]
        patches = torch.cat((visible, self.mask_token.expand(visible.shape[0], num_masked, -1)), dim=1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, patches.shape[2]))  # (B, P, D)
        dtype, device = patches.dtype, patches.device
        patches = patches + self.positions.vectors(height, width, dtype, device)
        rotary = self.positions.rotations(height, width, self.num_prefix_tokens, dtype, device)
        if self.positions.has_class_token:
            prefix = torch.cat((prefix[:, :1] + self.positions.class_vector(), prefix[:, 1:]), dim=1)
        hidden_states = self.layers(torch.cat((prefix, patches), dim=1), None, rotary=rotary, **kwargs)
        return self.head(self.norm(hidden_states)[:, self.num_prefix_tokens :])


class ZooViTMAEForPreTraining(ZooViTMAEPreTrainedModel):
    """The masked autoencoder: encoder, decoder, and the loss on the pixels of masked patches."""

    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: ZooViTMAEConfig):
        super().__init__(config)
        self.vit = ZooViTMAEModel(config)
        self.decoder = MAEDecoder(config)
        self.post_init()

    def patchify(self, images):
        """(B, C, H, W) -> (B, P, p p C), with the channels of a pixel side by side, as in stock."""
        size = self.config.patch_side
        patches = images.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, p, p)
        return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches, original_image_size: tuple[int, int] | None = None):
        """(B, P, p p C) -> (B, C, H, W), by default with H and W of `config.image_size`."""
        size, grid = self.config.patch_side, self.config.grid_size
        if original_image_size is not None:
            grid = original_image_size[0] // size, original_image_size[1] // size
        patches = patches.unflatten(2, (size, size, -1)).unflatten(1, grid)  # (B, rows, columns, p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def normalized_pixels(self, pixel_values):
        """Returns what the decoder learns to predict, (B, P, p p C)."""
        target = self.patchify(fit_channels(pixel_values, self.config.num_channels))
        if self.config.norm_pix_loss:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ViTMAEForPreTrainingOutput:
        """
        Args:
            pixel_values, noise, interpolate_pos_encoding: as in `ZooViTMAEModel`.
            num_items_in_batch: divisor of the loss summed over masked patches. Default: their number.

        Returns:
            `loss`, `logits` (B, P, p p C), `mask` and `ids_restore` (B, P); on request the encoder's `hidden_states`
            and `attentions`.
        """
        outputs = self.vit(pixel_values, noise, interpolate_pos_encoding, **kwargs)
        height, width = self.patch_grid(pixel_values)
        for name in ("output_attentions", "output_hidden_states"):
            kwargs.pop(name, None)
        logits = self.decoder(outputs.last_hidden_state, outputs.ids_restore, height, width, **kwargs)
        losses = (logits.float() - self.normalized_pixels(pixel_values).float()).square().mean(-1)  # (B, P)
        num_items = outputs.mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (losses * outputs.mask).sum() / as_divisor(num_items, losses.device)
        return ViTMAEForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=outputs.mask,
            ids_restore=outputs.ids_restore,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Renames stock ViTMAE keys in both directions. The decoder's blocks have one name in published checkpoints and another
# in those that transformers 5 saves.
register_checkpoint_conversion_mapping(
    ZooViTMAEConfig.model_type,
    [
        WeightRenaming([r"decoder\.decoder_layers\.", r"decoder\.decoder_encoder\.layer\."], r"decoder\.layers\."),
        WeightRenaming(r"decoder\.decoder_embed\.", r"decoder\.embed\."),
        WeightRenaming(r"decoder\.decoder_norm\.", r"decoder\.norm\."),
        WeightRenaming(r"decoder\.decoder_pred\.", r"decoder\.head\."),
        WeightConverter(
            [r"decoder\.decoder_pos_embed", r"decoder\.positions\.weight"],
            r"decoder\.positions\.weight",
            operations=[ResizePositions()],
        ),
        *VIT_RENAMINGS,
    ],
    overwrite=True,
)
