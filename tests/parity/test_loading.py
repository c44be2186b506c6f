"""A checkpoint opened with another class of its family: what it lacks is made new, what is left over is left, and both
are said, exactly where stock classes do so."""

import pytest
import transformers
from safetensors.torch import load_file

from tests.families import FAMILIES

# Every class of a family that has a stock counterpart, opening the checkpoint of every other.
PAIRS = {
    f"{opened.__name__}-of-{saved.__name__}": (saved, opened)
    for family in FAMILIES.values()
    for saved in family.auto_classes
    for opened in family.auto_classes
    if saved is not opened and not {saved.__name__, opened.__name__} & {"ZooViTBackbone"}
}


@pytest.fixture
def warnings(caplog):
    """What transformers says, whatever an earlier test or command has told it to keep quiet about."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.add_handler(caplog.handler)
    yield caplog
    transformers.logging.remove_handler(caplog.handler)
    transformers.logging.set_verbosity(verbosity)


def num_values(tensors) -> int:
    """Tied tensors count once."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in tensors}.values())


def load(model_class, folder, warnings):
    """The model; the lists that came with it; how many values it has, how many of them are new, what a user is told."""
    warnings.clear()
    model, found = model_class.from_pretrained(folder, output_loading_info=True)
    values = model.state_dict(keep_vars=True)
    made = num_values(values[name] for name in found["missing_keys"])
    told = {status for status in ("MISSING", "UNEXPECTED", "MISMATCH") if f"| {status}" in warnings.text}
    return model, found, (num_values(values.values()), made, told)


@pytest.mark.parametrize(("saved", "opened"), PAIRS.values(), ids=PAIRS.keys())
def test_what_is_new_and_what_is_left_over_is_said_as_stock_says_it(make_model, tmp_path, warnings, saved, opened):
    ours = make_model(saved)
    ours.save_pretrained(tmp_path / "ours")
    ours.to_stock().save_pretrained(tmp_path / "stock")

    model, found, account = load(opened, tmp_path / "ours", warnings)
    *_, of_stock = load(type(make_model(opened).to_stock()), tmp_path / "stock", warnings)
    assert account == of_stock
    lists = {"MISSING": found["missing_keys"], "UNEXPECTED": found["unexpected_keys"]}
    assert account[-1] == {status for status, names in lists.items() if names}

    # All else is what was saved: nothing is made new in silence.
    contents = {tensor.numpy().tobytes() for tensor in load_file(tmp_path / "ours" / "model.safetensors").values()}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in found["missing_keys"]}
    assert not [name for name, tensor in kept.items() if tensor.numpy().tobytes() not in contents]
