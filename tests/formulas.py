"""The formulas of the parts written plainly, for the parts to be compared with in float64."""

import math

import torch

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # both sides in float64
SINGLE = {"rtol": 1e-5, "atol": 1e-5}  # angles are float32


def states(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def causal_bias(num_tokens):
    return torch.full((num_tokens, num_tokens), -torch.inf, dtype=torch.float64).triu(1)


def affine(layer, x):
    """W x + b"""
    y = torch.einsum("oi,...i->...o", layer.weight, x)
    return y if layer.bias is None else y + layer.bias


def root_mean_square_norm(x, gain, eps):
    return gain * x / torch.sqrt((x**2).sum(-1, keepdim=True) / x.shape[-1] + eps)


def layer_norm(x, gain, bias, eps):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return gain * (x - mean) / torch.sqrt(variance + eps) + bias


def rotate(x, positions, theta):
    """Pair (i, i + H/2) read as a complex number and turned by p theta^(-2i/H)."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * positions[..., None] * frequencies)
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention(layer, x, source=None, *, bias=0.0, query_position=0.0, key_position=0.0, positions=None, theta=None):
    """Vaswani et al. 2017, section 3.2, one head at a time. Returns the output and the probabilities."""
    source = x if source is None else source
    config, size = layer.config, layer.config.head_dim
    queries = affine(layer.q_proj, x + query_position)
    keys = affine(layer.k_proj, source + key_position)
    values = affine(layer.v_proj, source)
    outputs, probabilities = [], []
    for head in range(config.num_attention_heads):
        shared = head * config.num_key_value_heads // config.num_attention_heads  # the key head that serves this one
        query = queries[..., head * size : (head + 1) * size]
        key, value = (part[..., shared * size : (shared + 1) * size] for part in (keys, values))
        if config.qk_norm:
            query = root_mean_square_norm(query, layer.q_norm.weight, config.norm_eps)
            key = root_mean_square_norm(key, layer.k_norm.weight, config.norm_eps)
        if positions is not None:
            query, key = rotate(query, positions, theta), rotate(key, positions, theta)
        scores = torch.einsum("bth,bsh->bts", query, key) / math.sqrt(size) + bias
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(torch.einsum("bts,bsh->bth", weights, value))
        probabilities.append(weights)
    return affine(layer.o_proj, torch.cat(outputs, -1)), torch.stack(probabilities, 1)


ACTIVATION_FORMULAS = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu2": lambda x: torch.where(x > 0, x**2, 0.0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def feed_forward(layer, x, act):
    if act == "swiglu":
        inner = ACTIVATION_FORMULAS["silu"](affine(layer.gate_proj, x)) * affine(layer.up_proj, x)
    else:
        inner = ACTIVATION_FORMULAS[act](affine(layer.up_proj, x))
    return affine(layer.down_proj, inner)
