"""ViT: the encoder stack on patches of an image, treated as words (Dosovitskiy et al. 2021).

x_p = W patch_p + b                                          (equation 1)
h_0 = [class token; x_1; ...; x_P] + positions
h_l = block(h_(l-1)),  l = 1..L,  each patch seeing all others
p(class) = softmax(W_c norm(h_L)[class token])               (equation 4)

B batch, C channels, P patches, T tokens (class token, registers, patches), D hidden size, N heads
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .base import TransformerConfig, ZooPreTrainedModel
from .layers import (
    LearnedPositions2D,
    TransformerStack,
    classification_loss,
    make_norm,
    rotary_angles_2d,
    sinusoidal_encoding_2d,
)


@strict
class ZooViTConfig(BackboneConfigMixin, TransformerConfig):
    """A ViT. The defaults are ViT-B/16 at 224 pixels; stock spellings (`hidden_dropout_prob`, ...) are understood.

    Args:
        num_hidden_layers: number of blocks L.
        image_size: height and width in pixels, or [height, width], that the positions are made for; other sizes work,
            with positions in between.
        patch_size: side of a patch in pixels.
        num_channels: channels C of an image.
        pooling: what stands for the whole image: the `class` token, the `mean` of the patches (then there is no class
            token), or `both`, one behind the other.
        num_register_tokens: tokens of no meaning, for the model to keep notes in (Darcet et al. 2024).
        position_embedding_type: `learned`, a vector for each patch (the paper); `learned_2d`, half a vector for each
            row and half for each column (the paper's appendix D.4); `sinusoidal` in two dimensions, fixed (Carion et
            al. 2020, appendix A.4); or `rotary` in two dimensions (Heo et al. 2024) with base `rope_theta`.
        position_grid: rows and columns of patches that fixed and rotary positions count; another grid is laid over it.
            Default: those of `image_size`. It stays as it was when a checkpoint is loaded with another `image_size`.
        stem_channels: widths of a convolutional stem in front of the patches, from fine to coarse, each at half the
            resolution of the one before (section 3.1, "Hybrid architecture"); [] for none.
        out_features, out_indices: of a backbone: the blocks whose output is wanted, "stage1" being the first.

    `TransformerConfig` explains the rest.
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
    stock_model_types = ("vit", "vit_mae")

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
        if config_dict.get("model_type") == "zoo_vit_mae" and cls.model_type == "zoo_vit":  # its encoder
            known = {field.name for field in fields(cls)} | {"id2label", "label2id", "dtype"}
            config_dict = {name: value for name, value in config_dict.items() if name in known}
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        for option, only in {"pooler_act": "tanh", "pooler_output_size": self.hidden_size}.items():
            if (value := kwargs.pop(option, only)) not in (only, None):
                raise ValueError(f"a ViT config with {option}={value!r} has no equal in ZooViT (only {only!r})")
        kwargs.pop("encoder_stride", None)  # of a head that we do not have
        if not isinstance(self.patch_size, int):
            if len(set(self.patch_size)) != 1:
                raise ValueError(f"patch_size {list(self.patch_size)}: patches are square here, give one number")
            self.patch_size = self.patch_size[0]
        if not isinstance(self.image_size, int):
            self.image_size = list(self.image_size)
        self.stem_channels = list(self.stem_channels)
        self.position_grid = list(self.position_grid or self.grid_size)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        return (self.pooling != "mean") + self.num_register_tokens

    def validate_images(self):
        """Checks that image, patch and positions fit."""
        size = [self.image_size] if isinstance(self.image_size, int) else self.image_size
        if len(size) > 2 or self.patch_size < 1 or any(side < 1 or side % self.patch_size for side in size):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}: change one of them"
            )
        if self.patch_size % 2 ** len(self.stem_channels):
            raise ValueError(
                f"patch_size {self.patch_size} is not a multiple of the {2 ** len(self.stem_channels)} pixels that "
                f"stem_channels {self.stem_channels} make one"
            )
        if self.num_register_tokens < 0 or min([self.num_channels, *self.stem_channels]) < 1:
            raise ValueError("num_register_tokens must be at least 0, num_channels and stem_channels at least 1")
        needs = {"learned_2d": ("hidden_size", 2), "sinusoidal": ("hidden_size", 4), "rotary": ("head_dim", 4)}
        name, factor = needs.get(self.position_embedding_type, ("hidden_size", 1))
        if getattr(self, name) % factor:
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} needs {name} to be a multiple of {factor}, "
                f"not {getattr(self, name)}"
            )


class ZooViTPreTrainedModel(ZooPreTrainedModel):
    config_class = ZooViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embed"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"\bmask_token$"]  # of MAE and of masked image models

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (ClassAndRegisterTokens, PatchPositions)):
            for parameter in module.parameters(recurse=False):
                init.trunc_normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv2d) and not isinstance(module, PatchProjection):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015

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


# ------------------------------------------------------------------------------------------------- images to tokens


def patchify(images, patch_size: int):
    """Cuts images (B, C, H, W) into patches (B, P, C p p), row by row."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (B, C, rows, columns, p, p)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class PatchProjection(nn.Conv2d):
    """A linear map of each patch. Its weight (D, C, p, p) is a convolution's, as in stock; the product is the same."""

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int):
        super().__init__(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """(B, C, H, W) -> (B, P, D)."""
        return F.linear(patchify(images, self.kernel_size[0]), self.weight.flatten(1), self.bias)


class StemStage(nn.Module):
    """A residual block (He et al. 2016) that halves the resolution, normalised by groups, so that the images of a
    batch do not depend on each other (Wu and He 2018), as the paper's hybrids are."""

    def __init__(self, num_inputs: int, num_channels: int):
        super().__init__()
        groups = next(number for number in (32, 16, 8, 4, 2, 1) if num_channels % (2 * number) == 0 or number == 1)
        self.shortcut = nn.Conv2d(num_inputs, num_channels, 3, stride=2, padding=1, bias=False)
        self.shortcut_norm = nn.GroupNorm(groups, num_channels)
        self.conv1 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, num_channels)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, num_channels)

    def forward(self, images):
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        images = F.relu(self.shortcut_norm(self.shortcut(images)))
        branch = F.relu(self.norm1(self.conv1(images)))
        return F.relu(images + self.norm2(self.conv2(branch)))


class PatchEmbedding(nn.Module):
    """Images to one vector per patch, through the convolutional stem if there is one."""

    def __init__(self, config: ZooViTConfig):
        super().__init__()
        self.num_channels, self.patch_size = config.num_channels, config.patch_size
        widths = [config.num_channels, *config.stem_channels]
        self.stem = nn.Sequential(*(StemStage(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)))
        remaining = config.patch_size // 2 ** len(config.stem_channels)
        self.projection = PatchProjection(widths[-1], config.hidden_size, remaining)

    def forward(self, pixel_values):
        """(B, C, H, W) -> (B, P, D).

        Raises:
            ValueError: another number of channels, or a size that is not a multiple of the patch.
        """
        num_channels, height, width = pixel_values.shape[1:]
        if num_channels != self.num_channels:
            raise ValueError(
                f"pixel_values have {num_channels} channels, but num_channels is {self.num_channels}: convert the "
                "images, or set num_channels"
            )
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height} x {width} pixels does not divide into patches of {self.patch_size}: resize it "
                "to a multiple of patch_size"
            )
        return self.projection(self.stem(pixel_values.to(self.projection.weight.dtype)))


class ClassAndRegisterTokens(nn.Module):
    """What comes before the patches: the class token, if `pooling` wants one, and registers."""

    def __init__(self, config: ZooViTConfig):
        super().__init__()
        shapes = {"cls": (1, int(config.pooling != "mean")), "registers": (1, config.num_register_tokens)}
        for name, shape in shapes.items():
            token = nn.Parameter(torch.empty(*shape, config.hidden_size)) if shape[1] else None
            self.register_parameter(name, token)

    def forward(self, patches, class_position=0):
        """(B, P, D) -> (B, T, D)."""
        prefix = [] if self.cls is None else [self.cls + class_position]
        prefix += [] if self.registers is None else [self.registers]
        return torch.cat([*(token.expand(len(patches), -1, -1) for token in prefix), patches], dim=1)


class PatchPositions(nn.Module):
    """Where each patch of a grid is. An image of another size than `config.image_size` gets positions in between, as
    if its grid were laid over the one the model was made for (section 3.2)."""

    def __init__(self, config: ZooViTConfig):
        super().__init__()
        self.kind, self.grid_size, self.counted = config.position_embedding_type, config.grid_size, config.position_grid
        self.dim, self.head_dim, self.theta = config.hidden_size, config.head_dim, config.rope_theta
        self.has_class_token = config.pooling != "mean"
        rows, columns = self.grid_size
        learned = nn.Parameter(torch.empty(1, self.has_class_token + rows * columns, self.dim))
        self.register_parameter("weight", learned if self.kind == "learned" else None)
        self.halves = LearnedPositions2D(rows, columns, self.dim) if self.kind == "learned_2d" else None

    def class_vector(self):
        """The class token's position (1, 1, D), or 0 where it has none: stock checkpoints learn one."""
        return self.weight[:, :1] if self.has_class_token and self.kind == "learned" else 0

    def vectors(self, height: int, width: int, dtype: torch.dtype, device):
        """What to add to the patches of a grid, (1, height x width, D); 0 for rotary positions."""
        if self.kind == "rotary":
            return 0
        if self.kind == "sinusoidal":
            rows, columns = self.coordinates(height, width, device)
            return sinusoidal_encoding_2d(rows, columns, self.dim)[None].to(dtype)
        if self.kind == "learned_2d":
            grid = self.halves(*self.grid_size).flatten(0, 1)[None]
        else:
            grid = self.weight[:, int(self.has_class_token) :]
        return resize_positions(grid, self.grid_size, (height, width))

    def rotations(self, height: int, width: int, num_prefix_tokens: int, dtype: torch.dtype, device):
        """Cosines and sines (1, 1, T, H / 2) for attention, or None; tokens before the patches do not turn."""
        if self.kind != "rotary":
            return None
        rows, columns = self.coordinates(height, width, device)
        cosines, sines = rotary_angles_2d(rows, columns, self.head_dim, self.theta, dtype)
        prefix = (0, 0, num_prefix_tokens, 0)
        return F.pad(cosines, prefix, value=1.0), F.pad(sines, prefix)

    def coordinates(self, height: int, width: int, device):
        """Row and column (P,) of every patch, as places in `config.position_grid`."""
        places = [
            (torch.arange(number, device=device) + 0.5) * (counted / number) - 0.5
            for number, counted in zip((height, width), self.counted, strict=True)
        ]
        return [axis.flatten() for axis in torch.meshgrid(*places, indexing="ij")]


def resize_positions(grid, old: Sequence[int], new: Sequence[int]):
    """Vectors (1, rows x columns, D) of an old grid, interpolated to a new one."""
    if tuple(old) == tuple(new):
        return grid
    planes = grid.unflatten(1, tuple(old)).permute(0, 3, 1, 2).float()  # (1, D, rows, columns)
    planes = F.interpolate(planes, size=tuple(new), mode="bicubic", align_corners=False)
    return planes.permute(0, 2, 3, 1).flatten(1, 2).to(grid.dtype)


# ------------------------------------------------------------------------------------------------------- the models


class ZooViTModel(ZooViTPreTrainedModel):
    """Images to one vector per patch, and one for the whole: patches, blocks, norm, pooler.

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
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (B, C, H, W), normalised as the image processor does.
            interpolate_pos_encoding: False refuses images of another size than `config.image_size`.

        Returns:
            `last_hidden_state` (B, T, D), `pooler_output` (B, D).

        Raises:
            ValueError: another number of channels, a size that is not a multiple of the patch, attention maps asked of
                a backend that does not form them.
        """
        hidden_states, rotary = self.embed(pixel_values, interpolate_pos_encoding)
        return self.encode(hidden_states, rotary, **kwargs)

    def embed(self, pixel_values, interpolate_pos_encoding: bool | None = None, visible=None):
        """The tokens (B, T, D) that go into the first block, and the rotations for attention or None.

        visible: (B, K), the patches to keep; by default all of them.
        """
        height, width = (side // self.config.patch_size for side in pixel_values.shape[2:])
        if interpolate_pos_encoding is False and (height, width) != self.config.grid_size:
            raise ValueError(
                f"an image of {tuple(pixel_values.shape[2:])} pixels, but image_size is {self.config.image_size}: "
                "resize it, or leave out interpolate_pos_encoding=False"
            )
        patches = self.patch_embed(pixel_values)  # (B, P, D)
        dtype, device, num_prefix_tokens = patches.dtype, patches.device, self.config.num_prefix_tokens
        patches = patches + self.positions.vectors(height, width, dtype, device)
        rotary = self.positions.rotations(height, width, num_prefix_tokens, dtype, device)
        if visible is not None:
            patches = patches.take_along_dim(visible[..., None], dim=1)  # (B, K, D)
            if rotary is not None:
                prefix = torch.arange(num_prefix_tokens, device=device).expand(len(visible), -1)
                places = torch.cat((prefix, visible + num_prefix_tokens), dim=1)[:, None, :, None]
                rotary = tuple(angles.take_along_dim(places, dim=2) for angles in rotary)
        return self.dropout(self.tokens(patches, self.positions.class_vector())), rotary

    def encode(self, hidden_states, rotary, **kwargs) -> BaseModelOutputWithPooling:
        """Blocks, norm and pooler."""
        self.check_output_attentions(kwargs.pop("output_attentions", self.config.output_attentions))
        kwargs.pop("output_hidden_states", None)
        hidden_states = self.norm(self.layers(hidden_states, None, rotary=rotary, **kwargs))
        pooled = None if self.pooler is None else torch.tanh(self.pooler(pool(hidden_states, self.config)))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


def pool(hidden_states, config: ZooViTConfig):
    """One vector (B, D), or (B, 2 D) with pooling `both`, for the whole image."""
    parts = [hidden_states[:, 0]] if config.pooling != "mean" else []
    if config.pooling != "class":
        parts.append(hidden_states[:, config.num_prefix_tokens :].mean(1))
    return torch.cat(parts, dim=-1)


def pooled_size(config: ZooViTConfig) -> int:
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
            labels: as in `layers.classification_loss`; probabilities (B, num_labels) of the classes if
                `config.problem_type` is "single_label_classification".
            num_items_in_batch: what the summed loss is divided by; by default the number of images.
        """
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(pool(outputs.last_hidden_state, self.config))  # (B, num_labels)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ZooViTBackbone(BackboneMixin, ZooViTPreTrainedModel):
    """ViT as the backbone of a detector: the patches' states of some blocks, laid out as images."""

    _auto_class = "AutoBackbone"

    def __init__(self, config: ZooViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.vit = ZooViTModel(config, add_pooling_layer=False)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """
        Args:
            pixel_values: (B, C, H, W).

        Returns:
            `feature_maps`, one (B, D, H / p, W / p) for each of `config.out_features`, normalised by the last norm.
        """
        outputs = self.vit(pixel_values, output_hidden_states=True, **kwargs)
        height, width = (side // self.config.patch_size for side in pixel_values.shape[2:])
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
    """Learned positions of a checkpoint, interpolated where `image_size` asks for another grid."""

    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        grid, num_prefix = config.grid_size, int(config.pooling != "mean")
        num_old = weight.shape[1] - num_prefix
        if num_old != grid[0] * grid[1]:
            side = round(num_old**0.5)
            if side * side != num_old:
                raise ValueError(
                    f"image_size {config.image_size} needs {grid[0]} x {grid[1]} positions, and the {num_old} of the "
                    "checkpoint are no square to interpolate: leave image_size unchanged"
                )
            patches = resize_positions(weight[:, num_prefix:], (side, side), grid)
            weight = torch.cat((weight[:, :num_prefix], patches), dim=1)
        return {target_patterns[0]: weight}

    @property
    def reverse_op(self):
        return Unchanged()


class ResizeHalves(ConversionOps):
    """The same for the rows' or the columns' half of positions in two dimensions, `axis` 0 or 1 of the grid."""

    def __init__(self, axis: int):
        self.axis = axis

    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        resized = resize_positions(weight[None], (len(weight), 1), (config.grid_size[self.axis], 1))
        return {target_patterns[0]: resized[0]}

    @property
    def reverse_op(self):
        return Unchanged()


class Unchanged(ConversionOps):
    """What is saved of positions: as they are."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (found,) = input_dict.values()
        return {target_patterns[0]: found[0] if isinstance(found, list) else found}

    @property
    def reverse_op(self):
        return Unchanged()


# Stock ViT key names, both ways.
VIT_RENAMINGS = [
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
    WeightConverter(r"row_embeddings\.weight", r"row_embeddings\.weight", operations=[ResizeHalves(0)]),
    WeightConverter(r"column_embeddings\.weight", r"column_embeddings\.weight", operations=[ResizeHalves(1)]),
]
register_checkpoint_conversion_mapping(ZooViTConfig.model_type, VIT_RENAMINGS, overwrite=True)
