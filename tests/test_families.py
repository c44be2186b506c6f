"""What every class of every family promises: checkpoints that come back bit by bit, inputs, outputs, attention maps."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from transformers import AutoConfig, DynamicCache

import hf_models
from hf_models.matching import count_items
from hf_models.zoo import ZOO
from tests.families import (
    CASES,
    CASES_OF_ONE_STACK,
    CASES_OF_TEXT,
    FAMILIES,
    WITH_A_HEAD,
    attentions,
    every_family,
    every_family_of_one_stack,
    every_family_of_text,
    family_of,
    inputs_for,
    labels_for,
    open_with,
    tensors,
)

SAME = {"rtol": 1e-5, "atol": 1e-5}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_case_of_one_stack = pytest.mark.parametrize("case", CASES_OF_ONE_STACK.values(), ids=CASES_OF_ONE_STACK.keys())
every_case_of_text = pytest.mark.parametrize("case", CASES_OF_TEXT.values(), ids=CASES_OF_TEXT.keys())
every_head = pytest.mark.parametrize("case", WITH_A_HEAD.values(), ids=WITH_A_HEAD.keys())


def test_every_family_of_the_zoo_is_tested():
    tested = {family.main_class.config_class for family in FAMILIES.values()}
    assert tested == {entry.config_class for entry in ZOO.values()}


# -------------------------------------------------------------------------------------------------------- config


@every_family
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 30}, "hidden_size .*num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads .*num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 7, "position_embedding_type": "rotary"}, "head_dim|position_embedding_type"),
        ({"hidden_size": 33, "head_dim": 8, "position_embedding_type": "sinusoidal"}, "hidden_size"),
        ({"hidden_act": "geluu"}, "hidden_act.*gelu_new"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"norm": "batchnorm"}, "norm"),
        ({"norm_position": "middle"}, "norm_position"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type"),
        ({"residual_init": "ones"}, "residual_init"),
        ({"class_weights": [1.0, 2.0, 3.0], "num_labels": 2}, "class_weights .*(num_labels|no_object_weight)"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_(hidden|decoder)_layers"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"head_dim": 0}, "head_dim"),
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_is_named(family, fields, named):
    config_class = family.main_class.config_class
    with pytest.raises((ValueError, StrictDataclassError), match=rf"(?s){named}"):
        config_class(**{"hidden_size": 32, "num_attention_heads": 4, **fields})


@every_family_of_text
@pytest.mark.parametrize("field", ["vocab_size", "max_position_embeddings"])
def test_a_field_of_text_that_does_not_fit_is_named(family, field):
    with pytest.raises(StrictDataclassError, match=field):
        family.main_class.config_class(**{field: 0})


@every_family
def test_a_config_made_invalid_afterwards_is_not_saved(family, tmp_path):
    config = family.main_class.config_class(hidden_size=32, num_attention_heads=4)
    config.num_key_value_heads = 3
    with pytest.raises(StrictDataclassError, match="num_key_value_heads"):
        config.save_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------- weights: begin, save, load


@every_case
def test_a_saved_model_is_loaded_bit_by_bit(make_model, case, tmp_path):
    model, inputs = make_model(case.model_class, **case.fields), inputs_for(case.model_class)
    model.save_pretrained(tmp_path)
    again, report = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert_close(tensors(again(**inputs)), tensors(model(**inputs)), rtol=0, atol=0)
    for field in case.fields:
        value, expected = getattr(again.config, field), getattr(model.config, field)
        assert type(value) is type(expected) and (value == expected or field == "backbone_config")
    assert not again.training


@every_family
def test_the_auto_classes_open_a_checkpoint_of_any_class(make_model, family, tmp_path):
    inputs = inputs_for(family.main_class)
    for saved_class in family.auto_classes:
        folder = tmp_path / saved_class.__name__
        make_model(saved_class, **({"pad_token_id": 0} if family.of_text else {})).save_pretrained(folder)
        assert type(AutoConfig.from_pretrained(folder)) is saved_class.config_class
        for our_class, auto_class in family.auto_classes.items():
            model = open_with(auto_class, folder)
            assert type(model) is our_class
            for value in tensors(model(**inputs)).values():
                assert value.isfinite().all()  # a head that was not in the file begins properly, not as garbage


@every_family_of_text
def test_the_head_and_the_embedding_are_one_matrix_when_tied(make_model, family, tmp_path):
    tied = make_model(family.main_class)
    untied = make_model(family.main_class, tie_word_embeddings=False)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert untied.num_parameters() - tied.num_parameters() == 64 * 32
    tied.save_pretrained(tmp_path)
    again = family.main_class.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@every_family_of_one_stack
@pytest.mark.parametrize(("residual_init", "expected"), [("normal", 0.02), ("scaled", 0.01), ("zero", 0.0)])
def test_projections_that_end_a_residual_branch_begin_as_told(family, residual_init, expected):
    sizes = {**family.sizes, "hidden_size": 256}
    model = family.main_class(family.main_class.config_class(**sizes, residual_init=residual_init))
    for block in model.base_model.layers:
        for projection in (block.attention.o_proj, block.feed_forward.down_proj):
            assert projection.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert (projection.bias == 0).all()
        assert block.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (block.attention_norm.weight == 1).all()


@every_family_of_one_stack
def test_an_untrained_model_knows_nothing(family):
    """All 64 tokens, or all three classes, are equally likely to it; of an image it paints the mean."""
    model = family.main_class(family.main_class.config_class(**{**family.sizes, "hidden_size": 256})).eval()
    inputs = inputs_for(family.main_class)
    labels = {"labels": inputs["input_ids"]} if family.of_text else labels_for(family.main_class, inputs)
    nothing = math.log(64) if family.of_text else math.log(3) if labels else 1.0
    assert model(**inputs, **labels).loss.item() == pytest.approx(nothing, abs=0.25)


# ------------------------------------------------------------------------------------------------------- inputs


@every_case_of_text
def test_embeddings_may_be_given_in_place_of_tokens(make_model, case, tokens):
    model = make_model(case.model_class, **{**case.fields, "pad_token_id": None})
    tokens = tokens[:1]  # one row: nothing has to tell where it ends
    inputs_embeds = model.get_input_embeddings()(tokens)
    assert_close(tensors(model(inputs_embeds=inputs_embeds)), tensors(model(tokens)), rtol=0, atol=0)


@every_case_of_text
def test_exactly_one_kind_of_input_is_asked_for(make_model, case, tokens):
    model = make_model(case.model_class, **case.fields)
    for inputs in ({}, {"input_ids": tokens, "inputs_embeds": model.get_input_embeddings()(tokens)}):
        with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
            model(**inputs)


@every_case
def test_a_keyword_that_nobody_reads_is_refused(make_model, case):
    """Swallowed, it would change the answer without an error, as a renamed cache did."""
    model, inputs = make_model(case.model_class, **case.fields), inputs_for(case.model_class)
    labels = labels_for(case.model_class, inputs) if case in WITH_A_HEAD.values() else {}
    for given in (inputs, inputs | labels):
        with pytest.raises(ValueError, match=r"'cached_keys'"):
            model(**given, cached_keys=None)
    with pytest.raises(ValueError, match=r"did you mean '?output_attentions"):
        model(**inputs, output_attention=True)
    if "GPT" not in case.model_class.__name__:  # an encoder has no use for what a decoder reads
        for name in ("cache", "past_key_values", "block_table"):
            with pytest.raises(ValueError, match=f"'{name}'"):
                model(**inputs, **{name: DynamicCache()})


@every_family_of_text
def test_more_tokens_than_learned_positions_are_refused(make_model, family):
    with pytest.raises(ValueError, match="65 tokens, but max_position_embeddings is 64"):
        make_model(family.main_class)(torch.zeros(1, 65, dtype=torch.long))


@every_family_of_text
@pytest.mark.parametrize("position_embedding_type", ["sinusoidal", "rotary"])
def test_computed_positions_go_on_beyond_the_trained_length(make_model, family, position_embedding_type):
    model = make_model(family.main_class, position_embedding_type=position_embedding_type)
    assert model(torch.randint(0, 64, (1, 80))).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------ outputs


@every_case_of_one_stack
def test_hidden_states_and_attentions_on_request(make_model, case):
    model, inputs = make_model(case.model_class, **case.fields), inputs_for(case.model_class)
    plain = model(**inputs)
    assert plain.hidden_states is None and plain.attentions is None
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    if case.model_class.__name__.endswith(("BertForSequenceClassification", "ForImageClassification")):
        whole = model(**inputs, only_first=False)  # other tokens beside the first in the last block round otherwise
        assert_close(tensors(whole), tensors(plain), rtol=1e-5, atol=1e-6)
        plain = whole
    assert_close(tensors(outputs), tensors(plain), rtol=0, atol=0)
    last = model.base_model(**inputs).last_hidden_state
    assert len(outputs.hidden_states) == 3
    assert all(states.shape == last.shape for states in outputs.hidden_states)
    of_text = family_of(case.model_class).of_text  # of images, the states are as in stock those before the last norm
    assert torch.equal(outputs.hidden_states[-1] if of_text else model.base_model.norm(outputs.hidden_states[-1]), last)
    num_tokens = last.shape[1]
    assert [attention.shape for attention in outputs.attentions] == [(3, 4, num_tokens, num_tokens)] * 2
    for attention in outputs.attentions:
        assert_close(attention.sum(-1), torch.ones(3, 4, num_tokens))


@every_case
def test_attention_maps_of_a_backend_that_forms_none_are_refused(make_model, case):
    model, inputs = make_model(case.model_class, "sdpa", **case.fields), inputs_for(case.model_class)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="eager"):  # the config refuses as in stock
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(attentions(model(**inputs))) in (2, 6)  # of every block, and a decoder has two kinds
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model(**inputs)


@every_head
def test_a_tuple_on_request(make_model, case):
    model, inputs = make_model(case.model_class, **case.fields), inputs_for(case.model_class)
    inputs |= labels_for(case.model_class, inputs)
    expected = tensors(model(**inputs))
    actual = [value for value in model(**inputs, return_dict=False) if isinstance(value, torch.Tensor)]
    assert all(torch.equal(*pair) for pair in zip(actual, expected.values(), strict=True))


@every_case
def test_dropout_acts_in_training_alone(make_model, case):
    inputs = inputs_for(case.model_class)
    fields = ("hidden_dropout", "attention_dropout", "embedding_dropout", "classifier_dropout", "drop_path")
    for field in fields:
        if not hasattr(case.model_class.config_class(), field) or (
            field == "classifier_dropout" and "Classification" not in case.model_class.__name__
        ):
            continue
        model = make_model(case.model_class, **{**case.fields, field: 0.5})
        assert_close(tensors(model(**inputs)), tensors(model(**inputs)), rtol=0, atol=0)
        model.train()
        first, *others = (list(tensors(model(**inputs)).values()) for _ in range(4))  # two paths may be dropped alike
        assert not all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True)), field


@every_head
def test_num_items_in_batch_divides_the_summed_loss(make_model, case):
    """So that micro-batches add up to their batch, however the scored items fall."""
    inputs = inputs_for(case.model_class)
    labels = labels_for(case.model_class, inputs)
    model = make_model(case.model_class, **case.fields).train()
    whole = model(**inputs, **labels)
    num_items = num_items_of(model, labels, whole)
    parts = []
    for row in range(3):
        part = {name: value[row : row + 1] for name, value in (inputs | labels).items()}
        parts.append(model(**part, num_items_in_batch=num_items).loss)
    assert_close(sum(parts), whole.loss, **SAME)


def num_items_of(model, asked, outputs):
    name = type(model).__name__
    if name.endswith("ForQuestionAnswering"):
        return 3
    if name.endswith("ForObjectDetection"):
        return count_items(asked["labels"], model.config)
    if not asked:
        return outputs.mask.sum()
    labels = asked["labels"][:, 1:] if name.endswith("ForCausalLM") else asked["labels"]
    scored = (labels != -100).sum()
    if name.endswith("ForPreTraining"):
        return {"masked_lm": scored, "next_sentence": torch.tensor(3)}
    return scored


def test_what_the_package_promises_is_there():
    assert all(hasattr(hf_models, name) for name in hf_models.__all__)
    classes = {one for family in FAMILIES.values() for one in family.auto_classes}
    assert {one.__name__ for one in classes} < set(hf_models.__all__)
