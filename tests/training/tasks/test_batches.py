import pytest
import torch

from training.tasks.batches import TaskBatches, weigh_classes


def labelled_rows(count, **options):
    rows = [{"input_ids": torch.arange(2 + number % 3).numpy(), "labels": number % 4} for number in range(count)]
    return TaskBatches(rows, seed=1337, global_batch_size=8, pad_token_id=0, **options)


def test_every_epoch_has_every_row_once_and_an_order_of_its_own():
    data = labelled_rows(12)
    drawn = [data.order[sample % 12] for sample in range(36) if data.row(sample)]
    epochs = [drawn[first : first + 12] for first in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [labelled_rows(12).row(sample)["labels"] for sample in (30, 3)] == [
        data.row(sample)["labels"] for sample in (30, 3)
    ]  # whatever was asked before


def test_classes_weigh_in_the_normaliser():
    weights = [1.0, 2.0, 0.5, 1.0]
    plain, weighted = labelled_rows(12), labelled_rows(12, class_weights=weights)
    batch = plain.batch(0, range(8))
    assert plain.num_items(batch) == plain.num_units(batch) == 8
    assert weighted.num_items(batch) == pytest.approx(sum(weights[label] for label in batch["labels"]))


def test_balanced_weights_are_1_on_average_over_the_labels_even_without_one_of_the_classes():
    labels = [0, 0, 0, 2, 2, 3]
    weights = weigh_classes("balanced", ["a", "b", "c", "d"], [{"labels": label} for label in labels])
    assert sum(weights[label] for label in labels) / len(labels) == pytest.approx(1.0)
    assert weights == pytest.approx([2 / 3, 1.0, 1.0, 2.0])


def test_a_number_to_predict_may_be_any_even_the_mark_of_labels_that_do_not_count():
    data = labelled_rows(2)
    assert data.num_items({"input_ids": torch.zeros(3, 2), "labels": torch.tensor([-100.0, 1.0, 2.0])}) == 3
