"""Checkpoints that survive kill -9, a full disk and a flipped bit.

    output_dir/checkpoints/step-000040/     model.safetensors, optimizer.safetensors, state.json, manifest.json

A checkpoint is written under a temporary name, forced to disk, described by a manifest of sha256 sums and renamed
last, so that a folder named step-* was once whole; only then does an old one go. Tensors are read with safetensors,
everything else is JSON: nothing is ever unpickled.
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
from torch.distributed.tensor import DTensor, distribute_tensor

from training.run.folder import TEMPORARY, file_record, fsync, temporary_beside, write_durably
from training.run.optim import parameter_names

# ---- checkpoints ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its step, its JSON state, and its tensors on demand."""

    path: Path
    step: int
    state: dict

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of `stem`.safetensors by name, on CPU, mapped from the file: pages are read as they are used."""
        with safe_open(self.path / f"{stem}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        return tensors | {alias: tensors[name] for alias, name in aliases.items()}


class Checkpoints:
    """The checkpoints of one run, under `folder` (output_dir/checkpoints); the newest `keep` sound ones stay, and
    besides them the best one, where a run has one.

    One process writes, the holder of the run's `RunLock`.
    """

    def __init__(self, folder: Path | str, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint has to stay")
        self.folder = Path(folder)
        self.keep = keep
        self._sound: set[Path] = set()  # written or verified by this process: not hashed a second time

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict,
        external: dict[str, dict] | None = None,
        best: int | None = None,
    ) -> Path:
        """Write checkpoint `step` and, once it stands, remove what `keep` no longer covers.

        tensors: {"model": {name: tensor}, "optimizer": {...}, ...}, each a file of that name.
        state: anything JSON holds.
        external: immutable files that the checkpoint needs but does not contain, {path: {"size", "sha256"}} (see
            `file_record`), absolute or relative to the run's folder; verified like its own.
        best: the step of a checkpoint, this or an earlier one, that is not to be removed.

        A sound checkpoint of this step is left alone, a damaged one replaced. Raises OSError, in one line, when the
        disk refuses; all earlier checkpoints are then as they were.
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
            shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well
        self._sound.add(final)
        self._rotate(final, best)
        return final

    def newest_verified(self) -> tuple[Path | None, list[str]]:
        """The newest sound checkpoint (None: there is none at all), and one line for each newer one passed over.

        Raises ValueError when there are checkpoints but every one is damaged: starting from zero in silence would
        throw a run away.
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
        """Where the checkpoint of this step is, if there is one."""
        return self.folder / f"step-{step:06d}"

    def load(self, path: Path) -> Checkpoint:
        """Open a checkpoint that was verified."""
        step = json.loads((path / "manifest.json").read_bytes())["content"]["step"]
        return Checkpoint(path, step, json.loads((path / "state.json").read_bytes()))

    def _paths(self) -> list[Path]:
        """Step folders, newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((p for p in found if re.fullmatch(r"step-\d{6,}", p.name)), key=_step_of, reverse=True)

    def _is_sound(self, path: Path) -> bool:
        if path not in self._sound and find_damage(path) is None:
            self._sound.add(path)
        return path in self._sound

    def _rotate(self, newest: Path, best: int | None) -> None:
        """Keep `newest`, the next `keep - 1` sound ones, and that of step `best`. A damaged checkpoint is nothing to
        fall back to, so it does not count and goes."""
        kept = [newest]
        for path in self._paths():
            if path not in kept and len(kept) < self.keep and self._is_sound(path):
                kept.append(path)
            elif path not in kept and _step_of(path) != best:
                self._discard(path)

    def _discard(self, path: Path) -> None:
        # Renamed first: a checkpoint deleted by half must not carry the name of a whole one.
        dead = temporary_beside(path)
        os.rename(path, dead)
        self._sound.discard(path)
        shutil.rmtree(dead, ignore_errors=True)


def find_damage(path: Path) -> str | None:
    """What is wrong with the checkpoint in folder `path`, for a person to read; None if every sum agrees."""
    name = "manifest.json"
    try:
        sealed = (path / name).read_text()
        content = json.loads(sealed)["content"]
        if _sealed(content) != sealed or content["step"] != _step_of(path):
            return "manifest.json is damaged"
        own = {file: path / file for file in content["files"]}
        external = {file: path.parent.parent / file for file in content["external"]}
        expected = content["files"] | content["external"]
        for name, file in (own | external).items():
            if (size := file.stat().st_size) != expected[name]["size"]:
                return f"{name} has {size} bytes instead of {expected[name]['size']} (a truncated file)"
            if file_record(file)["sha256"] != expected[name]["sha256"]:
                return f"{name} has the wrong sha256 (a damaged file)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"
    return None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sealed(content: dict) -> str:
    """JSON that carries its own sha256: the manifest vouches for every file, and this for the manifest."""
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file. A tied weight is stored once, its other names in the header under "aliases"."""
    names: dict[tuple, str] = {}  # memory -> the name it is stored under
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
        # safetensors refuses views that overlap (slices of one buffer): they get memory of their own.
        stored[name] = (tensor.detach().clone() if storage in storages else tensor.detach()).contiguous()
        storages.add(storage)
    save_file(stored, path, metadata={"format": "pt", "aliases": json.dumps(aliases)})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
    fsync(path)


# ---- the state of a training -----------------------------------------------------------------------------------------


def flatten_optimizer_state(state_dict: dict) -> tuple[dict[str, Tensor], dict]:
    """Split a state dict keyed by parameter names, {"state": {name: {...}}, "param_groups": [...]}, into tensors
    ("NAME.exp_avg") and the rest, which JSON keeps exactly: Python writes floats in full, and tuples are marked.
    Raises ValueError for a value that JSON cannot hold."""
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict] = {}
    for name, entries in state_dict["state"].items():
        tensors |= {f"{name}.{key}": value for key, value in entries.items() if isinstance(value, Tensor)}
        state[name] = {key: _to_json(value, key) for key, value in entries.items() if not isinstance(value, Tensor)}
    groups = [{key: _to_json(value, key) for key, value in group.items()} for group in state_dict["param_groups"]]
    return tensors, {"state": state, "param_groups": groups}


def unflatten_optimizer_state(tensors: dict[str, Tensor], scalars: dict) -> dict:
    """The inverse of `flatten_optimizer_state`."""
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
    """Weights and optimizer state as full tensors on CPU, under the names of the bare model: what
    `Checkpoints.save` takes as `tensors`, and a JSON part for its `state`.

    The model may be plain, compiled, in DDP or sharded by FSDP2. Every process calls it; all but the first get empty
    dicts. On CPU the tensors are the live ones: save before the next step.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    # torch runs a step on an optimizer that has no state, which leaves AdamW at step 1: such a one is left out.
    stepped = [optimizer for optimizer in optimizers if optimizer.state]
    state = get_optimizer_state_dict(model, stepped, options=options) if stepped else {}
    if not weights:
        return {}, {}
    for first, *others in parameter_names(model).values():  # gathering gave each name of a tied weight a copy
        weights |= {name: weights[first] for name in others}
    moments, scalars = flatten_optimizer_state(state or {"state": {}, "param_groups": []})
    return {"model": weights, "optimizer": moments}, {"optimizer": scalars}


def restore_training_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], checkpoint: Checkpoint | None
) -> None:
    """Put what `gather_training_state` gave back, bit for bit, whatever the number of processes then and now.

    Every process calls it; only the first reads the checkpoint, the others may pass None. Without optimizers only the
    weights are put back. Raises ValueError when the optimizers are not those that were saved.
    """
    distributed = dist.is_available() and dist.is_initialized()
    reads = not distributed or dist.get_rank() == 0
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)
    set_model_state_dict(model, checkpoint.tensors("model") if reads else {}, options=options)
    if not optimizers:
        return
    tensors = checkpoint.tensors("optimizer") if reads else {}
    # Scalars, shapes and single numbers travel at once, then each tensor by itself: never a second copy of them all.
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
    # Not torch's `set_optimizer_state_dict`: it takes a step to make state, so that a parameter which had no gradient
    # yet comes back at step 1 (or is refused), hooks on `step` fire, and tuples among the options become lists.
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
    """The first process's full tensor `source` on every process, sharded as its parameter is."""
    if source is None:
        full = torch.empty_like(outline, device=parameter.device)
    else:
        full = source.to(parameter.device, copy=True)  # a copy: `source` is mapped from a file that rotation removes
    if isinstance(parameter, DTensor) and parameter.shape == full.shape:
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    if distributed:
        dist.broadcast(full, src=0)
    return full
