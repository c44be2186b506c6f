"""Every formula of attention.py against the same formula written plainly, in float64."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_models.attention import (
    MultiHeadAttention,
    additive_scores,
    dot_scores,
    eager_attention_forward,
    general_scores,
    masked_softmax,
    scaled_dot_scores,
    weighted_sum,
)
from hf_models.base import CACHE_NAME
from hf_models.layers import TransformerBlock
from hf_models.packing import Packing
from hf_models.positions import rotary_angles
from tests.formulas import EXACT, SINGLE, attention, causal_bias, states


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1},
        {"head_dim": 10},
        {"qk_norm": True},
        {"use_bias": False},
    ],
    ids=str,
)
def test_self_attention_is_the_formula(make_layer, backend, fields):
    layer, x = make_layer(MultiHeadAttention, 0, backend=backend, **fields), states(2, 7, 24)
    output, probabilities = layer(x)
    expected, expected_probabilities = attention(layer, x)
    assert_close(output, expected, **EXACT)
    if backend == "eager":
        assert_close(probabilities, expected_probabilities, **EXACT)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_cross_attention_with_separate_position_terms_is_the_formula(make_layer, backend, key_value_heads):
    layer = make_layer(MultiHeadAttention, 0, backend=backend, num_key_value_heads=key_value_heads)
    x, source, query_position, key_position = states(2, 5, 24), states(2, 9, 24), states(2, 5, 24), states(2, 9, 24)
    output = layer(x, source_states=source, query_position=query_position, key_position=key_position)[0]
    expected = attention(layer, x, source, query_position=query_position, key_position=key_position)[0]
    assert_close(output, expected, **EXACT)
    # The position term reaches queries and keys but never values: with a single source to look at, nothing changes.
    alone = layer(x, source_states=source[:, :1], key_position=key_position[:, :1])[0]
    assert_close(alone, layer(x, source_states=source[:, :1])[0], **EXACT)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_an_additive_bias_is_added_to_the_scores(make_layer, backend):
    layer, x = make_layer(MultiHeadAttention, 0, backend=backend), states(2, 7, 24)
    bias = states(7, 7)
    assert_close(layer(x, bias.expand(2, 1, 7, 7))[0], attention(layer, x, bias=bias)[0], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_of_another_type_masks_as_well(make_layer, dtype, mask_dtype):
    """As under autocast; where everything is masked, as in a row of padding, the result is still a number."""
    layer, (query, key, value) = make_layer(MultiHeadAttention, 0), torch.randn(3, 2, 4, 7, 6).to(dtype)
    is_masked = torch.rand(2, 1, 7, 7) < 0.4
    is_masked[:, :, :, 0], is_masked[1, 0, 3] = False, True
    expected, actual = (
        eager_attention_forward(
            layer,
            query,
            key,
            value,
            torch.zeros_like(is_masked, dtype=one).masked_fill(is_masked, torch.finfo(one).min),
        )[0]
        for one in (dtype, mask_dtype)
    )
    assert actual.dtype == dtype and actual.isfinite().all()
    some_are_seen = ~is_masked[:, 0].all(-1)
    assert_close(actual[some_are_seen], expected[some_are_seen], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_causal_attention_sees_itself_and_what_came_before(make_layer, backend):
    layer, x = make_layer(MultiHeadAttention, 0, backend=backend, layer_kwargs={"is_causal": True}), states(2, 7, 24)
    mask = causal_bias(7).expand(2, 1, 7, 7) if backend == "eager" else None  # sdpa reads `is_causal` itself
    assert_close(layer(x, mask)[0], attention(layer, x, bias=causal_bias(7))[0], **EXACT)


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 2, "qk_norm": True}], ids=str)
def test_rotary_attention_is_the_formula(make_layer, fields):
    layer, x = make_layer(MultiHeadAttention, 0, **fields), states(2, 7, 24)
    positions = torch.stack((torch.arange(7), torch.arange(7) + 30))
    output = layer(x, rotary=rotary_angles(positions, layer.head_dim, 100.0, torch.float64))[0]
    assert_close(output, attention(layer, x, positions=positions, theta=100.0)[0], **SINGLE)


def test_attention_dropout_drops_probabilities_in_training_alone(make_layer):
    layer, x = make_layer(MultiHeadAttention, 0, attention_dropout=0.5), states(2, 7, 24)
    probabilities = layer(x)[1]
    assert_close(probabilities, attention(layer, x)[1], **EXACT)
    dropped = layer.train()(x)[1]
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    assert_close(dropped[kept], 2 * probabilities[kept], **EXACT)


def test_a_dropout_of_zero_changes_nothing_in_training(make_layer):
    block, x = make_layer(TransformerBlock, 0), states(2, 7, 24)
    assert torch.equal(block(x), block.train()(x))


# ------------------------------------------------------------------------------------- scores, softmax, weighted sum

SCORES = {
    "dot": (dot_scores, lambda q, k: sum(q * k)),
    "scaled_dot": (scaled_dot_scores, lambda q, k: sum(q * k) / math.sqrt(len(q))),
    "general": (lambda q, k: general_scores(q, k, WEIGHT), lambda q, k: q @ (WEIGHT @ k)),
    "additive": (lambda q, k: additive_scores(q, k, VECTOR), lambda q, k: sum(VECTOR * torch.tanh(q + k))),
}
WEIGHT, VECTOR = states(6, 6), states(6)
every_score = pytest.mark.parametrize(("score", "formula"), SCORES.values(), ids=SCORES.keys())


@every_score
def test_a_score_is_its_formula(score, formula):
    query, key = states(2, 3, 6), states(2, 5, 6)
    expected = torch.stack(
        [torch.stack([formula(q, k) for q in query[row] for k in key[row]]).view(3, 5) for row in range(2)]
    )
    assert_close(score(query, key), expected, **EXACT)


def test_general_scores_take_keys_of_another_size():
    query, key, weight = states(2, 3, 6), states(2, 5, 4), states(6, 4)
    assert_close(general_scores(query, key, weight), torch.einsum("bti,ij,bsj->bts", query, weight, key), **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_the_masked_softmax_is_its_formula(temperature, kind):
    scores, seen = states(2, 4, 5), torch.rand(2, 1, 5) < 0.6
    seen[:, :, 0] = True
    mask = {"none": None, "bool": seen, "additive": torch.zeros(2, 1, 5).double().masked_fill(~seen, -math.inf)}[kind]
    odds = (scores / temperature).exp() * (1 if kind == "none" else seen)
    assert_close(masked_softmax(scores, mask, temperature), odds / odds.sum(-1, keepdim=True), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_query_whose_sources_are_all_masked_gets_no_nan(dtype):
    scores = (10 * torch.randn(2, 3, 4) - 50).to(dtype)
    assert_close(masked_softmax(scores, torch.zeros(3, 4, dtype=torch.bool)), torch.full_like(scores, 0.25))
    for mask in (torch.full((3, 4), -math.inf), torch.full((3, 4), torch.finfo(dtype).min, dtype=dtype)):
        assert_close(masked_softmax(scores, mask).sum(-1), torch.ones_like(scores[..., 0]), rtol=1e-2, atol=1e-2)


@every_score
def test_attention_without_positions_is_permutation_equivariant_and_a_pooled_set_invariant(score, formula):
    x, order = states(2, 5, 6), torch.tensor([3, 0, 4, 1, 2])

    def attend(queries, sources):
        return weighted_sum(masked_softmax(score(queries, sources)), sources)

    assert_close(attend(x[:, order], x[:, order]), attend(x, x)[:, order], **EXACT)
    one_query = states(2, 1, 6)
    assert_close(attend(one_query, x[:, order]), attend(one_query, x), **EXACT)


def test_a_low_temperature_chooses_and_a_high_one_averages():
    scores = states(3, 5)
    assert_close(masked_softmax(scores, temperature=1e-3).argmax(-1), scores.argmax(-1))
    assert masked_softmax(scores, temperature=1e-3).amax(-1).min() > 0.99
    assert_close(masked_softmax(scores, temperature=1e6), torch.full_like(scores, 0.2), rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------- a source, kept and packed and shared


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("source_size", [None, 10])
def test_a_source_of_any_width_is_projected_once_and_kept(make_layer, backend, source_size):
    layer = make_layer(MultiHeadAttention, 0, backend=backend, layer_kwargs={"source_size": source_size})
    x, source = states(2, 5, 24), states(2, 9, source_size or 24)
    expected, calls = attention(layer, x, source)[0], []
    layer.k_proj.register_forward_hook(lambda *_: calls.append("k_proj"))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for piece, place in zip(x.split(1, dim=1), range(5), strict=True):
        output = layer(piece, source_states=source, **{CACHE_NAME: cache})[0]
        assert_close(output, expected[:, place : place + 1], **EXACT)
    assert calls == ["k_proj"] and cache.cross_attention_cache.layers[0].keys.shape == (2, 4, 9, 6)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("packs_source", [True, False], ids=["packed source", "padded source"])
def test_a_packed_target_looks_at_its_own_source_and_gets_the_same_gradients(make_layer, backend, packs_source):
    block = make_layer(TransformerBlock, 0, backend=backend, layer_kwargs={"cross_attention": True, "source_size": 10})
    x, source = states(2, 5, 24).requires_grad_(), states(2, 7, 10).requires_grad_()
    is_target, is_source = torch.arange(5) < torch.tensor([[5], [3]]), torch.arange(7) < torch.tensor([[4], [7]])
    least = torch.finfo(torch.float64).min
    masks = [
        torch.zeros(2, 1, 1, seen.shape[1], dtype=torch.float64).masked_fill(~seen[:, None, None], least)
        for seen in (is_target, is_source)
    ]
    padded = block(x, masks[0], source, masks[1])[is_target]
    target_packing, source_packing = Packing(is_target), Packing(is_source) if packs_source else None
    packed = block(
        target_packing.pack(x),
        masks[0],
        source_packing.pack(source) if packs_source else source,
        masks[1],
        packing=target_packing,
        encoder_packing=source_packing,
    )[0]
    assert_close(packed, padded, **EXACT)
    wanted, inputs = states(8, 24), [x, source, *block.parameters()]
    expected = torch.autograd.grad((padded * wanted).sum(), inputs)
    assert_close(torch.autograd.grad((packed * wanted).sum(), inputs), expected, **EXACT)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_beams_share_the_source_of_their_input(make_layer, backend, num_tokens):
    layer = make_layer(MultiHeadAttention, 0, backend=backend, num_key_value_heads=2)
    x, source = states(2 * 3, num_tokens, 24), states(2, 9, 24)
    mask = torch.zeros(2, 1, num_tokens, 9).double()
    mask[1, :, :, 6:] = torch.finfo(torch.float64).min
    output, probabilities = layer(x, mask, source_states=source)
    repeated = [one.repeat_interleave(3, dim=0) for one in (mask, source)]
    expected, expected_probabilities = layer(x, repeated[0], source_states=repeated[1])
    assert_close(output, expected, **EXACT)
    if backend == "eager":
        assert_close(probabilities, expected_probabilities, **EXACT)


def test_cross_attention_gives_the_backend_its_own_options(make_layer, monkeypatch):
    block = make_layer(TransformerBlock, 0, layer_kwargs={"cross_attention": True})
    seen = []

    def attend(module, query, key, value, mask, scaling=None, dropout=0.0, **options):
        seen.append(options)
        return eager_attention_forward(module, query, key, value, mask, scaling, dropout)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "ours", attend)
    block.attention.config._attn_implementation = "ours"
    block(states(1, 3, 24), None, states(1, 4, 24), cross_attention_options={"max_length_k": 4}, max_length_k=3)
    assert seen == [{"max_length_k": 3}, {"max_length_k": 4}]
