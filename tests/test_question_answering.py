"""Answers from the scores of tokens: against brute force, and over windows of a long context."""

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_models import ZooBertConfig, ZooBertForQuestionAnswering
from hf_models.question_answering import answer_question, best_answers, question_windows
from training.data.documents import Corpus, Documents
from training.text.tokenizer import make_tokenizer

WORDS = [f"w{number}" for number in range(40)]
CONTEXT = " ".join(WORDS)


@pytest.fixture(scope="module")
def word_tokenizer():
    """A BERT tokenizer with a token for each word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *WORDS, "who", "why"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def brute_force(start, end, offsets, max_answer_tokens, null_threshold):
    """Every span in every window, by loops: {(first character, end): best score}, and (0, 0) for no answer."""
    spans = {}
    for window in range(len(start)):
        context = [place for place in range(start.shape[1]) if offsets[window, place, 1] > offsets[window, place, 0]]
        for first in context:
            for last in context:
                if first <= last < first + max_answer_tokens:
                    span = int(offsets[window, first, 0]), int(offsets[window, last, 1])
                    spans[span] = max(spans.get(span, -math.inf), float(start[window, first] + end[window, last]))
    if null_threshold is not None:
        spans[0, 0] = min(float(row[0] + other[0]) for row, other in zip(start, end, strict=True)) - null_threshold
    return spans


@pytest.mark.parametrize("null_threshold", [None, 0.0, -3.0, 3.0])
@pytest.mark.parametrize("max_answer_tokens", [1, 3, 100])
def test_the_best_answers_are_those_of_a_search_through_all_spans(word_tokenizer, max_answer_tokens, null_threshold):
    windows = question_windows(word_tokenizer, ["who"], [CONTEXT], max_tokens=24, stride=8)
    offsets = torch.nn.utils.rnn.pad_sequence([window["offsets"] for window in windows], True)
    assert len(windows) == 3
    start, end = torch.randn(2, *offsets.shape[:2])
    spans = brute_force(start, end, offsets, max_answer_tokens, null_threshold)
    total = sum(map(math.exp, spans.values()))

    options = {"max_answer_tokens": max_answer_tokens, "null_threshold": null_threshold}
    found = best_answers(start, end, offsets, CONTEXT, num_answers=len(spans) + 9, **options)
    assert [(answer.start, answer.end) for answer in found] == sorted(spans, key=spans.get, reverse=True)
    for answer in found:
        assert answer.text == CONTEXT[answer.start : answer.end]
        assert answer.score == pytest.approx(math.exp(spans[answer.start, answer.end]) / total, rel=1e-4)
    assert best_answers(start, end, offsets, CONTEXT, num_answers=2, **options) == found[:2]


def test_without_a_context_the_answer_is_empty():
    nothing = torch.zeros(1, 4)
    assert best_answers(nothing, nothing, torch.zeros(1, 4, 2).long(), "") == [("", 1.0, 0, 0)]


def test_no_answer_needs_every_window_to_agree():
    """The first window is sure that it holds no answer, the second is not."""
    start = torch.tensor([[9.0, 0.0], [0.0, 2.0]])
    offsets = torch.tensor([[[0, 0], [0, 1]], [[0, 0], [2, 3]]])
    assert best_answers(start, start, offsets, "a b", null_threshold=0.0)[0].text == "b"
    assert best_answers(start, start, offsets, "a b", null_threshold=-5.0)[0].text == ""
    assert best_answers(start, start, offsets, "a b", null_threshold=math.inf)[0].text == "b"


@pytest.mark.parametrize("null_threshold", [-math.inf, math.nan])
def test_a_threshold_that_orders_nothing_is_refused(null_threshold):
    scores, offsets = torch.ones(1, 2), torch.tensor([[[0, 0], [0, 1]]])
    with pytest.raises(ValueError, match="null_threshold is"):
        best_answers(scores, scores, offsets, "a", null_threshold=null_threshold)


def test_windows_cover_the_context_and_overlap_by_the_stride(word_tokenizer):
    windows = question_windows(word_tokenizer, ["who", "why"], [CONTEXT, "w1 w2"], max_tokens=24, stride=8)
    assert [window["question"] for window in windows] == [0, 0, 0, 1]
    parts = [[CONTEXT[a:b] for a, b in window["offsets"].tolist() if b > a] for window in windows[:3]]
    assert parts[0][-8:] == parts[1][:8] and parts[1][-8:] == parts[2][:8]
    assert list(dict.fromkeys(sum(parts, []))) == WORDS
    for window in windows:
        assert len(window["input_ids"]) <= 24 and window["input_ids"][0] == word_tokenizer.cls_token_id
        assert window["offsets"][:2].tolist() == [[0, 0], [0, 0]]  # [CLS] and the question are not the context
        assert window["token_type_ids"].shape == window["input_ids"].shape


def test_a_question_longer_than_the_model_is_cut(word_tokenizer):
    (window,) = question_windows(word_tokenizer, [" ".join(["why"] * 500)], ["w1 w2"], max_tokens=24, stride=8)
    words = word_tokenizer.convert_ids_to_tokens(window["input_ids"].tolist())
    assert words == ["[CLS]", *["why"] * 6, "[SEP]", "w1", "w2", "[SEP]"]


@pytest.mark.parametrize("question, context", [("", "w1"), ("who", ""), ("", ""), ("[SEP]", "[CLS]")])
def test_empty_texts_and_special_tokens_are_read(word_tokenizer, question, context):
    (window,) = question_windows(word_tokenizer, [question], [context], max_tokens=24, stride=8)
    assert window["input_ids"][0] == word_tokenizer.cls_token_id


@pytest.mark.parametrize(
    "sizes, message", [((20, 4), "max_tokens is 20"), ((24, 13), "stride is 13"), ((24, -1), "-1")]
)
def test_windows_that_cannot_be_are_refused(word_tokenizer, sizes, message):
    with pytest.raises(ValueError, match=message):
        question_windows(word_tokenizer, ["who"], [CONTEXT], max_tokens=sizes[0], stride=sizes[1])


class Oracle(torch.nn.Module):
    """Scores one token as the answer, wherever it stands; the first token as far as `null` says."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, null=0.0, wanted="w30", **config):
        self.wanted, self.null = tokenizer.convert_tokens_to_ids(wanted), null
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=24, **config)

    def forward(self, input_ids, attention_mask, token_type_ids):
        scores = 5.0 * (input_ids == self.wanted)
        scores[:, 0] = self.null
        scores[attention_mask == 0] = 99.0  # what padding scores must not matter
        return SimpleNamespace(start_logits=scores, end_logits=scores)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_an_answer_behind_the_first_window_is_found(word_tokenizer, batch_size):
    answers = answer_question(
        Oracle(word_tokenizer), word_tokenizer, "who", CONTEXT, num_answers=3, stride=8, batch_size=batch_size
    )
    assert len(answers) == 3 and answers[0].text == "w30"
    assert CONTEXT[answers[0].start : answers[0].end] == "w30"


@pytest.mark.parametrize("length, positions, expected", [(28, 36, 28), (40, 36, 36), (None, 30, 30)])
def test_a_window_is_as_long_as_the_tokenizer_and_the_model_say(
    word_tokenizer, monkeypatch, length, positions, expected
):
    if length is not None:
        monkeypatch.setattr(word_tokenizer, "model_max_length", length)
    model, seen = Oracle(word_tokenizer), []
    model.config.max_position_embeddings = positions
    model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True
    )
    answer_question(model, word_tokenizer, "who", CONTEXT)
    assert [size for _, size in seen] == [expected]


def test_an_answer_in_bytes_has_no_space_before_it():
    texts = Documents.of(lambda: ["This is what Pepys wrote, and so Pepys said. " * 3])
    tokenizer = make_tokenizer("bpe", Corpus(texts, texts, "diary", "diary"), 400, context_length=24, masked=True)
    context = "so Pepys said"
    answer = answer_question(Oracle(tokenizer, wanted="ĠPepys"), tokenizer, "who", context)[0]
    assert (answer.text, answer.start, answer.end) == ("Pepys", 3, 8)


def test_the_config_says_whether_there_may_be_no_answer(word_tokenizer):
    def answer(**options):
        return answer_question(model, word_tokenizer, "who", CONTEXT, **options)[0].text

    model = Oracle(word_tokenizer, null=50.0)
    assert answer() == "w30" and answer(null_threshold=0.0) == ""
    model = Oracle(word_tokenizer, null=50.0, null_threshold=0.0)
    assert answer() == "" and answer(null_threshold=math.inf) == "w30"


def test_a_model_answers_with_words_of_the_context(word_tokenizer):
    config = ZooBertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )
    model = ZooBertForQuestionAnswering(config).eval()
    found = model.answer(word_tokenizer, "why", CONTEXT, num_answers=4)
    assert len(found) == 4 and all(answer.text in CONTEXT for answer in found)
    assert [answer.score for answer in found] == sorted((answer.score for answer in found), reverse=True)
