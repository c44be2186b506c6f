"""Optimization: parameter groups, AdamW and Muon, learning-rate schedules, a moving average of the weights.

Everything works on whole parameters and on the shards (`DTensor`) that FSDP2 leaves on each process.
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
    """Returns the names of each parameter in the bare model, as in a checkpoint, in the order of the model.

    Wrappers (DDP, torch.compile, activation checkpointing) leave nothing in the names. A tied weight has several.
    """
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(re.sub(r"(_orig_mod|_checkpoint_wrapped_module)\.", "", name))
    return names


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters by their first name in the bare model; a tied weight occurs once."""
    return {names[0]: parameter for parameter, names in parameter_names(model).items() if parameter.requires_grad}


def layer_scales(names: list[str], layer_decay: float) -> dict[str, float]:
    """Returns a factor of the learning rate for each parameter.

    With these factors, layers nearer to the data change less in fine-tuning, since their features are more general
    (Howard & Ruder 2018, section 3.2). What comes after the layers (the final norm, the heads, the whole decoder of an
    autoencoder) has 1. Each `layers.i.` has `layer_decay` times the factor of the layer above it, and what comes before
    the layers, the embeddings, has `layer_decay` times the factor of the first layer.

    Args:
        names: of all parameters, also of frozen ones, in the order of the model.

    Raises:
        ValueError: no parameter is in a layer, and `layer_decay` is not 1.
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
            depth = num_layers + 1  # the depth of what follows the layers
        scales[name] = layer_decay ** (num_layers + 1 - (depth if number is None else number + 1))
    return scales


def module_scales(names: list[str], scales: dict[str, float]) -> dict[str, float]:
    """Returns a factor of the learning rate for each parameter.

    Args:
        names: of all parameters, also of frozen ones.
        scales: the factors of modules, by their names. A parameter outside of them has the factor 1.

    Raises:
        ValueError: a module has no parameter; the message names it.
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
    """Returns the groups of an optimizer: a group of matrices, including embeddings, with weight decay, and a group of
    biases and gains of norms without. A gain or a bias sets a scale or an offset, and a pull to zero only disturbs it.
    There are two such groups for each factor of the learning rate. The order follows the model."""
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
    """Returns the optimizers that together hold every trainable parameter of `model` exactly once.

    Each group keeps its peak learning rate as "initial_lr", which the schedule multiplies.

    Args:
        optimizer: "adamw" is one fused AdamW (Loshchilov & Hutter 2019). "muon" is `Muon` on the matrices inside the
            repeated blocks (`layers.0.`, `layers.1.`, ...) and on the filters of a ViT's stem (`stem.0.`, ...), and
            AdamW on everything else, which includes embeddings, heads and the filters of a detector's backbone.
        matrix_learning_rate: Muon's learning rate. None: `learning_rate`, since Muon's updates are scaled to the size
            of AdamW's.
        layer_decay: makes the rates smaller towards the embeddings, see `layer_scales`.
        rate_scales: factors of the rates of whole modules, such as {"model.backbone": 0.1}.

    Raises:
        ValueError: nothing is trainable, or an option finds no parameter that it is for.
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
    """Muon (Jordan et al. 2024), exact on shards and fast on a CPU, with updates of AdamW's size.

    The filters of a convolution are the rows of a matrix. An update has a root mean square of 0.2, as AdamW's has (Liu
    et al. 2025, "Muon is scalable for LLM training", section 2.2), so one learning rate serves both.

    `torch.optim.Muon` takes no convolutions and orthogonalises in bfloat16. A CPU without instructions for bfloat16
    does that up to a hundred times slower than in float32, and on shards of FSDP2 the rounding of partial products
    changes the result by percents. Here a sharded update is gathered first, and every process orthogonalises all
    matrices of one shape in one batch and keeps its own rows. That is five small products for each matrix, which is
    little beside a step on thousands of tokens.
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
        """Returns Nesterov's look-ahead: updates the running mean, and moves the gradient towards it."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(state["momentum_buffer"], group["momentum"])


def orthogonalise(matrices: torch.Tensor, coefficients, num_iterations: int, epsilon: float) -> torch.Tensor:
    """Returns roughly the nearest (semi-)orthogonal matrix U V^T to each matrix U S V^T: singular values end between
    0.7 and 1.2.

    It is a quintic Newton-Schulz iteration (Jordan et al. 2024), whose coefficients lift small singular values fast
    instead of converging. On CUDA it works in bfloat16, where that is accurate enough.

    Args:
        matrices: (matrices, rows, columns).
    """
    X = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices.float()
    is_tall = X.size(-2) > X.size(-1)
    if is_tall:
        X = X.mT  # so that the Gram matrix is that of the shorter side, which is smaller
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=epsilon)  # with Frobenius norm 1 no singular value exceeds 1
    if X.dtype == torch.float32 and X.size(-1) >= 2 * X.size(-2):
        for first in range(0, num_iterations, 3):  # with more in a row, rounding would grow in small singular values
            X = _polynomials(X @ X.mT, coefficients, min(3, num_iterations - first)) @ X
    else:
        a, b, c = coefficients
        for _ in range(num_iterations):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A^2) X
    return X.mT if is_tall else X


def _polynomials(A: torch.Tensor, coefficients, num_iterations: int) -> torch.Tensor:
    """Returns what several iterations multiply X by, from A = X X^T alone.

    An iteration turns X into P X with P = a I + b A + c A^2, and so turns A into P A P. A long X is then touched only
    twice, instead of twice in each iteration. In bfloat16, A would be too coarse for that.
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
    """Returns this process's part of `whole`. All processes hold `whole`, so nothing is sent (`src_data_rank=None`)."""
    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


def learning_rate_factor(
    step: int, *, schedule: str, max_steps: int, warmup_steps: int, cooldown_steps: int = 0, final: float = 0.1
) -> float:
    """Returns the factor of the peak learning rate in a step, counted from 0. It needs no state to resume.

    After a linear warm-up, "cosine" (Loshchilov & Hutter 2017) and "linear" fall to `final`. "constant" stays at 1, and
    falls to zero over the last `cooldown_steps` as 1 - sqrt, which beats a straight line (Hägele et al. 2024). Warm-up
    and cooldown leave out their factor of 0, which would waste a step.
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
    """An exponential moving average of the trainable weights, which often evaluates better than the last weights.

    It has to be made after `accelerator.prepare`, which moves or shards the parameters, since it keeps a copy of each
    in the same type and layout. The weights have to be float32, as they are in training: in bfloat16 a small step
    towards them would be lost to rounding.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.parameters = named_parameters(model)
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int):
        """Takes in the weights after `step` (counted from 0).

        The decay is at most (1 + step) / (10 + step): early steps weigh more, since otherwise the average would
        remember the initial weights for a long time.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, parameters = self.averages.values(), self.parameters.values()
        torch._foreach_lerp_([_local(a) for a in averages], [_local(p) for p in parameters], 1 - decay)

    @contextmanager
    def swap(self):
        """In the block the model has the averaged weights, and afterwards its own weights again, bit for bit."""
        self.move_into_model()
        try:
            yield
        finally:
            self.move_into_model()

    @torch.no_grad()
    def move_into_model(self):
        """Exchanges the averages and the weights of the model. A second call puts both back."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without backward leaves gathered weights, which would be used again
        for name, parameter in self.parameters.items():
            mine, other = _local(parameter), _local(self.averages[name])
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the whole averages by parameter name, on the CPU. Every process has to call it: it gathers shards."""
        return {name: _whole(average).cpu() for name, average in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Restores what `state_dict` returned, in any layout of processes. Raises ValueError if names or shapes
        differ."""
        for name in sorted(state.keys() ^ self.averages.keys()):
            raise ValueError(f"moving average: {name} is only in the {'checkpoint' if name in state else 'model'}")
        for name, average in self.averages.items():
            if state[name].shape != average.shape:
                raise ValueError(f"moving average: {name} is {tuple(state[name].shape)}, not {tuple(average.shape)}")
            average.copy_(_shard_like(state[name].to(average.device), average))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of a parameter, which may be sharded or whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
