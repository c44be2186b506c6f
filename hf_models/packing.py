"""Chooses the tokens to compute: skips padding everywhere, and in the last block skips tokens whose output is not used.

B  batch    T  tokens    M  chosen tokens    D  hidden size
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import packed_sequence_mask_function


class Packing:
    """Joins the chosen tokens of a batch end to end in one row.

    Without padding, only attention computes on it (Warner et al. 2024, "ModernBERT", section 2.1.3). In the last block
    the chosen tokens are those whose output is used.

    Args:
        is_chosen: (B, T), true for the chosen tokens.
        lengths: (sequences,), the number of tokens of each sequence in their order, for `flash_arguments`.
    """

    def __init__(self, is_chosen: Tensor, lengths: Tensor | None = None):
        self.batch_shape = is_chosen.shape
        self.indices = is_chosen.flatten().nonzero().squeeze(1)  # (M,), into the B T tokens
        self.lengths = lengths

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (1, M, ...)."""
        return padded.flatten(0, 1).index_select(0, self.indices.to(padded.device))[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, M, ...) -> (B, T, ...), zero where no token was chosen."""
        padded = packed.new_zeros(self.batch_shape.numel(), *packed.shape[2:])
        return padded.index_copy_(0, self.indices.to(packed.device), packed[0]).unflatten(0, self.batch_shape)

    def flash_arguments(self) -> dict:
        """The keyword arguments that tell flash attention, which takes no mask, where each sequence begins and ends."""
        assert self.lengths is not None
        ends = F.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(self.lengths.max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


class FirstToken:
    """Chooses the first of the T tokens of each row, as `Packing` could, but keeps the rows apart."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def pack(self, states: Tensor) -> Tensor:
        """(B, T, ...) -> (B, 1, ...)."""
        return states[:, :1].contiguous()

    def unpack(self, states: Tensor) -> Tensor:
        """(B, 1, ...) -> (B, T, ...), zero after the first token."""
        return F.pad(states, (0, 0) * (states.ndim - 2) + (0, self.num_tokens - 1))


def find_packing(
    attention_mask: Tensor | None, position_ids: Tensor | None, uses_flash: bool, uses_first: bool
) -> Packing | None:
    """Returns how to compute a batch without padding, or None if it has no padding to skip.

    Args:
        attention_mask: None; or (B, T) with 0 for padding; or a complete mask, with which nothing is skipped.
        position_ids: None or (B, T). Without a mask, a 0 marks the start of a sequence; a row may hold several.
        uses_flash: whether attention takes `Packing.flash_arguments`. Then rows of several sequences are packed, too.
        uses_first: whether the first token of every row is used, so that it must not be padding.
    """
    if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask.all():
        if uses_first and not attention_mask[:, 0].all():
            return None
        is_token = attention_mask.bool()
        return Packing(is_token, is_token.sum(1))
    if attention_mask is None and position_ids is not None and uses_flash:
        is_start = position_ids == 0
        is_start[:, 0] = True
        starts = is_start.flatten().nonzero().squeeze(1)
        ends = torch.cat((starts[1:], starts.new_tensor([position_ids.numel()])))
        return Packing(torch.ones_like(position_ids), ends - starts)
    return None


def find_output_tokens(
    embeddings: Tensor, packing: Packing | None, read_places: Tensor | None, only_first: bool
) -> Packing | FirstToken | None:
    """Returns the tokens whose output the last block must compute, or None for all of them.

    Args:
        embeddings: (B, T, D), the batch before packing.
        packing: the `Packing` of the batch, or None.
        read_places: None or (B, T), true where the last states are used.
        only_first: whether only the states of the first tokens are used.
    """
    if only_first and packing is None:
        return FirstToken(embeddings.shape[1])
    if only_first:
        is_first = torch.arange(embeddings.shape[1], device=embeddings.device) == 0
        read_places = is_first.expand(embeddings.shape[:2])
    if read_places is None:
        return None
    return Packing(read_places if packing is None else packing.pack(read_places))


def same_sequence(position_ids):
    """Returns a function for `create_bidirectional_mask` that says whether two tokens are of one sequence.

    In `position_ids` (B, T) a 0 marks the start of a sequence; a row may hold several.
    """
    return packed_sequence_mask_function((position_ids == 0).cumsum(-1))
