"""Pictures of a model: where it looks, what it reconstructs, what it has learnt.

    python -m training.draw CHECKPOINT [--image FILE ...] [--text TEXT] [--output_dir DIR]

writes every figure that fits the checkpoint, which is a folder or a Hub repository of a GPT, a BERT, a ViT, a masked
autoencoder or a DETR, ours or stock. `training/text/pictures.py`, `training/images/pictures.py` and
`training/detection/pictures.py` make the figures.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from transformers import AutoConfig
from transformers.utils import logging

from training.detection.pictures import draw_detector
from training.figures import curves
from training.images.pictures import draw_image_model
from training.run.arguments import user_errors
from training.text.pictures import draw_text_model

FAMILIES = {
    **dict.fromkeys(("zoo_gpt", "gpt2", "zoo_bert", "bert"), draw_text_model),
    **dict.fromkeys(("zoo_vit", "vit", "zoo_vit_mae", "vit_mae"), draw_image_model),
    **dict.fromkeys(("zoo_detr", "detr"), draw_detector),
}


def draw(checkpoint: str, images: Sequence[str] = (), text: str | None = None) -> Iterator[tuple[str, Figure]]:
    """Every figure that fits the checkpoint, with its name.

    Raises:
        ValueError, OSError: the checkpoint does not load or is of another family, the images or the text do not suit
            it, or an image cannot be read.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{checkpoint} is a {config.model_type}; there are figures of {', '.join(FAMILIES)}")
    yield from FAMILIES[config.model_type](checkpoint, config, images, text)
    metrics_file = Path(checkpoint, "metrics.jsonl")
    if metrics_file.exists():
        yield "curves", curves(metrics_file)


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m training.draw", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder or Hub repository")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="images to draw for a model of images")
    parser.add_argument("--text", help="text to draw for a model of text")
    parser.add_argument("--output_dir", help="where to; default: 'figures' in the checkpoint's folder, or here")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # transformers would warn about heads that are left out on purpose
    logging.disable_progress_bar()
    output_dir = Path(args.output_dir or Path(args.checkpoint if Path(args.checkpoint).is_dir() else ".", "figures"))
    with user_errors():
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in draw(args.checkpoint, args.image, args.text):
            figure.savefig(output_dir / f"{name}.png")
            print(output_dir / f"{name}.png")


if __name__ == "__main__":
    main()
