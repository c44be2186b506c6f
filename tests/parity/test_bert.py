"""Our BERT computes what stock BERT computes: outputs, losses and gradients, in float32, eager."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from hf_models import (
    ZooBertConfig,
    ZooBertForMaskedLM,
    ZooBertForPreTraining,
    ZooBertForQuestionAnswering,
    ZooBertForSequenceClassification,
    ZooBertForTokenClassification,
    ZooBertModel,
    create_model,
)

SAME = {"rtol": 1e-5, "atol": 1e-5}

PAIRS = {
    "model": (BertModel, ZooBertModel),
    "pretraining": (BertForPreTraining, ZooBertForPreTraining),
    "masked_lm": (BertForMaskedLM, ZooBertForMaskedLM),
    "classifier": (BertForSequenceClassification, ZooBertForSequenceClassification),
    "tagger": (BertForTokenClassification, ZooBertForTokenClassification),
    "answers": (BertForQuestionAnswering, ZooBertForQuestionAnswering),
}
every_pair = pytest.mark.parametrize(("stock_class", "our_class"), PAIRS.values(), ids=PAIRS.keys())
our_classes = pytest.mark.parametrize("our_class", [ours for _, ours in PAIRS.values()])

# Stock options that change shapes or arithmetic, and that our config has to follow.
STOCK_OPTIONS = [
    {},
    {"intermediate_size": 48},
    {"hidden_act": "relu"},
    {"layer_norm_eps": 0.1},
    {"type_vocab_size": 3},
    {"pad_token_id": None},
    {"tie_word_embeddings": False},
]


def scored(tokens, mask):
    """Labels for a masked language model: some of the real places."""
    chosen = (torch.arange(12) % 3 == torch.arange(3)[:, None]) & mask.bool()
    return tokens.masked_fill(~chosen, -100)


def labels_of(stock_class, sentences):
    tokens, mask = sentences["input_ids"], sentences["attention_mask"]
    return {
        BertForPreTraining: {"labels": scored(tokens, mask), "next_sentence_label": torch.tensor([0, 1, 1])},
        BertForMaskedLM: {"labels": scored(tokens, mask)},
        BertForSequenceClassification: {"labels": torch.tensor([0, 1, 1])},
        BertForTokenClassification: {"labels": (tokens % 2).masked_fill(mask == 0, -100)},
        BertForQuestionAnswering: {
            "start_positions": torch.tensor([3, 0, 1]),
            "end_positions": torch.tensor([7, 2, 12]),  # the last outside its row: not scored
        },
    }[stock_class]


def no_padding(outputs, mask):
    """The outputs with 0 where there is padding: stock BERT computes something there that nobody looks at, ours
    nothing. Keys of attention maps are real places in both."""
    real = mask.bool()
    cleaned = {}
    for name, value in outputs.items():
        if name == "cross_attentions":
            continue
        if name == "attentions":
            cleaned[name] = tuple(one * real[:, None, :, None] for one in value)
        elif name == "hidden_states":
            cleaned[name] = tuple(one * real[..., None] for one in value)
        elif value is not None and value.shape[:2] == mask.shape:
            cleaned[name] = value * real.view(*real.shape, *[1] * (value.ndim - 2))
        else:
            cleaned[name] = value
    return cleaned


@every_pair
@pytest.mark.parametrize("fields", STOCK_OPTIONS, ids=str)
def test_outputs_are_those_of_the_stock_class(stock_bert, load_as_ours, stock_class, our_class, fields, sentences):
    stock = stock_bert(stock_class, **fields)
    ours = load_as_ours(stock, our_class)
    for asked in ({}, {"output_hidden_states": True, "output_attentions": True}):
        expected, actual = stock(**sentences, **asked), ours(**sentences, **asked)
        assert list(actual) == [name for name in expected if name != "cross_attentions"]  # stock: an empty tuple
        mask = sentences["attention_mask"]
        assert_close(no_padding(actual, mask), no_padding(expected, mask), **SAME)


def test_the_places_of_tokens_may_be_told(stock_bert, load_as_ours, sentences):
    stock = stock_bert(BertModel)
    ours = load_as_ours(stock, ZooBertModel)
    sentences["position_ids"] = torch.randint(0, 64, (3, 12))
    mask = sentences["attention_mask"]
    assert_close(no_padding(ours(**sentences), mask), no_padding(stock(**sentences), mask), **SAME)
    sentences["position_ids"] = torch.arange(5, 17)[None]
    assert_close(no_padding(ours(**sentences), mask), no_padding(stock(**sentences), mask), **SAME)


def test_a_model_without_a_pooler_is_read(stock_bert, sentences, tmp_path):
    stock = stock_bert(BertForMaskedLM).bert  # which has none
    stock.save_pretrained(tmp_path)
    ours, report = ZooBertModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not any(report.values()), report
    mask = sentences["attention_mask"]
    actual, expected = no_padding(ours(**sentences), mask), no_padding(stock(**sentences), mask)
    assert_close(actual["last_hidden_state"], expected["last_hidden_state"], **SAME)
    assert ours(**sentences).pooler_output is None


def backward(model, inputs, labels):
    loss = model.train()(**inputs, **labels).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("stock_class", "our_class"), list(PAIRS.values())[1:], ids=list(PAIRS)[1:]
)  # the base model has no loss of its own
def test_losses_and_gradients_are_those_of_the_stock_class(
    stock_bert, load_as_ours, assert_same_gradients, stock_class, our_class, fields, padded, sentences
):
    stock = stock_bert(stock_class, **fields)
    ours = load_as_ours(stock, our_class)
    if not padded:
        sentences["input_ids"] = torch.randint(1, 64, (3, 12))
        sentences["attention_mask"] = torch.ones(3, 12, dtype=torch.long)
    labels = labels_of(stock_class, sentences)
    assert_close(ours(**sentences, **labels).loss, stock(**sentences, **labels).loss, **SAME)
    assert_close(backward(ours, sentences, labels), backward(stock, sentences, labels), **SAME)
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (3, None, torch.tensor([0, 2, 1])),
        (1, None, torch.tensor([0.5, -1.0, 2.0])),
        (1, None, torch.tensor([[0.5], [-1.0], [2.0]])),
        (3, "regression", torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.3, 0.2], [-0.1, 1.0, 1.0]])),
        (3, None, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])),
    ],
    ids=["single_label", "regression", "regression of columns", "regression of three", "multi_label"],
)
def test_every_kind_of_classification_is_that_of_the_stock_class(
    stock_bert, load_as_ours, assert_same_gradients, num_labels, problem_type, labels, sentences
):
    stock = stock_bert(BertForSequenceClassification, num_labels=num_labels, problem_type=problem_type)
    ours = load_as_ours(stock, ZooBertForSequenceClassification)
    labels = {"labels": labels}
    assert_close(backward(ours, sentences, labels), backward(stock, sentences, labels), **SAME)
    assert ours.config.problem_type == stock.config.problem_type
    assert_same_gradients(ours, stock)


# ------------------------------------------------------------------------------------ stock checkpoints, both ways


@every_pair
@pytest.mark.parametrize("fields", STOCK_OPTIONS, ids=str)
def test_to_stock_gives_the_stock_model_back(stock_bert, load_as_ours, stock_class, our_class, fields, sentences):
    stock = stock_bert(stock_class, **fields)
    again = load_as_ours(stock, our_class).to_stock()
    assert type(again) is stock_class
    # Untied, stock BERT keeps a second bias that nothing reads; ours has no place for it.
    unread = {"cls.predictions.bias"} if not stock.config.tie_word_embeddings else set()
    mine, theirs = again.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in set(theirs) - unread)
    again.set_attn_implementation("eager")
    assert torch.equal(again(**sentences)[0], stock(**sentences)[0])
    mine, theirs = again.config.to_dict(), stock.config.to_dict()
    of_the_file = {"_name_or_path", "architectures", "dtype"}
    assert {name for name in theirs if mine.get(name) != theirs[name]} <= of_the_file


def test_the_decoder_of_a_stock_copy_is_tied_again(stock_bert, load_as_ours):
    for our_class in (ZooBertForMaskedLM, ZooBertForPreTraining):
        stock = load_as_ours(stock_bert(getattr(transformers, our_class.__name__[3:])), our_class).to_stock()
        assert stock.cls.predictions.decoder.weight is stock.bert.embeddings.word_embeddings.weight
        assert stock.cls.predictions.decoder.bias is stock.cls.predictions.bias


@our_classes
def test_a_model_of_ours_goes_to_stock_and_comes_back(make_bert, load_as_ours, our_class, tokens):
    ours = make_bert(our_class, residual_init="zero")
    stock = ours.to_stock()
    stock.set_attn_implementation("eager")
    assert_close(stock(tokens)[0], ours(tokens)[0], **SAME)
    assert torch.equal(load_as_ours(stock, our_class)(tokens)[0], ours(tokens)[0])


def test_answers_have_two_ends_however_many_labels_there_were(make_bert, tokens):
    ours = make_bert(ZooBertForQuestionAnswering, num_labels=3)
    assert_close(ours.to_stock()(tokens).end_logits, ours(tokens).end_logits, **SAME)


@pytest.mark.parametrize("option", ["is_decoder", "add_cross_attention"])
def test_stock_options_that_we_do_not_compute_are_refused(stock_bert, option, tmp_path):
    stock = stock_bert()
    setattr(stock.config, option, True)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=option):
        ZooBertForMaskedLM.from_pretrained(tmp_path)


@our_classes
@pytest.mark.parametrize("saved", PAIRS)
def test_any_class_of_ours_reads_any_stock_checkpoint(stock_bert, saved, our_class, sentences, tmp_path):
    """What the file has is read; what it lacks begins anew, and the report says so. Nothing else is."""
    stock_class, saved_class = PAIRS[saved]
    stock = stock_bert(stock_class)
    stock.save_pretrained(tmp_path)
    ours, report = our_class.from_pretrained(tmp_path, output_loading_info=True)
    mine, theirs = (set(parts_of(one)) for one in (our_class, saved_class))
    heads = {
        name.split(".")[0 if not name.startswith(("bert.pooler", "pooler")) else -2] for name in report["missing_keys"]
    }
    assert heads == mine - theirs
    base = ours.base_model
    expected = getattr(stock, "bert", stock)(**sentences)
    real = sentences["attention_mask"].bool()
    assert_close(base(**sentences).last_hidden_state[real], expected.last_hidden_state[real], **SAME)
    if {"pooler"} <= mine & theirs:
        assert_close(base(**sentences).pooler_output, expected.pooler_output, **SAME)
    assert all(parameter.isfinite().all() for parameter in ours.parameters())


def parts_of(our_class):
    return {
        ZooBertModel: ["pooler"],
        ZooBertForPreTraining: ["pooler", "mlm_head", "nsp_head"],
        ZooBertForMaskedLM: ["mlm_head"],
        ZooBertForSequenceClassification: ["pooler", "classifier"],
        ZooBertForTokenClassification: ["classifier"],
        ZooBertForQuestionAnswering: ["qa_outputs"],
    }[our_class]


def test_the_first_checkpoints_of_the_hub_load(stock_bert, sentences, tmp_path):
    """BERT was published with TensorFlow's names for gain and bias of a norm, with its position numbers among the
    weights, and with one bias of the masked-token head that has one name, or two."""
    stock = stock_bert(BertForPreTraining)
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in weights.items()
    }
    assert sum(name.endswith("gamma") for name in old) == 6
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    old["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
    labels = labels_of(BertForPreTraining, sentences)
    expected = stock(**sentences, **labels)
    for biases in (["cls.predictions.bias"], ["cls.predictions.bias", "cls.predictions.decoder.bias"]):
        named = {
            name: weight for name, weight in old.items() if not name.endswith(("predictions.bias", "decoder.bias"))
        }
        named |= {name: weights["cls.predictions.bias"].clone() for name in biases}
        save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours, report = ZooBertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        outputs = ours(**sentences, **labels)
        assert_close(outputs.loss, expected.loss, **SAME)
        assert_close(outputs.seq_relationship_logits, expected.seq_relationship_logits, **SAME)


def test_a_base_checkpoint_without_a_prefix_is_read_into_a_head(stock_bert, sentences, tmp_path):
    """As `AutoModel` saves it: no name begins with `bert.`."""
    stock = stock_bert(BertModel)
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("bert.") for name in weights)
    ours = ZooBertForTokenClassification.from_pretrained(tmp_path)
    real = sentences["attention_mask"].bool()
    expected = stock(**sentences).last_hidden_state[real]
    assert_close(ours.bert(**sentences).last_hidden_state[real], expected, **SAME)


def test_a_loaded_stock_checkpoint_is_saved_as_one_of_ours(stock_bert, load_as_ours, tokens, tmp_path):
    ours = load_as_ours(stock_bert(), ZooBertForMaskedLM)
    ours.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) < set(ours.state_dict())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").model_type == "zoo_bert"
    assert torch.equal(ZooBertForMaskedLM.from_pretrained(tmp_path / "ours")(tokens).logits, ours(tokens).logits)


def test_a_stock_config_that_says_little_means_the_stock_defaults(tmp_path):
    """Files leave out what has its default: BERT's dropout is 0.1, ours is 0."""
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4}')
    config = ZooBertConfig.from_pretrained(tmp_path)
    assert (config.hidden_dropout, config.attention_dropout, config.intermediate_size) == (0.1, 0.1, 3072)
    assert (config.norm_eps, config.norm_position, config.model_type) == (1e-12, "post", "zoo_bert")


def test_the_spellings_of_bert_are_understood():
    config = ZooBertConfig(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, layer_norm_eps=1e-6)
    assert (config.hidden_dropout, config.attention_dropout, config.norm_eps) == (0.2, 0.3, 1e-6)
    assert config.hidden_dropout_prob == 0.2


@pytest.mark.slow
def test_bert_at_its_published_size_is_the_stock_class(load_as_ours, assert_same_gradients):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**no_dropout, attn_implementation="eager")
    stock = BertForPreTraining(config).eval()  # its own initialisation: at this depth, larger weights only saturate
    ours = load_as_ours(stock, ZooBertForPreTraining)
    assert ours.num_parameters() == create_model("bert-base").num_parameters() == stock.num_parameters()
    tokens = torch.randint(1, 30522, (2, 64))
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(64) < torch.tensor([64, 40])[:, None]).long()}
    labels = {
        "labels": tokens.masked_fill(torch.arange(64) % 7 != 0, -100).masked_fill(inputs["attention_mask"] == 0, -100)
    }
    labels["next_sentence_label"] = torch.tensor([0, 1])
    mask = inputs["attention_mask"]
    assert_close(no_padding(ours(**inputs), mask), no_padding(stock(**inputs), mask), **SAME)
    assert_close(backward(ours, inputs, labels), backward(stock, inputs, labels), **SAME)
    assert_same_gradients(ours, stock)
