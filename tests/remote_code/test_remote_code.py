"""A checkpoint stands alone: where the package is not, trust_remote_code gives the same answers, bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import CASES, FAMILIES, tensors

# Every class, and the language models with every kind of block.
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def save(make_model, tokenizer, masking_tokenizer, tokens, sentences, tmp_path):
    """Saves a model of CASES with a tokenizer and what it computes; returns its folder."""

    def save(name):
        case, folder = CASES[name], tmp_path / name
        is_gpt = case.model_class.config_class.model_type == "zoo_gpt"
        inputs, its_tokenizer = ({"input_ids": tokens}, tokenizer) if is_gpt else (sentences, masking_tokenizer)
        ends = {"pad_token_id": 0, "eos_token_id": 0} if is_gpt else {}
        model = make_model(case.model_class, **{**case.fields, **ends})
        model.save_pretrained(folder)
        its_tokenizer.save_pretrained(folder)
        expected = {
            **inputs,
            **{f"output.{name}": value for name, value in tensors(model(**inputs)).items()},
            "hidden_states": model.base_model(**inputs).last_hidden_state,
            "text": torch.tensor(its_tokenizer("to be").input_ids),
        }
        if model.can_generate():
            expected["generated"] = model.generate(tokens, max_new_tokens=10, do_sample=False)
        expected = {name: value.clone(memory_format=torch.contiguous_format) for name, value in expected.items()}
        save_file(expected, folder / "expected.safetensors")
        return folder

    return save


@torch.no_grad()
def test_checkpoints_give_the_same_answers_where_the_package_is_not(save, tmp_path):
    script = Path(__file__).parent / "load_elsewhere.py"
    folders = [save(name) for name in CASES]
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


@every_case
@torch.no_grad()
def test_what_a_checkpoint_carries(save, name):
    folder, config_class = save(name), CASES[name].model_class.config_class
    family = config_class.model_type.removeprefix("zoo_")
    assert {"base.py", f"{family}.py", "layers.py"} <= {path.name for path in folder.glob("*.py")}
    assert not {"gpt.py", "bert.py"} - {f"{family}.py"} & {path.name for path in folder.glob("*.py")}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == config_class.model_type and config["zoo_version"]
    classes = {auto_class.__name__: one.__name__ for one, auto_class in FAMILIES[family].auto_classes.items()}
    expected = {"AutoConfig": config_class.__name__, **classes}
    assert config["auto_map"] == {auto_class: f"{family}.{name}" for auto_class, name in expected.items()}
    names = set(load_file(folder / "model.safetensors"))
    assert any(key.endswith("layers.0.attention.q_proj.weight") for key in names)  # our own names, not the stock ones
    assert not any(key.startswith(("_orig_mod.", "module.")) for key in names)
