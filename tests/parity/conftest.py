"""What the parity tests share: a stock model read by our class, and gradients under stock names."""

import pytest
import torch


@pytest.fixture
def load_as_ours(tmp_path):
    """Saves a stock model, reads it with a class of ours: nothing may be missing or left over."""

    def load_as_ours(stock, our_class):
        folder = tmp_path / "stock"
        stock.save_pretrained(folder)
        ours, report = our_class.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        return ours

    return load_as_ours


@pytest.fixture
def assert_same_gradients():
    """Our gradients, put in the place of our weights and mapped to the stock layout as weights are, are the stock
    model's."""

    def assert_same_gradients(ours, stock):
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(0 if gradients[name] is None else gradients[name])
        mapped = dict(ours.to_stock().named_parameters())
        for name, parameter in stock.named_parameters():
            if parameter.grad is not None:  # untied, stock BERT has a bias that nothing reads
                torch.testing.assert_close(
                    mapped[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
                )

    return assert_same_gradients
