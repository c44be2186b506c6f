"""ZooGPT: what it alone promises of outputs, losses and heads. See also test_families.py and test_gpt_runtimes.py."""

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close

from hf_models import ZooGPTConfig, ZooGPTForSequenceClassification, ZooGPTModel, __version__

SAME = {"rtol": 1e-5, "atol": 1e-5}


# -------------------------------------------------------------------------------------------------------- config


def test_the_defaults_are_gpt2_small():
    config = ZooGPTConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (50257, 768, 12)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (64, 12, 3072)
    assert config.zoo_version == __version__


def test_a_dropout_that_is_no_probability_is_named():
    with pytest.raises(StrictDataclassError, match="embedding_dropout"):
        ZooGPTConfig(embedding_dropout=1.5)


def test_blocks_begin_as_the_identity_with_residual_init_zero():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    model = ZooGPTModel(ZooGPTConfig(**sizes, residual_init="zero", norm="rmsnorm", use_bias=False))
    hidden_states = torch.randn(2, 5, 32)
    assert torch.equal(model.layers(hidden_states), hidden_states)


# ------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_later_token_never_changes_an_earlier_output(make_gpt, options, backend, tokens):
    model = make_gpt(attn_implementation=backend, **options)
    before = model(tokens).logits
    for changed in (1, 6, 11):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % 64
        difference = (model(other).logits - before).abs().amax(-1)
        assert (difference[:, :changed] == 0).all()
        assert (difference[:, changed] > 1e-4).all()


def test_order_matters(make_gpt, options, tokens):
    """With positions, swapping two tokens that came before changes what is predicted."""
    model = make_gpt(**options)
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    assert (model(swapped).logits[:, -1] - model(tokens).logits[:, -1]).abs().max() > 1e-4


def test_padding_on_the_right_changes_no_real_place(make_gpt, options, tokens):
    model = make_gpt(**options)
    mask = torch.ones_like(tokens)
    mask[:, 8:] = 0
    assert_close(model(tokens, attention_mask=mask).logits[:, :8], model(tokens[:, :8]).logits, **SAME)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("asked", [{}, {"use_cache": False}], ids=str)
def test_packed_documents_are_as_separate_ones(make_gpt, options, backend, asked, tokens):
    """Positions that begin again at 0 keep attention within each document, and a loss sees no difference."""
    model = make_gpt(attn_implementation=backend, **options)
    lengths = [3, 4, 5]
    position_ids = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
    packed = model(tokens, position_ids=position_ids, **asked).logits
    separate = torch.cat([model(document).logits for document in tokens.split(lengths, dim=1)], dim=1)
    assert_close(packed, separate, **SAME)


def test_packed_documents_may_be_more_tokens_than_there_are_positions(make_gpt):
    model = make_gpt(max_position_embeddings=8)
    tokens, position_ids = torch.randint(20, (1, 20)), torch.arange(5).repeat(4)[None]
    packed = model(tokens, position_ids=position_ids).logits
    assert_close(packed, torch.cat([model(document).logits for document in tokens.split(5, dim=1)], dim=1), **SAME)
    with pytest.raises(ValueError, match="position_ids has 8, but max_position_embeddings is 8"):
        model(tokens[:, :4], position_ids=torch.arange(5, 9)[None])
    with pytest.raises(ValueError, match="position_ids has 8, but max_position_embeddings is 8"):
        model.generate(tokens[:, :5], max_new_tokens=6, do_sample=False)


def test_a_ready_mask_may_say_true_and_false(make_gpt, options, tokens):
    for backend in ("eager", "sdpa"):
        model = make_gpt(attn_implementation=backend, **options)
        mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
        assert_close(model(tokens, attention_mask=mask).logits, model(tokens).logits, **SAME)


def test_a_head_with_a_bias_trains_as_it_is_evaluated(make_gpt, tokens):
    model = make_gpt(tie_word_embeddings=False)
    model.set_output_embeddings(torch.nn.Linear(model.config.hidden_size, model.config.vocab_size))
    expected = model(tokens, labels=tokens).loss
    assert_close(model.train()(tokens, labels=tokens).loss, expected, **SAME)
    with pytest.raises(ValueError, match="9 hidden states, but 36 labels"):
        model(tokens, labels=tokens, logits_to_keep=3)


def test_attention_maps_are_lower_triangles(make_gpt, options, tokens):
    model = make_gpt(**options)
    outputs = model(tokens, output_hidden_states=True, output_attentions=True)
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert all((attention.triu(1) == 0).all() for attention in outputs.attentions)


# --------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_mean_surprise_at_the_next_token(make_gpt, options, tokens):
    model = make_gpt(**options)
    labels = tokens.clone()
    labels[0, :7] = -100
    outputs = model(tokens, labels=labels)
    log_probabilities = outputs.logits.double().log_softmax(-1)
    surprises = [
        -log_probabilities[row, place, labels[row, place + 1]]
        for row in range(3)
        for place in range(11)
        if labels[row, place + 1] != -100
    ]
    assert_close(outputs.loss, sum(surprises) / len(surprises), check_dtype=False, **SAME)


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("num_items_in_batch", [None, 20, torch.tensor(20)], ids=repr)
def test_loss_and_gradients_are_the_same_with_and_without_logits(make_gpt, options, tokens, num_items_in_batch):
    """In training the logits are not kept: that is another way to compute the same thing."""
    model = make_gpt(**options).train()
    asked = {"labels": tokens, "num_items_in_batch": num_items_in_batch}
    with_logits = model(tokens, return_logits=True, **asked)
    with_logits.loss.backward()
    expected = gradients(model)
    without = model(tokens, **asked)
    without.loss.backward()
    assert with_logits.logits.shape == (3, 12, 64) and without.logits is None
    assert_close(without.loss, with_logits.loss, **SAME)
    assert_close(gradients(model), expected, **SAME)


def test_logits_are_there_whenever_they_are_not_a_waste(make_gpt, tokens):
    model = make_gpt()
    assert model(tokens, labels=tokens).logits is not None
    assert model(tokens, labels=tokens, return_logits=False).logits is None
    model.train()
    assert model(tokens).logits is not None
    assert model(tokens, labels=tokens).logits is None
    assert model(tokens, labels=tokens, return_logits=True).logits is not None


@pytest.mark.parametrize("return_logits", [True, False])
def test_labels_may_come_shifted(make_gpt, tokens, return_logits):
    model = make_gpt()
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    asked = {"return_logits": return_logits}
    assert_close(model(tokens, shift_labels=shifted, **asked).loss, model(tokens, labels=tokens, **asked).loss)


@pytest.mark.parametrize("return_logits", [True, False])
def test_num_items_in_batch_divides_the_summed_loss(make_gpt, tokens, return_logits):
    """So that micro-batches add up to their batch, however the scored tokens fall."""
    model = make_gpt()
    labels = tokens.clone()
    labels[0, 2:] = -100
    whole = model(tokens, labels=labels).loss
    num_items = (labels[:, 1:] != -100).sum()
    asked = {"num_items_in_batch": num_items, "return_logits": return_logits}
    parts = [model(tokens[row, None], labels=labels[row, None], **asked).loss for row in range(3)]
    assert_close(sum(parts), whole, **SAME)


def test_logits_of_chosen_places_alone(make_gpt, tokens):
    model = make_gpt()
    assert_close(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:], **SAME)
    places = torch.tensor([0, 5])
    assert_close(model(tokens, logits_to_keep=places).logits, model(tokens).logits[:, places], **SAME)


# ----------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("told_by", ["attention_mask", "pad_token_id"])
def test_a_text_is_classified_at_its_last_real_token(make_gpt, options, tokens, padding_side, told_by):
    model = make_gpt(
        ZooGPTForSequenceClassification, num_labels=3, pad_token_id=0 if told_by == "pad_token_id" else None, **options
    )
    tokens = tokens.clamp(min=1)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 4) if padding_side == "left" else slice(8, None)] = 0
    mask[2, slice(0, 11) if padding_side == "left" else slice(1, None)] = 0
    padded = {"attention_mask": mask} if told_by == "attention_mask" else {}
    logits = model(tokens * mask, **padded).logits
    assert logits.shape == (3, 3)
    for row in range(3):
        if padding_side == "left" and (told_by == "pad_token_id" or row > 0):
            continue  # without a mask padding is seen, and on the left it moves the positions: as in stock
        assert_close(logits[row], model(tokens[row, mask[row].bool()][None]).logits[0], **SAME)
    # Whatever the side, the last real token decides: changing it changes the answer of its row alone.
    last = 11 if padding_side == "left" else 7
    other = (tokens * mask).clone()
    other[1, last] = other[1, last] % 63 + 1
    changed = (model(other, **padded).logits - logits).abs().amax(-1)
    assert changed[1] > 1e-4 and changed[0] == 0 and changed[2] == 0


def test_rows_that_nothing_ends_are_refused(make_gpt, tokens):
    model = make_gpt(ZooGPTForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match=r"attention_mask.*pad_token_id"):
        model(tokens)
    assert model(tokens[:1]).logits.shape == (1, 2)


LABELS = {
    "single_label_classification": (3, torch.tensor([0, 2, 1])),
    "multi_label_classification": (3, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])),
    "regression": (1, torch.tensor([0.5, -1.0, 2.0])),
}


@pytest.mark.parametrize("named", [True, False], ids=["problem named", "problem guessed"])
@pytest.mark.parametrize("problem_type", LABELS)
def test_classification_loss(make_gpt, tokens, problem_type, named):
    num_labels, labels = LABELS[problem_type]
    model = make_gpt(
        ZooGPTForSequenceClassification,
        num_labels=num_labels,
        pad_token_id=0,
        problem_type=problem_type if named else None,
    )
    outputs = model(tokens.clamp(min=1), labels=labels)
    logits = outputs.logits.double()
    expected = {
        "single_label_classification": lambda: -logits.log_softmax(-1)[range(3), labels].mean(),
        "multi_label_classification": lambda: (
            -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean()
        ),
        "regression": lambda: ((logits[:, 0] - labels) ** 2).mean(),
    }[problem_type]()
    assert_close(outputs.loss, expected, check_dtype=False, **SAME)


def test_positions_to_keep_that_differ_by_row_are_refused(make_gpt, tokens):
    model = make_gpt()
    assert model(tokens, logits_to_keep=torch.tensor([1, 3])).logits.shape == (3, 2, 64)
    for kept in (torch.tensor([[1, 3]] * 3), torch.ones(3, 12, dtype=torch.bool)):
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(tokens, logits_to_keep=kept)
