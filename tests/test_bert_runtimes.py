"""ZooBert with the tools made for BERT: masking collator, pipelines. What every family does is in test_runtimes.py."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, pipeline

from hf_models import (
    ZooBertForMaskedLM,
    ZooBertForPreTraining,
    ZooBertForSequenceClassification,
    ZooBertForTokenClassification,
)

TEXTS = ["to be, or not to be!", "that is the question.", "whether it is nobler", "a sea of troubles."]


@pytest.mark.parametrize("model_class", [ZooBertForMaskedLM, ZooBertForPreTraining])
def test_trainer_pretrains_on_what_the_stock_collator_masks(make_bert, masking_tokenizer, model_class, tmp_path):
    """Rows of different lengths, padded by the collator; the model leaves the padding out again."""
    rows = [dict(masking_tokenizer(text)) for text in TEXTS]
    if model_class is ZooBertForPreTraining:
        rows = [row | {"next_sentence_label": number % 2} for number, row in enumerate(rows)]
    settings = TrainingArguments(
        tmp_path,
        max_steps=30,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    model = make_bert(model_class, norm_position="pre")
    collator = DataCollatorForLanguageModeling(masking_tokenizer, mlm_probability=0.3)
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    prediction = trainer.predict(rows)
    logits = prediction.predictions if model_class is ZooBertForMaskedLM else prediction.predictions[0]
    longest = max(len(row["input_ids"]) for row in rows)
    assert logits.shape == (4, longest, 64)
    assert prediction.metrics["test_loss"] < losses[0]


@pytest.fixture
def save(make_bert, masking_tokenizer, tmp_path):
    """Saves a model of a class with the tokenizer; returns the model and its folder."""

    def save(model_class, **fields):
        model = make_bert(model_class, **fields)
        model.save_pretrained(tmp_path)
        masking_tokenizer.save_pretrained(tmp_path)
        return model, str(tmp_path)

    return save


@pytest.mark.parametrize("model_class", [ZooBertForMaskedLM, ZooBertForPreTraining])
@torch.no_grad()
def test_fill_mask_pipeline(save, masking_tokenizer, model_class):
    """A checkpoint with both heads of pre-training serves as well."""
    model, folder = save(model_class, vocab_size=len(masking_tokenizer))
    fill = pipeline("fill-mask", model=folder, device="cpu")
    texts = ["to [MASK]e, or not", "[MASK]hat is the question."]
    for text, answers in zip(texts, fill(texts, top_k=3, batch_size=2), strict=True):
        inputs = masking_tokenizer(text, return_tensors="pt")
        (place,) = (inputs.input_ids[0] == masking_tokenizer.mask_token_id).nonzero()
        scores = model(**inputs)[0][0, place].softmax(-1).squeeze(0)
        assert [answer["token"] for answer in answers] == scores.topk(3).indices.tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(scores.topk(3).values.tolist(), abs=1e-5)
        assert answers[0]["token_str"] == masking_tokenizer.decode(answers[0]["token"])


@torch.no_grad()
def test_text_classification_pipeline_of_texts_and_pairs(save, masking_tokenizer):
    model, folder = save(ZooBertForSequenceClassification, id2label={0: "comedy", 1: "history", 2: "tragedy"})
    classify = pipeline("text-classification", model=folder, device="cpu")
    pairs = [{"text": TEXTS[0], "text_pair": TEXTS[1]}, {"text": TEXTS[3], "text_pair": TEXTS[2]}]
    for given in (TEXTS, pairs):
        for one, answer in zip(given, classify(given, batch_size=2), strict=True):
            texts = (one["text"], one["text_pair"]) if isinstance(one, dict) else (one,)
            probabilities = model(**masking_tokenizer(*texts, return_tensors="pt")).logits.softmax(-1)[0]
            assert answer["label"] == model.config.id2label[probabilities.argmax().item()]
            assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)


@torch.no_grad()
def test_token_classification_pipeline(save, masking_tokenizer):
    model, folder = save(ZooBertForTokenClassification, id2label={0: "O", 1: "B-PER", 2: "I-PER"})
    tag = pipeline("token-classification", model=folder, device="cpu", ignore_labels=[])
    for text, answers in zip(TEXTS, tag(TEXTS, batch_size=2), strict=True):
        inputs = masking_tokenizer(text, return_tensors="pt")
        labels = [model.config.id2label[label] for label in model(**inputs).logits[0].argmax(-1).tolist()]
        assert [answer["entity"] for answer in answers] == labels[1:-1]  # without [CLS] and [SEP]


@torch.no_grad()
def test_a_text_of_nothing_but_special_tokens_is_a_text(make_bert, masking_tokenizer):
    model = make_bert(ZooBertForSequenceClassification)
    inputs = masking_tokenizer(["", TEXTS[0]], padding=True, return_tensors="pt")
    alone = model(**masking_tokenizer("", return_tensors="pt")).logits[0]
    assert_close(model(**inputs).logits[0], alone, rtol=1e-5, atol=1e-5)
