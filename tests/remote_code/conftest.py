"""What the tests of checkpoints that travel share: one saved with what it computes, and a place without the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_models import ZooDetrImageProcessor, ZooViTImageProcessor
from tests.families import CASES, family_of, inputs_for, tensors


@pytest.fixture
def save(make_model, tokenizer, masking_tokenizer, sentences, tmp_path):
    """Saves a model of CASES with its tokenizer or image processor and what it computes; returns its folder,
    named `folder` or like the case."""

    def save(name, folder=None):
        case, folder = CASES[name], tmp_path / (folder or name)
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
            kind = ZooDetrImageProcessor if "Detr" in name else ZooViTImageProcessor
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


@pytest.fixture
def load_elsewhere(tmp_path):
    """Runs load_elsewhere.py, which see, in a process of its own where nothing is cached but by earlier calls."""

    def load_elsewhere(*arguments, **environment):
        here = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-I", Path(__file__).parent / "load_elsewhere.py", *arguments],
            cwd=tmp_path,
            env={**here, **environment},
            stdin=subprocess.DEVNULL,  # nobody is there to say yes to a question
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        assert "all the same" in done.stdout

    return load_elsewhere
