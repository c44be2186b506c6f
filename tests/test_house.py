"""Which file may import which: the rules that keep each part of the house small and usable alone."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TRAINING = REPOSITORY / "training"

# A family may import the families that it is built from, and no other.
BUILT_FROM = {"gpt": set(), "bert": set(), "vit": set(), "mae": {"vit"}, "detr": {"vit"}}
ON_TOP = {"__init__", "__main__", "zoo", "verify"}  # these know every family, and neither families nor parts know them

# A script's folder is first on sys.path, so a folder of such a name would be imported in place of the library.
LIBRARIES = {"datasets", "tokenizers", "evaluate", "accelerate"}

SCRIPTS = {path.stem for path in TRAINING.glob("*.py") if path.stem.startswith(("train_", "finetune_"))}
DOORS = {"card", "publish", "draw", "probe"}  # thin files for `python -m training.NAME`
SHARED = {"figures", "metrics", "models", "processors"}  # single files that the rooms share
MAY_IMPORT = {
    "run": set(),
    **dict.fromkeys(SHARED, {"run", *SHARED}),
    "data": {"run"},
    "text": {"data", "run", *SHARED},
    "images": {"data", "run", *SHARED},
    "detection": {"images", "data", "run", *SHARED},
    "tasks": {"text", "data", "run", *SHARED},
    "hub": {"run", "figures", "models", "processors"},
}


def imports_of(path: Path) -> set[str]:
    """The full names of the modules that a file imports, anywhere in it, as far as they are in this repository."""
    package = ".".join(path.relative_to(REPOSITORY).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            module = f"{package}.{module}".rstrip(".") if node.level else module
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name for name in found if file_of(name)}


def file_of(module: str) -> Path | None:
    path = REPOSITORY / f"{module.replace('.', '/')}.py"
    return path if path.exists() else None


def test_a_part_imports_no_family_and_a_family_only_what_it_is_built_from():
    files = {path.stem: path for path in (REPOSITORY / "hf_models").glob("*.py")}
    assert set(BUILT_FROM) | ON_TOP < set(files)
    for name, path in files.items():
        imported = {one.removeprefix("hf_models.") for one in imports_of(path)}
        assert not any(one.startswith("training") for one in imported), name
        if name in ON_TOP:
            continue
        assert not imported & ON_TOP, name
        assert imported & set(BUILT_FROM) <= BUILT_FROM.get(name, set()), name
    assert not imports_of(files["base"])


def test_a_room_of_the_training_imports_only_the_rooms_below_it():
    rooms = {path.name for path in TRAINING.iterdir() if (path / "__init__.py").exists()}
    assert rooms | SHARED == set(MAY_IMPORT) | SHARED  # so a new room gets a rule
    for path in TRAINING.rglob("*.py"):
        room = path.relative_to(TRAINING).parts[0].removesuffix(".py")
        imported = {one.split(".")[1] for one in imports_of(path) if one.startswith("training.")}
        assert not imported & (SCRIPTS | DOORS), path
        if room in MAY_IMPORT:
            assert imported - {room} <= MAY_IMPORT[room], path
    for path in (REPOSITORY / "hf_models").glob("*.py"):
        assert not any(one.startswith("training") for one in imports_of(path)), path


def test_the_loop_reaches_fewer_than_ten_modules():
    reached, waiting = set(), ["training.run.loop"]
    while waiting:
        new = {one for one in imports_of(file_of(waiting.pop())) if one.startswith("training.")} - reached
        reached |= new
        waiting += new
    assert len(reached - {"training.run.loop"}) < 10, sorted(reached)


def test_the_folder_of_the_trainings_fits_on_a_screen_and_hides_no_library():
    assert len([path for path in TRAINING.iterdir() if path.name != "__pycache__"]) <= 25
    for package in ("hf_models", "training"):
        for path in (REPOSITORY / package).rglob("*"):
            is_folder = path.is_dir() and not path.is_symlink()  # training/accelerate is a link, for old commands
            assert not (is_folder and path.name in LIBRARIES), path
