"""GPT against its peers on this machine: training step, memory, generation.

    python tests/benchmarks/gpt.py step                 # ours, transformers, and nanoGPT with --peer-path CLONE
    python tests/benchmarks/gpt.py memory
    python tests/benchmarks/gpt.py generate

Timings alternate between the competitors, A B A B, and compare medians: the ratio holds on a noisy machine, the
milliseconds may not. "as it comes" is each model as its own training script sets it up.
"""

import argparse
import gc
import importlib.util
import statistics
import time
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

import hf_models
from training.hub.finish import processor_name
from training.run.processes import fastest_attention, speed_up_cpu_matmul

SHAPES = {  # layers, width, heads, vocabulary, batch, tokens
    "gpt2-small": (12, 768, 12, 50257, 4, 256),
    "gpt2-small-1024": (12, 768, 12, 50257, 8, 1024),
    "char": (6, 384, 6, 65, 8, 256),
    "tiny": (2, 64, 2, 1000, 2, 32),  # to try this script
}


def ours(shape, device):
    layers, width, heads, vocab = SHAPES[shape][:4]
    return hf_models.create_model(
        "gpt2-small",
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=1024,
        attn_implementation=fastest_attention(device),
    ).to(device)


def stock(shape, device):
    layers, width, heads, vocab = SHAPES[shape][:4]
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab, "n_positions": 1024}
    no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    config = GPT2Config(**sizes, **no_dropout, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(device)


def nanogpt(shape, device, peer_path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(peer_path) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers, width, heads, vocab = SHAPES[shape][:4]
    config = module.GPTConfig(
        block_size=1024, vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0, bias=True
    )
    return module.GPT(config).to(device)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def training_step(model, shape, device, bf16=False, compiled=False):
    """A function that does one whole step: forward, loss, backward, optimizer."""
    vocab, batch, tokens = SHAPES[shape][3:]
    ids = torch.randint(vocab, (batch, tokens + 1), generator=torch.Generator().manual_seed(0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    is_transformers = hasattr(model, "generate") and hasattr(model.config, "model_type")
    call = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            if is_transformers:
                shift_labels = ids[:, 1:].contiguous()
                # Stock GPT-2 takes shifted labels beside labels that it then does not read.
                loss = call(input_ids=ids[:, :-1], labels=shift_labels, shift_labels=shift_labels, use_cache=False).loss
            else:
                loss = call(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def interleaved(candidates, rounds, device):
    """Median seconds of each candidate, called in turn; a candidate is a set-up function and the function to time."""
    times = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, (prepare, step) in candidates.items():
            prepare()
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            if round_number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def default_matmul():
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def benchmark_step(args):
    print(f"training step on {describe(args.device)}; milliseconds, and ours relative to each row")
    for shape in args.shapes:
        for setting in args.settings:
            bf16 = setting == "bf16"
            before_stock = default_matmul if setting == "as it comes" else speed_up_cpu_matmul
            models = {"hf_models": (speed_up_cpu_matmul, ours(shape, args.device))}
            models["transformers"] = (before_stock, stock(shape, args.device))
            if args.peer_path:
                models["nanoGPT"] = (before_stock, nanogpt(shape, args.device, args.peer_path))
            compiled = args.compile
            steps = {
                name: (prepare, training_step(model, shape, args.device, bf16, compiled))
                for name, (prepare, model) in models.items()
            }
            seconds = interleaved(steps, args.rounds, args.device)
            for name, value in seconds.items():
                ratio = value / seconds["hf_models"]
                print(f"{shape:<16} {setting:<14} {name:<14} {value * 1e3:9.1f} ms  {ratio:5.2f}x", flush=True)
            if args.device == "cuda":
                report_gpu(shape, seconds["hf_models"], models["hf_models"][1])
            del models, steps
            gc.collect()


def report_gpu(shape, seconds, model):
    """Tokens per second, and the share of the 989 TF/s that an H100 or H200 has in dense bfloat16."""
    layers, width, _, _, batch, tokens = SHAPES[shape]
    flops = batch * tokens * (6 * model.num_parameters() + 12 * layers * width * tokens)
    print(f"  {batch * tokens / seconds:,.0f} tokens/s, {flops / seconds / 989e12:.1%} of 989 TF/s")


def benchmark_memory(args):
    for shape in args.shapes:
        compare_memory(
            shape, {"hf_models": ours, "transformers": stock}, partial(training_step, shape=shape, device="cpu")
        )


def compare_memory(shape, builders, make_step):
    """Prints the most memory that tensors take at once in a training step, as CUDA's `max_memory_allocated` counts it:
    in all, and beyond weights and AdamW's moments, which no implementation can save.

    builders: name -> function of shape and device that makes a model; make_step: from a model to its training step.
    """
    print(f"peak memory of the tensors of a training step, {shape}: in all, and beyond weights and AdamW's moments")
    peaks = {}
    for name, build in builders.items():
        model = build(shape, "cpu")
        step = make_step(model)
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        resident = 3 * sum(parameter.nbytes for parameter in model.parameters())
        peaks[name] = resident, max(accumulate(event.nbytes() for event in changes))
        del model, step, profiler, changes
    for name, (resident, beyond) in peaks.items():
        whole, rest = ((kept + peaks["hf_models"][1]) / (kept + beyond) for kept in (resident, 0))
        print(
            f"{shape:<16} {name:<14} {(resident + beyond) / 2**20:7.0f} MiB, ours is {whole:.2f}x of it   "
            f"{beyond / 2**20:7.0f} MiB, ours is {rest:.2f}x of it",
            flush=True,
        )


def benchmark_generate(args):
    print(f"greedy generation of {args.new_tokens} tokens after 32 on {describe(args.device)}; tokens per second")
    for shape in args.shapes:
        mine = ours(shape, args.device).eval()
        twin = mine.to_stock().eval()
        twin_bf16, mine_bf16 = mine.to_stock().eval().to(torch.bfloat16), ours(shape, args.device).eval()
        mine_bf16.load_state_dict(mine.state_dict())
        mine_bf16.to(torch.bfloat16)
        for batch in (1, 8):
            prompt = torch.randint(SHAPES[shape][3], (batch, 32), device=args.device)

            def generate(model, prompt=prompt):
                return model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    min_new_tokens=args.new_tokens,
                    max_new_tokens=args.new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )

            assert torch.equal(generate(mine), generate(twin)), "the two models do not write the same tokens"
            candidates = {
                "hf_models": (speed_up_cpu_matmul, partial(generate, mine)),
                "transformers": (default_matmul, partial(generate, twin)),
                "hf_models bf16": (speed_up_cpu_matmul, partial(generate, mine_bf16)),
                "transformers bf16": (default_matmul, partial(generate, twin_bf16)),
            }
            if args.float32_only:
                candidates = dict(list(candidates.items())[:2])
            seconds = interleaved(candidates, args.rounds, args.device)
            for name, value in seconds.items():
                speed = batch * args.new_tokens / value
                ratio = seconds["transformers"] / value
                print(f"{shape:<16} batch {batch}  {name:<18} {speed:8.1f} tokens/s  {ratio:5.2f}x stock float32")


def describe(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "memory", "generate"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--settings", nargs="+", default=["as it comes", "same matmul", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--float32_only", action="store_true")
    parser.add_argument("--peer-path", help="a clone of nanoGPT")
    args = parser.parse_args()
    if args.shapes is None:
        args.shapes = ["gpt2-small", "char"] if args.what == "step" else ["gpt2-small"]
    globals()[f"benchmark_{args.what}"](args)


if __name__ == "__main__":
    main()
