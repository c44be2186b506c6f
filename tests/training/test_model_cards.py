"""The cards in model_cards/, the recipes they belong to and the zoo say the same."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import hf_models
from tests.training.cards import assert_valid_header
from tests.training.test_recipes import RECIPES, arguments_of, header_of
from training.hub.card import LARGEST_PICTURE, export
from training.run.arguments import is_checkpoint, recipe_fingerprint

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "model_cards"
CARDS = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "template")
RECIPE_OF = {path.stem: path for path in RECIPES}
# Of a published command: what says where its data is and where its results go. All else is the recipe's.
PLACES = {"--recipe", "--data", "--data_name", "--data_license", "--output_dir", "--restart", "--num_processes"}

every_card = pytest.mark.parametrize("name", CARDS)


def results_of(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@every_card
def test_a_card_is_what_its_results_give_and_what_a_person_wrote(name, tmp_path):
    for path in FOLDER.glob(f"{name}*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    card = export(tmp_path / f"{name}.json")  # python -m training.card model_cards/*.json
    assert card.read_text() == (FOLDER / f"{name}.md").read_text()
    assert_valid_header(card.read_text())


@every_card
def test_a_card_is_of_a_run_of_its_recipe_as_it_is_now(name):
    results, args = results_of(name), arguments_of(RECIPE_OF[name])
    assert results["recipe"] == f"training/recipes/{name}.yaml"
    assert results["recipe_fingerprint"] == recipe_fingerprint(str(RECIPE_OF[name]))
    words = shlex.split(results["command"])
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= PLACES
    assert results["recipe"] in words
    if is_checkpoint(args.model):
        assert Path(args.model).name in results["started_from"] or args.model in results["started_from"]
    else:
        assert results["model"] == args.model


@every_card
def test_the_model_of_a_card_is_in_the_zoo(name):
    results = results_of(name)
    model_class = getattr(hf_models, results["family"])
    if results["model"] is None:
        assert results["started_from"]
    else:
        assert results["model"] in hf_models.list_models()
        assert model_class.config_class is hf_models.zoo.find_entry(results["model"]).config_class


@every_card
def test_the_recipe_states_the_result_of_its_card(name):
    results, header = results_of(name), header_of(RECIPE_OF[name])
    line = re.search(r"^# result +(.*)$", header, re.MULTILINE)[1]
    stated = re.findall(r"(eval_\w+) (-?[\d.]*\d)", line)
    assert stated
    for measure, number in stated:
        decimals = len(number.partition(".")[2])
        assert f"{results[measure]:.{decimals}f}" == number


@every_card
def test_the_pictures_of_a_card_are_there_and_small(name):
    card = (FOLDER / f"{name}.md").read_text()
    shown = set(re.findall(rf"\({name}/(\S+\.png)\)", card))
    assert shown == {path.name for path in (FOLDER / name).iterdir()} and "curves.png" in shown
    assert all((FOLDER / name / picture).stat().st_size <= LARGEST_PICTURE for picture in shown)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_with_a_result_has_a_card(path):
    assert ("# result " in header_of(path)) == (path.stem in CARDS)


def test_all_that_is_in_model_cards_belongs_to_a_card():
    others = {"template.md", "papers.bib"}
    assert {path.name.split(".")[0] for path in FOLDER.iterdir() if path.name not in others} == set(CARDS)


def test_the_readme_shows_pictures_that_are_there():
    shown = re.findall(r"\((model_cards/[^\s)]+)\)", (ROOT / "README.md").read_text())
    assert shown and all((ROOT / place).exists() for place in shown)
