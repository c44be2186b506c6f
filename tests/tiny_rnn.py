"""A model without attention, heads or positions, for test_base.py: what the first step of the base asks of a family."""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hf_models.base import ZooConfig, ZooModel


@strict
class TinyRNNConfig(ZooConfig):
    model_type = "tiny_rnn"
    attribute_map = {"n_embd": "width"}
    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "tiny_rnn.TinyRNNConfig",
        "AutoModel": "tiny_rnn.TinyRNNModel",
    }
    _auto_class = "AutoConfig"

    width: int = 8
    num_inputs: int | None = None

    def derive_fields(self):
        super().derive_fields()
        if self.num_inputs is None:
            self.num_inputs = self.width // 2


class TinyRNNModel(ZooModel):
    config_class = TinyRNNConfig
    main_input_name = "inputs"
    _auto_class = "AutoModel"

    def __init__(self, config: TinyRNNConfig):
        super().__init__(config)
        self.lstm = nn.LSTM(config.num_inputs, config.width, batch_first=True)
        self.post_init()

    def forward(self, inputs: torch.Tensor, **kwargs) -> BaseModelOutput:
        """(B, T, num_inputs) -> (B, T, width)."""
        self.check_keywords(kwargs)
        return BaseModelOutput(last_hidden_state=self.lstm(inputs)[0])
