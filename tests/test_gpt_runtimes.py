"""ZooGPT in every runtime: generation, caches, backends, compilers, several processes, Trainer, pipelines, adapters."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy
import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import ContinuousBatchingConfig, GenerationConfig, StaticCache, Trainer, TrainingArguments, pipeline
from transformers.utils import is_flash_attn_2_available

from hf_models import ZooGPTForCausalLM, ZooGPTForSequenceClassification

SAME = {"rtol": 1e-5, "atol": 1e-5}
GREEDY = {"max_new_tokens": 10, "do_sample": False}
TESTS = Path(__file__).parent


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
            outputs = model(piece, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            pieces.append(outputs.logits)
        assert_close(torch.cat(pieces, dim=1), expected, **SAME)


def test_no_cache_is_returned_when_none_is_wanted(make_gpt, tokens):
    assert make_gpt()(tokens, use_cache=False).past_key_values is None
    assert make_gpt(use_cache=False)(tokens).past_key_values is None
    assert make_gpt()(tokens).past_key_values.get_seq_length() == 12


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
    paging = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
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


# ----------------------------------------------------------------------------------------------------- backends


def check_backend(model, backend, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :4], mask[2, 9:] = 0, 0
    real = mask.bool()
    expected, expected_padded = model(tokens).logits, model(tokens, attention_mask=mask).logits
    model.set_attn_implementation(backend)
    assert model.config._attn_implementation == backend
    assert_close(model(tokens).logits, expected, **SAME)
    assert_close(model(tokens, attention_mask=mask).logits[real], expected_padded[real], **SAME)


def test_sdpa_changes_the_speed_and_not_the_logits(make_gpt, options, tokens):
    check_backend(make_gpt(**options), "sdpa", tokens)


@torch.no_grad()  # on a CPU flex attention has no gradient
def test_flex_attention_changes_the_speed_and_not_the_logits(make_gpt, tokens):
    check_backend(make_gpt(num_key_value_heads=2, position_embedding_type="rotary"), "flex_attention", tokens)


def test_a_ready_mask_may_be_given(make_gpt, tokens):
    """(B, 1, T, S), added to the scores: here a window of three tokens."""
    model = make_gpt()
    window = torch.ones(12, 12, dtype=torch.bool).tril().triu(-2)
    bias = torch.zeros(3, 1, 12, 12).masked_fill(~window, torch.finfo(torch.float32).min)
    attentions = model(tokens, attention_mask=bias, output_attentions=True).attentions
    assert all((attention[:, :, ~window] == 0).all() for attention in attentions)


def test_on_a_machine_without_an_accelerator_attention_is_eager_unless_named(make_gpt, tmp_path):
    make_gpt().save_pretrained(tmp_path)
    expected = "sdpa" if torch.accelerator.is_available() else "eager"
    assert ZooGPTForCausalLM.from_pretrained(tmp_path).config._attn_implementation == expected
    named = ZooGPTForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert named.config._attn_implementation == "sdpa"


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed here")
def test_flash_attention_is_dispatched_and_says_what_it_lacks(make_gpt):
    """Further than that it can be tested only where there is a GPU."""
    with pytest.raises(ImportError, match="package for FlashAttention2"):
        make_gpt(attn_implementation="flash_attention_2")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_bfloat16_weights_stay_near_the_float32_answer(make_gpt, options, backend, tokens, tmp_path):
    model = make_gpt(attn_implementation=backend, **options)
    model.save_pretrained(tmp_path)
    half = ZooGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=backend)
    outputs = half(tokens, labels=tokens)
    assert outputs.logits.dtype == torch.bfloat16
    expected = model(tokens, labels=tokens)
    correlation = torch.corrcoef(torch.stack((outputs.logits.float().flatten(), expected.logits.flatten())))[0, 1]
    assert correlation > 0.995
    assert_close(outputs.loss.float(), expected.loss, rtol=0.05, atol=0)
    half.train()(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())
    assert half.eval().generate(tokens, **GREEDY).shape == (3, 22)


# ------------------------------------------------------------------------------- compile, export, checkpointing


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def check_compiled(model, compiler, tokens):
    torch._dynamo.reset()
    expected = model(tokens).logits
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    assert_close(compiled(tokens).logits, expected, **SAME)

    model.train()
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    loss = compiled(tokens, labels=tokens).loss
    loss.backward()
    assert_close(loss, model(tokens, labels=tokens).loss, **SAME)
    assert_close(gradients(model), expected, **SAME)


def test_the_model_is_one_graph_with_and_without_labels(make_gpt, options, tokens):
    check_compiled(make_gpt(**options), "aot_eager", tokens)


def test_the_model_is_one_graph_under_sdpa(make_gpt, tokens):
    check_compiled(make_gpt(attn_implementation="sdpa"), "aot_eager", tokens)


def test_the_compiler_gives_the_same_numbers(make_gpt, tokens):
    check_compiled(make_gpt(num_hidden_layers=1), "inductor", tokens)


def test_packed_documents_are_one_graph(make_gpt, tokens):
    torch._dynamo.reset()
    model = make_gpt()
    position_ids = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(tokens, position_ids=position_ids, use_cache=False).logits
    assert_close(actual, model(tokens, position_ids=position_ids, use_cache=False).logits, **SAME)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_model_can_be_exported_for_any_batch_and_length(make_gpt, options, backend, tokens):
    model = make_gpt(attn_implementation=backend, **options)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        model, (), {"input_ids": tokens, "use_cache": False}, dynamic_shapes={"input_ids": sizes, "use_cache": None}
    )
    longer = torch.randint(0, 64, (2, 30))
    for ids in (tokens, longer):
        assert_close(program.module()(input_ids=ids, use_cache=False).logits, model(ids).logits, **SAME)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(make_gpt, options, use_reentrant, tokens):
    model = make_gpt(**options).train()
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.transformer.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    model(tokens, labels=tokens).loss.backward()
    assert len(calls) == 2  # once forward and once again for the backward pass
    assert_close(gradients(model), expected, **SAME)


# -------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_two_processes_compute_what_one_does(make_gpt, kind, tmp_path):
    """Tensor parallelism splits every matrix, FSDP every parameter; a tied head and a norm that is not there too."""
    kinds = {
        "gpt2": {},
        "gpt1": {"norm_position": "post"},
        "modern": {"position_embedding_type": "rotary", "qk_norm": True, "norm": "rmsnorm", "use_bias": False},
        "grouped": {"num_key_value_heads": 2, "hidden_act": "swiglu", "tie_word_embeddings": False},
    }
    for name, fields in kinds.items():
        make_gpt(**fields).save_pretrained(tmp_path / name)
    script = [TESTS / "gpt_on_two_processes.py", kind, *(tmp_path / name for name in kinds)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*torchrun, *script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("same") == 2


# ------------------------------------------------------------------------------------------------------ Trainer


class Rows(torch.utils.data.Dataset):
    """Rows of tokens that count upwards from a random one, some of each not scored."""

    def __init__(self, num_rows=16, num_classes=None):
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(0, 64, (num_rows, 1), generator=generator)
        self.tokens = (starts + torch.arange(12)) % 64
        self.labels = self.tokens.clone()
        for row in range(num_rows):
            self.labels[row, : row % 8] = -100
        if num_classes:
            self.labels = self.tokens[:, 0] % num_classes

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def train(model, rows, folder, compute_metrics=None, **arguments):
    arguments = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **arguments,
    }
    settings = TrainingArguments(folder, **arguments)
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def accuracy(prediction):
    guesses, labels = numpy.argmax(prediction.predictions[:, :-1], -1), prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean())}


def test_trainer_trains_evaluates_and_saves(make_gpt, tmp_path):
    model = make_gpt(position_embedding_type="rotary")
    trainer = train(model, Rows(), tmp_path, accuracy, max_steps=40, optim="adamw_torch", learning_rate=0.01)
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    measured = trainer.evaluate()
    assert measured["eval_accuracy"] > 0.8 and measured["eval_loss"] < losses(trainer)[0]
    trainer.save_model(tmp_path / "saved")
    again = ZooGPTForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert (tmp_path / "saved" / "gpt.py").exists()


@pytest.mark.parametrize("head", ["language model", "classifier"])
def test_trainer_accumulation_changes_nothing(make_gpt, tmp_path, head):
    """Two batches of two are one batch of four, though their rows do not score equally many tokens."""
    model_class = ZooGPTForCausalLM if head == "language model" else ZooGPTForSequenceClassification
    rows = Rows(num_classes=None if head == "language model" else 3)
    whole = make_gpt(model_class, num_labels=3, pad_token_id=None if head == "language model" else 63)
    parts = copy.deepcopy(whole)
    expected = train(whole, rows, tmp_path)
    actual = train(parts, rows, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-3)
    assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ pipelines, adapters, sizes


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


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear", ["lm_head"]], ids=str)
def test_lora_trains_its_own_weights_alone(make_gpt, options, target_modules, tokens, tmp_path):
    model = make_gpt(**options)
    weights = copy.deepcopy(model.state_dict())
    logits = model(tokens).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM"))
    assert torch.equal(adapted(tokens).logits, logits)  # an adapter begins as nothing
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    history = []
    for _ in range(5):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0]
    adapted.eval()
    expected = adapted(tokens).logits
    adapted.save_pretrained(tmp_path)
    with adapted.disable_adapter():
        assert_close(adapted(tokens).logits, logits)
    original = make_gpt(**options)
    original.load_state_dict(weights)
    assert_close(peft.PeftModel.from_pretrained(original, tmp_path)(tokens).logits, expected, **SAME)
    if (
        target_modules != ["lm_head"] or not model.config.tie_word_embeddings
    ):  # merged, the tied head moves the embedding
        assert_close(adapted.merge_and_unload()(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [80, 40])
def test_the_vocabulary_can_be_resized(make_gpt, options, vocab_size, tmp_path):
    model = make_gpt(**options)
    tokens = torch.randint(0, 40, (2, 12))
    with torch.no_grad():
        expected = model(tokens).logits
    model.resize_token_embeddings(vocab_size)
    assert model.config.vocab_size == vocab_size
    assert model.lm_head.out_features == vocab_size
    kept = min(vocab_size, 64)
    assert_close(model(tokens).logits[..., :kept], expected[..., :kept], **SAME)
    assert (model.lm_head.weight is model.transformer.embed_tokens.weight) == model.config.tie_word_embeddings
    model.train()(tokens, labels=tokens).loss.backward()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(ZooGPTForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
