"""Checkpoints written by earlier versions still load and still compute what they did."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import hf_models
from tests.fixtures.make_fixtures import generate

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "fixtures").glob("*/config.json"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_every_family_has_a_fixture():
    assert {folder.name for folder in FOLDERS} >= {
        entry.config_class.model_type for entry in hf_models.zoo.ZOO.values()
    }


@torch.no_grad()
def test_an_old_checkpoint_computes_what_it_did(folder):
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(hf_models, config["architectures"][0])
    model, report = model_class.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.zoo_version == config["zoo_version"]
    outputs = model(**load_file(folder / "inputs.safetensors"))
    for name, expected in load_file(folder / "outputs.safetensors").items():
        assert_close(outputs[name], expected, rtol=1e-6, atol=1e-6)
    assert (folder / "generated.safetensors").exists() == model.can_generate()
    if model.can_generate():
        generated = generate(model, load_file(folder / "inputs.safetensors"))
        for name, expected in load_file(folder / "generated.safetensors").items():
            assert torch.equal(generated[name], expected), name


def test_a_fixture_is_small_enough_for_the_repository(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
