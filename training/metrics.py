"""The measures of `eval_results.json`, as `evaluate.Metric` classes that need no network.

A metric is fed sums, so that it is exact whatever the batches, and computed on rank 0 over what all ranks gathered:

    metric = load_metric(LanguageModeling)
    metric.add_batch(nll_sum=[1093.2, 1121.8], num_tokens=[512, 512], num_bytes=[2031, 2093])
    metric.compute()  # {"loss": ..., "perplexity": ..., "bits_per_byte": ...}
"""

import math
import tempfile

import datasets
import evaluate


def load_metric(metric_class: type[evaluate.Metric]) -> evaluate.Metric:
    """A metric that keeps what it is fed in memory; evaluate's folder is a temporary one, gone with the metric."""
    folder = tempfile.TemporaryDirectory(prefix="hf_models-metric-")
    metric = metric_class(keep_in_memory=True, cache_dir=folder.name)
    metric.temporary_folder = folder
    return metric


class LanguageModeling(evaluate.Metric):
    """Loss in nats per predicted token, its exponential, and bits per UTF-8 byte of text.

    Bits per byte, nll / (ln 2 * bytes), compares models whatever their tokenizers (Gao et al. 2020, "The Pile",
    section 3.1): `num_bytes` counts the text that `nll_sum`, in nats, was summed over.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"nll_sum": "float64", "num_tokens": "int64", "num_bytes": "int64"}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
        )

    def _compute(self, nll_sum: list[float], num_tokens: list[int], num_bytes: list[int]) -> dict[str, float]:
        nll, tokens, size = math.fsum(nll_sum), sum(num_tokens), sum(num_bytes)
        if tokens == 0 or size == 0:
            raise ValueError(f"num_tokens and num_bytes must be positive to measure a loss, not {tokens} and {size}")
        loss = nll / tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": nll / (math.log(2) * size)}
