"""From a finished run to the Hub: a model card in which every number was measured, and one commit."""

import json
import math
import re
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HTTPError  # of the HTTP client that huggingface_hub uses, whichever it is

from training.arguments import one_line

TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "template.md"

# What a run may draw, and what the picture shows.
PICTURES = {
    "curves.png": "Loss during training",
    "confusion_matrix.png": "Confusion matrix: the classes of held-out images and what they were taken for",
    "reconstructions.png": "Held-out images, what was left of them, and their reconstructions",
    "detections.png": "Held-out images with what was found in them, and beside them with what is there",
    "decoder_attention.png": "Where the decoder looks for each box that it finds",
    "query_slots.png": "Where each query finds objects in all held-out images (Carion et al. 2020, figure 7)",
}
EXAMPLE = "example.png"  # an image for the snippet, in which its place is called EXAMPLE

# A checkpoint is files beside each other, of these kinds. Whatever else a run leaves (checkpoints/ with the state of
# the optimizer, locks, logs of trackers) is not for others.
PUBLISHED = ["README.md", "*.safetensors", "*.json", "*.py", "*.txt", "*.jinja", "metrics.jsonl", EXAMPLE, *PICTURES]
PRIVATE = ["*/*", "optimizer*", "*.lock"]  # "*/*": anything in a subfolder

# For each task, how the result of `pipeline(task)`, or the model, is used: the last line of a snippet.
USES = {
    "text-generation": 'print(generate("The ", max_new_tokens=50)[0]["generated_text"])',
    "fill-mask": 'print(fill(f"This is the {fill.tokenizer.mask_token} of the story.")[0]["sequence"])',
    "text-classification": 'print(classify("A pleasure from the first page to the last."))',
    "text-pair-classification": 'print(classify({"text": "It is raining.", "text_pair": "The streets are dry."}))',
    "token-classification": 'print(tag("Ada Lovelace was born in London.", aggregation_strategy="first"))',
    "question-answering": 'print(model.answer(tokenizer, "Who was born?", "Ada was born in London.")[0].text)',
    "image-classification": "print(classify(EXAMPLE))",
    "object-detection": 'print(*detect(EXAMPLE), sep="\\n")',  # score, label and box of each
    "image-reconstruction": 'print(model(**processor(EXAMPLE, return_tensors="pt")).loss)',
}
# The Hub's name of a task, where it has no finer one.
PIPELINES = {"text-pair-classification": "text-classification", "image-reconstruction": "image-feature-extraction"}
# Tasks that transformers 5 has no pipeline for: classes of the model and the processor, and a name for that.
WITHOUT_PIPELINE = {
    "question-answering": ("AutoModelForQuestionAnswering", "AutoTokenizer", "tokenizer"),
    "image-reconstruction": ("AutoModelForPreTraining", "AutoImageProcessor", "processor"),
}


def snippet(source: str | Path, task: str = "text-generation") -> str:
    """A few lines of Python that load the checkpoint `source`, a folder or Hub name, and use it."""
    if task not in USES:
        raise ValueError(f"no snippet for task {task!r}, only for {', '.join(USES)}")
    where = f"{_quote(source)}, trust_remote_code=True"
    if task in WITHOUT_PIPELINE:
        model_class, processor_class, processor = WITHOUT_PIPELINE[task]
        lines = [
            f"from transformers import {', '.join(sorted([model_class, processor_class]))}",
            f"model = {model_class}.from_pretrained({where})",
            f"{processor} = {processor_class}.from_pretrained({where})",
        ]
    else:
        variable = USES[task].removeprefix("print(").lstrip("*").split("(")[0]
        load = f"{variable} = pipeline({_quote(PIPELINES.get(task, task))}, model={where})"
        lines = ["from transformers import pipeline", load]
    is_local = Path(source).exists()
    example = f"{source}/{EXAMPLE}" if is_local else f"https://huggingface.co/{source}/resolve/main/{EXAMPLE}"
    return "\n".join([*lines, USES[task].replace("EXAMPLE", _quote(example))])


def write_card(output_dir: str | Path, source: str | None = None) -> Path:
    """Writes `output_dir/README.md` from `eval_results.json` and model_cards/template.md, and returns its path.

    `source` is what the snippet loads, by default what it was in eval_results.json. A line of the template whose
    value is not in eval_results.json is left out, and a section left without lines too. What a person wrote between
    `<!-- by hand: name -->` and `<!-- end by hand -->` stays, and a README.md without such marks is not touched.
    """
    folder = Path(output_dir)
    readme = folder / "README.md"
    earlier = readme.read_text(encoding="utf-8") if readme.exists() else None
    if earlier is not None and not _sections(earlier):
        return readme
    results = _read_results(folder / "eval_results.json")
    results.setdefault("model_name", folder.resolve().name)
    task = results.get("task", "text-generation")
    if source is not None:
        results["snippet"] = snippet(source, task)

    text = _render(TEMPLATE.read_text(encoding="utf-8"), _card_values(results, folder))
    kept = _sections(earlier or "")
    for name, section in _sections(text).items():
        text = text.replace(section, kept.get(name, section))
    header = _card_header(results, task).to_yaml()
    readme.write_text(f"---\n{header}\n---\n\n{text}", encoding="utf-8")
    return readme


def push(output_dir: str | Path, repo_id: str, private: bool = False) -> str:
    """Uploads the checkpoint with its code, card, metrics and pictures in one commit, and returns the repository's URL.

    The login is `hf auth login`'s or the environment's. Raises ValueError naming the repository if that fails.
    """
    folder = Path(output_dir)
    if not (folder / "config.json").exists():
        raise ValueError(f"cannot publish {folder}: no config.json, so it is not a finished run")
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        write_card(folder, source=url.repo_id)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=PUBLISHED,
            ignore_patterns=PRIVATE,
            commit_message=f"Publish {url.repo_id}",
        )
    except (ValueError, OSError, RuntimeError, HTTPError) as error:
        raise ValueError(f"cannot publish {folder} to {repo_id}: {one_line(error)}") from error
    return str(url)


def _read_results(path: Path) -> dict:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a card shows measured results, so finish the run first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return results


def _metrics(results: dict) -> dict[str, float]:
    """The measured numbers: `eval_bits_per_byte` becomes "bits per byte"."""
    return {
        name.removeprefix("eval_").replace("_", " "): value
        for name, value in results.items()
        if name.startswith("eval_") and type(value) in (int, float) and math.isfinite(value)
    }


def _card_values(results: dict, folder: Path) -> dict[str, str | None]:
    """The text for each placeholder of the template; None where eval_results.json has nothing."""

    def shown(name, form):
        return form(results[name]) if results.get(name) else None

    data = results.get("data", {})
    rows = [f"| {name} | {value:.5g} |" for name, value in _metrics(results).items()]
    return {
        "model_name": results["model_name"],
        "family": results.get("family"),
        "parameters": shown("parameters", "{:,}".format),
        "snippet": shown("snippet", lambda code: _fenced(code, "python")),
        "results": "\n".join(["| measured on held-out data | |", "|---|---|", *rows]) if rows else None,
        "pictures": "\n\n".join(f"![{what}]({name})" for name, what in PICTURES.items() if (folder / name).exists()),
        "sample": shown("sample", lambda text: _fenced(text, "text")),
        "command": shown("command", lambda command: _fenced(command, "bash")),
        "recipe": results.get("recipe"),
        "data_source": data.get("source"),
        "data_fingerprint": data.get("fingerprint"),
        "data_licence": data.get("licence"),
        "hardware": results.get("hardware"),
        "wall_time": shown("wall_time_seconds", lambda seconds: f"{seconds / 3600:.2f} hours"),
        "versions": shown("versions", lambda versions: ", ".join(f"{k} {v}" for k, v in versions.items())),
        "citation": shown("citation", lambda entry: _fenced(entry, "bibtex")),
    }


def _card_header(results: dict, task: str) -> ModelCardData:
    """What the Hub reads: library, task, licence, and the metrics as its `model-index`."""
    data = results.get("data", {}).get("source", "unknown")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES.get(task, task),
        license=results.get("license", "apache-2.0"),
        tags=[tag for tag in ("hf_models", results.get("family")) if tag],
        model_name=results["model_name"],
        eval_results=[
            EvalResult(
                task_type=PIPELINES.get(task, task),
                dataset_type=data,
                dataset_name=data,
                metric_type=name.replace(" ", "_"),
                metric_value=value,
            )
            for name, value in _metrics(results).items()
        ]
        or None,
    )


def _render(template: str, values: dict[str, str | None]) -> str:
    """Fills the template. Lines that miss a value go first, then the `## ` headings that have nothing below them."""
    lines = [line for line in template.splitlines() if all(values[name] for name in Template(line).get_identifiers())]
    rendered = [""]
    for number, line in enumerate(lines):
        below = next((other for other in lines[number + 1 :] if other), "## ")
        is_empty_section = line.startswith("## ") and below.startswith("## ")
        is_second_blank = not line and not rendered[-1]
        if not is_empty_section and not is_second_blank:
            rendered.append(Template(line).substitute(values))
    return "\n".join(rendered[1:]) + "\n"


def _sections(card: str) -> dict[str, str]:
    """The sections of a card that belong to a person, marks included, by name."""
    found = re.finditer(r"<!-- by hand: (\w+).*?<!-- end by hand -->", card, flags=re.DOTALL)
    return {section[1]: section[0] for section in found}


def _fenced(text: str, language: str) -> str:
    """A code block, whose fence is longer than any row of backticks inside."""
    longest = max((len(row) for row in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _quote(text: str | Path) -> str:
    """A Python literal of the text in double quotes."""
    return json.dumps(str(text), ensure_ascii=False)
