"""A checkpoint stands alone: where the package is not, trust_remote_code gives the same answers, bit by bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_models
from tests.families import CASES, EACH_BLOCK_ONCE, FAMILIES, ONE_OF_EACH_CLASS, family_of

every_class = pytest.mark.parametrize("name", ONE_OF_EACH_CLASS.values())


@torch.no_grad()
def test_checkpoints_give_the_same_answers_where_the_package_is_not(save, load_elsewhere):
    load_elsewhere(*[save(name) for name in sorted({*ONE_OF_EACH_CLASS.values(), *EACH_BLOCK_ONCE})])


def test_fixtures_compute_what_they_did_with_the_code_that_travels(load_elsewhere, tmp_path):
    """The weights of then beside the code of today, on whichever version of transformers these tests run."""
    fixtures = sorted(path.parent for path in Path(__file__).parents[1].glob("fixtures/*/config.json"))
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in fixtures]
    for copy in copies:
        config = json.loads((copy / "config.json").read_text())
        getattr(hf_models, config["architectures"][0]).from_pretrained(copy).save_pretrained(copy)
    load_elsewhere("--fixtures", *copies)


def file_of(config_class):
    return config_class.family_auto_map["AutoConfig"].split(".")[0]


@every_class
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
