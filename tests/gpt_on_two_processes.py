"""Run by test_gpt_runtimes.py with torchrun: a checkpoint split over two processes computes what it does whole.

torchrun --nproc-per-node 2 tests/gpt_on_two_processes.py tp|fsdp FOLDER...
"""

import sys

import torch
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import DistributedConfig

from hf_models import ZooGPTForCausalLM

SIZES = {"tp": {"tp_size": 2}, "fsdp": {"fsdp_size": 2}}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check(folder: str, kind: str):
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (2, 12))
    expected = ZooGPTForCausalLM.from_pretrained(folder)
    model = ZooGPTForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**SIZES[kind]))

    held = sum(local(parameter).numel() for parameter in model.parameters())
    assert held < 0.75 * expected.num_parameters(), "nothing was split"
    with torch.no_grad():
        assert_close(whole(model(tokens).logits), expected(tokens).logits, rtol=1e-5, atol=1e-5)

    settings = {"max_new_tokens": 8, "do_sample": False}
    if kind == "tp":  # FSDP gathers weights inside `forward` only; generation is for whole or tensor-parallel models
        assert torch.equal(model.generate(tokens[:, :4], **settings), expected.generate(tokens[:, :4], **settings))

    model.train()
    expected.train()
    loss, expected_loss = (one(tokens, labels=tokens, use_cache=False).loss for one in (model, expected))
    assert_close(whole(loss), expected_loss, rtol=1e-5, atol=1e-5)
    if kind == "fsdp":
        loss.backward()
        expected_loss.backward()
        gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        for name, parameter in expected.named_parameters():
            assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[2:]:
        check(folder, sys.argv[1])
    print("same")
    torch.distributed.destroy_process_group()
