"""Checkpoints that survive kill -9, a full disk and a flipped bit.

    output_dir/checkpoints/step-000040/     model.safetensors, optimizer.safetensors, state.json, manifest.json

A checkpoint is written in this order: its files go into a folder with a temporary name, a manifest lists the size and
the sha256 of each, everything is forced to disk, and only then the folder gets its name. So a folder named step-* was
whole at least once. Old checkpoints are removed after that. Tensors are safetensors and everything else is JSON:
nothing is ever unpickled.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from training.run.folder import TEMPORARY, file_record, fsync, temporary_beside, write_durably
from training.run.optim import parameter_names


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `state` is what JSON holds of it; tensors are read on demand."""

    path: Path
    step: int
    state: dict

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Returns the tensors of `stem`.safetensors by name, on the CPU. They are mapped from the file, so that a page
        is read when it is used."""
        with safe_open(self.path / f"{stem}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        return tensors | {alias: tensors[name] for alias, name in aliases.items()}


class Checkpoints:
    """The checkpoints of one run. One process writes them: the holder of the run's `RunLock`.

    Args:
        folder: output_dir/checkpoints.
        keep: how many sound checkpoints stay, the newest ones; the best one stays besides.
    """

    def __init__(self, folder: Path | str, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint has to stay")
        self.folder = Path(folder)
        self.keep = keep
        self._sound: set[Path] = set()  # checkpoints that this process wrote or verified, and does not hash again

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict,
        external: dict[str, dict] | None = None,
        best: int | None = None,
    ) -> Path:
        """Writes the checkpoint of a step, then removes the old ones that need not stay.

        A sound checkpoint of this step is left alone, a damaged one is replaced.

        Args:
            tensors: {"model": {name: tensor}, "optimizer": {...}, ...}; each becomes a file of that name.
            state: anything that JSON can hold.
            external: files that the checkpoint needs but does not contain, and that never change: {path: {"size",
                "sha256"}} as from `file_record`, with a path that is absolute or relative to the run's folder. They
                are verified like its own files.
            best: the step of a checkpoint, this one or an earlier one, that stays.

        Returns:
            The folder of the checkpoint.

        Raises:
            OSError: the disk refuses; the message is one line, and all earlier checkpoints are as they were.
        """
        final = self.path(step)
        if final.exists() and self._is_sound(final):
            return final
        temporary = writing = temporary_beside(final)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir()
            for stem, named in tensors.items():
                writing = temporary / f"{stem}.safetensors"
                _write_tensors(writing, named)
            writing = temporary / "state.json"
            write_durably(writing, json.dumps(state))
            files = {path.name: file_record(path) for path in sorted(temporary.iterdir())}
            writing = temporary / "manifest.json"
            write_durably(writing, _sealed({"step": step, "files": files, "external": external or {}}))
            writing = final
            fsync(temporary)
            if final.exists():
                self._discard(final)
            os.rename(temporary, final)
            fsync(self.folder)
            fsync(self.folder.parent)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
            sound = [path.name for path in self._paths() if self._is_sound(path)]
            stands = f"{sound[0]} still stands" if sound else "there is no earlier checkpoint"
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise OSError(
                f"checkpoint of step {step}: writing {writing.name} in {self.folder} failed ({reason}); {stands}; "
                "make room or choose another --output_dir, then repeat the command"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is no such folder
        self._sound.add(final)
        self._rotate(final, best)
        return final

    def newest_verified(self) -> tuple[Path | None, list[str]]:
        """Returns the newest sound checkpoint, None if there is no checkpoint, and a line on each damaged newer one.

        Raises:
            ValueError: there are checkpoints but all are damaged. To start again in silence would throw a run away.
        """
        skipped: list[str] = []
        for path in self._paths():
            if (damage := find_damage(path)) is None:
                self._sound.add(path)
                return path, skipped
            skipped.append(f"{path.name}: {damage}")
        if skipped:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(skipped)}; restore one of them, or give "
                "--restart, which moves this run aside and starts again"
            )
        return None, skipped

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of this step, whether there is one or not."""
        return self.folder / f"step-{step:06d}"

    def load(self, path: Path) -> Checkpoint:
        """Opens a checkpoint that was verified."""
        step = json.loads((path / "manifest.json").read_bytes())["content"]["step"]
        return Checkpoint(path, step, json.loads((path / "state.json").read_bytes()))

    def _paths(self) -> list[Path]:
        """Returns the folders of checkpoints, the newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((p for p in found if re.fullmatch(r"step-\d{6,}", p.name)), key=_step_of, reverse=True)

    def _is_sound(self, path: Path) -> bool:
        if path not in self._sound and find_damage(path) is None:
            self._sound.add(path)
        return path in self._sound

    def _rotate(self, newest: Path, best: int | None) -> None:
        """Keeps `newest`, the next `keep - 1` sound checkpoints and the one of step `best`, and removes the others. A
        damaged checkpoint does not count, since no run can go on from it."""
        kept = [newest]
        for path in self._paths():
            if path not in kept and len(kept) < self.keep and self._is_sound(path):
                kept.append(path)
            elif path not in kept and _step_of(path) != best:
                self._discard(path)

    def _discard(self, path: Path) -> None:
        # It is renamed first, since a half-deleted checkpoint must not have the name of a whole one.
        dead = temporary_beside(path)
        os.rename(path, dead)
        self._sound.discard(path)
        shutil.rmtree(dead, ignore_errors=True)


def find_damage(path: Path) -> str | None:
    """Verifies the checkpoint in the folder `path`.

    Returns:
        The first thing that is wrong, for a person to read; None if the manifest and every file that it lists are
        whole.
    """
    try:
        manifest = _read_manifest(path)
    except OSError as error:
        return _describe_unreadable("manifest.json", error)
    if manifest is None:
        return "manifest.json is damaged"
    run = path.parent.parent
    listed = [(name, path / name, record) for name, record in manifest["files"].items()]
    listed += [(name, run / name, record) for name, record in manifest["external"].items()]
    for name, file, record in listed:
        try:
            if (size := file.stat().st_size) != record["size"]:
                return f"{name} has {size} bytes instead of {record['size']} (a truncated file)"
            if file_record(file)["sha256"] != record["sha256"]:
                return f"{name} has the wrong sha256 (a damaged file)"
        except OSError as error:
            return _describe_unreadable(name, error)
    return None


def _read_manifest(path: Path) -> dict | None:
    """Returns the content of a checkpoint's manifest; None if it is damaged, or of a checkpoint of another step."""
    try:
        text = (path / "manifest.json").read_text()
        content = json.loads(text)["content"]
        is_whole = _sealed(content) == text and content["step"] == _step_of(path)
        is_whole = is_whole and {"files", "external"} <= content.keys()
    except (ValueError, KeyError, TypeError):
        return None
    return content if is_whole else None


def _describe_unreadable(name: str, error: OSError) -> str:
    is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return f"{name} is missing" if is_missing else f"{name} cannot be read ({error.strerror})"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sealed(content: dict) -> str:
    """Returns JSON with the content and the sha256 of the content. The manifest vouches for the other files, and this
    sum for the manifest."""
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file. A tied weight is stored once; the header lists its other names under "aliases"."""
    names: dict[tuple, str] = {}  # by memory, the name that it is stored under
    storages: set[int] = set()
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        memory = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and memory in names:
            aliases[name] = names[memory]
            continue
        names[memory] = name
        # safetensors refuses tensors that share memory, such as slices of one buffer, so they are copied.
        stored[name] = (tensor.detach().clone() if storage in storages else tensor.detach()).contiguous()
        storages.add(storage)
    save_file(stored, path, metadata={"format": "pt", "aliases": json.dumps(aliases)})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
    fsync(path)


# ---- the state of a training -----------------------------------------------------------------------------------------


def flatten_optimizer_state(state_dict: dict) -> tuple[dict[str, Tensor], dict]:
    """Splits the state of optimizers into tensors and what JSON can hold.

    JSON keeps it exactly: Python writes every digit of a float, and tuples are marked.

    Args:
        state_dict: {"state": {parameter name: {...}}, "param_groups": [...]}.

    Returns:
        The tensors by names such as "NAME.exp_avg", and the rest.

    Raises:
        ValueError: JSON cannot hold a value.
    """
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict] = {}
    for name, entries in state_dict["state"].items():
        tensors |= {f"{name}.{key}": value for key, value in entries.items() if isinstance(value, Tensor)}
        state[name] = {key: _to_json(value, key) for key, value in entries.items() if not isinstance(value, Tensor)}
    groups = [{key: _to_json(value, key) for key, value in group.items()} for group in state_dict["param_groups"]]
    return tensors, {"state": state, "param_groups": groups}


def unflatten_optimizer_state(tensors: dict[str, Tensor], scalars: dict) -> dict:
    """Returns the state dict that `flatten_optimizer_state` split."""
    state = {name: {k: _from_json(value) for k, value in entries.items()} for name, entries in scalars["state"].items()}
    for flat_name, tensor in tensors.items():
        name, key = flat_name.rsplit(".", 1)
        state[name][key] = tensor
    groups = [{key: _from_json(value) for key, value in group.items()} for group in scalars["param_groups"]]
    return {"state": state, "param_groups": groups}


def _to_json(value, key: str):
    if isinstance(value, tuple | list):
        items = [_to_json(item, key) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"optimizer option {key} is a {type(value).__name__}; a checkpoint holds only plain numbers")


def _from_json(value):
    if isinstance(value, dict):
        return tuple(_from_json(item) for item in value["tuple"])
    return [_from_json(item) for item in value] if isinstance(value, list) else value


def gather_training_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Gathers weights and optimizer state as full tensors on the CPU, under the names of the bare model.

    Every process calls it. The model may be plain, compiled, in DDP or sharded by FSDP2. Where the model is on the CPU,
    the tensors are those of the model itself, so they have to be saved before the next step.

    Returns:
        `tensors` and `state` as `Checkpoints.save` takes them; on all processes but the first, empty dicts.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    # torch would run a step on an optimizer without state, and leave AdamW at step 1.
    stepped = [optimizer for optimizer in optimizers if optimizer.state]
    state = get_optimizer_state_dict(model, stepped, options=options) if stepped else {}
    if not weights:
        return {}, {}
    for first, *others in parameter_names(model).values():  # gathering has copied a tied weight for each of its names
        weights |= {name: weights[first] for name in others}
    moments, scalars = flatten_optimizer_state(state or {"state": {}, "param_groups": []})
    return {"model": weights, "optimizer": moments}, {"optimizer": scalars}


def restore_training_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], checkpoint: Checkpoint | None
) -> None:
    """Puts weights and optimizer state back, bit for bit, whatever the number of processes then and now.

    Every process calls it. Only the first one reads the checkpoint; the others may pass None.

    Args:
        optimizers: those of the run; empty to put back only the weights.

    Raises:
        ValueError: the checkpoint was written with other groups of parameters.
    """
    distributed = dist.is_available() and dist.is_initialized()
    reads = not distributed or dist.get_rank() == 0
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the outermost module still holds whole weights
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)
    set_model_state_dict(model, checkpoint.tensors("model") if reads else {}, options=options)
    if not optimizers:
        return
    tensors = checkpoint.tensors("optimizer") if reads else {}
    # Numbers and shapes are sent first, and then one tensor after the other, so that memory never holds all of them
    # twice.
    outline = {name: tensor.to("meta") if tensor.dim() else tensor for name, tensor in tensors.items()}
    message = [(checkpoint.state["optimizer"], outline) if reads else None]
    if distributed:
        dist.broadcast_object_list(message)
    scalars, outline = message[0]
    if not scalars["param_groups"]:
        return  # saved before the first step
    names = {parameter: first for parameter, (first, *_) in parameter_names(model).items()}
    groups = [[names[p] for p in group["params"]] for optimizer in optimizers for group in optimizer.param_groups]
    if [set(group) for group in groups] != [set(group["params"]) for group in scalars["param_groups"]]:
        raise ValueError("the checkpoint was written with other optimizer groups; repeat its command or give --restart")
    parameters = {name: parameter for parameter, name in names.items()}
    for name, tensor in outline.items():
        if tensor.is_meta:
            outline[name] = _spread(tensors.get(name), tensor, parameters[name.rsplit(".", 1)[0]], distributed)
    saved = unflatten_optimizer_state(outline, scalars)
    # torch's `set_optimizer_state_dict` is no use here: it takes a step to make state, so a parameter that had no
    # gradient yet comes back at step 1 (or is refused), hooks on `step` fire, and tuples in options become lists.
    saved_groups = zip(groups, saved["param_groups"], strict=True)
    for optimizer in optimizers:
        own = list(itertools.islice(saved_groups, len(optimizer.param_groups)))
        optimizer.load_state_dict(
            {
                "state": {name: saved["state"][name] for order, _ in own for name in order if name in saved["state"]},
                "param_groups": [{**group, "params": order} for order, group in own],
            }
        )


def _spread(source: Tensor | None, outline: Tensor, parameter: Tensor, distributed: bool) -> Tensor:
    """Returns the first process's full tensor on every process, sharded as its parameter is.

    Args:
        source: the tensor on the first process, None on the others.
        outline: an empty tensor of its shape and type.
    """
    if source is None:
        full = torch.empty_like(outline, device=parameter.device)
    else:
        full = source.to(parameter.device, copy=True)  # `source` is mapped from a file that may be removed
    if isinstance(parameter, DTensor) and parameter.shape == full.shape:
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    if distributed:
        dist.broadcast(full, src=0)
    return full
