"""The losses that models share: cross-entropy that never holds all logits, and the losses of classifiers.

Each loss is a sum divided by a number that is known before the forward pass, so that a batch can be computed in parts.

    B  batch          T  tokens          M  scored positions
    D  hidden size    C  classes         V  vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .projections import is_plain_linear


def scored_places(
    hidden_states: Tensor, labels: Tensor, positions: Tensor | None = None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Selects the scored hidden states and their labels, so that a head need not run on the others.

    Args:
        hidden_states: (B, T, D).
        labels: (B, T), `ignore_index` where nothing is scored.
        positions: (B, M), the scored positions of each row, padded with -1. Default: found from the labels.

    Returns:
        The states (M', D) and the labels (M',) of all M' scored positions. A compiler needs fixed shapes, so under one
        M' is B M with the padding, or without `positions` B T.
    """
    labels = labels.to(hidden_states.device)
    if torch.compiler.is_compiling():
        if positions is not None:
            hidden_states = states_at(hidden_states, positions)
            labels = states_at(labels[..., None], positions)[..., 0].where(positions >= 0, ignore_index)
        return hidden_states.flatten(0, 1), labels.flatten()
    if positions is None:
        rows, columns = (labels != ignore_index).nonzero(as_tuple=True)
    else:
        positions = positions.to(hidden_states.device)
        rows, entries = (positions >= 0).nonzero(as_tuple=True)
        columns = positions[rows, entries]
    return hidden_states[rows, columns], labels[rows, columns]


def states_at(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """Returns the states (B, M, D) of (B, T, D) at `positions` (B, M); for padding, -1, the states at 0."""
    return hidden_states.take_along_dim(positions.to(hidden_states.device).clamp(min=0)[..., None], dim=1)


def marked_places(positions: Tensor, num_tokens: int) -> Tensor:
    """Returns (B, T), true at the `positions` (B, M), which are padded with -1."""
    marks = torch.zeros(positions.shape[0], num_tokens + 1, dtype=torch.bool, device=positions.device)
    return marks.scatter(1, positions.where(positions >= 0, num_tokens), True)[:, :-1]


def head_loss(
    head,
    hidden_states: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    *,
    logits: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of a head that scores a vocabulary. It computes all logits at once only if it must.

    Args:
        head: the last linear layer, (..., D) -> (..., V). `linear_cross_entropy` uses its weight and bias; a head that
            an adapter or a hook changes is called instead.
        hidden_states: (..., D).
        labels: (...), token ids; -100 where nothing is scored.
        num_items: divisor of the summed loss. Default: the number of scored labels.
        logits: (..., V), the head's output, if the caller has it already.
        label_smoothing: the part of each label that is spread over the vocabulary (Szegedy et al. 2016, section 7).
    """
    if logits is None and not is_plain_linear(head):
        logits = head(hidden_states)
    if logits is not None:
        return cross_entropy(logits, labels, num_items, label_smoothing=label_smoothing)
    hidden_states, labels = hidden_states.flatten(0, -2), labels.flatten().to(hidden_states.device)
    return linear_cross_entropy(
        hidden_states, head.weight, labels, num_items, head.bias, label_smoothing=label_smoothing
    )


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items: Tensor | float | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of -log softmax(W x + b)[target] over the scored targets, without ever holding all logits.

    With a vocabulary of 50,000 the logits and their gradient are the largest tensors of a training step. This function
    computes one slice of the tokens at a time: its logits, its loss and the gradients of the loss. Then it drops the
    logits of the slice.

    Args:
        hidden_states: (M, D).
        weight, bias: (V, D) and None or (V,), of the head.
        targets: (M,), token ids; `ignore_index` where nothing is scored.
        num_items: divisor of the summed loss. Default: the number of scored targets. 0 counts as 1.
        label_smoothing: as in `head_loss`.

    Raises:
        ValueError: the numbers of targets and of hidden states differ.
    """
    if len(targets) != len(hidden_states):
        raise ValueError(f"{len(hidden_states)} hidden states, but {len(targets)} labels: give a label for each")
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    num_items = as_divisor(num_items, hidden_states.device)
    if not torch.is_grad_enabled():  # `needs_input_grad` in the function does not take this into account
        hidden_states, weight = hidden_states.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    options = (ignore_index, label_smoothing, dtype)
    return _LinearCrossEntropy.apply(hidden_states, weight, bias, targets, num_items, *options)


def as_divisor(num_items: Tensor | float, device: torch.device) -> Tensor:
    """Returns the divisor of a summed loss as a tensor on the device; 1 instead of 0, for a sum over nothing."""
    if not isinstance(num_items, torch.Tensor):  # filled in on the device, because a copy would wait for the device
        num_items = torch.full((), num_items, device=device)
    num_items = num_items.to(device, torch.float32)
    return num_items.where(num_items != 0, 1)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    class_weights: Sequence[float] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of -log softmax(logits)[label] over the scored labels; 0 if no label is scored.

    Args:
        logits: (..., C).
        labels: (...), class ids; `ignore_index` where nothing is scored.
        num_items: divisor of the summed loss. Default: the number of scored labels, or the sum of their class weights.
        class_weights: (C,), weight of each class. Default: 1.
        label_smoothing: as in `head_loss`.
    """
    logits, labels = logits.float().flatten(0, -2), labels.flatten().to(logits.device)
    weights = None if class_weights is None else logits.new_tensor(class_weights)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "sum"}
    total = F.cross_entropy(logits, labels, weight=weights, **options)
    if num_items is None:
        counts = labels != ignore_index
        num_items = counts.sum() if weights is None else (weights[labels * counts] * counts).sum()
    return total / as_divisor(num_items, total.device)


def classification_loss(logits: Tensor, labels: Tensor, config, num_items: Tensor | float | None = None) -> Tensor:
    """The loss of a classifier of whole samples: cross-entropy, squared error, or a binary loss for each class.

    Args:
        logits: (B, C).
        labels: (B,) class ids or (B, C) probabilities of the classes for single-label classification; (B,) or (B, C)
            numbers for regression; (B, C) of 0 and 1 for multi-label classification.
        config: `config.problem_type` chooses the loss; if it is None, it is set according to the labels.
        num_items: divisor of the summed loss. Default: the number of labels, or the sum of their class weights.
    """
    labels = labels.to(logits.device)
    if config.problem_type is None:
        is_class_ids = not labels.is_floating_point()
        classification = "single_label_classification" if is_class_ids else "multi_label_classification"
        config.problem_type = "regression" if logits.shape[-1] == 1 else classification
    if config.problem_type == "single_label_classification" and not labels.is_floating_point():
        return cross_entropy(logits, labels, num_items, config.class_weights)
    logits, labels = logits.float(), labels.reshape(logits.shape).float()
    if config.problem_type == "single_label_classification":
        weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
        total = F.cross_entropy(logits, labels, weight=weights, reduction="sum")
        counts = labels if weights is None else labels * weights
        return total / as_divisor(counts.sum() if num_items is None else num_items, total.device)
    if config.problem_type == "regression":
        losses = F.mse_loss(logits, labels, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        if config.class_weights is not None:
            losses = losses * losses.new_tensor(config.class_weights)
    return losses.sum() / as_divisor(losses.numel() if num_items is None else num_items, losses.device)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients in the forward pass, slice by slice; the backward pass only scales the gradients.

    With logits z = W x + b and loss L, dL/dz = softmax(z) - onehot(target), and from it dL/dx = W^T dL/dz,
    dL/dW = dL/dz x^T and dL/db = dL/dz, the last two summed over the tokens.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, num_items, ignore_index, label_smoothing, dtype):
        num_tokens, vocab_size = hidden_states.shape[0], weight.shape[0]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # A quarter of the tokens in float32, half of them in bfloat16: more slices would need less memory, but each
        # reads the weight's gradient once more (and in bfloat16 converts it), and short slices make slow products.
        slice_size = -(-max(1024, num_tokens) // dtype.itemsize)
        if num_tokens * vocab_size <= 2**24:
            slice_size = max(1, num_tokens)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight and not num_tokens else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        with torch.autocast(hidden_states.device.type, enabled=False):
            for start in range(0, num_tokens, slice_size):
                part = slice(start, start + slice_size)
                states = hidden_states[part].to(dtype)
                logits = F.linear(states, matrix, offset)
                loss += _loss_of_slice(
                    logits, targets[part], ignore_index, label_smoothing, with_gradient=any(ctx.needs_input_grad)
                )
                grad_logits = logits  # if any gradient is needed, `_loss_of_slice` has written dL/dz into the logits
                if grad_hidden is not None:
                    grad_hidden[part] = grad_logits @ matrix
                if needs_weight:
                    grad_weight = _add_product(grad_weight, grad_logits.T, states, weight.dtype)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, num_items)
        return loss / num_items

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative: compute logits and their cross-entropy")
        # The division by num_items waits until here, where the incoming gradient brings the loss scale of float16:
        # before that, small gradients would round to zero. Scaling in place saves a copy of the weight's large
        # gradient; autograd itself refuses a second backward pass.
        *gradients, num_items = ctx.saved_tensors
        gradients = [grad if grad is None else grad.mul_(grad_loss / num_items) for grad in gradients]
        return *gradients, None, None, None, None, None


def _add_product(total, a, b, dtype: torch.dtype):
    """Returns total + a b in `dtype`; in place, unless `total` is None, which counts as 0."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)


def _loss_of_slice(logits, targets, ignore_index, label_smoothing, with_gradient: bool):
    """Returns the sum of -log softmax(logits)[target], smoothed, over the scored targets.

    With `with_gradient` it replaces the logits (M, V) by the gradient of this sum. It computes an eighth of the rows at
    a time, because it needs them in float32.
    """
    loss, even = 0.0, label_smoothing / logits.shape[-1]
    rows = max(32, -(-len(targets) // 8))
    for scores, target in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        counts = target != ignore_index
        target = target.where(counts, 0)
        log_probabilities = F.log_softmax(scores, dim=-1, dtype=torch.float32)
        loss -= (1 - label_smoothing) * log_probabilities.gather(1, target).where(counts, 0).sum()
        if label_smoothing:
            loss -= even * log_probabilities.sum(1, keepdim=True).where(counts, 0).sum()
        if with_gradient:
            gradient = log_probabilities.exp_()  # softmax
            if label_smoothing:
                gradient.sub_(even)
            gradient.scatter_add_(1, target, torch.full_like(target, label_smoothing - 1, dtype=torch.float32))
            scores.copy_(gradient.mul_(counts))
    return loss
