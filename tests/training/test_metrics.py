import gc
import math
import os

import pytest

from training.metrics import LanguageModeling, load_metric


def test_sums_over_batches_give_the_loss_of_the_whole():
    metric = load_metric(LanguageModeling)
    metric.add_batch(nll_sum=[100.0, 50.5], num_tokens=[60, 30], num_bytes=[200, 100])
    metric.add_batch(nll_sum=[9.5], num_tokens=[10], num_bytes=[20])
    result = metric.compute()
    assert result["loss"] == pytest.approx(1.6)
    assert result["perplexity"] == pytest.approx(math.exp(1.6))
    assert result["bits_per_byte"] == pytest.approx(160 / math.log(2) / 320)


def test_perplexity_of_a_huge_loss_is_infinite():
    assert load_metric(LanguageModeling).compute(nll_sum=[1e6], num_tokens=[1], num_bytes=[1])["perplexity"] == math.inf


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="num_tokens"):
        load_metric(LanguageModeling).compute(nll_sum=[0.0], num_tokens=[0], num_bytes=[0])


def test_the_metric_writes_to_no_folder_but_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    metric = load_metric(LanguageModeling)
    metric.compute(nll_sum=[1.0], num_tokens=[1], num_bytes=[1])
    folder = metric.temporary_folder.name
    assert not (tmp_path / "metrics").exists() and os.path.isdir(folder)
    del metric
    gc.collect()
    assert not os.path.exists(folder)
