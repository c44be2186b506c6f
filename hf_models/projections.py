"""Linear layers whose input is cheap to compute again, and those that end a residual branch."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init


class ResidualLinear(nn.Linear):
    """The linear layer that ends a residual branch; `config.residual_init` says how it starts.

    Args:
        num_branches: how many residual branches the stack has.
    """

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool, num_branches: int = 1):
        super().__init__(num_inputs, num_outputs, bias)
        self.num_branches = num_branches

    def initialise(self, config):
        """Starts the weight at zero, or at 1 / sqrt(branches) of the usual size (Radford et al. 2019, section 2.3)."""
        if config.residual_init == "zero":
            init.zeros_(self.weight)
        elif config.residual_init == "scaled":
            init.normal_(self.weight, mean=0.0, std=config.initializer_range / self.num_branches**0.5)


def linear_of(linear: nn.Module, prepare, *tensors, recompute: bool):
    """Applies `linear` to a tensor that is cheap to prepare, without keeping that tensor for the backward pass.

    The tensors that enter the last projection of attention and of the feed-forward layer are the largest of a block.
    With `recompute`, and where `linear` is nothing but a product, the backward pass prepares its input again.

    Args:
        prepare: computes the input x of `linear`, and possibly more, as a tuple (x, *more).
        *tensors: what `prepare` is called with.

    Returns:
        The tuple (linear(x), *more).
    """
    if not recompute or not is_plain_linear(linear):
        x, *more = prepare(*tensors)
        return linear(x), *more

    def prepare_and_apply(weight, bias, *tensors):
        x, *more = prepare(*tensors)
        return F.linear(x, weight, bias), *more

    # The weight is an argument, because the module may have another one in the backward pass (torch.func).
    arguments = (linear.weight, linear.bias, *tensors)
    return checkpoint(prepare_and_apply, *arguments, use_reentrant=False, preserve_rng_state=False)


def is_plain_linear(module: nn.Module) -> bool:
    """Tells whether calling the module computes W x + b and nothing else.

    An adapter, a hook, a quantised weight or a weight that is split over devices makes it something else.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    is_hooked = any(hooks) or "forward" in vars(module)
    is_plain_weight = type(module.weight) in (nn.Parameter, torch.Tensor)  # the latter: put in by torch.func
    return type(module) in (nn.Linear, ResidualLinear) and is_plain_weight and not is_hooked
