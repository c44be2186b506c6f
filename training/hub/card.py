"""Writes the model card of a run, README.md, with measured numbers only.

    python -m training.card RUN_DIR...                         write the cards of runs again
    python -m training.card RUN_DIR... --output model_cards    keep RECIPE.md, RECIPE.json and RECIPE/*.png there
    python -m training.card model_cards/*.json                 write those again, without the runs

A card is model_cards/template.md, filled from eval_results.json. What a person writes between
`<!-- by hand: name -->` and `<!-- end by hand -->` stays. So do their changes in the header: licence, language, tags
and every field that this program does not write.
"""

import argparse
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from PIL import Image

from hf_models.zoo import ZOO
from training.hub.card_edits import is_foreign, merge, merge_header, split_header
from training.hub.snippets import PIPELINES, USES, snippet
from training.run.arguments import user_errors
from training.run.folder import text_of, write_atomic

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = REPOSITORY / "model_cards" / "template.md"
PAPERS = REPOSITORY / "model_cards" / "papers.bib"
EVAL_RESULTS = ".eval_results/hf_models.yaml"  # in a repository of the Hub

# The pictures that a run may draw, and what each shows.
PICTURES = {
    "curves.png": "Loss during training",
    "confusion_matrix.png": "Confusion matrix: the classes of held-out images and what they were taken for",
    "reconstructions.png": "Held-out images, what was left of them, and their reconstructions",
    "detections.png": "Held-out images with what was found in them, and beside them with what is there",
    "decoder_attention.png": "Where the decoder looks for each box that it finds",
    "query_slots.png": "Where each query finds objects in all held-out images (Carion et al. 2020, figure 7)",
}
# The title of a card, and the code in it that uses the model.
TITLE = re.compile("^# (.+)$", flags=re.MULTILINE)
SNIPPET = re.compile(r"^```python\n(.*?)\n```$", flags=re.DOTALL | re.MULTILINE)
LARGEST_PICTURE = 150_000  # bytes; the largest picture in model_cards/


class Family(NamedTuple):
    what: str
    paper: str
    key: str  # in model_cards/papers.bib


FAMILIES = {  # by how a class's name begins; the first match counts
    "ZooGPT": Family(
        "GPT, the decoder of the transformer, which predicts each token from those before it",
        "Radford et al. 2019",
        "radford2019",
    ),
    "ZooBert": Family(
        "BERT, the encoder of the transformer, which reads a text in both directions",
        "Devlin et al. 2019",
        "devlin2019",
    ),
    "ZooViTMAE": Family(
        "masked autoencoder, a vision transformer that is shown some patches of an image and draws the others",
        "He et al. 2022",
        "he2022",
    ),
    "ZooViT": Family(
        "ViT, the encoder of the transformer on the patches of an image",
        "Dosovitskiy et al. 2021",
        "dosovitskiy2021",
    ),
    "ZooDetr": Family(
        "DETR, a convolutional network with the encoder and the decoder of the transformer, which finds all objects of "
        "an image at once",
        "Carion et al. 2020",
        "carion2020",
    ),
}

# What the card calls a measure where its name in eval_results.json is not enough.
MEASURES = {
    "top5_accuracy": "accuracy of the five likeliest",
    "knn_accuracy": "accuracy of the nearest neighbours by its features",
    "linear_probe_accuracy": "accuracy of a linear classifier on its features",
    "map": "mean average precision, IoU 0.50 to 0.95",
    "map_50": "mean average precision, IoU 0.50",
    "map_75": "mean average precision, IoU 0.75",
    **{f"map_{size}": f"mean average precision, {size} objects" for size in ("small", "medium", "large")},
    **{f"mar_{size}": f"mean average recall, {size} objects" for size in ("small", "medium", "large")},
    "mar_1": "mean average recall, 1 detection an image",
    **{f"mar_{count}": f"mean average recall, {count} detections an image" for count in (10, 100)},
}
PER_CLASS = "eval_per_class_"  # begins the name of a measure that has a number for each class
SPEEDS = ("_per_second", "_seconds")  # how fast a model is says nothing about how good it is
# What the Hub calls a measure (huggingface.co/metrics) where that is another name, and all its names that occur here.
HUB_MEASURES = {"pearson": "pearsonr", "spearman": "spearmanr", "mean_squared_error": "mse"}
HUB_MEASURES |= {"map": "mean_average_precision"}
HUB_NAMES = {"accuracy", "exact_match", "f1", "matthews_correlation", "mse", "pearsonr", "perplexity", "precision"}
HUB_NAMES |= {"recall", "spearmanr"}

HUB_DATA = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")  # how `--data` takes a data set of the Hub
ENGLISH = ("CPython ", "docstrings of CPython ", "nyu-mll/glue:", "rajpurkar/squad", "lhoestq/conll2003")
LICENSE = "apache-2.0"  # of code and weights, until a person says otherwise
WHOSE_ENERGY = {"CPU": "CPU, of the whole machine"}


def write_card(output_dir: str | Path) -> Path:
    """Writes `output_dir/README.md` from `eval_results.json` and model_cards/template.md, and returns its path.

    A line of the template is left out if eval_results.json lacks its value, and so is a section without lines. A
    README.md that a person wrote, without any of the marks, stays as it is, and a line on stderr says so.
    """
    folder = Path(output_dir)
    readme = folder / "README.md"
    if is_foreign(text_of(readme)):
        print(f"{readme} is written by hand and stays as it is; remove it to have a model card", file=sys.stderr)
    else:
        write_atomic(readme, card_files(output_dir)["README.md"])
    return readme


def card_files(
    output_dir: str | Path, source: str | None = None, published: str | None = None, revision: str | None = None
) -> dict[str, str]:
    """Returns the text of README.md and, if the data is on the Hub, of the Hub's `.eval_results`, by their paths in the
    repository. Nothing is written.

    Args:
        output_dir: a finished run.
        source: the repository that the card is for, "user/name"; None: the card is for the folder.
        published: the README.md that is in the repository.
        revision: the branch or tag that the card is for; None: the main branch.

    Raises:
        ValueError: eval_results.json is missing or damaged; or a section or the header of the card was changed by hand
            both in `output_dir` and in the repository.
    """
    folder = Path(output_dir)
    results = read_results(folder / "eval_results.json")
    card = Card(
        results,
        name=source.split("/")[-1] if source else folder.resolve().name,
        code=snippet(source or output_dir, _task(results), source is not None, revision),
        pictures=_pictures(folder),
        code_version=_code_version(folder),
    )
    own = text_of(folder / "README.md")
    files = {"README.md": own if is_foreign(own) else card.text(own, published, publishes=source is not None)}
    if entries := eval_entries(results):
        files[EVAL_RESULTS] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return files


def renewed_card(folder: Path, code_version: str) -> str | None:
    """Returns README.md for another version of the code, with the title, snippet and words that it has now; None if
    there is no card of ours, or no eval_results.json."""
    own = text_of(folder / "README.md")
    title, code = TITLE.search(split_header(own)[1]), SNIPPET.search(own or "")
    if is_foreign(own) or not title or not code or not (folder / "eval_results.json").exists():
        return None
    results = read_results(folder / "eval_results.json")
    return Card(results, title[1], code[1], _pictures(folder), code_version).text(own)


def _pictures(folder: Path) -> dict[str, str]:
    return {name: name for name in PICTURES if (folder / name).exists()}


def _code_version(folder: Path) -> str | None:
    """Returns the version of the code in a checkpoint's folder. The config may name the version of an earlier
    checkpoint, from which this one was made."""
    found = re.search(r'^ZOO_VERSION = "([\w.+-]+)"$', text_of(folder / "base.py") or "", flags=re.MULTILINE)
    return found and found[1]


def export(path: str | Path, output: str | Path | None = None) -> Path:
    """Writes the card of a run, or of results kept earlier, for model_cards/, and returns its path.

    Besides the card, OUTPUT/RECIPE.md, it keeps the results in RECIPE.json, from which the card can be written again,
    and small pictures in RECIPE/.

    Args:
        path: the folder of a run, or a RECIPE.json.
        output: a folder; by default the folder of RECIPE.json.
    """
    path = Path(path)
    is_run = path.is_dir()
    results = read_results(path / "eval_results.json" if is_run else path)
    name = path.stem if not is_run else Path(_texts(results).get("recipe") or path.resolve().name).stem
    output = Path(output or path.parent)
    if is_run:
        if (output / name).resolve() == path.resolve():
            raise ValueError(
                f"the pictures for {name}.md would replace those of the run {path}: choose another --output"
            )
        pictures = {picture: path / picture for picture in PICTURES if (path / picture).exists()}
        pictures = {picture: small_picture(original) for picture, original in pictures.items()}
        (output / name).mkdir(parents=True, exist_ok=True)
        for picture in PICTURES:
            (output / name / picture).unlink(missing_ok=True)
        for picture, content in pictures.items():
            write_atomic(output / name / picture, content)
        write_atomic(output / f"{name}.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    pictures = {picture: f"{name}/{picture}" for picture in PICTURES if (output / name / picture).exists()}
    card = Card(results, name, snippet(f"runs/{name}", _task(results)), pictures)
    write_atomic(output / f"{name}.md", card.text(text_of(output / f"{name}.md")))
    return output / f"{name}.md"


def small_picture(path: Path) -> bytes:
    """Returns the picture as a PNG of at most LARGEST_PICTURE bytes, with fewer colours and, if need be, pixels."""
    picture = Image.open(path).convert("RGB")
    while True:
        file = io.BytesIO()
        picture.quantize(128).save(file, "png", optimize=True)
        if file.tell() <= LARGEST_PICTURE:
            return file.getvalue()
        scale = 0.95 * math.sqrt(LARGEST_PICTURE / file.tell())
        picture = picture.resize([round(scale * side) for side in picture.size], Image.Resampling.LANCZOS)


def read_results(path: Path) -> dict[str, Any]:
    """Returns what an eval_results.json contains. Raises ValueError naming the file if it is missing or damaged."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a card shows measured results, so finish the run first") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict):
        raise ValueError(f"{path} is not an object of names and values")
    results.pop("snippet", None)  # in files of older versions, with a path of the machine
    return results


def public_path(word: str) -> str:
    """Returns a word of a command line without private paths.

    A path inside the working folder or this repository becomes relative, and only the last part of another path stays.
    Paths may be in a list with commas and have a scheme, as in `--data=json:/a/b.json,file:///c`. Anything else stays.
    """
    return "".join(_public_part(part) for part in re.split("([,=])", word))


def _public_part(part: str) -> str:
    scheme, place = re.fullmatch(r"(file://|[A-Za-z][\w+.-]*:(?!//))?(.*)", part, flags=re.DOTALL).groups("")
    path = Path(os.path.expanduser(place))
    if not path.is_absolute() and ".." not in path.parts:
        return part
    path = path.resolve()
    for folder in (Path.cwd(), REPOSITORY):
        if path.is_relative_to(folder):
            return scheme + str(path.relative_to(folder))
    return scheme + path.name


def public_name(source: str) -> str:
    """Returns what others may know of a checkpoint or data: the name of a repository, or the last part of a path."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def measures(results: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers that say how good the model is, by their names without `eval_`."""
    numbers = _numbers(results).items()
    return {k.removeprefix("eval_"): v for k, v in numbers if k.startswith("eval_") and not k.endswith(SPEEDS)}


def eval_entries(results: dict[str, Any]) -> list[EvalResultEntry]:
    """Returns the main measure as the Hub's leaderboards take it; none unless the data is on the Hub."""
    data, found = HUB_DATA.fullmatch(_texts(results.get("data")).get("source", "")), measures(results)
    main = next((name for name in USES[_task(results)].measures if name in found), None)
    if data is None or main is None:
        return []
    note = f"{_label(main)}, measured by hf_models"
    return [EvalResultEntry(data["id"], data["config"] or "default", found[main], notes=note)]


class Card(NamedTuple):
    """What a card is made of.

    Args:
        results: the content of eval_results.json.
        name: the title.
        code: the snippet that uses the model.
        pictures: paths by the names of the pictures.
        code_version: the version of hf_models whose code is in the checkpoint.
    """

    results: dict[str, Any]
    name: str
    code: str
    pictures: dict[str, str]
    code_version: str | None = None

    def text(self, own: str | None = None, published: str | None = None, publishes: bool = False) -> str:
        """Returns the card with what people wrote into earlier ones; for the arguments see `card_edits.merge`."""
        body = _fill(TEMPLATE.read_text(encoding="utf-8"), self.values())
        fields = self.header()
        theirs, mark = merge_header(fields, own, published, publishes)
        header = ModelCardData(**fields)
        for name, value in theirs.items():
            header[name] = value  # the class takes some names for others of its arguments
        return f"---\n{header.to_yaml()}\n---\n\n{mark}{merge(body, own, published, publishes)}"

    def values(self) -> dict[str, str | None]:
        """Returns the text of each placeholder of the template; None where eval_results.json has nothing for it."""
        results = self.results
        texts, numbers, data = _texts(results), _numbers(results), _texts(results.get("data"))
        family, size = _family(results), texts.get("model")
        paper = _paper(family) if family else {}
        described = "A {0.what} ([{0.paper}]({1})). It {2}."
        source = data.get("source", "")
        hub_data = HUB_DATA.fullmatch(source)
        classes = next((name for name in results if name.startswith(PER_CLASS)), PER_CLASS)
        energy = _numbers(results.get("energy_kwh"))
        times = {
            name: _duration(numbers[f"{name}_seconds"])
            for name in ("wall_time", "processor_time")
            if f"{name}_seconds" in numbers
        }
        return {
            "model_name": self.name,
            "description": described.format(family, paper["url"], USES[_task(results)].does) if family else None,
            "parameters": f"{numbers['parameters']:,}" if "parameters" in numbers else None,
            "size": size if size in ZOO else None,
            "size_paper": ZOO[size].paper if size in ZOO else None,
            "started_from": ", ".join(_linked(name, name) for name in _started_from(results)),
            "snippet": _fenced(self.code, "python"),
            "code_version": self.code_version,
            "results": _table("measured on held-out data", "", {_label(k): v for k, v in measures(results).items()}),
            "per_class": _table("class", _label(classes.removeprefix(PER_CLASS)), _numbers(results.get(classes))),
            "best_step": f"{numbers['best_step']:,}" if "best_step" in numbers else None,
            "pictures": "\n\n".join(f"![{PICTURES[name]}]({place})" for name, place in self.pictures.items()),
            "sample": _fenced(results["sample"], "text") if "sample" in texts else None,
            "command": _fenced(results["command"], "bash") if "command" in texts else None,
            "recipe": texts.get("recipe"),
            "recipe_fingerprint": texts.get("recipe_fingerprint"),
            "data_source": _linked(source, hub_data and f"datasets/{hub_data['id']}"),
            "data_fingerprint": data.get("fingerprint"),
            "data_licence": data.get("licence"),
            "hardware": texts.get("hardware"),
            "wall_time": times.get("wall_time"),
            "processor_time": times.get("processor_time"),
            "energy": ", ".join(f"{value:.4g} kWh ({WHOSE_ENERGY.get(name, name)})" for name, value in energy.items()),
            "versions": ", ".join(f"{name} {version}" for name, version in _texts(results.get("versions")).items()),
            "citation": paper.get("entry") and _fenced(paper["entry"], "bibtex"),
        }

    def header(self) -> dict[str, Any]:
        """Returns the fields that the Hub reads, without those that people write."""
        results, task = self.results, _task(self.results)
        source = _texts(results.get("data")).get("source", "unknown")
        data = HUB_DATA.fullmatch(source)
        family = _family(results)
        tags = ["hf_models", *([family.what.split(",")[0].lower().replace(" ", "-")] if family else [])]
        kinds = {name: HUB_MEASURES.get(name, name) for name in measures(results)}
        evaluated = [
            EvalResult(
                task_type=PIPELINES.get(task, task),
                dataset_type=data["id"] if data else re.sub(r"\W+", "-", source).strip("-").lower(),
                dataset_name=source,
                dataset_config=data["config"] if data else None,
                metric_type=kinds[name],
                metric_name=_label(name),
                metric_value=value,
            )
            for name, value in measures(results).items()
        ]
        return {
            "library_name": "transformers",
            "pipeline_tag": PIPELINES.get(task, task),
            "license": LICENSE,
            "language": "en" if source.startswith(ENGLISH) else None,
            "base_model": [name for name in _started_from(results) if "/" in name] or None,
            "datasets": [data["id"]] if data else None,
            "metrics": sorted(HUB_NAMES & set(kinds.values())) or None,
            "tags": tags,
            "model_name": self.name if evaluated else None,
            "eval_results": evaluated or None,
        }


def _fill(template: str, values: dict[str, str | None]) -> str:
    """Fills the template. It removes lines that lack a value, and then `## ` headings with nothing below them."""
    lines = [line for line in template.splitlines() if all(values[name] for name in Template(line).get_identifiers())]
    values = {name: (value or "").replace("<!--", "<! --") for name, value in values.items()}  # no marks but ours
    rendered = [""]
    for number, line in enumerate(lines):
        below = next((other for other in lines[number + 1 :] if other), "## ")
        is_empty_section = line.startswith("## ") and below.startswith("## ")
        is_second_blank = not line and not rendered[-1]
        if not is_empty_section and not is_second_blank:
            rendered.append(Template(line).substitute(values))
    return "\n".join(rendered[1:]) + "\n"


def _table(name: str, value_name: str, values: dict[str, float]) -> str | None:
    names = (" ".join(name.split()).replace("|", "\\|") for name in values)
    rows = [f"| {name} | {value:.5g} |" for name, value in zip(names, values.values(), strict=True)]
    return "\n".join([f"| {name} | {value_name} |", "|---|---|", *rows]) if rows else None


def _texts(values) -> dict[str, str]:
    """Returns the texts in a JSON object, each as one line."""
    values = values.items() if isinstance(values, dict) else ()
    return {name: " ".join(text.split()) for name, text in values if isinstance(text, str) and text.strip()}


def _numbers(values) -> dict[str, float]:
    """Returns the finite numbers in a JSON object."""
    values = values.items() if isinstance(values, dict) else ()
    return {name: value for name, value in values if type(value) in (int, float) and math.isfinite(value)}


def _task(results: dict) -> str:
    return _texts(results).get("task", "text-generation")


def _started_from(results: dict) -> list[str]:
    names = results.get("started_from")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _duration(seconds: float) -> str:
    number, unit = (seconds / 60, "minutes") if seconds < 7200 else (seconds / 3600, "hours")
    return f"{number:{'.3g' if number < 999.5 else ',.0f'}} {unit}"


def _label(measure: str) -> str:
    return MEASURES.get(measure, measure.replace("_", " "))


def _family(results: dict) -> Family | None:
    name = str(results.get("family"))
    return next((family for beginning, family in FAMILIES.items() if name.startswith(beginning)), None)


def _paper(family: Family) -> dict[str, str]:
    """Returns the entry of a family's paper in papers.bib, and its url."""
    entries = PAPERS.read_text(encoding="utf-8").split("\n\n")
    entry = next(entry for entry in entries if entry.split("{")[1].startswith(f"{family.key},"))
    return {"entry": entry, "url": re.search(r"url = {(.*)}", entry)[1]}


def _linked(name: str, place: str | None) -> str:
    """Returns a name as a link to its page on the Hub; `place` is no page there if it has no "/"."""
    return f"[{name}](https://huggingface.co/{place})" if place and "/" in place else name


def _fenced(text: str, language: str) -> str:
    """Returns a code block whose fence is longer than any row of backticks in it."""
    longest = max((len(row) for row in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m training.card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="RUN_DIR", help="a finished run, or a RECIPE.json of model_cards")
    parser.add_argument("--output", help="folder to keep the cards in, such as model_cards")
    args = parser.parse_args()
    with user_errors():
        for path in args.paths:
            is_kept = args.output is not None or path.endswith(".json")
            print(export(path, args.output) if is_kept else write_card(path))


if __name__ == "__main__":
    main()
