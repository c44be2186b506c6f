"""What every family shares with transformers, in three steps that build on each other.

    ZooConfig, ZooModel                  what even an LSTM needs: saving with code, stock weights both ways
    TransformerConfig, TransformerModel  the fields that blocks read, attention backends, plans to split over devices
    TextConfig, TextModel                vocabulary, positions, caches, checks of token inputs

The mathematics is in `attention.py`, `layers.py` and `positions.py`; this file makes a model behave like a stock one.
"""

import difflib
import inspect
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.masking_utils import create_causal_mask
from transformers.utils import is_tracing, logging

ZOO_VERSION = "0.2.0"

# The versions of transformers that the whole suite, or the part named in docs/transformers.md, was run with.
TESTED_TRANSFORMERS = ("5.17.0", "5.23.0", "5.24.0")

if Version(transformers.__version__).release[:2] > Version(TESTED_TRANSFORMERS[-1]).release[:2]:
    # Every checkpoint carries a copy of this file, so loading one without the package gives this warning, too.
    logging.get_logger("transformers.hf_models").warning_once(
        f"hf_models {ZOO_VERSION} was tested with transformers {TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[-1]}, "
        f"and this is {transformers.__version__}: compare a few outputs, or install an earlier version of transformers"
    )

# The keyword arguments that a model passes on without reading them itself. A model refuses every other keyword
# argument that is not in its signature, because ignoring one would give a wrong answer without an error.
PASSED_ON = frozenset(
    {
        # From the caller or the config, through transformers' decorators of `forward`.
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "is_causal",
        # From callers with packed sequences (`DataCollatorWithFlattening`), to flash attention.
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        # From callers, to flash and flex attention.
        "deterministic",
        "kernel_options",
    }
)
# A model that generates also passes these on, from continuous batching to paged attention.
PASSED_ON_IN_GENERATION = frozenset(
    {
        "block_table",
        "logits_indices",
        "logits_processor_args",
        "max_seqlen_k",  # before 5.19
        "max_seqlen_q",
        "read_index",
        "write_index",
    }
)

# The name of the argument that holds the cache of keys and values; transformers 5.24 changed it. Gradient
# checkpointing looks for this name.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


# -------------------------------------------------------------------------------------------------- every model


@strict
class ZooConfig(PreTrainedConfig):
    """The fields of every config.

    Args:
        zoo_version: the version of hf_models that wrote the checkpoint.

    Raises:
        ValueError: a field has the wrong type or is out of range, or two fields contradict each other; the message
            names them. huggingface_hub wraps some of these in its `StrictDataclassError`, as for any config.
    """

    zoo_version: str | None = None

    # transformers declares this property as `int | None`, but every config here has labels.
    num_labels: ClassVar[Any] = PreTrainedConfig.num_labels
    # Auto class -> "file.Class" for every class of the family, so that a checkpoint of one loads as any other.
    family_auto_map: ClassVar[dict[str, str]] = {}
    # The `model_type`s of the stock checkpoints that this family loads.
    stock_model_types: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type in cls.stock_model_types:  # convert the config of a stock checkpoint
            # A stock config.json omits the fields at stock's defaults, which may differ from ours.
            known = {field.name for field in fields(cls)} | set(cls.attribute_map)
            defaults = AutoConfig.for_model(model_type).to_dict()
            config_dict = {k: v for k, v in defaults.items() if k in known} | config_dict
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers would set the overrides only after the other fields have been derived and checked.
        ours = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        ours |= {*cls.attribute_map, "id2label", "label2id"}  # `class_weights` has to fit the labels
        overrides = {name: kwargs.pop(name) for name in ours if name in kwargs}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)  # stock's would replace ours, and with it the mapping of weight names
        for alias, field in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, field, kwargs.pop(alias))
        self.derive_fields()
        if self.zoo_version is None:
            self.zoo_version = ZOO_VERSION
        if not kwargs.get("auto_map"):
            kwargs["auto_map"] = dict(self.family_auto_map)
        super().__post_init__(**kwargs)

    def derive_fields(self):
        """Fills in the fields whose default depends on other fields."""


class ZooModel(PreTrainedModel):
    """The base class of all models: initialisation, checks of keyword arguments, saving, conversion to stock."""

    _can_compile_fullgraph = True
    passed_on = PASSED_ON

    @torch.no_grad()
    def _init_weights(self, module):
        # transformers calls this only for modules that hold parameters themselves.
        super()._init_weights(module)
        if hasattr(module, "initialise"):
            module.initialise(self.config)

    def check_keywords(self, keywords):
        """Raises a `ValueError` for a keyword argument that neither this model nor the code it calls reads."""
        for name in keywords:
            if name not in self.passed_on:
                known = {*self.passed_on, *inspect.signature(self.forward).parameters} - {"kwargs"}
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ": leave it out"
                raise ValueError(f"{type(self).__name__} has no use for the keyword argument {name!r}{hint}")

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves under this package's key names, and else as transformers does; `to_stock()` saves under stock's."""
        return super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def stock_class_and_config(self) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """Returns the stock class and config that compute the same function.

        Raises:
            ValueError: transformers has no such class, or the class lacks an option, which the message names.
        """
        raise ValueError(f"{type(self).__name__} has no stock counterpart in transformers")

    def make_stock_config(self, config_class: type[PreTrainedConfig], **required) -> PreTrainedConfig:
        """Returns a stock config with the same values.

        Args:
            config_class: the class of the stock config.
            **required: options, each with the only value that the stock class supports.

        Raises:
            ValueError: an option has another value than the required one.
        """
        config = self.config
        for option, value in required.items():
            if getattr(config, option) != value:
                raise ValueError(
                    f"{config_class.__name__} has no {option}={getattr(config, option)!r} (only {value!r})"
                )
        return config_class(
            **{
                field.name: getattr(config, field.name)
                for field in fields(config_class)
                if hasattr(config, field.name) and field.name not in ("architectures", "transformers_version")
            }
        )

    def stock_weights(self) -> dict[str, torch.Tensor]:
        """Returns the weights under their stock names."""
        with torch.device("meta"):  # a new model, because a loaded one reverses only the renamings that its file needed
            fresh = type(self)(self.config)
        return revert_weight_conversion(fresh, self.state_dict())

    def to_stock(self) -> PreTrainedModel:
        """Returns the stock transformers model with the same weights, device, dtype and mode.

        Raises:
            ValueError: an option of this model has no stock counterpart; the message names it.
        """
        stock_class, stock_config = self.stock_class_and_config()
        weights = self.stock_weights()
        stock_and_keys: Any = stock_class.from_pretrained(
            None,
            config=stock_config,
            state_dict={name: weight.clone() for name, weight in weights.items()},
            dtype=self.dtype,
            output_loading_info=True,
        )
        stock, loaded = stock_and_keys
        assert not loaded["missing_keys"] and not loaded["unexpected_keys"], loaded
        return stock.to(self.device).train(self.training)


# -------------------------------------------------------------------------------------------------- transformers

ACTIVATION_NAMES = ("gelu", "gelu_new", "relu", "relu2", "silu", "swiglu")


@strict
class TransformerConfig(ZooConfig):
    """The fields that `attention.py` and `layers.py` read.

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
        qk_norm: normalise queries and keys by RMSNorm before their product (after Henry et al. 2020).
        use_bias: biases in the blocks' linear layers and in LayerNorm.
        qkv_bias: biases of the query, key and value projections. Default: `use_bias`.
        residual_init: initial values of the projections that end a residual branch: `normal` like every other matrix,
            `scaled` by one over the square root of the number of branches (Radford et al. 2019), or `zero`, which
            makes every block the identity at first.
        layer_scale: initial value of the learned factors on every residual branch (Touvron et al. 2021). Default: no
            such factors.
        drop_path: probability that training skips a branch of the last block for a sample (Huang et al. 2016). It
            rises linearly from 0 in the first block.
        class_weights: weight of each class in the loss of a classification head; not for regression. Default: all
            weigh the same.

    `ZooConfig` documents the other fields.
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
    qkv_bias: bool | None = None
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    residual_init: Literal["normal", "scaled", "zero"] = "normal"
    layer_scale: float | int | None = None
    drop_path: float | int = 0.0
    class_weights: list[float | int] | None = None

    @property
    def stacks(self) -> dict[str, bool]:
        """Path of each stack of blocks in the base model, and whether the stack has cross-attention."""
        return {"layers": False}

    def plan_tensor_parallelism(self) -> dict[str, str]:
        """How tensor parallelism splits the blocks, with entries only for modules that this config has."""
        plan: dict[str, str] = {}
        for stack, has_cross_attention in self.stacks.items():
            for attention in ("attention", "cross_attention") if has_cross_attention else ("attention",):
                plan |= {f"{stack}.*.{attention}.{name}_proj": "colwise" for name in "qkv"}
                plan[f"{stack}.*.{attention}.o_proj"] = "rowwise"
                if self.qk_norm:  # each process sees its own heads only
                    plan |= {f"{stack}.*.{attention}.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
            if self.hidden_act == "swiglu":
                plan[f"{stack}.*.feed_forward.gate_proj"] = "colwise"
            plan[f"{stack}.*.feed_forward.up_proj"] = "colwise"
            plan[f"{stack}.*.feed_forward.down_proj"] = "rowwise"
        return plan

    def derive_fields(self):
        super().derive_fields()
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
        if self.qkv_bias is None:
            self.qkv_bias = self.use_bias
        # transformers reads the plan here, and does not save it.
        self.base_model_tp_plan = self.plan_tensor_parallelism()  # type: ignore[misc]

    def validate_layers(self):
        """Checks that the fields fit together; transformers calls it on construction and on saving."""
        assert self.num_key_value_heads is not None  # `derive_fields` fills it in
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise ValueError(f"class_weights has {len(self.class_weights)} values for num_labels {self.num_labels}")
        if self.class_weights is not None and self.problem_type == "regression":
            raise ValueError("class_weights is set, but problem_type='regression' has no classes: leave it None")
        if self.hidden_act not in ACTIVATION_NAMES:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; choose one of {', '.join(ACTIVATION_NAMES)}")
        for field in ("head_dim", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
            if getattr(self, field, 1) < 1:  # some families lack some of these fields
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("hidden_dropout", "attention_dropout", "embedding_dropout", "drop_path"):
            if not 0.0 <= getattr(self, field, 0.0) < 1.0:
                raise ValueError(f"{field} is {getattr(self, field)}; it is a probability: 0 <= {field} < 1")


class TransformerModel(ZooModel):
    """Adds what attention needs: backends, gradient checkpointing, and plans to split the model over devices."""

    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """Makes `eager` the default on a machine without an accelerator. There it is faster than the fused kernel, and
        it can return attention maps."""
        if requested_attention is None and not torch.accelerator.is_available():
            requested_attention = "eager"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def check_output_attentions(self, output_attentions):
        """Raises a `ValueError` if attention maps are requested from a backend that does not compute them."""
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager'; this model runs "
                f"{self.config._attn_implementation!r}. Call model.set_attn_implementation('eager') first"
            )

    def make_stock_config(self, config_class: type[PreTrainedConfig], **required) -> PreTrainedConfig:
        """As in `ZooModel`, and refuses the options of our blocks that no stock class has."""
        config = self.config
        if config.hidden_act == "swiglu":
            raise ValueError(f"{config_class.__name__} has no hidden_act='swiglu'")
        plain = {
            "norm": "layernorm",
            "qk_norm": False,
            "use_bias": True,
            "qkv_bias": True,
            "layer_scale": None,
            "num_key_value_heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "class_weights": None,
        }
        return super().make_stock_config(config_class, **{**plain, **required})


# ----------------------------------------------------------------------------------------------------------- text


@strict
class TextConfig(TransformerConfig):
    """The fields of a model of text.

    Args:
        vocab_size: number of tokens V.
        num_hidden_layers: number of blocks L.
        max_position_embeddings: length of the longest sequence that the model is made for.
        position_embedding_type: `learned` vectors, `sinusoidal` (Vaswani et al. 2017), or `rotary` (Su et al. 2021)
            with base `rope_theta`.
        tie_word_embeddings: use one matrix W_e to embed tokens and to score them (Press and Wolf 2017).

    `TransformerConfig` documents the other fields.
    """

    vocab_size: int = 32768
    num_hidden_layers: int = 12
    max_position_embeddings: int = 512
    position_embedding_type: Literal["learned", "sinusoidal", "rotary"] = "learned"
    rope_theta: float | int = 10000.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def plan_tensor_parallelism(self) -> dict[str, str]:
        return {"embed_tokens": "embedding_rowwise", **super().plan_tensor_parallelism()}

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("position_embedding_type") == "absolute":  # as transformers 4 wrote it
            config_dict["position_embedding_type"] = "learned"
        return config_dict, kwargs

    def validate_positions(self):
        """Checks that the chosen positions fit the sizes."""
        assert self.head_dim is not None  # `derive_fields` fills it in
        if self.position_embedding_type == "rotary" and self.head_dim % 2:
            raise ValueError(f"position_embedding_type='rotary' needs an even head_dim, not {self.head_dim}")
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"position_embedding_type='sinusoidal' needs an even hidden_size, not {self.hidden_size}")


class TextModel(TransformerModel):
    """Adds the checks of token inputs, and a cache that has two names: `cache` and `past_key_values`."""

    def choose_cache(self, cache, past_key_values):
        """Returns the cache that was given under either name; raises a `ValueError` if both names were used."""
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        return past_key_values if cache is None else cache

    def make_output(self, output_class, cache, **fields):
        """Makes an output whose cache is an attribute of both names on every version of transformers."""
        output = output_class(**fields, **{CACHE_NAME: cache})
        if CACHE_NAME != "cache":
            output.cache = cache
        return output

    def check_inputs(self, input_ids, inputs_embeds, position_ids=None):
        """Checks the inputs of `forward`.

        Raises:
            ValueError: not exactly one of `input_ids` (B, T) and `inputs_embeds` (B, T, D) was given, or a token's
                position has no learned vector. Without `position_ids` token t has position t.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        num_tokens, config = (inputs_embeds if input_ids is None else input_ids).shape[1], self.config
        if position_ids is not None:
            self.check_positions(position_ids)
        elif config.position_embedding_type == "learned" and num_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{num_tokens} tokens, but max_position_embeddings is {config.max_position_embeddings}: "
                "cut the input, or use a model with more positions"
            )

    def check_positions(self, position_ids):
        """Raises a `ValueError` for a position that has no learned vector.

        Reading positions on an accelerator would wait for it, so there only rows that are too long are checked.
        """
        limit = self.config.max_position_embeddings
        if self.config.position_embedding_type != "learned" or is_tracing(position_ids) or not position_ids.numel():
            return
        reads_them = position_ids.device.type == "cpu" or position_ids.shape[-1] > limit
        if reads_them and (last := int(position_ids.max())) >= limit:
            raise ValueError(
                f"position_ids has {last}, but max_position_embeddings is {limit}: "
                f"give positions from 0 to {limit - 1}, or use a model with more"
            )
