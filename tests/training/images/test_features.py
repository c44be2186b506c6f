import numpy as np
import pytest
import torch

from hf_models import ZooViTConfig, ZooViTForImageClassification, ZooViTMAEConfig, ZooViTMAEForPreTraining, ZooViTModel
from training.images.augment import Augmentation
from training.images.features import features, knn_accuracy, linear_probe_accuracy
from training.images.rows import ArrayRows

TINY = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attn_implementation": "eager",
}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
SIZE = (8, 8)


@pytest.fixture
def rows():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8)).astype(np.uint8)
    return ArrayRows(pixels, np.arange(10) % 3, num_channels=1)


@pytest.fixture
def normalize():
    return Augmentation(seed=0, global_batch_size=1, image_size=8, mean=[0.3], std=[0.2]).normalize


def make_mae():
    return ZooViTMAEForPreTraining(ZooViTMAEConfig(**TINY, **DECODER))


# ------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("own", ["class", "mean", "both"])
def test_features_are_what_the_classifier_is_given(rows, normalize, own):
    model = ZooViTForImageClassification(ZooViTConfig(**TINY, pooling=own, num_register_tokens=1, drop_path=0.5))
    found = features(model.train(), rows, normalize, SIZE, batch_size=4)
    assert model.training and not found.requires_grad  # without drop path, and left as it was
    with torch.no_grad():
        logits = model.eval()(normalize(rows.images(np.arange(10), size=SIZE))).logits
    torch.testing.assert_close(model.classifier(found), logits)


def test_a_masked_autoencoder_sees_whole_images_and_gives_the_mean_of_the_patches(rows, normalize, tmp_path):
    model = make_mae()
    found = features(model, rows, normalize, SIZE)
    assert torch.equal(found, features(model, rows, normalize, SIZE))  # nothing random
    model.save_pretrained(tmp_path)
    encoder = ZooViTModel.from_pretrained(tmp_path, add_pooling_layer=False, attn_implementation="eager").eval()
    with torch.no_grad():
        states = encoder(normalize(rows.images(np.arange(10), size=SIZE))).last_hidden_state
    torch.testing.assert_close(found, states[:, 1:].mean(1))
    torch.testing.assert_close(features(model, rows, normalize, SIZE, pooling="class"), states[:, 0])
    assert features(model, rows, normalize, SIZE, pooling="both").shape == (10, 64)


def test_features_of_some_images_only(rows, normalize):
    model = make_mae()
    some, all_ = (features(model, rows, normalize, SIZE, places) for places in ([7, 2], None))
    torch.testing.assert_close(some, all_[[7, 2]])


def test_a_model_without_a_class_token_has_no_features_of_it(rows, normalize):
    model = ZooViTModel(ZooViTConfig(**TINY, pooling="mean"))
    with pytest.raises(ValueError, match="class token"):
        features(model, rows, normalize, SIZE, pooling="class")


# ------------------------------------------------------------------------------------------------- nearest neighbours


def test_near_neighbours_count_more_than_far_ones():
    """Class 0 has the nearest image, class 1 the two after it, class 2 all others."""
    angles = torch.tensor([0.1, 0.5, -0.5, 3.0, 3.1, 3.2, 3.3])
    train, labels = torch.stack([angles.cos(), angles.sin()], 1), [0, 1, 1, 2, 2, 2, 2]
    query = torch.tensor([[2.0, 0.0]])  # lengths do not count
    for k, temperature, answer in ((1, 0.07, 0), (3, 0.07, 0), (3, 1.0, 1), (7, 0.5, 1), (100, 100.0, 2)):
        for label in range(3):
            found = knn_accuracy(train * 5, labels, query, [label], k=k, temperature=temperature)
            assert found == (label == answer), (k, temperature)


def test_votes_are_those_of_the_formula():
    """Wu et al. 2018, section 3.4, written out."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(600, 8, generator=generator), torch.randn(550, 8, generator=generator)
    train_labels, test_labels = (torch.randint(0, 4, (len(rows),), generator=generator) for rows in (train, test))
    similarity = torch.nn.functional.cosine_similarity(test[:, None], train[None], dim=2)
    right = 0
    for row, label in zip(similarity, test_labels, strict=True):
        votes = torch.zeros(4)
        for place in row.argsort(descending=True)[:20]:
            votes[train_labels[place]] += torch.exp(row[place] / 0.07)
        right += int(votes.argmax() == label)
    assert knn_accuracy(train, train_labels, test, test_labels.numpy()) == pytest.approx(right / 550)


def test_a_small_temperature_does_not_overflow():
    train = torch.eye(4)
    assert knn_accuracy(train, range(4), train, torch.arange(4), k=4, temperature=1e-3) == 1


# ------------------------------------------------------------------------------------------------------- linear probe


def test_a_linear_probe_finds_what_is_linear_whatever_its_scale():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(600, 6, generator=generator)
    labels = (values[:, 0] - values[:, 1] > 0).long()
    values *= torch.tensor([1e-4, 1e-4, 1e3, 1.0, 1.0, 0.0])
    accuracy = linear_probe_accuracy(values[:400], labels[:400], values[400:], labels[400:])
    assert accuracy > 0.95
    circle = (torch.randn(600, 2, generator=generator), labels)
    assert linear_probe_accuracy(circle[0][:400], labels[:400], circle[0][400:], labels[400:]) < 0.65
