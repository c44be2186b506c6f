"""Attention, written once: scores of the sources for each query, and the mean of the sources weighted by them.

    e_ij     = score(q_i, k_j)                   `dot_scores`, `general_scores`, `additive_scores`
    alpha_ij = softmax over j of e_ij / t        `masked_softmax`: over the sources j that query i may attend to
    c_i      = sum over j of alpha_ij v_j        `weighted_sum`

Each function can be used alone; `MultiHeadAttention` applies all three in every head. The dimensions in shape comments:

    B  batch          T  tokens (queries)      S  source tokens (keys and values)
    D  hidden size    N  attention heads       H  size of one head
    K  key/value heads, N = K x groups         A  size of additive attention

`config` is any `TransformerConfig` (see `base.py`).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .base import CACHE_NAME
from .positions import apply_rotary
from .projections import ResidualLinear, linear_of

# ------------------------------------------------------------------------------------------------------- scores


def dot_scores(query: Tensor, key: Tensor) -> Tensor:
    """e_ij = q_i . k_j (Luong et al. 2015, equation 8, "dot").

    Args:
        query: (..., T, H).
        key: (..., S, H).

    Returns:
        The scores (..., T, S).
    """
    return torch.matmul(query, key.transpose(-2, -1))


def scaled_dot_scores(query: Tensor, key: Tensor) -> Tensor:
    """e_ij = q_i . k_j / sqrt(H) (Vaswani et al. 2017, equation 1). Shapes as in `dot_scores`."""
    return dot_scores(query * query.shape[-1] ** -0.5, key)


def general_scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """e_ij = q_i . W k_j (Luong et al. 2015, equation 8, "general").

    Args:
        query: (..., T, H).
        key: (..., S, H'), of any size.
        weight: (H, H').

    Returns:
        The scores (..., T, S).
    """
    return dot_scores(torch.matmul(query, weight), key)


def additive_scores(query: Tensor, key: Tensor, vector: Tensor) -> Tensor:
    """e_ij = v . tanh(q_i + k_j), where q_i = W s_i and k_j = U h_j (Bahdanau et al. 2015, appendix A.1.2).

    The caller projects the states, so that it can project the sources once for all queries.

    Args:
        query: (..., T, A), the projected queries W s.
        key: (..., S, A), the projected sources U h.
        vector: (A,), the weights v.

    Returns:
        The scores (..., T, S).
    """
    return torch.matmul(torch.tanh(query[..., :, None, :] + key[..., None, :, :]), vector)


# --------------------------------------------------------------------------------------- softmax and weighted sum


def masked_softmax(scores: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """alpha_ij = exp(e_ij / t) / sum over j' of exp(e_ij' / t), over the sources that the mask allows.

    If all sources of a query are masked, its weights still add up to 1 and are not NaN.

    Args:
        scores: (..., T, S).
        mask: None; or bool, true where a query may attend to a source; or numbers to add to the scores. It must
            broadcast to (..., T, S).
        temperature: t; below 1 it concentrates the weights on the best sources, above 1 it spreads them.

    Returns:
        The weights (..., T, S); each row adds up to 1.
    """
    if temperature != 1.0:
        scores = scores / temperature
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        # A row of minus infinity would give NaN, whether the mask contains it or the sum overflows to it.
        scores = scores + mask.to(scores.dtype).clamp(min=torch.finfo(scores.dtype).min / 2)
    return F.softmax(scores, dim=-1)


def weighted_sum(weights: Tensor, value: Tensor) -> Tensor:
    """c_i = sum over j of alpha_ij v_j: (..., T, S) and (..., S, H) -> (..., T, H)."""
    return torch.matmul(weights, value)


# --------------------------------------------------------------------------------------------- multi-head attention


def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017, equation 1), as two matrix products and a softmax.

    Args:
        query: (B, N, T, H).
        key, value: (B, K, S, H); each of the K heads serves N / K query heads.
        attention_mask: as in `masked_softmax`, broadcastable to (B, N, T, S).

    Returns:
        The output (B, T, N, H) and the attention weights (B, N, T, S), after dropout.
    """
    batch, num_heads, num_tokens, head_dim = query.shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    # Queries of heads that share a key head are stacked along T, so that keys and values need no copies.
    num_key_heads, num_sources = key.shape[1:3]
    folded = (query * scaling).reshape(batch, num_key_heads, -1, head_dim)
    scores = dot_scores(folded, key).view(batch, num_heads, num_tokens, num_sources)
    probabilities = masked_softmax(scores, attention_mask).to(value.dtype)
    weights = F.dropout(probabilities, p=dropout, training=module.training) if dropout else probabilities
    output = weighted_sum(weights.reshape(batch, num_key_heads, -1, num_sources), value)
    return output.view(batch, num_heads, num_tokens, head_dim).transpose(1, 2), weights


class MultiHeadAttention(nn.Module):
    """N attentions in parallel, each with its own projections (Vaswani et al. 2017, section 3.2.2).

    One class serves self-attention, causal attention, cross-attention, grouped-query attention, rotary positions, and
    DETR's separate position term on queries and keys. The backend that transformers' attention interface selects
    computes the attention itself: eager, sdpa, flash, flex or paged.

    Args:
        layer_idx: number of the block, under which a cache keeps this layer's keys and values.
        source_size: width of the source states of cross-attention. Default: the hidden size.
        num_branches: number of residual branches in the stack, for `config.residual_init`.
        backend_config: the config that names the attention backend. Default: `config`. A part of a model whose sizes
            are in a config of its own gives the model's config here.
    """

    def __init__(
        self,
        config,
        layer_idx: int,
        *,
        is_causal: bool = False,
        source_size: int | None = None,
        num_branches: int = 1,
        backend_config=None,
    ):
        super().__init__()
        self.config = config if backend_config is None else backend_config  # the backends read it, too
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        source_size = config.hidden_size if source_size is None else source_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(source_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(source_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = ResidualLinear(query_size, config.hidden_size, config.use_bias, num_branches)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        *,
        source_states=None,
        rotary=None,
        query_position=None,
        key_position=None,
        packing=None,
        source_packing=None,
        output_tokens=None,
        **kwargs,
    ):
        """
        Args:
            hidden_states: (B, T, D), the states that queries are made of.
            source_states: (B, S, D'), the states that keys and values are made of. Default: `hidden_states`.
            attention_mask: in the form of the backend in use (`create_causal_mask`, `create_bidirectional_mask`).
            rotary: the pair from `rotary_angles`, or None.
            query_position, key_position: (B, T, D) and (B, S, D), added before the query and the key projection but
                not before the value's (Carion et al. 2020, figure 10).
            packing: the `Packing` of `hidden_states` (1, M, D), if they are packed. Attention itself runs on the padded
                batch.
            source_packing: the `Packing` of `source_states`, if they are packed.
            output_tokens: the `Packing` or `FirstToken` of the tokens whose output is needed; the others serve only as
                keys and values.
            **kwargs: under `CACHE_NAME` a transformers cache, which keeps keys and values for later calls; all others
                go to the attention backend.

        Returns:
            The output (B, T, D), packed if `packing` or `output_tokens` is given; and the attention weights
            (B, N, T, S), or None if the backend does not compute them.
        """
        is_self_attention, cache = source_states is None, kwargs.pop(CACHE_NAME, None)
        query = hidden_states if query_position is None else hidden_states + query_position
        query = self.q_proj(query if output_tokens is None else output_tokens.pack(query))
        query = self._split_heads(query if output_tokens is None else output_tokens.unpack(query))  # (B, N, T, H)
        if self.q_norm is not None:
            query = self.q_norm(query)
        if rotary is not None:
            query = apply_rotary(query, *rotary)
        if is_self_attention:
            key, value = self._project_source(hidden_states, key_position, rotary)
            if cache is not None:
                cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
                key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # a paged one changes kwargs, too
            source_packing = packing
        else:
            key, value = self._source(source_states, key_position, rotary, cache)
        attend = partial(
            self._attend,
            mask=attention_mask,
            packing=packing,
            source_packing=source_packing,
            output_tokens=output_tokens,
            **kwargs,
        )
        # The padded queries, keys, values and scores are the largest tensors of a block, so they are not kept.
        recompute = packing is not None and self.training and not self.attention_dropout
        return linear_of(self.o_proj, attend, query, key, value, recompute=recompute)

    def _project_source(self, states, position, rotary):
        """Returns the keys and values (B, K, S, H) of source states (B, S, D')."""
        key = self._split_heads(self.k_proj(states if position is None else states + position))
        value = self._split_heads(self.v_proj(states))
        if self.k_norm is not None:
            key = self.k_norm(key)
        return (key if rotary is None else apply_rotary(key, *rotary)), value

    def _source(self, states, position, rotary, cache):
        """As `_project_source`, but with a cache it projects the source once for the whole generation."""
        if not isinstance(cache, EncoderDecoderCache):
            return self._project_source(states, position, rotary)
        if not cache.is_updated.get(self.layer_idx):
            key, value = self._project_source(states, position, rotary)
            cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        kept: Any = cache.cross_attention_cache.layers[self.layer_idx]
        return kept.keys, kept.values

    def _attend(self, query, key, value, mask, packing, source_packing, output_tokens, **kwargs):
        """From queries, keys and values (B, heads, T or S, H) to the heads' outputs (B, T, N H), and the weights."""
        if packing is not None:
            query = packing.unpack(query.transpose(1, 2)).transpose(1, 2)
        if source_packing is not None:
            key, value = (source_packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        beams, num_tokens = query.shape[0] // key.shape[0], query.shape[2]
        if beams > 1:  # beams of one input share its source, so they are stacked along T: (B, N, beams T, H)
            query = query.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)
            mask = mask if mask is None else mask[:, :, :1]
        output, weights = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)
        if beams > 1:
            output = output.unflatten(1, (beams, num_tokens)).flatten(0, 1)
            if weights is not None:
                weights = weights.unflatten(2, (beams, num_tokens)).transpose(1, 2).flatten(0, 1)
        output = output.flatten(2)  # (B, T, N, H) -> (B, T, N H)
        for chosen in (packing, output_tokens):
            output = output if chosen is None else chosen.pack(output)
        return output, weights

    def _split_heads(self, projected):
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
