"""Our GPT computes what stock GPT-2 and GPT-1 compute: outputs, losses and gradients, in float32, eager."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

from hf_models import ZooGPTConfig, ZooGPTForCausalLM, ZooGPTForSequenceClassification, ZooGPTModel, create_model

SAME = {"rtol": 1e-5, "atol": 1e-5}

PAIRS = {
    "model": (GPT2Model, ZooGPTModel),
    "causal_lm": (GPT2LMHeadModel, ZooGPTForCausalLM),
    "classifier": (GPT2ForSequenceClassification, ZooGPTForSequenceClassification),
}

# Stock options that change shapes or arithmetic, and that our config has to follow.
STOCK_OPTIONS = [
    {},
    {"n_inner": 48},
    {"activation_function": "relu"},
    {"layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": False},
]


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


@pytest.mark.parametrize("fields", STOCK_OPTIONS, ids=str)
def test_outputs_are_those_of_the_stock_class(stock_gpt2, pair, fields, tokens, load_as_ours):
    stock_class, our_class = pair
    stock = stock_gpt2(stock_class, **fields)
    ours = load_as_ours(stock, our_class)
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, 9:] = 0  # padding on the right
    asked = {"attention_mask": attention_mask, "output_hidden_states": True, "output_attentions": True}
    expected = stock(tokens.clamp(min=1) * attention_mask, **asked)
    actual = ours(tokens.clamp(min=1) * attention_mask, **asked)
    assert list(actual) == list(expected)
    assert_close(actual[0], expected[0], **SAME)
    assert_close(actual.hidden_states, expected.hidden_states, **SAME)
    assert_close(actual.attentions, expected.attentions, **SAME)


@torch.no_grad()
def test_token_types_do_what_they_do_in_the_stock_class(stock_gpt2, pair, tokens, load_as_ours):
    stock_class, our_class = pair
    stock = stock_gpt2(stock_class)
    ours, tokens = load_as_ours(stock, our_class), tokens.clamp(min=1)
    token_types = torch.randint(0, 64, tokens.shape)
    assert_close(ours(tokens, token_type_ids=token_types)[0], stock(tokens, token_type_ids=token_types)[0], **SAME)
    assert not torch.equal(ours(tokens, token_type_ids=token_types)[0], ours(tokens)[0])
    if stock.can_generate():
        settings = {"token_type_ids": token_types, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(tokens, **settings), stock.generate(tokens, **settings))


def backward_with_labels(model, tokens, labels):
    model.train()
    loss = model(tokens, labels=labels).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_loss_and_gradients_are_those_of_the_stock_class(
    stock_gpt2, tokens, tied, load_as_ours, assert_same_gradients
):
    stock = stock_gpt2(GPT2LMHeadModel, tie_word_embeddings=tied)
    ours = load_as_ours(stock, ZooGPTForCausalLM)
    labels = tokens.clone()
    labels[0, :7] = -100
    assert_close(ours(tokens, labels=labels).loss, stock(tokens, labels=labels).loss, **SAME)
    assert_close(backward_with_labels(ours, tokens, labels), backward_with_labels(stock, tokens, labels), **SAME)
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (3, torch.tensor([0, 2, 1])),
        (1, torch.tensor([0.5, -1.0, 2.0])),
        (3, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])),
    ],
    ids=["single_label", "regression", "multi_label"],
)
def test_classification_loss_and_gradients_are_those_of_the_stock_class(
    stock_gpt2, tokens, num_labels, labels, load_as_ours, assert_same_gradients
):
    stock = stock_gpt2(GPT2ForSequenceClassification, num_labels=num_labels)
    ours = load_as_ours(stock, ZooGPTForSequenceClassification)
    assert_close(backward_with_labels(ours, tokens, labels), backward_with_labels(stock, tokens, labels), **SAME)
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_classification_reads_the_same_last_token(stock_gpt2, tokens, padding_side, load_as_ours):
    stock = stock_gpt2(GPT2ForSequenceClassification, num_labels=3)
    ours = load_as_ours(stock, ZooGPTForSequenceClassification)
    tokens = tokens.clamp(min=1)
    padded = slice(0, 4) if padding_side == "left" else slice(8, None)
    tokens[1, padded] = stock.config.pad_token_id
    mask = (tokens != stock.config.pad_token_id).long()
    assert_close(ours(tokens, attention_mask=mask).logits, stock(tokens, attention_mask=mask).logits, **SAME)
    assert_close(ours(tokens).logits, stock(tokens).logits, **SAME)


def test_generation_gives_the_tokens_of_the_stock_class(stock_gpt2, tokens, load_as_ours):
    stock = stock_gpt2()
    ours = load_as_ours(stock, ZooGPTForCausalLM)
    prompt = {"input_ids": tokens[:, :5], "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    prompt["attention_mask"][1, :2] = 0
    for search in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 20, "do_sample": False, **search}
        assert torch.equal(ours.generate(**prompt, **settings), stock.generate(**prompt, **settings))


# ------------------------------------------------------------------------------------ stock checkpoints, both ways


@pytest.mark.parametrize("fields", STOCK_OPTIONS, ids=str)
def test_to_stock_gives_the_stock_model_back(stock_gpt2, pair, fields, tokens, load_as_ours):
    stock_class, our_class = pair
    stock = stock_gpt2(stock_class, **fields)
    again = load_as_ours(stock, our_class).to_stock()
    assert type(again) is stock_class
    assert list(again.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in stock.state_dict().items())
    again.set_attn_implementation("eager")
    assert torch.equal(again(tokens[:1])[0], stock(tokens[:1])[0])
    mine, theirs = again.config.to_dict(), stock.config.to_dict()
    of_the_file = {"_name_or_path", "architectures", "dtype"}
    same_value_spelled_out = {"n_inner"}
    assert {name for name in theirs if mine.get(name) != theirs[name]} <= of_the_file | same_value_spelled_out


@pytest.mark.parametrize("our_class", [ZooGPTModel, ZooGPTForCausalLM, ZooGPTForSequenceClassification])
def test_a_model_of_ours_goes_to_stock_and_comes_back(make_gpt, our_class, tokens, load_as_ours):
    ours = make_gpt(our_class, pad_token_id=0, num_labels=3, residual_init="zero")
    stock = ours.to_stock()
    stock.set_attn_implementation("eager")
    assert_close(stock(tokens)[0], ours(tokens)[0], **SAME)
    again = load_as_ours(stock, our_class)
    assert torch.equal(again(tokens)[0], ours(tokens)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
    ],
    ids=str,
)
def test_stock_options_that_we_do_not_compute_are_refused(stock_gpt2, fields, tmp_path):
    (option,) = fields
    stock_gpt2(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=option):
        ZooGPTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("our_class", [ZooGPTModel, ZooGPTForCausalLM])
def test_the_first_checkpoints_of_the_hub_load(stock_gpt2, our_class, tokens, tmp_path):
    """GPT-2 was published without the `transformer.` prefix and with every block's causal mask among the weights."""
    stock = stock_gpt2()
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    for block in range(2):
        old[f"h.{block}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        old[f"h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, report = our_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_close(ours(tokens)[0], (stock if our_class is ZooGPTForCausalLM else stock.transformer)(tokens)[0], **SAME)


@pytest.mark.parametrize(
    "our_class", [ZooGPTModel, ZooGPTForSequenceClassification], ids=["without the head", "with another head"]
)
def test_any_class_of_ours_reads_a_language_model_checkpoint(stock_gpt2, our_class, tokens, tmp_path):
    stock = stock_gpt2()
    stock.save_pretrained(tmp_path)
    ours = our_class.from_pretrained(tmp_path)
    base = getattr(ours, "transformer", ours)
    assert_close(base(tokens).last_hidden_state, stock.transformer(tokens).last_hidden_state, **SAME)


def test_a_loaded_stock_checkpoint_is_saved_as_one_of_ours(stock_gpt2, tokens, tmp_path, load_as_ours):
    ours = load_as_ours(stock_gpt2(), ZooGPTForCausalLM)
    ours.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) < set(ours.state_dict())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").model_type == "zoo_gpt"
    assert torch.equal(ZooGPTForCausalLM.from_pretrained(tmp_path / "ours")(tokens).logits, ours(tokens).logits)


@pytest.mark.slow
def test_gpt2_at_its_published_size_is_the_stock_class(load_as_ours, assert_same_gradients):
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**no_dropout, attn_implementation="eager")
    stock = GPT2LMHeadModel(config).eval()  # its own initialisation: at this depth, larger weights only saturate
    ours = load_as_ours(stock, ZooGPTForCausalLM)
    assert ours.num_parameters() == create_model("gpt2-small").num_parameters() == 124_439_808
    tokens = torch.randint(0, 50257, (2, 64))
    assert_close(ours(tokens).logits, stock(tokens).logits, **SAME)
    loss, expected_loss = (backward_with_labels(model, tokens, tokens) for model in (ours, stock))
    assert_close(loss, expected_loss, **SAME)
    assert_same_gradients(ours, stock)


# ---------------------------------------------------------------------------------------------- with a source to read

WITH_SOURCE = {"add_cross_attention": True}
READS_A_SOURCE = ["model", "causal_lm"]  # the stock classifier takes no source


@pytest.fixture
def source():
    """The states of an encoder (3, 7, D), of which the last two rows are padded, as a decoder's inputs."""
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
    return {"encoder_hidden_states": torch.randn(3, 7, 32), "encoder_attention_mask": mask}


@pytest.mark.parametrize("name", READS_A_SOURCE)
def test_a_decoder_with_a_source_goes_both_ways(stock_gpt2, name, tokens, source, load_as_ours):
    stock_class, our_class = PAIRS[name]
    stock = stock_gpt2(stock_class, **WITH_SOURCE)
    ours = load_as_ours(stock, our_class)
    asked = {"output_hidden_states": True, "output_attentions": True, **source}
    expected, actual = stock(tokens, **asked), ours(tokens, **asked)
    assert list(actual) == list(expected)
    assert_close(actual[0], expected[0], **SAME)
    for maps in ("hidden_states", "attentions", "cross_attentions"):
        assert_close(actual[maps], expected[maps], **SAME)
    assert_close(ours(tokens)[0], stock(tokens)[0], **SAME)  # without a source
    again = ours.to_stock()
    assert type(again) is stock_class and again.config.add_cross_attention
    assert list(again.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in stock.state_dict().items())
    again.set_attn_implementation("eager")
    assert torch.equal(again(tokens, **source)[0], stock(tokens, **source)[0])


def test_loss_and_gradients_with_a_source_are_those_of_the_stock_class(
    stock_gpt2, tokens, source, load_as_ours, assert_same_gradients
):
    stock = stock_gpt2(**WITH_SOURCE)
    ours = load_as_ours(stock, ZooGPTForCausalLM)
    losses, of_the_source = [], []
    for model in (ours, stock):
        states = source["encoder_hidden_states"].clone().requires_grad_()
        given = {**source, "encoder_hidden_states": states}
        losses.append(model.train()(tokens, labels=tokens, **given).loss)
        losses[-1].backward()
        of_the_source.append(states.grad)
    assert_close(*losses, **SAME)
    assert_close(*of_the_source, **SAME)
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("search", [{}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}], ids=str)
def test_generation_from_a_source_gives_the_tokens_of_the_stock_class(stock_gpt2, tokens, source, search, load_as_ours):
    stock = stock_gpt2(**WITH_SOURCE)
    ours = load_as_ours(stock, ZooGPTForCausalLM)
    settings = {"max_new_tokens": 20, "do_sample": False, **search, **source}
    expected = stock.generate(tokens[:, :5], **settings)
    assert torch.equal(ours.generate(tokens[:, :5], **settings), expected)
    assert torch.equal(ours.to_stock().generate(tokens[:, :5], **settings), expected)


# ------------------------------------------------------------------------------------------------------- GPT-1


def openai_weights(ours):
    """Our weights under the names and in the layout of transformers' OpenAIGPTLMHeadModel."""
    names = {
        "transformer.tokens_embed": "transformer.embed_tokens",
        "transformer.positions_embed": "transformer.embed_positions",
    }
    weights = {f"{theirs}.weight": ours[f"{mine}.weight"] for theirs, mine in names.items()}
    weights["lm_head.weight"] = ours["lm_head.weight"]
    for block in range(2):
        theirs, mine = f"transformer.h.{block}", f"transformer.layers.{block}"
        for kind in ("weight", "bias"):
            weights[f"{theirs}.ln_1.{kind}"] = ours[f"{mine}.attention_norm.{kind}"]
            weights[f"{theirs}.ln_2.{kind}"] = ours[f"{mine}.feed_forward_norm.{kind}"]
            fused = torch.cat([ours[f"{mine}.attention.{name}_proj.{kind}"] for name in "qkv"])
            for name, weight in {
                "attn.c_attn": fused,
                "attn.c_proj": ours[f"{mine}.attention.o_proj.{kind}"],
                "mlp.c_fc": ours[f"{mine}.feed_forward.up_proj.{kind}"],
                "mlp.c_proj": ours[f"{mine}.feed_forward.down_proj.{kind}"],
            }.items():
                weights[f"{theirs}.{name}.{kind}"] = weight.T.contiguous()  # Conv1D: a Linear stored transposed
    return weights


def test_gpt1_is_the_stock_openai_gpt(randomise, tokens):
    """The zoo's GPT-1 is the post-norm block: the same function as stock GPT-1, whose "gelu" is the tanh form."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ours = randomise(create_model("gpt1", max_position_embeddings=64, **sizes)).eval()
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.OpenAIGPTConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, **no_dropout)
    stock = transformers.OpenAIGPTLMHeadModel(config).eval()
    stock.load_state_dict(openai_weights(ours.state_dict()), strict=True)
    asked = {"labels": tokens, "output_hidden_states": True, "output_attentions": True}
    expected, actual = stock(tokens, **asked), ours(tokens, **asked)
    assert_close(actual.logits, expected.logits, **SAME)
    assert_close(actual.loss, expected.loss, **SAME)
    assert_close(actual.hidden_states, expected.hidden_states, **SAME)
    assert_close(actual.attentions, expected.attentions, **SAME)


def test_the_spellings_of_gpt2_are_understood():
    config = ZooGPTConfig(n_embd=48, n_layer=3, n_head=6, n_inner=100, n_positions=80, activation_function="relu")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 6)
    assert (config.intermediate_size, config.max_position_embeddings, config.hidden_act) == (100, 80, "relu")
    assert (config.n_embd, config.head_dim) == (48, 8)
