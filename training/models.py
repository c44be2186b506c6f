"""The model that `--model` names: a fresh one of the zoo, or a checkpoint to start from."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_models.zoo import check_fields, create_model
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
    new_head: bool = False,
    length_option: str = "num_tokens",
    **fields,
) -> PreTrainedModel:
    """A fresh model of the zoo that fits the tokenizer, or a checkpoint of the same family, ours or stock, to go on
    from.

    Args:
        num_tokens: the most tokens of a row.
        config: fields to change in the config, as `--config` takes them.
        new_head: a head of another size than the checkpoint's begins anew.
        length_option: the option that `num_tokens` comes from, for an error.
        **fields: more fields of the config.

    Raises:
        ValueError: the zoo has no such name, the config no such field, or the checkpoint has another vocabulary, other
            sizes or fewer positions.
    """
    given = parse_fields(config)
    check_fields(model_class.config_class, given)
    fields = {"attn_implementation": "eager" if device.type == "cpu" else "sdpa", **fields, **given}
    if is_checkpoint(name):
        model, info = model_class.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **fields
        )
        for key, *_ in sorted(info["mismatched_keys"]):  # these would begin anew
            if not new_head or key.startswith(f"{model.base_model_prefix}."):
                raise ValueError(f"config: {key} of {name} has another size; leave its size unchanged")
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
        model = create_model(name, model_class, **{**from_data, **fields})
    if num_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"{length_option} {num_tokens} is more than the {model.config.max_position_embeddings} positions of "
            f"{name}: give at most {model.config.max_position_embeddings}"
        )
    return model


def is_own_tokenizer(tokenizer: PreTrainedTokenizerFast, checkpoint: str) -> bool:
    """Whether the checkpoint has the same vocabulary; true if it has none to compare with."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint).get_vocab() == tokenizer.get_vocab()
    except (OSError, ValueError):
        return True
