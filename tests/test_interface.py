"""The list of what this repository takes from transformers, which shows what moved between two versions."""

import pytest

from tests.interface import describe, find, imported_names


def test_every_name_that_a_file_here_imports_is_there():
    names = imported_names()
    assert {
        "transformers.masking_utils.create_causal_mask",
        "transformers.__version__",
        "transformers.Trainer",
    } <= names
    for name in names:
        find(name)
    with pytest.raises(ImportError):
        find("transformers.masking_utils.nothing")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformers.masking_utils.packed_sequence_mask_function", "(packed_sequence_mask)"),
        ("transformers.modeling_outputs.BackboneOutput", ".feature_maps = None"),
        ("transformers.models.vit.modeling_vit.ViTForImageClassification", ".main_input_name = 'pixel_values'"),
        ("transformers.AutoConfig", ".register(model_type, config, exist_ok=False)"),
        ("transformers.loss.loss_utils.LOSS_MAPPING", "['ForMaskedLM'] = <function ForMaskedLMLoss"),
    ],
)
def test_functions_have_parameters_and_classes_fields_defaults_and_methods(name, expected):
    assert any(expected in line for line in describe(name, find(name)))
