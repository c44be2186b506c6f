"""Where data comes from: data sets of the Hub, local files in the formats of the `datasets` library, named splits."""

import re
from pathlib import Path

# A name that ends in one of these is a file's, of text or of a table, and is not looked for on the Hub.
FILE_SUFFIXES = (".txt", ".conll", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


def split_of(name: str) -> str:
    """The split that a file's or folder's name begins with: "train", "val" (also valid*, dev*), "test"; or ""."""
    found = re.match(r"(train|val|dev|test)(ing|id|idation|elopment)?(?![a-z])", name.lower())  # not "testament.txt"
    return "" if found is None else found[1].replace("dev", "val")


def load_hub(data: str, streaming: bool = False, trains: bool = True):
    """Loads the splits of a Hub data set.

    Args:
        data: "name" or "name:config".
        streaming: whether to read the data set as it arrives instead of downloading it first.
        trains: whether a split "train" is needed.

    Raises:
        ValueError: `data` looks like the name of a file, the data set cannot be loaded, or it has no split to train on.
    """
    import datasets

    is_file_name = Path(data.removesuffix(".gz")).suffix in FILE_SUFFIXES
    if is_file_name or data.startswith(("/", ".", "~")) or data.count("/") > 1:
        raise ValueError(f"no such file or folder: {data}")
    name, _, config = data.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the data set needs a script of its own
        message = f"{data!r} is no local file or folder, and as a Hub data set it cannot be loaded: {error}"
        raise ValueError(message) from error
    if trains and "train" not in splits:
        raise ValueError(f"Hub data set {data!r} has no split 'train', only {sorted(splits)}")
    return splits


def is_saved(path: Path) -> bool:
    """Whether `datasets` has saved a data set into this folder."""
    return path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists())


def has_parquet(path: Path) -> bool:
    """Whether this is a parquet file, or a folder that holds some at any depth."""
    return any(path.rglob("*.parquet")) if path.is_dir() else path.suffix == ".parquet" and path.is_file()


def load_local(path: Path, streaming: bool = False):
    """Loads the splits of a folder that `datasets` has saved, or of a parquet file or a folder of them.

    Raises:
        ValueError: the files cannot be read.
    """
    import datasets

    if is_saved(path) and not streaming:
        return datasets.load_from_disk(str(path))
    options = {"path": "parquet", "data_files": str(path)} if path.is_file() else {"path": str(path)}
    try:
        return datasets.load_dataset(**options, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{path} cannot be read ({error.__cause__ or error}): it is damaged or no data set") from error
