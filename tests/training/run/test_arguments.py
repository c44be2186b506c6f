import dataclasses
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from training.run.arguments import (
    RunArguments,
    bounded,
    check_bounds,
    option,
    parse_arguments,
    parse_fields,
    recipe_fingerprint,
    user_errors,
)


@dataclass
class Arguments(RunArguments):
    max_steps: int = option(50, "number of steps; more is better by 100%", at_least=1)
    context_length: int = option(64, "tokens in a row")


def parse(*argv) -> Arguments:
    return parse_arguments(Arguments, list(argv))


def recipe(tmp_path, text: str) -> str:
    path = tmp_path / "quick.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path):
    file = recipe(tmp_path, "max_steps: 7\nlearning_rate: 3e-4\n")
    arguments = parse("--recipe", file, "--max_steps", "9")
    assert (arguments.max_steps, arguments.learning_rate, arguments.context_length) == (9, 3e-4, 64)
    assert arguments.recipe == file


def test_a_recipe_reads_values_by_the_type_of_the_field_not_by_yaml(tmp_path):
    text = "learning_rate: 6e-4\nmixed_precision: no\ncompile: yes\nmicro_batch_size: null\nhub_model_id: 123\n"
    arguments = parse("--recipe", recipe(tmp_path, text))
    assert arguments.learning_rate == 6e-4
    assert arguments.mixed_precision == "no"
    assert arguments.compile is True
    assert arguments.micro_batch_size is None
    assert arguments.hub_model_id == "123"


def test_the_fingerprint_of_a_recipe_is_that_of_its_settings(tmp_path):
    fingerprint = recipe_fingerprint(recipe(tmp_path, "max_steps: 7\nseed: 1\n"))
    assert fingerprint == recipe_fingerprint(recipe(tmp_path, "# result  eval_loss 1.0\nseed: 1\n\nmax_steps: 7\n"))
    assert fingerprint != recipe_fingerprint(recipe(tmp_path, "max_steps: 7\nseed: 2\n"))
    assert recipe_fingerprint(str(tmp_path / "gone.yaml")) is None  # a run does not fail for it at its end


def test_flags_can_be_set_and_unset(tmp_path):
    file = recipe(tmp_path, "compile: true\n")
    assert parse("--recipe", file).compile
    assert not parse("--recipe", file, "--no-compile").compile
    assert parse("--gradient_checkpointing").gradient_checkpointing


def test_optional_values_can_be_set_back_to_none(tmp_path):
    file = recipe(tmp_path, "micro_batch_size: 4\n")
    assert parse("--recipe", file).micro_batch_size == 4
    for none in ("none", "None", "null", ""):
        assert parse("--recipe", file, "--micro_batch_size", none).micro_batch_size is None


def test_the_output_folder_is_named_after_the_recipe_or_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/train_gpt.py"])
    assert parse().output_dir == os.path.join("runs", "train_gpt")
    assert parse("--recipe", recipe(tmp_path, "{}")).output_dir == os.path.join("runs", "quick")
    assert parse("--output_dir", "here").output_dir == "here"


@dataclass
class Bounded:
    part: float | None = bounded(None, above=0, at_most=1)
    count: int = bounded(2, at_least=2)
    share: float = bounded(0.5, at_least=0, at_most=1)
    free: float = math.inf

    def __post_init__(self):
        check_bounds(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"part": 0}, "part must be above 0 and at most 1, not 0"),
        ({"part": math.nan}, "part must be above 0 and at most 1, not nan"),
        ({"count": 1}, "count must be at least 2, not 1"),
        ({"count": math.inf}, "count must be at least 2, not inf"),
        ({"share": 1.5}, "share must be from 0 to 1, not 1.5"),
    ],
)
def test_a_field_out_of_its_bounds_is_named(values, message):
    Bounded(part=1, count=2, share=0)
    with pytest.raises(ValueError) as caught:
        Bounded(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_stps", "3"], "unknown option --max_stps; did you mean --max_steps?"),
        (["--max-steps=3"], "unknown option --max-steps; did you mean --max_steps?"),
        (["--qqqqq"], "unknown option --qqqqq; --help lists the known ones"),
        (["embedded"], "unexpected argument 'embedded'"),
        (["--max_steps", "many"], "--max_steps must be an integer, not 'many'"),
        (["--max_steps", "1e3"], "--max_steps must be an integer, not '1e3'"),
        (["--learning_rate", "fast"], "--learning_rate must be a number, not 'fast'"),
        (["--schedule", "cosin"], "--schedule must be cosine or linear or constant, not 'cosin'"),
        (["--max_steps"], "expected one argument"),
        (["--max_steps", "0"], "max_steps must be at least 1, not 0"),
        (["--learning_rate", "nan"], "learning_rate must be above 0, not nan"),
        (["--ema_decay", "1"], "ema_decay must be at least 0 and below 1"),
        (["--layer_decay", "1.1"], "layer_decay must be above 0 and at most 1, not 1.1"),
        (["--patience", "-1"], "patience must be at least 0, not -1"),
        (["--cooldown_steps", "10"], "cooldown_steps belongs to schedule 'constant'"),
        (["--push_to_hub"], "push_to_hub needs hub_model_id"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(argv, message):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stps: 3", "unknown option 'max_stps'; did you mean max_steps?"),
        ("recipe: other.yaml", "unknown option 'recipe'"),
        ("max_steps: many", "max_steps must be an integer, not 'many'"),
        ("max_steps: [1, 2]", "max_steps must be an integer, not ['1', '2']"),
        ("compile: maybe", "compile must be true or false, not 'maybe'"),
        ("- max_steps", "must be lines of `name: value`, not a list"),
        ("", "must be lines of `name: value`"),
        ("max_steps: 3\n  seed: {", "line 2, column"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_name(tmp_path, text, message):
    file = recipe(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        parse("--recipe", file)
    assert message in str(caught.value) and file in str(caught.value)


def test_a_missing_recipe_is_refused():
    with pytest.raises(ValueError, match=r"recipe nowhere\.yaml does not exist"):
        parse("--recipe", "nowhere.yaml")


def test_help_shows_every_option_with_its_group_and_default(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--recipe", recipe(tmp_path, "max_steps: 77"), "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for field in dataclasses.fields(Arguments):
        assert f"--{field.name}" in shown
        assert field.metadata["help"] in shown
    assert "(default: 77)" in shown and "optimization:" in shown and "this script:" in shown


SCRIPT = """
from training.run.arguments import user_errors
from huggingface_hub.dataclasses import strict
from dataclasses import dataclass

@strict
@dataclass
class Config:
    width: int = 4

    def validate_width(self):
        if self.width % 2:
            raise ValueError("width must be even,\\n   not 3")

with user_errors():
    {body}
"""


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise ValueError('first\\n  second')", "error: first second"),
        ("open('/nowhere/at/all')", "error: /nowhere/at/all: No such file or directory"),
        ("Config(width=3)", "error: width must be even, not 3"),
        ("Config(width='x')", "error: Field 'width' expected int, got str (value: 'x')"),
        ("raise ValueError", "error: ValueError"),
    ],
)
def test_user_errors_are_one_line_on_stderr_and_exit_code_2(body, line):
    for rank, expected in (("0", line + "\n"), ("1", "")):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(body=body)],
            env={**os.environ, "RANK": rank, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr, done.stdout) == (2, expected, "")


def test_a_bug_is_no_user_error():
    with pytest.raises(KeyError), user_errors():
        raise KeyError("bug")


def test_fields_of_a_config_are_typed_as_in_yaml_lists_too():
    text = "hidden_size=96,stem_channels=[32,64],norm=rmsnorm,use_bias=false"
    expected = {"hidden_size": 96, "stem_channels": [32, 64], "norm": "rmsnorm", "use_bias": False}
    assert parse_fields(text) == expected
