"""The model that `--model` names: a fresh one of the zoo, or a checkpoint to start from."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_models import create_model
from training.arguments import parse_fields


def is_checkpoint(name: str) -> bool:
    """Whether `--model` names a folder or Hub repository, and not a size of the zoo."""
    return "/" in name or Path(name).exists()


def create_text_model(
    name: str,
    model_class: type[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    num_tokens: int,
    device: torch.device,
    config: str | None = None,
) -> PreTrainedModel:
    """A fresh model of the zoo that fits the tokenizer, or a checkpoint of the same family, ours or stock, to go on
    from.

    Args:
        num_tokens: the most tokens of a row.
        config: fields to change in the config, as `--config` takes them.

    Raises:
        ValueError: the zoo has no such name, or the checkpoint has another vocabulary or fewer positions.
    """
    options = {"attn_implementation": "eager" if device.type == "cpu" else "sdpa", **parse_fields(config)}
    if is_checkpoint(name):
        model = model_class.from_pretrained(name, dtype=torch.float32, **options)
        if len(tokenizer) > model.config.vocab_size or not is_own_tokenizer(tokenizer, name):
            raise ValueError(
                f"the tokenizer, of {len(tokenizer)} tokens, is not the one {name} was trained with, of "
                f"{model.config.vocab_size}: give --tokenizer {name}"
            )
    else:
        from_data = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": num_tokens,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        model = create_model(name, model_class, **{**from_data, **options})
    if num_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"{num_tokens} tokens a row is more than the {model.config.max_position_embeddings} positions of {name}"
        )
    return model


def is_own_tokenizer(tokenizer: PreTrainedTokenizerFast, checkpoint: str) -> bool:
    """Whether the checkpoint has the same vocabulary; true if it has none to compare with."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint).get_vocab() == tokenizer.get_vocab()
    except (OSError, ValueError):
        return True
