"""What moves the weights: parameter groups, AdamW and Muon, learning-rate schedules, a moving average.

All of it works on whole parameters and on the shards (`DTensor`) that FSDP2 leaves on each process.
"""

import math
import re
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from training.run.arguments import RunArguments

IN_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
IN_STEM = re.compile(r"(^|\.)stem\.\d+\.")  # the convolutions before a ViT's patches


def parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Each parameter's names in the bare model, as in a checkpoint: wrappers (DDP, torch.compile, activation
    checkpointing) leave nothing in them. A tied weight has several. The order is the model's."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(re.sub(r"(_orig_mod|_checkpoint_wrapped_module)\.", "", name))
    return names


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, each tied one once, by their first name in the bare model."""
    return {names[0]: parameter for parameter, names in parameter_names(model).items() if parameter.requires_grad}


def layer_scales(names: list[str], layer_decay: float) -> dict[str, float]:
    """What to multiply the learning rate of each parameter by, so that the layers nearer to the data, whose features
    are the more general, change less in fine-tuning (Howard & Ruder 2018, section 3.2).

    The last depth has 1: what comes after the layers, as the final norm, the heads and an autoencoder's whole decoder.
    Each `layers.i.` has `layer_decay` times the scale of the layer above it, and what comes before the layers, the
    embeddings, once more.

    names: of all parameters, frozen ones too, in the order of the model. Raises ValueError if none is in a layer.
    """
    found = [None if name.startswith("decoder.") else IN_LAYER.search(name) for name in names]
    layers = [None if place is None else int(place[2]) for place in found]
    numbers = [number for number in layers if number is not None]
    if layer_decay != 1 and not numbers:
        raise ValueError("layer_decay finds no parameter under `layers.`: leave it at 1 for this model")
    num_layers = max(numbers, default=-1) + 1
    scales, depth = {}, 0
    for name, number in zip(names, layers, strict=True):
        if number is not None:
            depth = num_layers + 1  # of what follows the layers
        scales[name] = layer_decay ** (num_layers + 1 - (depth if number is None else number + 1))
    return scales


def module_scales(names: list[str], scales: dict[str, float]) -> dict[str, float]:
    """What to multiply the learning rate of each parameter by, from that of modules by their names; 1 in none of them.

    names: of all parameters, frozen ones too. Raises ValueError naming a module without a parameter.
    """
    found = {name: 1.0 for name in names}
    for module, scale in scales.items():
        if not (inside := [name for name in names if name.startswith(f"{module}.")]):
            raise ValueError(f"the model has no parameter in {module!r}, whose learning rate was to be another")
        found |= dict.fromkeys(inside, scale)
    return found


def parameter_groups(
    parameters: dict[str, nn.Parameter], weight_decay: float, learning_rate: float, scales: dict[str, float]
) -> list[dict]:
    """One group that decays, the matrices (embeddings among them), and one that does not: biases and norms' gains.
    Those set a scale or an offset that a pull to zero only disturbs. Where the learning rate is scaled, one of each
    for every scale. Order follows the model."""
    groups: dict[tuple, dict] = {}
    for is_matrix in (True, False):
        options = {"weight_decay": weight_decay if is_matrix else 0.0}
        for name, parameter in parameters.items():
            if (parameter.ndim >= 2) == is_matrix:
                group = {"params": [], "lr": learning_rate * scales[name], **options}
                groups.setdefault((is_matrix, scales[name]), group)["params"].append(parameter)
    return list(groups.values())


def create_optimizers(
    model: nn.Module,
    *,
    optimizer: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    matrix_learning_rate: float | None = None,
    layer_decay: float = 1.0,
    rate_scales: dict[str, float] | None = None,
) -> list[Optimizer]:
    """The optimizers that together hold every trainable parameter of `model` exactly once.

    "adamw" is one fused AdamW (Loshchilov & Hutter 2019). "muon" is `Muon` on the matrices inside the repeated blocks
    (`layers.0.`, `layers.1.`, ...) and on the filters of a ViT's stem (`stem.0.`, ...), never the embeddings or the
    head, and AdamW on the rest, the filters of a detector's backbone too; Muon's updates are scaled so that
    `learning_rate` fits both, unless `matrix_learning_rate` gives the matrices their own.
    `layer_decay` makes the rates smaller towards the embeddings, see `layer_scales`; `rate_scales` multiplies those of
    whole modules, as {"model.backbone": 0.1}.
    Each group keeps its peak rate as "initial_lr", for the schedule to multiply.
    """
    parameters = named_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameter: all of them are frozen")
    names = [names[0] for names in parameter_names(model).values()]
    of_modules = module_scales(names, rate_scales or {})
    scales = {name: scale * of_modules[name] for name, scale in layer_scales(names, layer_decay).items()}
    matrices = {}
    if optimizer == "muon":
        places = {2: IN_LAYER, 3: IN_STEM, 4: IN_STEM}  # by the number of dimensions
        matrices = {name: p for name, p in parameters.items() if p.ndim in places and places[p.ndim].search(name)}
        if not matrices:
            raise ValueError("optimizer 'muon' finds no trainable matrix under `layers.`: use 'adamw' for this model")
    elif optimizer != "adamw":
        raise ValueError(f"optimizer must be 'adamw' or 'muon', not {optimizer!r}")
    rest = {name: parameter for name, parameter in parameters.items() if name not in matrices}

    optimizers = []
    if matrices:
        rate = learning_rate if matrix_learning_rate is None else matrix_learning_rate
        groups = parameter_groups(matrices, weight_decay, rate, scales)
        optimizers.append(Muon(groups, lr=rate, weight_decay=weight_decay))
    if rest:
        groups = parameter_groups(rest, weight_decay, learning_rate, scales)
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True))

    groups = [group for one in optimizers for group in one.param_groups]
    for group in groups:
        group["initial_lr"] = group["lr"]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, parameters.values())), "a parameter is in no group, or in two"
    return optimizers


class Muon(Optimizer):
    """Muon (Jordan et al. 2024), exact on shards and fast on CPU, with AdamW-sized updates.

    The filters of a convolution are the rows of a matrix here. An update's root mean square is 0.2, like AdamW's (Liu
    et al. 2025, "Muon is scalable for LLM training", section 2.2), so one learning rate serves both.

    `torch.optim.Muon` orthogonalises in bfloat16, which a CPU without the instructions for it does up to a hundred
    times slower than in float32, and on an FSDP2 shard the rounding of its partial products moves the result by
    percents; nor does it take convolutions. Here a sharded update is gathered first, all matrices of one shape are
    orthogonalised in one batch, by every process for itself (five small products a matrix: little beside a step on
    thousands of tokens), and each process keeps its own rows.
    """

    def __init__(self, params, lr: float, weight_decay: float):
        iteration = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95, **iteration})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([_whole(self._momentum(parameter, group)).flatten(1) for parameter in parameters])
                updates = orthogonalise(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * 0.2 * math.sqrt(max(updates.shape[1:]))
                for parameter, update in zip(parameters, updates.unflatten(2, shape[1:]), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(_shard_like(update, parameter), alpha=-rate)
        return loss

    def _momentum(self, parameter: nn.Parameter, group: dict) -> torch.Tensor:
        """Nesterov's look-ahead: the gradient, moved towards its running mean after that took the gradient in."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(state["momentum_buffer"], group["momentum"])


def orthogonalise(matrices: torch.Tensor, coefficients, num_iterations: int, epsilon: float) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix U V^T to each U S V^T, roughly: singular values end between 0.7 and 1.2.

    A quintic Newton-Schulz iteration (Jordan et al. 2024), its coefficients chosen to lift small singular values
    fast rather than to converge. matrices: (matrices, rows, columns); bfloat16 on CUDA, where it is accurate enough.
    """
    X = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices.float()
    is_tall = X.size(-2) > X.size(-1)
    if is_tall:
        X = X.mT  # the Gram matrix of the shorter side is the smaller one
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=epsilon)  # Frobenius norm 1, so no singular value above 1
    if X.dtype == torch.float32 and X.size(-1) >= 2 * X.size(-2):
        for first in range(0, num_iterations, 3):  # beyond three in a row, rounding would grow in small singular values
            X = _polynomials(X @ X.mT, coefficients, min(3, num_iterations - first)) @ X
    else:
        a, b, c = coefficients
        for _ in range(num_iterations):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A^2) X
    return X.mT if is_tall else X


def _polynomials(A: torch.Tensor, coefficients, num_iterations: int) -> torch.Tensor:
    """What the iterations multiply X by, from A = X X^T alone: each turns X into P X, P = a I + b A + c A^2, and so A
    into P A P. Long matrices are then touched twice in all, not twice an iteration; in bfloat16 A is too coarse for it.
    """
    a, b, c = coefficients
    product = None
    for number in range(num_iterations):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        product = P if product is None else P @ product
        if number < num_iterations - 1:
            A = P @ A @ P
    return product


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard_like(whole: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This process's part of `whole`, which all processes hold: nothing is sent (`src_data_rank=None`)."""
    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


def learning_rate_factor(
    step: int, *, schedule: str, max_steps: int, warmup_steps: int, cooldown_steps: int = 0, final: float = 0.1
) -> float:
    """What to multiply the peak learning rate by in `step`, counted from 0. A pure function: resuming needs no state.

    Linear warm-up, then "cosine" (Loshchilov & Hutter 2017) or "linear" down to `final`; or "constant", and over the
    last `cooldown_steps` down to zero as 1 - sqrt (Hägele et al. 2024, which beats a straight line). No step before
    `max_steps` has a factor of 0 from the warm-up or the cooldown: it would be wasted.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        into_cooldown = step + 1 - (max_steps - cooldown_steps)
        return 1 - math.sqrt(min(1, max(0, into_cooldown) / (cooldown_steps + 1)))
    progress = min(1, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    if schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return final + (1 - final) * (1 - progress)
    raise ValueError(f"schedule must be 'cosine', 'linear' or 'constant', not {schedule!r}")


def set_learning_rate(args: RunArguments, optimizers: list[Optimizer], step: int) -> float:
    """Sets the learning rate of every group for this step, and returns that of groups whose peak is `learning_rate`."""
    factor = learning_rate_factor(
        step,
        schedule=args.schedule,
        max_steps=args.max_steps,
        warmup_steps=args.warmup_steps,
        cooldown_steps=args.cooldown_steps,
        final=args.final_learning_rate,
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    return args.learning_rate * factor


class EMA:
    """An exponential moving average of the trainable weights, which often evaluates better than the last ones.

    Make it after `accelerator.prepare`, which moves or shards the parameters: it keeps a copy beside each, in the
    same type and layout. The weights have to be float32 (as in training they are): in bfloat16 a small step towards
    them is lost to rounding.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.parameters = named_parameters(model)
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int):
        """Takes in the weights after `step` (counted from 0). Early steps weigh more, or the average would remember
        the initial weights for a long time: the decay is at most (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, parameters = self.averages.values(), self.parameters.values()
        torch._foreach_lerp_([_local(a) for a in averages], [_local(p) for p in parameters], 1 - decay)

    @contextmanager
    def swap(self):
        """Within the block the model has the averaged weights; afterwards its own again, bit for bit."""
        self.move_into_model()
        try:
            yield
        finally:
            self.move_into_model()

    @torch.no_grad()
    def move_into_model(self):
        """Exchanges the averages and the model's weights; once more, and each is back in its place."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without backward leaves gathered weights behind, that would be used again
        for name, parameter in self.parameters.items():
            mine, other = _local(parameter), _local(self.averages[name])
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name, whole, on the CPU. Shards are gathered, so every process has to call this."""
        return {name: _whole(average).cpu() for name, average in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Restores `state_dict`, in any layout of processes. Raises ValueError if names or shapes differ."""
        for name in sorted(state.keys() ^ self.averages.keys()):
            raise ValueError(f"moving average: {name} is only in the {'checkpoint' if name in state else 'model'}")
        for name, average in self.averages.items():
            if state[name].shape != average.shape:
                raise ValueError(f"moving average: {name} is {tuple(state[name].shape)}, not {tuple(average.shape)}")
            average.copy_(_shard_like(state[name].to(average.device), average))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of this process behind a parameter, sharded or whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
