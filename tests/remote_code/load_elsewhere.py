"""Run where neither this package nor a network can be had: checkpoints with their code alone.

    python -I load_elsewhere.py [--hub] [--at-once N] FOLDER...
    python -I load_elsewhere.py --fixtures FOLDER...

Each folder holds a checkpoint, and in expected.safetensors what the class that wrote it computed. With --hub a folder
says in where.json which repository is opened in its place, {"name", "revision", "code_revision"}, and what `PUBLISHED`
is in its code, {"published"}; then the Hub at HF_ENDPOINT can be had. With --at-once the last one is opened only once,
but by N processes at the same time, before the others. With --fixtures each folder is a copy of one in
tests/fixtures, with its code: outputs are compared to 1e-6, since they were computed on another machine, and tokens
exactly.
"""

import argparse
import importlib
import json
import multiprocessing
import re
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


def on_loopback(connect):
    """`connect`, where the first thing that looks like an address is one of this machine."""

    def connect_on_loopback(*arguments, **options):
        host = next(one if isinstance(one, str) else one[0] for one in arguments if isinstance(one, str | tuple))
        return (connect if host in ("127.0.0.1", "::1", "localhost") else refuse)(*arguments, **options)

    return connect_on_loopback


parser = argparse.ArgumentParser()
parser.add_argument("--hub", action="store_true")
parser.add_argument("--at-once", type=int, default=0)
parser.add_argument("--fixtures", action="store_true")
parser.add_argument("folders", nargs="+", type=Path)
arguments = parser.parse_args()

sys.meta_path.insert(0, Blocked())
socket.socket.connect = on_loopback(socket.socket.connect) if arguments.hub else refuse
socket.getaddrinfo = on_loopback(socket.getaddrinfo) if arguments.hub else refuse

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoTokenizer, pipeline  # noqa: E402
from transformers.models.auto.auto_factory import _BaseAutoBackboneClass  # noqa: E402
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

PIPELINES = {
    "ForCausalLM": ("text-generation", "to be", {"max_new_tokens": 3}),
    "ForMaskedLM": ("fill-mask", "to [MASK]", {}),
    "ForSequenceClassification": ("text-classification", "to be", {}),
    "ForTokenClassification": ("token-classification", "to be", {"ignore_labels": []}),
    "ForImageClassification": ("image-classification", "picture.png", {}),
    "ForObjectDetection": ("object-detection", "picture.png", {"threshold": 0.0}),
}


def where_is(folder: Path) -> tuple[str, dict, str | None]:
    """What is opened for a folder: a name, the arguments of `from_pretrained`, and what `PUBLISHED` is there."""
    where = json.loads((folder / "where.json").read_text()) if arguments.hub else {}
    source, published = where.pop("name", str(folder)), where.pop("published", None)
    return source, {**where, "trust_remote_code": True}, published


def check_model(folder: Path):
    """The class that was saved computes what is in expected.safetensors. Returns it, with the Auto class of each."""
    source, which, published = where_is(folder)
    config = AutoConfig.from_pretrained(source, **which)
    (architecture,) = config.architectures
    family = {auto_class: name.split("--")[-1].split(".")[1] for auto_class, name in config.auto_map.items()}
    assert type(config).__name__ == family.pop("AutoConfig")
    auto_classes = {name: getattr(transformers, auto_class) for auto_class, name in family.items()}

    model = open_with(auto_classes[architecture], source, which)
    assert type(model).__name__ == architecture
    assert type(model).__module__.startswith("transformers_modules.")
    assert getattr(sys.modules[type(model).__module__], "PUBLISHED", None) == published
    check_answers(model, load_file(folder / "expected.safetensors"))
    return model, auto_classes


def check(folder: Path):
    """Opens the checkpoint in every way; the answers must be those of expected.safetensors."""
    model, auto_classes = check_model(folder)
    source, which, _ = where_is(folder)
    expected, architecture = load_file(folder / "expected.safetensors"), type(model).__name__

    # AutoModel opens the checkpoint of any head, every Auto class every checkpoint.
    base = AutoModel.from_pretrained(source, **which)
    assert torch.equal(base(**inputs_of(expected)).last_hidden_state, expected["hidden_states"])
    for name, auto_class in auto_classes.items():
        assert type(open_with(auto_class, source, which)).__name__ == name

    # Saved again from here, the checkpoint still carries its code, under the names of the files beside it.
    again = folder / "again"
    model.save_pretrained(again)
    file = type(model).__module__.split(".")[-1]
    assert {f"{file}.py", "base.py", "layers.py"} <= {path.name for path in again.iterdir()}
    auto_map = json.loads((again / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((folder / "config.json").read_text())["auto_map"]
    assert list(load_file(again / "model.safetensors")) == list(load_file(folder / "model.safetensors"))
    check_answers(open_with(auto_classes[architecture], str(again), {"trust_remote_code": True}), expected)

    if "text" in expected:
        tokenizer = AutoTokenizer.from_pretrained(source, **which)
        assert tokenizer("to be").input_ids == expected["text"].tolist()
    else:
        with Image.open(folder / "picture.png") as picture:
            for backend in (None, "pil", "torchvision"):
                processor = AutoImageProcessor.from_pretrained(source, backend=backend, **which)
                assert type(processor).__module__.split(".")[-1] == "image_processing"
                assert torch.equal(processor(picture, return_tensors="pt").pixel_values, expected["picture"])
        processor.save_pretrained(again)
        assert (again / "image_processing.py").read_bytes() == (folder / "image_processing.py").read_bytes()
    for ending, (task, given, settings) in PIPELINES.items():
        if architecture.endswith(ending):
            use = pipeline(task, model=source, device="cpu", **which, **settings)
            answer = use(str(folder / given) if given.endswith(".png") else given)
            assert answer and type(use.model).__name__ == architecture


def open_with(auto_class, source, which):
    """`AutoBackbone` asks the Hub for every name, a folder's too; then it opens it like the others."""
    opener = super(_BaseAutoBackboneClass, AutoBackbone) if auto_class is AutoBackbone else auto_class
    return opener.from_pretrained(source, **which)


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


def check_fixture(folder: Path):
    """A fixture computes and generates what it did when it was written."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto_class = next(name for name, one in config.auto_map.items() if one.endswith(f".{config.architectures[0]}"))
    opener, which = getattr(transformers, auto_class), {"trust_remote_code": True, "attn_implementation": "eager"}
    model, inputs = opener.from_pretrained(folder, **which), load_file(folder / "inputs.safetensors")
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        outputs = model(**inputs)
    for name, expected in load_file(folder / "outputs.safetensors").items():
        torch.testing.assert_close(outputs[name], expected, rtol=1e-6, atol=1e-6)
    if model.can_generate():
        settings = {"greedy": {}, "beams": {"num_beams": 3}}  # as in make_fixtures.py
        for name, expected in load_file(folder / "generated.safetensors").items():
            generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings[name])
            assert torch.equal(generated, expected), (name, generated, expected)


def check_at_once(num_processes: int, folder: Path):
    """All begin when all are there, so that they find the caches as cold as each other."""
    for path in folder.glob("*.py"):  # what the code wants of the libraries: else they would wait for the disk together
        for library in re.findall(r"^from ([a-z][\w.]*) import", path.read_text(), flags=re.MULTILINE):
            importlib.import_module(library)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(num_processes)

    def check_together():
        barrier.wait()
        check_model(folder)

    def exit_codes(processes):
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    failed = [
        code for code in exit_codes([context.Process(target=check_together) for _ in range(num_processes)]) if code
    ]
    # transformers copies code into its cache neither under a lock nor at once. Who meets a half-copied file fails (on a
    # machine that is very busy, one process in 400), and loads when it is started again.
    assert len(failed) <= num_processes // 4
    assert exit_codes([context.Process(target=check_model, args=[folder]) for _ in failed]) == [0] * len(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if arguments.at_once:
        check_at_once(arguments.at_once, arguments.folders.pop())
    for folder in arguments.folders:
        check_fixture(folder) if arguments.fixtures else check(folder)
    assert "hf_models" not in sys.modules
    print("all the same")
