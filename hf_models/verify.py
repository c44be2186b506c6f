"""Loads a checkpoint without trusting it: runs no code from it, checks every byte, and refuses anything unexpected.

A publisher calls `write_checksums`. It writes the sums of the files that loading reads to the file SHA256SUMS, in the
format of `sha256sum`. A reader calls `load_verified`. Sums beside the files reveal damage but not malice, because
whoever can change the files can change the sums. So the structure of the files is checked as if there were no sums. A
reader who needs more gives the hash of SHA256SUMS (`sha256=`), which pins every file.

Each file is opened once and hashed while it is read, so that nobody can exchange it in between. This is why this module
reads safetensors files itself; a library would open them again. Their format: 8 bytes with the length N of the header;
N bytes of JSON, `{name: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}}`; then the tensors, end to end.
"""

import glob
import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .zoo import ZOO

SUMS = "SHA256SUMS"
LISTED_KINDS = (".safetensors", ".json", ".py", ".txt", ".jinja")  # weights, configs, code, tokenizers
UNLISTED = (".", "eval_results.json", "run.json", "optimizer")  # starts of names of other files that a training writes
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")  # files that may hold pickles
OTHER_WEIGHTS = (".h5", ".keras", ".msgpack")  # another loader might load these instead of the listed weights

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LARGEST_JSON = 10_000_000  # bytes, also for headers; GPT-3 with 175 billion parameters has about 1,500 tensors
DEEPEST_JSON = 8  # levels
CHUNK = 1 << 24  # bytes that are read and then hashed while they are in the processor's cache

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What a config.json may hold besides the fields of its class. Anything else could name a kernel or code to download.
OTHER_FIELDS = {"model_type", "auto_map", "output_attentions", "out_features", "out_indices", "stage_names"}
OTHER_FIELDS |= {"_name_or_path"}  # in a `backbone_config`
# Fields that say how many modules to make. Making a module costs time and memory even if its tensors have no memory.
LAYER_COUNTS = ("num_hidden_layers", "num_encoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")


def load_verified(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    sha256: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Loads a model from a folder or Hub repository, if the checkpoint is exactly what this package writes and what its
    SHA256SUMS says.

    The config must name a class of this package. The function runs no code from the checkpoint, reads no pickles, and
    writes only to huggingface_hub's cache. From a repository it downloads only what SHA256SUMS lists; the repository
    may hold other files, but a folder with files that are not listed is refused. Sums prove little unless they are
    pinned: give `sha256`, or for a repository a commit as `revision`.

    Args:
        repo_or_folder: `user/name` on the Hub, or a folder that `save_pretrained` and `write_checksums` wrote.
        revision: branch, tag or commit of a repository.
        token: as in huggingface_hub.
        sha256: what `sha256sum SHA256SUMS` printed when the checkpoint was known to be good.
        dtype: dtype of the returned weights. Default: as saved.
        device: device of the returned weights. Default: the CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the checkpoint is refused; one line names the file and what is wrong with it.
        OSError, or an error of huggingface_hub: the repository could not be downloaded.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256 is {_shown(sha256)}: give the 64 digits that `sha256sum {SUMS}` prints")
    folder = Path(repo_or_folder)
    if not folder.is_dir():
        folder, sums = _fetch(str(repo_or_folder), revision, token, sha256)
    elif revision is not None:
        raise ValueError(f"{folder} is a folder and has no revision {_shown(revision)}: pin it with sha256")
    else:
        sums = _read_sums(folder, sha256)
        _refuse_others(folder, sums)
    try:
        model, used = _load(folder, sums)
    except ValueError:
        _check_sums(folder, sums)  # if a file is damaged, this raises the more useful error
        raise
    _check_sums(folder, {name: sums[name] for name in sums if name not in used})
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = dtype or model.dtype
    model.name_or_path = model.config.name_or_path = str(repo_or_folder)
    return nn.Module.to(model, device=device, dtype=dtype).eval()


def _fetch(
    repository: str, revision: str | None, token: str | bool | None, pin: str | None
) -> tuple[Path, dict[str, str]]:
    """Downloads what the repository's SHA256SUMS lists; returns its folder in the cache, and the sums.

    The folder may hold more files of earlier downloads, as links to other files of the cache. They are ignored.
    """
    try:
        folder = Path(hf_hub_download(repository, SUMS, revision=revision, token=token)).parent
    except RemoteEntryNotFoundError as error:
        raise ValueError(
            f"{_shown(repository)} has no {SUMS}: ask its owner to make it with "
            "hf_models.verify.write_checksums(folder)"
        ) from error
    sums = _read_sums(folder, pin)
    patterns = [glob.escape(name) for name in sums]
    snapshot_download(repository, revision=folder.name, token=token, allow_patterns=patterns)  # the same commit
    _refuse_missing(folder, sums)
    return folder, sums


def _load(folder: Path, sums: dict[str, str]) -> tuple[PreTrainedModel, set[str]]:
    """Returns the model and the names of the files that it was made of, whose sums were right."""
    with ExitStack() as stack:
        config_fields = _read_json(folder / "config.json", sums)
        files = [_open_weights(stack, folder / name, names) for name, names in _find_weights(folder, sums).items()]
        entries = {
            name: entry for file in files for name, entry in file.entries.items()
        }  # the index has each name once
        model_class, config = _read_config(folder / "config.json", config_fields, len(entries))
        model = _make_outline(folder, model_class, config, entries)
        if model.can_generate() and "generation_config.json" in sums:
            model.generation_config = _read_generation(folder / "generation_config.json", sums)
        weights = {}
        for file in files:
            weights.update(_read_weights(file, sums[file.path.name]))
    model.load_state_dict(weights, strict=False, assign=True)  # `_make_outline` has compared all but tied weights
    model.tie_weights(recompute_mapping=False)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model, {"config.json", *(file.path.name for file in files)}


def checksums(folder: str | Path) -> str:
    """Returns the text for SHA256SUMS, which `sha256sum -c` can check: a sum for each file in `folder` that loading
    reads, but not for cards, pictures and results, which people may edit."""
    lines = []
    for name in _list_kinds(Path(folder)):
        with _open(Path(folder) / name) as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def write_checksums(folder: str | Path) -> Path:
    """Writes `checksums(folder)` to SHA256SUMS there and returns its path."""
    path, temporary = Path(folder) / SUMS, Path(folder) / f".tmp-{SUMS}"
    temporary.write_text(checksums(folder), encoding="utf-8")
    os.replace(temporary, path)
    return path


def check_checksums(folder: str | Path, *, sha256: str | None = None) -> list[str]:
    """Checks every file that SHA256SUMS lists, without loading it.

    Args:
        sha256: the expected hash of SHA256SUMS itself.

    Returns:
        The names that it lists, sorted.

    Raises:
        ValueError: a file is changed, missing, not listed, or of a kind that does not belong in a checkpoint.
    """
    folder = Path(folder)
    sums = _read_sums(folder, sha256)
    _refuse_others(folder, sums)
    _check_sums(folder, sums)
    return sorted(sums)


def is_listed(name: str) -> bool:
    """Whether SHA256SUMS lists files of this name."""
    return name.endswith(LISTED_KINDS) and not name.startswith(UNLISTED)


def _list_kinds(folder: Path) -> list[str]:
    """Returns the names of the files in the folder that SHA256SUMS must list, sorted."""
    names = filter(is_listed, os.listdir(folder))
    return sorted(name for name in names if (folder / name).is_file() or (folder / name).is_symlink())


def _read_sums(folder: Path, pin: str | None) -> dict[str, str]:
    """Returns name -> sha256 from SHA256SUMS. It checks the names, but not that the files exist."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    path = folder / SUMS
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {SUMS}: if you know that these files are good, make it with "
            "hf_models.verify.write_checksums(folder)"
        )
    data = _read_small(path)
    if pin is not None and hashlib.sha256(data).hexdigest() != pin:
        raise ValueError(f"{path}: its sha256 is {hashlib.sha256(data).hexdigest()}, not the {pin} that you asked for")
    sums = {}
    for number, line in enumerate(_decode(path, data).removesuffix("\n").split("\n"), start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\0]+)", line)
        if not match or match[2] in sums or match[2] in (".", ".."):
            raise ValueError(
                f"{path}, line {number}: not a sha256, two spaces and the name of another file in this folder"
            )
        sums[match[2]] = match[1]
    if others := {name for name in sums if not is_listed(name)}:
        raise ValueError(f"{path} lists {_some(others)}, but loading reads no such files")
    return sums


def _refuse_missing(folder: Path, sums: dict[str, str]) -> None:
    if missing := sums.keys() - set(_list_kinds(folder)):
        raise ValueError(f"{folder / SUMS} lists {_some(missing)}, which is not here")


def _refuse_others(folder: Path, sums: dict[str, str]) -> None:
    """Raises a `ValueError` if the folder lacks a listed file, or holds a pickle, a link out of it, or a file that
    loading could read but SHA256SUMS does not list."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.lower().endswith(PICKLES + OTHER_WEIGHTS):
            raise ValueError(
                f"{_shown(path)}: reading such a file can run code; remove it, because safetensors files are enough"
            )
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"{_shown(path)} is a link out of the folder; put the file itself there")
    _refuse_missing(folder, sums)
    extra = {
        name for name in _list_kinds(folder) if name not in sums and not name.endswith(".txt")
    }  # such as LICENSE.txt
    if extra:
        raise ValueError(
            f"{folder}: {_some(extra)} is not listed in {SUMS}; remove it, or write the sums again if it belongs here"
        )


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    """Opens a regular file, but no pipe or device, from which reading could wait for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"{_shown(path)} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{_shown(path)} is not a file")
    with open(descriptor, "rb") as file:
        yield file


def _check_sums(folder: Path, sums: dict[str, str]) -> None:
    for name, expected in sums.items():
        with _open(folder / name) as file:
            _check_sum(folder / name, expected, hashlib.file_digest(file, "sha256"))


def _check_sum(path: Path, expected: str, digest) -> None:
    """Raises a `ValueError` unless the digest of the file is the expected sha256."""
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{_shown(path)}: its sha256 is not the one in {SUMS}, so it was damaged or changed; download it again "
            "(from a repository: hf download --force-download)"
        )


def _read_small(path: Path) -> bytes:
    with _open(path) as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{path} is larger than {LARGEST_JSON:,} bytes")
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _read_json(path: Path, sums: dict[str, str]) -> dict:
    """Reads a JSON object, and checks its sum and its depth."""
    if path.name not in sums:
        raise ValueError(f"{path.parent} has no {path.name}: it is not a checkpoint of this package")
    data = _read_small(path)
    _check_sum(path, sums[path.name], hashlib.sha256(data))
    values = _parse_json(path, data)
    level = [values]
    for _ in range(DEEPEST_JSON):
        nested = [value.values() if isinstance(value, dict) else value for value in level]
        level = [inner for value in nested if not isinstance(value, str | int | float | None) for inner in value]
    if level:
        raise ValueError(f"{path} has more than {DEEPEST_JSON} levels")
    return values


def _parse_json(path: Path, data: bytes) -> dict:
    """Parses a JSON object in which no name occurs twice and every number is finite."""

    def unique(pairs):
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    def finite(text):
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:20]} is not a finite number")
        return float(text)

    text = _decode(path, data)
    try:
        values = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the JSON it should be: {_shown(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def _find_weights(folder: Path, sums: dict[str, str]) -> dict[str, set[str] | None]:
    """Returns the files of weights, each with the names of its tensors by the index, or None without an index."""
    there = {name for name in sums if re.fullmatch(r"model.*\.safetensors", name)}
    path = folder / INDEX
    if INDEX not in sums:
        if there != {SINGLE}:
            raise ValueError(f"{folder} has {_some(there) or 'no weights'}: without {INDEX} it must have only {SINGLE}")
        return {SINGLE: None}
    index = _read_json(path, sums)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or index.keys() - {"metadata", "weight_map"}:
        raise ValueError(f"{path} is not an index: it must hold metadata and weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name):
            raise ValueError(f"{path}: {_shown(name)} is not the name of a shard, model-00001-of-00002.safetensors")
        shards.setdefault(name, set()).add(tensor)
    if there != shards.keys():
        raise ValueError(f"{path}: {_some(there ^ shards.keys())} is in the index or beside it, but not both")
    return dict(sorted(shards.items()))


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFile(NamedTuple):
    """An open file of weights whose header was read."""

    path: Path
    file: BufferedReader
    digest: Any  # hashlib's, of the bytes read so far
    entries: dict[str, Entry]  # in the order of the file


def _open_weights(stack: ExitStack, path: Path, names: set[str] | None) -> WeightFile:
    """Opens a file of weights. Checks that its header describes every byte and has the tensors of the index."""
    file = stack.enter_context(_open(path))
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(LARGEST_JSON, size - 8):
        raise ValueError(
            f"{path} is not a safetensors file: a header of {length:,} bytes in a file of {size:,} "
            f"(at most {LARGEST_JSON:,} are read)"
        )
    header = file.read(length)
    digest = hashlib.sha256(start + header)
    values = _parse_json(path, header)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{path}: the header's __metadata__ is not a mapping of text to text")
    entries = _parse_entries(path, values, size - 8 - length)
    if names is not None and names != entries.keys():
        raise ValueError(f"{path}: {_some(names ^ entries.keys())} is in it or in {INDEX} for it, but not in both")
    return WeightFile(path, file, digest, entries)


def _parse_entries(path: Path, header: dict, num_bytes: int) -> dict[str, Entry]:
    """Returns the tensors of a header in the order of the file. Checks that they fill its `num_bytes` without gaps."""
    entries, spans = {}, {}
    for name, value in header.items():
        match value:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest}:
                is_plain = not rest and dtype in DTYPES and len(shape) <= 8
                is_plain = is_plain and all(
                    type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)
                )
            case _:
                is_plain = False
        if not is_plain or math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise ValueError(
                f"{path}: the header's line for {_shown(name)} is not a dtype ({', '.join(DTYPES)}), a shape and the "
                "two offsets that fit them"
            )
        entries[name], spans[name] = Entry(DTYPES[dtype], tuple(shape)), (begin, end)
    order = sorted(entries, key=spans.__getitem__)
    position = 0
    for name in order:
        if spans[name][0] != position:
            raise ValueError(f"{path}: {_shown(name)} begins at byte {spans[name][0]:,} of the data, not {position:,}")
        position = spans[name][1]
    if position != num_bytes:
        raise ValueError(f"{path}: {num_bytes:,} bytes of data, but the header describes {position:,}")
    return {name: entries[name] for name in order}


def _read_config(path: Path, values: dict, num_tensors: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Returns the class that the config names, which must be one of this package, and the config.

    A config may not ask for more layers than the `num_tensors` tensors of the checkpoint, because every layer has one.
    """
    families = {entry.config_class.model_type: entry.config_class for entry in ZOO.values()}
    model_type, architectures = values.get("model_type"), values.get("architectures")
    if not isinstance(model_type, str) or model_type not in families:
        raise ValueError(
            f"{path}: model_type is {_shown(model_type)}, not one of {', '.join(families)}; convert a stock "
            "checkpoint with our class's from_pretrained(...).save_pretrained(...)"
        )
    config_class = families[model_type]
    names = {name.split(".")[1] for name in config_class.family_auto_map.values()} - {config_class.__name__}
    if architectures not in [[name] for name in names]:
        raise ValueError(f"{path}: architectures is {_shown(architectures)}, not one of {', '.join(sorted(names))}")
    _check_fields(path, config_class, values, num_tensors)
    backbone = values.get("backbone_config")
    if backbone is not None:
        if not isinstance(backbone, dict) or backbone.get("model_type") != "zoo_vit":
            raise ValueError(
                f"{path}: backbone_config is not one of this package's (zoo_vit); load it with from_pretrained"
            )
        _check_fields(path, families["zoo_vit"], backbone, num_tensors)
    try:
        config = config_class.from_dict({name: value for name, value in values.items() if name != "auto_map"})
    except Exception as error:  # of any kind: a wrong value may break the code anywhere
        raise ValueError(f"{path}: {_shown(error.__cause__ or error)}") from error
    return getattr(sys.modules[config_class.__module__], architectures[0]), config


def _check_fields(path: Path, config_class: type[PreTrainedConfig], values: dict, num_tensors: int) -> None:
    known = {field.name for field in fields(config_class)} | OTHER_FIELDS
    if unknown := values.keys() - known:
        raise ValueError(
            f"{path}: {config_class.__name__} has no field {_some(unknown)}; load it with the versions that wrote it "
            f"(transformers {_shown(values.get('transformers_version'))})"
        )
    if values.get("dtype") not in (None, *(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())):
        raise ValueError(f"{path}: dtype is {_shown(values['dtype'])}")
    if "--" in json.dumps(values.get("auto_map")):
        raise ValueError(f"{path}: auto_map leads to code in another repository: {_shown(values['auto_map'])}")
    stem = values.get("stem_channels") or ()
    counts = {name: values.get(name) for name in LAYER_COUNTS}
    counts["stem_channels"] = len(stem) if isinstance(stem, (list, tuple)) else 0
    for name, count in counts.items():
        if isinstance(count, int) and count > num_tensors:
            raise ValueError(f"{path}: {name} asks for {_shown(count)} layers, but there are {num_tensors} tensors")


def _make_outline(folder: Path, model_class, config: PreTrainedConfig, entries: dict[str, Entry]) -> PreTrainedModel:
    """Makes the model without memory. Checks that names, shapes and dtypes of the weights are those of the model."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # see `_read_config`
        raise ValueError(f"{folder / 'config.json'}: no model can be made from it: {_shown(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for tied in model.all_tied_weights_keys:  # saved only under their other name
        expected.pop(tied, None)
    if missing := expected.keys() - entries.keys():
        raise ValueError(f"{folder}: the weights lack {_some(missing)}, which config.json asks for")
    if unexpected := entries.keys() - expected.keys():
        raise ValueError(
            f"{folder}: the weights hold {_some(unexpected)}, which the model of config.json does not have"
        )
    for name, entry in entries.items():
        if entry.shape != expected[name]:
            raise ValueError(
                f"{folder}: {_shown(name)} has the shape {list(entry.shape)}, "
                f"but config.json makes it {_shown(list(expected[name]))}"
            )
    dtypes = {entry.dtype for entry in entries.values()}
    if len(dtypes) != 1 or config.dtype not in (None, *dtypes):
        raise ValueError(f"{folder}: the weights are {_some(map(str, dtypes))}, but config.json says {config.dtype}")
    return model


def _read_weights(weights: WeightFile, expected: str) -> dict[str, Tensor]:
    """Reads every tensor into memory of its own, and hashes the file in the same pass."""
    path, file, digest, entries = weights
    tensors = {}
    for name, (dtype, shape) in entries.items():
        tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
        room = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(room), CHUNK):
            chunk = room[begin : begin + CHUNK]
            if file.readinto(chunk) != len(chunk):
                raise ValueError(f"{path} became shorter while it was read")
            digest.update(chunk)
    digest.update(file.read(1))  # one byte that was added meanwhile is enough to change the digest
    _check_sum(path, expected, digest)
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise ValueError(f"{path}: {_shown(name)} holds numbers that are not finite")
    return tensors


def _read_generation(path: Path, sums: dict[str, str]) -> GenerationConfig:
    """Reads the generation config, which may hold only plain values."""
    values = _read_json(path, sums)
    if unknown := values.keys() - vars(GenerationConfig()).keys():
        raise ValueError(f"{path}: {_some(unknown)} is no field of a generation config")
    for name, value in values.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: {name} is not a plain value")
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:  # see `_read_config`
        raise ValueError(f"{path}: {_shown(error)}") from error


def _shown(value: object) -> str:
    """Returns foreign text in a form that is safe in one line of a message: short, without control characters."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    text = text if len(text) <= 300 else text[:300] + "..."
    return text if text.isprintable() else ascii(text)


def _some(names: Iterable[str]) -> str:
    """Names the first three, and counts the others."""
    names = sorted(names)
    return ", ".join(map(_shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
