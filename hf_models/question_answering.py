"""Extractive question answering: from the scores of tokens to answers in the words of the context.

A context that is too long for the model is split into windows that overlap by `stride` tokens. Every span of context
tokens in a window is a possible answer, with the score start_logit(first) + end_logit(last). The score of "no answer"
is the same sum at the first token of a window, [CLS] (Devlin et al. 2019, sections 4.2 and 4.3).

    W  windows of one question    T  tokens of a window
"""

import math
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence


class Answer(NamedTuple):
    """`context[start:end]`, with its probability among all possible answers. An empty text means "no answer"."""

    text: str
    score: float
    start: int
    end: int


@torch.no_grad()
def answer_question(
    model,
    tokenizer,
    question: str,
    context: str,
    *,
    num_answers: int = 1,
    max_tokens: int | None = None,
    stride: int | None = None,
    max_answer_tokens: int = 30,
    null_threshold: float | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """Returns the best answers that the model finds in the context, the best one first.

    Args:
        model: a question-answering model, with `start_logits` and `end_logits` in its output.
        num_answers: largest number of answers to return.
        max_tokens: length of a window with the question. Default: the tokenizer's `model_max_length`, which
            fine-tuning sets to the evaluated length, or the number of the model's positions if that is smaller.
        stride: number of tokens that neighbouring windows share. Default: a third of `max_tokens`.
        max_answer_tokens: length of the longest possible answer.
        null_threshold: by how much the score of "no answer" must exceed that of the best span to come before it;
            infinity excludes "no answer". Default: the config's `null_threshold`; without one, every question has an
            answer.
        batch_size: number of windows in one forward pass.

    Raises:
        ValueError: a length or threshold is invalid, as in `question_windows` and `best_answers`.
    """
    if max_tokens is None:
        max_tokens = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    if null_threshold is None:
        null_threshold = getattr(model.config, "null_threshold", None)
    stride = max_tokens // 3 if stride is None else stride
    windows = question_windows(tokenizer, [question], [context], max_tokens=max_tokens, stride=stride)
    starts, ends = [], []
    was_training = model.training
    model.eval()
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        inputs = {
            name: pad_sequence([window[name] for window in batch], True, filler)
            for name, filler in (("input_ids", tokenizer.pad_token_id or 0), ("token_type_ids", 0))
            if name in batch[0]
        }
        lengths = torch.tensor([len(window["input_ids"]) for window in batch])
        inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        outputs = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
        for row, length in enumerate(lengths):
            starts.append(outputs.start_logits[row, :length].float().cpu())
            ends.append(outputs.end_logits[row, :length].float().cpu())
    model.train(was_training)
    return best_answers(
        pad_sequence(starts, True),
        pad_sequence(ends, True),
        pad_sequence([window["offsets"] for window in windows], True),
        context,
        num_answers=num_answers,
        max_answer_tokens=max_answer_tokens,
        null_threshold=null_threshold,
    )


def question_windows(tokenizer, questions: list[str], contexts: list[str], *, max_tokens: int, stride: int) -> list:
    """Splits each question and its context into windows for the model, in the order of the questions.

    Questions longer than a quarter of a window are cut.

    Args:
        tokenizer: a fast tokenizer that pads on the right, so that every window starts with [CLS].
        max_tokens, stride: as in `answer_question`.

    Returns:
        A dict for each window: `input_ids` (T,); `token_type_ids` (T,), if the tokenizer makes them; `offsets` (T, 2),
        the characters of the context that each token covers, or (0, 0) for other tokens; and `question`, the index of
        the question.

    Raises:
        ValueError: `max_tokens` is too small to hold a question and part of a context, or `stride` is too large.
    """
    if max_tokens < 24:
        raise ValueError(f"max_tokens is {max_tokens}: a window of fewer than 24 tokens has no room for a context")
    if not 0 <= stride <= max_tokens // 2:
        raise ValueError(f"stride is {stride}: windows of {max_tokens} tokens share from 0 to {max_tokens // 2} tokens")
    longest = max_tokens // 4
    pieces = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=longest, return_offsets_mapping=True
    )["offset_mapping"]
    encodings = tokenizer(
        [
            text if len(offsets) < longest else text[: offsets[-1][1]]
            for text, offsets in zip(questions, pieces, strict=True)
        ],
        contexts,
        truncation="only_second",
        max_length=max_tokens,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for number, question in enumerate(encodings["overflow_to_sample_mapping"]):
        is_context = torch.tensor([part == 1 for part in encodings.sequence_ids(number)])
        window = {"offsets": torch.tensor(encodings["offset_mapping"][number]) * is_context[:, None]}
        for name in ("input_ids", "token_type_ids"):
            if name in encodings:
                window[name] = torch.tensor(encodings[name][number])
        windows.append({**window, "question": question})
    return windows


def best_answers(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    offsets: torch.Tensor,
    context: str,
    *,
    num_answers: int = 1,
    max_answer_tokens: int = 30,
    null_threshold: float | None = None,
) -> list[Answer]:
    """Returns the best spans of the context over all windows of one question, the best one first.

    A span in several windows has its best score. "No answer" has its worst score, because it requires that no window
    holds an answer (as in the SQuAD 2.0 baseline).

    Args:
        start_logits, end_logits: (W, T), with padding.
        offsets: (W, T, 2), the characters of the context that each token covers; (0, 0) for other tokens.
        num_answers, max_answer_tokens: as in `answer_question`.
        null_threshold: as in `answer_question`, but None means that every question has an answer.

    Returns:
        At least one answer; the empty one if there is no span.

    Raises:
        ValueError: `null_threshold` is NaN or minus infinity.
    """
    if null_threshold is not None and not null_threshold > -math.inf:
        raise ValueError(
            f"null_threshold is {null_threshold}: give a number; a very low one makes 'no answer' the best, and "
            "infinity excludes it"
        )
    num_tokens = start_logits.shape[1]
    first_characters, last_characters = offsets.unbind(-1)  # (W, T)
    is_context = last_characters > first_characters
    is_span = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu().tril(max_answer_tokens - 1)
    is_span = is_span & is_context[:, :, None] & is_context[:, None, :]  # (W, T, T)
    windows, firsts, lasts = is_span.nonzero(as_tuple=True)
    scores = start_logits[windows, firsts] + end_logits[windows, lasts]
    # Equal spans of characters get equal numbers, so that `unique` joins them.
    size = len(context) + 1
    spans = first_characters[windows, firsts] * size + last_characters[windows, lasts]
    spans, span_index = spans.unique(return_inverse=True)
    scores = torch.full((len(spans),), -math.inf).scatter_reduce(0, span_index, scores.float(), "amax")
    if null_threshold is not None and null_threshold < math.inf:
        null = (start_logits[:, 0] + end_logits[:, 0]).float().min() - null_threshold
        spans, scores = torch.cat([spans, spans.new_zeros(1)]), torch.cat([scores, null[None]])  # the span 0:0
    if len(spans) == 0:
        return [Answer("", 1.0, 0, 0)]
    top = scores.softmax(0).topk(min(num_answers, len(scores)))
    answers = []
    for score, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        start, end = divmod(int(spans[index]), size)
        answers.append(Answer(context[start:end], score, start, end))
    return answers
