"""What the features of a pre-trained encoder are good for, without training it any further.

    python -m training.probe CHECKPOINT --data FOLDER

prints how well the nearest training images, and a linear classifier, tell the classes of the validation images by the
features of a ViT or masked autoencoder, ours or stock. `--data` takes what training/train_vit.py takes.
`training/images/features.py` computes the features and the accuracies.
"""

import argparse
from collections.abc import Sequence

from transformers.utils import logging

from training.images.features import POOLINGS, probe
from training.run.arguments import user_errors


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m training.probe", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder or Hub repository of a ViT or a masked autoencoder")
    parser.add_argument("--data", default="embedded", help="labelled images, as train_vit.py takes them")
    parser.add_argument("--validation_data", help="images to classify, where `data` has no such part")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--image_size", type=int, help="pixels of a side, default: the model's")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: the model's, mean for a masked autoencoder")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode image files")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=float, default=0.07, help="of their votes")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # transformers would warn about the head that is left out on purpose
    with user_errors():
        for line in probe(**vars(args)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
