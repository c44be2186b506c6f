"""The linear layers that end a residual branch: how they start, and how to save the memory of their input."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init


class ResidualLinear(nn.Linear):
    """The linear layer that ends a residual branch; `config.residual_init` chooses its initial weight.

    Args:
        num_branches: number of residual branches in the stack.
    """

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool, num_branches: int = 1):
        super().__init__(num_inputs, num_outputs, bias)
        self.num_branches = num_branches

    def initialise(self, config):
        """Sets the weight to zero, or draws it 1 / sqrt(branches) times as large as usual (Radford et al. 2019, section
        2.3)."""
        if config.residual_init == "zero":
            init.zeros_(self.weight)
        elif config.residual_init == "scaled":
            init.normal_(self.weight, mean=0.0, std=config.initializer_range / self.num_branches**0.5)


def linear_of(linear: nn.Module, prepare: Callable[..., tuple], *tensors: torch.Tensor, recompute: bool) -> tuple:
    """Applies `linear` to the result of `prepare`, and can recompute that result in the backward pass.

    The inputs of the last projections of attention and of the feed-forward layer are the largest tensors of a block.
    With `recompute` they are not kept: the backward pass calls `prepare` again, which is cheap. This needs a plain
    `linear`; any other is simply called.

    Args:
        prepare: computes the input x of `linear`, and possibly more, as a tuple (x, *more).
        *tensors: the arguments of `prepare`.

    Returns:
        The tuple (linear(x), *more).
    """
    if not recompute or not is_plain_linear(linear):
        x, *more = prepare(*tensors)
        return linear(x), *more

    def prepare_and_apply(weight, bias, *tensors):
        x, *more = prepare(*tensors)
        return F.linear(x, weight, bias), *more

    # The weight is passed as an argument, because torch.func exchanges the module's weight before the backward pass.
    arguments = (linear.weight, linear.bias, *tensors)
    return checkpoint(prepare_and_apply, *arguments, use_reentrant=False, preserve_rng_state=False)


def is_plain_linear(module: nn.Module) -> bool:
    """Returns whether calling the module computes W x + b and nothing else.

    Adapters, hooks, quantised weights and weights that are split over devices do something else.
    """
    if type(module) not in (nn.Linear, ResidualLinear):
        return False
    if type(module.weight) not in (nn.Parameter, torch.Tensor):  # torch.func puts in plain tensors
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)  # accelerate, for one, replaces `forward` on the instance
