"""Which tokens of a batch are computed: none that pad it, and in the last block none that nobody reads.

B  batch    T  tokens    M  chosen tokens    D  hidden size
"""

import torch
import torch.nn.functional as F
from transformers.masking_utils import packed_sequence_mask_function


class Packing:
    """Chosen tokens of a batch laid end to end: without its padding, so that only attention ever computes on that
    (Warner et al. 2024, "ModernBERT", section 2.1.3), or those alone that the last block is asked for.

    Args:
        is_chosen: (B, T), true where there is a token and not padding, or where one is asked for.
        lengths: (sequences,), the number of tokens of each sequence in that order, for `borders`.
    """

    def __init__(self, is_chosen, lengths=None):
        self.batch_shape = is_chosen.shape
        self.places = is_chosen.flatten().nonzero().squeeze(1)  # (M,), M tokens among the B T places
        self.lengths = lengths

    def pack(self, padded):
        """(B, T, ...) -> (1, M, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places.to(padded.device))[None]

    def unpack(self, packed):
        """(1, M, ...) -> (B, T, ...), zero where there is no token."""
        padded = packed.new_zeros(self.batch_shape.numel(), *packed.shape[2:])
        return padded.index_copy_(0, self.places.to(packed.device), packed[0]).unflatten(0, self.batch_shape)

    def borders(self):
        """What flash attention takes instead of padding and mask, by transformers' names for it."""
        ends = F.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(self.lengths.max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


class FirstToken:
    """The first of the T tokens of each sequence: chosen as by `Packing`, but apart for each sequence."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def pack(self, states):
        """(B, T, ...) -> (B, 1, ...)."""
        return states[:, :1].contiguous()

    def unpack(self, states):
        """(B, 1, ...) -> (B, T, ...), zero behind the first token."""
        return F.pad(states, (0, 0) * (states.ndim - 2) + (0, self.num_tokens - 1))


def find_packing(attention_mask, position_ids, has_borders: bool, reads_first: bool) -> Packing | None:
    """How a batch can be computed without its padding, or None where it has none that may be left out.

    Args:
        attention_mask: None, (B, T) with 0 for padding, or a ready mask, in which nothing is looked for.
        position_ids: None or (B, T); without a mask, they start again at 0 with every sequence of a row.
        has_borders: whether attention takes `Packing.borders`, so that such rows may be laid end to end too.
        reads_first: whether the first state of every row is read, so that it may not be left out.
    """
    if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask.all():
        if reads_first and not attention_mask[:, 0].all():
            return None
        is_token = attention_mask.bool()
        return Packing(is_token, is_token.sum(1))
    if attention_mask is None and position_ids is not None and has_borders:
        begins = position_ids == 0
        begins[:, 0] = True
        begins = begins.flatten().nonzero().squeeze(1)
        ends = torch.cat((begins[1:], begins.new_tensor([position_ids.numel()])))
        return Packing(torch.ones_like(position_ids), ends - begins)
    return None


def find_output_tokens(embeddings, packing, read_places, only_first: bool) -> Packing | FirstToken | None:
    """Which tokens the last block is asked for, or None for all of them.

    Args:
        embeddings: (B, T, D), of the batch before `packing`, which may be None.
        read_places: None or (B, T), true where the last states are read.
        only_first: whether those of the first tokens are all that is read.
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
    """For `create_bidirectional_mask`: whether two tokens of a row belong to one sequence, (B, T) positions in which
    start again at 0."""
    return packed_sequence_mask_function((position_ids == 0).cumsum(-1))
