"""Recipes are command lines that somebody will copy: they parse, name models that exist, and say what to expect."""

from pathlib import Path

import pytest

import hf_models
from training.arguments import parse_arguments
from training.train_gpt import GPTArguments

FOLDER = Path(__file__).parents[2] / "training" / "recipes"
RECIPES = sorted(FOLDER.glob("gpt*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_names_a_model_of_the_zoo(path):
    args = parse_arguments(GPTArguments, ["--recipe", str(path)])
    assert args.model in hf_models.list_models()
    assert args.output_dir == str(Path("runs", path.stem))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_its_hardware_and_what_to_expect(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert f"--recipe training/recipes/{path.name}" in text
    assert "# data " in text and "# hardware " in text
    assert "# result " in text or "# expected " in text


def test_the_quickstart_recipe_says_what_the_script_does_without_one():
    recipe = parse_arguments(GPTArguments, ["--recipe", str(FOLDER / "gpt-embedded.yaml"), "--output_dir", "runs/x"])
    plain = parse_arguments(GPTArguments, ["--output_dir", "runs/x"])
    recipe.recipe = None
    assert recipe == plain


def test_our_character_model_has_no_more_parameters_and_sees_no_more_tokens_than_the_one_it_is_compared_with():
    ours, theirs = (
        parse_arguments(GPTArguments, ["--recipe", str(FOLDER / f"gpt-shakespeare-char{suffix}.yaml")])
        for suffix in ("", "-nanogpt")
    )
    tokens = [args.context_length * args.global_batch_size * args.max_steps for args in (ours, theirs)]
    assert tokens[0] <= tokens[1]
    sizes = [hf_models.zoo.count_parameters(args.model) for args in (ours, theirs)]
    assert sizes[0] <= sizes[1]
