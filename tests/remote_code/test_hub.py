"""What is on the Hub loads back: by its name, where the package is not, as it was published, and without the Hub."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from tests.families import FAMILIES, every_family
from tests.old_code import age
from training.hub.publish import replace_code

NOT_PUBLISHED = ["expected.safetensors", "picture.png", "where.json", "again/*"]


@pytest.fixture
def publish(hub):
    """Puts a folder on the Hub, as the next commit of a private repository of the folder's name, or of another.
    Returns the commit."""

    def publish(folder, name=None):
        name = f"me/{name or folder.name}"
        HfApi().create_repo(name, private=True, exist_ok=True)
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, ignore_patterns=NOT_PUBLISHED).oid
        say_where(folder, name=name)
        return commit

    return publish


def say_where(folder, **where):
    (folder / "where.json").write_text(json.dumps(where))


@torch.no_grad()
def test_every_family_loads_by_its_name_and_then_without_the_hub(save, publish, load_elsewhere, hub):
    folders = [save(f"{family.main_class.__name__}-{next(iter(family.options))}") for family in FAMILIES.values()]
    for folder in folders:
        publish(folder)
    load_elsewhere("--hub", *folders)
    hub.stop()
    load_elsewhere("--hub", *folders, HF_HUB_OFFLINE="1")


@torch.no_grad()
def test_a_pinned_revision_loads_its_weights_with_its_code(save, publish, load_elsewhere, hub):
    """And so does the newest one beside it, and the code of one with the weights of the other."""
    old, new = save("ZooGPTForCausalLM-gpt2", "old"), save("ZooGPTForCausalLM-gpt2", "new")
    commits = {}
    for folder in (old, new):
        with (folder / "gpt.py").open("a") as file:
            file.write(f'\nPUBLISHED = "{folder.name}"\n')
        commits[folder.name] = publish(folder, "gpt")
    HfApi().create_tag("me/gpt", tag="v1", revision=commits["old"])
    tagged = Path(shutil.copytree(old, old.with_name("tagged")))
    mixed = Path(shutil.copytree(old, old.with_name("mixed")))

    say_where(old, name="me/gpt", revision=commits["old"], published="old")
    say_where(tagged, name="me/gpt", revision="v1", published="old")
    say_where(mixed, name="me/gpt", revision=commits["old"], code_revision=commits["new"], published="new")
    say_where(new, name="me/gpt", published="new")
    load_elsewhere("--hub", old, new, tagged, mixed)


@torch.no_grad()
def test_wrong_code_that_was_replaced_gives_the_right_answers(save, publish, load_elsewhere, hub):
    folder = save("ZooGPTForCausalLM-gpt2")
    age(folder)
    publish(folder)
    with pytest.raises(AssertionError, match="AssertionError: logits"):
        load_elsewhere("--hub", folder)
    replace_code(folder, f"me/{folder.name}")
    load_elsewhere("--hub", folder)


@pytest.mark.slow
@torch.no_grad()
def test_eight_processes_load_at_once_with_nothing_cached(save, publish, load_elsewhere, hub):
    folder = save("ZooDetrForObjectDetection-detr")  # of the most files
    publish(folder)
    load_elsewhere("--hub", "--at-once", "8", folder)


@every_family
def test_a_family_names_every_file_that_it_needs(family):
    """Its code is downloaded file by file, and each with what it names. A process that finds a file there goes on
    while another one may still be busy with what that file names in turn; it only waits for what it named itself."""
    file = inspect.getfile(family.main_class)
    needed = {Path(path).stem for path in get_relative_import_files(file)}
    assert set(get_relative_imports(file)) == needed
