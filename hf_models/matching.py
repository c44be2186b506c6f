"""DETR's loss: each true box is assigned to one prediction, which learns to predict it (Carion et al. 2020).

assignment = argmin over one-to-one assignments of the sum of cost(box, prediction)                       (equation 1)
cost       = class_cost * class term + bbox_cost * |b - b'|_1 - giou_cost * GIoU(b, b')
loss       = the same terms for the assigned pairs, and "no object" for all other predictions             (equation 2)

All layers and images are computed at once. The costs and the checks of their inputs go to the host in one transfer;
nothing else waits for the device. A box is (centre x, centre y, width, height) in fractions of the image. Boxes that
extend beyond the image, have no area or are repeated count like any other. If an image has more boxes than queries,
every query is assigned one of the boxes that fit best.

    L  decoder layers    B  images     Q  queries    C  classes
    M  the largest number of boxes in an image, at least 1    G  groups of denoising queries

`config` is a `ZooDetrConfig` (see `detr.py`).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import as_divisor

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # Lin et al. 2017, section 5.1
VARIFOCAL_ALPHA, VARIFOCAL_GAMMA = 0.75, 2.0  # Zhang et al. 2021, section 5


# ------------------------------------------------------------------------------------------------------------- boxes


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) as (centre x, centre y, width, height) -> (x0, y0, x1, y1)."""
    x, y, width, height = boxes.unbind(-1)
    sides = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return sides.movedim(0, -1)  # each side is contiguous in memory, because `generalized_iou` unbinds them


def generalized_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """GIoU and IoU of boxes (x0, y0, x1, y1), whose shapes (..., 4) broadcast (Rezatofighi et al. 2019).

    IoU is intersection over union. GIoU subtracts the part of the smallest box around both that neither covers, and is
    from -1 to 1. Quotients whose denominator is 0 count as 0.
    """
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp(min=0)
    intersection = width * height
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    around = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (torch.maximum(ay1, by1) - torch.minimum(ay0, by0))
    least = torch.finfo(union.dtype).tiny  # below it, the quotient or its gradient could overflow
    iou = intersection / union.where(union > least, 1)
    return iou - (around - union) / around.where(around > least, 1), iou


# ------------------------------------------------------------------------------------------------------------ labels


class Targets(NamedTuple):
    """The true boxes of a batch, padded to M each. The padding is a valid box, so that its loss is finite."""

    classes: Tensor  # (B, M), int64
    boxes: Tensor  # (B, M, 4), float32
    is_box: Tensor  # (B, M), bool, false for padding
    counts: list[int]  # number of boxes of each image
    image_ids: list[Any]

    def name(self, image: int) -> str:
        """Returns the name of an image in error messages."""
        image_id = self.image_ids[image]
        if isinstance(image_id, Tensor):
            image_id = image_id.flatten().tolist()
            image_id = image_id[0] if len(image_id) == 1 else image_id
        return f"labels[{image}]" + ("" if image_id is None else f" (image_id {image_id})")


def check_labels(labels: list[dict], num_labels: int) -> None:
    """Checks the labels, but their values only on the CPU: reading them on a device waits for it, so `match` does.

    Raises:
        ValueError: a label lacks `class_labels` (n,), integers from 0 to `num_labels` - 1, or `boxes` (n, 4), finite
            numbers; the message names the image.
    """
    for image, label in enumerate(labels):
        missing = [name for name in ("class_labels", "boxes") if name not in label]
        if missing:
            raise ValueError(f"labels[{image}] has no {missing[0]!r}, only {sorted(label)}")
        classes, boxes = label["class_labels"], label["boxes"]
        if len(classes) == len(boxes) == 0:
            continue
        if classes.ndim != 1 or boxes.shape != (len(classes), 4) or classes.is_floating_point():
            raise ValueError(
                f"labels[{image}] (image_id {label.get('image_id')}): class_labels must be (n,) whole numbers and "
                f"boxes (n, 4), not {classes.dtype} {tuple(classes.shape)} and {tuple(boxes.shape)}"
            )
    if labels[0]["boxes"].device.type == "cpu":
        targets = pad_labels(labels)
        refuse_labels(check_targets(targets, num_labels), targets)


def pad_labels(labels: list[dict], device: torch.device | str | None = None) -> Targets:
    """Makes `Targets` from a list of {"class_labels" (n,), "boxes" (n, 4), optionally "image_id"}.

    Args:
        device: Default: the device of the boxes.
    """
    counts = [len(label["class_labels"]) for label in labels]
    numbers, column = torch.tensor(counts)[:, None], torch.arange(max(1, *counts))
    rows = (numbers.cumsum(0) - numbers + column).where(column < numbers, sum(counts))  # the last row is the padding
    given = labels[0]["boxes"].device
    padding_class, padding_box = torch.zeros(1, dtype=torch.long, device=given), torch.full((1, 4), 0.5, device=given)
    classes = torch.cat([*(label["class_labels"].long() for label in labels), padding_class])
    boxes = torch.cat([*(label["boxes"].float().reshape(-1, 4) for label in labels), padding_box])
    device = given if device is None else torch.device(device)
    rows, classes, boxes = (send(tensor, device) for tensor in (rows, classes, boxes))
    return Targets(classes[rows], boxes[rows], rows < sum(counts), counts, [label.get("image_id") for label in labels])


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device without waiting for it."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def count_items(labels: list[dict], config) -> dict[str, float]:
    """Returns the divisors of the loss, whose sums over micro-batches and processes are those of the global batch:
    {"boxes": number of boxes, "class_weights": sum of the weights of the classes that the queries are to predict}."""
    return _count([len(label["class_labels"]) for label in labels], config)


def _count(counts, config):
    matched = [min(count, config.num_queries) for count in counts]
    left_over = sum(config.num_queries - count for count in matched)
    return {"boxes": sum(counts), "class_weights": sum(matched) + config.no_object_weight * left_over}


# ---------------------------------------------------------------------------------------------------------- matching


@torch.no_grad()
def match(
    predictions: list[tuple[Tensor, Tensor]], targets: Targets, config, proposal_mask: Tensor | None = None
) -> list[Tensor]:
    """Finds the cheapest one-to-one assignment of boxes to queries, for each layer and image separately.

    Args:
        predictions: pairs of logits (L, B, Q, C + 1) and boxes (L, B, Q, 4): the decoder's, and with query selection
            those of the S proposals of the encoder, for which L is 1 and Q is S.
        proposal_mask: (B, S) bool, false for proposals on padding, which get no box. None: there is no padding.

    Returns:
        For each pair (L, B, Q) int64, the index of the box that each query is to predict, or -1 for none.

    Raises:
        ValueError: a prediction is not finite, or a label is not a class or box; the message names the image.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("the loss of DETR matches boxes with scipy: pip install scipy") from error
    device, num_images = targets.boxes.device, len(targets.counts)
    tensors = [check_targets(targets, predictions[0][0].shape[-1] - 1)]
    for logits, boxes in predictions:
        if logits.shape[1] != num_images:
            raise ValueError(f"{num_images} labels for {logits.shape[1]} images: give one dict for each image")
        costs = matching_cost(logits, boxes, targets, config)
        # A sum is finite only if all its terms are, and it is much faster to compute than a check of each term.
        is_finite = torch.isfinite(logits.sum((2, 3), dtype=torch.float32) + costs.sum((2, 3)))
        tensors += [is_finite, costs]
    tensors += [] if proposal_mask is None else [proposal_mask]
    sizes = [tensor.numel() for tensor in tensors]
    on_host = torch.cat([tensor.flatten().float() for tensor in tensors]).cpu().split(sizes)  # the only transfer
    is_sound, *rest = (part.view(tensor.shape).numpy() for part, tensor in zip(on_host, tensors, strict=True))
    is_proposal = None if proposal_mask is None else rest.pop() > 0
    refuse_labels(is_sound, targets)
    refuse_predictions(rest[::2], targets)
    assignments = []
    for costs, mask in zip(rest[1::2], (None, is_proposal), strict=False):
        assignment = np.full((*costs.shape[:2], costs.shape[3]), -1)
        for layer, image in np.ndindex(costs.shape[:2]):
            queries = np.arange(costs.shape[3]) if mask is None else np.flatnonzero(mask[image])
            boxes, chosen = linear_sum_assignment(costs[layer, image, : targets.counts[image]][:, queries])
            assignment[layer, image, queries[chosen]] = boxes
        assignments.append(torch.from_numpy(assignment))
    flat = send(torch.cat([assignment.flatten() for assignment in assignments]), device)
    parts = flat.split([assignment.numel() for assignment in assignments])
    return [part.view(assignment.shape) for part, assignment in zip(parts, assignments, strict=True)]


def matching_cost(logits: Tensor, boxes: Tensor, targets: Targets, config) -> Tensor:
    """Returns the cost of assigning each box of an image to each query, (L, B, M, Q) in float32.

    With cross-entropy the class term is minus the probability of the class (Carion et al. 2020, section 3.1). With a
    binary loss for each class it is the focal loss of "yes" minus that of "no" (Zhu et al. 2021).
    """
    logits, boxes = logits.float(), boxes.float()
    classes = targets.classes.clamp(0, logits.shape[-1] - 2)  # wrong classes are reported after the transfer
    classes = classes[None, :, None].expand(*logits.shape[:3], -1)
    if config.classification_loss == "cross_entropy":
        class_cost = -logits.softmax(-1).gather(-1, classes)  # (L, B, Q, M)
    else:
        logits = logits.gather(-1, classes)
        yes, no = logits.sigmoid(), (-logits).sigmoid()
        class_cost = FOCAL_ALPHA * no**FOCAL_GAMMA * F.softplus(-logits)  # softplus(-x) = -log sigmoid(x)
        class_cost = class_cost - (1 - FOCAL_ALPHA) * yes**FOCAL_GAMMA * F.softplus(logits)
    distance = torch.cdist(targets.boxes[None], boxes, p=1)
    overlap, _ = generalized_iou(corners(targets.boxes)[None, :, :, None], corners(boxes)[:, :, None])
    return config.bbox_cost * distance - config.giou_cost * overlap + config.class_cost * class_cost.mT


def check_targets(targets: Targets, num_labels: int) -> Tensor:
    """Returns (2, B) bool: whether the boxes of each image are valid, and whether its classes are."""
    boxes, classes = targets.boxes, targets.classes
    are_boxes = ((boxes.abs() < 1e6).all(-1) & (boxes[..., 2:] >= 0).all(-1)).all(-1)  # comparing NaN gives False
    return torch.stack([are_boxes, ((classes >= 0) & (classes < num_labels)).all(-1)])


def refuse_labels(is_sound, targets: Targets) -> None:
    """Raises a `ValueError` for the first image with labels that `check_targets` found invalid."""
    for image, (are_boxes, are_classes) in enumerate(is_sound.T):
        if not are_boxes:
            raise ValueError(
                f"{targets.name(image)}: boxes must be finite fractions (centre x, centre y, width, height) with sides "
                f"of at least 0, not {targets.boxes[image, : targets.counts[image]].tolist()}"
            )
        if not are_classes:
            raise ValueError(
                f"{targets.name(image)}: class_labels {targets.classes[image, : targets.counts[image]].tolist()} are "
                "not all from 0 to num_labels - 1: count classes from 0, or set num_labels"
            )


def refuse_predictions(is_sound, targets: Targets) -> None:
    """Raises a `ValueError` for the first layer and image whose prediction is not finite."""
    for source, sound in zip(("decoder layer {}", "the encoder's proposals"), is_sound, strict=False):
        for layer, image in np.argwhere(sound == 0):
            raise ValueError(
                f"the prediction of {source.format(layer)} for the image of {targets.name(image)} is NaN or infinite "
                "(its labels are valid): the model has diverged or the image is not finite; try a lower learning rate"
            )


# -------------------------------------------------------------------------------------------------------------- loss


def detection_loss(
    predictions: list[tuple[Tensor, Tensor]],
    targets: Targets,
    config,
    num_items: dict[str, Any] | None = None,
    denoising: tuple[Tensor, Tensor, Tensor] | None = None,
    proposal_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all layers, and its terms.

    Args:
        predictions, proposal_mask: as for `match`.
        num_items: the divisors {"boxes": ..., "class_weights": ...} of the global batch (see `count_items`). Default:
            those of `targets`.
        denoising: logits (L, B, G M, C + 1), boxes (L, B, G M, 4) and assignment (B, G M) of the denoising queries, or
            None.

    Returns:
        The loss, and a dict of its terms under transformers' names: "loss_ce", "loss_bbox", "loss_giou" and
        "cardinality_error" of the last layer; with "_0", "_1", ... those of the layers before it; with "_encoder" those
        of the proposals; and with "_denoising" those of the denoising queries.

    Raises:
        ValueError: `num_items` is a number or lacks a key; and as `match`.
    """
    if num_items is None:
        num_items = _count(targets.counts, config)
    if not isinstance(num_items, dict) or not {"boxes", "class_weights"} <= num_items.keys():
        raise ValueError(
            'num_items_in_batch must be {"boxes": ..., "class_weights": ...}, as matching.count_items counts them, '
            f"not {num_items}"
        )
    coefficients = {
        "loss_ce": config.class_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    assignment, *proposal_assignment = match(predictions, targets, config, proposal_mask)
    (logits, boxes), *proposals = predictions
    terms = set_loss(logits, boxes, assignment, targets, config, num_items)
    terms["cardinality_error"] = cardinality_error(logits, targets)
    parts = [([*(f"_{layer}" for layer in range(len(logits) - 1)), ""], terms)]  # (suffix of each layer, its terms)
    for (logits, boxes), assignment in zip(proposals, proposal_assignment, strict=True):  # one pair or none
        terms = set_loss(logits, boxes, assignment, targets, config, num_items, query_mask=proposal_mask)
        parts.append((["_encoder"], terms))
    if denoising is not None:  # summed over the layers, and with the mean over the groups
        logits, boxes, assignment = denoising
        num_groups = assignment.shape[1] // targets.classes.shape[1]
        assignment = assignment.expand(len(logits), -1, -1)
        divisors = dict.fromkeys(("boxes", "class_weights"), num_items["boxes"] * num_groups)
        terms = set_loss(logits, boxes, assignment, targets, config, divisors, no_object=False)
        parts.append((["_denoising"], {name: term.sum(0, keepdim=True) for name, term in terms.items()}))
    loss = sum(coefficients[name] * terms[name].sum() for _, terms in parts for name in coefficients)
    loss_dict = {
        name + suffix: value
        for suffixes, terms in parts
        for name, term in terms.items()
        for suffix, value in zip(suffixes, term.detach(), strict=True)
    }
    return loss, loss_dict


def set_loss(logits, boxes, assignment, targets: Targets, config, num_items, no_object: bool = True, query_mask=None):
    """Returns the three terms of each layer, {"loss_ce", "loss_bbox", "loss_giou"}, (L,) in float32.

    Args:
        logits, boxes, assignment: (L, B, Q, C + 1), (L, B, Q, 4), (L, B, Q), as for `match`.
        num_items: the divisors: "class_weights" of the cross-entropy, "boxes" of all other terms. 0 counts as 1.
        no_object: whether queries without a box learn to predict "no object"; otherwise their classes are not scored.
        query_mask: (B, Q) bool, false for queries whose classes are never scored. None: there are none.
    """
    logits, boxes = logits.float(), boxes.float()
    is_matched, box = assignment >= 0, assignment.clamp(min=0)
    true_classes = targets.classes[None].take_along_dim(box, dim=2)  # (L, B, Q)
    true_boxes = targets.boxes[None].take_along_dim(box[..., None], dim=2)  # (L, B, Q, 4)
    giou, iou = generalized_iou(corners(boxes), corners(true_boxes))
    if config.classification_loss == "cross_entropy":
        weight = torch.where(is_matched, 1.0, config.no_object_weight if no_object else 0.0)
        true_classes = true_classes.where(is_matched, logits.shape[-1] - 1)
        class_loss = F.cross_entropy(logits.flatten(0, 2), true_classes.flatten(), reduction="none")
        class_loss = class_loss.view_as(weight) * weight
        class_divisor = "class_weights"
    else:
        quality = iou.detach() if config.classification_loss == "varifocal" else None
        class_loss = binary_class_loss(logits[..., :-1], true_classes.where(is_matched, -1), quality)
        class_loss = class_loss if no_object else class_loss * is_matched
        class_divisor = "boxes"
    if query_mask is not None:
        class_loss = class_loss.where(query_mask, 0)
    sums = {
        "loss_ce": (class_loss, class_divisor),
        "loss_bbox": ((boxes - true_boxes).abs().sum(-1).where(is_matched, 0), "boxes"),
        "loss_giou": ((1 - giou).where(is_matched, 0), "boxes"),
    }
    divisors = {  # plain numbers stay on the host, because sending one to the device waits for it
        name: as_divisor(number, boxes.device) if isinstance(number, Tensor) else number or 1
        for name, number in num_items.items()
    }
    return {name: losses.sum((1, 2)) / divisors[divisor] for name, (losses, divisor) in sums.items()}


def binary_class_loss(logits: Tensor, classes: Tensor, quality: Tensor | None = None) -> Tensor:
    """A binary cross-entropy for each class, summed over the classes, in which easy cases weigh little.

    Args:
        logits: (..., C).
        classes: (...), class ids, or -1 if no class is right.
        quality: (...), the IoU of predicted and true box, which the score of the right class learns to predict:
            varifocal loss (Zhang et al. 2021). None: that score learns to predict 1: focal loss (Lin et al. 2017).
    """
    is_right = classes[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    scores = logits.sigmoid()
    if quality is None:
        target = is_right.float()
        weight = (FOCAL_ALPHA * (1 - scores) ** FOCAL_GAMMA).where(is_right, (1 - FOCAL_ALPHA) * scores**FOCAL_GAMMA)
    else:
        target = quality[..., None] * is_right
        weight = target.where(is_right, VARIFOCAL_ALPHA * scores.detach() ** VARIFOCAL_GAMMA)
    return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum(-1)


@torch.no_grad()
def cardinality_error(logits: Tensor, targets: Targets) -> Tensor:
    """Returns |number of predicted objects - number of boxes|, averaged over the images, (L,)."""
    num_predicted = (logits[..., :-1].amax(-1) >= logits[..., -1]).sum(-1)
    return (num_predicted - targets.is_box.sum(-1)).abs().float().mean(-1)


# --------------------------------------------------------------------------------------------------------- denoising


def denoising_queries(targets: Targets, noise: Tensor, config) -> tuple[Tensor, Tensor]:
    """Adds noise to the true boxes, for decoder queries that learn to undo it (Li et al. 2022, section 4).

    The centre moves by at most `box_noise` / 2 of the box's width and height, and each side changes by at most the
    fraction `box_noise`. With probability `label_noise` the class is drawn at random from all classes.

    Args:
        noise: (B, G, M, 5), uniform from 0 to 1: two numbers for the centre, two for the sides, one for the class.

    Returns:
        The classes (B, G M) and the boxes (B, G M, 4), clipped to 0..1, one group after the other.
    """
    boxes = targets.boxes[:, None]  # (B, 1, M, 4)
    shift = (2 * noise[..., :4] - 1) * config.box_noise
    centres = boxes[..., :2] + shift[..., :2] * boxes[..., 2:] / 2
    sides = boxes[..., 2:] * (1 + shift[..., 2:])
    # A draw below `label_noise` replaces the class. Divided by `label_noise` it is uniform from 0 to 1 again, and
    # chooses the new class.
    draw = noise[..., 4] / max(config.label_noise, 1e-6)
    classes = targets.classes[:, None].where(draw >= 1, (draw * config.num_labels).long())
    classes = classes.clamp(0, config.num_labels - 1)  # `match` reports wrong labels
    return classes.flatten(1), torch.cat([centres, sides], dim=-1).clamp(0, 1).flatten(1, 2)


def denoising_assignment(targets: Targets, num_groups: int) -> Tensor:
    """Returns the index of the box that each denoising query is to predict, (B, G M), or -1 for padding."""
    box = torch.arange(targets.is_box.shape[1], device=targets.is_box.device)
    return box.where(targets.is_box, -1).repeat(1, num_groups)


def decoder_mask(num_denoising: int, group_size: int, num_queries: int, is_box: Tensor) -> Tensor:
    """Returns the decoder's mask over G M denoising queries and then Q other queries, (B, 1, T, T) bool.

    Denoising queries reveal the true boxes, so only queries of the same group may attend to them. All queries may
    attend to the Q others. No query may attend to the padding of `is_box` (B, M), so that an image does not depend on
    its batch.
    """
    group = torch.arange(num_denoising, device=is_box.device) // group_size
    group = F.pad(group, (0, num_queries), value=-1)  # (T,)
    is_query = F.pad(is_box.repeat(1, num_denoising // group_size), (0, num_queries), value=True)  # (B, T)
    return ((group[:, None] == group) | (group == -1)) & is_query[:, None, None]
