"""Gives a checkpoint of an earlier version of this package the current code, without reading its weights.

A checkpoint contains the code that it was saved with. A later release of transformers may call that code in a way that
it does not understand. `renew` finds what the folder of a checkpoint has to contain instead: the code that
`save_pretrained` would write today, and what depends on it in config.json, README.md and SHA256SUMS.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import hf_models
from hf_models.verify import SUMS, is_listed
from hf_models.zoo import ZOO
from training.hub.card import renewed_card
from training.run.folder import text_of, write_atomic

PACKAGE = Path(hf_models.__file__).parent
FAMILIES = {entry.config_class.model_type: entry.config_class for entry in ZOO.values()}
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", flags=re.MULTILINE)
SUM = re.compile(r"[0-9a-f]{64} [ *](?P<name>.+)")


class Renewal(NamedTuple):
    """What to change in a folder so that it has the current code."""

    files: dict[str, bytes]  # files that it has to contain, by name; SHA256SUMS is the last
    delete: list[str]  # files of code that only the earlier code needed

    def changed(self, folder: Path) -> list[str]:
        """Returns the names of the files that the folder does not have yet, or has with another content."""
        paths = {name: folder / name for name in self.files}
        return [name for name, path in paths.items() if not path.exists() or path.read_bytes() != self.files[name]]

    def lines(self, folder: Path) -> list[str]:
        """Returns a line for each change; none if nothing has to change."""
        return [f"  delete {name}" for name in self.delete] + [f"  write {name}" for name in self.changed(folder)]

    def apply(self, folder: Path):
        """Changes the folder.

        If this is interrupted, another `renew` completes it. That finds what is left to delete through the imports of
        the old files, so new files are written after old ones are deleted.
        """
        for name in self.delete:
            (folder / name).unlink()
        for name in self.changed(folder):
            write_atomic(folder / name, self.files[name])


def renew(folder: Path) -> Renewal:
    """Finds what to change in the folder of a checkpoint, and changes nothing.

    Missing files of code are added, but a missing README.md or SHA256SUMS is not made.

    Raises:
        ValueError: the folder holds no checkpoint of this package, or a file of it is damaged.
    """
    config = _read_config(folder / "config.json")
    ours = _code(PACKAGE, _files_of(FAMILIES[config["model_type"]].family_auto_map.values()))
    files = {name: (PACKAGE / name).read_bytes() for name in ours}
    here = {path.name for path in folder.glob("*.py")}
    sums = text_of(folder / SUMS)
    listed = None if sums is None else _read_sums(folder / SUMS, sums)

    auto_map, kept = config.get("auto_map") or {}, _foreign_entries(config, ours)
    earlier = _code(folder, _files_of(place for name, place in auto_map.items() if name not in kept))
    foreign = here - set(earlier) | _files_of(kept.values())
    needed = {*ours, *_code(folder, foreign, unread=ours)}
    obsolete = [name for name in earlier if name not in needed and (listed is None or name in listed)]
    delete = [name for name in reversed(obsolete) if name in here]

    renewed = _renewed_config(config, ours)
    text = json.dumps(renewed, indent=2, sort_keys=True) + "\n"  # as transformers writes it
    files["config.json"] = (folder / "config.json").read_bytes() if renewed == config else text.encode()
    if (readme := renewed_card(folder, hf_models.__version__)) is not None:
        files["README.md"] = readme.encode()
    if listed is not None:
        gone = {name for name in listed if name.endswith(".py") and name not in here} | set(delete)
        lines = {name: line for name, line in listed.items() if name not in gone}
        for name in filter(is_listed, files):
            lines[name] = f"{hashlib.sha256(files[name]).hexdigest()}  {name}"
        files[SUMS] = "".join(f"{lines[name]}\n" for name in sorted(lines)).encode()
    return Renewal(files, delete)


def _is_ours(config) -> bool:
    # In a list, unlike in a dict, a value that cannot be hashed may be looked for.
    return isinstance(config, dict) and config.get("model_type") in list(FAMILIES)


def _read_config(path: Path) -> dict:
    """Returns the config.json of a checkpoint. Raises ValueError unless the current code has its classes."""
    if not path.exists():
        raise ValueError(f"no config.json in {path.parent}, so it is not a checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not _is_ours(config):
        model_type = config.get("model_type") if isinstance(config, dict) else None
        raise ValueError(
            f"{path}: model_type is {model_type!r}, not one of {', '.join(FAMILIES)}: "
            "only the code of this package's own models can be replaced"
        )
    classes = [place.split(".")[1] for place in FAMILIES[config["model_type"]].family_auto_map.values()]
    architectures = config.get("architectures")
    if architectures and architectures not in [[name] for name in classes]:
        raise ValueError(
            f"{path}: architectures is {architectures!r}, which is none of the current code's classes "
            f"({', '.join(classes)}): with that code it would not load"
        )
    if not isinstance(config.get("auto_map") or {}, dict):
        raise ValueError(f"{path}: auto_map is {config['auto_map']!r}, which maps nothing")
    return config


def _renewed_config(config: dict, ours: list[str]) -> dict:
    """Returns the config, and the config of a backbone in it, with classes and version of the current code."""
    nested = {name: _renewed_config(value, ours) for name, value in config.items() if _is_ours(value)}
    auto_map = {**_foreign_entries(config, ours), **FAMILIES[config["model_type"]].family_auto_map}
    return {**config, **nested, "auto_map": auto_map, "zoo_version": hf_models.__version__}


def _foreign_entries(config: dict, ours: list[str]) -> dict:
    """Returns the entries of an auto_map that somebody has added. A class of ours that the current code no longer has
    is not one of them."""
    family = FAMILIES[config["model_type"]].family_auto_map
    return {
        name: place
        for name, place in (config.get("auto_map") or {}).items()
        if name not in family and (place in family.values() or not _files_of([place]) & set(ours))
    }


def _files_of(places: Iterable) -> set[str]:
    """Returns the names of the files that entries of an auto_map name, as "file.Class" or as a list of these. Code in
    another repository, "user/name--file.Class", is left out."""
    places = [place for entry in places for place in (entry if isinstance(entry, list) else [entry])]
    found = (re.fullmatch(r"(\w+)\.\w+", place) for place in places if isinstance(place, str))
    return {f"{match[1]}.py" for match in found if match}


def _code(folder: Path, files: Iterable[str], unread: Iterable[str] = ()) -> list[str]:
    """Returns the names of files and of everything that they import, directly or not, whether the folder has them or
    not. A file comes after the file that imports it.

    Args:
        unread: files whose imports do not count.
    """
    names = sorted(files)
    for name in names:  # the list grows in the loop
        if name not in unread and (folder / name).exists():
            code = (folder / name).read_text(encoding="utf-8", errors="replace")
            imported = (f"{module}.py" for module in RELATIVE_IMPORT.findall(code))
            names += [one for one in dict.fromkeys(imported) if one not in names]
    return names


def _read_sums(path: Path, text: str) -> dict[str, str]:
    """Returns the lines of a SHA256SUMS by the names of the files. Raises ValueError naming a line that is none."""
    lines = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = SUM.fullmatch(line)
        if not match:
            raise ValueError(f"{path}, line {number}: not a sha256, two spaces and the name of a file")
        lines[match["name"]] = line
    return lines
