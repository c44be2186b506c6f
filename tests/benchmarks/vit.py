"""ViT against transformers on this machine: a training step, inference, and what an autoencoder's mask saves.

    python tests/benchmarks/vit.py step          # ours, transformers, and SimpleViT with --peer-path VIT_PYTORCH_CLONE
    python tests/benchmarks/vit.py inference
    python tests/benchmarks/vit.py mae

Both begin with the same weights and get the same images, which are noise: that changes no time. Timings alternate
between the competitors, A B A B, and compare medians. "as it comes" is each with the float32 products of its own
library's training; SimpleViT (github.com/lucidrains/vit-pytorch) begins with weights of its own.
"""

import argparse
import gc
import importlib.util
from contextlib import nullcontext
from pathlib import Path

import torch
from gpt import default_matmul, describe, interleaved

from hf_models import (
    ZooViTForImageClassification,
    ZooViTMAEForPreTraining,
    ZooViTMAEModel,
    ZooViTModel,
)
from training.run.processes import fastest_attention, speed_up_cpu_matmul

SHAPES = {  # layers, width, heads, patch, image, classes, batch
    "vit-small-224": (12, 384, 6, 16, 224, 1000, 8),
    "vit-base-224": (12, 768, 12, 16, 224, 1000, 8),
    "vit-32": (12, 192, 3, 4, 32, 10, 64),
    "tiny": (2, 64, 2, 4, 16, 10, 4),  # to try this script
}


def build(shape, device, model_class=ZooViTForImageClassification, **fields):
    layers, width, heads, patch, image, classes, _ = SHAPES[shape]
    config = model_class.config_class(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=image,
        num_labels=classes,
        attn_implementation=fastest_attention(device),
        **fields,
    )
    return model_class(config).to(device)


def twin(model, device):
    """The stock model with the same weights, as it comes: under sdpa."""
    stock = model.to_stock()
    stock.set_attn_implementation("sdpa")
    return stock.to(device)


def simple_vit(shape, device, peer_path):
    spec = importlib.util.spec_from_file_location("simple_vit", Path(peer_path) / "vit_pytorch" / "simple_vit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers, width, heads, patch, image, classes, _ = SHAPES[shape]
    return module.SimpleViT(
        image_size=image,
        patch_size=patch,
        num_classes=classes,
        dim=width,
        depth=layers,
        heads=heads,
        mlp_dim=4 * width,
        dim_head=width // heads,
    ).to(device)


def competitors(args, shape, setting):
    """Name -> the model, and what sets up the products of its library."""
    ours = build(shape, args.device)
    before_others = default_matmul if setting == "as it comes" else speed_up_cpu_matmul
    stock = twin(ours, args.device)
    if args.attn_implementation:
        for model in (ours, stock):
            model.set_attn_implementation(args.attn_implementation)
    models = {"hf_models": (ours, speed_up_cpu_matmul), "transformers": (stock, before_others)}
    if args.peer_path:
        models["SimpleViT"] = (simple_vit(shape, args.device, args.peer_path), before_others)
    return models


def make_images(args, shape):
    image, classes, batch = SHAPES[shape][4:]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size or batch, 3, image, image, generator=generator)
    return images.to(args.device), torch.randint(classes, (len(images),), generator=generator).to(args.device)


def training_step(args, model, loss_of, bf16):
    """A function that does one whole step: forward, loss, backward, optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    call = torch.compile(model) if args.compile else model

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
            loss = loss_of(call)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def inference(args, model, images, bf16):
    model.eval()
    call = torch.compile(model) if args.compile else model

    def run():
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16) if bf16 else nullcontext():
            return logits_of(call(images))

    return run


def logits_of(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def compare(args, make, same_answer=True):
    """Times what `make` gives for a shape and a setting, name -> (set-up, function), and prints how the first compares
    to each; the first two are to give the same answer."""
    for shape in args.shapes:
        num_images = len(make_images(args, shape)[0])
        for setting in args.settings:
            candidates = make(shape, setting)
            first, *others = candidates
            if same_answer:
                answers = [candidates[name][1]().float() for name in (first, others[0])]
                torch.testing.assert_close(*answers, rtol=2e-2, atol=2e-2)
            seconds = interleaved(candidates, args.rounds, args.device)
            for name, value in seconds.items():
                ratio, speed = value / seconds[first], num_images / value
                print(
                    f"{shape:<14} {setting:<13} {name:<23} {value * 1e3:9.1f} ms {speed:9,.1f} images/s {ratio:6.2f}x",
                    flush=True,
                )
            del candidates
            gc.collect()


def benchmark_step(args):
    print(f"training step on {describe(args.device)}; milliseconds, and ours relative to each row")

    def make(shape, setting):
        images, labels = make_images(args, shape)

        def loss_of(model):
            if hasattr(model, "config"):
                return model(pixel_values=images, labels=labels).loss
            return torch.nn.functional.cross_entropy(model(images), labels)

        return {
            name: (before, training_step(args, model, loss_of, setting == "bf16"))
            for name, (model, before) in competitors(args, shape, setting).items()
        }

    compare(args, make)


def benchmark_inference(args):
    print(f"inference on {describe(args.device)}; milliseconds, and ours relative to each row")

    def make(shape, setting):
        images, _ = make_images(args, shape)
        return {
            name: (before, inference(args, model, images, setting == "bf16"))
            for name, (model, before) in competitors(args, shape, setting).items()
        }

    compare(args, make)


def benchmark_mae(args):
    print(f"a step on {describe(args.device)}: the encoder on a quarter of the patches, relative to each row")

    def make(shape, setting):
        images, _ = make_images(args, shape)
        small = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1} if shape == "tiny" else {}
        whole = build(shape, args.device, ZooViTMAEForPreTraining, **small)

        def state_loss(model):
            return model(pixel_values=images).last_hidden_state.float().square().mean()

        def pixel_loss(model):
            return model(pixel_values=images).loss

        models = {
            "encoder": (build(shape, args.device, ZooViTMAEModel, **small), state_loss),
            "encoder, all patches": (build(shape, args.device, ZooViTModel), state_loss),
            "encoder and decoder": (whole, pixel_loss),
            "transformers' ViTMAE": (twin(whole, args.device), pixel_loss),
        }
        as_it_comes = {"transformers' ViTMAE": default_matmul} if setting == "as it comes" else {}
        return {
            name: (
                as_it_comes.get(name, speed_up_cpu_matmul),
                training_step(args, model, loss_of, setting == "bf16"),
            )
            for name, (model, loss_of) in models.items()
        }

    compare(args, make, same_answer=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "inference", "mae"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--settings", nargs="+", default=["as it comes", "same matmul", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, help="images, in place of the shape's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--attn_implementation", choices=["eager", "sdpa"], help="of both, by default each its own")
    parser.add_argument("--peer-path", help="a clone of vit-pytorch, to compare its SimpleViT")
    args = parser.parse_args()
    if args.shapes is None:
        args.shapes = ["vit-base-224"] if args.what == "mae" else ["vit-small-224", "vit-32"]
    globals()[f"benchmark_{args.what}"](args)


if __name__ == "__main__":
    main()
