"""The few lines of Python that load a checkpoint and use it, for every task."""

import json
from pathlib import Path
from typing import NamedTuple

EXAMPLE = "example.png"  # an image to try a model with; in a line of USES, EXAMPLE stands for its path


class Use(NamedTuple):
    """What models for a task do, and how they are used."""

    does: str
    line: str  # the last line of the snippet, which calls the pipeline or the model
    measures: tuple[str, ...] = ()  # the first of these that was measured says how good a model is


USES = {
    "text-generation": Use(
        "continues a text",
        'print(generate("The ", max_new_tokens=50)[0]["generated_text"])',
        ("bits_per_byte", "loss"),
    ),
    "fill-mask": Use(
        "guesses the masked words of a text",
        'print(fill(f"This is the {fill.tokenizer.mask_token} of the story.")[0]["sequence"])',
        ("masked_accuracy",),
    ),
    "text-classification": Use(
        "tells the class, or the score, of a text",
        'print(classify("A pleasure from the first page to the last."))',
        ("accuracy", "pearson"),
    ),
    "text-pair-classification": Use(
        "tells the class, or the score, of a pair of texts",
        'print(classify({"text": "It is raining.", "text_pair": "The streets are dry."}))',
        ("accuracy", "pearson"),
    ),
    "token-classification": Use(
        "finds the entities of a text, or tags its words",
        'print(tag("Ada Lovelace was born in London.", aggregation_strategy="first"))',
        ("f1",),
    ),
    "question-answering": Use(
        "answers a question with words of a text",
        'print(model.answer(tokenizer, "Who was born?", "Ada was born in London.")[0].text)',
        ("f1",),
    ),
    "image-classification": Use("tells the class of an image", "print(classify(EXAMPLE))", ("accuracy",)),
    "object-detection": Use(
        "finds the objects of an image: class, score and box of each",
        'print(*detect(EXAMPLE), sep="\\n")',
        ("map",),
    ),
    "image-reconstruction": Use(
        "reconstructs an image from some of its patches, which makes its encoder a good start for other tasks",
        'print(model(**processor(EXAMPLE, return_tensors="pt")).loss)',
    ),
}
# Tasks for which the Hub has only a coarser name.
PIPELINES = {"text-pair-classification": "text-classification", "image-reconstruction": "image-feature-extraction"}
# Tasks without a pipeline in transformers 5: the classes of model and processor, and the variable of the processor.
WITHOUT_PIPELINE = {
    "question-answering": ("AutoModelForQuestionAnswering", "AutoTokenizer", "tokenizer"),
    "image-reconstruction": ("AutoModelForPreTraining", "AutoImageProcessor", "processor"),
}


def snippet(
    source: str | Path, task: str = "text-generation", on_hub: bool = False, revision: str | None = None
) -> str:
    """Returns a few lines of Python that load a checkpoint and use it.

    Args:
        source: a folder, or a repository of the Hub.
        on_hub: whether `source` is a repository.
        revision: a branch or tag of the repository; None: its main branch.

    Raises:
        ValueError: there is no snippet for the task.
    """
    if task not in USES:
        raise ValueError(f"no snippet for task {task!r}, only for {', '.join(USES)}")
    use, pinned = USES[task].line, f", revision={_quote(revision)}" if revision else ""
    where = f"{_quote(source)}{pinned}, trust_remote_code=True"
    imports, lines = [], []
    if "EXAMPLE" in use:
        example = _quote(f"{source}/{EXAMPLE}")
        if on_hub:  # the client also knows private repositories, mirrors and the cache
            imports.append("from huggingface_hub import hf_hub_download")
            example = f"hf_hub_download({_quote(source)}, {_quote(EXAMPLE)}{pinned})"
        use = use.replace("EXAMPLE", example)
    if task in WITHOUT_PIPELINE:
        model_class, processor_class, processor = WITHOUT_PIPELINE[task]
        imports.append(f"from transformers import {', '.join(sorted([model_class, processor_class]))}")
        lines.append(f"model = {model_class}.from_pretrained({where})")
        lines.append(f"{processor} = {processor_class}.from_pretrained({where})")
    else:
        imports.append("from transformers import pipeline")
        variable = use.removeprefix("print(").lstrip("*").split("(")[0]
        lines.append(f"{variable} = pipeline({_quote(PIPELINES.get(task, task))}, model={where})")
    return "\n".join([*imports, *lines, use])


def _quote(text: str | Path) -> str:
    """Returns a Python literal of the text in double quotes."""
    return json.dumps(str(text), ensure_ascii=False)
