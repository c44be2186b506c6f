"""Run by test_runtimes.py with torchrun: a checkpoint split over two processes computes what it does whole.

torchrun --nproc-per-node 2 tests/on_two_processes.py tp|fsdp FOLDER...
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import DistributedConfig

import hf_models
from tests.families import family_of, inputs_for, labels_for

SAME = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {"tp": {"tp_size": 2}, "fsdp": {"fsdp_size": 2}}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check(folder: str, kind: str):
    torch.manual_seed(0)
    (architecture,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    model_class = getattr(hf_models, architecture)
    inputs = inputs_for(model_class)
    expected = model_class.from_pretrained(folder)
    model = model_class.from_pretrained(folder, distributed_config=DistributedConfig(**SIZES[kind]))

    held = sum(local(parameter).numel() for parameter in model.parameters())
    assert held < 0.75 * expected.num_parameters(), "nothing was split"
    with torch.no_grad():
        split, at_once = (whole(one(**inputs).logits) for one in (model, expected))
        assert_close(split, at_once, **SAME)
        if family_of(model_class).of_text:
            real = torch.arange(12) < torch.tensor([12, 9, 5])[:, None]
            split, at_once = (whole(one(**inputs, attention_mask=real.long()).logits) for one in (model, expected))
            assert_close(split[real], at_once[real], **SAME)

    if kind == "tp" and model.can_generate():  # FSDP gathers weights inside `forward` only
        settings = {"inputs": inputs["input_ids"][:, :4], "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**settings), expected.generate(**settings))

    asked = labels_for(model_class, inputs)
    if family_of(model_class).of_text:  # padding, so that what is computed again is gathered again
        asked["attention_mask"] = real.long()
    loss, expected_loss = (one.train()(**inputs, **asked).loss for one in (model, expected))
    assert_close(whole(loss), expected_loss, **SAME)
    loss.backward()
    expected_loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    for name, parameter in expected.named_parameters():
        assert_close(gradients[name], parameter.grad, **SAME, msg=lambda text, n=name: f"{n}: {text}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[2:]:
        check(folder, sys.argv[1])
    print("same")
    torch.distributed.destroy_process_group()
