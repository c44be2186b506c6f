"""What every family shares with transformers: configuration fields, initialisation, saving, stock weights.

The mathematics is in `layers.py`; this file is the part that makes a model behave like a stock one.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import revert_weight_conversion

from .layers import ACTIVATIONS, MultiHeadAttention, TransformerBlock

ZOO_VERSION = "0.1.0"


@strict
class TransformerConfig(PreTrainedConfig):
    """The fields that `layers.py` reads; a family's config adds its own.

    Args:
        hidden_size: width D of the residual stream.
        num_attention_heads: query heads N.
        num_key_value_heads: key and value heads; fewer than N is grouped-query attention (Ainslie et al. 2023).
            Default: N.
        head_dim: size H of one head. Default: D / N.
        intermediate_size: width of the feed-forward layer. Default: 4 D.
        hidden_act: one of `gelu`, `gelu_new` (its tanh approximation), `relu`, `relu2`, `silu`, `swiglu`.
        norm: `layernorm` (Ba et al. 2016) or `rmsnorm` (Zhang and Sennrich 2019).
        norm_position: `pre` (Xiong et al. 2020) or `post` (Vaswani et al. 2017).
        qk_norm: normalise queries and keys before their product (Henry et al. 2020), here by their root mean square.
        use_bias: biases in linear layers and in LayerNorm.
        residual_init: how the projections that end a residual branch start: `normal` like every other matrix,
            `scaled` by one over the square root of the number of branches (Radford et al. 2019), or `zero`, which
            makes every block the identity at first.
        zoo_version: the version of hf_models that wrote the checkpoint.

    Raises:
        ValueError, or around it huggingface_hub's `StrictDataclassError` as for any config: a field is of the wrong
            kind or outside its range, or two fields do not fit; the message names them.
    """

    hidden_size: int = 768
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float | int = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    qk_norm: bool = False
    use_bias: bool = True
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    residual_init: Literal["normal", "scaled", "zero"] = "normal"
    zoo_version: str | None = None

    # Auto class -> "file.Class", for every class of the family: a checkpoint of any of them opens as any other.
    family_auto_map: ClassVar[dict[str, str]] = {}
    # The `model_type` of the stock checkpoints that this family reads.
    stock_model_type: ClassVar[str] = ""

    base_model_tp_plan = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == cls.stock_model_type:
            config_dict["model_type"] = cls.model_type  # a stock checkpoint becomes one of ours
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)  # a stock config.json would rename the family, and its weight mapping with it
        for alias, field in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, field, kwargs.pop(alias))
        if self.num_attention_heads < 1 or self.hidden_size < 1:
            raise ValueError("hidden_size and num_attention_heads must be at least 1")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                    f"({self.num_attention_heads}): change one, or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.zoo_version is None:
            self.zoo_version = ZOO_VERSION
        if not kwargs.get("auto_map"):
            kwargs["auto_map"] = dict(self.family_auto_map)
        super().__post_init__(**kwargs)

    def validate_layers(self):
        """Checks, on construction and on saving, that the fields fit together."""
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; choose one of {', '.join(ACTIVATIONS)}")
        for field in ("head_dim", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
            if getattr(self, field, 1) < 1:  # a family need not have them all
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("hidden_dropout", "attention_dropout", "embedding_dropout"):
            if not 0.0 <= getattr(self, field, 0.0) < 1.0:
                raise ValueError(f"{field} is {getattr(self, field)}; it is a probability: 0 <= {field} < 1")


class ZooPreTrainedModel(PreTrainedModel):
    """Everything about a family that does not depend on the family."""

    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TransformerBlock, "attentions": MultiHeadAttention}

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """On a machine without an accelerator the default is `eager`: there, two matrix products and a softmax are
        faster than the fused kernel, and attention maps come for free."""
        if requested_attention is None and not torch.accelerator.is_available():
            requested_attention = "eager"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module):
        # Only modules with parameters of their own come here, so a projection has to be known by itself, not by the
        # attention or the feed-forward around it.
        super()._init_weights(module)
        config = self.config
        if not getattr(module, "ends_residual_branch", False) or config.residual_init == "normal":
            return
        if config.residual_init == "zero":
            init.zeros_(module.weight)
        else:
            init.normal_(module.weight, mean=0.0, std=config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)

    def check_output_attentions(self, output_attentions):
        """Raises a `ValueError` where attention maps are asked of a backend that never forms them."""
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager'; this model runs "
                f"{self.config._attn_implementation!r}. Call model.set_attn_implementation('eager') first"
            )

    def save_pretrained(self, save_directory, *args, save_original_format=False, **kwargs):
        """As in transformers, but in this package's own key names; `to_stock().save_pretrained` writes stock keys."""
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def stock_class_and_config(self) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """The stock class and config that compute the same function; raises a `ValueError` naming the option where
        there is none."""
        raise ValueError(f"{type(self).__name__} has no stock counterpart in transformers")

    def to_stock(self) -> PreTrainedModel:
        """The stock transformers model with the same weights, device, dtype and mode.

        Raises:
            ValueError: an option of this model has no stock counterpart; the message names it.
        """
        stock_class, stock_config = self.stock_class_and_config()
        with torch.device("meta"):
            stock = stock_class(stock_config)
        weights = revert_weight_conversion(self, self.state_dict())
        stock.to_empty(device=self.device).to(self.dtype)
        stock.tie_weights()
        stock.load_state_dict(weights, strict=True)
        return stock.train(self.training)
