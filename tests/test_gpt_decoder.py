"""ZooGPT with cross-attention: the decoder that looks at the states of any encoder, in training and in generation.

`parity/test_gpt2.py` holds it against stock GPT-2, and `test_attention.py` tests the attention layer alone.
"""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache

from hf_models import ZooGPTConfig, ZooGPTForSequenceClassification
from tests.families import MODERN, checkpoint_activations, gradients

SAME = {"rtol": 1e-5, "atol": 1e-5}
GREEDY = {"max_new_tokens": 20, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
BACKENDS = ["eager", "sdpa"]

# Grouped-query attention with rotary positions, whose cross-attention has neither, and a source of another width.
DECODERS = {"gpt2": {}, "modern": {**MODERN, "num_key_value_heads": 2}, "narrow source": {"source_size": 10}}


@pytest.fixture(params=DECODERS)
def fields(request):
    return {"add_cross_attention": True, **DECODERS[request.param]}


@pytest.fixture
def source():
    """`source(model)`: the states of an encoder (3, 7, D'), whose last two rows are padded, as a decoder's inputs."""

    def source(model):
        size = model.config.source_size or model.config.hidden_size
        mask = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
        return {"encoder_hidden_states": torch.randn(3, 7, size), "encoder_attention_mask": mask}

    return source


def calls_of(model, name):
    """A list that grows with every call of a module whose name ends so."""
    calls = []
    for path, module in model.named_modules():
        if path.endswith(name):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    return calls


# ------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_reads_the_source_and_no_later_token(make_gpt, fields, backend, tokens, source):
    model = make_gpt(attn_implementation=backend, **fields)
    given = source(model)
    before = model(tokens, **given).logits
    other_source = {**given, "encoder_hidden_states": given["encoder_hidden_states"] + 1}
    assert ((model(tokens, **other_source).logits - before).abs().amax(-1) > 1e-4).all()
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % 64
    changed = (model(other, **given).logits - before).abs().amax(-1)
    assert (changed[:, :6] == 0).all() and (changed[:, 6:] > 1e-4).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_source_is_as_an_unpadded_one(make_gpt, fields, backend, tokens, source):
    model = make_gpt(attn_implementation=backend, **fields)
    given = source(model)
    together = model(tokens, **given).logits
    noise = 100 * (1 - given["encoder_attention_mask"][..., None])
    assert_close(
        model(tokens, **{**given, "encoder_hidden_states": given["encoder_hidden_states"] + noise})[0], together
    )
    for row, length in enumerate((7, 4, 1)):
        alone = model(tokens[row][None], encoder_hidden_states=given["encoder_hidden_states"][row, :length][None])
        assert_close(alone.logits[0], together[row], **SAME)


def test_without_a_source_only_the_text_counts(make_gpt, fields, tokens):
    """As in the stock class, the cross-attention of every block is left out."""
    model = make_gpt(**fields)
    calls = calls_of(model, "cross_attention")
    assert model(tokens).logits.shape == (3, 12, 64) and not calls


def test_cross_attention_maps_add_up_to_one_and_leave_padding_out(make_gpt, fields, tokens, source):
    model = make_gpt(**fields)
    given = source(model)
    outputs = model(tokens, **given, output_attentions=True)
    assert [one.shape for one in outputs.cross_attentions] == [(3, 4, 12, 7)] * 2
    assert [one.shape for one in outputs.attentions] == [(3, 4, 12, 12)] * 2
    for one in outputs.cross_attentions:
        assert_close(one.sum(-1), torch.ones(3, 4, 12))
        assert (one.transpose(1, 3)[given["encoder_attention_mask"] == 0] == 0).all()


def test_a_classifier_reads_the_source_too(make_gpt, fields, tokens, source):
    model = make_gpt(ZooGPTForSequenceClassification, **fields, pad_token_id=0, num_labels=3)
    given, tokens = source(model), tokens.clamp(min=1)
    assert (model(tokens, **given).logits - model(tokens).logits).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------ training


def gradients_of_a_step(model, tokens, given):
    given = {name: value.clone() for name, value in given.items()}
    states = given["encoder_hidden_states"].requires_grad_()
    loss = model(tokens, labels=tokens, **given).loss
    loss.backward()
    return {"loss": loss.detach(), "source": states.grad, **gradients(model)}


def test_gradients_reach_the_source_and_padding_has_none(make_gpt, fields, tokens, source):
    model = make_gpt(**fields).train()
    given = source(model)
    step = gradients_of_a_step(model, tokens, given)
    is_padding = given["encoder_attention_mask"] == 0
    assert (step["source"][is_padding] == 0).all() and (step["source"][~is_padding].abs().amax(-1) > 0).all()
    assert set(step) >= {name for name, _ in model.named_parameters()}  # the gradient reaches every one


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_source_the_same_gradients(make_gpt, fields, tokens, source, use_reentrant):
    model = make_gpt(**fields).train()
    given = source(model)
    expected = gradients_of_a_step(model, tokens, given)
    checkpoint_activations(model, use_reentrant)
    calls = calls_of(model, "0.cross_attention")
    assert_close(gradients_of_a_step(model, tokens, given), expected, **SAME)
    assert len(calls) == 2  # once forward and once again for the backward pass


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_with_a_source_is_one_graph(make_gpt, backend, tokens, source):
    torch._dynamo.reset()
    model = make_gpt(attn_implementation=backend, add_cross_attention=True, source_size=10).train()
    given = source(model)
    expected = gradients_of_a_step(model, tokens, given)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    states = given["encoder_hidden_states"].clone().requires_grad_()
    loss = compiled(tokens, labels=tokens, **{**given, "encoder_hidden_states": states}).loss
    loss.backward()
    assert_close({"loss": loss.detach(), "source": states.grad, **gradients(model)}, expected, **SAME)


def test_it_can_be_exported_for_any_batch_and_lengths(make_gpt, tokens, source):
    model = make_gpt(add_cross_attention=True, source_size=10)
    model.config.use_cache = False
    inputs = {"input_ids": tokens, **source(model)}
    any_size = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=any_size).module()
    mask = (torch.arange(9) < torch.tensor([[5], [9]])).long()
    other = {"encoder_hidden_states": torch.randn(2, 9, 10), "encoder_attention_mask": mask}
    other["input_ids"] = torch.randint(64, (2, 30))
    for given in (inputs, other):
        assert_close(program(**given).logits, model(**given).logits, **SAME)


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_cached_and_uncached_generation_from_a_source_agree(make_gpt, fields, backend, search, tokens, source):
    model = make_gpt(attn_implementation=backend, **fields)
    given, prompt = source(model), tokens[:, :5]
    expected = model.generate(prompt, **given, use_cache=False, **search)
    assert expected.shape == (3 * search.get("num_return_sequences", 1), 25)
    assert torch.equal(model.generate(prompt, **given, **search), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(prompt, **given, **static, **search), expected)
    # The source decides what is generated: else this test would say nothing about it.
    other = {**given, "encoder_hidden_states": given["encoder_hidden_states"].flip(0) * 3}
    assert not torch.equal(model.generate(prompt, **other, **search), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_padded_source_generates_as_an_unpadded_one(make_gpt, fields, backend, search, tokens, source):
    model = make_gpt(attn_implementation=backend, **fields)
    given, prompt = source(model), tokens[:, :5]
    together = model.generate(prompt, **given, **search).view(3, -1, 25)
    for row, length in enumerate((7, 4, 1)):
        states = given["encoder_hidden_states"][row, :length][None]
        assert torch.equal(model.generate(prompt[row][None], encoder_hidden_states=states, **search), together[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_reading_in_pieces_from_a_source_is_reading_at_once(make_gpt, fields, backend, tokens, source):
    model = make_gpt(attn_implementation=backend, **fields)
    given = source(model)
    expected = model(tokens, **given).logits
    for cache in (None, DynamicCache(), EncoderDecoderCache(DynamicCache(), DynamicCache())):
        pieces = []
        for piece in tokens.split([5, 1, 6], dim=1):
            outputs = model(piece, **given, cache=cache, use_cache=True)
            cache = outputs.cache
            pieces.append(outputs.logits)
        assert_close(torch.cat(pieces, dim=1), expected, **SAME)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_generation_projects_its_source_once_and_keeps_a_row_for_each_input(
    make_gpt, fields, backend, search, tokens, source
):
    """Beams share the keys and values of their input, so that the cache does not grow with their number."""
    model = make_gpt(attn_implementation=backend, **fields)
    keys, values = (calls_of(model, f"cross_attention.{name}_proj") for name in "kv")
    answer = model.generate(tokens[:, :5], **source(model), return_dict_in_generate=True, **search)
    assert answer.sequences.shape[1] == 25
    assert sorted(keys) == [f"transformer.layers.{layer}.cross_attention.k_proj" for layer in (0, 1)]
    assert len(values) == 2
    heads = model.config.num_key_value_heads
    for layer in answer.past_key_values.cross_attention_cache.layers:
        assert layer.keys.shape == layer.values.shape == (3, heads, 7, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_of_one_input_share_its_source(make_gpt, fields, backend, tokens, source):
    model = make_gpt(attn_implementation=backend, **fields)
    given, prompt = source(model), tokens[:, :5]
    settings = {"do_sample": True, "max_new_tokens": 10}
    torch.manual_seed(1)
    shared = model.generate(prompt, **given, num_return_sequences=3, **settings)
    torch.manual_seed(1)
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in given.items()}
    assert torch.equal(model.generate(prompt.repeat_interleave(3, dim=0), **repeated, **settings), shared)


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_it_cannot_use_is_refused(make_gpt, tokens):
    states = torch.randn(3, 7, 32)
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        make_gpt()(tokens, encoder_hidden_states=states)
    with pytest.raises(StrictDataclassError, match="source_size is 10, but add_cross_attention is False"):
        ZooGPTConfig(source_size=10)
    model = make_gpt(add_cross_attention=True)
    with pytest.raises(ValueError, match="encoder_attention_mask .* encoder_hidden_states"):
        model(tokens, encoder_attention_mask=torch.ones(3, 7))
    with pytest.raises(ValueError, match="encoder_hidden_states has 2 rows for 3"):
        model(tokens, encoder_hidden_states=states[:2])
    with pytest.raises(ValueError, match="width 10, but this model reads 32"):
        model(tokens, encoder_hidden_states=torch.randn(3, 7, 10))
    with pytest.raises(ValueError, match="source_size"):
        make_gpt(add_cross_attention=True, source_size=10).to_stock()
