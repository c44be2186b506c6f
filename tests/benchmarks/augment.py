"""What random changes of a batch cost beside a training step: 128 images of 32 pixels, a ViT of 12 layers x 192.

    python tests/benchmarks/augment.py [--rounds 7]

For each change the time on the device (drawing the random numbers and applying them) and on the host (fetching the
images from memory, cropped and resized if asked for, which a training does in the background). Timings alternate; the
last columns are parts of a training step of ours and of transformers' ViT, both as they come.
"""

import argparse
from functools import partial

import numpy as np
import torch
from gpt import default_matmul, describe, interleaved

import hf_models
from training.images.augment import Augmentation
from training.images.rows import ArrayRows
from training.run.processes import fastest_attention, speed_up_cpu_matmul

BATCH, SIZE, LABELS = 128, 32, 10
CHANGES = {
    "none": {"flip": 0.0},
    "mirror, shift": {"translate": 4},
    "mirror, crop": {"crop_scale": (0.3, 1.0)},
    "colour jitter": {"color_jitter": 0.4},
    "RandAugment, 2 ops": {"rand_augment_ops": 2},
    "erasing": {"erasing": 0.25},
    "mixup, cutmix": {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
}
CHANGES["all of them"] = {
    name: value for change in CHANGES.values() for name, value in change.items() if name != "flip"
}


def training_step(model, device):
    """AdamW on one batch of random images."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    labels = torch.randint(LABELS, (BATCH,), device=device)

    def step():
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    attention = fastest_attention(args.device)
    model = hf_models.create_model("vit-mini-patch4-32", num_labels=LABELS, attn_implementation=attention)
    with torch.device("meta"):
        stock_class, config = model.stock_class_and_config()
    config._attn_implementation = "sdpa"
    candidates = {
        "ours": (speed_up_cpu_matmul, training_step(model, args.device)),
        "stock": (default_matmul, training_step(stock_class(config), args.device)),
    }
    rows = ArrayRows(np.random.default_rng(0).integers(0, 256, (1024, 3, SIZE, SIZE), np.uint8), None, num_channels=3)
    places, labels = np.arange(BATCH), torch.randint(LABELS, (BATCH,), device=args.device)
    for name, options in CHANGES.items():
        normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}
        augment = Augmentation(
            seed=0, global_batch_size=BATCH, image_size=SIZE, num_labels=LABELS, **normalisation, **options
        )
        boxes = augment.boxes(augment.draw(0, range(BATCH)))
        pixels = rows.images(places, boxes, (SIZE, SIZE)).to(args.device)

        def change(augment=augment, pixels=pixels):
            draws = augment.draw(0, range(BATCH))
            augment(pixels, labels, {name: tensor.to(args.device) for name, tensor in draws.items()})

        candidates[name, "device"] = (speed_up_cpu_matmul, change)
        candidates[name, "host"] = (speed_up_cpu_matmul, partial(rows.images, places, boxes, (SIZE, SIZE)))

    seconds = interleaved(candidates, args.rounds, args.device)
    print(f"{BATCH} images of {SIZE} pixels on {describe(args.device)}")
    print(f"a training step: hf_models {seconds['ours'] * 1e3:.1f} ms, transformers {seconds['stock'] * 1e3:.1f} ms")
    for name in CHANGES:
        device, host = seconds[name, "device"], seconds[name, "host"]
        parts = "".join(f"{(device + host) / seconds[step]:8.1%}" for step in ("ours", "stock"))
        print(f"{name:<20} device {device * 1e3:6.2f} ms   host {host * 1e3:6.2f} ms   of a step {parts}")


if __name__ == "__main__":
    main()
