"""Every family in every runtime: attention backends, compilers, checkpointing, several processes, Trainer, adapters.

What only one family can do, such as generation, is in the file of that family.
"""

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
from transformers import Trainer, TrainingArguments
from transformers.utils import is_flash_attn_2_available

from hf_models.attention import MultiHeadAttention
from tests.families import (
    EACH_BLOCK_ONCE,
    MAIN_CASES,
    ONE_GRAPH,
    WITH_A_HEAD,
    checkpoint_activations,
    every_family,
    every_family_of_one_stack,
    every_family_of_text,
    family_of,
    gradients,
    inputs_for,
    labels_for,
    rotary,
    tensors,
)

SAME = {"rtol": 1e-5, "atol": 1e-5}
TESTS = Path(__file__).parent
LANGUAGE_MODELS = {name: case for name, case in MAIN_CASES.items() if family_of(case.model_class).of_text}

each_block_once = pytest.mark.parametrize("case", EACH_BLOCK_ONCE.values(), ids=EACH_BLOCK_ONCE.keys())
every_head = pytest.mark.parametrize("case", WITH_A_HEAD.values(), ids=WITH_A_HEAD.keys())
every_step_of_one_graph = pytest.mark.parametrize("case", ONE_GRAPH.values(), ids=ONE_GRAPH.keys())
every_class_with_a_head = pytest.mark.parametrize(
    "case",
    {case.model_class: case for case in reversed(WITH_A_HEAD.values())}.values(),
    ids=lambda case: case.model_class.__name__,
)
every_main_case = pytest.mark.parametrize("case", MAIN_CASES.values(), ids=MAIN_CASES.keys())
every_language_model = pytest.mark.parametrize("case", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS.keys())


# ----------------------------------------------------------------------------------------------------- backends


def check_backend(model, backend):
    inputs = inputs_for(type(model))
    expected = model(**inputs).logits
    if family_of(type(model)).of_text:
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[1, :4], mask[2, 9:] = 0, 0
        expected_padded = model(**inputs, attention_mask=mask).logits
    model.set_attn_implementation(backend)
    assert model.config._attn_implementation == backend
    assert_close(model(**inputs).logits, expected, **SAME)
    if family_of(type(model)).of_text:
        real = mask.bool()
        assert_close(model(**inputs, attention_mask=mask).logits[real], expected_padded[real], **SAME)


@every_main_case
def test_sdpa_changes_the_speed_and_not_the_logits(make_model, case):
    check_backend(make_model(case.model_class, **case.fields), "sdpa")


@every_family
@torch.no_grad()  # on a CPU flex attention has no gradient
def test_flex_attention_changes_the_speed_and_not_the_logits(make_model, family):
    fields = {"num_key_value_heads": 2, "num_hidden_layers": 1, **rotary(family)}
    check_backend(make_model(family.main_class, **fields), "flex_attention")


@every_family_of_text
def test_a_ready_mask_may_be_given(make_model, family, tokens):
    """(B, 1, T, S), added to the scores: here a window of three tokens."""
    model = make_model(family.main_class)
    window = torch.ones(12, 12, dtype=torch.bool).tril().triu(-2)
    bias = torch.zeros(3, 1, 12, 12).masked_fill(~window, torch.finfo(torch.float32).min)
    attentions = model(tokens, attention_mask=bias, output_attentions=True).attentions
    assert all((attention[:, :, ~window] == 0).all() for attention in attentions)


@every_family
def test_on_a_machine_without_an_accelerator_attention_is_eager_unless_named(make_model, family, tmp_path):
    make_model(family.main_class).save_pretrained(tmp_path)
    expected = "sdpa" if torch.accelerator.is_available() else "eager"
    assert family.main_class.from_pretrained(tmp_path).config._attn_implementation == expected
    named = family.main_class.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert named.config._attn_implementation == "sdpa"


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed here")
@every_family
def test_flash_attention_is_dispatched_and_says_what_it_lacks(make_model, family):
    """Further than that it can be tested only where there is a GPU."""
    with pytest.raises(ImportError, match="package for FlashAttention2"):
        make_model(family.main_class, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@every_main_case
def test_bfloat16_weights_stay_near_the_float32_answer(make_model, case, backend, tmp_path):
    model, inputs = make_model(case.model_class, backend, **case.fields), inputs_for(case.model_class)
    labels = {"labels": inputs["input_ids"]} if "input_ids" in inputs else labels_for(case.model_class, inputs)
    model.save_pretrained(tmp_path)
    half = case.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=backend)
    outputs, expected = half(**inputs, **labels), model(**inputs, **labels)
    assert half.base_model(**inputs).last_hidden_state.dtype == torch.bfloat16
    correlation = torch.corrcoef(torch.stack((outputs.logits.float().flatten(), expected.logits.flatten())))[0, 1]
    assert correlation > 0.995
    assert_close(outputs.loss.float(), expected.loss, rtol=0.05, atol=0)
    half.train()(**inputs, **labels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters() if parameter.requires_grad)
    if half.can_generate():
        assert half.eval().generate(**inputs, max_new_tokens=10, do_sample=False).shape == (3, 22)


# ------------------------------------------------------------------------------- compile, export, checkpointing


def inputs_and_labels_for(model_class):
    inputs = inputs_for(model_class)
    return inputs | labels_for(model_class, inputs)


def check_compiled(model, compiler, **inputs):
    torch._dynamo.reset()
    expected = model(**inputs)
    outputs = torch.compile(model, fullgraph=True, backend=compiler)(**inputs)
    assert_close(tensors(outputs), tensors(expected), **SAME)
    if model.training:
        expected.loss.backward()
        expected_gradients = gradients(model)
        outputs.loss.backward()
        assert_close(gradients(model), expected_gradients, **SAME)


@each_block_once
def test_the_model_is_one_graph(make_model, case):
    model = make_model(case.model_class, **case.fields, num_hidden_layers=1)
    check_compiled(model, "aot_eager", **inputs_for(case.model_class))


@every_step_of_one_graph
def test_a_training_step_is_one_graph(make_model, case):
    model = make_model(case.model_class, **case.fields, num_hidden_layers=1).train()
    check_compiled(model, "aot_eager", **inputs_and_labels_for(case.model_class))


@every_family_of_one_stack
def test_a_training_step_is_one_graph_under_sdpa(make_model, family):
    model = make_model(family.main_class, attn_implementation="sdpa", num_hidden_layers=1).train()
    check_compiled(model, "aot_eager", **inputs_and_labels_for(family.main_class))


@pytest.mark.slow
@every_family_of_one_stack
def test_the_compiler_gives_the_same_numbers(make_model, family):
    model = make_model(family.main_class, num_hidden_layers=1).train()
    check_compiled(model, "inductor", **inputs_and_labels_for(family.main_class))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@every_family_of_text
def test_padded_rows_are_one_graph(make_model, family, backend, sentences):
    torch._dynamo.reset()
    model = make_model(family.main_class, attn_implementation=backend, num_hidden_layers=1)
    inputs = {name: sentences[name] for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**inputs).logits[real], model(**inputs).logits[real], **SAME)


@every_family_of_text
def test_packed_documents_are_one_graph(make_model, family, tokens):
    position_ids = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    asked = {"position_ids": position_ids, **labels_for(family.main_class, {"input_ids": tokens})}
    model = make_model(family.main_class, num_hidden_layers=1).train()
    check_compiled(model, "aot_eager", input_ids=tokens, **asked)


@pytest.mark.parametrize("backend", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
@each_block_once
def test_the_model_can_be_exported_for_any_batch_and_length(make_model, case, backend):
    model = make_model(case.model_class, backend, **case.fields, num_hidden_layers=1)
    inputs = inputs_for(case.model_class)
    model.config.use_cache = False
    any_size = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}
    other = {name: value[:2] for name, value in inputs.items()}
    if family_of(case.model_class).of_text:
        any_size["input_ids"][1] = torch.export.Dim.DYNAMIC
        other = {"input_ids": torch.randint(1, 64, (2, 30))}
    program = torch.export.export(model, (), inputs, dynamic_shapes=any_size).module()
    for given in (inputs, other):
        assert_close(tensors(program(**given)), tensors(model(**given)), **SAME)


@every_step_of_one_graph
def test_the_model_can_be_exported_with_labels(make_model, case):
    model = make_model(case.model_class, **case.fields, num_hidden_layers=1)
    inputs = inputs_and_labels_for(case.model_class)
    model.config.use_cache = False
    model.config.problem_type = "single_label_classification"  # a graph cannot settle it from the labels
    assert_close(tensors(torch.export.export(model, (), inputs).module()(**inputs)), tensors(model(**inputs)), **SAME)


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_head
def test_gradient_checkpointing_gives_the_same_gradients(make_model, case, use_reentrant):
    model, inputs = make_model(case.model_class, **case.fields).train(), inputs_and_labels_for(case.model_class)
    model(**inputs).loss.backward()
    expected = gradients(model)
    checkpoint_activations(model, use_reentrant)
    calls = []
    attention = next(module for module in model.modules() if isinstance(module, MultiHeadAttention))
    attention.register_forward_hook(lambda *_: calls.append(1))
    model(**inputs).loss.backward()
    assert len(calls) == 2  # once forward and once again for the backward pass
    assert_close(gradients(model), expected, **SAME)


# -------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_two_processes_compute_what_one_does(make_model, kind, tmp_path):
    """Tensor parallelism splits every matrix, FSDP every parameter; a tied head and a norm that is not there too."""
    for name in EACH_BLOCK_ONCE.keys() & MAIN_CASES.keys():
        make_model(MAIN_CASES[name].model_class, **MAIN_CASES[name].fields).save_pretrained(tmp_path / name)
    script = [TESTS / "on_two_processes.py", kind, *sorted(tmp_path.iterdir())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(TESTS.parent),
    }
    done = subprocess.run([*torchrun, *script], capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("same") == 2


# ------------------------------------------------------------------------------------------------------ Trainer


class Images(torch.utils.data.Dataset):
    """Images of noise, in each of which a row of patches brighter than the others tells the class."""

    def __init__(self, model_class, num_rows=16):
        self.labelled = "Classification" in model_class.__name__
        self.pixels = torch.randn(num_rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        for index in range(num_rows):
            self.pixels[index, :, 4 * (index % 3) : 4 * (index % 3 + 1)] += 2

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        if self.labelled:
            return {"pixel_values": self.pixels[index], "labels": index % 3}
        noise = torch.rand(16, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": self.pixels[index], "noise": noise}


class Scenes(torch.utils.data.Dataset):
    """Images of noise with one bright rectangle each, whose colour tells its class."""

    def __init__(self, model_class, num_rows=16):
        generator = torch.Generator().manual_seed(0)
        self.pixels = 0.1 * torch.randn(num_rows, 3, 24, 32, generator=generator)
        self.corners = torch.randint(0, 12, (num_rows, 2), generator=generator)
        for index, (row, column) in enumerate(self.corners):
            self.pixels[index, index % 3, row : row + 12, column : column + 16] += 2

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        row, column = self.corners[index].tolist()
        box = torch.tensor([[(column + 8) / 32, (row + 6) / 24, 16 / 32, 12 / 24]])
        return {"pixel_values": self.pixels[index], "labels": {"class_labels": torch.tensor([index % 3]), "boxes": box}}

    @staticmethod
    def collate(rows):
        """As transformers' examples do: the labels of a batch are a list."""
        images, labels = zip(*(row.values() for row in rows), strict=True)
        return {"pixel_values": torch.stack(images), "labels": list(labels)}


class Rows(torch.utils.data.Dataset):
    """Rows of tokens that count upwards from a random one, with labels for a class; not all score equally many."""

    def __init__(self, model_class, num_rows=16):
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(0, 62, (num_rows, 1), generator=generator)
        self.tokens = (starts + torch.arange(12)) % 62 + 1
        self.name = model_class.__name__

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens, places = self.tokens[index], torch.arange(12)
        if self.name.endswith("ForSequenceClassification"):
            return {"input_ids": tokens, "labels": tokens[0] % 3}
        if self.name.endswith("ForQuestionAnswering"):
            return {"input_ids": tokens, "start_positions": index % 4, "end_positions": index % 4 + 3}
        scored = places >= index % 8
        if self.name.endswith("ForTokenClassification"):
            return {"input_ids": tokens, "labels": (tokens % 3).where(scored, -100)}
        if self.name.endswith("ForCausalLM"):
            return {"input_ids": tokens, "labels": tokens.where(scored, -100)}
        masked = scored & (places % 2 == index % 2)
        row = {"input_ids": tokens.where(~masked, 63), "labels": tokens.where(masked, -100)}
        return row | ({"next_sentence_label": index % 2} if self.name.endswith("ForPreTraining") else {})


def train(model, folder, compute_metrics=None, **arguments):
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
    detects = type(model).__name__.endswith("ForObjectDetection")
    rows = (Rows if family_of(type(model)).of_text else Scenes if detects else Images)(type(model))
    settings = TrainingArguments(folder, **arguments)
    trainer = Trainer(
        model,
        settings,
        data_collator=rows.collate if detects else None,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    return trainer


def rate_of(model_class):
    """A learning rate for plain gradient descent. DETR's boxes and classes have large gradients at first."""
    return 0.001 if model_class.__name__.endswith("ForObjectDetection") else 0.1


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@every_family
def test_trainer_trains_evaluates_and_saves(make_model, family, tmp_path):
    """Evaluating, it gets the logits of all places, as from a stock model."""
    kind = family.main_class.__name__

    def accuracy(prediction):
        guesses, labels = numpy.argmax(prediction.predictions, -1), prediction.label_ids
        if kind.endswith("ForCausalLM"):
            guesses, labels = guesses[:, :-1], labels[:, 1:]
        return {"accuracy": float((guesses == labels)[labels != -100].mean())}

    # A masked autoencoder is its own judge: what it gets is what it is to give.
    arguments = {"label_names": ["pixel_values"]} if kind.endswith("MAEForPreTraining") else {}
    model = make_model(family.main_class, norm_position="pre", **rotary(family))
    judge = None if arguments or kind.endswith("ForObjectDetection") else accuracy
    trainer = train(model, tmp_path, judge, max_steps=100, optim="adamw_torch", learning_rate=0.01, **arguments)
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    measured = trainer.evaluate()
    assert measured["eval_loss"] < losses(trainer)[0] and measured.get("eval_accuracy", 1.0) > 0.8
    trainer.save_model(tmp_path / "saved")
    again = family.main_class.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert {"base.py", "layers.py"} < {path.name for path in (tmp_path / "saved").glob("*.py")}


@every_class_with_a_head
def test_trainer_accumulation_changes_nothing(make_model, case, tmp_path):
    """Two batches of two are one batch of four, though their rows do not score equally many tokens."""
    ends = {"pad_token_id": 0} if family_of(case.model_class).of_text else {}
    whole = make_model(case.model_class, **{**case.fields, **ends})
    parts = copy.deepcopy(whole)
    rate = {"learning_rate": rate_of(case.model_class)}
    expected = train(whole, tmp_path, **rate)
    actual = train(parts, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **rate)
    if case.model_class.__name__.endswith("BertForPreTraining"):
        return  # two losses with counts of their own, of which `Trainer` knows one: it trains, by means of means
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-3)
    assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------- adapters and sizes


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear", "head"], ids=str)
@every_main_case
def test_lora_trains_its_own_weights_alone(make_model, case, target_modules, tmp_path):
    model, inputs = make_model(case.model_class, **case.fields), inputs_for(case.model_class)
    labels = {"labels": inputs["input_ids"]} if "input_ids" in inputs else labels_for(case.model_class, inputs)
    if target_modules == "head":
        head = model.get_output_embeddings() if "input_ids" in inputs else list(model.modules())[-1]
        (target,) = (name for name, module in model.named_modules() if module is head)
        target_modules = [target]
    weights = copy.deepcopy(model.state_dict())
    logits = model(**inputs).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target_modules))
    assert torch.equal(adapted(**inputs).logits, logits)  # an adapter begins as nothing
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=rate_of(case.model_class))
    history = []
    for _ in range(5):
        loss = adapted(**inputs, **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0]
    adapted.eval()
    expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path)
    with adapted.disable_adapter():
        assert_close(adapted(**inputs).logits, logits)
    original = make_model(case.model_class, **case.fields)
    original.load_state_dict(weights)
    assert_close(peft.PeftModel.from_pretrained(original, tmp_path)(**inputs).logits, expected, **SAME)
    tied = "input_ids" in inputs and model.config.tie_word_embeddings
    if not (tied and len(target_modules) == 1):  # merged, the tied head moves the embedding
        assert_close(adapted.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [80, 40])
@every_language_model
def test_the_vocabulary_can_be_resized(make_model, case, vocab_size, tmp_path):
    model = make_model(case.model_class, **case.fields)
    tokens = torch.randint(0, 40, (2, 12))
    with torch.no_grad():
        expected = model(tokens).logits
    model.resize_token_embeddings(vocab_size)
    assert model.config.vocab_size == vocab_size
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.out_features == vocab_size and (head.bias is None or head.bias.shape == (vocab_size,))
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings
    kept = min(vocab_size, 64)
    outputs = model(tokens)
    assert outputs.logits.shape == (2, 12, vocab_size)
    assert_close(outputs.logits[..., :kept], expected[..., :kept], **SAME)
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(case.model_class.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
