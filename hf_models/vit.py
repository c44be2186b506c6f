"""ViT: the encoder stack on patches of an image, treated as words (Dosovitskiy et al. 2021).

x_p = W patch_p + b                                          (equation 1)
h_0 = [class token; x_1; ...; x_P] + positions
h_l = block(h_(l-1)),  l = 1..L,  where each token attends to all tokens
p(class) = softmax(W_c norm(h_L)[class token])               (equation 4)

    B  batch    C  channels    P  patches    p  side of a patch    D  hidden size
    T  tokens (class token, registers, patches)
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .base import TransformerConfig, TransformerModel
from .layers import ENCODER_OUTPUTS, TransformerStack, make_norm
from .losses import classification_loss
from .packing import FirstToken
from .patches import (
    ClassAndRegisterTokens,
    PatchEmbedding,
    PatchPositions,
    check_channels,
    fit_channels,
    resize_positions,
)

# isort: split
# transformers fetches only the modules that this file imports by name; the modules above need these, too.
from .attention import MultiHeadAttention  # noqa: F401
from .positions import rotary_angles  # noqa: F401
from .projections import ResidualLinear  # noqa: F401


def grid_of(image_size, patch_size) -> tuple[int, int]:
    """Returns the rows and columns of patches; each size is a number of pixels or [height, width]."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    patch_size = patch_size if isinstance(patch_size, int) else patch_size[0]
    return height // patch_size, width // patch_size


@strict
class ZooViTConfig(BackboneConfigMixin, TransformerConfig):
    """The config of a ViT. The defaults are ViT-B/16's at 224 pixels; stock's names of fields (`hidden_dropout_prob`,
    ...) work too.

    Args:
        num_hidden_layers: number of blocks L.
        image_size: height and width in pixels, or [height, width], that the positions are made for; for other sizes
            they are interpolated.
        patch_size: side of a patch in pixels.
        num_channels: channels C of an image.
        pooling: the vector of the whole image: the `class` token, the `mean` of the patches (without a class token), or
            `both` joined.
        num_register_tokens: extra tokens that stand for no patch (Darcet et al. 2024).
        position_embedding_type: `learned`, a vector for each patch (the paper); `learned_2d`, half a vector for each
            row and half for each column (the paper's appendix D.4); `sinusoidal` in two dimensions, fixed (Carion et
            al. 2020, appendix A.4); or `rotary` in two dimensions (Heo et al. 2024) with base `rope_theta`.
        position_grid: rows and columns of patches that the positions are counted in; other grids are scaled to it.
            Default: those of `image_size`. If a checkpoint is loaded with another `image_size`, it stays the same; only
            `learned` positions are interpolated to the new grid, and saved in it.
        stem_channels: channels of the stages of a convolutional stem before the patches, each at half the resolution of
            the one before (section 3.1, "Hybrid architecture"). Default: no stem.
        out_features, out_indices: the blocks whose output a backbone returns; "stage1" is the first.

    `TransformerConfig` documents the other fields.
    """

    model_type = "zoo_vit"
    attribute_map = {
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "layer_norm_eps": "norm_eps",
    }
    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "vit.ZooViTConfig",
        "AutoModel": "vit.ZooViTModel",
        "AutoModelForImageClassification": "vit.ZooViTForImageClassification",
        "AutoBackbone": "vit.ZooViTBackbone",
    }
    _auto_class = "AutoConfig"
    stock_model_types: ClassVar[tuple[str, ...]] = ("vit", "vit_mae")

    num_hidden_layers: int = 12
    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int | list[int] | tuple[int, ...] = 16
    num_channels: int = 3
    norm_eps: float | int = 1e-12
    pooling: Literal["class", "mean", "both"] = "class"
    num_register_tokens: int = 0
    position_embedding_type: Literal["learned", "learned_2d", "sinusoidal", "rotary"] = "learned"
    rope_theta: float | int = 100.0
    position_grid: list[int] | tuple[int, ...] | None = None
    stem_channels: list[int] | tuple[int, ...] = ()
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if cls.model_type == "zoo_vit":  # load only the encoder of a masked autoencoder
            if config_dict.get("model_type") == "zoo_vit_mae":
                config_dict["model_type"] = cls.model_type
                config_dict.pop("auto_map", None)
            for name in [name for name in config_dict if name.startswith(("decoder_", "mask_ratio", "norm_pix_loss"))]:
                del config_dict[name]
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The positions of a checkpoint keep its own grid, even if `kwargs` override its `image_size`.
        size, patch = (config_dict.get(name, getattr(cls, name)) for name in ("image_size", "patch_size"))
        return super().from_dict({"position_grid": grid_of(size, patch), **config_dict}, **kwargs)

    def __post_init__(self, **kwargs):
        for option, only in {"pooler_act": "tanh", "pooler_output_size": self.hidden_size}.items():
            if (value := kwargs.pop(option, only)) not in (only, None):
                raise ValueError(f"a ViT config with {option}={value!r} cannot be loaded as a ZooViT (only {only!r})")
        kwargs.pop("encoder_stride", None)  # a field of a head that this package lacks
        if not isinstance(self.patch_size, int):
            if len(set(self.patch_size)) != 1:
                raise ValueError(f"patch_size {list(self.patch_size)}: patches are square here, give one number")
            self.patch_size = self.patch_size[0]
        if not isinstance(self.image_size, int):
            self.image_size = list(self.image_size) if len(self.image_size) > 1 else self.image_size[0]
        self.check_images()  # `grid_size` needs valid sizes
        self.stem_channels = list(self.stem_channels)
        self.position_grid = list(self.position_grid or self.grid_size)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    def to_dict(self):
        output = super().to_dict()
        if self.position_embedding_type == "learned":  # these were interpolated to the current grid
            output["position_grid"] = list(self.grid_size)
        return output

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`."""
        return grid_of(self.image_size, self.patch_size)

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels: `patch_size` as one number, which `__post_init__` makes of a pair."""
        assert isinstance(self.patch_size, int)
        return self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        return (self.pooling != "mean") + self.num_register_tokens

    def check_images(self):
        """Raises a `ValueError` unless an image divides into whole patches."""
        size = [self.image_size] if isinstance(self.image_size, int) else self.image_size
        if len(size) > 2 or self.patch_side < 1 or any(side < 1 or side % self.patch_side for side in size):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}: change one of them"
            )

    def validate_images(self):
        """Checks that the sizes of images, patches, stem and positions fit together."""
        assert self.position_grid is not None  # `__post_init__` fills it in
        self.check_images()
        if self.patch_side % 2 ** len(self.stem_channels):
            raise ValueError(
                f"patch_size {self.patch_size} is not a multiple of the {2 ** len(self.stem_channels)} pixels that "
                f"stem_channels {self.stem_channels} make one"
            )
        if len(self.position_grid) != 2 or min(self.position_grid) < 1:
            raise ValueError(f"position_grid {self.position_grid} must be two numbers, rows and columns")
        if self.num_register_tokens < 0 or min([self.num_channels, *self.stem_channels]) < 1:
            raise ValueError("num_register_tokens must be at least 0, num_channels and stem_channels at least 1")
        needs = {"learned_2d": ("hidden_size", 2), "sinusoidal": ("hidden_size", 4), "rotary": ("head_dim", 4)}
        name, factor = needs.get(self.position_embedding_type, ("hidden_size", 1))
        if getattr(self, name) % factor:
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} needs {name} to be a multiple of {factor}, "
                f"not {getattr(self, name)}"
            )


class ZooViTPreTrainedModel(TransformerModel):
    config: ZooViTConfig
    config_class = ZooViTConfig
    _can_record_outputs = ENCODER_OUTPUTS
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _input_embed_layer = "patch_embed"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"\bmask_token$"]  # weights of MAE and masked image models

    def patch_grid(self, pixel_values) -> tuple[int, int]:
        """Returns rows and columns of patches in images (B, C, H, W); raises a `ValueError` if images do not fit."""
        size = self.config.patch_size
        check_channels(pixel_values, self.config.num_channels)
        height, width = pixel_values.shape[2:]
        if height % size or width % size:
            raise ValueError(
                f"pixel_values of {height} x {width} do not divide into patches of {size}: resize the images to a "
                "multiple of patch_size"
            )
        return height // size, width // size

    def stock_class_and_config(self):
        import transformers

        stock_class = getattr(transformers, type(self).__name__.removeprefix("Zoo"), None)
        if stock_class is None:
            return super().stock_class_and_config()
        stock_config = self.make_stock_config(
            stock_class.config_class,
            norm_position="pre",
            qkv_bias=self.config.qkv_bias,
            position_embedding_type="learned",
            pooling="class",
            num_register_tokens=0,
            stem_channels=[],
        )
        return stock_class, stock_config


class ZooViTModel(ZooViTPreTrainedModel):
    """From images to one vector per token and one for the whole image: patches, blocks, norm, pooler.

    Args:
        add_pooling_layer: whether there is a pooler, tanh(W h[class token]).
    """

    _auto_class = "AutoModel"

    def __init__(self, config: ZooViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.patch_embed = PatchEmbedding(config)
        self.tokens = ClassAndRegisterTokens(config)
        self.positions = PatchPositions(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = TransformerStack(config, config.num_hidden_layers)
        self.norm = make_norm(config)
        self.pooler = nn.Linear(pooled_size(config), config.hidden_size) if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        only_first: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (B, C, H, W), normalised by the image processor. A model of grey images also takes colour
                images (B, 3, H, W), because pipelines open every image in colour.
            interpolate_pos_encoding: False refuses images of another size than `config.image_size`.
            only_first: whether only the first token's state is used. The last block then computes only this state
                (B, 1, D), and the others are 0. It has no effect with requested hidden states or attention maps, or if
                the pooler reads patches. The classifier of a class token sets it itself.

        Returns:
            `last_hidden_state` (B, T, D), `pooler_output` (B, D).

        Raises:
            ValueError: the number of channels is wrong; the size is not a multiple of the patch size; the backend does
                not compute the requested attention maps; or a keyword argument is unknown.
        """
        hidden_states, rotary = self.embed(pixel_values, interpolate_pos_encoding)
        return self.encode(hidden_states, rotary, only_first, **kwargs)

    def embed(self, pixel_values, interpolate_pos_encoding: bool | None = None, visible=None):
        """Returns the tokens (B, T, D) for the first block, and the rotations for attention or None.

        Args:
            visible: (B, K), indices of the patches to keep. Default: all of them.
        """
        height, width = self.patch_grid(pixel_values)
        if interpolate_pos_encoding is False and (height, width) != self.config.grid_size:
            raise ValueError(
                f"an image of {tuple(pixel_values.shape[2:])} pixels, but image_size is {self.config.image_size}: "
                "resize it, or leave out interpolate_pos_encoding=False"
            )
        patches = self.patch_embed(fit_channels(pixel_values, self.config.num_channels))  # (B, P, D)
        dtype, device, num_prefix_tokens = patches.dtype, patches.device, self.config.num_prefix_tokens
        patches = patches + self.positions.vectors(height, width, dtype, device)
        rotary = self.positions.rotations(height, width, num_prefix_tokens, dtype, device)
        if visible is not None:
            patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[2]))  # (B, K, D)
            if rotary is not None:
                prefix = torch.arange(num_prefix_tokens, device=device).expand(visible.shape[0], -1)
                kept = torch.cat((prefix, visible + num_prefix_tokens), dim=1)
                rotary = tuple(angles[0, 0, kept][:, None] for angles in rotary)  # (B, 1, prefix + K, head_dim / 2)
        return self.dropout(self.tokens(patches, self.positions.class_vector())), rotary

    def encode(self, hidden_states, rotary, only_first: bool = False, **kwargs) -> BaseModelOutputWithPooling:
        """Applies blocks, norm and pooler; `only_first` as in `forward`."""
        self.check_keywords(kwargs)
        wants_maps = kwargs.pop("output_attentions", self.config.output_attentions)
        self.check_output_attentions(wants_maps)
        wants_states = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        uses_others = wants_maps or wants_states or (self.pooler is not None and self.config.pooling != "class")
        first = FirstToken(hidden_states.shape[1]) if only_first and not uses_others else None
        hidden_states = self.norm(self.layers(hidden_states, None, rotary=rotary, output_tokens=first, **kwargs))
        if first is not None:
            hidden_states = first.unpack(hidden_states)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(pool(hidden_states, self.config)))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


def pool(hidden_states: torch.Tensor, config: ZooViTConfig, pooling: str | None = None) -> torch.Tensor:
    """Returns one vector for the whole image, (B, D), or (B, 2 D) with pooling `both`.

    Args:
        hidden_states: (B, T, D).
        pooling: as in `ZooViTConfig`. Default: the config's.
    """
    pooling = pooling or config.pooling
    parts = [hidden_states[:, 0]] if pooling != "mean" else []
    if pooling != "class":
        parts.append(hidden_states[:, config.num_prefix_tokens :].mean(1))
    return torch.cat(parts, dim=-1)


def pooled_size(config: ZooViTConfig) -> int:
    """Returns the size of the vector that `pool` returns."""
    return config.hidden_size * (2 if config.pooling == "both" else 1)


class ZooViTForImageClassification(ZooViTPreTrainedModel):
    """ViT with a linear classifier of the whole image."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: ZooViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ZooViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(pooled_size(config), config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: (B, C, H, W).
            labels: as in `losses.classification_loss`. Probabilities (B, num_labels) of the classes need
                `config.problem_type` "single_label_classification".
            num_items_in_batch: divisor of the summed loss. Default: the number of images.
            The other arguments are those of `ZooViTModel`.
        """
        kwargs["only_first"] = self.config.pooling == "class" and kwargs.get("only_first", True)
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(pool(outputs.last_hidden_state, self.config))  # (B, num_labels)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ZooViTBackbone(BackboneMixin, ZooViTPreTrainedModel):
    """ViT as the backbone of a detector: the patches' states after some blocks, as feature maps."""

    _auto_class = "AutoBackbone"

    def __init__(self, config: ZooViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.stride = config.patch_side  # pixels of the image per cell of a feature map
        self.vit = ZooViTModel(config, add_pooling_layer=False)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """
        Args:
            pixel_values: (B, C, H, W), of any size; they are padded with zeros at the right and the bottom.

        Returns:
            `feature_maps`, (B, D, ceil(H / p), ceil(W / p)) for each of `config.out_features`, after the last norm.
        """
        check_channels(pixel_values, self.config.num_channels)
        bottom, right = (-side % self.stride for side in pixel_values.shape[2:])
        pixel_values = F.pad(pixel_values, (0, right, 0, bottom))
        outputs = self.vit(pixel_values, output_hidden_states=True, **kwargs)
        height, width = self.patch_grid(pixel_values)
        maps = []
        for name, states in zip(self.config.stage_names, outputs.hidden_states, strict=True):
            if name in self.config.out_features:
                patches = self.vit.norm(states)[:, self.config.num_prefix_tokens :]
                maps.append(patches.transpose(1, 2).unflatten(2, (height, width)))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BackboneOutput(
            feature_maps=tuple(maps),
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.attentions,
        )


# ---------------------------------------------------------------------------------------------------- stock weights


class ResizePositions(ConversionOps):
    """Fits the learned positions of a checkpoint to the config: interpolates them to the grid of `image_size`, and
    removes the class token's position, or adds 0 for it, as `pooling` needs."""

    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        config = getattr(config, "backbone_config", None) or config  # a detector holds the ViT's config in its own
        old = tuple(config.position_grid)
        of_class, patches = weight.tensor_split([weight.shape[1] - math.prod(old)], dim=1)
        if of_class.shape[1] > 1 or patches.shape[1] < math.prod(old):
            raise ValueError(f"{target_patterns[0]} has {weight.shape[1]} positions, but position_grid is {old}")
        if config.pooling == "mean":
            of_class = of_class[:, :0]
        elif not of_class.shape[1]:
            of_class = torch.zeros_like(patches[:, :1])
        weight = torch.cat((of_class, resize_positions(patches, old, config.grid_size)), dim=1)
        return {target_patterns[0]: weight}

    @property
    def reverse_op(self):
        return Unchanged()


class Unchanged(ConversionOps):
    """Saves positions as they are: the reverse of `ResizePositions`."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (found,) = input_dict.values()
        return {target_patterns[0]: found[0] if isinstance(found, list) else found}

    @property
    def reverse_op(self):
        return Unchanged()


# Renames stock ViT keys in both directions.
VIT_RENAMINGS: list[WeightConverter | WeightRenaming] = [
    WeightRenaming(r"embeddings\.cls_token", r"tokens\.cls"),
    WeightRenaming(r"embeddings\.patch_embeddings\.projection\.", r"patch_embed\.projection\."),
    WeightRenaming(r"(?<!\w)encoder\.layer\.", r"(?<!decoder\.)(?<!\w)layers\."),
    WeightRenaming(r"\.attention\.attention\.query\.", r"\.attention\.q_proj\."),
    WeightRenaming(r"\.attention\.attention\.key\.", r"\.attention\.k_proj\."),
    WeightRenaming(r"\.attention\.attention\.value\.", r"\.attention\.v_proj\."),
    WeightRenaming(r"\.attention\.output\.dense\.", r"\.attention\.o_proj\."),
    WeightRenaming(r"\.layernorm_before\.", r"\.attention_norm\."),
    WeightRenaming(r"\.layernorm_after\.", r"\.feed_forward_norm\."),
    WeightRenaming(r"\.intermediate\.dense\.", r"\.feed_forward\.up_proj\."),
    WeightRenaming(r"(?<=\d)\.output\.dense\.", r"\.feed_forward\.down_proj\."),
    WeightRenaming(r"(?<!\w)layernorm\.", r"(?<!decoder\.)(?<!\w)norm\."),
    WeightRenaming(r"pooler\.dense\.", r"(?<!\w)pooler\."),
    WeightConverter(
        [r"embeddings\.position_embeddings", r"(?<!decoder\.)(?<!\w)positions\.weight"],
        r"(?<!decoder\.)(?<!\w)positions\.weight",
        operations=[ResizePositions()],
    ),
]
register_checkpoint_conversion_mapping(ZooViTConfig.model_type, VIT_RENAMINGS, overwrite=True)
