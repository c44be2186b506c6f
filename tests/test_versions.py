"""Which versions of transformers the package was tested with, and what it says on a newer one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from hf_models import ZooGPTForCausalLM
from hf_models.__main__ import main
from hf_models.base import TESTED_TRANSFORMERS

REPOSITORY = Path(__file__).parents[1]
NEWER = f"{Version(TESTED_TRANSFORMERS[-1]).major}.99.0"

IMPORTED = "import hf_models, hf_models.base"
TRAVELLED = """
from transformers import AutoModel
for name in ("first", "second"):
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
"""


def run(code, version, folder, isolated):
    """What a process says on standard error that finds this version of transformers."""
    set_version = f"import transformers; transformers.__version__ = {version!r}\n"
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *(["-P", "-E"] if isolated else []), "-c", set_version + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "was tested with transformers" in line]


@pytest.mark.parametrize("code", [IMPORTED, TRAVELLED], ids=["package", "checkpoints"])
def test_a_newer_transformers_is_mentioned_once_in_one_line(make_gpt, tmp_path, code):
    for name in ("first", "second"):
        make_gpt(ZooGPTForCausalLM).save_pretrained(tmp_path / name)
    isolated = code is TRAVELLED
    said = run(code, NEWER, tmp_path, isolated)
    assert len(said) == 1 and TESTED_TRANSFORMERS[-1] in said[0] and NEWER in said[0]


def test_a_tested_transformers_is_not_mentioned(tmp_path):
    assert not run(IMPORTED, TESTED_TRANSFORMERS[-1], tmp_path, isolated=False)


def test_the_versions_are_listed_with_the_zoo(capsys):
    main("gpt-char")
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(version in last for version in TESTED_TRANSFORMERS)


def test_what_ci_runs_is_what_was_tested():
    pinned = re.search(r"^transformers==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    others = re.search(r"^for version in (.*); do", (REPOSITORY / ".ci/run").read_text(), re.MULTILINE)[1].split()
    assert (*others, pinned) == TESTED_TRANSFORMERS
    oldest = re.search(r'"transformers>=(.*),<', (REPOSITORY / "pyproject.toml").read_text())[1]
    assert TESTED_TRANSFORMERS[0].startswith(oldest)
