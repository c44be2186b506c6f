"""ZooBert: what it alone promises of outputs, losses and heads. See also test_families.py and test_runtimes.py.

Two of its promises are that nothing is computed on padding and that nothing but the masked places is scored. Neither
can be seen in a result, so here are the results of the plain way.
"""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments, modeling_flash_attention_utils

from hf_models import (
    ZooBertConfig,
    ZooBertForMaskedLM,
    ZooBertForPreTraining,
    ZooBertForQuestionAnswering,
    ZooBertForSequenceClassification,
    ZooBertForTokenClassification,
    ZooBertModel,
    __version__,
)
from tests.families import BERT_OPTIONS, gradients, labels_for, tensors

SAME = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-6, "atol": 1e-6}
BACKENDS = pytest.mark.parametrize("backend", ["eager", "sdpa"])


@pytest.fixture(params=BERT_OPTIONS)
def options(request):
    """The fields of each tiny BERT in turn."""
    return BERT_OPTIONS[request.param]


# -------------------------------------------------------------------------------------------------------- config


def test_the_defaults_are_bert_base():
    config = ZooBertConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (30522, 768, 12)
    assert (config.head_dim, config.intermediate_size, config.max_position_embeddings) == (64, 3072, 512)
    assert (config.norm_position, config.norm_eps, config.type_vocab_size) == ("post", 1e-12, 2)
    assert config.zoo_version == __version__


def test_every_token_sees_every_other(make_bert, options, tokens):
    model = make_bert(**options)
    before = model(tokens).logits
    for changed in (1, 6, 11):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % 64
        assert ((model(other).logits - before).abs().amax(-1) > 1e-6).all()


def test_order_and_token_types_matter(make_bert, options, tokens):
    model = make_bert(ZooBertModel, **options)
    first = model(tokens).pooler_output
    assert (model(tokens[:, [0, 2, 1, *range(3, 12)]]).pooler_output - first).abs().max() > 1e-4
    types = (torch.arange(12) > 5).long().expand(3, -1)
    assert (model(tokens, token_type_ids=types).pooler_output - first).abs().max() > 1e-4
    assert torch.equal(model(tokens, token_type_ids=0 * types).pooler_output, first)


def test_the_pooler_is_a_choice(make_bert, tokens):
    with_pooler = make_bert(ZooBertModel)
    without = ZooBertModel(with_pooler.config, add_pooling_layer=False).eval()
    assert without.pooler is None and without(tokens).pooler_output is None
    without.load_state_dict({k: v for k, v in with_pooler.state_dict().items() if not k.startswith("pooler.")})
    assert torch.equal(without(tokens).last_hidden_state, with_pooler(tokens).last_hidden_state)


def test_nobody_is_made_to_wait_for_the_next_token(make_bert):
    """An encoder has no cache and does not generate."""
    assert not make_bert().can_generate()


# ------------------------------------------------------------------------------------------------- masked places


def plain_loss(model, inputs, labels, num_items=None):
    """Full logits, then cross-entropy: the loss as the paper has it."""
    logits = model(**inputs).logits
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / ((labels != -100).sum() if num_items is None else num_items)


@pytest.mark.parametrize("num_items", [None, 20, torch.tensor(20.0)], ids=repr)
@pytest.mark.parametrize("told", [True, False], ids=["positions given", "positions searched"])
def test_the_loss_of_masked_places_is_the_plain_loss(make_bert, options, sentences, told, num_items):
    """Every gradient too: of the decoder, tied or not, and of its bias."""
    model = make_bert(**options).train()
    asked = labels_for(ZooBertForMaskedLM, sentences)
    expected = plain_loss(model, sentences, asked["labels"], num_items)
    expected.backward()
    expected_gradients = gradients(model)
    if not told:
        del asked["masked_positions"]
    outputs = model(**sentences, **asked, num_items_in_batch=num_items)
    outputs.loss.backward()
    assert outputs.logits is None
    assert_close(outputs.loss, expected, **EXACT)
    actual_gradients = gradients(model)
    assert "mlm_head.decoder.bias" in actual_gradients
    assert_close(actual_gradients, expected_gradients, **EXACT)


def test_a_position_that_is_no_position_is_not_scored(make_bert, tokens):
    """However many -1 pad the positions, and wherever they stand."""
    model = make_bert().train()
    asked = labels_for(ZooBertForMaskedLM, {"input_ids": tokens})
    expected = model(tokens, **asked).loss
    positions = F.pad(asked["masked_positions"].flip(-1), (3, 2), value=-1)
    assert_close(model(tokens, labels=asked["labels"], masked_positions=positions).loss, expected, **EXACT)


@pytest.mark.parametrize("model_class", [ZooBertForMaskedLM, ZooBertForPreTraining])
def test_logits_are_there_whenever_they_are_not_a_waste(make_bert, model_class, tokens):
    name = "logits" if model_class is ZooBertForMaskedLM else "prediction_logits"
    model, asked = make_bert(model_class), labels_for(model_class, {"input_ids": tokens})
    full = model(tokens)[name]
    assert full.shape == (3, 12, 64)
    assert torch.equal(model(tokens, **asked)[name], full)
    assert getattr(model(tokens, **asked, return_logits=False), name) is None
    model.train()
    assert torch.equal(model(tokens)[name], full)
    assert getattr(model(tokens, **asked), name) is None
    assert torch.equal(model(tokens, **asked, return_logits=True)[name], full)


def test_the_loss_does_not_depend_on_the_logits(make_bert, sentences):
    model, asked = make_bert().train(), labels_for(ZooBertForMaskedLM, sentences)
    without = model(**sentences, **asked).loss
    with_logits = model(**sentences, **asked, return_logits=True).loss
    assert torch.equal(model(**sentences, **asked, read_places=None).loss, with_logits)
    assert_close(with_logits, without, **EXACT)
    assert_close(model.eval()(**sentences, **asked).loss, without, **EXACT)


def test_logits_of_chosen_places_alone(make_bert, tokens):
    model = make_bert()
    places = torch.tensor([[0, 3], [11, 5], [2, -1]])
    expected = torch.stack([model(tokens).logits[row, places[row]] for row in range(3)])
    assert_close(model(tokens, logits_to_keep=places).logits[:2], expected[:2], **SAME)
    assert_close(model(tokens, logits_to_keep=places).logits[2, 0], expected[2, 0], **SAME)


@pytest.mark.parametrize("num_items", [None, 1], ids=repr)
@pytest.mark.parametrize("told", [True, False], ids=["positions given", "positions searched"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_a_masked_token_teaches_nothing(make_bert, options, sentences, training, told, num_items):
    model = make_bert(**options).train(training)
    labels = torch.full((3, 12), -100)
    positions = {"masked_positions": torch.full((3, 2), -1)} if told else {}
    loss = model(**sentences, labels=labels, **positions, num_items_in_batch=num_items).loss
    loss.backward()
    assert loss == 0
    found = gradients(model)
    assert found and all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        (ZooBertForTokenClassification, {"labels": torch.full((3, 12), -100)}),
        (ZooBertForQuestionAnswering, {"start_positions": torch.full((3,), 99), "end_positions": torch.full((3,), 99)}),
        (
            ZooBertForPreTraining,
            {"labels": torch.full((3, 12), -100), "next_sentence_label": torch.full((3,), -100)},
        ),
    ],
    ids=["tokens", "answers", "pretraining"],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class weights"])
def test_a_batch_without_a_label_teaches_nothing(make_bert, sentences, model_class, labels, weighted):
    model = make_bert(model_class, class_weights=[1.0, 2.0] if weighted else None).train()
    loss = model(**sentences, **labels).loss
    loss.backward()
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients(model).values())


def test_labels_outside_the_vocabulary_are_refused(make_bert, tokens):
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        make_bert().train()(tokens, labels=torch.full((3, 12), 64))


# ---------------------------------------------------------------------------------------------------- no padding


def lengths_of(sentences):
    return sentences["attention_mask"].sum(1).tolist()


def alone(sentences, row):
    """One sequence without its padding."""
    length = lengths_of(sentences)[row]
    return {name: value[row, None, :length] for name, value in sentences.items() if name != "attention_mask"}


@BACKENDS
def test_a_padded_batch_is_each_sequence_alone(make_bert, options, backend, sentences):
    """Values, and gradients of something that depends on every real place."""
    model = make_bert(ZooBertModel, attn_implementation=backend, **options)
    wanted = torch.randn(3, 12, 32)
    outputs = model(**sentences)
    (outputs.last_hidden_state * wanted * sentences["attention_mask"][..., None]).sum().backward()
    together = gradients(model)
    for row, length in enumerate(lengths_of(sentences)):
        one = model(**alone(sentences, row))
        (one.last_hidden_state[0] * wanted[row, :length]).sum().backward()
        assert_close(outputs.last_hidden_state[row, :length], one.last_hidden_state[0], **SAME)
        assert_close(outputs.pooler_output[row], one.pooler_output[0], **SAME)
    separate = gradients(model)
    assert_close(together, separate, rtol=1e-5, atol=3e-5)  # sums of a hundred terms, in another order


@BACKENDS
def test_without_padding_is_as_with_it(make_bert, options, backend, sentences, monkeypatch):
    model = make_bert(ZooBertForTokenClassification, attn_implementation=backend, **options)
    labels = torch.randint(0, 2, (3, 12)).masked_fill(sentences["attention_mask"] == 0, -100)
    results = []
    for drops_padding in (True, False):
        if not drops_padding:
            monkeypatch.setattr("hf_models.bert.find_packing", lambda *_: None)
        outputs = model(**sentences, labels=labels)
        outputs.loss.backward()
        results.append((outputs.loss, outputs.logits[sentences["attention_mask"].bool()], gradients(model)))
    assert_close(*results, **SAME)


def test_nothing_is_computed_on_padding(make_bert, sentences):
    model = make_bert(ZooBertModel)
    seen = []
    model.layers[0].feed_forward.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    outputs = model(**sentences)
    assert seen == [(1, 12 + 9 + 5, 32)]
    assert (outputs.last_hidden_state[sentences["attention_mask"] == 0] == 0).all()
    model(sentences["input_ids"], attention_mask=torch.ones(3, 12))
    assert seen[1] == (3, 12, 32)  # nothing to leave out


@BACKENDS
@pytest.mark.parametrize("model_class", [ZooBertForMaskedLM, ZooBertForPreTraining, ZooBertForSequenceClassification])
@pytest.mark.parametrize("padded", [True, False])
def test_the_last_block_computes_what_is_read_and_no_more(make_bert, backend, model_class, padded, sentences):
    model = make_bert(model_class, attn_implementation=backend, num_labels=3).train()
    sentences = sentences if padded else {"input_ids": sentences["input_ids"]}
    asked = labels_for(model_class, sentences)
    seen = []
    model.bert.layers[-1].feed_forward.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].shape))
    results = []
    for options in ({}, {"read_places": None, "only_first": False}):
        loss = model(**sentences, **asked, **options).loss
        loss.backward()
        results.append((loss, gradients(model)))
    assert_close(*results, **SAME)
    read = set() if model_class is ZooBertForMaskedLM else {0, 12, 24}  # of the 36 places
    if "masked_positions" in asked:
        read |= {12 * row + place for row, place in asked["labels"].ne(-100).nonzero().tolist()}
    apart = model_class is ZooBertForSequenceClassification and not padded
    assert seen == [(3, 1, 32) if apart else (1, len(read), 32), (1, 12 + 9 + 5, 32) if padded else (3, 12, 32)]


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "swiglu"])
def test_what_is_computed_again_has_the_weights_of_the_first_time(make_bert, sentences, hidden_act):
    """Those that `functional_call` puts in are gone by the backward pass."""
    model, asked = make_bert(hidden_act=hidden_act).train(), labels_for(ZooBertForMaskedLM, sentences)
    weights = {name: torch.randn_like(weight, requires_grad=True) for name, weight in model.named_parameters()}
    loss = torch.func.functional_call(model, weights, kwargs={**sentences, **asked}).loss
    actual = torch.autograd.grad(loss, weights.values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model(**sentences, **asked).loss.backward()
    assert_close(dict(zip(weights, actual, strict=True)), gradients(model), **SAME)


def test_each_row_may_have_an_adapter_of_its_own(make_bert, tokens):
    model = make_bert(ZooBertForSequenceClassification)
    settings = peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, settings, adapter_name="a")
    model.add_adapter("b", settings)
    model.eval()
    mixed = model(input_ids=tokens, adapter_names=["a", "b", "a"]).logits
    for row, name in enumerate("aba"):
        model.set_adapter(name)
        assert_close(mixed[row], model(input_ids=tokens).logits[row], **SAME)


@pytest.mark.parametrize(
    "model_class", [ZooBertForSequenceClassification, ZooBertForTokenClassification, ZooBertForMaskedLM]
)
def test_each_padded_row_may_have_an_adapter_of_its_own_where_padding_is_computed(make_bert, model_class, sentences):
    model = make_bert(model_class)
    settings = peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, settings, adapter_name="a")
    model.add_adapter("b", settings)
    model.eval()
    mixed = model(**sentences, adapter_names=["a", "b", "a"], skip_padding=False).logits
    for row, name in enumerate("aba"):
        model.set_adapter(name)
        places = slice(None) if mixed.ndim == 2 else sentences["attention_mask"][row].bool()
        assert_close(mixed[row][places], model(**sentences).logits[row][places], **SAME)


def test_an_adapter_of_what_is_computed_again_is_trained(make_bert, sentences, monkeypatch):
    model, asked = make_bert().train(), labels_for(ZooBertForMaskedLM, sentences)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj", "down_proj"], init_lora_weights=False))
    results = []
    for drops_padding in (True, False):
        if not drops_padding:
            monkeypatch.setattr("hf_models.bert.find_packing", lambda *_: None)
        loss = model(**sentences, **asked).loss
        loss.backward()
        results.append((loss, gradients(model)))
    assert_close(*results, **SAME)


def test_what_is_read_may_be_chosen_anew_by_the_evaluation(make_bert, sentences):
    """Scores of chosen places beside a loss: those are read too. With hidden states or maps, everything is there."""
    model, asked = make_bert(ZooBertForPreTraining), labels_for(ZooBertForPreTraining, sentences)
    places = torch.tensor([[3, 5], [8, -1], [4, 0]])
    full = model(**sentences).prediction_logits
    chosen = model(**sentences, **asked, logits_to_keep=places).prediction_logits
    for row, place in ((0, 3), (0, 5), (1, 8), (2, 4), (2, 0)):
        assert_close(chosen[row, places[row].tolist().index(place)], full[row, place], **SAME)
    for wanted in ("output_hidden_states", "output_attentions"):
        outputs = model.train()(**sentences, **asked, **{wanted: True})
        last = outputs.hidden_states if wanted == "output_hidden_states" else outputs.attentions
        assert (last[-1][0] != 0).all()


def test_paths_are_dropped_for_each_sequence_of_a_padded_batch(make_bert, sentences):
    model = make_bert(ZooBertForSequenceClassification, drop_path=0.5).train()
    seen = []
    model.bert.layers[-1].feed_forward_branch.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for _ in range(20):
        model(**sentences)
    dropped = {tuple((change == 0).all(-1).all(-1).tolist()) for change in seen}
    assert all(len(rows) == 3 for rows in dropped) and len(dropped) > 2


@BACKENDS
def test_padding_may_be_on_the_left_or_between(make_bert, options, backend, tokens):
    model = make_bert(attn_implementation=backend, **options)
    mask = torch.ones_like(tokens)
    mask[0, :4], mask[1, 3:7] = 0, 0
    logits = model(tokens, attention_mask=mask).logits
    for row in range(3):
        kept = mask[row].bool()
        positions = torch.arange(12)[kept][None]
        one = model(tokens[row, kept][None], attention_mask=torch.ones_like(positions), position_ids=positions)
        assert_close(logits[row, kept], one.logits[0], **SAME)


@BACKENDS
@pytest.mark.parametrize("model_class", [ZooBertModel, ZooBertForPreTraining, ZooBertForSequenceClassification])
@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True}], ids=str)
def test_the_pooler_reads_a_padded_first_place_as_in_stock(make_bert, backend, model_class, asked, tokens):
    """Padding on the left of a row: its state there depends on the text."""
    model = make_bert(model_class, attn_implementation=backend)
    stock = model.to_stock()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs["attention_mask"][0, :4], inputs["attention_mask"][1, :1] = 0, 0
    labels = {} if model_class is ZooBertModel else labels_for(model_class, inputs)
    labels = {name: label % 2 if "label" in name and label.ndim == 1 else label for name, label in labels.items()}
    for given in ({}, labels):
        ours = model(**inputs, **given, **asked)
        theirs = stock(**inputs, **{name: label for name, label in given.items() if name != "masked_positions"})
        for name in {"pooler_output", "seq_relationship_logits", "loss"} & theirs.keys():
            assert_close(ours[name], theirs[name], **SAME)
        if model_class is ZooBertForSequenceClassification:
            assert_close(ours.logits, theirs.logits, **SAME)


@BACKENDS
def test_a_row_of_nothing_but_padding_harms_nobody(make_bert, backend, sentences):
    model = make_bert(attn_implementation=backend).train()
    sentences["attention_mask"][2] = 0
    asked = labels_for(ZooBertForMaskedLM, sentences)
    asked = {"labels": asked["labels"].masked_fill(sentences["attention_mask"] == 0, -100)}
    expected = model(**{name: value[:2] for name, value in sentences.items()}, labels=asked["labels"][:2]).loss
    loss = model(**sentences, **asked).loss
    loss.backward()
    assert_close(loss, expected, **SAME)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_hidden_states_and_attentions_of_a_padded_batch_keep_its_shape(make_bert, options, sentences):
    model = make_bert(**options)
    real = sentences["attention_mask"].bool()
    plain = model(**sentences).logits
    outputs = model(**sentences, output_hidden_states=True, output_attentions=True)
    assert_close(outputs.logits[real], plain[real], **SAME)
    assert [states.shape for states in outputs.hidden_states] == [(3, 12, 32)] * 3
    only_attentions = model(**sentences, output_attentions=True)
    for attentions in (outputs.attentions, only_attentions.attentions):
        assert [attention.shape for attention in attentions] == [(3, 4, 12, 12)] * 2
        for attention in attentions:
            to_real = (attention * real[:, None, None]).sum(-1)
            assert_close(to_real.transpose(1, 2)[real], torch.ones(26, 4))  # nobody looks at padding
    only_states = model(**sentences, output_hidden_states=True)
    assert [states.shape for states in only_states.hidden_states] == [(3, 12, 32)] * 3
    for states, expected in zip(only_states.hidden_states, outputs.hidden_states, strict=True):
        assert_close(states[real], expected[real], **SAME)


# --------------------------------------------------------------------------------------------------- packed rows


def pack(sentences, rows=((0, 2), (1,))):
    """The same sequences laid end to end, two in the first row, one in the second and there its repetition, so that
    both rows are full: what a packed batch looks like. Returns inputs and (row, first place, sequence)."""
    rows = [[*rows[0]], [*rows[1], 3]]
    lengths = [*lengths_of(sentences), 8]
    fourth = {name: value[0, None, :8] for name, value in sentences.items()}
    packed, places = [], []
    for number, row in enumerate(rows):
        parts, first = [], 0
        for sequence in row:
            inputs = fourth if sequence == 3 else alone(sentences, sequence)
            part = {name: inputs[name][0] for name in ("input_ids", "token_type_ids")}
            parts.append(part | {"position_ids": torch.arange(lengths[sequence])})
            places.append((number, first, lengths[sequence]))
            first += lengths[sequence]
        packed.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return {name: torch.stack([row[name] for row in packed]) for name in packed[0]}, places


def sequences_of(packed, places):
    for row, first, length in places:
        place = slice(first, first + length)
        yield row, place, {name: value[row, None, place] for name, value in packed.items() if name != "position_ids"}


@BACKENDS
@pytest.mark.parametrize(
    "model_class", [ZooBertModel, ZooBertForMaskedLM, ZooBertForTokenClassification, ZooBertForQuestionAnswering]
)
def test_a_packed_row_is_each_of_its_sequences_alone(make_bert, options, backend, model_class, sentences):
    packed, places = pack(sentences)
    packed = {name: value[:, :17] for name, value in packed.items()}
    model = make_bert(model_class, attn_implementation=backend, **options)
    outputs = model(**packed)
    assert packed["input_ids"].shape == (2, 17)
    for row, place, inputs in sequences_of(packed, places):
        one = model(**inputs)
        for name in tensors(one).keys() - {"pooler_output"}:
            assert_close(outputs[name][row, place], one[name][0], **SAME)


def test_a_packed_row_may_be_longer_than_its_positions(make_bert):
    model = make_bert(max_position_embeddings=8)
    tokens, position_ids = torch.randint(1, 64, (1, 12)), torch.arange(6).repeat(2)[None]
    expected = torch.cat([model(part).logits for part in tokens.split(6, dim=1)], dim=1)
    assert_close(model(tokens, position_ids=position_ids).logits, expected, **SAME)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(tokens, position_ids=position_ids).logits, expected, **SAME)
    with pytest.raises(ValueError, match="position_ids has 8, but max_position_embeddings is 8: give positions .* 7"):
        model(tokens, position_ids=position_ids + 3)


def packed_for_pretraining(sentences):
    """Packed rows with everything that pre-training needs, and the same sequences padded, one a row."""
    packed, places = pack(sentences)
    labels = torch.full((2, 17), -100)
    masked_positions = torch.tensor([[1, 4, 13, -1], [0, 2, 8, 11]])
    for row, positions in enumerate(masked_positions):
        positions = positions[positions >= 0]
        labels[row, positions] = packed["input_ids"][row, positions]
    packed |= {
        "labels": labels,
        "masked_positions": masked_positions,
        "sequence_positions": torch.tensor([[0, 12, -1], [0, 9, -1]]),
        "next_sentence_label": torch.tensor([[0, 1, -100], [1, 1, -100]]),
    }
    padded = {
        "input_ids": torch.zeros(4, 12, dtype=torch.long),
        "token_type_ids": torch.zeros(4, 12, dtype=torch.long),
        "attention_mask": torch.zeros(4, 12, dtype=torch.long),
        "labels": torch.full((4, 12), -100),
        "next_sentence_label": torch.tensor([0, 1, 1, 1]),
    }
    for sequence, (row, first, length) in enumerate(places):
        for name in ("input_ids", "token_type_ids", "labels"):
            padded[name][sequence, :length] = packed[name][row, first : first + length]
        padded["attention_mask"][sequence, :length] = 1
    return packed, padded


@BACKENDS
@pytest.mark.parametrize("counted", [False, True], ids=["own counts", "num_items_in_batch"])
def test_pretraining_on_packed_rows_is_pretraining_on_padded_ones(make_bert, options, backend, counted, sentences):
    packed, padded = packed_for_pretraining(sentences)
    model = make_bert(ZooBertForPreTraining, attn_implementation=backend, **options).train()
    counts = {"num_items_in_batch": {"masked_lm": 10, "next_sentence": torch.tensor(6.0)}} if counted else {}
    expected = model(**padded, **counts)
    expected.loss.backward()
    expected_gradients = gradients(model)
    outputs = model(**packed, **counts)
    outputs.loss.backward()
    assert outputs.seq_relationship_logits.shape == (2, 3, 2)
    relationship = outputs.seq_relationship_logits[:, :2].flatten(0, 1)
    assert_close(relationship, expected.seq_relationship_logits, **SAME)
    assert_close(outputs.loss, expected.loss, **SAME)
    assert_close(gradients(model), expected_gradients, **SAME)


def test_the_pretraining_loss_is_the_sum_of_its_two(make_bert, sentences):
    _, padded = packed_for_pretraining(sentences)
    model = make_bert(ZooBertForPreTraining)
    outputs = model(**padded)
    masked = F.cross_entropy(outputs.prediction_logits.flatten(0, 1), padded["labels"].flatten())
    next_sentence = F.cross_entropy(outputs.seq_relationship_logits, padded["next_sentence_label"])
    assert_close(outputs.loss, masked + next_sentence, **SAME)
    counts = {"masked_lm": 14, "next_sentence": 8}  # twice as many of each as there are
    assert_close(model(**padded, num_items_in_batch=counts).loss, outputs.loss / 2, **SAME)
    labels, inputs = padded.pop("labels"), padded
    next_sentence_label = padded.pop("next_sentence_label")
    assert_close(model(**inputs, labels=labels).loss, masked, **SAME)
    assert_close(model(**inputs, next_sentence_label=next_sentence_label).loss, next_sentence, **SAME)
    assert model(**inputs).loss is None


@pytest.mark.parametrize("num_items", [0, 14, torch.tensor(14), {"labels": 14}], ids=repr)
def test_one_number_cannot_divide_two_losses(make_bert, sentences, num_items):
    asked = labels_for(ZooBertForPreTraining, sentences)
    with pytest.raises(ValueError, match=r'num_items_in_batch must be \{"masked_lm": ..., "next_sentence": ...\}'):
        make_bert(ZooBertForPreTraining)(**sentences, **asked, num_items_in_batch=num_items)


def test_trainer_accumulates_the_mean_of_the_micro_batches(make_bert, sentences, tmp_path):
    model = make_bert(ZooBertForPreTraining).train()
    inputs = {**sentences, **labels_for(ZooBertForPreTraining, sentences)}
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(3)]
    sum(model(**{name: value[None] for name, value in row.items()}).loss / 3 for row in rows).backward()
    before, slopes = copy.deepcopy(model.state_dict()), gradients(model)
    settings = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3, learning_rate=0.01,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows).train()
    after = model.state_dict()
    assert_close({name: after[name] for name in slopes}, {n: before[n] - 0.01 * slopes[n] for n in slopes}, **SAME)


def test_a_packed_training_step_of_both_objectives_is_one_graph(make_bert, sentences):
    torch._dynamo.reset()
    packed, _ = packed_for_pretraining(sentences)
    model = make_bert(ZooBertForPreTraining, num_hidden_layers=1).train()
    model(**packed).loss.backward()
    expected = gradients(model)
    torch.compile(model, fullgraph=True, backend="aot_eager")(**packed).loss.backward()
    assert_close(gradients(model), expected, **SAME)


# ---------------------------------------------------------------------------------------------- flash attention


@pytest.fixture
def flash_calls(monkeypatch):
    """Stands in for the FlashAttention package, which needs a GPU: its functions, written in plain torch, below
    transformers' own dispatch. Returns what each call was told of its sequences; None for rows without borders."""
    calls = []

    def attend(query, key, value, softmax_scale):  # (T, N, H) each
        scores = torch.einsum("qnh,knh->nqk", query, key) * softmax_scale
        return torch.einsum("nqk,knh->qnh", scores.softmax(-1), value)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert not causal
        calls.append(None)
        return torch.stack([attend(*row, softmax_scale) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert not causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        assert cu_seqlens_q.dtype == torch.int32 and isinstance(max_seqlen_q, int)
        calls.append((cu_seqlens_q.tolist(), max_seqlen_q))
        sizes = cu_seqlens_q.diff().tolist()
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return torch.cat([attend(*part, softmax_scale) for part in parts])

    functions = (flash_attn_func, flash_attn_varlen_func, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return calls


def with_flash(model):
    model.config._attn_implementation_internal = "flash_attention_2"  # past the check that the package is there
    return model


def test_flash_attention_is_told_the_borders_of_padded_sequences(make_bert, options, flash_calls, sentences):
    if "num_key_value_heads" in options:
        pytest.skip("grouped heads are the kernel's own business")
    model = make_bert(ZooBertModel, **options)
    expected = model(**sentences)
    actual = with_flash(model)(**sentences)
    assert flash_calls == [([0, 12, 21, 26], 12)] * 2
    real = sentences["attention_mask"].bool()
    assert_close(actual.last_hidden_state[real], expected.last_hidden_state[real], **SAME)
    assert_close(actual.pooler_output, expected.pooler_output, **SAME)


def test_flash_attention_is_told_the_borders_of_packed_sequences(make_bert, flash_calls, sentences):
    packed, _ = packed_for_pretraining(sentences)
    model = make_bert(ZooBertForPreTraining).train()
    expected = model(**packed)
    expected.loss.backward()
    expected_gradients = gradients(model)
    actual = with_flash(model)(**packed)
    actual.loss.backward()
    assert flash_calls == [([0, 12, 17, 26, 34], 12)] * 2
    assert_close(actual.seq_relationship_logits, expected.seq_relationship_logits, **SAME)
    assert_close(gradients(model), expected_gradients, **SAME)


def test_flash_attention_needs_no_borders_without_padding(make_bert, flash_calls, tokens):
    model = make_bert()
    expected = model(tokens).logits
    assert_close(with_flash(model)(tokens).logits, expected, **SAME)
    assert_close(model(tokens, attention_mask=torch.ones_like(tokens)).logits, expected, **SAME)
    assert flash_calls == [None] * 4


# ------------------------------------------------------------------------------------------------- other heads

PROBLEMS = {
    "single_label_classification": (3, torch.tensor([0, 2, 1])),
    "multi_label_classification": (3, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])),
    "regression": (1, torch.tensor([0.5, -1.0, 2.0])),
    "regression of three": (3, torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.3, 0.2], [-0.1, 1.0, 1.0]])),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_num_items_in_batch_divides_every_classification_loss(make_bert, sentences, problem):
    num_labels, labels = PROBLEMS[problem]
    model = make_bert(ZooBertForSequenceClassification, num_labels=num_labels, problem_type=problem.split(" ")[0])
    whole = model(**sentences, labels=labels).loss
    half = model(**sentences, labels=labels, num_items_in_batch=2 * labels.numel()).loss
    assert_close(half, whole / 2, **SAME)


@pytest.mark.parametrize(("num_labels", "weights"), [(3, [1.0, 0.0, 4.0]), (2, [0.5, 2.0])], ids=str)
def test_class_weights_weigh_the_classes(make_bert, sentences, num_labels, weights):
    """As in `torch.nn.CrossEntropyLoss(weight)`: the mean is over the weights of the labels."""
    labels = torch.tensor([0, num_labels - 1, 1])
    expected_loss = torch.nn.CrossEntropyLoss(torch.tensor(weights))
    fields = {"num_labels": num_labels, "class_weights": weights}
    outputs = make_bert(ZooBertForSequenceClassification, **fields)(**sentences, labels=labels)
    assert_close(outputs.loss, expected_loss(outputs.logits, labels), **SAME)
    labels = torch.randint(0, num_labels, (3, 12)).masked_fill(sentences["attention_mask"] == 0, -100)
    outputs = make_bert(ZooBertForTokenClassification, **fields)(**sentences, labels=labels)
    assert_close(outputs.loss, expected_loss(outputs.logits.flatten(0, 1), labels.flatten()), **SAME)


@pytest.mark.parametrize("model_class", [ZooBertForSequenceClassification, ZooBertForTokenClassification])
def test_a_class_that_is_none_is_refused(make_bert, model_class, tokens):
    labels = torch.full((3,) if model_class is ZooBertForSequenceClassification else (3, 12), 3)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        make_bert(model_class, num_labels=3)(tokens, labels=labels)


@BACKENDS
@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True}], ids=str)
def test_no_answer_is_in_the_padding(make_bert, backend, asked, sentences):
    model = make_bert(ZooBertForQuestionAnswering, attn_implementation=backend)
    real, labels = sentences["attention_mask"].bool(), labels_for(ZooBertForQuestionAnswering, sentences)
    with torch.no_grad():
        model.qa_outputs.bias -= 100  # below what a state of zeros would score
        outputs, stock = model(**sentences, **asked), model.to_stock()(**sentences, **labels)
        trained = model(**sentences, **labels, **asked)
    assert_close(trained.loss, stock.loss, **SAME)
    for name in ("start_logits", "end_logits"):
        assert real.gather(1, outputs[name].argmax(1, keepdim=True)).all()
        assert (outputs[name][~real] == torch.finfo(torch.float32).min).all()
        assert_close(outputs[name][real], stock[name][real], rtol=1e-5, atol=1e-4)
        assert_close(trained[name], stock[name], rtol=1e-5, atol=1e-4)


def test_an_answer_outside_the_row_is_not_scored(make_bert, tokens):
    model = make_bert(ZooBertForQuestionAnswering)
    inside = model(tokens[:2], start_positions=torch.tensor([1, 0]), end_positions=torch.tensor([5, 0])).loss
    outside = model(tokens, start_positions=torch.tensor([1, 0, 12]), end_positions=torch.tensor([5, 0, 99])).loss
    assert_close(outside, inside, **SAME)


# ------------------------------------------------------------------------------------- what users bring with them


def test_a_config_of_transformers_4_is_read(tmp_path):
    """It wrote out position_embedding_type, in its own word."""
    written = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "gradient_checkpointing": False}
    (tmp_path / "config.json").write_text(json.dumps({**written, "position_embedding_type": "absolute"}))
    config = ZooBertConfig.from_pretrained(tmp_path)
    assert config.position_embedding_type == "learned" and config.hidden_dropout == 0.1
    (tmp_path / "config.json").write_text(json.dumps({**written, "position_embedding_type": "relative_key"}))
    with pytest.raises(Exception, match="position_embedding_type"):
        ZooBertConfig.from_pretrained(tmp_path)


@BACKENDS
def test_one_row_of_positions_serves_the_whole_batch(make_bert, options, backend, tokens):
    model = make_bert(attn_implementation=backend, **options)
    assert_close(model(tokens, position_ids=torch.arange(12)[None]).logits, model(tokens).logits, **SAME)


def test_flash_attention_refuses_packed_rows_that_it_would_mix_up(make_bert, flash_calls, sentences):
    packed = pack(sentences)
    packed = packed[0] if isinstance(packed, tuple) else packed
    for model, options in ((make_bert(), {"output_hidden_states": True}), (make_bert(drop_path=0.1).train(), {})):
        with pytest.raises(ValueError, match="output_hidden_states.*sdpa"):
            with_flash(model)(**packed, **options)


def test_a_traced_model_takes_other_shapes(make_bert, sentences):
    model = make_bert().requires_grad_(False)
    inputs = sentences["input_ids"], sentences["attention_mask"]
    traced = torch.jit.trace(lambda ids, mask: model(ids, attention_mask=mask).logits, inputs, check_trace=False)
    shorter = tuple(tensor[:2, :10] for tensor in inputs)
    expected = model(shorter[0], attention_mask=shorter[1]).logits
    real = shorter[1].bool()
    assert_close(traced(*shorter)[real], expected[real], **SAME)


def test_answering_does_not_change_the_mode(make_bert):
    model = make_bert(ZooBertForQuestionAnswering).train()
    with pytest.raises(ValueError, match="window"):
        model.answer(None, "who?", "he", max_tokens=3)
    assert model.training


def test_class_weights_for_other_labels_than_the_checkpoint_has(make_bert, tmp_path):
    make_bert(ZooBertForSequenceClassification, num_labels=2).save_pretrained(tmp_path)
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    model = ZooBertForSequenceClassification.from_pretrained(
        tmp_path, class_weights=[1.0, 2.0, 3.0], ignore_mismatched_sizes=True, **names
    )
    assert model.config.num_labels == 3 and model.config.id2label == names["id2label"]
    assert model.classifier.out_features == 3


def test_class_weights_may_be_integers_but_not_of_numbers():
    assert ZooBertConfig(num_labels=2, class_weights=[1, 2]).class_weights == [1, 2]
    with pytest.raises(Exception, match="class_weights"):
        ZooBertConfig(num_labels=1, class_weights=[1], problem_type="regression")
