"""A checkpoint stands alone: where the package is not, trust_remote_code gives the same answers, bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DetrImageProcessor, ViTImageProcessor

from tests.families import CASES, FAMILIES, family_of, inputs_for, tensors

# Every class, and the main ones with every kind of block.
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def save(make_model, tokenizer, masking_tokenizer, sentences, tmp_path):
    """Saves a model of CASES with its tokenizer or image processor and what it computes; returns its folder."""

    def save(name):
        case, folder = CASES[name], tmp_path / name
        of_text, is_gpt = family_of(case.model_class).of_text, "GPT" in name
        inputs = inputs_for(case.model_class) if is_gpt or not of_text else sentences
        ends = {"pad_token_id": 0, "eos_token_id": 0} if is_gpt else {}
        model = make_model(case.model_class, **{**case.fields, **ends})
        model.save_pretrained(folder)
        expected = {
            **inputs,
            **{f"output.{name}": value for name, value in tensors(model(**inputs)).items()},
            "hidden_states": model.base_model(**inputs).last_hidden_state,
        }
        if of_text:
            its_tokenizer = tokenizer if is_gpt else masking_tokenizer
            its_tokenizer.save_pretrained(folder)
            expected["text"] = torch.tensor(its_tokenizer("to be").input_ids)
        else:
            kind = DetrImageProcessor if "Detr" in name else ViTImageProcessor
            processor = kind(size={"height": 16, "width": 16})
            processor.save_pretrained(folder)
            picture = Image.effect_noise((40, 30), 64).convert("RGB")
            picture.save(folder / "picture.png")
            expected["picture"] = processor(picture, return_tensors="pt").pixel_values
        if model.can_generate():
            expected["generated"] = model.generate(**inputs, max_new_tokens=10, do_sample=False)
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


def file_of(config_class):
    return config_class.family_auto_map["AutoConfig"].split(".")[0]


@every_case
@torch.no_grad()
def test_what_a_checkpoint_carries(save, name):
    folder, model_class = save(name), CASES[name].model_class
    config_class, auto_classes = model_class.config_class, family_of(model_class).auto_classes
    expected = {"AutoConfig": config_class.__name__}
    expected |= {auto_class.__name__: one.__name__ for one, auto_class in auto_classes.items()}
    file = file_of(config_class)
    carried = {path.stem for path in folder.glob("*.py")}
    needed = {file, "vit"} if file in ("mae", "detr") else {file}  # an autoencoder is made of a ViT, a detector may be
    assert {"base", "layers"} <= carried
    assert carried & {file_of(family.main_class.config_class) for family in FAMILIES.values()} == needed
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == config_class.model_type and config["zoo_version"]
    assert config["auto_map"] == {auto_class: f"{file}.{name}" for auto_class, name in expected.items()}
    names = set(load_file(folder / "model.safetensors"))
    assert any(key.endswith("layers.0.attention.q_proj.weight") for key in names)  # our own names, not the stock ones
    assert not any(key.startswith(("_orig_mod.", "module.")) for key in names)
