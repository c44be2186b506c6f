"""Prints what this repository takes from transformers, a line for each name: parameters and their defaults, the fields
and methods of classes. Two versions' lines, compared, show what moved between them:

    python -m tests.interface > /tmp/interface.txt
"""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_models", "training", "tests")
# What transformers calls, or calls our code with, though no file here imports it.
BESIDES = (
    "transformers.generation.continuous_batching.cache.PagedAttentionCache",
    "transformers.integrations.eager_paged.eager_paged_attention_forward",
    "transformers.integrations.flash_attention.flash_attention_forward",
    "transformers.integrations.flex_attention.flex_attention_forward",
    "transformers.integrations.peft.MIN_PEFT_VERSION",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward",
    "transformers.loss.loss_utils.LOSS_MAPPING",
    "transformers.pipelines.SUPPORTED_TASKS",
)


def imported_names() -> set[str]:
    """The dotted names that Python files here import from transformers, or write as `transformers.X`."""
    names = set(BESIDES)
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names |= {f"transformers.{node.attr}"} if node.value.id == "transformers" else set()
    return names


def find(name: str):
    """The object or the module of a dotted name; an `ImportError` where this version has none."""
    module, _, attribute = name.rpartition(".")
    owner = importlib.import_module(module)
    return getattr(owner, attribute) if hasattr(owner, attribute) else importlib.import_module(name)


def parameters(function) -> str:
    """Names and defaults, without types, which say little and change often."""
    shown = [
        parameter.replace(annotation=parameter.empty) for parameter in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(shown))


def describe(name: str, value) -> Iterator[str]:
    """The lines of one name; what a class inherits is written as its parent's, and so only once."""
    if inspect.isclass(value):
        for owner in (owner for owner in value.__mro__ if owner.__module__.startswith("transformers.")):
            owner_name = f"{owner.__module__}.{owner.__qualname__}"
            if dataclasses.is_dataclass(owner):
                yield from (f"{owner_name}.{field.name} = {field.default!r}" for field in dataclasses.fields(owner))
            for key, member in vars(owner).items():
                member = getattr(member, "__func__", member)  # of a class method
                if inspect.isfunction(member) and (key == "__init__" or not key.startswith("__")):
                    yield f"{owner_name}.{key}{parameters(member)}"
                elif isinstance(member, bool | int | float | str | list | dict | tuple) and not key.startswith("__"):
                    yield f"{owner_name}.{key} = {member!r}"
    elif callable(value):
        yield name + parameters(value)
    elif isinstance(value, dict):
        yield from (f"{name}[{key!r}] = {entry!r}" for key, entry in value.items())
    elif not isinstance(value, ModuleType):
        yield f"{name} = {value!r}"


def main():
    lines = set()
    for name in imported_names():
        try:
            lines |= set(describe(name, find(name)))
        except ImportError:
            lines.add(f"{name}: there is none")
    sys.stdout.writelines(re.sub(r" at 0x[0-9a-f]+", "", line).replace("\n", " ") + "\n" for line in sorted(lines))


if __name__ == "__main__":
    main()
