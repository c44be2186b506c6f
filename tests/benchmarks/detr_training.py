"""Average precision after the same time on the same images in the same order: ours beside transformers' DETR.

    python tests/benchmarks/detr_training.py --recipe training/recipes/detr-bccd.yaml --data FOLDER --minutes 30

Ours trains as the recipe says. Theirs is `DetrForObjectDetection` (sdpa) with a ResNet of the same depth and widths, as
many layers, the same width and as many queries, with fused AdamW and losses of all layers; both start from random
weights, and see the same images, changed in the same way. One trains after the other, each for the same time of the
processor, divided by the number of threads, so that nothing else on the machine favours one; learning rates rise and
fall with the part of the time that is used up.
"""

import argparse
import time

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import send_to_device

from hf_models import ZooDetrForObjectDetection
from hf_models.resnet import RESNETS
from training.detection.batches import DetectionBatches, DetectionTransform
from training.detection.validation import DetectionValidation
from training.images.batches import channel_statistics
from training.models import create_image_model
from training.run.arguments import parse_arguments
from training.run.optim import EMA, create_optimizers, learning_rate_factor
from training.run.processes import speed_up_cpu_matmul
from training.train_detr import DetrArguments, choose_edges, read_data


def stock_twin(config) -> transformers.DetrForObjectDetection:
    """The stock model of the same sizes. It freezes the stem and every stage of a ResNet that is not timm's, with which
    nothing could be learnt from scratch: here all of it trains."""
    shape = RESNETS[config.backbone]
    backbone = transformers.ResNetConfig(
        num_channels=config.num_channels,
        embedding_size=shape.stem_width,
        hidden_sizes=list(shape.widths),
        depths=list(shape.depths),
        layer_type=shape.block,
        out_features=[f"stage{len(shape.depths)}"],
    )
    model = transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=backbone,
            d_model=config.hidden_size,
            encoder_layers=config.num_encoder_layers,
            decoder_layers=config.num_decoder_layers,
            encoder_attention_heads=config.num_attention_heads,
            decoder_attention_heads=config.num_attention_heads,
            encoder_ffn_dim=config.intermediate_size,
            decoder_ffn_dim=config.intermediate_size,
            num_queries=config.num_queries,
            id2label=config.id2label,
            dropout=0.0,
            auxiliary_loss=True,
        )
    )
    return model.requires_grad_(True)


def train(name, model, optimizers, args, data: DetectionBatches, validation: DetectionValidation, minutes: float):
    ema = EMA(model, args.ema_decay)
    seconds, step, budget = 0.0, 0, 60 * minutes
    print(f"{name}: {model.num_parameters():,} parameters")
    print(f"{'minutes':>8s}{'steps':>8s}{'images/s':>10s}{'AP':>8s}{'AP50':>8s}{'AP75':>8s}", flush=True)
    for part in range(1, 5):
        model.train()
        while seconds < budget * part / 4:
            batch = data.augment(data.batch(step, range(args.global_batch_size)))
            batch = send_to_device(batch, model.device)
            started = time.process_time()
            factor = learning_rate_factor(
                int(1e4 * seconds / budget), schedule="cosine", max_steps=10_000, warmup_steps=200, final=0.0
            )
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            ema.update(step)
            seconds += (time.process_time() - started) / torch.get_num_threads()
            step += 1
        model.eval()
        with ema.swap():
            found = validation.measure(model)
        precisions = (found[f"eval_{measure}"] for measure in ("map", "map_50", "map_75"))
        numbers = "".join(f"{precision:8.3f}" for precision in precisions)
        print(f"{seconds / 60:8.1f}{step:8d}{step * args.global_batch_size / seconds:10.1f}{numbers}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=30.0, help="time that each of the two trains")
    parser.add_argument("--stock_learning_rate", type=float, default=3e-4)
    parser.add_argument("--only", choices=["ours", "stock"], help="run one of the two")
    options = parser.parse_args()
    command = ["--recipe", options.recipe, "--data", options.data, "--output_dir", "unused", "--max_steps", "1000000"]
    args = parse_arguments(DetrArguments, command)
    speed_up_cpu_matmul()
    torch.manual_seed(args.seed)

    images = read_data(args, None)
    device = torch.device("cpu")
    ours = create_image_model(
        args.model, ZooDetrForObjectDetection, device, args.config, images.label_names, num_channels=images.num_channels
    )
    mean, std = channel_statistics(images.train, (224, 224))
    names = ("scale_jitter", "crop", "crop_scale", "crop_visible", "flip", "color_jitter", "seed", "global_batch_size")
    changes = {name: getattr(args, name) for name in names}
    shortest, longest = choose_edges(args, images)
    transform = DetectionTransform(mean=mean, std=std, shortest_edge=shortest, longest_edge=longest, **changes)
    theirs = stock_twin(ours.config)
    rates = {"learning_rate": args.learning_rate, "matrix_learning_rate": args.matrix_learning_rate}
    rates |= {"weight_decay": args.weight_decay, "betas": (args.beta1, args.beta2)}
    stock_rates = {"learning_rate": options.stock_learning_rate, "weight_decay": 1e-4, "betas": (0.9, 0.999)}
    for name, model, optimizer, given in (
        ("ours", ours, args.optimizer, rates),
        ("stock", theirs, "adamw", stock_rates),
    ):
        if options.only in (None, name):
            data = DetectionBatches(images.train, transform, args.max_steps, ours.config)
            held_out = (images.validation, images.label_names, transform, ours.config, args.eval_batch_size)
            validation = DetectionValidation(Accelerator(cpu=True), *held_out)
            train(
                name,
                model,
                create_optimizers(model, optimizer=optimizer, **given),
                args,
                data,
                validation,
                options.minutes,
            )


if __name__ == "__main__":
    main()
