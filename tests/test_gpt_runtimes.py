"""ZooGPT where only GPT runs: generation, caches, continuous batching, its pipelines. The rest is test_runtimes.py."""

import copy
import itertools
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache, pipeline

from hf_models import ZooGPTForSequenceClassification
from tests.families import FAMILIES

SAME = {"rtol": 1e-5, "atol": 1e-5}
GREEDY = {"max_new_tokens": 10, "do_sample": False}


# --------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_cached_and_uncached_generation_agree(make_gpt, options, backend, tokens):
    model = make_gpt(attn_implementation=backend, **options)
    expected = model.generate(tokens, use_cache=False, **GREEDY)
    assert expected.shape == (3, 22) and torch.equal(expected[:, :12], tokens)
    assert torch.equal(model.generate(tokens, **GREEDY), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", disable_compile=True, **GREEDY), expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_reading_in_pieces_is_reading_at_once(make_gpt, options, backend, tokens):
    model = make_gpt(attn_implementation=backend, **options)
    expected = model(tokens).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
        pieces = []
        for piece in tokens.split([5, 1, 1, 4, 1], dim=1):
            outputs = model(piece, cache=cache, use_cache=True)
            cache = outputs.cache
            pieces.append(outputs.logits)
        assert_close(torch.cat(pieces, dim=1), expected, **SAME)


def test_no_cache_is_returned_when_none_is_wanted(make_gpt, tokens):
    assert make_gpt()(tokens, use_cache=False).cache is None
    assert make_gpt(use_cache=False)(tokens).cache is None
    assert make_gpt()(tokens).cache.get_seq_length() == 12


@pytest.mark.parametrize("model_class", FAMILIES["gpt"].auto_classes)
def test_the_cache_has_both_of_its_names_on_every_version(make_gpt, model_class, tokens):
    model = make_gpt(model_class, pad_token_id=0)
    tokens = tokens.clamp(min=1)
    expected = model(tokens)[0]
    for given, read in itertools.product(("cache", "past_key_values"), repeat=2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = model(tokens[:, :7], use_cache=True)
            cache = getattr(first, read)
            assert cache.get_seq_length() == 7
            outputs = model(tokens[:, 7:], **{given: cache}, use_cache=True)
        assert getattr(outputs, read) is cache and cache.get_seq_length() == 12
        assert_close(outputs[0], expected if expected.ndim == 2 else expected[:, 7:], **SAME)
    with pytest.raises(ValueError, match="cache and past_key_values"):
        model(tokens, cache=cache, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_goes_on_from_a_cache_of_either_name(make_gpt, name, num_beams, tokens):
    model, settings = make_gpt(), {**GREEDY, "num_beams": num_beams}
    expected = model.generate(tokens[:1], **settings)
    empty = DynamicCache(config=model.config)
    assert torch.equal(model.generate(tokens[:1], **{name: empty}, **settings), expected)
    if num_beams == 1:
        cache = model(tokens[:1, :7], use_cache=True).cache
        assert torch.equal(model.generate(tokens[:1], **{name: cache}, **settings), expected)


def test_no_warning_of_ours_on_any_version(make_gpt, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_gpt().generate(tokens, **GREEDY)
        make_gpt().generate(tokens, num_beams=2, **GREEDY)
        trained = make_gpt().train()
        getattr(trained, "activation_checkpointing_enable", trained.gradient_checkpointing_enable)()
        trained(tokens, labels=tokens).loss.backward()


def test_beam_search_agrees_with_and_without_a_cache(make_gpt, options, tokens):
    model = make_gpt(**options)
    beams = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    assert torch.equal(model.generate(tokens, **beams), model.generate(tokens, use_cache=False, **beams))


def test_an_assistant_changes_the_speed_and_not_the_tokens(make_gpt, options, tokens):
    model = make_gpt(**options)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # right now and then, as an assistant is
    expected = model.generate(tokens[:1], **GREEDY)
    assert torch.equal(model.generate(tokens[:1], assistant_model=assistant, **GREEDY), expected)


def test_prompt_lookup_changes_the_speed_and_not_the_tokens(make_gpt, options, tokens):
    model = make_gpt(**options)
    prompt = tokens[:1, :4].repeat(1, 4)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_left_padding_changes_no_continuation(make_gpt, options, backend, tokens):
    model = make_gpt(attn_implementation=backend, pad_token_id=0, **options)
    tokens = tokens.clamp(min=1)
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :11] = 0, 0
    together = model.generate(tokens * mask, attention_mask=mask, **GREEDY)
    for row in range(3):
        alone = model.generate(tokens[row, mask[row].bool()][None], **GREEDY)
        assert torch.equal(together[row, 12:], alone[0, -10:])


def test_continuous_batching_gives_the_tokens_of_generate(make_gpt, options, tokens):
    model = make_gpt(eos_token_id=63, **options)
    tokens = tokens.clamp(min=1)
    prompts = [tokens[0].tolist(), tokens[1, :5].tolist(), tokens[2, :9].tolist()]
    size_of_a_block = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"  # before 5.18
    paging = ContinuousBatchingConfig(**{size_of_a_block: 16}, num_blocks=8, max_batch_tokens=32)
    settings = GenerationConfig(eos_token_id=63, pad_token_id=0, **GREEDY)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        outputs = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=paging)
        answers = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        assert [answers[tuple(prompt)] for prompt in prompts] == expected


def test_sampling_is_reproducible(make_gpt, tokens):
    model, draws = make_gpt(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(tokens, do_sample=True, temperature=5.0, max_new_tokens=10))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ---------------------------------------------------------------------------------------------------- pipelines


def test_text_generation_pipeline(make_gpt, tokenizer, tmp_path):
    model = make_gpt(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    settings = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    texts = ["To be", "or not to be, that is"]
    answers = [answer[0]["generated_text"] for answer in generate(texts, batch_size=2, **settings)]
    for text, answer in zip(texts, answers, strict=True):
        prompt = tokenizer(text, return_tensors="pt")
        expected = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)


def test_text_classification_pipeline(make_gpt, tokenizer, tmp_path):
    model = make_gpt(
        ZooGPTForSequenceClassification, pad_token_id=0, id2label={0: "comedy", 1: "history", 2: "tragedy"}
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    texts = ["To be", "or not to be, that is"]
    for text, answer in zip(texts, classify(texts, batch_size=2), strict=True):
        probabilities = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.softmax(-1)[0]
        assert answer["label"] == model.config.id2label[probabilities.argmax().item()]
        assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)
