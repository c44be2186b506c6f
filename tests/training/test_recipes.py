"""Recipes are command lines that somebody will copy: they parse, name models that exist, and say what to expect."""

from pathlib import Path

import pytest

import hf_models
from training.finetune_bert import FineTuningArguments
from training.run.arguments import is_checkpoint, parse_arguments
from training.tasks.read import BENCHMARKS
from training.train_bert import BertArguments
from training.train_detr import DetrArguments
from training.train_gpt import GPTArguments
from training.train_vit import ViTArguments

FOLDER = Path(__file__).parents[2] / "training" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SCRIPTS = {  # by the beginning of a recipe's name
    "gpt": ("train_gpt", GPTArguments),
    "bert": ("train_bert", BertArguments),
    "finetune": ("finetune_bert", FineTuningArguments),
    "vit": ("train_vit", ViTArguments),
    "mae": ("train_vit", ViTArguments),
    "detr": ("train_detr", DetrArguments),
}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def script_of(path):
    """The script that a recipe is for, and the class of its arguments."""
    kind = path.stem.split("-")[0]
    return SCRIPTS["gpt" if kind.startswith("gpt") else kind]


def arguments_of(path):
    return parse_arguments(script_of(path)[1], ["--recipe", str(path)])


def header_of(path):
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


@every_recipe
def test_a_recipe_parses_and_names_a_model_of_the_zoo_or_a_checkpoint(path):
    args = arguments_of(path)
    assert args.model in hf_models.list_models() or is_checkpoint(args.model)
    assert args.output_dir == str(Path("runs", path.stem))
    assert (args.warmup_steps or 0) < args.max_steps


@every_recipe
def test_a_recipe_begins_with_its_command_its_hardware_and_what_to_expect(path):
    header = header_of(path)
    assert f"training/{script_of(path)[0]}.py" in header and f"--recipe training/recipes/{path.name}" in header
    assert "# data " in header and "# hardware " in header
    assert "# result " in header or "# expected " in header


@every_recipe
def test_data_and_checkpoints_that_a_recipe_takes_are_in_its_header(path):
    args, lines, header = arguments_of(path), path.read_text().splitlines(), header_of(path)
    if any(line.startswith("data:") for line in lines):
        assert BENCHMARKS[args.data].hub in header if args.data in BENCHMARKS else args.data in header
    else:
        assert args.data == "embedded" and ("--data " in header or "embedded" in header)
    if is_checkpoint(args.model):
        assert args.model in header


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith("finetune")], ids=lambda p: p.stem)
def test_a_recipe_to_fine_tune_has_the_task_of_its_data(path):
    args = arguments_of(path)
    assert args.task == (BENCHMARKS[args.data].kind if args.data in BENCHMARKS else "classify")
    assert args.warmup_steps < args.eval_every


@pytest.mark.parametrize("name", ["gpt-embedded", "bert-embedded", "vit-digits", "detr-digits"])
def test_the_quickstart_recipe_says_what_the_script_does_without_one(name):
    arguments = SCRIPTS[name.split("-")[0]][1]
    recipe = parse_arguments(arguments, ["--recipe", str(FOLDER / f"{name}.yaml"), "--output_dir", "runs/x"])
    plain = parse_arguments(arguments, ["--output_dir", "runs/x"])
    recipe.recipe = None
    assert recipe == plain


def test_with_few_labels_both_beginnings_have_the_same_budget():
    scratch, pretrained = (
        vars(parse_arguments(ViTArguments, ["--recipe", str(FOLDER / f"vit-fashion-1percent{suffix}.yaml")]))
        for suffix in ("", "-mae")
    )
    different = {name for name in scratch if scratch[name] != pretrained[name]}
    assert different <= {"recipe", "output_dir", "model", "learning_rate", "layer_decay"}


def test_our_character_model_has_no_more_parameters_and_sees_no_more_tokens_than_the_one_it_is_compared_with():
    ours, theirs = (
        parse_arguments(GPTArguments, ["--recipe", str(FOLDER / f"gpt-shakespeare-char{suffix}.yaml")])
        for suffix in ("", "-nanogpt")
    )
    tokens = [args.context_length * args.global_batch_size * args.max_steps for args in (ours, theirs)]
    assert tokens[0] <= tokens[1]
    sizes = [hf_models.zoo.count_parameters(args.model) for args in (ours, theirs)]
    assert sizes[0] <= sizes[1]
