"""The features of a pre-trained image encoder, and how well they tell classes apart without further training.

N images, D features of each
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_models import ZooViTModel
from hf_models.vit import pool
from training.images.augment import Augmentation
from training.images.read import read_images
from training.images.rows import ImageRows
from training.models import IMAGE_MODELS
from training.processors import normalisation_of

POOLINGS = ("class", "mean", "both")


@torch.no_grad()
def features(
    model: PreTrainedModel,
    rows: ImageRows,
    normalize: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
    pooling: str | None = None,
) -> Tensor:
    """Computes what the encoder makes of whole images.

    Args:
        model: a `ZooViTModel`, or a model with one inside. A masked autoencoder's encoder sees all patches.
        normalize: turns uint8 pixels on the model's device into the model's input, as `Augmentation.normalize` does.
        size: height and width in pixels.
        indices: the images to take; None: all.
        pooling: `class` token, `mean` over patches, or `both`. None: as the model's classifier does, but the mean for a
            masked autoencoder, because its class token was never trained to represent the image.

    Returns:
        (N, D), or (N, 2 D) with pooling `both`, float32 on the CPU.
    """
    encoder, config = model.base_model, model.config
    is_autoencoder = hasattr(config, "mask_ratio")
    pooling = pooling or ("mean" if is_autoencoder else config.pooling)
    if pooling != "mean" and config.pooling == "mean":
        raise ValueError(f"pooling {pooling!r} needs a class token, which a model with pooling 'mean' has not")
    indices = np.arange(len(rows)) if indices is None else np.asarray(indices)
    was_training, found = encoder.training, []
    encoder.eval()
    for first in range(0, len(indices), batch_size):
        pixels = rows.images(indices[first : first + batch_size], size=size).to(encoder.device)
        # A masked autoencoder's own forward would hide patches.
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
    """The fraction of test images that their k nearest training images classify rightly.

    The nearest images are those with the most similar features. Each votes for its class with the weight
    exp(cosine similarity / temperature) (Wu et al. 2018, section 3.4; default values of Caron et al. 2021).

    Args:
        train_features, test_features: (N, D).
        train_labels, test_labels: class ids (N,).
    """
    train_labels, test_labels = torch.as_tensor(train_labels), torch.as_tensor(test_labels)
    train_features, test_features = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    num_labels, num_right = int(max(train_labels.max(), test_labels.max())) + 1, 0
    for queries, labels in zip(test_features.split(512), test_labels.split(512), strict=True):
        similarity, neighbours = (queries @ train_features.T).topk(min(k, len(train_features)), dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor, against overflow
        votes = torch.zeros(len(queries), num_labels).scatter_add_(1, train_labels[neighbours], weights)
        num_right += int((votes.argmax(1) == labels).sum())
    return num_right / len(test_labels)


def linear_probe_accuracy(train_features: Tensor, train_labels, test_features: Tensor, test_labels) -> float:
    """The fraction of test images that a logistic regression on the features classifies rightly.

    Features, (N, D), are standardised first, as in the linear probe of He et al. 2022 (appendix A.1).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(np.asarray(train_features), np.asarray(train_labels))
    return float(probe.score(np.asarray(test_features), np.asarray(test_labels)))


def probe(
    checkpoint: str,
    data: str = "embedded",
    *,
    validation_data: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    image_size: int | None = None,
    pooling: str | None = None,
    batch_size: int = 256,
    num_workers: int = 2,
    k: int = 20,
    temperature: float = 0.07,
) -> Iterator[str]:
    """Measures the features of a checkpoint on labelled images; the arguments are the options of `training.probe`.

    Yields:
        The results, line by line.

    Raises:
        ValueError: the checkpoint, the data or a number does not suit.
    """
    model_type = AutoConfig.from_pretrained(checkpoint).model_type
    if model_type not in IMAGE_MODELS["zoo_vit"]:
        raise ValueError(f"{checkpoint} is a {model_type!r}; there are features of {IMAGE_MODELS['zoo_vit']}")
    for name, value in {"batch_size": batch_size, "k": k, "temperature": temperature}.items():
        if value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")
    size = {} if image_size is None else {"image_size": image_size}
    model = ZooViTModel.from_pretrained(checkpoint, add_pooling_layer=False, **size)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    config = model.config
    images = read_images(
        data,
        validation_data=validation_data,
        image_column=image_column,
        label_column=label_column,
        num_channels=config.num_channels,
        num_workers=num_workers,
    )
    if not len(images.validation):
        raise ValueError(f"{data} has no image to classify: give validation_data")
    size = tuple(side * config.patch_size for side in config.grid_size)
    mean, std = normalisation_of(checkpoint, config.num_channels) or ([0.5], [0.5])
    normalize = Augmentation(seed=0, global_batch_size=1, image_size=size, mean=mean, std=std).normalize
    pooling = pooling or ("mean" if model_type in IMAGE_MODELS["zoo_vit_mae"] else None)
    parts = []
    for name, rows in {"train": images.train, "validation": images.validation}.items():
        parts += [features(model, rows, normalize, size, None, batch_size, pooling), rows.labels]
        yield f"{name}: {len(rows):,} images, {parts[-2].shape[1]} features"
    yield f"{k} nearest neighbours: accuracy {knn_accuracy(*parts, k, temperature):.4f}"
    yield f"linear probe: accuracy {linear_probe_accuracy(*parts):.4f}"
