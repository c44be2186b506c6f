"""What the features of a pre-trained encoder are good for, without training it any further.

    python -m training.probe CHECKPOINT --data FOLDER

prints how well the nearest training images, and a linear classifier, tell the classes of the validation images by the
features of a ViT or masked autoencoder, ours or stock. `--data` takes what training/train_vit.py takes.

Dimensions: N images, D features of each.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from hf_models import ZooViTModel
from hf_models.vit import pool
from training.images.augment import Augmentation
from training.images.read import read_images
from training.images.rows import ImageRows
from training.models import IMAGE_MODELS, normalisation_of
from training.run.arguments import user_errors

POOLINGS = ("class", "mean", "both")


@torch.no_grad()
def features(
    model: PreTrainedModel,
    rows: ImageRows,
    normalize: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    places: Sequence[int] | None = None,
    batch_size: int = 256,
    pooling: str | None = None,
) -> Tensor:
    """(N, D), or (N, 2 D) with pooling `both`, float32 on the CPU: what the encoder makes of whole images.

    Args:
        model: a `ZooViTModel`, or a model with one inside; a masked autoencoder's encoder sees all patches.
        normalize: from uint8 pixels on the model's device to the model's input, as `Augmentation.normalize`.
        size: height and width in pixels.
        places: which of the rows; None: all.
        pooling: `class`, `mean` or `both` of class token and mean over patches. None: as the model's classifier does;
            but for a masked autoencoder the mean, since nothing has asked its class token to stand for the image.
    """
    encoder, config = model.base_model, model.config
    is_autoencoder = hasattr(config, "mask_ratio")
    pooling = pooling or ("mean" if is_autoencoder else config.pooling)
    if pooling != "mean" and config.pooling == "mean":
        raise ValueError(f"pooling {pooling!r} needs a class token, which a model with pooling 'mean' has not")
    places = np.arange(len(rows)) if places is None else np.asarray(places)
    was_training, found = encoder.training, []
    encoder.eval()
    for first in range(0, len(places), batch_size):
        pixels = rows.images(places[first : first + batch_size], size=size).to(encoder.device)
        # ZooViTModel's own forward: a masked autoencoder's hides patches.
        states = ZooViTModel.forward(encoder, normalize(pixels)).last_hidden_state.float()
        found.append(pool(states, config, pooling).cpu())
    encoder.train(was_training)
    return torch.cat(found)


def knn_accuracy(
    train_features: Tensor,
    train_labels,
    test_features: Tensor,
    test_labels,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """How many of the test images are classified rightly by the k training images of the most similar features.

    Each of these votes for its class with weight exp(cosine similarity / temperature) (Wu et al. 2018, section 3.4; the
    values are those of Caron et al. 2021). Features are (N, D), labels class ids (N,).
    """
    train_labels, test_labels = torch.as_tensor(train_labels), torch.as_tensor(test_labels)
    train_features, test_features = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    num_labels, num_right = int(max(train_labels.max(), test_labels.max())) + 1, 0
    for queries, labels in zip(test_features.split(512), test_labels.split(512), strict=True):
        similarity, neighbours = (queries @ train_features.T).topk(min(k, len(train_features)), dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the same up to a factor, and never infinite
        votes = torch.zeros(len(queries), num_labels).scatter_add_(1, train_labels[neighbours], weights)
        num_right += int((votes.argmax(1) == labels).sum())
    return num_right / len(test_labels)


def linear_probe_accuracy(train_features: Tensor, train_labels, test_features: Tensor, test_labels) -> float:
    """How many of the test images a logistic regression on the features classifies rightly.

    Features, (N, D), are standardised first, as the linear probe of He et al. 2022 does (appendix A.1).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(np.asarray(train_features), np.asarray(train_labels))
    return float(probe.score(np.asarray(test_features), np.asarray(test_labels)))


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
    logging.set_verbosity_error()  # of the head that is left out, which is no matter here
    with user_errors():
        for line in probe(args):
            print(line, flush=True)


def probe(args: argparse.Namespace):
    """What there is to say, line by line. Raises ValueError for a checkpoint or data that do not suit."""
    model_type = AutoConfig.from_pretrained(args.checkpoint).model_type
    if model_type not in IMAGE_MODELS["zoo_vit"]:
        raise ValueError(f"{args.checkpoint} is a {model_type!r}; there are features of {IMAGE_MODELS['zoo_vit']}")
    for name in ("batch_size", "k", "temperature"):
        if getattr(args, name) <= 0:
            raise ValueError(f"{name} must be above 0, not {getattr(args, name)}")
    size = {} if args.image_size is None else {"image_size": args.image_size}
    model = ZooViTModel.from_pretrained(args.checkpoint, add_pooling_layer=False, **size)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    config = model.config
    images = read_images(
        args.data,
        validation_data=args.validation_data,
        image_column=args.image_column,
        label_column=args.label_column,
        num_channels=config.num_channels,
        num_workers=args.num_workers,
    )
    if not len(images.validation):
        raise ValueError(f"{args.data} has no image to classify: give validation_data")
    size = tuple(side * config.patch_size for side in config.grid_size)
    mean, std = normalisation_of(args.checkpoint, config.num_channels) or ([0.5], [0.5])
    normalize = Augmentation(seed=0, global_batch_size=1, image_size=size, mean=mean, std=std).normalize
    pooling = args.pooling or ("mean" if model_type in IMAGE_MODELS["zoo_vit_mae"] else None)
    parts = []
    for name, rows in {"train": images.train, "validation": images.validation}.items():
        parts += [features(model, rows, normalize, size, None, args.batch_size, pooling), rows.labels]
        yield f"{name}: {len(rows):,} images, {parts[-2].shape[1]} features"
    yield f"{args.k} nearest neighbours: accuracy {knn_accuracy(*parts, args.k, args.temperature):.4f}"
    yield f"linear probe: accuracy {linear_probe_accuracy(*parts):.4f}"


if __name__ == "__main__":
    main()
