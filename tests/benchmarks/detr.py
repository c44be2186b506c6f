"""DETR against transformers on this machine: matching and loss, a training step, inference.

    python tests/benchmarks/detr.py loss
    python tests/benchmarks/detr.py step          # ours, transformers, and the original with --peer-path DETR_CLONE
    python tests/benchmarks/detr.py inference

All begin with the same weights but the original (github.com/facebookresearch/detr; it needs torchvision, and fetches
weights of a ResNet), train the same parameters and get the same padded images, which are noise: that changes no time.
Timings alternate between the competitors, A B A B, and compare medians. "as it comes" is each with the float32 products
of its own library's training.
"""

import argparse
import gc
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
from gpt import default_matmul, describe, interleaved
from torch import nn
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from vit import training_step

from hf_models import ZooDetrConfig, ZooDetrForObjectDetection
from hf_models.matching import check_labels, detection_loss, pad_labels
from training.run.processes import fastest_attention, speed_up_cpu_matmul

SHAPES = {  # backbone, layers of each stack, width, queries, classes, image, batch
    "detr-r18": ("resnet18", 6, 256, 100, 91, (320, 416), 2),
    "detr-r50": ("resnet50", 6, 256, 100, 91, (640, 832), 4),
    "tiny": ("resnet18", 1, 32, 12, 5, (64, 96), 2),  # to try this script
}
NUM_BOXES = 10  # of each image


def build(shape, device):
    backbone, layers, width, queries, classes, *_ = SHAPES[shape]
    config = ZooDetrConfig(
        backbone=backbone,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        hidden_size=width,
        intermediate_size=8 * width,
        num_queries=queries,
        num_labels=classes,
        hidden_dropout=0.0,
        repeats_norm=True,  # as stock computes where it trains all layers
        attn_implementation=fastest_attention(device),
    )
    return ZooDetrForObjectDetection(config).to(device)


def twin(model):
    """The stock model with the same weights, under sdpa as it comes, and training the same of them."""
    stock = model.to_stock()
    stock.set_attn_implementation({"": "sdpa"})  # of the transformer; a ResNet has none
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(not ("embedder" in name or "encoder.stages.0." in name))
    ours, others = (sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (model, stock))
    assert ours == others, f"ours trains {ours:,} numbers, stock {others:,}"
    return stock


class OriginalDetr(nn.Module):
    """DETR and its criterion from a clone of the original, called as transformers' is; of 6 layers and 256 wide."""

    def __init__(self, shape, peer_path):
        super().__init__()
        sys.path.insert(0, peer_path)
        from hubconf import _make_detr
        from models.detr import SetCriterion
        from models.matcher import HungarianMatcher
        from util.misc import NestedTensor

        backbone, layers, *_, classes, _, _ = SHAPES[shape]
        self.detr, self.as_nested = _make_detr(backbone, num_classes=classes), NestedTensor
        self.detr.aux_loss = True
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
        self.weights = {name + end: w for name, w in weights.items() for end in ("", *(f"_{i}" for i in range(layers)))}
        matcher = HungarianMatcher(cost_class=1, cost_bbox=5, cost_giou=2)
        self.criterion = SetCriterion(classes, matcher, self.weights, 0.1, ["labels", "boxes", "cardinality"])

    def forward(self, pixel_values, pixel_mask, labels=None):
        outputs = self.detr(self.as_nested(pixel_values, pixel_mask == 0))
        if labels is None:
            return SimpleNamespace(logits=outputs["pred_logits"])
        terms = self.criterion(outputs, [{"labels": one["class_labels"], "boxes": one["boxes"]} for one in labels])
        return SimpleNamespace(loss=sum(self.weights[name] * terms[name] for name in terms if name in self.weights))


def make_labels(num_images, num_classes, device):
    """Ten boxes an image, all inside it."""
    labels = []
    for _ in range(num_images):
        sides = 0.05 + 0.25 * torch.rand(NUM_BOXES, 2)
        boxes = torch.cat([sides / 2 + (1 - sides) * torch.rand(NUM_BOXES, 2), sides], dim=1)
        labels.append({"class_labels": torch.randint(num_classes, (NUM_BOXES,)).to(device), "boxes": boxes.to(device)})
    return labels


def make_batch(args, shape):
    """Noise, every second image only three quarters as wide as the batch."""
    torch.manual_seed(0)
    classes, (height, width), batch = SHAPES[shape][4:]
    batch = args.batch_size or batch
    mask = torch.ones(batch, height, width, dtype=torch.long)
    mask[1::2, :, width * 3 // 4 :] = 0
    images = torch.randn(batch, 3, height, width) * mask[:, None]
    labels = make_labels(batch, classes, args.device)
    return {"pixel_values": images.to(args.device), "pixel_mask": mask.to(args.device)}, labels


def competitors(args, shape, setting):
    """Name -> the model, and what sets up the products of its library."""
    ours = build(shape, args.device)
    before_others = default_matmul if setting == "as it comes" else speed_up_cpu_matmul
    models = {"hf_models": (ours, speed_up_cpu_matmul), "transformers": (twin(ours), before_others)}
    if args.peer_path:
        models["facebookresearch/detr"] = (OriginalDetr(shape, args.peer_path).to(args.device), before_others)
    return models


def inference(args, model, images, bf16):
    """A function that gives the logits."""
    model.eval()
    call = torch.compile(model) if args.compile else model

    def run():
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16) if bf16 else nullcontext():
            return call(**images).logits

    return run


def compare(args, make):
    """Times what `make` gives for a shape, a setting and a batch, name -> (set-up, function); the first two are to give
    the same answer."""
    for shape in args.shapes:
        batch = make_batch(args, shape)
        for setting in args.settings:
            candidates = make(shape, setting, *batch)
            first, other, *_ = candidates
            answers = [candidates[name][1]().float() for name in (first, other)]
            torch.testing.assert_close(*answers, rtol=5e-2, atol=5e-2)
            seconds = interleaved(candidates, args.rounds, args.device)
            report(f"{shape:<10} {setting:<13}", seconds, len(batch[1]))
            del candidates
            gc.collect()


def report(what, seconds, num_images):
    """Prints each time, and how many times as long it is as ours."""
    ours = next(iter(seconds.values()))
    for name, value in seconds.items():
        speed = num_images / value
        print(f"{what} {name:<22} {value * 1e3:9.2f} ms {speed:9,.1f} images/s {value / ours:6.2f}x", flush=True)


def benchmark_loss(args):
    """Six layers, 100 queries, 91 classes, ten boxes an image."""
    print(f"matching and loss on {describe(args.device)}; milliseconds, and each relative to ours")
    config = ZooDetrConfig(num_labels=91)
    stock_config = SimpleNamespace(**config.to_dict(), num_labels=91, eos_coefficient=0.1, decoder_layers=6)

    def ours(logits, boxes, labels):
        check_labels(labels, config.num_labels)
        return detection_loss([(logits, boxes)], pad_labels(labels), config)[0]

    def stock(logits, boxes, labels):
        return ForObjectDetectionLoss(logits[-1], labels, logits.device, boxes[-1], stock_config, logits, boxes)[0]

    def with_gradient(loss_of, predictions, labels):
        loss = loss_of(*predictions, labels)
        torch.autograd.grad(loss, predictions)
        return loss

    for batch in [args.batch_size] if args.batch_size else [8, 16]:
        torch.manual_seed(0)
        logits, boxes = torch.randn(6, batch, 100, 92), torch.rand(6, batch, 100, 4)
        predictions = [tensor.to(args.device).requires_grad_() for tensor in (logits, boxes)]
        labels = make_labels(batch, 91, args.device)
        torch.testing.assert_close(ours(*predictions, labels), stock(*predictions, labels), rtol=1e-5, atol=1e-5)
        for what, time_of in {
            "forward": lambda loss_of, *given: partial(loss_of, *given[0], given[1]),
            "forward+backward": lambda loss_of, *given: partial(with_gradient, loss_of, *given),
        }.items():
            candidates = {"hf_models": ours, "transformers": stock}
            timed = {name: (int, time_of(loss_of, predictions, labels)) for name, loss_of in candidates.items()}
            report(f"batch {batch:<3} {what:<17}", interleaved(timed, args.rounds, args.device), batch)


def benchmark_step(args):
    print(f"training step on {describe(args.device)}; milliseconds, and each relative to ours")

    def make(shape, setting, images, labels):
        return {
            name: (
                before,
                training_step(args, model, lambda model: model(**images, labels=labels).loss, setting == "bf16"),
            )
            for name, (model, before) in competitors(args, shape, setting).items()
        }

    compare(args, make)


def benchmark_inference(args):
    print(f"inference on {describe(args.device)}; milliseconds, and each relative to ours")

    def make(shape, setting, images, _):
        return {
            name: (before, inference(args, model, images, setting == "bf16"))
            for name, (model, before) in competitors(args, shape, setting).items()
        }

    compare(args, make)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "step", "inference"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["detr-r18"])
    parser.add_argument("--settings", nargs="+", default=["as it comes", "same matmul", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, help="images, in place of the shape's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peer-path", help="a clone of facebookresearch/detr, to compare it")
    args = parser.parse_args()
    globals()[f"benchmark_{args.what}"](args)


if __name__ == "__main__":
    main()
