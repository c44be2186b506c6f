import gc
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from training.metrics import (
    COCO_MEASURES,
    Classification,
    CocoDetection,
    Entities,
    ImageClassification,
    LanguageModeling,
    QuestionAnswering,
    Regression,
    entities,
    load_metric,
    normalised_words,
)


def test_sums_over_batches_give_the_loss_of_the_whole():
    metric = load_metric(LanguageModeling)
    metric.add_batch(nll_sum=[100.0, 50.5], num_tokens=[60, 30], num_bytes=[200, 100])
    metric.add_batch(nll_sum=[9.5], num_tokens=[10], num_bytes=[20])
    result = metric.compute()
    assert result["loss"] == pytest.approx(1.6)
    assert result["perplexity"] == pytest.approx(math.exp(1.6))
    assert result["bits_per_byte"] == pytest.approx(160 / math.log(2) / 320)


def test_perplexity_of_a_huge_loss_is_infinite():
    assert load_metric(LanguageModeling).compute(nll_sum=[1e6], num_tokens=[1], num_bytes=[1])["perplexity"] == math.inf


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="num_tokens"):
        load_metric(LanguageModeling).compute(nll_sum=[0.0], num_tokens=[0], num_bytes=[0])


def test_the_metric_writes_to_no_folder_but_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    metric = load_metric(LanguageModeling)
    metric.compute(nll_sum=[1.0], num_tokens=[1], num_bytes=[1])
    folder = metric.temporary_folder.name
    assert not (tmp_path / "metrics").exists() and os.path.isdir(folder)
    del metric
    gc.collect()
    assert not os.path.exists(folder)


@pytest.mark.parametrize("num_labels", [2, 5])
def test_classification_agrees_with_scikit_learn(num_labels):
    predictions, references = np.random.default_rng(0).integers(0, num_labels, (2, 200))
    result = load_metric(Classification).compute(predictions=predictions, references=references, num_labels=num_labels)
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(references, predictions))
    assert result["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(references, predictions, average="macro"))
    assert result["matthews_correlation"] == pytest.approx(sklearn_metrics.matthews_corrcoef(references, predictions))
    assert ("f1" in result) == (num_labels == 2)
    if num_labels == 2:
        assert result["f1"] == pytest.approx(sklearn_metrics.f1_score(references, predictions))


def test_f1_and_matthews_correlation_by_hand():
    """2 true positives, 1 false positive, 1 false negative, 4 true negatives."""
    result = load_metric(Classification).compute(
        predictions=[1, 1, 1, 0, 0, 0, 0, 0], references=[1, 1, 0, 1, 0, 0, 0, 0], num_labels=2
    )
    assert result["f1"] == pytest.approx(2 / 3)
    assert result["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert result["matthews_correlation"] == pytest.approx((2 * 4 - 1) / math.sqrt(3 * 3 * 5 * 5))


def test_a_classifier_that_always_says_the_same_has_no_correlation():
    result = load_metric(Classification).compute(predictions=[0, 0, 0], references=[0, 1, 0], num_labels=2)
    assert result == {"accuracy": pytest.approx(2 / 3), "f1": 0.0, "macro_f1": 0.4, "matthews_correlation": 0.0}


def test_images_by_hand():
    metric = load_metric(ImageClassification)
    metric.add_batch(references=[0, 0, 1], predictions=[0, 2, 1], ranks=[0, 5, 0], losses=[0.5, 2.0, 0.25])
    metric.add_batch(references=[2], predictions=[1], ranks=[4], losses=[1.25])
    assert metric.compute(num_labels=3) == {
        "loss": 1.0,
        "accuracy": 0.5,
        "top5_accuracy": 0.75,
        "per_class_accuracy": [0.5, 1.0, 0.0],
        "confusion_matrix": [[1, 0, 1], [0, 1, 0], [0, 1, 0]],  # [true][predicted]
    }


def test_images_agree_with_scikit_learn():
    logits, references = np.random.default_rng(0).normal(size=(300, 8)), np.arange(300) % 8
    ranks = (logits > logits[np.arange(300), references][:, None]).sum(1)
    predictions = logits.argmax(1)
    result = load_metric(ImageClassification).compute(
        predictions=predictions, references=references, ranks=ranks, losses=np.ones(300), num_labels=8
    )
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(references, predictions))
    assert result["top5_accuracy"] == pytest.approx(sklearn_metrics.top_k_accuracy_score(references, logits, k=5))
    recall = sklearn_metrics.recall_score(references, predictions, average=None)
    assert result["per_class_accuracy"] == pytest.approx(recall.tolist())
    assert result["confusion_matrix"] == sklearn_metrics.confusion_matrix(references, predictions).tolist()


def test_a_class_without_images_has_no_accuracy():
    result = load_metric(ImageClassification).compute(
        predictions=[1], references=[0], ranks=[1], losses=[1.0], num_labels=2
    )
    assert result["per_class_accuracy"][0] == 0 and math.isnan(result["per_class_accuracy"][1])


def test_regression_agrees_with_scipy():
    predictions, references = np.random.default_rng(0).normal(size=(2, 50))
    result = load_metric(Regression).compute(predictions=predictions, references=references)
    assert result["pearson"] == pytest.approx(stats.pearsonr(predictions, references).statistic)
    assert result["spearman"] == pytest.approx(stats.spearmanr(predictions, references).statistic)
    assert result["mean_squared_error"] == pytest.approx(((predictions - references) ** 2).mean())


@pytest.mark.parametrize("predictions", [[1.0, 1.0, 1.0], [2.5]])
def test_nothing_correlates_with_a_constant(predictions):
    references = [1.0, 2.0, 3.0][: len(predictions)]
    result = load_metric(Regression).compute(predictions=predictions, references=references)
    assert result["pearson"] == result["spearman"] == 0.0


@pytest.mark.parametrize(
    "prediction, answers, exact, f1",
    [
        ("The Eiffel  Tower!", ["eiffel tower"], 1, 1),
        ("Eiffel Tower in Paris", ["the tower", "tower of Paris"], 0, 4 / 7),  # the better of 2/5 and 4/7
        ("red red blue", ["red blue blue"], 0, 2 / 3),  # a word counts as often as both have it
        ("something", [], 0, 0),
        ("", [], 1, 1),
        ("", ["something"], 0, 0),
        ("the", ["an"], 1, 1),  # nothing but articles
    ],
)
def test_answers_are_compared_as_squad_does(prediction, answers, exact, f1):
    result = load_metric(QuestionAnswering).compute(predictions=[prediction], references=[answers])
    assert (result["exact_match"], result["f1"]) == (exact, pytest.approx(f1))


def test_answers_are_compared_without_articles_inside_words():
    assert normalised_words("An anthem, a theatre; the U.S.") == ["anthem", "theatre", "us"]


def test_questions_without_an_answer_are_also_reported_apart():
    result = load_metric(QuestionAnswering).compute(
        predictions=["", "x", "a cat", ""], references=[[], [], ["cat"], ["dog"]]
    )
    assert result == {
        "exact_match": 0.5,
        "f1": 0.5,
        "no_answer_accuracy": 0.5,
        "answerable_exact_match": 0.5,
        "answerable_f1": 0.5,
    }


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("O B-PER I-PER O B-LOC", {("PER", 1, 3), ("LOC", 4, 5)}),
        ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),  # side by side
        ("I-PER I-PER O", {("PER", 0, 2)}),  # IOB1
        ("B-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),  # another type begins another entity
        ("B-date-range I-date-range", {("date-range", 0, 2)}),
        ("B-PER E-PER E-PER S-PER O S-LOC", {("PER", 0, 2), ("PER", 2, 3), ("PER", 3, 4), ("LOC", 5, 6)}),  # BIOES
        ("B-PER I-PER E-PER B-PER", {("PER", 0, 3), ("PER", 3, 4)}),
        ("U-PER I-PER L-PER U-LOC L-PER", {("PER", 0, 1), ("PER", 1, 3), ("LOC", 3, 4), ("PER", 4, 5)}),  # BILOU
        ("S E L U B", {("", 4, 5)}),
        ("NN VB -X B", {("", 3, 4)}),  # of tags without a type only B and I are entities
        ("", set()),
    ],
)
def test_tags_are_entities_as_conlleval_counts_them(tags, expected):
    assert entities(tags.split()) == expected


def test_entities_count_only_if_type_and_borders_are_right():
    result = load_metric(Entities).compute(
        predictions=[["B-PER", "I-PER", "O"], ["B-LOC", "O", "B-ORG"], []],
        references=[["B-PER", "I-PER", "O"], ["B-LOC", "I-LOC", "B-PER"], []],
    )
    assert result == {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "accuracy": 4 / 6}


def test_without_entities_every_measure_is_zero():
    result = load_metric(Entities).compute(predictions=[["O", "O"]], references=[["O", "O"]])
    assert result == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}


# ------------------------------------------------------------------------------------------------------- detection


COLUMNS = ("boxes", "scores", "labels", "true_boxes", "true_labels", "true_areas", "crowd")


def detected(found, true, num_labels=2, image_ids=None) -> dict:
    """Measures of what was found, (box, score, label), and what is true, (box, label, is crowd), in each image."""
    metric = load_metric(CocoDetection)
    for number, (answers, objects) in enumerate(zip(found, true, strict=True)):
        columns = [[answer[n] for answer in answers] for n in range(3)] + [
            [thing[n] for thing in objects] for n in (0, 1)
        ]
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box, *_ in objects]
        columns += [areas, [crowd for *_, crowd in objects]]
        metric.add(image_ids=image_ids[number] if image_ids else number, **dict(zip(COLUMNS, columns, strict=True)))
    return metric.compute(num_labels=num_labels)


SMALL, OTHER, LARGE = [0, 0, 20, 20], [50, 50, 70, 70], [0, 0, 200, 100]


def test_boxes_by_hand():
    """Half of class 1 is found, and nothing else is."""
    result = detected([[(SMALL, 0.9, 1)], [(OTHER, 0.8, 1)]], [[(SMALL, 1, 0)], [(SMALL, 1, 0), (LARGE, 0, 0)]])
    assert result["per_class_map"] == [0.0, pytest.approx(51 / 101)]  # of 101 recalls those to 0.5 have precision 1
    assert result["map"] == result["map_50"] == result["map_75"] == pytest.approx(51 / 202)
    assert result["map_small"] == pytest.approx(51 / 101) and result["map_large"] == 0
    assert result["map_medium"] == result["mar_medium"] == -1  # there is none
    assert result["mar_1"] == result["mar_100"] == pytest.approx(0.25)


def test_a_box_counts_at_each_overlap_that_it_reaches():
    result = detected([[([0, 0, 20, 14.1], 0.5, 0)]], [[(SMALL, 0, 0)]], num_labels=1)  # IoU 0.705: 0.5 to 0.7
    assert result["map"] == pytest.approx(0.5) and (result["map_50"], result["map_75"]) == (pytest.approx(1), 0)


def test_a_box_found_twice_is_wrong_once():
    twice = detected([[(SMALL, 0.4, 0), (SMALL, 0.9, 0)], [(SMALL, 0.3, 0)]], [[(SMALL, 0, 0)]] * 2, num_labels=1)
    assert twice["map_50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_what_is_found_in_a_crowd_counts_for_nothing():
    result = detected([[(SMALL, 0.9, 0), (OTHER, 0.5, 0)]], [[(SMALL, 0, 1), (OTHER, 0, 0)]], num_labels=1)
    assert result["map"] == pytest.approx(1)


def test_without_boxes_there_is_no_precision_and_without_answers_none_that_is_good():
    assert set(detected([[], []], [[], []])["per_class_map"]) == {-1.0}
    result = detected([[]], [[(SMALL, 1, 0)]])
    assert (result["map"], result["per_class_map"]) == (0, [-1, 0])


def test_an_image_counts_once_and_numbers_are_finite():
    with pytest.raises(ValueError, match="image_ids has 7 2 times"):
        detected([[], []], [[], []], image_ids=[7, 7])
    with pytest.raises(ValueError, match="image 1 has a box or a score that is not finite"):
        detected([[], [([0, 0, math.nan, 1], 0.5, 0)]], [[], []])


@pytest.mark.skipif("HF_MODELS_TEST_DATA" not in os.environ, reason="needs HF_MODELS_TEST_DATA")
def test_coco_measures_are_those_of_pycocotools():
    folder = Path(os.environ["HF_MODELS_TEST_DATA"], "coco_eval")
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    answers = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    ids = sorted(category["id"] for category in truth["categories"])
    columns = {image["id"]: defaultdict(list) for image in reversed(truth["images"])}  # in any order
    for prefix, annotations in (("", answers), ("true_", truth["annotations"])):
        for annotation in annotations:
            column, (left, top, width, height) = columns[annotation["image_id"]], annotation["bbox"]
            column[f"{prefix}boxes"].append([left, top, left + width, top + height])
            column[f"{prefix}labels"].append(ids.index(annotation["category_id"]))
            if prefix:
                column["true_areas"].append(annotation["area"])
                column["crowd"].append(annotation["iscrowd"])
            else:
                column["scores"].append(annotation["score"])
    metric = load_metric(CocoDetection)
    for image, column in columns.items():
        metric.add(image_ids=image, **{name: column[name] for name in COLUMNS})
    result = metric.compute(num_labels=len(ids))
    expected = [0.504581, 0.696973, 0.572982, 0.585626, 0.5194, 0.501398]  # pycocotools 2.0.11
    expected += [0.386813, 0.59368, 0.595353, 0.639811, 0.566421, 0.564291]
    assert [result[name] for name in COCO_MEASURES] == pytest.approx(expected, abs=1e-5)
    assert np.mean([score for score in result["per_class_map"] if score != -1]) == pytest.approx(result["map"])
