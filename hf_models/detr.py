"""DETR: a convolutional backbone, the encoder on the cells of its feature map, and a decoder whose queries each predict
one object or none (Carion et al. 2020).

z_0 = W_p backbone(image)                                    one token for each cell
z   = encoder(z_0), positions added to queries and keys of every block
q_l = decoder block_l(q_(l-1), z),  l = 1..L                 queries attend to each other and to all cells
p(class), box = softmax(W_c norm(q_l)), sigmoid(MLP(norm(q_l)))

`matching.py` has the matching of predictions with objects, and the loss. Four options, each of a later paper, let DETR
learn from few images; the published models do not use them: queries that are boxes, denoising, attention that starts at
the query's box, and queries that the encoder proposes.

    B  batch    S  cells of the feature map (tokens)         Q  queries            D  hidden size
    C  classes  M  the largest number of boxes in an image   L  decoder layers     G  denoising groups
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.detr.modeling_detr import DetrDecoderOutput, DetrModelOutput, DetrObjectDetectionOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbones import make_backbone, make_backbone_config, num_features, read_stock_backbone, stock_backbone_config
from .base import TransformerConfig, TransformerModel
from .cells import CellPositions, Cells, SpatialPrior, correct, encode_boxes, locate_cells
from .layers import DECODER_OUTPUTS, ENCODER_OUTPUTS, TransformerStack, make_norm
from .matching import (
    check_labels,
    decoder_mask,
    denoising_assignment,
    denoising_queries,
    detection_loss,
    pad_labels,
)
from .patches import check_channels, fit_channels
from .projections import ResidualLinear
from .resnet import (
    RESNETS,
    ResNet,
    initialise_resnet,
    rename,
    stock_renamings,
    timm_renamings,
)
from .vit import ZooViTBackbone, ZooViTConfig

# isort: split
# transformers fetches only the modules that this file imports by name; the modules above need these, too.
from .attention import MultiHeadAttention  # noqa: F401
from .losses import as_divisor  # noqa: F401
from .packing import FirstToken  # noqa: F401
from .positions import rotary_angles  # noqa: F401

PROPOSED_SIZE = 3  # side, in cells, of the box that each cell proposes before its correction


@strict
class ZooDetrConfig(TransformerConfig):
    """The config of a DETR. The defaults are DETR-R50's; stock's names of fields (`d_model`, ...) work too.

    Args:
        num_encoder_layers, num_decoder_layers: number of blocks in each stack.
        num_queries: Q, the largest number of objects that the model can find in an image.
        num_channels: channels of an image.
        backbone: one of `resnet.RESNETS`.
        backbone_config: instead of `backbone`, the config of any `AutoBackbone`. The model uses its last feature map,
            and freezes its batch norms.
        backbone_norm: `frozen_batch` for pre-trained weights, whose stem and first stage are then not trained; or
            `group` (Wu and He 2018) to train from scratch, where padding changes an image's predictions slightly.
        dilation: whether the last stage dilates its convolutions instead of halving the resolution (DC5).
        position_embedding_type: positions of the cells: `sinusoidal` in two dimensions, or `learned` for rows and
            columns.
        classification_loss: `cross_entropy` over the classes and "no object" (the paper); `focal`, a binary loss for
            each class (Lin et al. 2017); or `varifocal`, whose scores also predict how well the box fits (Zhang et al.
            2021).
        auxiliary_loss: whether all decoder layers are trained to predict objects, or only the last.
        repeats_norm: whether each decoder layer gets the output of the layer before after the final norm, as in
            checkpoints that transformers trained with its `auxiliary_loss`. The paper and its code do not do this.
        no_object_weight: weight of a query without an object in `cross_entropy`.
        class_cost, bbox_cost, giou_cost: weights of probability, L1 distance and generalised IoU in the matching.
        class_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient: their weights in the loss.
        anchor_queries: whether a query is a box that every layer refines (Liu et al. 2022, "DAB-DETR").
        spatial_prior: whether cross-attention favours cells near the query's box (Gao et al. 2021, "SMCA"). It needs
            `anchor_queries`.
        query_selection: whether cells propose boxes and the best ones become queries (Zhu et al. 2021, section 4.2). It
            needs `anchor_queries` and a focal loss.
        num_denoising_groups: G, number of noisy copies of the true boxes that the decoder learns to correct in training
            (Li et al. 2022, "DN-DETR"). They need `anchor_queries`.
        box_noise: largest relative change of a copied box's sides. Its centre moves by at most half of that.
        label_noise: probability that a copied box gets a random class.

    `TransformerConfig` documents the other fields.
    """

    model_type = "zoo_detr"
    attribute_map = {
        "d_model": "hidden_size",
        "encoder_layers": "num_encoder_layers",
        "num_hidden_layers": "num_decoder_layers",  # transformers takes the depth of caches from it
        "decoder_layers": "num_decoder_layers",
        "encoder_attention_heads": "num_attention_heads",
        "decoder_attention_heads": "num_attention_heads",
        "encoder_ffn_dim": "intermediate_size",
        "decoder_ffn_dim": "intermediate_size",
        "dropout": "hidden_dropout",
        "activation_function": "hidden_act",
        "init_std": "initializer_range",
        "eos_coefficient": "no_object_weight",
    }
    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "detr.ZooDetrConfig",
        "AutoModel": "detr.ZooDetrModel",
        "AutoModelForObjectDetection": "detr.ZooDetrForObjectDetection",
    }
    _auto_class = "AutoConfig"
    stock_model_types = ("detr",)
    sub_configs = {"backbone_config": AutoConfig}

    is_encoder_decoder: bool = True
    hidden_size: int = 256
    num_attention_heads: int = 8
    intermediate_size: int | None = 2048
    hidden_act: str = "relu"
    norm_position: Literal["pre", "post"] = "post"
    hidden_dropout: float | int = 0.1
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    num_queries: int = 100
    num_channels: int = 3
    backbone: str | None = "resnet50"
    backbone_config: dict | PreTrainedConfig | None = None
    backbone_norm: Literal["frozen_batch", "group"] = "frozen_batch"
    dilation: bool = False
    position_embedding_type: Literal["sinusoidal", "learned"] = "sinusoidal"
    classification_loss: Literal["cross_entropy", "focal", "varifocal"] = "cross_entropy"
    auxiliary_loss: bool = True
    repeats_norm: bool = False
    no_object_weight: float | int = 0.1
    class_cost: float | int = 1
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_coefficient: float | int = 1
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    anchor_queries: bool = False
    spatial_prior: bool = False
    query_selection: bool = False
    num_denoising_groups: int = 0
    box_noise: float | int = 0.4
    label_noise: float | int = 0.2

    @property
    def stacks(self) -> dict[str, bool]:
        return {"encoder.layers": False, "decoder.layers": True}

    def plan_tensor_parallelism(self) -> dict[str, str]:
        plan = super().plan_tensor_parallelism()
        if self.spatial_prior:  # its term has all heads, so each process keeps all heads of cross-attention
            plan = {path: style for path, style in plan.items() if "cross_attention" not in path}
        return plan

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if "d_model" in config_dict:  # a stock checkpoint
            if config_dict["position_embedding_type"] == "sine":
                config_dict["position_embedding_type"] = "sinusoidal"
            config_dict["repeats_norm"] = config_dict["auxiliary_loss"]
            config_dict.update(read_stock_backbone(config_dict))
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        for option in ("activation_dropout", "encoder_layerdrop", "decoder_layerdrop"):
            if value := kwargs.pop(option, 0):
                raise ValueError(f"a DETR config with {option}={value} cannot be loaded as a ZooDetr (only 0)")
        for name in ("attention_heads", "ffn_dim"):
            pair = [kwargs.get(f"{stack}_{name}") for stack in ("encoder", "decoder")]
            if None not in pair and pair[0] != pair[1]:
                raise ValueError(
                    f"encoder_{name} and decoder_{name} are {pair[0]} and {pair[1]}: they must be the same"
                )
        if isinstance(self.backbone_config, dict):
            self.backbone_config = make_backbone_config(self.backbone_config, {"zoo_vit": ZooViTConfig})
        if self.backbone_config is not None:
            self.backbone = None
        super().__post_init__(**kwargs)

    def validate_detection(self):
        """Checks that the options fit together."""
        if self.backbone_config is None and self.backbone not in RESNETS:
            raise ValueError(
                f"backbone is {self.backbone!r}; choose one of {', '.join(RESNETS)}, or set backbone_config"
            )
        for field in ("num_encoder_layers", "num_decoder_layers", "num_queries"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if self.hidden_size % 4:
            raise ValueError(
                f"positions in two dimensions need hidden_size to be a multiple of 4, not {self.hidden_size}"
            )
        for field in ("spatial_prior", "query_selection", "num_denoising_groups"):
            if getattr(self, field) and not self.anchor_queries:
                raise ValueError(f"{field} needs anchor_queries=True")
        if self.class_weights is not None:
            raise ValueError("class_weights is set, but DETR weighs only 'no object', by no_object_weight")
        if self.query_selection and self.classification_loss == "cross_entropy":
            raise ValueError("query_selection needs classification_loss='focal' or 'varifocal'")


class ZooDetrPreTrainedModel(TransformerModel):
    config: ZooDetrConfig
    config_class = ZooDetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _input_embed_layer = "input_projection"
    _keys_to_ignore_on_load_unexpected = [r"num_batches_tracked$"]

    def init_parallel_plans(self):
        super().init_parallel_plans()
        if isinstance(self, (ZooDetrEncoder, ZooDetrDecoder)):
            # transformers gives the config's plan to each of them, but its paths begin at `ZooDetrModel`.
            self._tp_plan = {}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            is_residual = isinstance(module, ResidualLinear) and self.config.residual_init != "normal"
            if not (is_residual or isinstance(module, ZeroLinear)):
                init.xavier_uniform_(module.weight)  # section 4
            if isinstance(module, ClassHead) and self.config.classification_loss != "cross_entropy":
                # Objects are rare, so each class starts with probability 0.01 (Lin et al. 2017, section 4.1).
                init.constant_(module.bias, -math.log(99))
        initialise_resnet(module)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, ResNet) and module.norm_kind == "frozen_batch":
                module.freeze_start()  # transformers makes all loaded weights trainable
        return loaded

    def classify(self, head: "ClassHead", states):
        """From states (..., D) to logits (..., C + 1), the last one for "no object"."""
        logits = head(states)
        if self.config.classification_loss == "cross_entropy":
            return logits
        # Image processors take a softmax. With a logit of 0 for "no object" the probability of a class is then close to
        # its sigmoid, if it is the only likely one.
        return F.pad(logits, (0, 1))

    def stock_class_and_config(self):
        import transformers

        config = self.config
        stock_class = getattr(transformers, type(self).__name__.removeprefix("Zoo"), None)
        if stock_class is None:
            return super().stock_class_and_config()
        stock_config = self.make_stock_config(
            stock_class.config_class,
            norm_position="post",
            classification_loss="cross_entropy",
            class_loss_coefficient=1,
            anchor_queries=False,
            backbone_norm="frozen_batch",
            backbone_config=None,  # the stock backbone has other weight names
            norm_eps=1e-5,
        )
        stock_config.auxiliary_loss = config.repeats_norm  # in stock, this option also repeats the norm
        if config.position_embedding_type == "sinusoidal":
            stock_config.position_embedding_type = "sine"
        stock_config.backbone_config = stock_backbone_config(config)
        return stock_class, stock_config

    def stock_weights(self):
        weights = super().stock_weights()
        if not self.config.dilation:
            return weights
        to_timm = [*STOCK_BACKBONE, *(renaming.reverse_transform() for renaming in reversed(TIMM_BACKBONE))]
        return {rename(name, to_timm): weight for name, weight in weights.items()}


class ZeroLinear(nn.Linear):
    """A linear layer whose weight starts at zero."""

    def initialise(self, config):
        init.zeros_(self.weight)


class MLP(nn.Module):
    """Linear layers of the given sizes with ReLU between them; `last` is the class of the last layer."""

    def __init__(self, *sizes: int, last: type[nn.Linear] = nn.Linear):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(sizes[:-2], sizes[1:-1], strict=True)
        )
        self.layers.append(last(sizes[-2], sizes[-1]))

    def forward(self, states):
        *hidden, last = self.layers
        for layer in hidden:
            states = F.relu(layer(states))
        return last(states)


class ClassHead(nn.Linear):
    """Scores the C classes, and with cross-entropy also "no object"."""

    def __init__(self, config: ZooDetrConfig):
        super().__init__(config.hidden_size, config.num_labels + (config.classification_loss == "cross_entropy"))


class BoxHead(MLP):
    """Predicts a box before the sigmoid; or with `anchor_queries` the correction of a box, which starts at zero."""

    def __init__(self, config: ZooDetrConfig):
        last = ZeroLinear if config.anchor_queries else nn.Linear
        super().__init__(config.hidden_size, config.hidden_size, config.hidden_size, 4, last=last)


# ------------------------------------------------------------------------------------------------ encoder, decoder


class ZooDetrEncoder(ZooDetrPreTrainedModel):
    """The encoder stack on the cells."""

    _can_record_outputs = ENCODER_OUTPUTS

    def __init__(self, config: ZooDetrConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = TransformerStack(config, config.num_encoder_layers)
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, inputs_embeds, attention_mask=None, position_embeddings=None, **kwargs) -> BaseModelOutput:
        """
        Args:
            inputs_embeds: (B, S, D).
            attention_mask: which cells are not padding, in the form of the attention backend.
            position_embeddings: (1 or B, S, D), added to queries and keys in every block.
        """
        hidden_states = self.dropout(inputs_embeds)
        hidden_states = self.layers(hidden_states, attention_mask, None, None, position_embeddings, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


@dataclass
class ZooDetrDecoderOutput(DetrDecoderOutput):
    """Adds `boxes`: (L, B, Q, 4), the predictions of each layer with `anchor_queries`, or None."""

    boxes: torch.Tensor | None = None


class ZooDetrDecoder(ZooDetrPreTrainedModel):
    """The decoder stack on the queries."""

    _can_record_outputs = DECODER_OUTPUTS

    def __init__(self, config: ZooDetrConfig):
        super().__init__(config)
        dim = config.hidden_size
        self.layers = TransformerStack(config, config.num_decoder_layers, cross_attention=True)
        self.norm = make_norm(config)
        self.anchor_positions = MLP(2 * dim, dim, dim) if config.anchor_queries else None
        self.box_head = BoxHead(config) if config.anchor_queries else None
        self.spatial_prior = SpatialPrior(config) if config.spatial_prior else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds,
        queries,
        attention_mask=None,
        *,
        encoder_hidden_states,
        encoder_attention_mask=None,
        encoder_position_embeddings=None,
        cells: Cells,
        **kwargs,
    ) -> ZooDetrDecoderOutput:
        """
        Args:
            inputs_embeds: (B, Q, D), the initial states of the queries.
            queries: (B, Q, D), the positions of the queries; with `anchor_queries` (B, Q, 4), their boxes.
            attention_mask, encoder_attention_mask: which queries and which cells the queries may attend to, in the form
                of the attention backend.
            encoder_hidden_states, encoder_position_embeddings: (B, S, D), states and positions of the cells.
            cells: the positions of the cells.
        """
        hidden_states, positions, boxes, states = inputs_embeds, queries, [], []
        for block in self.layers:
            cell_mask = encoder_attention_mask
            if self.anchor_positions is not None:
                encoded = encode_boxes(queries, self.config.hidden_size // 2)
                positions = self.anchor_positions(encoded.to(hidden_states.dtype))
            if self.spatial_prior is not None:
                cell_mask = self.spatial_prior(queries, cells).to(hidden_states.dtype)
                if cells.is_image is not None:
                    is_padding = ~cells.is_image.flatten(1)[:, None, None]
                    cell_mask = cell_mask.masked_fill(is_padding, torch.finfo(cell_mask.dtype).min)
            hidden_states = block(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                cell_mask,
                positions,
                encoder_position_embeddings,
                **kwargs,
            )
            states.append(self.norm(hidden_states))
            if self.config.repeats_norm:
                hidden_states = states[-1]
            if self.box_head is not None:
                boxes.append(correct(queries, self.box_head(states[-1])))
                queries = boxes[-1].detach()  # each layer learns only to correct the boxes that it gets
        if self.config.repeats_norm:
            states[-1] = self.norm(hidden_states)
        return ZooDetrDecoderOutput(
            last_hidden_state=states[-1],
            intermediate_hidden_states=torch.stack(states),
            boxes=torch.stack(boxes) if boxes else None,
        )


# ---------------------------------------------------------------------------------------------------------- models


@dataclass
class ZooDetrModelOutput(DetrModelOutput):
    """Adds `boxes` (L, B, Q, 4), the predictions of each layer with `anchor_queries`; and with `query_selection` the
    cells' predictions, `proposal_logits` (B, S, C + 1), `proposal_boxes` (B, S, 4), and `proposal_mask` (B, S), false
    where a cell is padding, or None without a `pixel_mask`.
    """

    boxes: torch.Tensor | None = None
    proposal_logits: torch.Tensor | None = None
    proposal_boxes: torch.Tensor | None = None
    proposal_mask: torch.Tensor | None = None


class Denoising(NamedTuple):
    """G noisy copies of the up to M true boxes of each image, which the decoder learns to correct."""

    classes: Tensor  # (B, G M)
    boxes: Tensor  # (B, G M, 4)
    attention_mask: Tensor  # (B, 1, G M + Q, G M + Q), true where a query may attend to another


class ZooDetrModel(ZooDetrPreTrainedModel):
    """From images to one vector for each query: backbone, encoder, decoder."""

    _auto_class = "AutoModel"

    def __init__(self, config: ZooDetrConfig):
        super().__init__(config)
        self.backbone = make_backbone(config, {"zoo_vit": ZooViTBackbone})
        self.input_projection = nn.Conv2d(num_features(self.backbone), config.hidden_size, kernel_size=1)
        self.positions = CellPositions(config)
        self.encoder = ZooDetrEncoder(config)
        self.decoder = ZooDetrDecoder(config)
        self.query_embed = nn.Embedding(config.num_queries, config.hidden_size)
        learns_anchors = config.anchor_queries and not config.query_selection
        self.anchors = nn.Embedding(config.num_queries, 4) if learns_anchors else None
        self.label_embed = nn.Embedding(config.num_labels, config.hidden_size) if config.num_denoising_groups else None
        self.proposal_class_head = self.proposal_box_head = None
        if config.query_selection:
            self.proposal_class_head, self.proposal_box_head = ClassHead(config), BoxHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        denoising: Denoising | None = None,
        **kwargs,
    ) -> ZooDetrModelOutput:
        """
        Args:
            pixel_values: (B, channels, height, width), normalised, with padding by zeros at the right and the bottom. A
                model of grey images also takes colour images.
            pixel_mask: (B, height, width), 1 on the image and 0 on padding. Default: there is no padding.
            denoising: in training, queries that are placed before the model's own.

        Raises:
            ValueError: the number of channels or the shape of the mask is wrong, an option of the config does not work
                with the attention backend, or a keyword argument is unknown.
        """
        config = self.config
        self.check_keywords(kwargs)
        self.check_output_attentions(kwargs.get("output_attentions", config.output_attentions))
        check_channels(pixel_values, config.num_channels)
        if (config.spatial_prior or denoising) and config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"spatial_prior and denoising add terms to attention, which {config._attn_implementation!r} does not "
                "take: call model.set_attn_implementation('sdpa')"
            )
        pixel_values = fit_channels(pixel_values, config.num_channels).to(self.dtype)
        features = self.backbone(pixel_values)
        features = features if isinstance(features, Tensor) else features.feature_maps[-1]  # (B, C', h, w)
        cells = locate_cells(pixel_mask, pixel_values, features, getattr(self.backbone, "stride", None))
        tokens = self.input_projection(features).flatten(2).transpose(1, 2)  # (B, S, D)
        positions = self.positions(cells).to(tokens.dtype)
        is_token = None if cells.is_image is None else cells.is_image.flatten(1)
        mask = create_bidirectional_mask(config=config, inputs_embeds=tokens, attention_mask=is_token)
        encoded = self.encoder(tokens, mask, positions, **kwargs)
        memory = encoded.last_hidden_state

        proposal_logits = proposal_boxes = proposal_mask = None
        contents = self.query_embed.weight.expand(memory.shape[0], -1, -1)  # (B, Q, D)
        if config.query_selection:
            (proposal_logits, proposal_boxes), proposal_mask = self.propose(memory, cells), is_token
            queries = self.select(proposal_logits, proposal_boxes, is_token)
            contents = contents[:, : queries.shape[1]]
        elif self.anchors is not None:
            queries = self.anchors.weight.float().sigmoid().expand(memory.shape[0], -1, -1)  # (B, Q, 4)
        else:
            contents, queries = torch.zeros_like(contents), contents
        query_mask = None
        if denoising is not None:
            assert self.label_embed is not None
            contents = torch.cat((self.label_embed(denoising.classes).to(contents.dtype), contents), dim=1)
            queries = torch.cat((denoising.boxes.clamp(min=1e-3), queries), dim=1)
            num_tokens = contents.shape[1]  # smaller than the mask if query selection finds fewer cells than queries
            may_attend = denoising.attention_mask[..., :num_tokens, :num_tokens]
            query_mask = torch.zeros_like(may_attend, dtype=contents.dtype)
            query_mask = query_mask.masked_fill(~may_attend, torch.finfo(contents.dtype).min)
        decoded = self.decoder(
            contents,
            queries,
            query_mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=create_bidirectional_mask(
                config=config, inputs_embeds=contents, attention_mask=is_token, encoder_hidden_states=memory
            ),
            encoder_position_embeddings=positions,
            cells=cells,
            **kwargs,
        )
        return ZooDetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            boxes=decoded.boxes,
            proposal_logits=proposal_logits,
            proposal_boxes=proposal_boxes,
            proposal_mask=proposal_mask,
        )

    def propose(self, memory, cells: Cells):
        """Returns the proposals of the cells: logits (B, S, C + 1), and boxes (B, S, 4), corrected from a box around
        each cell."""
        assert self.proposal_class_head is not None and self.proposal_box_head is not None
        middle = torch.stack(torch.broadcast_tensors(cells.columns[:, None], cells.rows[:, :, None]), dim=-1)
        size = (PROPOSED_SIZE * cells.size)[:, None, None].expand_as(middle)  # (B, h, w, 2)
        boxes = torch.cat((middle, size), dim=-1).flatten(1, 2)
        return self.classify(self.proposal_class_head, memory), correct(boxes, self.proposal_box_head(memory))

    def select(self, logits, boxes, is_token):
        """Returns the boxes (B, min(Q, S), 4) of the cells with the likeliest objects.

        An image with fewer than Q cells in a batch with more gets boxes of padding for the rest.
        """
        scores = logits[..., :-1].amax(-1)  # (B, S)
        if is_token is not None:
            scores = scores.masked_fill(~is_token, -math.inf)
        best = scores.topk(min(self.config.num_queries, scores.shape[1]), dim=1).indices
        return boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()


class ZooDetrForObjectDetection(ZooDetrPreTrainedModel):
    """DETR with its two heads, which predict the class and the box of each query."""

    _auto_class = "AutoModelForObjectDetection"
    accepts_loss_kwargs = False  # `Trainer` would count other items

    def __init__(self, config: ZooDetrConfig):
        super().__init__(config)
        self.model = ZooDetrModel(config)
        self.class_head = ClassHead(config)
        self.box_head = None if config.anchor_queries else BoxHead(config)  # otherwise the decoder has it
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        num_items_in_batch: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> DetrObjectDetectionOutput:
        """
        Args:
            pixel_values, pixel_mask: as in `ZooDetrModel`.
            labels: for each image `class_labels` (n,) and `boxes` (n, 4): centre x and y, width and height, in parts
                of the unpadded image. In training with `num_denoising_groups` also `noise` (G, n, 5), uniform numbers
                from 0 to 1, which are drawn here if missing.
            num_items_in_batch: divisors of the loss, as `matching.count_items` counts them. Default: those of this
                batch.

        Returns:
            `logits` (B, Q, C + 1), the last one for "no object", and `pred_boxes` (B, Q, 4) as in `labels`; with labels
            `loss`, `loss_dict`, and with `auxiliary_loss` the predictions of the other layers in `auxiliary_outputs`.

        Raises:
            ValueError: labels do not fit the model, or numbers are not finite, and the message names the image; or
                `num_items_in_batch` is a number or lacks a key.
        """
        config, targets, denoising = self.config, None, None
        if labels is not None:
            check_labels(labels, config.num_labels)
            targets = pad_labels(labels, pixel_values.device)
            if self.training and config.num_denoising_groups:
                denoising, assignment = self.make_denoising(labels, targets)
        outputs = self.model(pixel_values, pixel_mask, denoising, **kwargs)
        states, boxes = outputs.intermediate_hidden_states, outputs.boxes  # (L, B, T, D), (L, B, T, 4)
        if labels is None or not config.auxiliary_loss:
            states, boxes = states[-1:], None if boxes is None else boxes[-1:]
        logits = self.classify(self.class_head, states).float()
        if self.box_head is not None:  # otherwise the decoder has found the boxes
            boxes = self.box_head(states).float().sigmoid()
        noised = None
        if denoising is not None:
            num_noised = assignment.shape[1]
            noised = (logits[:, :, :num_noised], boxes[:, :, :num_noised], assignment)
            logits, boxes = logits[:, :, num_noised:], boxes[:, :, num_noised:]

        loss = loss_dict = auxiliary_outputs = None
        if targets is not None:
            predictions = [(logits, boxes)]
            if outputs.proposal_logits is not None:
                predictions.append((outputs.proposal_logits[None].float(), outputs.proposal_boxes[None]))
            loss, loss_dict = detection_loss(
                predictions, targets, config, num_items_in_batch, noised, outputs.proposal_mask
            )
            auxiliary_outputs = [
                {"logits": logits[layer], "pred_boxes": boxes[layer]} for layer in range(len(logits) - 1)
            ]
        return DetrObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[-1],
            pred_boxes=boxes[-1],
            auxiliary_outputs=auxiliary_outputs or None,
            **{
                name: getattr(outputs, name)
                for name in (
                    "last_hidden_state",
                    "decoder_hidden_states",
                    "decoder_attentions",
                    "cross_attentions",
                    "encoder_last_hidden_state",
                    "encoder_hidden_states",
                    "encoder_attentions",
                )
            },
        )

    def make_denoising(self, labels, targets) -> tuple[Denoising, Tensor]:
        """Returns the denoising queries of a batch, and the index (B, G M) of the true box of each."""
        config, (batch, num_boxes) = self.config, targets.classes.shape
        num_groups = config.num_denoising_groups
        noise = torch.rand(batch, num_groups, num_boxes, 5, device=targets.boxes.device)
        for number, image in enumerate(labels):
            if "noise" in image:
                given = (num_groups, len(image["class_labels"]), 5)
                if image["noise"].shape != given:
                    raise ValueError(
                        f"labels[{number}]: noise has shape {tuple(image['noise'].shape)}, but (num_denoising_groups, "
                        f"boxes, 5) is {given}"
                    )
                noise[number, :, : given[1]] = image["noise"]
        classes, boxes = denoising_queries(targets, noise, config)
        mask = decoder_mask(num_groups * num_boxes, num_boxes, config.num_queries, targets.is_box)
        return Denoising(classes, boxes, mask), denoising_assignment(targets, num_groups)


BACKBONES = [r"(?<!\w)backbone\.model\.", r"(?<!\w)backbone\.conv_encoder\.model\."]  # the second is in older files

TIMM_BACKBONE = timm_renamings(r"(?<!\w)backbone\.", BACKBONES)
STOCK_BACKBONE = stock_renamings(r"(?<!\w)backbone\.", BACKBONES)

# Renames stock DETR keys in both directions.
DETR_RENAMINGS: list[WeightConverter | WeightRenaming] = [
    *TIMM_BACKBONE,
    *STOCK_BACKBONE,
    WeightRenaming(r"position_embedding\.(row|column)_embeddings", r"positions\.learned\.\1_embeddings"),
    WeightRenaming(r"query_position_embeddings\.", r"query_embed\."),
    WeightRenaming(r"\.self_attn\.", r"(?<=\d)\.attention\."),
    WeightRenaming(r"\.encoder_attn\.", r"(?<=\d)\.cross_attention\."),
    WeightRenaming(r"\.out_proj\.", r"\.o_proj\."),
    WeightRenaming(r"\.self_attn_layer_norm\.", r"(?<=\d)\.attention_norm\."),
    WeightRenaming(r"\.encoder_attn_layer_norm\.", r"(?<=\d)\.cross_attention_norm\."),
    WeightRenaming(r"\.final_layer_norm\.", r"\.feed_forward_norm\."),
    WeightRenaming([r"\.mlp\.fc1\.", r"(?<=\d)\.fc1\."], r"\.feed_forward\.up_proj\."),
    WeightRenaming([r"\.mlp\.fc2\.", r"(?<=\d)\.fc2\."], r"\.feed_forward\.down_proj\."),
    WeightRenaming(r"decoder\.layernorm\.", r"decoder\.norm\."),
    WeightRenaming(r"class_labels_classifier\.", r"(?<!\w)class_head\."),
    WeightRenaming(r"bbox_predictor\.", r"(?<!\w)box_head\."),
]
register_checkpoint_conversion_mapping(ZooDetrConfig.model_type, DETR_RENAMINGS, overwrite=True)
