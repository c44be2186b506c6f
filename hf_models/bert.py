"""BERT: the encoder stack alone, trained to fill in masked tokens and to tell whether two texts belong together
(Devlin et al. 2019).

h_0 = norm(W_e[tokens] + W_p[positions] + W_t[token types])
h_l = block(h_(l-1)),  l = 1..L,  where each token attends to all tokens
p(masked token) = softmax(W_e norm(gelu(W h_L)) + b)
p(B follows A) = softmax(W_n tanh(W h_L[first token]))

The model skips what is not used: padding in all blocks (`packing.Packing`), in the last block the tokens whose output
no head reads, and in training the scores of tokens that are not masked (`losses.scored_places`).

    B  batch    T  tokens           D  hidden size    V  vocabulary
    M  masked positions of a row    S  sequences packed in one row
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils import can_return_tuple, is_tracing
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .base import TextConfig, TextModel
from .layers import ACTIVATIONS, ENCODER_OUTPUTS, TransformerStack, make_norm
from .losses import classification_loss, cross_entropy, head_loss, marked_places, scored_places, states_at
from .packing import find_output_tokens, find_packing, same_sequence
from .positions import encode_positions
from .question_answering import answer_question

# isort: split
# transformers fetches only the modules that this file imports by name; the modules above need these, too.
from .attention import MultiHeadAttention  # noqa: F401
from .projections import ResidualLinear  # noqa: F401


@strict
class ZooBertConfig(TextConfig):
    """The config of a BERT. The defaults are BERT base's, but without its dropout of 0.1; stock's names of fields
    (`hidden_dropout_prob`, ...) work too.

    Args:
        type_vocab_size: number of token types: 0 for the first text of a pair, 1 for the second.
        norm_position: `post` as in the paper; or `pre`, with one more norm after the last block.
        classifier_dropout: dropout before a classifier. Default: `hidden_dropout`.
        null_threshold: for questions that may have no answer: by how much the score of "no answer" must exceed the
            best answer's to be chosen (Devlin et al. 2019, section 4.3).

    `TextConfig` and `TransformerConfig` document the other fields.
    """

    model_type = "zoo_bert"
    attribute_map = {
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "layer_norm_eps": "norm_eps",
    }
    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "bert.ZooBertConfig",
        "AutoModel": "bert.ZooBertModel",
        "AutoModelForPreTraining": "bert.ZooBertForPreTraining",
        "AutoModelForMaskedLM": "bert.ZooBertForMaskedLM",
        "AutoModelForSequenceClassification": "bert.ZooBertForSequenceClassification",
        "AutoModelForTokenClassification": "bert.ZooBertForTokenClassification",
        "AutoModelForQuestionAnswering": "bert.ZooBertForQuestionAnswering",
    }
    _auto_class = "AutoConfig"
    stock_model_types = ("bert",)

    vocab_size: int = 30522
    type_vocab_size: int = 2
    norm_eps: float | int = 1e-12
    norm_position: Literal["pre", "post"] = "post"
    classifier_dropout: float | int | None = None
    null_threshold: float | int | None = None
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        for option in ("is_decoder", "add_cross_attention"):
            if kwargs.pop(option, False):
                raise ValueError(f"a BERT config with {option}=True cannot be loaded as a ZooBert, which is an encoder")
        super().__post_init__(**kwargs)


class ZooBertPreTrainedModel(TextModel):
    config: ZooBertConfig
    config_class = ZooBertConfig
    _can_record_outputs = ENCODER_OUTPUTS
    base_model_prefix = "bert"
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$"]  # a buffer of old checkpoints

    def stock_class_and_config(self):
        import transformers

        config = self.make_stock_config(
            transformers.BertConfig, norm_position="post", position_embedding_type="learned"
        )
        return getattr(transformers, type(self).__name__.removeprefix("Zoo")), config


class ZooBertModel(ZooBertPreTrainedModel):
    """From token ids to one vector per token and one for the whole row: embeddings, blocks, pooler.

    Args:
        add_pooling_layer: whether there is a pooler, tanh(W h[first token]).
    """

    _auto_class = "AutoModel"

    def __init__(self, config: ZooBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, size)
        self.embed_token_types = nn.Embedding(config.type_vocab_size, size)
        self.embedding_norm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = TransformerStack(config, config.num_hidden_layers)
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.pooler = nn.Linear(size, size) if add_pooling_layer else None
        self.post_init()

    def pool(self, first_states):
        """Returns tanh(W h) for the states h (..., D) of first tokens."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(first_states))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        skip_padding: bool = True,
        read_places: torch.BoolTensor | None = None,
        only_first: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, D) in their place.
            attention_mask: (B, T), 1 for real tokens and 0 for padding; or a complete (B, 1, T, T) mask.
            token_type_ids: (B, T), 0 or 1. Default: 0.
            position_ids: (B, T). Without a mask, a position of 0 marks the start of a new sequence in the row, and
                attention stays within each sequence.
            skip_padding: whether to skip padding, whose outputs are then 0. The blocks, and hooks on them, then get the
                real tokens of the batch as one row (1, number of tokens, D). It has no effect under a compiler, with
                requested hidden states, or with drop path, which all need the batch's shape; nor if the pooler reads
                padding on the left. PEFT's `adapter_names`, one for each row, need False.
            read_places: (B, T), true where the last states are used. The last block computes only these, as one row,
                and the others are 0. It has no effect in the cases of `skip_padding`, or with requested attention
                maps. The heads set it themselves.
            only_first: whether only the first token's state is used, likewise. Without padding the last block then
                returns (B, 1, D), even under a compiler.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` was given; a position has no learned vector;
                the backend does not compute the requested attention maps; a keyword argument is unknown; or flash
                attention cannot keep the sequences of a row apart.
        """
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        self.check_keywords(kwargs)
        wants_maps = kwargs.pop("output_attentions", self.config.output_attentions)
        self.check_output_attentions(wants_maps)
        wants_states = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, D)
        if position_ids is not None:
            position_ids = position_ids.expand(inputs_embeds.shape[:2])
        has_sequences = attention_mask is None and position_ids is not None  # in one row
        drops_paths = self.training and self.config.drop_path > 0  # it drops whole rows, so they must stay apart
        can_pack = not (wants_states or drops_paths or is_tracing(inputs_embeds))
        mask, uses_flash = None, is_flash_attention_requested(self.config)
        packing = output_tokens = None
        if skip_padding and can_pack:
            packing = find_packing(attention_mask, position_ids, uses_flash, self.pooler is not None)
        if not (wants_states or wants_maps):
            output_tokens = find_output_tokens(inputs_embeds, packing, read_places if can_pack else None, only_first)

        if packing is not None and uses_flash:
            kwargs |= packing.flash_arguments()
        elif has_sequences and uses_flash:
            raise ValueError(
                "flash attention keeps packed sequences apart only with skip_padding and without a compiler, drop path "
                "in training or output_hidden_states: change that, or call model.set_attn_implementation('sdpa')"
            )
        else:
            mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                and_mask_function=same_sequence(position_ids) if has_sequences else None,
            )
            kwargs["packing"] = packing

        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        hidden_states = inputs_embeds + self.embed_token_types(token_type_ids)
        if packing is not None:
            position_ids = packing.pack(position_ids.expand(hidden_states.shape[:2]))
            hidden_states = packing.pack(hidden_states)  # (1, M, D)
        hidden_states, rotary = encode_positions(self.config, self.embed_positions, hidden_states, position_ids)
        hidden_states = self.dropout(self.embedding_norm(hidden_states))
        hidden_states = self.layers(hidden_states, mask, rotary=rotary, output_tokens=output_tokens, **kwargs)
        hidden_states = self.norm(hidden_states)
        if output_tokens is not None:
            hidden_states = output_tokens.unpack(hidden_states)
        if packing is not None:
            hidden_states = packing.unpack(hidden_states)  # (B, T, D)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pool(hidden_states[:, 0]),
        )


class MaskedTokenHead(nn.Module):
    """Scores every token of the vocabulary by W_e norm(act(W h)) + b."""

    def __init__(self, config: ZooBertConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = make_norm(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def features(self, hidden_states):
        return self.norm(self.activation(self.transform(hidden_states)))

    def forward(self, hidden_states):
        return self.decoder(self.features(hidden_states))

    def forward_at(self, hidden_states, positions=None):
        """Returns the scores (B, M, V) at `positions` (B, M), padded with -1. Default: at all positions (B, T, V)."""
        return self(hidden_states if positions is None else states_at(hidden_states, positions))

    def loss(self, hidden_states, labels, masked_positions=None, num_items=None):
        """The cross-entropy of the masked tokens, which computes no scores for other tokens.

        Args:
            labels: (B, T), -100 where nothing is scored.
            masked_positions: (B, M), as `positions` in `losses.scored_places`.
            num_items: divisor of the summed loss. Default: the number of scored tokens.
        """
        hidden_states, labels = scored_places(hidden_states, labels, masked_positions)
        return head_loss(self.decoder, self.features(hidden_states), labels, num_items)


class ZooBertWithMaskedTokenHead(ZooBertPreTrainedModel):
    """The base of the two models that fill in masked tokens: their head shares the matrix of the embedding."""

    mlm_head: MaskedTokenHead
    _tied_weights_keys = {"mlm_head.decoder.weight": "bert.embed_tokens.weight"}
    _tp_plan = {"mlm_head.decoder": "colwise_gather_output"}

    def get_output_embeddings(self):
        return self.mlm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.mlm_head.decoder = new_embeddings

    def returns_logits(self, return_logits, labels) -> bool:
        """Whether to return the scores of tokens. Default: not beside a loss while training."""
        return (labels is None or not self.training) if return_logits is None else return_logits

    def read_places(self, labels, masked_positions, returns_logits, logits_to_keep, first_positions=None):
        """Returns (B, T), true for the states that the heads use, or None if they use all.

        The heads use the states that are scored, those whose scores are returned, and for next-sentence prediction the
        first one of each sequence.
        """
        if labels is None or (returns_logits and logits_to_keep is None):
            return None
        read = labels != -100 if masked_positions is None else torch.zeros_like(labels, dtype=torch.bool)
        for positions in (masked_positions, logits_to_keep if returns_logits else None, first_positions):
            if positions is not None:
                read = read | marked_places(positions.to(read.device), read.shape[1])
        return read


class ZooBertForPreTraining(ZooBertWithMaskedTokenHead):
    """BERT with both heads of the paper: masked tokens, and next-sentence prediction."""

    _auto_class = "AutoModelForPreTraining"
    accepts_loss_kwargs = False  # `Trainer` counts the items of one loss, but this model has two

    def __init__(self, config: ZooBertConfig):
        super().__init__(config)
        self.bert = ZooBertModel(config)
        self.mlm_head = MaskedTokenHead(config)
        self.nsp_head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        next_sentence_label: torch.LongTensor | None = None,
        masked_positions: torch.LongTensor | None = None,
        sequence_positions: torch.LongTensor | None = None,
        num_items_in_batch: dict | None = None,
        logits_to_keep: torch.LongTensor | None = None,
        return_logits: bool | None = None,
        **kwargs,
    ) -> BertForPreTrainingOutput:
        """
        Args:
            labels: (B, T), the true tokens at masked positions, -100 elsewhere.
            next_sentence_label: (B,), 0 if the second text follows the first and 1 if it does not; for rows of several
                sequences (B, S), padded with -100.
            masked_positions: (B, M), the positions of the scored labels, padded with -1. They fix every shape, as a
                compiled full graph needs. Default: found from the labels.
            sequence_positions: (B, S), the first position of each sequence of a row, padded with -1.
            num_items_in_batch: divisors of the summed losses, {"masked_lm": ..., "next_sentence": ...}. Default: the
                numbers of scored labels.
            logits_to_keep: (B, K), the only positions to compute `prediction_logits` (B, K, V) for, padded with -1.
            return_logits: whether to return `prediction_logits` beside a loss. Default: not while training.
            The other arguments are those of `ZooBertModel`.

        Returns:
            `loss`, the sum of the losses whose labels were given; `prediction_logits` (B, T, V) unless left out;
            `seq_relationship_logits` (B, 2) or (B, S, 2).

        Raises:
            ValueError: `num_items_in_batch` is a number or has an unknown key; and as `ZooBertModel`.
        """
        num_items = {} if num_items_in_batch is None else num_items_in_batch
        if not isinstance(num_items, dict) or not num_items.keys() <= {"masked_lm", "next_sentence"}:
            raise ValueError(
                'num_items_in_batch must be {"masked_lm": ..., "next_sentence": ...}, a divisor for each of the two '
                f"losses, not {num_items}"
            )
        return_logits = self.returns_logits(return_logits, labels)
        first_positions = torch.zeros(1, 1, dtype=torch.long) if sequence_positions is None else sequence_positions
        read = self.read_places(labels, masked_positions, return_logits, logits_to_keep, first_positions)
        kwargs.setdefault("read_places", read)
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        hidden_states, pooled = outputs.last_hidden_state, outputs.pooler_output
        if sequence_positions is not None:
            pooled = self.bert.pool(states_at(hidden_states, sequence_positions))
        relationship = self.nsp_head(pooled)

        losses = []
        if labels is not None:
            losses.append(self.mlm_head.loss(hidden_states, labels, masked_positions, num_items.get("masked_lm")))
        if next_sentence_label is not None:
            losses.append(cross_entropy(relationship, next_sentence_label, num_items.get("next_sentence")))
        return BertForPreTrainingOutput(
            loss=sum(losses) if losses else None,
            prediction_logits=self.mlm_head.forward_at(hidden_states, logits_to_keep) if return_logits else None,
            seq_relationship_logits=relationship,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ZooBertForMaskedLM(ZooBertWithMaskedTokenHead):
    """BERT with the head that fills in masked tokens."""

    _auto_class = "AutoModelForMaskedLM"

    def __init__(self, config: ZooBertConfig):
        super().__init__(config)
        self.bert = ZooBertModel(config, add_pooling_layer=False)
        self.mlm_head = MaskedTokenHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        masked_positions: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: torch.LongTensor | None = None,
        return_logits: bool | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Arguments and results are those of `ZooBertForPreTraining` without next-sentence prediction;
        `num_items_in_batch` is one number."""
        return_logits = self.returns_logits(return_logits, labels)
        read = self.read_places(labels, masked_positions, return_logits, logits_to_keep)
        kwargs.setdefault("read_places", read)
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        loss = None
        if labels is not None:
            loss = self.mlm_head.loss(hidden_states, labels, masked_positions, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss,
            logits=self.mlm_head.forward_at(hidden_states, logits_to_keep) if return_logits else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def classifier_dropout(config: ZooBertConfig) -> nn.Dropout:
    """Makes the dropout before a classifier."""
    return nn.Dropout(config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout)


class ZooBertForSequenceClassification(ZooBertPreTrainedModel):
    """BERT with a linear classifier of a text or a pair of texts on the pooled first token (Devlin et al. 2019,
    figure 4a and b)."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: ZooBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = ZooBertModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels: (B,) class ids; (B,) or (B, num_labels) numbers for regression; (B, num_labels) of 0 and 1 for
                multi-label classification. `config.problem_type` decides, or the labels' type and `num_labels`.
            num_items_in_batch: divisor of the summed loss. Default: the number of labels.
            The other arguments are those of `ZooBertModel`.
        """
        kwargs.setdefault("only_first", True)
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ZooBertForTokenClassification(ZooBertPreTrainedModel):
    """BERT with a linear classifier of every token (Devlin et al. 2019, figure 4d)."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: ZooBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = ZooBertModel(config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: (B, T) class ids, -100 where a token is not scored.
            num_items_in_batch: divisor of the summed loss. Default: the number of scored labels.
            The other arguments are those of `ZooBertModel`.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))  # (B, T, num_labels)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, labels, num_items_in_batch, self.config.class_weights)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ZooBertForQuestionAnswering(ZooBertPreTrainedModel):
    """BERT that scores every token as the first and as the last of an answer (Devlin et al. 2019, section 4.2)."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: ZooBertConfig):
        super().__init__(config)
        self.bert = ZooBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def stock_class_and_config(self):
        stock_class, config = super().stock_class_and_config()
        config.num_labels = 2  # the two ends, even if the config has more labels from an earlier task
        return stock_class, config

    def answer(self, tokenizer, question: str, context: str, **options):
        """Returns the best answers in the context, the best one first; the options are those of
        `question_answering.answer_question`."""
        return answer_question(self, tokenizer, question, context, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: (B,), the positions of the answer's first and last token. As in stock, a
                position after the end of the row is not scored, and a negative one counts as 0.
            num_items_in_batch: divisor of the summed loss, the mean of both ends' losses. Default: the number of
                answers.
            The other arguments are those of `ZooBertModel`.

        Returns:
            `start_logits` and `end_logits` (B, T). With `skip_padding`, which is the default without labels, those of
            padding are the least number of their dtype, so that no answer begins or ends there.
        """
        kwargs.setdefault("skip_padding", start_positions is None)  # stock's loss also scores padding
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)  # (B, T, 2)
        if kwargs["skip_padding"] and attention_mask is not None and attention_mask.ndim == 2:
            is_padding = (attention_mask == 0)[..., None].to(logits.device)
            logits = logits.masked_fill(is_padding, torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            num_tokens = logits.shape[1]
            start_loss, end_loss = (
                cross_entropy(scores, at.flatten().clamp(0, num_tokens), num_items_in_batch, ignore_index=num_tokens)
                for scores, at in ((start_logits, start_positions), (end_logits, end_positions))
            )
            loss = (start_loss + end_loss) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FirstOfTwoNames(ConversionOps):
    """Reads a tensor that a stock file may hold under either of two names, or under both; the first name wins."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        found = next(input_dict[name] for name in source_patterns if name in input_dict)
        return {target_patterns[0]: found[0] if isinstance(found, list) else found}

    @property
    def reverse_op(self):
        return UnderBothNames()


class UnderBothNames(ConversionOps):
    """Writes the tensor under both names: the reverse of `FirstOfTwoNames`."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        found = next(iter(input_dict.values()))
        return dict.fromkeys(target_patterns, found[0] if isinstance(found, list) else found)

    @property
    def reverse_op(self):
        return FirstOfTwoNames()


# Renames stock BERT keys in both directions.
register_checkpoint_conversion_mapping(
    ZooBertConfig.model_type,
    [
        # The oldest checkpoints call a norm's weight and bias gamma and beta. Saving uses the first name of each list.
        WeightRenaming([r"LayerNorm\.weight", r"LayerNorm\.gamma"], r"LayerNorm\.weight"),
        WeightRenaming([r"LayerNorm\.bias", r"LayerNorm\.beta"], r"LayerNorm\.bias"),
        WeightRenaming(r"embeddings\.word_embeddings\.", r"embed_tokens\."),
        WeightRenaming(r"embeddings\.position_embeddings\.", r"embed_positions\."),
        WeightRenaming(r"embeddings\.token_type_embeddings\.", r"embed_token_types\."),
        WeightRenaming(r"embeddings\.LayerNorm\.", r"embedding_norm\."),
        WeightRenaming(r"encoder\.layer\.", r"(?<!\w)layers\."),
        WeightRenaming(r"\.attention\.self\.query\.", r"\.attention\.q_proj\."),
        WeightRenaming(r"\.attention\.self\.key\.", r"\.attention\.k_proj\."),
        WeightRenaming(r"\.attention\.self\.value\.", r"\.attention\.v_proj\."),
        WeightRenaming(r"\.attention\.output\.dense\.", r"\.attention\.o_proj\."),
        WeightRenaming(r"\.attention\.output\.LayerNorm\.", r"\.attention_norm\."),
        WeightRenaming(r"\.intermediate\.dense\.", r"\.feed_forward\.up_proj\."),
        WeightRenaming(r"(?<=\d)\.output\.dense\.", r"\.feed_forward\.down_proj\."),
        WeightRenaming(r"(?<=\d)\.output\.LayerNorm\.", r"\.feed_forward_norm\."),
        WeightRenaming(r"pooler\.dense\.", r"(?<!\w)pooler\."),
        WeightRenaming(r"cls\.predictions\.transform\.dense\.", r"mlm_head\.transform\."),
        WeightRenaming(r"cls\.predictions\.transform\.LayerNorm\.", r"mlm_head\.norm\."),
        WeightRenaming(r"cls\.predictions\.decoder\.weight", r"mlm_head\.decoder\.weight"),
        # The decoder's bias; most files hold it only under its older name, the second.
        WeightConverter(
            [r"cls\.predictions\.decoder\.bias", r"cls\.predictions\.bias"],
            r"mlm_head\.decoder\.bias",
            operations=[FirstOfTwoNames()],
        ),
        WeightRenaming(r"cls\.seq_relationship\.", r"nsp_head\."),
    ],
    overwrite=True,
)
