"""The model and the tokenizer to fine-tune on a task: a BERT or a GPT, from a checkpoint or new."""

import torch
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

import hf_models
from hf_models.zoo import find_entry
from training.models import create_text_model
from training.run.arguments import is_checkpoint
from training.tasks.classification import RegressionTask
from training.tasks.task import Task
from training.text.tokenizer import make_tokenizer


def find_family(model: str) -> str:
    """Finds out whether a name of the zoo or a checkpoint is a "Bert" or a "GPT".

    Raises:
        ValueError: it is neither, or the checkpoint does not load.
    """
    families = {"zoo_bert": "Bert", "bert": "Bert", "zoo_gpt": "GPT", "gpt2": "GPT"}
    if is_checkpoint(model):
        try:
            model_type = AutoConfig.from_pretrained(model).model_type
        except OSError as error:
            raise ValueError(f"--model {model} is no checkpoint that loads: {error}") from error
    else:
        model_type = find_entry(model).config_class.model_type
    if model_type not in families:
        raise ValueError(f"--model {model} is a {model_type!r}; this script fine-tunes {', '.join(families)}")
    return families[model_type]


def end_texts(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Makes a GPT's tokenizer end every text, and separate the texts of a pair, with the end-of-text token.

    A GPT's answer is read at the last token (Radford et al. 2018, section 3.3), so that even an empty text has one.
    """
    end = tokenizer.eos_token
    if end is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token: set its eos_token")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if backend.encode("").tokens != [end]:  # else the tokenizer of a fine-tuned checkpoint has it already
        joined = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
        former = [backend.post_processor] if backend.post_processor else []
        backend.post_processor = processors.Sequence([*former, joined])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=end,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token or end,
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def create_tokenizer(
    model: str, kind: str | None, task: Task, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Makes or loads the tokenizer of a task's model.

    Args:
        kind: as `make_tokenizer` takes it. None: the checkpoint's tokenizer, or for a new model one that is made from
            the texts of the task.
    """
    family = find_family(model)
    made = "wordpiece" if family == "Bert" else "bpe"
    kind = kind or (model if is_checkpoint(model) else made)
    tokenizer = make_tokenizer(kind, task.corpus(), vocab_size, context_length=max_length, masked=family == "Bert")
    return tokenizer if family == "Bert" else end_texts(tokenizer)


def create_task_model(
    name: str,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    device: torch.device,
    config: str | None = None,
    class_weights: list[float] | None = None,
) -> PreTrainedModel:
    """Loads a checkpoint, or creates a new model of the zoo, with a head for the task.

    A checkpoint keeps its head if the head has the right size.

    Raises:
        ValueError: there is no such model or no such head, or the model has fewer tokens or positions than are needed.
    """
    family = find_family(name)
    model_class = getattr(hf_models, f"Zoo{family}For{task.head}", None)
    if model_class is None:
        raise ValueError(f"a {family} has no head for this task ({task.pipeline}): start from a BERT")
    pad = tokenizer.pad_token_id
    if pad == tokenizer.eos_token_id:
        pad = None  # a GPT answers at the end-of-text token and, without a mask, would take it for padding
    fields = {"class_weights": class_weights, "pad_token_id": pad}
    if task.label_names:
        fields["id2label"] = dict(enumerate(task.label_names))
        fields["label2id"] = {name: number for number, name in enumerate(task.label_names)}
    if task.head == "SequenceClassification":
        fields["problem_type"] = "regression" if isinstance(task, RegressionTask) else "single_label_classification"
    if task.head == "QuestionAnswering":
        fields["null_threshold"] = task.null_threshold
    return create_text_model(
        name, model_class, tokenizer, max_length, device, config, new_head=True, length_option="max_length", **fields
    )
