"""Every formula of layers.py against the same formula written plainly, in float64."""

import pytest
import torch
from torch.testing import assert_close

from hf_models.base import TransformerConfig
from hf_models.layers import DropPath, FeedForward, LayerScale, TransformerBlock, TransformerStack, make_norm
from hf_models.packing import FirstToken, Packing
from hf_models.positions import rotary_angles
from tests.formulas import (
    ACTIVATION_FORMULAS,
    EXACT,
    attention,
    causal_bias,
    feed_forward,
    layer_norm,
    root_mean_square_norm,
    states,
)


@pytest.mark.parametrize("act", [*ACTIVATION_FORMULAS, "swiglu"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_feed_forward_is_the_formula(make_layer, act, use_bias):
    layer, x = make_layer(FeedForward, hidden_act=act, use_bias=use_bias), states(2, 7, 24)
    assert_close(layer(x), feed_forward(layer, x, act), **EXACT)


def test_layer_norm_is_the_formula(randomise):
    config = TransformerConfig(hidden_size=24, norm_eps=1e-3)
    norm, x = randomise(make_norm(config)).double(), states(2, 7, 24)
    assert_close(norm(x), layer_norm(x, norm.weight, norm.bias, 1e-3), **EXACT)


def test_layer_norm_without_biases_has_none():
    assert make_norm(TransformerConfig(hidden_size=24, use_bias=False)).bias is None


def test_rms_norm_is_the_formula(randomise):
    config = TransformerConfig(hidden_size=24, norm="rmsnorm", norm_eps=1e-3)
    norm, x = randomise(make_norm(config)).double(), states(2, 7, 24)
    assert_close(norm(x), root_mean_square_norm(x, norm.weight, 1e-3), **EXACT)


def normalise(norm, x):
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def test_pre_norm_block_is_the_formula(make_layer):
    block, x = make_layer(TransformerBlock, 0, norm_position="pre"), states(2, 7, 24)
    h = x + attention(block.attention, normalise(block.attention_norm, x))[0]
    expected = h + feed_forward(block.feed_forward, normalise(block.feed_forward_norm, h), "gelu")
    assert_close(block(x), expected, **EXACT)


def test_post_norm_block_is_the_formula(make_layer):
    block, x = make_layer(TransformerBlock, 0, norm_position="post"), states(2, 7, 24)
    h = normalise(block.attention_norm, x + attention(block.attention, x)[0])
    expected = normalise(block.feed_forward_norm, h + feed_forward(block.feed_forward, h, "gelu"))
    assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_decoder_block_attends_to_itself_then_to_the_encoder(make_layer, norm_position):
    block = make_layer(
        TransformerBlock, 0, norm_position=norm_position, layer_kwargs={"is_causal": True, "cross_attention": True}
    )
    x, source, position, source_position = states(2, 5, 24), states(2, 9, 24), states(2, 5, 24), states(2, 9, 24)
    source_bias = states(2, 1, 1, 9)
    output = block(
        x,
        causal_bias(5).expand(2, 1, 5, 5),
        encoder_hidden_states=source,
        encoder_attention_mask=source_bias,
        position_embeddings=position,
        encoder_position_embeddings=source_position,
    )

    def residual(h, sublayer, norm):
        return h + sublayer(normalise(norm, h)) if norm_position == "pre" else normalise(norm, h + sublayer(h))

    def attend(h):
        terms = {"query_position": position, "key_position": position}
        return attention(block.attention, h, bias=causal_bias(5), **terms)[0]

    def cross_attend(h):
        terms = {"query_position": position, "key_position": source_position}
        return attention(block.cross_attention, h, source, bias=source_bias[:, 0], **terms)[0]

    expected = residual(x, attend, block.attention_norm)
    expected = residual(expected, cross_attend, block.cross_attention_norm)
    expected = residual(expected, lambda h: feed_forward(block.feed_forward, h, "gelu"), block.feed_forward_norm)
    assert_close(output, expected, **EXACT)


def test_layer_scale_is_a_factor_for_each_channel(randomise):
    scale, x = LayerScale(24, 0.1), states(2, 7, 24)
    assert (scale.weight == 0.1).all()
    randomise(scale).double()
    assert_close(scale(x), torch.einsum("btd,d->btd", x, scale.weight), **EXACT)


def test_drop_path_leaves_whole_samples_out_in_training_alone():
    """And scales the others up, so that on average nothing changes."""
    drop, x = DropPath(0.25), states(4000, 2, 3)
    assert torch.equal(drop.eval()(x), x)
    ratios = drop.train()(x) / x
    dropped = (ratios == 0).all(2).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert_close(ratios[~dropped], torch.full_like(ratios[~dropped], 1 / 0.75))


def test_a_block_scales_its_branches_and_leaves_them_out(make_layer):
    """x + drop(scale f(norm(x))): what is left out is the branch, never the sample."""
    block, x = make_layer(TransformerBlock, 0, layer_scale=0.5, layer_kwargs={"drop_path": 0.5}), states(2, 7, 24)
    h = x + attention(block.attention, normalise(block.attention_norm, x))[0] * block.attention_branch[0].weight
    branch = feed_forward(block.feed_forward, normalise(block.feed_forward_norm, h), "gelu")
    assert_close(block(x), h + branch * block.feed_forward_branch[0].weight, **EXACT)
    block.train()
    assert any(torch.equal(block(x)[0], x[0]) for _ in range(50))  # both branches left out


def test_the_deeper_a_block_of_a_stack_the_more_often_its_branches_are_left_out(make_layer):
    stack = make_layer(TransformerStack, 4, drop_path=0.3)
    rates = [sum(part.rate for part in block.feed_forward_branch if isinstance(part, DropPath)) for block in stack]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_a_stack_is_its_blocks_one_after_the_other(make_layer):
    stack, x = make_layer(TransformerStack, 3), states(2, 7, 24)
    assert torch.equal(stack(x), stack[2](stack[1](stack[0](x))))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("first", [True, False], ids=["first token", "chosen tokens"])
def test_a_stack_gives_the_tokens_asked_for_and_their_gradients(make_layer, norm_position, backend, first):
    stack = make_layer(TransformerStack, 3, norm_position=norm_position, backend=backend, qk_norm=True)
    x, rotary = states(2, 7, 24).requires_grad_(), rotary_angles(torch.arange(7)[None], 6, dtype=torch.float64)
    is_chosen = torch.tensor([[1, 0, 0, 0, 0, 0, 0]] * 2 if first else [[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1]])
    output_tokens = FirstToken(7) if first else Packing(is_chosen)
    whole, some = stack(x, rotary=rotary), stack(x, rotary=rotary, output_tokens=output_tokens)
    assert some.shape == ((2, 1, 24) if first else (1, 4, 24))
    whole = whole * is_chosen[..., None]
    assert_close(output_tokens.unpack(some), whole, **EXACT)
    wanted, parameters = states(2, 7, 24), [x, *stack.parameters()]
    expected = torch.autograd.grad((whole * wanted).sum(), parameters)
    assert_close(torch.autograd.grad((output_tokens.unpack(some) * wanted).sum(), parameters), expected, **EXACT)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_without_positions_an_encoder_is_permutation_equivariant(make_layer, norm_position, backend):
    """f(P x) = P f(x): attention alone does not know any order, which is why positions exist."""
    stack = make_layer(TransformerStack, 3, norm_position=norm_position, backend=backend)
    x, order = states(2, 7, 24), torch.randperm(7)
    assert_close(stack(x[:, order]), stack(x)[:, order], **EXACT)
    position = states(2, 7, 24)  # and with positions it does
    moved = stack(x[:, order], position_embeddings=position)
    assert (moved - stack(x, position_embeddings=position)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_causal_stack_never_looks_ahead(make_layer, backend):
    stack = make_layer(TransformerStack, 3, backend=backend, layer_kwargs={"is_causal": True})
    mask = causal_bias(7).expand(1, 1, 7, 7) if backend == "eager" else None
    x = states(1, 7, 24)
    for changed in range(1, 7):
        other = x.clone()
        other[:, changed] = states(24)
        difference = (stack(other, mask) - stack(x, mask)).abs().amax(-1)[0]
        assert (difference[:changed] == 0).all()
        assert (difference[changed:] > 1e-6).all()
