"""The measures of `eval_results.json`, as `evaluate.Metric` classes that need no network.

A metric is given sums or single examples, so that it is exact whatever the batches are. Rank 0 computes it over what
all ranks have gathered:

    metric = load_metric(LanguageModeling)
    metric.add_batch(nll_sum=[1093.2, 1121.8], num_tokens=[512, 512], num_bytes=[2031, 2093])
    metric.compute()  # {"loss": ..., "perplexity": ..., "bits_per_byte": ...}
"""

import math
import re
import string
import tempfile
from collections import Counter

import datasets
import evaluate
import numpy as np


def load_metric(metric_class: type[evaluate.Metric]) -> evaluate.Metric:
    """Loads a metric that keeps its inputs in memory; the folder that evaluate wants is deleted with the metric."""
    folder = tempfile.TemporaryDirectory(prefix="hf_models-metric-")
    metric = metric_class(keep_in_memory=True, cache_dir=folder.name)
    metric.temporary_folder = folder
    return metric


def _describe(metric: evaluate.Metric, **features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(description=metric.__doc__, citation="", features=datasets.Features(features))


class LanguageModeling(evaluate.Metric):
    """Loss in nats per predicted token, its exponential, and bits per UTF-8 byte of text.

    Bits per byte, nll / (ln 2 * bytes), compares models whatever their tokenizers (Gao et al. 2020, "The Pile",
    section 3.1). `num_bytes` are those of the text that `nll_sum`, in nats, is the sum over.
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        return _describe(self, nll_sum=datasets.Value("float64"), num_tokens=number, num_bytes=number)

    def _compute(self, nll_sum: list[float], num_tokens: list[int], num_bytes: list[int]) -> dict[str, float]:
        nll, tokens, size = math.fsum(nll_sum), sum(num_tokens), sum(num_bytes)
        if tokens == 0 or size == 0:
            raise ValueError(f"num_tokens and num_bytes must be positive to measure a loss, not {tokens} and {size}")
        loss = nll / tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": nll / (math.log(2) * size)}


class MaskedLanguageModeling(evaluate.Metric):
    """Loss and accuracy of masked tokens, and of sentence pairs if there are any.

    `loss` is the sum of both losses, in nats (Devlin et al. 2019, appendix A.2).
    """

    def _info(self) -> evaluate.MetricInfo:
        names = ("num_masked", "num_masked_correct", "num_pairs", "num_pairs_correct")
        sums = {name: datasets.Value("float64") for name in ("masked_nll_sum", "pair_nll_sum")}
        return _describe(self, **sums, **{name: datasets.Value("int64") for name in names})

    def _compute(
        self, masked_nll_sum, num_masked, num_masked_correct, pair_nll_sum, num_pairs, num_pairs_correct
    ) -> dict[str, float]:
        num_masked, num_pairs = sum(num_masked), sum(num_pairs)
        if num_masked == 0:
            raise ValueError("no token was masked, so there is nothing to measure: give more text")
        loss = math.fsum(masked_nll_sum) / num_masked
        results = {"loss": loss, "masked_loss": loss, "masked_accuracy": sum(num_masked_correct) / num_masked}
        if num_pairs:
            loss = math.fsum(pair_nll_sum) / num_pairs
            results |= {
                "loss": results["loss"] + loss,
                "next_sentence_loss": loss,
                "next_sentence_accuracy": sum(num_pairs_correct) / num_pairs,
            }
        return results


class Classification(evaluate.Metric):
    """Accuracy, F1 and Matthews correlation of class ids from 0 to `num_labels` - 1.

    With two classes `f1` is that of class 1, as in GLUE; `macro_f1` is the mean over the classes. A division by zero
    gives 0: a class that is neither true nor predicted, or a correlation with a constant.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self, predictions=datasets.Value("int64"), references=datasets.Value("int64"))

    def _compute(self, predictions: list[int], references: list[int], num_labels: int) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        f1 = f1_score(references, predictions, labels=range(num_labels), average=None, zero_division=0.0)
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            **({"f1": float(f1[1])} if num_labels == 2 else {}),
            "macro_f1": float(f1.mean()),
            "matthews_correlation": float(matthews_corrcoef(references, predictions)),
        }


class ImageClassification(evaluate.Metric):
    """Loss and accuracies of images, over all images and for each class, and the confusion matrix.

    Each image has its class id (`references`), the predicted one (`predictions`), the number of classes that scored
    higher than the true one (`ranks`), and the loss in nats (`losses`). `per_class_accuracy` has a number for each
    class, NaN for a class without images; `confusion_matrix` counts images, [true class][predicted class].
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        return _describe(self, predictions=number, references=number, ranks=number, losses=datasets.Value("float64"))

    def _compute(self, predictions, references, ranks, losses, num_labels: int) -> dict[str, float | list]:
        confusion = np.zeros((num_labels, num_labels), np.int64)
        np.add.at(confusion, (references, predictions), 1)
        totals = confusion.sum(axis=1)
        by_class = np.divide(confusion.diagonal(), totals, out=np.full(num_labels, np.nan), where=totals > 0)
        return {
            "loss": math.fsum(losses) / len(losses),
            "accuracy": float(confusion.trace() / len(references)),
            "top5_accuracy": float(np.mean(np.less(ranks, 5))),
            "per_class_accuracy": by_class.tolist(),
            "confusion_matrix": confusion.tolist(),
        }


class Regression(evaluate.Metric):
    """Pearson's and Spearman's correlation, and the mean squared error. The correlation with a constant is 0."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self, predictions=datasets.Value("float64"), references=datasets.Value("float64"))

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        from scipy import stats

        is_constant = min(np.ptp(predictions), np.ptp(references)) == 0  # so is a single pair of values
        return {
            "pearson": 0.0 if is_constant else float(stats.pearsonr(predictions, references).statistic),
            "spearman": 0.0 if is_constant else float(stats.spearmanr(predictions, references).statistic),
            "mean_squared_error": float(np.mean(np.square(np.subtract(predictions, references)))),
        }


class QuestionAnswering(evaluate.Metric):
    """Exact match and F1 of answers in words, the mean over all questions (Rajpurkar et al. 2016, section 6.1; 2018).

    As in the official script, case, punctuation, articles and repeated spaces do not matter, the best of the reference
    answers counts, and a question without one is answered by the empty text. Results are fractions of 1; the official
    script shows percent. If some questions have no answer, both kinds of questions are also measured separately.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return _describe(self, predictions=text, references=datasets.List(text))

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        exact, f1, has_answer = [], [], []
        for prediction, answers in zip(predictions, references, strict=True):
            words = normalised_words(prediction)
            answers = [normalised_words(answer) for answer in answers]
            answers = [answer for answer in answers if answer] or [[]]
            exact.append(float(words in answers))
            f1.append(max(_words_f1(words, answer) for answer in answers))
            has_answer.append(answers != [[]])
        exact, f1, has_answer = np.array(exact), np.array(f1), np.array(has_answer)
        results = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
        if not has_answer.all():
            results["no_answer_accuracy"] = float(exact[~has_answer].mean())
            if has_answer.any():
                results["answerable_exact_match"] = float(exact[has_answer].mean())
                results["answerable_f1"] = float(f1[has_answer].mean())
        return results


def normalised_words(text: str) -> list[str]:
    """The words of an answer in the form that SQuAD compares: lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _words_f1(words: list[str], answer: list[str]) -> float:
    if not words or not answer:
        return float(words == answer)
    return 2 * sum((Counter(words) & Counter(answer)).values()) / (len(words) + len(answer))


class Entities(evaluate.Metric):
    """Precision, recall and F1 of entities, and the accuracy of the single tags.

    An entity is found if a predicted entity of the same type covers exactly the same words (Tjong Kim Sang and De
    Meulder 2003); see `entities`. Counts are summed over all rows. Without any entity all three are 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return _describe(self, predictions=tags, references=tags)

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        num_predicted = num_real = num_found = num_right = num_words = 0
        for predicted, real in zip(predictions, references, strict=True):
            found = entities(predicted), entities(real)
            num_predicted += len(found[0])
            num_real += len(found[1])
            num_found += len(found[0] & found[1])
            num_right += sum(one == other for one, other in zip(predicted, real, strict=True))
            num_words += len(real)
        return {
            "precision": num_found / max(num_predicted, 1),
            "recall": num_found / max(num_real, 1),
            "f1": 2 * num_found / max(num_predicted + num_real, 1),
            "accuracy": num_right / max(num_words, 1),
        }


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Finds the entities (type, first word, end) in one row of tags, as conlleval (CoNLL) and seqeval count them.

    `B-X` begins an entity of type X, and `I-X` continues it. An `I-X` that follows no X begins an entity too, so that
    both ways to write tags in CoNLL (IOB1, IOB2) give the same entities. `E-X` or `L-X` is the last word of an entity,
    and `S-X` or `U-X` is an entity of one word (BIOES, BILOU). Any other tag is outside of entities.
    """
    found, kind, first, is_last = set(), None, 0, False
    for index, tag in enumerate([*tags, "O"]):
        prefix, dash, name = tag.partition("-")
        name = name if prefix in ("B", "I") or (dash and prefix in ("E", "L", "S", "U")) else None
        if kind is not None and (name != kind or prefix in ("B", "S", "U") or is_last):
            found.add((kind, first, index))
            kind = None
        is_last = prefix in ("E", "L", "S", "U")
        if kind is None and name is not None:
            kind, first = name, index
    return found


class CocoDetection(evaluate.Metric):
    """COCO's average precision and recall of boxes (Lin et al. 2014; cocodataset.org/#detection-eval).

    `map` is the mean over the classes and over ten thresholds of overlap (IoU) from 0.5 to 0.95; `map_50` and `map_75`
    have one threshold. `map_small`, `map_medium` and `map_large` count boxes with areas up to 32**2, from 32**2 to
    96**2, and from 96**2 on; a box of exactly 32**2 or 96**2 counts in two of them. `mar_1`, `mar_10` and `mar_100` are
    recalls with at most so many boxes of a class in an image. `per_class_map` has a number for each class. As in COCO,
    a measure without any true box is -1, and crowds count neither as found nor as missed.

    Each image is added once, with its number (`image_ids`); the predicted boxes (n, 4), as left, top, right and bottom
    in pixels, their scores (n,) and class ids (n,); the true boxes (m, 4), class ids (m,), areas in pixels (m,), and
    whether each is a crowd (m,).
    """

    def _info(self) -> evaluate.MetricInfo:
        numbers, decimals = datasets.List(datasets.Value("int64")), datasets.List(datasets.Value("float64"))
        boxes = datasets.List(decimals)
        return _describe(
            self,
            image_ids=datasets.Value("int64"),
            **{"boxes": boxes, "scores": decimals, "labels": numbers},
            **{"true_boxes": boxes, "true_labels": numbers, "true_areas": decimals, "crowd": numbers},
        )

    def _compute(
        self, image_ids, boxes, scores, labels, true_boxes, true_labels, true_areas, crowd, num_labels: int
    ) -> dict[str, float | list]:
        from faster_coco_eval import COCOeval_faster

        if len(set(image_ids)) < len(image_ids):
            number, count = Counter(image_ids).most_common(1)[0]
            raise ValueError(f"image_ids has {number} {count} times, and each image counts once")
        true = _coco(image_ids, num_labels, true_boxes, category_id=true_labels, area=true_areas, iscrowd=crowd)
        found = _coco(image_ids, num_labels, boxes, category_id=labels, score=scores)
        evaluation = COCOeval_faster(true, found, "bbox")
        evaluation.run()
        precision = evaluation.eval["precision"][..., 0, -1]  # (overlaps, recalls, classes)
        return {
            **dict(zip(COCO_MEASURES, map(float, evaluation.stats), strict=False)),
            "per_class_map": np.mean(precision, axis=(0, 1)).tolist(),  # a class without boxes is -1 throughout
        }


COCO_MEASURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
COCO_MEASURES += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")


def _coco(image_ids: list[int], num_labels: int, boxes: list, **fields: list):
    """Makes a data set for COCO's tools. boxes and fields: for each image a list with an entry for each box."""
    from faster_coco_eval import COCO

    annotations = []
    for index, image in enumerate(image_ids):
        columns = [fields[name][index] for name in fields]
        for (left, top, right, bottom), *values in zip(boxes[index], *columns, strict=True):
            box = [left, top, right - left, bottom - top]
            annotation = {"area": box[2] * box[3], "iscrowd": 0, **dict(zip(fields, values, strict=True))}
            if not np.isfinite([*box, annotation.get("score", 0)]).all():
                raise ValueError(f"image {image} has a box or a score that is not finite")
            # Ids count from 1, because these tools take 0 for no box.
            annotations.append({"id": len(annotations) + 1, "image_id": image, "bbox": box, **annotation})
    return COCO(
        {
            "images": [{"id": image} for image in image_ids],
            "categories": [{"id": label} for label in range(num_labels)],
            "annotations": annotations,
        }
    )
