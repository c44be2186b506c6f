"""What `to_stock` promises of every family, beside equal outputs: see the family's own file for those."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from tests.families import FAMILIES, every_family, inputs_for

# Options that no stock class has.
OURS_ALONE = [
    {"norm": "rmsnorm"},
    {"qk_norm": True},
    {"use_bias": False},
    {"position_embedding_type": "rotary"},
    {"position_embedding_type": "sinusoidal"},
    {"num_key_value_heads": 2},
    {"head_dim": 16},
    {"hidden_act": "swiglu"},
    {"num_labels": 2, "class_weights": [1.0, 2.0]},
    {"layer_scale": 0.1},
]


@every_family
def test_it_keeps_dtype_and_mode(make_model, family):
    ours = make_model(family.main_class).bfloat16()
    assert ours.to_stock().dtype == torch.bfloat16
    assert not ours.to_stock().training
    assert ours.train().to_stock().training


@every_family
def test_it_copies_the_weights(make_model, family):
    """Training the stock copy leaves ours alone."""
    ours, inputs = make_model(family.main_class), inputs_for(family.main_class)
    before = ours(**inputs).logits
    with torch.no_grad():
        for parameter in ours.to_stock().parameters():
            parameter.add_(1)
    assert torch.equal(ours(**inputs).logits, before)


@every_family
@pytest.mark.parametrize("fields", OURS_ALONE, ids=str)
def test_it_names_the_option_that_stock_lacks(make_model, family, fields):
    *_, option = fields
    if family is FAMILIES["detr"] and option == "position_embedding_type":
        pytest.skip("of DETR's two kinds of positions, stock has both")
    with pytest.raises((ValueError, StrictDataclassError), match=option):  # a DETR has no class_weights either
        make_model(family.main_class, **fields).to_stock()


@every_family
def test_the_norm_stands_where_the_paper_has_it(make_model, family):
    model_class = family.main_class
    other = {"pre": "post", "post": "pre"}[model_class.config_class().norm_position]
    with pytest.raises(ValueError, match="norm_position"):
        make_model(model_class, norm_position=other).to_stock()
