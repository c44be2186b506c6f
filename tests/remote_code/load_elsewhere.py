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
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

AUTO_CLASSES = {
    "ZooGPTModel": AutoModel,
    "ZooGPTForCausalLM": AutoModelForCausalLM,
    "ZooGPTForSequenceClassification": AutoModelForSequenceClassification,
}
PIPELINES = {
    "ZooGPTForCausalLM": "text-generation",
    "ZooGPTForSequenceClassification": "text-classification",
}


def check(folder: Path):
    expected = load_file(folder / "expected.safetensors")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "ZooGPTConfig"
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]

    model = AUTO_CLASSES[architecture].from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == architecture
    assert type(model).__module__.startswith("transformers_modules.")
    check_answers(model, expected)

    # AutoModel opens the checkpoint of any head, every Auto class every checkpoint.
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__name__ == "ZooGPTModel"
    assert torch.equal(base(expected["tokens"]).last_hidden_state, expected["hidden_states"])
    for name, auto_class in AUTO_CLASSES.items():
        assert type(auto_class.from_pretrained(folder, trust_remote_code=True)).__name__ == name

    # Saved again from here, the checkpoint still carries its code.
    again = folder / "again"
    model.save_pretrained(again)
    assert {"gpt.py", "base.py", "layers.py"} <= {path.name for path in again.iterdir()}
    assert json.loads((again / "config.json").read_text())["auto_map"] == config.auto_map
    assert list(load_file(again / "model.safetensors")) == list(load_file(folder / "model.safetensors"))
    check_answers(AUTO_CLASSES[architecture].from_pretrained(again, trust_remote_code=True), expected)

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer("To be").input_ids == expected["text"].tolist()
    if architecture in PIPELINES:
        use = pipeline(PIPELINES[architecture], model=str(folder), trust_remote_code=True, device="cpu")
        answer = use("To be", **({"max_new_tokens": 3} if architecture == "ZooGPTForCausalLM" else {}))
        assert answer and type(use.model).__name__ == architecture


def check_answers(model, expected):
    assert torch.equal(model(expected["tokens"])[0], expected["output"])
    if "generated" in expected:
        generated = model.generate(expected["tokens"], max_new_tokens=10, do_sample=False)
        assert torch.equal(generated, expected["generated"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        check(Path(folder))
    assert "hf_models" not in sys.modules
    print("all the same")
