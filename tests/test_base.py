"""The base in three steps: what a model without attention gets, and the plan that splits one with attention."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_models import ZooDetrConfig, ZooGPTForCausalLM, __version__
from hf_models.layers import TransformerStack
from tests.families import CASES, Case
from tests.tiny_rnn import TinyRNNConfig, TinyRNNModel

WITH_A_STACK = {
    **CASES,
    "ZooGPTForCausalLM-with-a-source": Case(ZooGPTForCausalLM, {"add_cross_attention": True, "source_size": 10}),
}

# ------------------------------------------------------------------------------------------ without a transformer


def test_a_model_without_attention_saves_itself_with_its_code(tmp_path):
    model, inputs = TinyRNNModel(TinyRNNConfig(width=6)).eval(), torch.randn(2, 5, 3)
    assert (model.config.num_inputs, model.config.zoo_version) == (3, __version__)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "tiny_rnn.py").exists()
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__module__ != TinyRNNModel.__module__  # its class comes from the checkpoint
    for loaded in (again, TinyRNNModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded(inputs).last_hidden_state, model(inputs).last_hidden_state)
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_a_config_without_a_transformer_has_what_every_config_has(tmp_path):
    config = TinyRNNConfig(n_embd=10)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True, width=20)
    assert (again.width, again.num_inputs, again.n_embd) == (20, 5, 20)  # what was saved is not derived again
    assert not {"hidden_size", "num_attention_heads", "vocab_size"} & set(config.to_dict())


def test_a_model_without_attention_refuses_keywords_and_knows_no_stock_class():
    model = TinyRNNModel(TinyRNNConfig())
    with pytest.raises(ValueError, match="'input'; did you mean 'inputs'"):
        model(torch.randn(2, 5, 4), input=1)
    with pytest.raises(ValueError, match="TinyRNNModel has no stock counterpart"):
        model.to_stock()


# ---------------------------------------------------------------------------------------------- tensor parallelism


def matches(plan, name):
    """The entries of a plan that a module's name fits, where `*` stands for a number."""
    return [entry for entry in plan if re.fullmatch(re.escape(entry).replace(r"\*", r"\d+"), name)]


@pytest.mark.parametrize("case", WITH_A_STACK.values(), ids=WITH_A_STACK.keys())
def test_the_plan_of_tensor_parallelism_names_every_matrix_of_every_stack_and_nothing_else(make_model, case):
    model = make_model(case.model_class, **case.fields)
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    idle = [entry for entry in model._tp_plan if not any(matches([entry], name) for name in owners)]
    assert not idle
    stacks = [name for name, module in model.named_modules() if isinstance(module, TransformerStack)]
    matrices = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(f"{stack}." for stack in stacks))
    ]
    assert len(matrices) >= 6 * len(stacks)
    for name in matrices:
        if getattr(model.config, "spatial_prior", False) and ".cross_attention." in name:
            continue  # its scores get a term for every head, so no process can do with a part of the heads
        assert len(matches(model._tp_plan, name)) == 1, name


def test_detr_plans_its_encoder_its_decoder_and_the_cross_attention_between_them():
    config = ZooDetrConfig()
    assert config.is_encoder_decoder
    for stack in ("encoder.layers.*.attention", "decoder.layers.*.attention", "decoder.layers.*.cross_attention"):
        assert {f"{stack}.{name}_proj" for name in "qkvo"} <= set(config.base_model_tp_plan)
