"""Pictures of a GPT or a BERT: which token looks at which.

L layers, N heads, T tokens
"""

from collections.abc import Iterator, Sequence

import torch
from matplotlib.figure import Figure
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from training import figures
from training.models import evaluating

TEXT = "The list is empty because nobody has put anything into it."


def token_attention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    layer: int | None = None,
    max_tokens: int = 40,
) -> Figure:
    """Draws which token of a text looks at which: every head of every layer, or one layer with the tokens' names.

    Args:
        model: any model of text that returns attention maps, ours or stock.
        layer: counted from 0, or from the end if negative; None: all layers.
        max_tokens: a longer text is cut to this.

    Raises:
        ValueError: the text has no tokens, or the model no such layer.
    """
    max_tokens = min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens))
    inputs = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ValueError(f"text {text!r} has no tokens: give a longer one")
    with evaluating(model):
        attentions = model(**inputs.to(model.device), output_attentions=True).attentions
    attentions = torch.cat(attentions).float().cpu().numpy()  # (L, N, T, T)
    if layer is None:
        return figures.token_attention_overview(attentions)
    if not -len(attentions) <= layer < len(attentions):
        raise ValueError(f"layer {layer} of a model with {len(attentions)} layers")
    return figures.token_attention_heads(attentions[layer], token_names(tokenizer, inputs["input_ids"][0].tolist()))


def token_names(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """Names tokens as a reader sees them.

    White space becomes a sign, and a token that is only part of a character has the tokenizer's own spelling.
    """
    names = []
    for number in ids:
        name = tokenizer.decode([number])
        if not name or "\N{REPLACEMENT CHARACTER}" in name:
            name = tokenizer.convert_ids_to_tokens(number)
        names.append(name.strip() or name.translate({ord(" "): "␣", ord("\n"): "⏎", ord("\t"): "⇥"}))
    return names


def draw_text_model(
    checkpoint: str, config: PreTrainedConfig, images: Sequence[str], text: str | None
) -> Iterator[tuple[str, Figure]]:
    """Yields each figure of a GPT or BERT with its name; see `training.draw`."""
    if images:
        raise ValueError(f"--image: {checkpoint} is a model of text, give --text")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager")
    yield "token_attention", token_attention(model, tokenizer, text or TEXT)
    yield "token_attention_last_layer", token_attention(model, tokenizer, text or TEXT, layer=-1)
