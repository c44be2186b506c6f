"""Reading a model card as a person would, and as the Hub would."""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard


def code_of(folder: Path) -> str:
    """The Python on the card of a run, which is how to use its model."""
    return re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[1]


REPOSITORY, MEASURE = re.compile(r"[\w.-]+/[\w.-]+"), re.compile(r"[a-z0-9_]+")
TASKS = {"text-generation", "fill-mask", "text-classification", "token-classification", "question-answering"}
TASKS |= {"image-classification", "object-detection", "image-feature-extraction"}
MEASURES = {"accuracy", "exact_match", "f1", "matthews_correlation", "mse", "pearsonr", "perplexity", "precision"}
MEASURES |= {"recall", "spearmanr"}  # those of huggingface.co/metrics that are measured here
HEADER = {  # of huggingface/hub-docs, modelcard.md; "?" ends the name of what may be missing
    "library_name": {"transformers"},
    "license": {"apache-2.0", "mit", "cc-by-4.0", "cc0-1.0"},
    "language?": re.compile("[a-z]{2,3}"),
    "pipeline_tag": TASKS,
    "base_model?": [REPOSITORY],
    "datasets?": [REPOSITORY],
    "metrics?": [MEASURES],
    "tags": [re.compile("[a-z_-]+")],
    "model-index?": [
        {
            "name": str,
            "results": [
                {
                    "task": {"type": TASKS},
                    "dataset": {"type": re.compile("[a-z0-9./_-]+"), "name": str, "config?": str},
                    "metrics": [{"type": MEASURE, "name": str, "value": float}],
                }
            ],
        }
    ],
}
EVAL_RESULTS = [  # of huggingface.co/docs/hub/eval-results
    {"dataset": {"id": REPOSITORY, "task_id": re.compile(r"[\w.-]+")}, "value": float, "notes?": str}
]


def assert_fits(value, schema, place="header"):
    """Whether a value is of a type, one of a set, matches a pattern, or is made of such values."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), place
        fields = {name.removesuffix("?"): (inner, name.endswith("?")) for name, inner in schema.items()}
        missing = {name for name, (_, may_miss) in fields.items() if not may_miss} - set(value)
        assert set(value) <= set(fields) and not missing, f"{place}: {set(value)}"
        for name, inner in value.items():
            assert_fits(inner, fields[name][0], f"{place}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, place
        for inner in value:
            assert_fits(inner, schema[0], place)
    elif isinstance(schema, re.Pattern):
        assert isinstance(value, str) and schema.fullmatch(value), f"{place}: {value!r}"
    elif isinstance(schema, set):
        assert value in schema, f"{place}: {value!r}"
    else:
        assert type(value) is schema, f"{place}: {value!r}"


def assert_valid_header(card: str):
    """Whether the Hub can read the header, and its client gives it back as it was."""
    header = card.split("---\n")[1]
    assert_fits(yaml.safe_load(header), HEADER)
    assert ModelCard(card).data.to_yaml() == header.strip()
