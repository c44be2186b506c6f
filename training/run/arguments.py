"""The command line of every train script: a dataclass of options, a recipe of defaults, one-line errors.

A script adds its own options in a subclass of `RunArguments`, and calls `parse_arguments` with it inside
`user_errors()`. Values come from the dataclass, then from `--recipe FILE.yaml`, then from the command line; the last
one wins. Every value arrives as text and is converted by the type of its field, so `learning_rate: 3e-4` and
`mixed_precision: no` mean the same in a recipe as in a shell. (YAML itself would read a string and false.)
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import operator
import os
import re
import sys
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm

# ---- bounds of the fields of a dataclass ----

BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def bounded(default=dataclasses.MISSING, **bounds: float):
    """Returns a field of a dataclass whose value `check_bounds` checks.

    bounds: any of `at_least`, `above`, `at_most`, `below`. A value with a bound is also finite, or None.
    """
    return dataclasses.field(default=default, metadata=bounds)


def check_bounds(instance) -> None:
    """Raises ValueError naming the first field of a dataclass that is out of its bounds."""
    for field in dataclasses.fields(instance):
        value, bounds = getattr(instance, field.name), {k: v for k, v in field.metadata.items() if k in BOUNDS}
        if value is None or not bounds:
            continue
        if not math.isfinite(value) or not all(BOUNDS[name](value, bound) for name, bound in bounds.items()):
            words = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
            if bounds.keys() == {"at_least", "at_most"}:
                words = f"from {bounds['at_least']} to {bounds['at_most']}"
            raise ValueError(f"{field.name} must be {words}, not {value}")


# ---- the options that scripts share ----


def option(default, help: str, group: str = "this script", **bounds: float):
    """Returns a field of an arguments dataclass.

    Args:
        help: what `--help` says about it.
        group: the heading that `--help` lists it under.
        bounds: as in `bounded`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **bounds})


@dataclass
class RunArguments:
    """The options that all train scripts share.

    Raises:
        ValueError: an option is out of its bounds, or does not go with another one; the message names it.
    """

    recipe: str | None = option(None, "YAML file of defaults for the options below", "run")
    output_dir: str | None = option(None, "folder for all results; None: runs/<name of the recipe or script>", "run")
    restart: bool = option(False, "move an earlier run in output_dir aside instead of resuming it", "run")
    seed: int = option(1337, "seed of the weights, the data order and the dropout", "run", at_least=0)
    log_every: int = option(10, "steps between two lines of metrics.jsonl", "run", at_least=1)
    eval_every: int = option(250, "steps between two evaluations; 0: only at the end", "run", at_least=0)
    save_every: int = option(
        250, "steps between two checkpoints; besides, every evaluated step is saved", "run", at_least=0
    )
    keep_checkpoints: int = option(2, "number of newest checkpoints to keep", "run", at_least=1)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "experiment tracker", "run")

    data: str = option("embedded", "'embedded', a Hub data set name, or a local file or folder", "data and model")
    model: str | None = option(
        None, "a name from `python -m hf_models`, or a checkpoint (folder or Hub name) to start from", "data and model"
    )

    max_steps: int = option(1000, "number of optimizer steps", "optimization", at_least=1)
    global_batch_size: int = option(
        32, "samples in one step, whatever the number of processes", "optimization", at_least=1
    )
    micro_batch_size: int | None = option(
        None,
        "samples in one forward of one process; None: its whole share of the global batch",
        "optimization",
        at_least=1,
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "muon: on the blocks' matrices and filters, AdamW elsewhere", "optimization"
    )
    learning_rate: float = option(1e-3, "peak learning rate", "optimization", above=0)
    matrix_learning_rate: float | None = option(
        None, "Muon's peak learning rate; None: the same", "optimization", above=0
    )
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only", "optimization", at_least=0)
    beta1: float = option(0.9, "AdamW's decay of the mean of the gradient", "optimization", at_least=0, below=1)
    beta2: float = option(
        0.99, "AdamW's decay of the mean of the squared gradient", "optimization", at_least=0, below=1
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "course of the learning rate after the warm-up", "optimization"
    )
    warmup_steps: int = option(100, "steps of linear warm-up", "optimization", at_least=0)
    cooldown_steps: int = option(
        0, "last steps, in which a constant schedule falls to zero", "optimization", at_least=0
    )
    final_learning_rate: float = option(
        0.1, "end of cosine and linear, as a fraction of the peak", "optimization", at_least=0, at_most=1
    )
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: never", "optimization", at_least=0)
    ema_decay: float = option(
        0.0, "decay of an exponential moving average of the weights; 0: none", "optimization", at_least=0, below=1
    )
    layer_decay: float = option(
        1.0,
        "each layer's learning rate, as a fraction of that of the layer above it",
        "optimization",
        above=0,
        at_most=1,
    )
    patience: int = option(
        0, "evaluations in a row without a better one after which to stop; 0: never", "optimization", at_least=0
    )

    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "None: as `accelerate launch` set it", "speed and memory"
    )
    compile: bool = option(False, "compile the model with torch.compile", "speed and memory")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", "speed and memory"
    )

    data_name: str | None = option(None, "what the card calls the data; None: as `data` does", "publishing")
    data_license: str | None = option(None, "licence of the data, for the card; None: what the data says", "publishing")
    push_to_hub: bool = option(False, "publish the result at the end", "publishing")
    hub_model_id: str | None = option(None, "user/name of the repository to publish to", "publishing")
    hub_private: bool = option(False, "make the repository private, and refuse a public one", "publishing")

    def __post_init__(self):
        check_bounds(self)
        if self.cooldown_steps and self.schedule != "constant":
            raise ValueError(f"cooldown_steps belongs to schedule 'constant', not to {self.schedule!r}")
        if self.cooldown_steps > self.max_steps:
            raise ValueError(f"cooldown_steps is {self.cooldown_steps}, more than the {self.max_steps} of max_steps")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id, the user/name of the repository")


def with_defaults(cls, **defaults) -> type:
    """Returns a subclass of the dataclass `cls` with other defaults, for a script to subclass."""
    changed = [field for field in dataclasses.fields(cls) if field.name in defaults]
    fields = [(field.name, field.type, option(defaults[field.name], **field.metadata)) for field in changed]
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,))


def parse_arguments(cls, argv: list[str] | None = None):
    """Returns an instance of the dataclass `cls` from its defaults, the recipe and the command line.

    Args:
        argv: the words of the command line; None: those of this process.

    Raises:
        ValueError: an option is unknown, and the message names the nearest known one; a value has the wrong type or is
            out of its bounds; or the recipe is missing or is no mapping of names to values.
    """
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    recipe = first.parse_known_args(argv)[0].recipe
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)

    values = {name: field.default for name, field in fields.items()}
    if recipe is not None:
        for name, text in _read_recipe(recipe).items():
            if name not in fields or name == "recipe":
                raise ValueError(f"{recipe}: unknown option {name!r}; {_nearest(name, fields)}")
            values[name] = _convert(text, types[name], f"{recipe}: {name}")

    parser = _Parser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups = {}
    for name, field in fields.items():
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if types[name] is bool:
            form = {"action": argparse.BooleanOptionalAction}
        else:
            form = {"metavar": _describe(types[name], "|")}
        help = field.metadata["help"].replace("%", "%%")
        groups[title].add_argument(f"--{name}", default=values[name], help=help, **form)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=")[0]
        if name.startswith("-"):
            raise ValueError(f"unknown option {name}; {_nearest(name, fields, '--')}")
        raise ValueError(f"unexpected argument {word!r}: options are written --name value")

    for name, value in vars(given).items():  # from the command line, values are text
        values[name] = _convert(value, types[name], f"--{name}") if isinstance(value, str) else value
    if values.get("output_dir", "") is None:
        values["output_dir"] = str(Path("runs", Path(recipe or sys.argv[0]).stem))
    return cls(**values)


def is_checkpoint(model: str) -> bool:
    """Returns whether `--model` names a folder or a repository of the Hub, and not a size of the zoo."""
    return "/" in model or Path(model).exists()


def split_names(text: str | None) -> list[str] | None:
    """Returns ["cat", "dog"] from "cat, dog"; None from None."""
    return None if text is None else [name.strip() for name in text.split(",")]


def parse_fields(text: str | None) -> dict:
    """Returns {"hidden_size": 256, "norm": "rmsnorm"} from "hidden_size=256,norm=rmsnorm", with values as in YAML."""
    fields = {}
    for item in filter(None, re.split(r",(?![^\[]*\])", text or "")):  # at commas outside of a list
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"config: {item!r} is not of the form field=value")
        fields[name.strip()] = yaml.safe_load(value)
    return fields


@contextmanager
def user_errors():
    """Ends the script with exit code 2 and one line `error: ...` if the block raises ValueError or OSError.

    It is for the set-up of a script, where the user can mend such an error. The first process of each machine prints
    the line, since each machine has its own data. An invalid model configuration counts too: `huggingface_hub` wraps
    its ValueError or TypeError into an error of its own.
    """
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
            print_error(one_line(error))
        raise SystemExit(2) from None


def print_error(message: str):
    """Prints `error: ...` to stderr, on a line of its own even if there is a progress bar."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()


def one_line(error: Exception) -> str:
    """Returns the message of an exception on one line."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # without "Class validation error for validator ..."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _read_recipe(path: str) -> dict:
    """Returns the mapping in a YAML file, every scalar as the text that was written."""
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"recipe {path}{position}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {path} must be lines of `name: value`, not a {type(recipe).__name__}")
    return recipe


def recipe_fingerprint(path: str) -> str | None:
    """Returns the sha256 of a recipe's settings, without their order and comments; None if it cannot be read."""
    try:
        return hashlib.sha256(json.dumps(_read_recipe(path), sort_keys=True).encode()).hexdigest()
    except (ValueError, OSError):
        return None


def _convert(text, annotation, where: str):
    """Returns the value of type `annotation` that `text` spells; `where` names the option in an error."""
    choices = typing.get_args(annotation)
    if type(None) in choices:
        if isinstance(text, str) and text.lower() in ("", "~", "null", "none"):
            return None
        return _convert(text, next(choice for choice in choices if choice is not type(None)), where)
    try:
        if not isinstance(text, str):
            raise ValueError
        if typing.get_origin(annotation) is Literal:
            return choices[[str(choice) for choice in choices].index(text)]
        if annotation is bool:
            return {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
        return annotation(text)
    except (ValueError, KeyError):
        raise ValueError(f"{where} must be {_describe(annotation)}, not {text!r}") from None


def _describe(annotation, separator: str = " or ") -> str:
    """Returns the type in words for an error; with "|", the placeholder that `--help` shows."""
    choices = [choice for choice in typing.get_args(annotation) if choice is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return separator.join(map(str, choices))
    if choices:
        return _describe(choices[0], separator)
    names = {int: "an integer", float: "a number", str: "one text value", bool: "true or false"}
    return names[annotation] if separator == " or " else names[annotation].split()[-1].upper()


def _nearest(name: str, known, prefix: str = "") -> str:
    matches = difflib.get_close_matches(name.strip("-").replace("-", "_"), known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{matches[0]}?" if matches else "--help lists the known ones"
