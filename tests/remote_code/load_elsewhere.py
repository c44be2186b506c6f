"""Run by test_remote_code.py where neither this package nor a network can be had: checkpoints with their code alone.

    python -I load_elsewhere.py FOLDER...

Each folder holds a checkpoint, and in expected.safetensors what the class that wrote it computed.
"""

import json
import socket
import sys
from pathlib import Path


class Blocked:
    """An import hook under which this repository's packages do not exist."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_models", "training"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def refuse(*_, **__):
    raise AssertionError("a checkpoint that stands alone needs no network")


sys.meta_path.insert(0, Blocked())
socket.socket.connect = socket.getaddrinfo = refuse

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, pipeline  # noqa: E402
from transformers.models.auto.auto_factory import _BaseAutoBackboneClass  # noqa: E402

PIPELINES = {
    "ForCausalLM": ("text-generation", "to be", {"max_new_tokens": 3}),
    "ForMaskedLM": ("fill-mask", "to [MASK]", {}),
    "ForSequenceClassification": ("text-classification", "to be", {}),
    "ForTokenClassification": ("token-classification", "to be", {"ignore_labels": []}),
    "ForImageClassification": ("image-classification", "picture.png", {}),
    "ForObjectDetection": ("object-detection", "picture.png", {"threshold": 0.0}),
}


def check(folder: Path):
    expected = load_file(folder / "expected.safetensors")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    family = dict(config.auto_map)
    file, config_class = family.pop("AutoConfig").split(".")
    assert type(config).__name__ == config_class
    auto_classes = {name.split(".")[1]: getattr(transformers, auto_class) for auto_class, name in family.items()}

    model = open_with(auto_classes[architecture], folder)
    assert type(model).__name__ == architecture
    assert type(model).__module__.startswith("transformers_modules.")
    check_answers(model, expected)

    # AutoModel opens the checkpoint of any head, every Auto class every checkpoint.
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(base(**inputs_of(expected)).last_hidden_state, expected["hidden_states"])
    for name, auto_class in auto_classes.items():
        assert type(open_with(auto_class, folder)).__name__ == name

    # Saved again from here, the checkpoint still carries its code.
    again = folder / "again"
    model.save_pretrained(again)
    assert {f"{file}.py", "base.py", "layers.py"} <= {path.name for path in again.iterdir()}
    assert json.loads((again / "config.json").read_text())["auto_map"] == config.auto_map
    assert list(load_file(again / "model.safetensors")) == list(load_file(folder / "model.safetensors"))
    check_answers(open_with(auto_classes[architecture], again), expected)

    if "text" in expected:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert tokenizer("to be").input_ids == expected["text"].tolist()
    else:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        with Image.open(folder / "picture.png") as picture:
            assert torch.equal(processor(picture, return_tensors="pt").pixel_values, expected["picture"])
    for ending, (task, given, settings) in PIPELINES.items():
        if architecture.endswith(ending):
            use = pipeline(task, model=str(folder), trust_remote_code=True, device="cpu", **settings)
            answer = use(str(folder / given) if given.endswith(".png") else given)
            assert answer and type(use.model).__name__ == architecture


def open_with(auto_class, folder):
    """`AutoBackbone` asks the Hub for every name, a folder's too; then it opens it like the others."""
    opener = super(_BaseAutoBackboneClass, AutoBackbone) if auto_class is AutoBackbone else auto_class
    return opener.from_pretrained(folder, trust_remote_code=True)


def inputs_of(expected):
    names = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "noise")
    return {name: expected[name] for name in names if name in expected}


def check_answers(model, expected):
    answer = model(**inputs_of(expected))
    outputs = {name: value for name, value in answer.items() if isinstance(value, torch.Tensor)}
    outputs |= {f"feature_maps.{number}": one for number, one in enumerate(answer.get("feature_maps") or ())}
    assert {f"output.{name}" for name in outputs} == {name for name in expected if name.startswith("output.")}
    for name, value in outputs.items():
        assert torch.equal(value, expected[f"output.{name}"]), name
    if "generated" in expected:
        generated = model.generate(expected["input_ids"], max_new_tokens=10, do_sample=False)
        assert torch.equal(generated, expected["generated"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        check(Path(folder))
    assert "hf_models" not in sys.modules
    print("all the same")
