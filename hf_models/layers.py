"""The transformer, written once: attention, feed-forward, block, stack, and the ways to tell it about positions.

Every model of this package composes these parts. The dimensions in shape comments:

    B  batch          T  tokens (queries)      S  source tokens (keys and values)
    D  hidden size    N  attention heads       H  size of one head
    K  key/value heads, N = K x groups         V  vocabulary

`config` is any `TransformerConfig` (see `base.py`), which lists the fields that are read here. `packing.py` has what
chooses the tokens that blocks compute.
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def squared_relu(hidden_states):
    """max(0, x)^2 (So et al. 2021, "Primer")."""
    return F.relu(hidden_states).square()


ACTIVATIONS = {
    "gelu": F.gelu,  # x Phi(x) (Hendrycks and Gimpel 2016)
    "gelu_new": partial(F.gelu, approximate="tanh"),  # the approximation that GPT and GPT-2 were trained with
    "relu": F.relu,
    "relu2": squared_relu,
    "silu": F.silu,
    "swiglu": F.silu,  # of the gate, which then multiplies a second projection (Shazeer 2020)
}


# What transformers calls a cache of keys and values; 5.24 renamed it. Gradient checkpointing looks for this name.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


# ---------------------------------------------------------------------------------------------------- attention


def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017, equation 1), as two matrix products and a softmax.

    Args:
        query: (B, N, T, H).
        key, value: (B, K, S, H); each of the K heads serves N / K query heads.
        attention_mask: None or a term added to the scores, broadcastable to (B, N, T, S): 0 where a token may be
            attended to, the most negative number where not, or any bias; or whether it may, a bool.

    Returns:
        The output (B, T, N, H) and the attention probabilities (B, N, T, S).
    """
    batch, num_heads, num_tokens, head_dim = query.shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    # The query heads that share a key head are laid one below the other, so keys and values are never copied.
    num_key_heads, num_sources = key.shape[1:3]
    folded = (query * scaling).reshape(batch, num_key_heads, -1, head_dim)
    scores = torch.matmul(folded, key.transpose(2, 3)).view(batch, num_heads, num_tokens, num_sources)
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # true where a token may be attended to
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        if attention_mask.dtype != scores.dtype:  # under autocast, where sdpa rounds the mask too
            attention_mask = attention_mask.to(scores.dtype).clamp(min=torch.finfo(scores.dtype).min)
        scores = scores + attention_mask
    probabilities = F.softmax(scores, dim=-1).to(value.dtype)
    weights = F.dropout(probabilities, p=dropout, training=module.training) if dropout else probabilities
    output = torch.matmul(weights.reshape(batch, num_key_heads, -1, num_sources), value)
    return output.view(batch, num_heads, num_tokens, head_dim).transpose(1, 2), weights


class MultiHeadAttention(nn.Module):
    """Multi-head attention: every token asks N questions of every source token (Vaswani et al. 2017, section 3.2.2).

    One class serves self-attention, causal attention, cross-attention, grouped-query attention, rotary positions, and
    DETR's separate position term on queries and keys. The product itself runs in the backend that transformers'
    attention interface names: eager, sdpa, flash, flex or paged.
    """

    def __init__(self, config, layer_idx: int, *, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.use_bias)
        self.o_proj.num_residual_branches = 1  # of its stack, by which `residual_init` starts it
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
        asking=None,
        **kwargs,
    ):
        """
        Args:
            hidden_states: (B, T, D), which ask.
            source_states: (B, S, D), which answer; None for self-attention.
            attention_mask: in the form of the backend in use (`create_causal_mask`, `create_bidirectional_mask`).
            rotary: the pair from `rotary_angles`, or None.
            query_position, key_position: (B, T, D) and (B, S, D), added before the query and the key projection but
                not before the value's (Carion et al. 2020, figure 10).
            packing: the `Packing` of `hidden_states` (1, M, D), which attend to each other in their padded places.
            asking: the `Packing` or `FirstToken` of the tokens whose output is wanted; the others only answer.
            **kwargs: under `CACHE_NAME` a transformers cache, which stores this call's keys and values and returns all
                that it holds; the others go to the attention backend.

        Returns:
            The output (B, T, D), or of the `asking` tokens alone, as they pack it; and the probabilities (B, N, T, S)
            or None where the backend does not form them.
        """
        source_states = hidden_states if source_states is None else source_states
        query_states = hidden_states if query_position is None else hidden_states + query_position
        query = self.q_proj(query_states if asking is None else asking.pack(query_states))
        key = self.k_proj(source_states if key_position is None else source_states + key_position)
        query = self._split_heads(query if asking is None else asking.unpack(query))  # (B, N, T, H)
        key = self._split_heads(key)  # (B, K, S, H)
        value = self._split_heads(self.v_proj(source_states))
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if (cache := kwargs.pop(CACHE_NAME, None)) is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # a paged one changes kwargs, too
        attend = partial(self._attend, mask=attention_mask, packing=packing, asking=asking, **kwargs)
        # Padded again, queries, keys, values and scores are the largest tensors of a block.
        recompute = packing is not None and self.training and not self.attention_dropout
        return project(self.o_proj, attend, query, key, value, recompute=recompute)

    def _attend(self, query, key, value, mask, packing, asking, **kwargs):
        """Queries, keys and values (B, heads, T or S, H) to what the heads found (B, T, N H), and the probabilities."""
        if packing is not None:
            query, key, value = (packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)
        output = output.flatten(2)  # (B, T, N, H) -> (B, T, N H)
        for chosen in (packing, asking):
            output = output if chosen is None else chosen.pack(output)
        return output, weights

    def _split_heads(self, projected):
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


# ------------------------------------------------------------------------------------- feed-forward, norms, block


class FeedForward(nn.Module):
    """down(act(up(x))), the same for every token (Vaswani et al. 2017, section 3.3), or with `swiglu`
    down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        # ReLU's gradient needs nothing but its result, which the next product keeps anyway.
        self.recomputes = config.hidden_act != "relu"
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        self.down_proj.num_residual_branches = 1
        self.gate_proj = None
        if config.hidden_act == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)

    def forward(self, hidden_states):
        """(B, T, D) -> (B, T, D)."""
        wide = [linear(hidden_states) for linear in (self.up_proj, self.gate_proj) if linear is not None]
        # What goes into the last projection is the widest tensor of a block.
        recompute = self.training and self.recomputes and not torch.compiler.is_compiling()
        return project(self.down_proj, self._activate, *wide, recompute=recompute)[0]

    def _activate(self, up, gate=None):
        return (self.activation(up) if gate is None else self.activation(gate) * up,)


def project(linear: nn.Module, prepare, *tensors, recompute: bool):
    """linear(x) for x, *others = prepare(*tensors), followed by the others. With `recompute`, and where `linear` is
    nothing but a product, x is not kept for the backward pass but computed again there, which has to be cheap."""
    if not recompute or not is_plain_linear(linear):
        x, *others = prepare(*tensors)
        return linear(x), *others

    def prepare_and_project(weight, bias, *tensors):
        x, *others = prepare(*tensors)
        return F.linear(x, weight, bias), *others

    # The weight is handed over, since the module may have another one by then (torch.func.functional_call).
    arguments = (linear.weight, linear.bias, *tensors)
    return checkpoint(prepare_and_project, *arguments, use_reentrant=False, preserve_rng_state=False)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is W x + b and nothing else: no adapter, no hook, no weight split over devices."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooked = any(hooks) or "forward" in vars(module)
    return type(module) is nn.Linear and type(module.weight) in (nn.Parameter, torch.Tensor) and not hooked


def make_norm(config) -> nn.Module:
    """LayerNorm, g (x - mean) / sqrt(var + eps) + b (Ba et al. 2016, equation 4), or
    RMSNorm, g x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4)."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.use_bias)


class LayerScale(nn.Module):
    """A learned factor for each of D channels, small at first (Touvron et al. 2021, "CaiT", equation 4)."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.full((dim,), float(initial)))

    def forward(self, branch):
        return branch * self.weight


class DropPath(nn.Module):
    """Leaves a branch out for whole samples in training, each with probability `rate`, and scales it up for the others
    (Huang et al. 2016, "stochastic depth")."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch):
        if not self.training:
            return branch
        keep = torch.empty(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(1 - self.rate)
        return branch * (keep / (1 - self.rate))


class TransformerBlock(GradientCheckpointingLayer):
    """Self-attention, optionally cross-attention, feed-forward; each around a residual connection.

    `norm_position` decides where a sublayer f is normalised:
        post: norm(x + f(x)) (Vaswani et al. 2017, section 3.1);
        pre:  x + f(norm(x)) (Xiong et al. 2020, figure 1).

    Args:
        drop_path: probability that a branch is left out in training.
    """

    def __init__(
        self,
        config,
        layer_idx: int,
        *,
        is_causal: bool = False,
        cross_attention: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()

        def after_branch():
            steps = [nn.Dropout(config.hidden_dropout)] if config.hidden_dropout else []
            steps += [LayerScale(config.hidden_size, config.layer_scale)] if config.layer_scale else []
            return nn.Sequential(*steps, *([DropPath(drop_path)] if drop_path else []))

        self.pre_norm = config.norm_position == "pre"
        self.attention = MultiHeadAttention(config, layer_idx, is_causal=is_causal)
        self.attention_norm = make_norm(config)
        self.cross_attention = MultiHeadAttention(config, layer_idx) if cross_attention else None
        self.cross_attention_norm = make_norm(config) if cross_attention else None
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = make_norm(config)
        self.attention_branch = after_branch()
        self.cross_attention_branch = after_branch() if cross_attention else None
        self.feed_forward_branch = after_branch()

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        position_embeddings=None,
        encoder_position_embeddings=None,
        asking=None,
        **kwargs,
    ):
        """
        Args:
            hidden_states: (B, T, D).
            encoder_hidden_states: (B, S, D), what cross-attention looks at.
            position_embeddings, encoder_position_embeddings: (B, T, D) and (B, S, D), added to queries and keys in
                every block, as DETR does; None where positions were added to the input once. What has a gradient is
                best given by place: gradient checkpointing looks for it there.
            asking: the `Packing` or `FirstToken` of the tokens whose states are wanted.
            **kwargs: on to self-attention (`rotary`, the cache) and to the attention backend.

        Returns:
            (B, T, D), or the `asking` tokens alone, as they pack them.
        """

        def attend(states):
            return self.attention(
                states,
                attention_mask,
                query_position=position_embeddings,
                key_position=position_embeddings,
                asking=asking,
                **kwargs,
            )[0]

        def cross_attend(states):
            return self.cross_attention(
                states,
                encoder_attention_mask,
                source_states=encoder_hidden_states,
                query_position=position_embeddings,
                key_position=encoder_position_embeddings,
            )[0]

        hidden_states = self._residual(hidden_states, attend, self.attention_norm, self.attention_branch, asking)
        if self.cross_attention is not None:
            norm, branch = self.cross_attention_norm, self.cross_attention_branch
            hidden_states = self._residual(hidden_states, cross_attend, norm, branch)
        return self._residual(hidden_states, self.feed_forward, self.feed_forward_norm, self.feed_forward_branch)

    def _residual(self, hidden_states, sublayer, norm, branch, asking=None):
        change = branch(sublayer(norm(hidden_states) if self.pre_norm else hidden_states))
        hidden_states = (hidden_states if asking is None else asking.pack(hidden_states)) + change
        return hidden_states if self.pre_norm else norm(hidden_states)


class TransformerStack(nn.ModuleList):
    """Blocks one after the other (Vaswani et al. 2017, figure 1): an encoder, or with `is_causal` and
    `cross_attention` a decoder. Calling it passes its arguments to every block, but `asking` to the last one alone:
    there the tokens that nobody reads serve as keys and values, and are spared the other projections and the
    feed-forward."""

    def __init__(self, config, num_layers: int, *, is_causal: bool = False, cross_attention: bool = False):
        super().__init__(
            TransformerBlock(
                config,
                layer_idx,
                is_causal=is_causal,
                cross_attention=cross_attention,
                drop_path=config.drop_path * layer_idx / max(1, num_layers - 1),  # the deeper, the more often
            )
            for layer_idx in range(num_layers)
        )
        for module in self.modules():
            if hasattr(module, "num_residual_branches"):
                module.num_residual_branches = (3 if cross_attention else 2) * num_layers

    def forward(self, hidden_states, *args, asking=None, **kwargs):
        for number, block in enumerate(self, start=1):
            chosen = {} if asking is None or number < len(self) else {"asking": asking}
            hidden_states = block(hidden_states, *args, **chosen, **kwargs)
        return hidden_states


# ---------------------------------------------------------------------------------------------------- positions


def sinusoidal_encoding(positions, dim: int, temperature: float = 10000.0):
    """PE(p, 2i) = sin(p / temperature^(2i/dim)), PE(p, 2i+1) = cos(same) (Vaswani et al. 2017, section 3.5).

    Args:
        positions: (...), of any real kind: token numbers, or coordinates.
        dim: even size of the encoding.

    Returns:
        (..., dim), float32.
    """
    if dim % 2:
        raise ValueError(f"a sinusoidal encoding needs an even size, not {dim}")
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.to(torch.float32)[..., None] / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def sinusoidal_encoding_2d(rows, columns, dim: int, temperature: float = 10000.0):
    """Half of the encoding tells the row, the other half the column (Carion et al. 2020, appendix A.4).

    Args:
        rows, columns: (...), the vertical and the horizontal coordinate of each place.
        dim: size of the encoding, a multiple of four.

    Returns:
        (..., dim), float32.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sinusoidal encoding needs a size divisible by four, not {dim}")
    encode = partial(sinusoidal_encoding, dim=dim // 2, temperature=temperature)
    return torch.cat((encode(rows), encode(columns)), dim=-1)


class LearnedPositions2D(nn.Module):
    """A learned vector for each column and each row, half the size each: places in one row or in one column share a
    half (Carion et al. 2020's learned variant, the column first as there)."""

    def __init__(self, num_rows: int, num_columns: int, dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"learned two-dimensional positions need an even size, not {dim}")
        self.column_embeddings = nn.Embedding(num_columns, dim // 2)
        self.row_embeddings = nn.Embedding(num_rows, dim // 2)

    def forward(self, height: int, width: int):
        """The encodings (height, width, D) of the top left part of the grid."""
        columns = self.column_embeddings.weight[:width].expand(height, -1, -1)
        rows = self.row_embeddings.weight[:height, None].expand(-1, width, -1)
        return torch.cat((columns, rows), dim=-1)


def rotary_angles(position_ids, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32):
    """The rotations of rotary position embedding (Su et al. 2021, equation 15): pair i of a head turns by
    p theta^(-2i/H), so that a product of query and key depends on the distance of their tokens alone.

    Returns:
        Cosines and sines, (B, 1, T, H / 2) each. Nothing is stored, so there is nothing to restore or to move.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids.to(torch.float32)[:, None, :, None] / theta**exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_angles_2d(rows, columns, head_dim: int, theta: float = 100.0, dtype: torch.dtype = torch.float32):
    """Rotations for places in a plane: the first half of the pairs turns by the row, the other by the column (Heo et
    al. 2024, "Rotary position embedding for vision transformer", section 3.2, axial frequencies).

    Args:
        rows, columns: (P,), the coordinates of each place.
        head_dim: a multiple of four.

    Returns:
        Cosines and sines, (1, 1, P, H / 2) each.
    """
    if head_dim % 4:
        raise ValueError(f"two-dimensional rotary positions need a head_dim divisible by four, not {head_dim}")
    parts = [rotary_angles(places[None], head_dim // 2, theta, dtype) for places in (rows, columns)]
    cosines, sines = zip(*parts, strict=True)
    return torch.cat(cosines, dim=-1), torch.cat(sines, dim=-1)


def apply_rotary(states, cosines, sines):
    """Turns each pair of (B, N, T, H) states; as in GPT-NeoX a pair is (i, i + H/2), not two neighbours."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
