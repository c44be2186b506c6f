"""The transformer's block and stack, written once: attention, feed-forward and norms around residual connections.

Every model of this package composes these parts. The dimensions in shape comments:

    B  batch    T  tokens    S  source tokens    D  hidden size    M  tokens of a packed batch

`config` is any `TransformerConfig` (see `base.py`), which documents the fields that are read here. `packing.py` chooses
the tokens that the blocks compute.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder

from .attention import MultiHeadAttention
from .base import CACHE_NAME
from .projections import ResidualLinear, linear_of


def squared_relu(hidden_states: torch.Tensor) -> torch.Tensor:
    """max(0, x)^2 (So et al. 2021, "Primer")."""
    return F.relu(hidden_states).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,  # x Phi(x) (Hendrycks and Gimpel 2016)
    "gelu_new": partial(F.gelu, approximate="tanh"),  # the approximation that GPT and GPT-2 were trained with
    "relu": F.relu,
    "relu2": squared_relu,
    "silu": F.silu,
    "swiglu": F.silu,  # of the gate, which then multiplies a second projection (Shazeer 2020)
}


class FeedForward(nn.Module):
    """down(act(up(x))), the same for every token (Vaswani et al. 2017, section 3.3), or with `swiglu`
    down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config, num_branches: int = 1):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        # ReLU's gradient needs only ReLU's output, which the next product keeps anyway.
        self.recomputes = config.hidden_act != "relu"
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, config.use_bias, num_branches)
        self.gate_proj = None
        if config.hidden_act == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)

    def forward(self, hidden_states):
        """(B, T, D) -> (B, T, D)."""
        wide = [linear(hidden_states) for linear in (self.up_proj, self.gate_proj) if linear is not None]
        # The input of the last projection is the widest tensor of a block.
        recompute = self.training and self.recomputes and not torch.compiler.is_compiling()
        return linear_of(self.down_proj, self._activate, *wide, recompute=recompute)[0]

    def _activate(self, up, gate=None):
        return (self.activation(up) if gate is None else self.activation(gate) * up,)


def make_norm(config) -> nn.Module:
    """LayerNorm, g (x - mean) / sqrt(var + eps) + b (Ba et al. 2016, equation 4), or
    RMSNorm, g x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4)."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.use_bias)


class LayerScale(nn.Module):
    """A learned factor for each of D channels, initially small (Touvron et al. 2021, "CaiT", equation 4)."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.full((dim,), float(initial)))

    def initialise(self, config):
        init.constant_(self.weight, self.initial)

    def forward(self, branch):
        return branch * self.weight


class DropPath(nn.Module):
    """In training, skips a branch for each sample with probability `rate`, and divides it by 1 - `rate` for the others
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
    """Self-attention, optionally cross-attention, and feed-forward, each with a residual connection around it.

    `norm_position` decides where the norm of a sublayer f is:
        post: norm(x + f(x)) (Vaswani et al. 2017, section 3.1);
        pre:  x + f(norm(x)) (Xiong et al. 2020, figure 1).

    Args:
        layer_idx: number of the block in its stack.
        source_size: width of the states that cross-attention attends to. Default: the hidden size.
        drop_path: probability that training skips a branch for a sample.
        num_branches: number of residual branches in the whole stack.
        backend_config: as in `MultiHeadAttention`.
    """

    def __init__(
        self,
        config,
        layer_idx: int,
        *,
        is_causal: bool = False,
        cross_attention: bool = False,
        source_size: int | None = None,
        drop_path: float = 0.0,
        num_branches: int = 1,
        backend_config=None,
    ):
        super().__init__()
        options = {"num_branches": num_branches, "backend_config": backend_config}

        def after_branch():
            steps: list[nn.Module] = [nn.Dropout(config.hidden_dropout)] if config.hidden_dropout else []
            steps += [LayerScale(config.hidden_size, config.layer_scale)] if config.layer_scale else []
            return nn.Sequential(*steps, *([DropPath(drop_path)] if drop_path else []))

        self.pre_norm = config.norm_position == "pre"
        self.attention = MultiHeadAttention(config, layer_idx, is_causal=is_causal, **options)
        self.attention_norm = make_norm(config)
        self.cross_attention = self.cross_attention_norm = None
        if cross_attention:
            self.cross_attention = MultiHeadAttention(config, layer_idx, source_size=source_size, **options)
            self.cross_attention_norm = make_norm(config)
        self.feed_forward = FeedForward(config, num_branches)
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
        *,
        packing=None,
        encoder_packing=None,
        cross_attention_options=None,
        output_tokens=None,
        **kwargs,
    ):
        """
        Args:
            hidden_states: (B, T, D).
            attention_mask, encoder_attention_mask: masks of self- and cross-attention, in the form of the backend.
            encoder_hidden_states: (B, S, D'), the states that cross-attention attends to.
            position_embeddings, encoder_position_embeddings: (B, T, D) and (B, S, D), added to queries and keys in
                every block, as DETR does; None if positions were added to the input. Pass tensors with a gradient by
                position, because gradient checkpointing tracks only those.
            packing, encoder_packing: the `Packing` of `hidden_states` and of `encoder_hidden_states`, if packed.
            cross_attention_options: keyword arguments of the attention backend for cross-attention.
            output_tokens: the `Packing` or `FirstToken` of the tokens whose states are needed.
            **kwargs: the cache under `CACHE_NAME`, for both attentions; all others (`rotary`, and arguments of the
                attention backend) go to self-attention.

        Returns:
            (B, T, D), or only the `output_tokens`, packed.
        """

        def attend(states):
            return self.attention(
                states,
                attention_mask,
                query_position=position_embeddings,
                key_position=position_embeddings,
                packing=packing,
                output_tokens=output_tokens,
                **kwargs,
            )[0]

        def cross_attend(states):
            assert self.cross_attention is not None
            return self.cross_attention(
                states,
                encoder_attention_mask,
                source_states=encoder_hidden_states,
                query_position=position_embeddings,
                key_position=encoder_position_embeddings,
                packing=packing,
                source_packing=encoder_packing,
                **{CACHE_NAME: kwargs.get(CACHE_NAME)},
                **(cross_attention_options or {}),
            )[0]

        hidden_states = self._residual(hidden_states, attend, self.attention_norm, self.attention_branch, output_tokens)
        if self.cross_attention is not None and encoder_hidden_states is not None:
            hidden_states = self._residual(
                hidden_states, cross_attend, self.cross_attention_norm, self.cross_attention_branch
            )
        return self._residual(hidden_states, self.feed_forward, self.feed_forward_norm, self.feed_forward_branch)

    def _residual(self, hidden_states, sublayer, norm, branch, output_tokens=None):
        change = branch(sublayer(norm(hidden_states) if self.pre_norm else hidden_states))
        hidden_states = (hidden_states if output_tokens is None else output_tokens.pack(hidden_states)) + change
        return hidden_states if self.pre_norm else norm(hidden_states)


class TransformerStack(nn.ModuleList):
    """A sequence of blocks (Vaswani et al. 2017, figure 1): an encoder, or with `is_causal` and `cross_attention` a
    decoder.

    A call passes its arguments to every block, but `output_tokens` only to the last. In the last block, tokens whose
    output is not used serve as keys and values, and skip the other projections and the feed-forward layer.

    Args:
        num_layers: number of blocks.
        is_causal, cross_attention, source_size, backend_config: as in `TransformerBlock`.
    """

    def __init__(
        self,
        config,
        num_layers: int,
        *,
        is_causal: bool = False,
        cross_attention: bool = False,
        source_size: int | None = None,
        backend_config=None,
    ):
        super().__init__(
            TransformerBlock(
                config,
                layer_idx,
                is_causal=is_causal,
                cross_attention=cross_attention,
                source_size=source_size,
                drop_path=config.drop_path * layer_idx / max(1, num_layers - 1),
                num_branches=(3 if cross_attention else 2) * num_layers,
                backend_config=backend_config,
            )
            for layer_idx in range(num_layers)
        )

    def forward(self, hidden_states, *args, output_tokens=None, **kwargs):
        for number, block in enumerate(self, start=1):
            chosen = {} if output_tokens is None or number < len(self) else {"output_tokens": output_tokens}
            hidden_states = block(hidden_states, *args, **chosen, **kwargs)
        return hidden_states


# The module outputs that transformers records when a caller requests hidden states or attention maps.
ENCODER_OUTPUTS = {
    "hidden_states": TransformerBlock,
    "attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="attention"),
}
DECODER_OUTPUTS = {
    **ENCODER_OUTPUTS,
    "cross_attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="cross_attention"),
}
