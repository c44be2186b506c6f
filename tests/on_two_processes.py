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
from tests.families import labels_for

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
    tokens = torch.randint(1, 64, (3, 12))
    mask = (torch.arange(12) < torch.tensor([12, 9, 5])[:, None]).long()
    expected = model_class.from_pretrained(folder)
    model = model_class.from_pretrained(folder, distributed_config=DistributedConfig(**SIZES[kind]))

    held = sum(local(parameter).numel() for parameter in model.parameters())
    assert held < 0.75 * expected.num_parameters(), "nothing was split"
    with torch.no_grad():
        assert_close(whole(model(tokens)[0]), expected(tokens)[0], **SAME)
        real = mask.bool()
        split, at_once = (whole(one(tokens, attention_mask=mask).logits) for one in (model, expected))
        assert_close(split[real], at_once[real], **SAME)

    if kind == "tp" and model.can_generate():  # FSDP gathers weights inside `forward` only
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(tokens[:, :4], **settings), expected.generate(tokens[:, :4], **settings))

    asked = labels_for(model_class, tokens)
    loss, expected_loss = (one.train()(tokens, **asked).loss for one in (model, expected))
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
