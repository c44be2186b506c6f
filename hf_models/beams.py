"""Beams that share their source: in generation, all beams of one input attend to one copy of its keys and values."""

from typing import Any

from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache


class SharedSourceCache(EncoderDecoderCache):
    """A cache for a decoder whose source has one row for each input instead of one for each beam.

    Beams are reordered only within an input, so selecting or repeating rows changes only the self-attention cache.
    """

    def reorder_cache(self, beam_idx):
        self.self_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int):
        self.self_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        self.self_attention_cache.batch_select_indices(indices)


def with_source(cache: Cache, config) -> EncoderDecoderCache:
    """Returns the cache of a decoder, extended by a cache for the keys and values of its source."""
    if isinstance(cache, EncoderDecoderCache):
        return cache
    return SharedSourceCache(cache, DynamicCache(config=config))


class SharesSource:
    """A mixin for models that generate from a source: `generate` repeats every input for each beam, but not the source.

    `MultiHeadAttention` then stacks the beams of an input as queries of one row. Only backends that accept any mask can
    do this.
    """

    config: Any
    source_inputs = ("encoder_hidden_states", "encoder_attention_mask")

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        shared = {}
        if self.config._attn_implementation in ("eager", "sdpa"):
            shared = {name: model_kwargs.pop(name) for name in self.source_inputs if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]  # `GenerationMixin` has it
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **shared}
