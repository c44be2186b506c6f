"""The measures of a masked language model on held-out text: accuracy, pseudo-perplexity, and guesses to read.

Dimensions: B rows of a batch, T tokens of a sentence, V the vocabulary, C classes.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from training.text.masking import document_borders, later_pieces, sentence_ends
from training.text.tokenizer import separator_id
from training.text.tokens import IGNORED_LABEL


def count_correct(scores: Tensor, labels: Tensor) -> tuple[float, int, int]:
    """Sums the loss and counts the labels that are not ignored, and the right guesses.

    Args:
        scores: (..., C).
        labels: (...).
    """
    scores, labels = scores.flatten(0, -2).float(), labels.flatten()
    nll = F.cross_entropy(scores, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return float(nll), int((labels != IGNORED_LABEL).sum()), int((scores.argmax(-1) == labels).sum())


@torch.no_grad()
def pseudo_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    tokens: np.ndarray,
    row_length: int,
    num_tokens: int,
    batch_size: int,
) -> float:
    """Computes exp(-1/N sum_t log p(w_t | all others)), masking one token at a time (Salazar et al. 2020, eq. 1, 2).

    The N tokens are the first `num_tokens` of the text that are not special ([UNK] is special), or all of them if the
    text has fewer; it needs at least one. The model reads a token with the rest of its document, or with the part of
    the document that fits into a row.
    """
    special, nlls, left = torch.tensor(tokenizer.all_special_ids), [], num_tokens
    for part in _parts(tokens, tokenizer, row_length - 2):
        positions = torch.where(~torch.isin(part, special))[0][:left]
        for some in positions.split(batch_size) if len(positions) else ():
            nlls.append(F.cross_entropy(_scores(model, tokenizer, part, some), part[some], reduction="none"))
        if not (left := left - len(positions)):
            break
    return math.exp(torch.cat(nlls).double().mean())


@torch.no_grad()
def guess_words(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray, row_length: int, num_sentences: int = 10
) -> str:
    """Writes sentences of the text with one word masked, the model's five best guesses, and the word itself."""
    lines = []
    for sentence, candidates in _sentences(tokens, tokenizer, row_length, num_sentences):
        position = candidates[len(candidates) // 2]
        best = _scores(model, tokenizer, sentence, torch.tensor([position])).softmax(-1)[0].topk(5)
        guesses = [
            f"{tokenizer.decode([token]).strip()} {probability:.0%}"
            for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        masked = sentence.clone()
        masked[position] = tokenizer.mask_token_id
        text = " ".join(tokenizer.decode(masked).split())
        lines.append(f"{text}\n    {', '.join(guesses)}  ({tokenizer.decode([sentence[position]]).strip()})")
    return "\n".join(lines)


def _parts(tokens: np.ndarray, tokenizer: PreTrainedTokenizerFast, size: int) -> Iterator[Tensor]:
    """Yields each document in parts (T,) of at most `size` tokens."""
    for begin, length in zip(*document_borders(tokens, separator_id(tokenizer)), strict=True):
        yield from torch.from_numpy(tokens[begin : begin + length].astype(np.int64)).split(size)


def _sentences(tokens, tokenizer, row_length: int, count: int) -> list[tuple[Tensor, list[int]]]:
    """Picks sentences of middling length, spread over the text, that have whole words, and the words' positions."""
    tokens, separator = np.asarray(tokens[: 2**20]), separator_id(tokenizer)
    ends = np.flatnonzero(sentence_ends(tokenizer)[tokens] | (tokens == separator)) + 1
    later = later_pieces(tokens, tokenizer)
    texts = tokenizer.backend_tokenizer.decode_batch([[token] for token in range(int(tokens.max()) + 1)])
    is_long = np.array([sum(map(str.isalpha, text)) >= 4 for text in texts])
    is_word = is_long[tokens] & ~later & ~np.append(later[1:], False)
    found = []
    for begin, end in pairwise([0, *ends.tolist()]):
        end -= tokens[end - 1] == separator
        if 8 <= end - begin <= min(24, row_length - 2):  # a row also holds [CLS] and [SEP]
            sentence = torch.from_numpy(tokens[begin:end].astype(np.int64))
            positions = np.flatnonzero(is_word[begin:end]).tolist()
            if positions:
                found.append((sentence, positions))
    return found[:: max(1, len(found) // count)][:count]


def _scores(model: nn.Module, tokenizer: PreTrainedTokenizerFast, sentence: Tensor, positions: Tensor) -> Tensor:
    """Masks each of the positions (B,) of a sentence alone. Returns the scores (B, V) of all tokens there."""
    device = next(model.parameters()).device
    row = F.pad(F.pad(sentence, (1, 0), value=tokenizer.cls_token_id), (0, 1), value=tokenizer.sep_token_id)
    positions = positions[:, None] + 1
    rows = row.repeat(len(positions), 1).scatter(1, positions, tokenizer.mask_token_id)
    return model(input_ids=rows.to(device), logits_to_keep=positions.to(device))[0][:, 0].float().cpu()
