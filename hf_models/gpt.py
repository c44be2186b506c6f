"""GPT: the decoder stack alone, trained to predict the next token (Radford et al. 2018, 2019; Brown et al. 2020).

h_0 = W_e[tokens] + W_p[positions]
h_l = block(h_(l-1)),  l = 1..L,  where each token attends to itself and to earlier tokens
p(next token) = softmax(W_e norm(h_L))

    B  batch          T  tokens       S  source tokens (of an encoder), or cached and new tokens
    D  hidden size    V  vocabulary
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .base import CACHE_NAME, PASSED_ON, PASSED_ON_IN_GENERATION, TextConfig, TextModel
from .beams import SharesSource, with_source
from .layers import DECODER_OUTPUTS, TransformerStack, make_norm
from .losses import classification_loss, head_loss
from .positions import encode_positions

# isort: split
# transformers fetches only the modules that this file imports by name; the modules above need these, too.
from .attention import MultiHeadAttention  # noqa: F401
from .projections import ResidualLinear  # noqa: F401


@strict
class ZooGPTConfig(TextConfig):
    """The config of a GPT. The defaults are GPT-2 small's; GPT-2's names of fields (`n_embd`, `n_layer`, ...) work too.

    Args:
        embedding_dropout: dropout on the sum of token and position embeddings.
        add_cross_attention: whether each block also attends to the states of an encoder.
        source_size: width of these states. Default: the hidden size.

    `TextConfig` and `TransformerConfig` document the other fields.
    """

    model_type = "zoo_gpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "norm_eps",
        "resid_pdrop": "hidden_dropout",
        "attn_pdrop": "attention_dropout",
        "embd_pdrop": "embedding_dropout",
    }
    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "gpt.ZooGPTConfig",
        "AutoModel": "gpt.ZooGPTModel",
        "AutoModelForCausalLM": "gpt.ZooGPTForCausalLM",
        "AutoModelForSequenceClassification": "gpt.ZooGPTForSequenceClassification",
    }
    _auto_class = "AutoConfig"
    stock_model_types = ("gpt2",)

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    residual_init: Literal["normal", "scaled", "zero"] = "scaled"
    embedding_dropout: float | int = 0.0
    use_cache: bool = True
    add_cross_attention: bool = False
    source_size: int | None = None

    @property
    def stacks(self) -> dict[str, bool]:
        return {"layers": self.add_cross_attention}

    def __post_init__(self, **kwargs):
        # This model cannot compute what these options ask for, so it refuses them rather than give wrong outputs.
        for option, supported in UNSUPPORTED_STOCK_OPTIONS.items():
            if kwargs.pop(option, supported) != supported:
                raise ValueError(f"a GPT-2 config with {option} other than {supported} cannot be loaded as a ZooGPT")
        super().__post_init__(**kwargs)

    def validate_source(self):
        """Checks that `source_size` is set only together with `add_cross_attention`."""
        if self.source_size is not None and not self.add_cross_attention:
            raise ValueError(f"source_size is {self.source_size}, but add_cross_attention is False: set it, too")
        if self.source_size is not None and self.source_size < 1:
            raise ValueError(f"source_size is {self.source_size}; it must be at least 1")


UNSUPPORTED_STOCK_OPTIONS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}


class ZooGPTPreTrainedModel(TextModel):
    config: ZooGPTConfig
    config_class = ZooGPTConfig
    stock_class_name: ClassVar[str]
    _can_record_outputs = DECODER_OUTPUTS
    passed_on = PASSED_ON | PASSED_ON_IN_GENERATION
    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$"]  # GPT-2's saved causal masks

    def stock_class_and_config(self):
        import transformers

        stock = self.make_stock_config(
            transformers.GPT2Config, norm_position="pre", position_embedding_type="learned", source_size=None
        )
        return getattr(transformers, self.stock_class_name), stock

    def check_source(self, encoder_hidden_states, encoder_attention_mask, num_rows: int):
        """Raises a `ValueError` unless this model, with `num_rows` rows of tokens, can attend to the source."""
        if encoder_hidden_states is None:
            if encoder_attention_mask is not None:
                raise ValueError("encoder_attention_mask needs encoder_hidden_states: give both or neither")
            return
        if not self.config.add_cross_attention:
            raise ValueError("encoder_hidden_states needs a model with add_cross_attention=True in its config")
        source_rows, _, width = encoder_hidden_states.shape
        expected = self.config.source_size or self.config.hidden_size
        if width != expected:
            raise ValueError(
                f"encoder_hidden_states has width {width}, but this model reads {expected}: set source_size"
            )
        if not is_tracing(encoder_hidden_states) and (not source_rows or num_rows % source_rows):
            raise ValueError(
                f"encoder_hidden_states has {source_rows} rows for {num_rows} rows of tokens: give a row for each, or "
                "in generation one for each input"
            )


class ZooGPTModel(ZooGPTPreTrainedModel):
    """From token ids to one vector per token: embeddings, blocks, final norm."""

    _auto_class = "AutoModel"
    stock_class_name = "GPT2Model"

    def __init__(self, config: ZooGPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = TransformerStack(
            config,
            config.num_hidden_layers,
            is_causal=True,
            cross_attention=config.add_cross_attention,
            source_size=config.source_size,
        )
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        cache=None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, D) in their place.
            attention_mask: (B, S), 1 for real tokens and 0 for padding; or a complete (B, 1, T, S) mask.
            position_ids: (B, T). Without a mask and a cache, a position of 0 marks the start of a new document, and
                attention stays within each document.
            cache, past_key_values: two names of one argument, the cache of keys and values of earlier tokens.
                transformers uses the first name since 5.24 and the second before; the output has both.
            use_cache: whether to return such a cache.
            token_type_ids: (B, T), tokens whose embeddings are added to those of `input_ids`, as in stock GPT-2.
            encoder_hidden_states: (B, S, D'), the states that cross-attention attends to. Without them the model skips
                cross-attention. In generation B may be the number of inputs, whatever the number of beams.
            encoder_attention_mask: (B, S), 1 for real source tokens and 0 for padding.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` was given; a position has no learned vector;
                the backend does not compute the requested attention maps; a keyword argument is unknown; or the encoder
                states do not fit: the model has no cross-attention, their width or number of rows is another, or only
                their mask was given.
        """
        cache = self.choose_cache(cache, past_key_values)
        self.check_keywords(kwargs)
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        self.check_output_attentions(kwargs.pop("output_attentions", self.config.output_attentions))
        kwargs.pop("output_hidden_states", None)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, D)
        self.check_source(encoder_hidden_states, encoder_attention_mask, inputs_embeds.shape[0])
        # Before transformers 5.24 the paged cache of continuous batching belongs to the attention backend alone.
        name = CACHE_NAME if isinstance(cache, Cache) else "cache"
        # This comes before positions and cache get default values: only those of the caller may change the mask.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache if name == CACHE_NAME else None},
        )
        if position_ids is None:
            seen_tokens = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen_tokens)[None]
            self.check_positions(position_ids)
        if use_cache and cache is None:
            name, cache = CACHE_NAME, DynamicCache(config=self.config)
        if encoder_hidden_states is not None:
            if isinstance(cache, Cache):
                cache = with_source(cache, self.config)
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds[: encoder_hidden_states.shape[0]],
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )

        hidden_states, rotary = encode_positions(self.config, self.embed_positions, inputs_embeds, position_ids)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.embed_tokens(token_type_ids)
        hidden_states = self.layers(
            self.dropout(hidden_states),
            causal_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            rotary=rotary,
            position_ids=position_ids,
            use_cache=use_cache,
            **{name: cache},
            **kwargs,
        )
        cache = cache if use_cache else None
        return self.make_output(
            BaseModelOutputWithPastAndCrossAttentions, cache, last_hidden_state=self.norm(hidden_states)
        )


class ZooGPTForCausalLM(SharesSource, ZooGPTPreTrainedModel, GenerationMixin):
    """GPT with its language-model head: at every position a score for every token of the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    stock_class_name = "GPT2LMHeadModel"
    _tied_weights_keys = {"lm_head.weight": "transformer.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ZooGPTConfig):
        super().__init__(config)
        self.transformer = ZooGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args, **kwargs):
        """As in transformers; a cache may have either of its names on every version."""
        cache = self.choose_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        return super().generate(*args, **kwargs, **({} if cache is None else {CACHE_NAME: cache}))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        cache=None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """
        Args:
            labels: (B, T), usually equal to `input_ids`; the model shifts them, so that each position predicts the next
                token. Labels of -100 are not scored.
            shift_labels: (B, T), labels that are already shifted: position t predicts entry t. It is not in the
                signature, because `Trainer` would then require it in every batch.
            num_items_in_batch: the divisor of the summed loss. Default: the number of scored positions.
            logits_to_keep: number of last positions to compute logits for (0: all), or their indices.
            return_logits: whether to return logits beside a loss. Default: not while training, where the (B, T, V)
                tensor would be the largest of the whole step.
            The other arguments are those of `ZooGPTModel`.

        Returns:
            `loss` if labels were given, `logits` (B, T, V) unless left out, `past_key_values`, and on request
            `hidden_states` and `attentions`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        has_labels = shift_labels is not None
        if use_cache is None and has_labels and self.training:
            use_cache = False  # training generates nothing
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            cache=cache,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim > 1:
            raise ValueError(
                f"logits_to_keep is a tensor of {logits_to_keep.ndim} dimensions: give a number, or one list of "
                "positions for all rows"
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        if return_logits is None:
            return_logits = not (has_labels and self.training)
        logits = self.lm_head(hidden_states) if return_logits or not has_labels else None
        loss = None
        if has_labels:
            loss = head_loss(self.lm_head, hidden_states, shift_labels, num_items_in_batch, logits=logits)
        return self.make_output(
            CausalLMOutputWithCrossAttentions,
            outputs.cache,
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


class ZooGPTForSequenceClassification(ZooGPTPreTrainedModel):
    """GPT with a linear classifier on the last real token, the only one that attends to the whole text (Radford et al.
    2018, section 3.2)."""

    _auto_class = "AutoModelForSequenceClassification"
    stock_class_name = "GPT2ForSequenceClassification"

    def __init__(self, config: ZooGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ZooGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        cache=None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            attention_mask: (B, T); the model classifies the token at the last 1 of each row. Without a mask it
                classifies the last token that is not `config.pad_token_id`.
            labels: (B,) class ids; (B,) or (B, num_labels) numbers for regression; (B, num_labels) of 0 and 1 for
                multi-label classification. `config.problem_type` decides, or the labels' type and `num_labels`.
            num_items_in_batch: the divisor of the summed loss. Default: the number of labels.
            The other arguments are those of `ZooGPTModel`.

        Raises:
            ValueError: there are several rows, but no mask and no `config.pad_token_id` to find their ends.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            cache=cache,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)  # (B, T, num_labels)
        batch_size, num_tokens = logits.shape[:2]
        positions = torch.arange(num_tokens, device=logits.device)
        if attention_mask is not None and attention_mask.ndim == 2:
            is_real = attention_mask[:, -num_tokens:].to(logits.device).bool()
        elif self.config.pad_token_id is not None and input_ids is not None:
            is_real = input_ids.to(logits.device) != self.config.pad_token_id
        elif batch_size == 1:
            is_real = torch.ones_like(positions, dtype=torch.bool)[None]
        else:
            raise ValueError(
                "cannot tell where each row ends: give attention_mask, or set config.pad_token_id, or use batch size 1"
            )
        last = (positions * is_real).argmax(-1)  # (B,)
        pooled_logits = logits[torch.arange(batch_size, device=logits.device), last]
        loss = None
        if labels is not None:
            loss = classification_loss(pooled_logits, labels, self.config, num_items_in_batch)
        return self.make_output(
            SequenceClassifierOutputWithPast,
            outputs.cache,
            loss=loss,
            logits=pooled_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def fused(stock: str, ours: str, names: str) -> list[WeightConverter]:
    """The projections that GPT-2 stores as one matrix, transposed, and one bias."""
    return [
        WeightConverter(
            rf"{stock}\.{kind}",
            [rf"{ours}\.{name}_proj\.{kind}" for name in names],
            operations=[*transpose, Chunk(dim=0)],
        )
        for kind, transpose in (("weight", [Transpose(0, 1)]), ("bias", []))
    ]


def transposed(stock: str, ours: str) -> list[WeightConverter | WeightRenaming]:
    """A linear layer whose matrix GPT-2 stores transposed."""
    return [
        WeightConverter(rf"{stock}\.weight", rf"{ours}\.weight", operations=[Transpose(0, 1)]),
        WeightRenaming(rf"{stock}\.bias", rf"{ours}\.bias"),
    ]


# Renames stock GPT-2 keys in both directions.
register_checkpoint_conversion_mapping(
    ZooGPTConfig.model_type,
    [
        WeightRenaming(r"wte\.weight", r"embed_tokens\.weight"),
        WeightRenaming(r"wpe\.weight", r"embed_positions\.weight"),
        WeightRenaming(r"(?<!\w)h\.", r"(?<!\w)layers\."),
        WeightRenaming(r"\.ln_1\.", r"\.attention_norm\."),
        WeightRenaming(r"\.ln_2\.", r"\.feed_forward_norm\."),
        WeightRenaming(r"\.ln_cross_attn\.", r"\.cross_attention_norm\."),
        WeightRenaming(r"ln_f\.", r"(?<!\w)norm\."),
        *fused(r"\.attn\.c_attn", r"\.attention", "qkv"),
        *fused(r"\.crossattention\.c_attn", r"\.cross_attention", "kv"),
        *transposed(r"\.crossattention\.q_attn", r"\.cross_attention\.q_proj"),
        *transposed(r"\.crossattention\.c_proj", r"\.cross_attention\.o_proj"),
        *transposed(r"\.attn\.c_proj", r"\.attention\.o_proj"),
        *transposed(r"\.mlp\.c_fc", r"\.feed_forward\.up_proj"),
        *transposed(r"\.mlp\.c_proj", r"\.feed_forward\.down_proj"),
    ],
    overwrite=True,
)
