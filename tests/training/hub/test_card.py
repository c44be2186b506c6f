import contextlib
import copy
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, eval_result_entries_to_yaml, parse_eval_result_entries
from PIL import Image

from tests.training.cards import EVAL_RESULTS, assert_fits, assert_valid_header, code_of
from training.hub.card import LARGEST_PICTURE, card_files, export, public_name, public_path, small_picture, write_card
from training.hub.card_edits import is_foreign
from training.hub.snippets import USES, snippet

RESULTS = {
    "model": "gpt-tiny",
    "started_from": ["someone/gpt", "gpt-earlier"],
    "family": "ZooGPTForCausalLM",
    "parameters": 1234567,
    "task": "text-generation",
    "command": "accelerate launch training/train_gpt.py --max_steps 5",
    "recipe": "training/recipes/gpt-embedded.yaml",
    "recipe_fingerprint": "3c4d5e",
    "data": {"source": "CPython 3.11.7: its docstrings", "fingerprint": "0a1b2c", "licence": "PSF-2.0"},
    "hardware": "1 x CPU, 2 threads",
    "wall_time_seconds": 900.0,
    "processor_time_seconds": 9000.0,
    "energy_kwh": {"CPU": 0.0125, "GPU": 0.25},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "eval_loss": 1.59134567,
    "eval_bits_per_byte": 2.29,
    "eval_per_class_accuracy": {"a|b": 0.75, "none": None},
    "best_step": 1300,
    "eval_tokens_per_second": 98765.4,
    "sample": "A $sample with\n```\nits own fence\n```\n\n\n## No heading\n<!-- by hand: limits -->\n<!-- end by hand",
}
ON_HUB = {"source": "nyu-mll/glue:mrpc", "fingerprint": "0a1b2c", "licence": "other"}
# What each task measures, by classes of models.
MEASURED = {
    "text-generation": ("ZooGPTForCausalLM", {"loss": 1.5, "perplexity": 4.5, "bits_per_byte": 2.3}),
    "fill-mask": ("ZooBertForPreTraining", {"loss": 2.5, "masked_accuracy": 0.5, "pseudo_perplexity": 9.0}),
    "text-classification": ("ZooGPTForSequenceClassification", {"accuracy": 0.9, "f1": 0.8, "macro_f1": 0.7}),
    "text-pair-classification": ("ZooBertForSequenceClassification", {"pearson": 0.9, "mean_squared_error": 0.1}),
    "token-classification": ("ZooBertForTokenClassification", {"precision": 0.9, "recall": 0.8, "f1": 0.85}),
    "question-answering": ("ZooBertForQuestionAnswering", {"exact_match": 0.8, "f1": 0.9}),
    "image-classification": ("ZooViTForImageClassification", {"accuracy": 0.9, "top5_accuracy": 1.0}),
    "object-detection": ("ZooDetrForObjectDetection", {"map": 0.5, "map_50": 0.7, "mar_100": 0.6}),
    "image-reconstruction": ("ZooViTMAEForPreTraining", {"loss": 0.4, "knn_accuracy": 0.8}),
}
every_task = pytest.mark.parametrize("task", MEASURED)
every_data = pytest.mark.parametrize("data", [RESULTS["data"], ON_HUB, None], ids=["local", "on the Hub", "unknown"])


def results_of(task: str, data: dict | None = None) -> dict:
    family, measured = MEASURED[task]
    others = {name: value for name, value in RESULTS.items() if not name.startswith("eval_")}
    measured = {f"eval_{name}": value for name, value in measured.items()}
    return {**others, "task": task, "family": family, "data": data, **measured, "eval_images_per_second": 7.0}


@pytest.fixture
def run(tmp_path):
    """A finished run, as far as a card looks."""
    folder = tmp_path / "gpt-embedded"
    folder.mkdir()
    (folder / "curves.png").touch()
    write(folder, RESULTS)
    return folder


def write(folder: Path, results: dict):
    (folder / "eval_results.json").write_text(json.dumps(results))


def card_of(folder: Path, results: dict | None = None) -> str:
    if results is not None:
        write(folder, results)
    return write_card(folder).read_text()


# ----------------------------------------------------------------------------------------------- what the card shows


def test_the_card_shows_what_was_measured(run):
    card = card_of(run)
    for text in (
        "# gpt-embedded\n",
        "A GPT, the decoder of the transformer",
        "([Radford et al. 2019](https://",
        "It continues a text.",
        "It has 1,234,567 parameters.",
        "- Size: `gpt-tiny` of the zoo (this package; parts: Su et al. 2021",
        "- Started from: [someone/gpt](https://huggingface.co/someone/gpt), gpt-earlier\n",
        "| loss | 1.5913 |",
        "| bits per byte | 2.29 |",
        "| class | accuracy |\n|---|---|\n| a\\|b | 0.75 |\n\n",
        "- Weights: of step 1,300, the best on these data\n",
        f"```bash\n{RESULTS['command']}\n```",
        "````text\nA $sample with\n```\nits own fence\n```",
        "- Recipe: `training/recipes/gpt-embedded.yaml`",
        "- Fingerprint of the recipe: `3c4d5e`",
        "- Data: CPython 3.11.7: its docstrings",
        "- Fingerprint of the data: `0a1b2c`",
        "- Licence of the data: PSF-2.0",
        "- Hardware: 1 x CPU, 2 threads",
        "- Time: 15 minutes by the clock",
        "- Time of the processors: 2.5 hours",
        "- Energy: 0.0125 kWh (CPU, of the whole machine), 0.25 kWh (GPU)",
        "- Versions: torch 2.13.0, transformers 5.23.0",
        "![Loss during training](curves.png)",
        "## Limits and biases",
        "@techreport{radford2019,",
        "@software{hf_models,",
    ):
        assert text in card
    for text in ("98765", "None", "none |", "${"):
        assert text not in card


@every_task
def test_every_family_and_task_has_its_words_its_paper_and_its_snippet(run, task):
    card = card_of(run, results_of(task))
    family = MEASURED[task][0]
    years = {"ZooGPT": 2019, "ZooBert": 2019, "ZooViTMAE": 2022, "ZooViT": 2021, "ZooDetr": 2020}
    year = next(year for name, year in years.items() if family.startswith(name))
    assert USES[task].does in card
    assert re.search(rf"@\w+{{\w+{year},\n", card)
    assert code_of(run) == snippet(run, task)
    assert str(run) not in card_files(run, source="me/model")["README.md"]


def leaves(value, path=()):
    """The places of all numbers."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif isinstance(value, (int, float)):
        yield path


def changed(results: dict, path: tuple, value) -> dict:
    results = copy.deepcopy(results)
    inner = results
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return results


NUMBERS = [path for path in leaves(RESULTS) if path != ("eval_tokens_per_second",)]


@pytest.mark.parametrize("path", NUMBERS, ids="-".join)
def test_a_number_comes_from_the_results_or_is_not_there(run, path):
    card = card_of(run)
    assert card_of(run, changed(RESULTS, path, 4321)) != card
    without = {card_of(run, changed(RESULTS, path, value)) for value in (None, float("nan"), float("inf"), "9", True)}
    assert len(without) == 1  # as if it were not there
    assert len(without.pop()) < len(card)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.6, "0.01 minutes"), (7199.9, "120 minutes"), (7200, "2 hours"), (3599e3, "1,000 hours"), (5e6, "1,389 hours")],
)
def test_a_time_has_three_digits_or_all_of_its_hours(run, seconds, shown):
    assert f"- Time: {shown} by the clock" in card_of(run, {**RESULTS, "wall_time_seconds": seconds})


@every_task
def test_every_number_of_the_tables_is_a_measured_one(run, task):
    results = results_of(task)
    rows = re.findall(r"^\| (.+) \| (\S+) \|$", card_of(run, results), flags=re.MULTILINE)
    measured = [value for name, value in results.items() if name.startswith("eval_") and "per_second" not in name]
    assert [float(value) for _, value in rows] == measured


def test_what_was_not_measured_leaves_no_line_and_no_empty_section(run):
    (run / "curves.png").unlink()
    kept = {name: RESULTS[name] for name in ("command", "hardware")}
    card = card_of(run, {**kept, "eval_perplexity": float("inf"), "eval_map": None, "energy_kwh": {}, "versions": {}})
    for text in (
        "## Results",
        "## A sample",
        "Time",
        "parameters",
        "Data",
        "Energy",
        "Versions",
        "@tech",
        "model-index",
    ):
        assert text not in card
    for text in ("inf", "None", "$", ".png", "\n\n\n"):
        assert text not in card
    assert "- Hardware: 1 x CPU, 2 threads" in card


def test_results_of_wrong_types_are_no_results(run):
    (run / "curves.png").unlink()
    wrong = {name: [31337] for name in RESULTS}
    card = card_of(run, {**wrong, "data": "text", "versions": ["a"], "energy_kwh": 3.0, "started_from": {"a": 1}})
    assert "31337" not in card and "## Results" not in card


def test_a_run_without_results_has_no_card(tmp_path):
    with pytest.raises(ValueError, match=r"eval_results\.json does not exist"):
        write_card(tmp_path)
    for content, message in {"{": "is not JSON", "[]": "is not an object", "\xff": "is not JSON"}.items():
        (tmp_path / "eval_results.json").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"eval_results\.json {message}"):
            write_card(tmp_path)


# -------------------------------------------------------------------------------------------------- what the Hub reads


@every_task
@every_data
def test_the_header_fits_the_hubs_schema_and_comes_back_unchanged(run, task, data):
    card = card_of(run, results_of(task, data))
    assert_valid_header(card)
    ModelCard(card).save(run / "again.md")
    assert (run / "again.md").read_text() == card


def test_the_header_says_what_the_model_is_and_comes_from(run):
    header = ModelCard(card_of(run)).data
    assert (header.library_name, header.pipeline_tag) == ("transformers", "text-generation")
    assert (header.license, header.language, header.datasets) == ("apache-2.0", "en", None)
    assert header.tags == ["hf_models", "gpt"]
    assert header.base_model == ["someone/gpt"]  # a folder of this machine is none on the Hub
    assert header.model_name == "gpt-embedded"
    measured = {result.metric_type: result.metric_value for result in header.eval_results}
    assert measured == {"loss": 1.59134567, "bits_per_byte": 2.29}
    assert {result.dataset_type for result in header.eval_results} == {"cpython-3-11-7-its-docstrings"}

    header = ModelCard(card_of(run, {**RESULTS, "data": ON_HUB})).data
    assert header.datasets == ["nyu-mll/glue"]
    assert {(one.dataset_type, one.dataset_config) for one in header.eval_results} == {("nyu-mll/glue", "mrpc")}


@every_task
def test_eval_results_hold_the_main_measure_and_come_back_unchanged(run, task):
    write(run, results_of(task, ON_HUB))
    text = card_files(run).get(".eval_results/hf_models.yaml")
    if task == "image-reconstruction":  # nothing says how good it is at that
        assert text is None
        return
    content = yaml.safe_load(text)
    assert_fits(content, EVAL_RESULTS, "eval_results")
    entries = parse_eval_result_entries(content)
    assert eval_result_entries_to_yaml(entries) == content
    main = {"text-generation": 2.3, "fill-mask": 0.5, "token-classification": 0.85, "object-detection": 0.5}
    assert [entry.value for entry in entries] == [main.get(task, 0.9)]
    assert (entries[0].dataset_id, entries[0].task_id) == ("nyu-mll/glue", "mrpc")


def test_data_that_is_not_on_the_hub_has_no_eval_results(run):
    assert set(card_files(run)) == {"README.md"}
    write(run, {**RESULTS, "data": {"source": "zalando-datasets/fashion_mnist"}})
    assert "task_id: default" in card_files(run)[".eval_results/hf_models.yaml"]


# ------------------------------------------------------------------------------------------- what a person has written


def edit(card: str, words: str) -> str:
    return re.sub(r"(?<=generated again\) -->\n).*?(?=<!-- end)", lambda _: words, card, flags=re.DOTALL)


def on_hub(run, published=None) -> str:
    return card_files(run, source="me/gpt", published=published)["README.md"]


def test_a_persons_words_stay_when_the_card_is_generated_again(run):
    (run / "README.md").write_text(edit(card_of(run), "Mine, with 100 $ and \\1.\n"))
    card = card_of(run, {**RESULTS, "eval_loss": 1.25})
    assert "Mine, with 100 $ and \\1.\n" in card and "*To be written" not in card
    assert "| loss | 1.25 |" in card
    assert card_of(run) == card


def test_words_in_a_section_that_the_template_no_longer_has_stay_too(run):
    old = "<!-- by hand: uses -->\nFor fun.\n<!-- end by hand -->\n"
    (run / "README.md").write_text(card_of(run) + old)
    card = card_of(run)
    assert card.endswith(old) and card.count("For fun.") == 1 and card_of(run) == card


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_words_written_on_the_hub_stay(run, line_end):
    card_of(run)
    published = edit(on_hub(run), "From the Hub.\n").replace("\n", line_end)
    card = on_hub(run, published)
    assert "From the Hub.\n" in card and "*To be written" not in card
    assert on_hub(run, card) == card  # a push without changes has nothing to send
    assert (run / "README.md").read_text() == card_of(run)  # nothing was written here


def test_of_words_here_and_on_the_hub_those_count_that_were_changed_since_the_last_push(run):
    card_of(run)
    published = on_hub(run)
    (run / "README.md").write_text(published)
    (run / "README.md").write_text(edit(card_of(run), "Changed here.\n"))
    assert "Changed here." in on_hub(run, published)
    published = on_hub(run, published)
    assert on_hub(run, published) == published  # the answer to the commit was lost: the same again
    (run / "README.md").write_text(published)
    (run / "README.md").write_text(edit(published, "Changed here again.\n"))
    assert "Changed here again." in on_hub(run, published)
    with pytest.raises(ValueError, match="the section 'limits' of README.md was changed both here and on the Hub"):
        on_hub(run, edit(published, "Changed there.\n"))


def test_a_run_made_anew_has_the_words_from_the_hub(run):
    card_of(run)
    published = edit(on_hub(run), "From the Hub.\n")
    published = on_hub(run, published)
    (run / "README.md").unlink()
    assert "From the Hub.\n" in on_hub(run, published)
    card_of(run)
    assert "From the Hub.\n" in on_hub(run, published)


class Place:
    """A place that the card of a run is pushed to."""

    def __init__(self, run):
        self.run, self.card = run, None

    def push(self):
        self.card = on_hub(self.run, self.card)
        (self.run / "README.md").write_text(self.card)
        assert on_hub(self.run, self.card) == self.card  # nothing more to send
        assert card_of(self.run) == card_of(self.run)

    def here(self, change):
        (self.run / "README.md").write_text(change((self.run / "README.md").read_text()))

    def there(self, change):
        self.card = change(self.card)


@pytest.fixture
def places(run):
    """Two, both with the card as it was first."""
    card_of(run)
    first, second = Place(run), Place(run)
    first.push()
    second.push()
    return first, second


def says(words):
    return lambda card: edit(card, words)


def has(**fields):
    """With these fields in the header; None takes one out."""

    def change(card):
        _, header, body = card.split("---\n", 2)
        header = {name: value for name, value in {**yaml.safe_load(header), **fields}.items() if value is not None}
        return f"---\n{yaml.safe_dump(header)}---\n{body}"

    return change


def theirs_in(card: str) -> tuple:
    """What in a card is a person's."""
    header = yaml.safe_load(card.split("---\n")[1])
    words = re.search(r"generated again\) -->\n(.*?)<!-- end", card, flags=re.DOTALL)[1]
    return words, *(header.get(name) for name in ("license", "language", "thumbnail", "tags"))


every_change = pytest.mark.parametrize(
    ("mine", "yours"),
    [
        (says("Mine.\n"), says("Yours.\n")),
        (has(license="mit"), has(license="cc0-1.0")),
        (has(thumbnail="a.png", tags=["hf_models", "gpt", "mine"]), has(thumbnail="b.png")),
        (has(license=None, language=None), has(language=["en", "de"])),
    ],
    ids=["words", "licence", "more fields", "fields taken out"],
)


@every_change
def test_what_is_changed_here_reaches_every_place(run, places, mine, yours):
    for change in (mine, yours, mine, says("Else.\n")):
        places[0].here(change)
        expected = theirs_in((run / "README.md").read_text())
        for place in places:
            place.push()
            assert theirs_in(place.card) == theirs_in((run / "README.md").read_text()) == expected


@every_change
def test_what_is_changed_in_a_place_comes_back_and_reaches_the_others(run, places, mine, yours):
    for place, change in zip([*places, *places], (mine, yours, mine, says("Else.\n")), strict=True):
        place.there(change)
        expected = theirs_in(place.card)
        for other in (place, *places):
            other.push()
            assert theirs_in(other.card) == theirs_in((run / "README.md").read_text()) == expected


@every_change
@pytest.mark.parametrize("where", ["here", "there"])
def test_what_is_taken_back_stays_away(run, places, mine, yours, where):
    before = (run / "README.md").read_text()
    places[0].here(mine)
    for place in places:
        place.push()
    assert theirs_in(place.card) != theirs_in(before)
    fields = dict.fromkeys(("license", "language", "thumbnail")) | yaml.safe_load(before.split("---\n")[1])
    getattr(places[0], where)(lambda card: says(theirs_in(before)[0])(has(**fields)(card)))
    for place in places:
        place.push()
        assert theirs_in(place.card) == theirs_in(before)


@every_change
def test_two_changes_are_for_a_person_to_choose_from(run, places, mine, yours):
    first, second = places
    first.here(mine)
    second.there(yours)
    first.push()
    before = (run / "README.md").read_text()
    with pytest.raises(ValueError, match="of README.md was changed both here and on the Hub: make it the same"):
        second.push()
    assert (run / "README.md").read_text() == before
    second.here(lambda card: mine(yours(card)))
    second.there(mine)
    for place in (second, first, second):
        place.push()
    first.here(yours)
    for place in (first, second):
        place.push()
        assert theirs_in(place.card) == theirs_in((run / "README.md").read_text())


def test_a_header_that_was_never_published_counts_where_it_is_not_ours(run):
    card = card_of(run)
    theirs = "---\nlicense: mit\nthumbnail: a.png\ntags: mine\nmetrics:\n- wer\non: 1\n2: 3\n---\n"
    header = ModelCard(on_hub(run, theirs)).data  # as the Hub's page makes it: what is missing was not taken out
    assert (header.license, header.language, header.thumbnail) == ("mit", "en", "a.png")
    assert header.tags == ["hf_models", "gpt", "mine"] and header.metrics is None
    (run / "README.md").write_text(has(license="cc0-1.0", new_version="me/b", self=1)(card))
    for written in (card_of(run), on_hub(run, card)):  # there is only ours
        header = yaml.safe_load(written.split("---\n")[1])
        assert (header["license"], header["new_version"], header["self"]) == ("cc0-1.0", "me/b", 1)
    with pytest.raises(
        ValueError, match=r"the header \(license, new_version, self, tags, thumbnail\) of README.md was"
    ):
        on_hub(run, theirs)


@pytest.mark.parametrize("header", ["{", "- a", "a: 2024-13-45", "on: 1"])
def test_a_header_without_fields_to_read_counts_as_none(run, header):
    card = card_of(run)
    assert on_hub(run, f"---\n{header}\n---\n") == on_hub(run, card)


def test_a_readme_of_another_hand_is_not_touched_which_is_said(run, capsys):
    (run / "README.md").write_text("# My own words\n")
    assert card_of(run) == on_hub(run) == "# My own words\n"
    assert "README.md is written by hand and stays as it is" in capsys.readouterr().err
    assert is_foreign("---\nlicense: mit\n---\nwords") and is_foreign("words")
    assert not any(map(is_foreign, (None, "", "---\nlicense: mit\n---\n\n")))


def test_marks_in_what_a_model_wrote_are_none_of_ours(run):
    (run / "README.md").write_text(edit(card_of(run), "Mine.\n"))
    card = card_of(run)
    assert card.count("<!-- by hand: limits") == 1 and card.count("Mine.") == 1


# ------------------------------------------------------------------------------------------------------ how to load it


def test_the_snippet_is_three_lines_that_load_and_use_the_checkpoint():
    lines = snippet('runs/a "quoted" näme').split("\n")
    assert len(lines) == 3
    assert lines[1] == (
        r'generate = pipeline("text-generation", model="runs/a \"quoted\" näme", trust_remote_code=True)'
    )
    with pytest.raises(ValueError, match="no snippet for task 'cooking'"):
        snippet("runs/a", task="cooking")


def test_the_snippet_of_a_branch_loads_all_from_there():
    code = snippet("me/vit", "image-classification", on_hub=True, revision="step-4")
    assert 'model="me/vit", revision="step-4", trust_remote_code=True' in code
    assert 'hf_hub_download("me/vit", "example.png", revision="step-4")' in code


def test_the_snippet_of_a_detector_prints_a_line_for_each_object(tmp_path):
    load, use = snippet(tmp_path, "object-detection").splitlines()[1:]
    assert load.startswith('detect = pipeline("object-detection", model=')
    assert use == f'print(*detect("{tmp_path}/example.png"), sep="\\n")'


@pytest.fixture
def checkpoint(run, make_model, tokenizer, masking_tokenizer):
    """Saves a tiny model of the task with all that its snippet needs, and its card."""

    def checkpoint(task):
        import hf_models

        family = MEASURED[task][0]
        model_class = getattr(hf_models, family)
        is_gpt, of_text = "GPT" in family, not re.search("ViT|Detr", family)
        model = make_model(model_class, **({"eos_token_id": 0, "pad_token_id": 0} if is_gpt else {}))
        model.save_pretrained(run)
        if of_text:
            (tokenizer if is_gpt else masking_tokenizer).save_pretrained(run)
        else:
            kind = hf_models.ZooDetrImageProcessor if "Detr" in family else hf_models.ZooViTImageProcessor
            kind(size={"height": 16, "width": 16}).save_pretrained(run)
            Image.effect_noise((40, 30), 64).convert("RGB").save(run / "example.png")
        card_of(run, results_of(task))
        return run

    return checkpoint


def printed_by(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return printed.getvalue()


@every_task
def test_the_code_on_the_card_runs(checkpoint, task):
    code = code_of(checkpoint(task))
    if task == "object-detection":  # noise has no objects
        code = code.replace('.png")', '.png", threshold=0.0)')
    printed = printed_by(code)
    if task == "image-reconstruction":
        assert "tensor(" in printed
    elif task not in ("text-generation", "fill-mask", "question-answering"):
        assert "score" in printed
    assert printed.strip() or task == "question-answering"


@pytest.mark.parametrize("task", ["image-classification", "image-reconstruction"])
def test_the_code_on_the_card_runs_with_a_private_repository_of_the_hub(checkpoint, task, hub):
    folder, api = checkpoint(task), HfApi()
    (folder / "README.md").write_text(card_files(folder, source="me/model")["README.md"])
    api.create_repo("me/model", private=True)
    api.upload_folder(repo_id="me/model", folder_path=folder)
    code = code_of(folder)
    assert str(folder) not in code and "hf_hub_download" in code
    assert re.search(r"score|tensor\(", printed_by(code))


# ------------------------------------------------------------------------------- what others need not know of a machine


def test_paths_of_the_machine_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "ada"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    repository = Path(__file__).parents[3]
    for word, shown in {
        str(repository / "training" / "train_gpt.py"): "training/train_gpt.py",
        str(tmp_path / "here" / "runs" / "a"): "runs/a",
        str(tmp_path / "home" / "ada" / "texts"): "texts",
        f"--data={tmp_path}/home/ada/texts": "--data=texts",
        "--data=~/texts": "--data=texts",
        f"--data={tmp_path}/a/b,{tmp_path}/here/c,user/name": "--data=b,c,user/name",
        f"file://{tmp_path}/home/ada/a": "file://a",
        f"--data=json:{tmp_path}/home/ada/a=1/b.json,csv:../c.csv": "--data=json:a=1/b.json,csv:c.csv",
        "../../secret/texts": "texts",
        "runs/../../secret": "secret",
        **{same: same for same in ("--data", "user/name", "runs/a", "nyu-mll/glue:mrpc", "a=1,b=2", "3e-4", "")},
        **{same: same for same in ("https://huggingface.co/user/name", "json:data/a.json", "hf://datasets/a/b")},
    }.items():
        assert public_path(word) == shown
    (tmp_path / "here" / "user").mkdir()
    (tmp_path / "here" / "user" / "name").mkdir()
    assert (public_name("user/name"), public_name("user/other")) == ("name", "user/other")


# ---------------------------------------------------------------------------------------------------------- model_cards


def test_a_card_is_kept_with_small_pictures_and_made_again_without_the_run(run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "curves.png")
    output = tmp_path / "model_cards"
    card = export(run, output)
    assert card == output / "gpt-embedded.md"  # after its recipe
    text = card.read_text()
    assert "![Loss during training](gpt-embedded/curves.png)" in text and 'model="runs/gpt-embedded"' in text
    assert (output / "gpt-embedded" / "curves.png").stat().st_size <= LARGEST_PICTURE
    card.write_text(edit(text, "Mine.\n"))
    assert export(output / "gpt-embedded.json") == card
    assert card.read_text() == edit(text, "Mine.\n")


def test_a_card_is_not_kept_over_the_pictures_of_its_run(run, tmp_path):
    Image.new("RGB", (4, 4)).save(run / "curves.png")
    (run / "mine.png").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match="would replace those of the run .*: choose another --output"):
        export(run, tmp_path)
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_a_card_is_kept_with_what_else_there_is_and_without_pictures_that_the_run_has_no_more(run, tmp_path):
    kept = tmp_path / "model_cards" / "gpt-embedded"
    kept.mkdir(parents=True)
    for name in ("detections.png", "mine.png", "curves.png"):
        (kept / name).write_bytes(b"old")
    with pytest.raises(OSError, match="curves.png"):  # it is empty
        export(run, kept.parent)
    assert len(list(kept.iterdir())) == 3
    Image.new("RGB", (4, 4)).save(run / "curves.png")
    export(run, kept.parent)
    assert sorted(path.name for path in kept.iterdir()) == ["curves.png", "mine.png"]


def test_a_small_picture_keeps_its_size_and_nearly_its_colours(tmp_path):
    Image.new("RGB", (640, 480), (10, 200, 90)).save(tmp_path / "a.png")
    picture = Image.open(io.BytesIO(small_picture(tmp_path / "a.png"))).convert("RGB")
    assert picture.size == (640, 480) and picture.getpixel((5, 5)) == (10, 200, 90)
