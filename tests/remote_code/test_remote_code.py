"""A checkpoint stands alone: where the package is not, trust_remote_code gives the same answers, bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_models import ZooGPTForCausalLM, ZooGPTForSequenceClassification, ZooGPTModel

MODERN = {"position_embedding_type": "rotary", "norm": "rmsnorm", "qk_norm": True, "hidden_act": "relu2"}
CHECKPOINTS = {
    "model": (ZooGPTModel, {}),
    "causal_lm": (ZooGPTForCausalLM, {}),
    "causal_lm_modern": (ZooGPTForCausalLM, {**MODERN, "num_key_value_heads": 2, "use_bias": False}),
    "causal_lm_post_norm": (ZooGPTForCausalLM, {"norm_position": "post", "position_embedding_type": "sinusoidal"}),
    "classifier": (ZooGPTForSequenceClassification, {"num_labels": 3}),
}


@pytest.fixture
def save(make_gpt, tokenizer, tokens, tmp_path):
    """Saves one of CHECKPOINTS with a tokenizer and what it computes; returns its folder."""

    def save(name):
        model_class, fields = CHECKPOINTS[name]
        model, folder = make_gpt(model_class, eos_token_id=0, pad_token_id=0, **fields), tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        expected = {
            "tokens": tokens,
            "output": model(tokens)[0],
            "hidden_states": getattr(model, "transformer", model)(tokens).last_hidden_state,
            "text": torch.tensor(tokenizer("To be").input_ids),
        }
        if model_class is ZooGPTForCausalLM:
            expected["generated"] = model.generate(tokens, max_new_tokens=10, do_sample=False)
        save_file(
            {key: value.detach().contiguous() for key, value in expected.items()}, folder / "expected.safetensors"
        )
        return folder

    return save


@torch.no_grad()
def test_checkpoints_give_the_same_answers_where_the_package_is_not(save, tmp_path):
    script = Path(__file__).parent / "load_elsewhere.py"
    folders = [save(name) for name in CHECKPOINTS]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", script, *folders],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,  # nobody is there to say yes to a question
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "all the same" in done.stdout


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_what_a_checkpoint_carries(save, name):
    folder = save(name)
    assert {path.name for path in folder.glob("*.py")} == {"base.py", "gpt.py", "layers.py"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "zoo_gpt" and config["zoo_version"]
    assert config["auto_map"] == {
        "AutoConfig": "gpt.ZooGPTConfig",
        "AutoModel": "gpt.ZooGPTModel",
        "AutoModelForCausalLM": "gpt.ZooGPTForCausalLM",
        "AutoModelForSequenceClassification": "gpt.ZooGPTForSequenceClassification",
    }
    names = set(load_file(folder / "model.safetensors"))
    assert any(key.endswith("layers.0.attention.q_proj.weight") for key in names)  # our own names, not the stock ones
    assert not any(key.startswith(("_orig_mod.", "module.")) for key in names)
