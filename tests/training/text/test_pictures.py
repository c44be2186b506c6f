import numpy as np
import pytest
import torch

from hf_models import ZooBertModel
from training.text.pictures import token_attention, token_names


def test_the_overview_shows_every_head_of_every_layer(make_gpt, tokenizer):
    model = make_gpt(num_hidden_layers=3)
    attentions = model(**tokenizer("a word", return_tensors="pt"), output_attentions=True).attentions
    *maps, bar = token_attention(model, tokenizer, "a word").axes
    drawn = np.stack([axes.images[0].get_array() for axes in maps])
    np.testing.assert_allclose(drawn, torch.cat(attentions).flatten(0, 1).detach(), atol=1e-6)
    assert bar.get_ylabel() == "attention"


def test_the_heads_of_a_layer_have_the_tokens_beside_them(make_bert, masking_tokenizer):
    model = make_bert(ZooBertModel)
    figure = token_attention(model, masking_tokenizer, "a bc!", layer=-1)
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes[:4]]
    assert names == [["[CLS]", "a", "b", "c", "!", "[SEP]"]] + [[]] * 3
    last = model(**masking_tokenizer("a bc!", return_tensors="pt"), output_attentions=True).attentions[-1][0]
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), last[1].detach(), atol=1e-6)


def test_white_space_is_shown_as_signs(tokenizer):
    assert token_names(tokenizer, tokenizer("a \n.")["input_ids"]) == ["a", "␣", "⏎", "."]


def test_a_long_text_is_cut(make_gpt, make_bert, tokenizer, masking_tokenizer):
    figure = token_attention(make_gpt(), tokenizer, "word " * 100, layer=0)
    assert len(figure.axes[0].get_yticklabels()) == 40
    figure = token_attention(make_bert(max_position_embeddings=8), masking_tokenizer, "word " * 100, layer=0)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 8 and labels[-1] == "[SEP]"


def test_what_there_is_not_is_said(make_gpt, tokenizer):
    with pytest.raises(ValueError, match="text '' has no tokens"):
        token_attention(make_gpt(), tokenizer, "")
    with pytest.raises(ValueError, match="layer 2 of a model with 2 layers"):
        token_attention(make_gpt(), tokenizer, "a", layer=2)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_model_is_left_as_it_was(make_gpt, tokenizer, backend):
    model = make_gpt(attn_implementation=backend)
    token_attention(model, tokenizer, "a word")
    assert not model.training and model.config._attn_implementation == backend
