"""Every formula of layers.py against the same formula written plainly, in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_models.base import TransformerConfig
from hf_models.layers import (
    DropPath,
    FeedForward,
    LayerScale,
    LearnedPositions2D,
    MultiHeadAttention,
    TransformerBlock,
    TransformerStack,
    apply_rotary,
    eager_attention_forward,
    make_norm,
    rotary_angles,
    rotary_angles_2d,
    sinusoidal_encoding,
    sinusoidal_encoding_2d,
)
from hf_models.packing import FirstToken, Packing

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # both sides in float64
SINGLE = {"rtol": 1e-5, "atol": 1e-5}  # angles are float32


@pytest.fixture
def make(randomise):
    """A randomised float64 layer: `make(MultiHeadAttention, layer arguments, config field=value, ...)`."""

    def make(layer_class, *args, layer_kwargs=None, backend="eager", **fields):
        sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
        config = TransformerConfig(**{**sizes, **fields}, attn_implementation=backend)
        return randomise(layer_class(config, *args, **(layer_kwargs or {}))).double().eval()

    return make


def states(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def causal_bias(num_tokens):
    return torch.full((num_tokens, num_tokens), -torch.inf, dtype=torch.float64).triu(1)


# ------------------------------------------------------------------------------------------------- the formulas


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


# ----------------------------------------------------------------------------------------------------- attention


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
def test_self_attention_is_the_formula(make, backend, fields):
    layer, x = make(MultiHeadAttention, 0, backend=backend, **fields), states(2, 7, 24)
    output, probabilities = layer(x)
    expected, expected_probabilities = attention(layer, x)
    assert_close(output, expected, **EXACT)
    if backend == "eager":
        assert_close(probabilities, expected_probabilities, **EXACT)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_cross_attention_with_separate_position_terms_is_the_formula(make, backend, key_value_heads):
    layer = make(MultiHeadAttention, 0, backend=backend, num_key_value_heads=key_value_heads)
    x, source, query_position, key_position = states(2, 5, 24), states(2, 9, 24), states(2, 5, 24), states(2, 9, 24)
    output = layer(x, source_states=source, query_position=query_position, key_position=key_position)[0]
    expected = attention(layer, x, source, query_position=query_position, key_position=key_position)[0]
    assert_close(output, expected, **EXACT)
    # The position term reaches queries and keys but never values: with a single source to look at, nothing changes.
    alone = layer(x, source_states=source[:, :1], key_position=key_position[:, :1])[0]
    assert_close(alone, layer(x, source_states=source[:, :1])[0], **EXACT)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_an_additive_bias_is_added_to_the_scores(make, backend):
    layer, x = make(MultiHeadAttention, 0, backend=backend), states(2, 7, 24)
    bias = states(7, 7)
    assert_close(layer(x, bias.expand(2, 1, 7, 7))[0], attention(layer, x, bias=bias)[0], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_of_another_type_masks_as_well(make, dtype, mask_dtype):
    """As under autocast; where everything is masked, as in a row of padding, the result is still a number."""
    layer, (query, key, value) = make(MultiHeadAttention, 0), torch.randn(3, 2, 4, 7, 6).to(dtype)
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
def test_causal_attention_sees_itself_and_what_came_before(make, backend):
    layer, x = make(MultiHeadAttention, 0, backend=backend, layer_kwargs={"is_causal": True}), states(2, 7, 24)
    mask = causal_bias(7).expand(2, 1, 7, 7) if backend == "eager" else None  # sdpa reads `is_causal` itself
    assert_close(layer(x, mask)[0], attention(layer, x, bias=causal_bias(7))[0], **EXACT)


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 2, "qk_norm": True}], ids=str)
def test_rotary_attention_is_the_formula(make, fields):
    layer, x = make(MultiHeadAttention, 0, **fields), states(2, 7, 24)
    positions = torch.stack((torch.arange(7), torch.arange(7) + 30))
    output = layer(x, rotary=rotary_angles(positions, layer.head_dim, 100.0, torch.float64))[0]
    assert_close(output, attention(layer, x, positions=positions, theta=100.0)[0], **SINGLE)


def test_attention_dropout_drops_probabilities_in_training_alone(make):
    layer, x = make(MultiHeadAttention, 0, attention_dropout=0.5), states(2, 7, 24)
    probabilities = layer(x)[1]
    assert_close(probabilities, attention(layer, x)[1], **EXACT)
    dropped = layer.train()(x)[1]
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    assert_close(dropped[kept], 2 * probabilities[kept], **EXACT)


def test_a_dropout_of_zero_changes_nothing_in_training(make):
    block, x = make(TransformerBlock, 0), states(2, 7, 24)
    assert torch.equal(block(x), block.train()(x))


# ------------------------------------------------------------------------------------- feed-forward, norms, block


@pytest.mark.parametrize("act", [*ACTIVATION_FORMULAS, "swiglu"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_feed_forward_is_the_formula(make, act, use_bias):
    layer, x = make(FeedForward, hidden_act=act, use_bias=use_bias), states(2, 7, 24)
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


def test_pre_norm_block_is_the_formula(make):
    block, x = make(TransformerBlock, 0, norm_position="pre"), states(2, 7, 24)
    h = x + attention(block.attention, normalise(block.attention_norm, x))[0]
    expected = h + feed_forward(block.feed_forward, normalise(block.feed_forward_norm, h), "gelu")
    assert_close(block(x), expected, **EXACT)


def test_post_norm_block_is_the_formula(make):
    block, x = make(TransformerBlock, 0, norm_position="post"), states(2, 7, 24)
    h = normalise(block.attention_norm, x + attention(block.attention, x)[0])
    expected = normalise(block.feed_forward_norm, h + feed_forward(block.feed_forward, h, "gelu"))
    assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_decoder_block_attends_to_itself_then_to_the_encoder(make, norm_position):
    block = make(
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


def test_a_block_scales_its_branches_and_leaves_them_out(make):
    """x + drop(scale f(norm(x))): what is left out is the branch, never the sample."""
    block, x = make(TransformerBlock, 0, layer_scale=0.5, layer_kwargs={"drop_path": 0.5}), states(2, 7, 24)
    h = x + attention(block.attention, normalise(block.attention_norm, x))[0] * block.attention_branch[0].weight
    branch = feed_forward(block.feed_forward, normalise(block.feed_forward_norm, h), "gelu")
    assert_close(block(x), h + branch * block.feed_forward_branch[0].weight, **EXACT)
    block.train()
    assert any(torch.equal(block(x)[0], x[0]) for _ in range(50))  # both branches left out


def test_the_deeper_a_block_of_a_stack_the_more_often_its_branches_are_left_out(make):
    stack = make(TransformerStack, 4, drop_path=0.3)
    rates = [sum(part.rate for part in block.feed_forward_branch if isinstance(part, DropPath)) for block in stack]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_a_stack_is_its_blocks_one_after_the_other(make):
    stack, x = make(TransformerStack, 3), states(2, 7, 24)
    assert torch.equal(stack(x), stack[2](stack[1](stack[0](x))))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("first", [True, False], ids=["first token", "chosen tokens"])
def test_a_stack_gives_the_tokens_asked_for_and_their_gradients(make, norm_position, backend, first):
    stack = make(TransformerStack, 3, norm_position=norm_position, backend=backend, qk_norm=True)
    x, rotary = states(2, 7, 24).requires_grad_(), rotary_angles(torch.arange(7)[None], 6, dtype=torch.float64)
    is_chosen = torch.tensor([[1, 0, 0, 0, 0, 0, 0]] * 2 if first else [[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1]])
    asking = FirstToken(7) if first else Packing(is_chosen)
    whole, some = stack(x, rotary=rotary), stack(x, rotary=rotary, asking=asking)
    assert some.shape == ((2, 1, 24) if first else (1, 4, 24))
    whole = whole * is_chosen[..., None]
    assert_close(asking.unpack(some), whole, **EXACT)
    wanted, parameters = states(2, 7, 24), [x, *stack.parameters()]
    expected = torch.autograd.grad((whole * wanted).sum(), parameters)
    assert_close(torch.autograd.grad((asking.unpack(some) * wanted).sum(), parameters), expected, **EXACT)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_without_positions_an_encoder_is_permutation_equivariant(make, norm_position, backend):
    """f(P x) = P f(x): attention alone does not know any order, which is why positions exist."""
    stack = make(TransformerStack, 3, norm_position=norm_position, backend=backend)
    x, order = states(2, 7, 24), torch.randperm(7)
    assert_close(stack(x[:, order]), stack(x)[:, order], **EXACT)
    position = states(2, 7, 24)  # and with positions it does
    moved = stack(x[:, order], position_embeddings=position)
    assert (moved - stack(x, position_embeddings=position)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_causal_stack_never_looks_ahead(make, backend):
    stack = make(TransformerStack, 3, backend=backend, layer_kwargs={"is_causal": True})
    mask = causal_bias(7).expand(1, 1, 7, 7) if backend == "eager" else None
    x = states(1, 7, 24)
    for changed in range(1, 7):
        other = x.clone()
        other[:, changed] = states(24)
        difference = (stack(other, mask) - stack(x, mask)).abs().amax(-1)[0]
        assert (difference[:changed] == 0).all()
        assert (difference[changed:] > 1e-6).all()


# ----------------------------------------------------------------------------------------------------- positions


def test_sinusoidal_encoding_is_the_formula():
    encoding = sinusoidal_encoding(torch.arange(50), 12, temperature=1000.0)
    for position in range(50):
        for i in range(6):
            angle = position / 1000.0 ** (2 * i / 12)
            assert encoding[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert encoding[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_two_dimensional_sinusoidal_encoding_tells_the_row_then_the_column():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.linspace(0, 2 * math.pi, 5), indexing="ij")
    encoding = sinusoidal_encoding_2d(rows, columns, 16)
    assert encoding.shape == (4, 5, 16)
    for row in range(4):
        for column in range(5):
            assert_close(encoding[row, column, :8], sinusoidal_encoding(rows[row, column], 8))
            assert_close(encoding[row, column, 8:], sinusoidal_encoding(columns[row, column], 8))


def test_learned_two_dimensional_positions_share_halves_along_rows_and_columns(randomise):
    positions = randomise(LearnedPositions2D(6, 7, 8))
    encoding = positions(4, 5)
    assert encoding.shape == (4, 5, 8)
    for row in range(4):
        for column in range(5):
            assert torch.equal(encoding[row, column, :4], positions.column_embeddings.weight[column])
            assert torch.equal(encoding[row, column, 4:], positions.row_embeddings.weight[row])


def test_rotary_is_a_rotation_of_each_pair():
    x, positions = states(2, 3, 9, 8), torch.stack((torch.arange(9), torch.arange(9) * 5))
    rotated = apply_rotary(x, *rotary_angles(positions, 8, 50.0, torch.float64))
    assert_close(rotated, rotate(x, positions[:, None], 50.0), **SINGLE)
    assert_close(rotated.norm(dim=-1), x.norm(dim=-1), **SINGLE)


def test_two_dimensional_rotary_turns_half_of_the_pairs_by_the_row_and_half_by_the_column():
    """Heo et al. 2024, section 3.2: of the pairs (i, i + H/2), the first half by row theta^(-4i/H), the second by
    column theta^(-4i/H)."""
    rows, columns = torch.rand(9, dtype=torch.float64) * 10, torch.rand(9, dtype=torch.float64) * 10
    x = states(2, 3, 9, 16)
    turned = apply_rotary(x, *rotary_angles_2d(rows, columns, 16, 100.0, torch.float64))
    pairs = torch.complex(x[..., :8], x[..., 8:])
    for i in range(8):
        place, step = (rows, i) if i < 4 else (columns, i - 4)
        angle = place * 100.0 ** (-4 * step / 16)
        expected = pairs[..., i] * torch.exp(1j * angle)
        assert_close(turned[..., i], expected.real, **SINGLE)
        assert_close(turned[..., i + 8], expected.imag, **SINGLE)


def test_rotary_scores_depend_on_the_distance_alone():
    query, key = states(1, 1, 1, 16), states(1, 1, 1, 16)

    def score(query_position, key_position):
        def turn(x, p):
            return apply_rotary(x, *rotary_angles(torch.tensor([[p]]), 16, dtype=torch.float64))

        return (turn(query, query_position) * turn(key, key_position)).sum()

    assert_close(score(7, 3), score(107, 103), **SINGLE)
    assert_close(score(0, 40), score(25, 65), **SINGLE)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize(
    "call",
    [
        lambda: sinusoidal_encoding(torch.arange(3), 7),
        lambda: sinusoidal_encoding_2d(torch.arange(3), torch.arange(3), 6),
        lambda: LearnedPositions2D(3, 3, 7),
        lambda: rotary_angles(torch.arange(3)[None], 7),
        lambda: rotary_angles_2d(torch.arange(3), torch.arange(3), 6),
    ],
)
def test_positions_refuse_sizes_that_do_not_divide(call):
    with pytest.raises(ValueError, match="[67]"):
        call()
