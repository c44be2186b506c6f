"""Runs the suite against other versions of the libraries than `constraints.txt` names, in an environment of its own.

    python -m tests.against transformers==5.25.0
    python -m tests.against --part transformers==5.17.0
    python -m tests.against torch==2.14.1 torchvision==0.29.1 timm==1.0.31 -- tests/test_detr.py -x

The environment is a temporary folder, or with `--venv FOLDER` one that stays and is used again. What stands behind `--`
goes to pytest. `docs/transformers.md` says what to do with the result before a release.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

# What has to hold on every supported version: caches and generation, runtimes, parity with the stock classes, code that
# travels, fixtures, and a training that is killed and resumed.
PART = [
    "tests/test_base.py",
    "tests/test_families.py",
    "tests/test_fixtures.py",
    "tests/test_gpt_decoder.py",
    "tests/test_gpt_runtimes.py",
    "tests/test_bert_runtimes.py",
    "tests/test_runtimes.py",
    "tests/parity",
    "tests/remote_code/test_remote_code.py",
    "tests/faults/test_kill.py::test_killed_at_a_place_and_repeated_ends_bit_identical[mid-step-train_gpt-0.1]",
]


BOUND_BY = {"transformers": {"huggingface-hub", "tokenizers"}}  # a version of the first works with some of these only


def install(folder: Path, requirements: list[str]):
    """Makes an environment in the folder, with the project, what its tests need, and these versions."""
    names = {name_of(requirement) for requirement in requirements}
    names |= {bound for name in names for bound in BOUND_BY.get(name, ())}
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    venv.create(folder, with_pip=True)
    constraints.write_text("\n".join(line for line in lines if name_of(line) not in names))
    command = [folder / "bin/python", "-m", "pip", "install", "--quiet", "-c", constraints, "-e", ".[test]"]
    subprocess.run([*command, *requirements], cwd=REPOSITORY, check=True)


def name_of(requirement: str) -> str:
    """The normalised name of the package in a requirement; an empty one for a comment."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]*", requirement).group()).lower()


def main():
    arguments, options = sys.argv[1:], []
    if "--" in arguments:
        place = arguments.index("--")
        arguments, options = arguments[:place], arguments[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", nargs="+", metavar="PACKAGE==VERSION")
    parser.add_argument("--part", action="store_true", help="run only what has to hold on every supported version")
    parser.add_argument("--venv", type=Path, help="folder of the environment, which stays; default: a temporary one")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.venv or Path(temporary)).resolve()
        install(folder, args.requirements)
        tests = PART if args.part else []
        command = [folder / "bin/python", "-m", "pytest", *tests, *options]
        sys.exit(subprocess.run(command, cwd=REPOSITORY).returncode)


if __name__ == "__main__":
    main()
