"""The options of the scripts that train on plain text."""

from dataclasses import dataclass
from typing import Any

from training.run.arguments import RunArguments, option


@dataclass
class TextArguments(RunArguments):
    """The options that all scripts for plain text share."""

    config: str | None = option(None, "fields to change in it: 'hidden_size=256,num_hidden_layers=8'", "model")
    tokenizer: str = option("bpe", "'bpe', 'char' or 'wordpiece', made from the data, or an existing one", "text")
    vocab_size: int = option(4096, "most tokens of a 'bpe' or 'wordpiece' tokenizer", "text")
    text_column: str = option("text", "column of .jsonl, .parquet and Hub data sets", "text")
    validation_fraction: float = option(0.1, "part of the text to hold out where the data has no such split", "text")
    streaming: bool = option(False, "read a Hub data set as it arrives instead of downloading it first", "text")
    eval_batch_size: int = option(16, "rows of an evaluation batch", "text", at_least=1)

    @property
    def reading(self) -> dict[str, Any]:
        """What `training.data.documents.read_documents` takes besides the data."""
        names = ("text_column", "validation_fraction", "streaming")
        return {name: getattr(self, name) for name in names}
