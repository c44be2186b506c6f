"""The losses that models share: cross-entropy without ever holding all logits, and those of classifiers.

Each is a sum over what is scored, divided by a number that is known before the forward pass, so that a batch may be
computed in parts.

    B  batch          T  tokens          M  scored places
    D  hidden size    C  classes         V  vocabulary
"""

from typing import Any

import torch
import torch.nn.functional as F

from .projections import is_plain_linear


def scored_places(hidden_states, labels, positions=None, ignore_index: int = -100):
    """The hidden states of the places that are scored, and their labels: a head on these alone has the same loss as
    one on all places.

    Args:
        hidden_states: (B, T, D).
        labels: (B, T), `ignore_index` where nothing is scored.
        positions: (B, M), the scored places of each row, padded with -1; by default they are searched for. A compiler
            needs fixed shapes: it takes the padding too, and without positions every place.

    Returns:
        (M', D) and (M',), as many as are scored; under a compiler B M, or B T.
    """
    labels = labels.to(hidden_states.device)
    if torch.compiler.is_compiling():
        if positions is not None:
            hidden_states = states_at(hidden_states, positions)
            labels = states_at(labels[..., None], positions)[..., 0].where(positions >= 0, ignore_index)
        return hidden_states.flatten(0, 1), labels.flatten()
    if positions is None:
        rows, places = (labels != ignore_index).nonzero(as_tuple=True)
    else:
        positions = positions.to(hidden_states.device)
        rows, columns = (positions >= 0).nonzero(as_tuple=True)
        places = positions[rows, columns]
    return hidden_states[rows, places], labels[rows, places]


def states_at(hidden_states, positions):
    """The states (B, M, D) at `positions` (B, M) of (B, T, D); for a position of -1, which pads, those at 0."""
    return hidden_states.take_along_dim(positions.to(hidden_states.device).clamp(min=0)[..., None], dim=1)


def marked_places(positions, num_tokens: int):
    """(B, T), true at `positions` (B, M), which are padded with -1."""
    marks = torch.zeros(positions.shape[0], num_tokens + 1, dtype=torch.bool, device=positions.device)
    return marks.scatter(1, positions.where(positions >= 0, num_tokens), True)[:, :-1]


def head_loss(head, hidden_states, labels, num_items=None, *, logits=None, label_smoothing: float = 0.0):
    """The cross-entropy of a head that scores a vocabulary; it holds all logits only where it has to.

    Args:
        head: the last linear layer, (..., D) -> (..., V). Where an adapter or a hook changes it, it is called; else
            `linear_cross_entropy` takes its weight and bias.
        hidden_states: (..., D).
        labels: (...), token ids; -100 where nothing is predicted.
        num_items: what the sum of losses is divided by; by default the number of labels that count.
        logits: (..., V), what the head made of the states, where the caller has computed it anyway.
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
    hidden_states,
    weight,
    targets,
    num_items=None,
    bias=None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
):
    """Mean of -log softmax(W x + b)[target] over the targets that count, without ever holding all logits.

    At a vocabulary of 50,000 the logits and their gradient are the largest tensors of a training step. This function
    takes a slice of the tokens at a time: it computes the slice's logits, their loss and the gradients of the loss, and
    then drops the logits.

    Args:
        hidden_states: (M, D).
        weight, bias: (V, D) and None or (V,), of the head.
        targets: (M,), token ids; `ignore_index` where nothing is predicted.
        num_items: what the sum of losses is divided by; by default the number of targets that count, at least one.
        label_smoothing: as in `head_loss`.

    Raises:
        ValueError: another number of targets than of hidden states.
    """
    if len(targets) != len(hidden_states):
        raise ValueError(f"{len(hidden_states)} hidden states, but {len(targets)} labels: give a label for each")
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    num_items = as_divisor(num_items, hidden_states.device)
    if not torch.is_grad_enabled():  # which the function below cannot see
        hidden_states, weight = hidden_states.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    options = (ignore_index, label_smoothing, dtype)
    return _LinearCrossEntropy.apply(hidden_states, weight, bias, targets, num_items, *options)


def as_divisor(num_items, device):
    """What a sum of losses is divided by, as a tensor; 1 in place of 0, since then the sum is 0."""
    if not isinstance(num_items, torch.Tensor):  # filled in on the device: a copy would wait for it
        num_items = torch.full((), num_items, device=device)
    num_items = num_items.to(device, torch.float32)
    return num_items.where(num_items != 0, 1)


def cross_entropy(
    logits, labels, num_items=None, class_weights=None, ignore_index: int = -100, label_smoothing: float = 0.0
):
    """Mean of -log softmax(logits)[label] over the labels that count; 0 where none does.

    Args:
        logits: (..., C).
        labels: (...), class ids; `ignore_index` where nothing is scored.
        num_items: what the sum is divided by; by default the number of labels that count, or with `class_weights` (C,)
            the sum of their weights.
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


def classification_loss(logits, labels, config, num_items=None):
    """The loss of a classifier of whole samples: squared error, cross-entropy, or a yes or no for each class.

    Args:
        logits: (B, C).
        labels: (B,) class ids, or (B, C) probabilities of the classes; (B,) or (B, C) numbers for regression; (B, C)
            of 0 and 1 for multi-label classification. `config.problem_type` decides between them, and is set from the
            labels where it is None.
        num_items: what the sum is divided by; by default the number of labels (their weights, with
            `config.class_weights`).
    """
    labels = labels.to(logits.device)
    if config.problem_type is None:
        is_class_ids = not labels.is_floating_point()
        several = "single_label_classification" if is_class_ids else "multi_label_classification"
        config.problem_type = "regression" if logits.shape[-1] == 1 else several
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
    """Computes the gradients in the forward pass, while the logits of a slice exist; the backward pass only scales
    them.

    With logits z = W x + b and loss L, dL/dz = softmax(z) - onehot(target), from which dL/dx = W^T dL/dz,
    dL/dW = dL/dz x^T and dL/db = dL/dz, each summed over the tokens.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, num_items, ignore_index, label_smoothing, dtype):
        num_tokens, vocab_size = hidden_states.shape[0], weight.shape[0]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # A slice takes as many bytes in any type: a quarter of the tokens in float32, where each slice rereads the
        # weight's gradient; half of them in bfloat16, where each converts it as well. Short ones make slow products.
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
                )  # with a gradient, `logits` now holds dL/dz
                if grad_hidden is not None:
                    grad_hidden[part] = logits @ matrix
                if needs_weight and grad_weight is None:
                    grad_weight = (logits.T @ states).to(weight.dtype)
                elif grad_weight is not None and dtype == weight.dtype:
                    grad_weight.addmm_(logits.T, states)
                elif grad_weight is not None:
                    grad_weight += logits.T @ states
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, num_items)
        return loss / num_items

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative: compute logits and their cross-entropy")
        # The division by num_items waits until here, where float16's loss scale has come in too: small gradients would
        # be lost otherwise. It works in place, because the weight's gradient is large; autograd refuses to do it twice.
        *gradients, num_items = ctx.saved_tensors
        gradients = [None if one is None else one.mul_(grad_loss / num_items) for one in gradients]
        return *gradients, None, None, None, None, None


def _loss_of_slice(logits, targets, ignore_index, label_smoothing, with_gradient: bool):
    """The sum of -log softmax(logits)[target], smoothed. With `with_gradient` the logits (M, V) become its gradient.

    An eighth of the rows is computed at a time, because the logarithm takes float32.
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
