"""Matching and set loss against transformers' own and against trying every assignment."""

from itertools import cycle, permutations
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.image_transforms import center_to_corners_format
from transformers.loss import loss_deformable_detr, loss_for_object_detection, loss_rt_detr

from hf_models.matching import (
    check_labels,
    corners,
    count_items,
    decoder_mask,
    denoising_assignment,
    denoising_queries,
    detection_loss,
    generalized_iou,
    match,
    matching_cost,
    pad_labels,
    set_loss,
)

NUM_CLASSES = 5
LABEL_NAMES = ("class_labels", "boxes")
KINDS = ["cross_entropy", "focal", "varifocal"]
COUNTS = {
    "boxes and none": [3, 0, 7, 1],
    "as many as queries": [9, 9],
    "more boxes than queries": [12, 2, 30],
    "one image": [4],
}


def make_config(kind="cross_entropy", **fields):
    defaults = {
        "num_labels": NUM_CLASSES,
        "num_queries": 9,
        "classification_loss": kind,
        "no_object_weight": 0.1,
        "class_cost": 1,
        "bbox_cost": 5,
        "giou_cost": 2,
        "class_loss_coefficient": 1,
        "bbox_loss_coefficient": 5,
        "giou_loss_coefficient": 2,
        "num_denoising_groups": 3,
        "box_noise": 0.4,
        "label_noise": 0.2,
    }
    return SimpleNamespace(**{**defaults, **fields})


def make_labels(counts):
    return [
        {"class_labels": torch.randint(NUM_CLASSES, (count,)), "boxes": torch.rand(count, 4), "image_id": 100 + image}
        for image, count in enumerate(counts)
    ]


def make_predictions(num_images, num_layers=3, num_queries=9):
    """Logits (L, B, Q, C + 1), the last 0 as models with a yes or no for each class have it, and boxes (L, B, Q, 4)."""
    logits = 2 * torch.randn(num_layers, num_images, num_queries, NUM_CLASSES + 1)
    logits[..., -1] = 0
    return logits.requires_grad_(), torch.rand(num_layers, num_images, num_queries, 4).requires_grad_()


def loss_of(predictions, labels, config, **kwargs):
    check_labels(labels, NUM_CLASSES)
    return detection_loss([predictions], pad_labels(labels), config, **kwargs)


def stock_loss(logits, boxes, labels, config):
    """transformers' loss of the last layer and of auxiliary ones, and its terms."""
    stock_config = SimpleNamespace(
        **vars(config), eos_coefficient=config.no_object_weight, auxiliary_loss=True, decoder_layers=len(logits)
    )
    return loss_for_object_detection.ForObjectDetectionLoss(
        logits[-1], labels, logits.device, boxes[-1], stock_config, logits, boxes
    )[:2]


# ------------------------------------------------------------------------------------------------------------- boxes


def test_generalized_iou_of_boxes_drawn_by_hand():
    square = torch.tensor([0.0, 0, 2, 2])
    others = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [0, 0, 1, 1], [2, 0, 4, 2], [4, 0, 6, 2]])
    giou, iou = generalized_iou(square, others)
    assert_close(iou, torch.tensor([1, 2 / 6, 1 / 4, 0, 0]))
    assert_close(giou, torch.tensor([1, 2 / 6, 1 / 4, 0, -4 / 12]))


def test_generalized_iou_is_that_of_transformers():
    a, b = corners(torch.rand(50, 4)), corners(torch.rand(40, 4))
    giou, iou = generalized_iou(a[:, None], b)
    assert_close(giou, loss_for_object_detection.generalized_box_iou(a, b))
    assert_close(iou, loss_for_object_detection.box_iou(a, b)[0])


def test_corners_are_those_of_transformers():
    boxes = torch.rand(7, 4)
    assert_close(corners(boxes), center_to_corners_format(boxes))


@pytest.mark.parametrize(
    "other", [[0.5, 0.5, 0, 0], [0.2, 0.5, 0, 0], [0.5, 0.5, 0.3, 0], [0.5, 0.5, 0.3, 0.3]], ids=str
)
def test_boxes_without_area_have_a_finite_loss_and_gradient(other):
    box = torch.tensor([0.5, 0.5, 0, 0], requires_grad=True)
    giou, iou = generalized_iou(corners(box), corners(torch.tensor(other)))
    assert iou == 0 and -1 <= giou <= 0
    (giou + iou).backward()
    assert box.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_loss_terms_and_gradients_are_those_of_transformers(counts, num_layers):
    config, labels = make_config(), make_labels(counts)
    predictions = make_predictions(len(counts), num_layers)
    loss, terms = loss_of(predictions, labels, config)
    expected, expected_terms = stock_loss(*predictions, labels, config)
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert terms.keys() == expected_terms.keys()
    for name, term in terms.items():
        assert_close(term, expected_terms[name].detach(), rtol=1e-5, atol=1e-5)
    gradients, expected_gradients = (torch.autograd.grad(one, predictions) for one in (loss, expected))
    assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "special",
    [
        [[0.5, 0.5, 0.2, 0.3], [0.5, 0.5, 0.2, 0.3]],  # twice the same
        [[0.5, 0.5, 0.0, 0.3], [0.1, 0.1, 0.0, 0.0]],  # without area
        [[1.2, 0.5, 0.2, 0.3], [0.0, 0.0, 3.0, 3.0], [-2.0, 0.5, 0.1, 0.1]],  # out of the image
    ],
    ids=["duplicates", "zero area", "out of the image"],
)
def test_unusual_boxes_count_like_any_other(special):
    labels = make_labels([len(special), 2])
    labels[0].update(boxes=torch.tensor(special), class_labels=torch.ones(len(special), dtype=torch.long))
    predictions = make_predictions(2)
    assignment = match([predictions], pad_labels(labels), make_config())[0]
    assert ((assignment[:, 0] >= 0).sum(-1) == len(special)).all()
    assert_close(
        loss_of(predictions, labels, make_config())[0],
        stock_loss(*predictions, labels, make_config())[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_focal_loss_and_its_matching_are_those_of_deformable_detr():
    config, labels, (logits, boxes) = make_config("focal"), make_labels([3, 0, 7]), make_predictions(3)
    _, terms = loss_of((logits, boxes), labels, config)
    matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(1, 5, 2)
    stock = loss_deformable_detr.DeformableDetrImageLoss(matcher, NUM_CLASSES, 0.25, ["labels", "boxes", "cardinality"])
    expected = stock({"logits": logits[-1, ..., :-1], "pred_boxes": boxes[-1]}, labels)
    for name, value in expected.items():
        assert_close(terms[name], value.detach(), rtol=1e-5, atol=1e-5)


def test_varifocal_loss_is_that_of_rt_detr():
    labels, (logits, boxes) = make_labels([3, 0, 7]), make_predictions(3)
    config = make_config("varifocal")
    _, terms = loss_of((logits, boxes), labels, config)
    (assignment,) = match([(logits, boxes)], pad_labels(labels), config)
    matched = [torch.where(row >= 0)[0] for row in assignment[-1]]
    indices = [(queries, assignment[-1, image, queries]) for image, queries in enumerate(matched)]
    stock = loss_rt_detr.RTDetrLoss.__new__(loss_rt_detr.RTDetrLoss)
    torch.nn.Module.__init__(stock)
    stock.num_classes, stock.alpha, stock.gamma = NUM_CLASSES, 0.75, 2.0
    outputs = {"logits": logits[-1, ..., :-1], "pred_boxes": boxes[-1]}
    expected = stock.loss_labels_vfl(outputs, labels, indices, num_boxes=10)["loss_vfl"]
    assert_close(terms["loss_ce"], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_boxes_have_a_loss_of_classes_only(kind):
    logits, boxes = make_predictions(2)
    loss, terms = loss_of((logits, boxes), make_labels([0, 0]), make_config(kind))
    loss.backward()
    assert terms["loss_bbox"] == terms["loss_giou"] == 0 < terms["loss_ce"]
    assert logits.grad.isfinite().all() and (boxes.grad == 0).all()


@pytest.mark.parametrize("empty", [torch.zeros(0, 4), torch.zeros(0)], ids=["(0, 4)", "(0,)"])
def test_no_boxes_may_be_an_empty_list(empty):
    labels = [{"class_labels": torch.zeros(0), "boxes": empty}, make_labels([2])[0]]
    loss, _ = loss_of(make_predictions(2), labels, make_config())
    assert loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_divided_by_the_whole_batch_s_items_add_up_to_its_loss(kind):
    config, labels, (logits, boxes) = make_config(kind), make_labels([3, 0, 12, 1]), make_predictions(4)
    noised, targets = make_predictions(4, num_queries=3 * 12), pad_labels(labels)
    denoising = (*noised, denoising_assignment(targets, 3))
    whole, _ = detection_loss([(logits, boxes)], targets, config, denoising=denoising)
    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]
    counts = [count_items(labels[part], config) for part in parts]
    num_items = {name: torch.tensor(float(sum(count[name] for count in counts))) for name in counts[0]}
    total = 0
    for part in parts:
        targets = pad_labels(labels[part])
        most = targets.classes.shape[1]
        # The same queries without the padding that only the whole batch has.
        groups = [tensor[:, part].unflatten(2, (3, 12))[:, :, :, :most].flatten(2, 3) for tensor in noised]
        denoising = (*groups, denoising_assignment(targets, 3))
        predictions = [(logits[:, part], boxes[:, part])]
        total += detection_loss(predictions, targets, config, num_items, denoising)[0]
    assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_items_are_boxes_and_the_weights_of_their_classes():
    assert count_items(make_labels([2, 0, 12]), make_config()) == {
        "boxes": 14,
        "class_weights": pytest.approx(2 + 0.1 * 7 + 0.1 * 9 + 9),
    }


@pytest.mark.parametrize("kind", KINDS[1:])
def test_proposals_of_the_encoder_are_matched_on_their_own(kind):
    config, labels = make_config(kind), make_labels([3, 1])
    decoder, encoder = make_predictions(2), make_predictions(2, num_layers=1, num_queries=40)
    loss, terms = detection_loss([decoder, encoder], pad_labels(labels), config)
    decoder_loss, _ = loss_of(decoder, labels, config)
    encoder_loss, encoder_terms = loss_of(encoder, labels, config)
    assert_close(loss, decoder_loss + encoder_loss)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert_close(terms[f"{name}_encoder"], encoder_terms[name])


@pytest.mark.parametrize("num_items", [7, torch.tensor(7.0), {"boxes": 7}], ids=str)
def test_one_number_is_no_divisor_of_two_kinds_of_terms(num_items):
    with pytest.raises(ValueError, match=r'num_items_in_batch must be {"boxes": .*count_items .*not .*7'):
        loss_of(make_predictions(2), make_labels([3, 4]), make_config(), num_items=num_items)


@pytest.mark.parametrize("counts", [[3, 1], [30, 50]], ids=["few boxes", "more boxes than proposals"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_proposals_of_padding_are_neither_matched_nor_taught(kind, counts):
    config, labels = make_config(kind), make_labels(counts)
    decoder, (logits, boxes) = make_predictions(2), make_predictions(2, num_layers=1, num_queries=40)
    with torch.no_grad():
        boxes[0, 0, 25] = labels[0]["boxes"][0]  # the best proposal is of padding
    mask = torch.arange(40) < torch.tensor([[25], [40]])
    (_, assignment) = match([decoder, (logits, boxes)], targets := pad_labels(labels), config, mask)
    assert (assignment[0, 0, 25:] == -1).all() and (assignment[0] >= 0).sum(1).tolist() == [
        min(counts[0], 25),
        min(counts[1], 40),
    ]
    loss, terms = detection_loss([decoder, (logits, boxes)], targets, config, proposal_mask=mask)
    loss.backward()
    for gradient in (logits.grad, boxes.grad):
        assert (gradient[0, 0, 25:] == 0).all() and (gradient[0, 1] != 0).any()
    num_items = count_items(labels, config)
    alone = [
        loss_of((logits[:, i : i + 1, :end], boxes[:, i : i + 1, :end]), labels[i : i + 1], config, num_items=num_items)
        for i, end in enumerate((25, 40))
    ]
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert_close(terms[f"{name}_encoder"], sum(part[name] for _, part in alone))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_predictions_have_a_float32_loss(kind):
    logits, boxes = (tensor.detach().bfloat16() for tensor in make_predictions(2))
    labels, config = make_labels([3, 1]), make_config(kind)
    loss, _ = loss_of((logits, boxes), labels, config)
    assert loss.dtype == torch.float32
    assert loss == loss_of((logits.float(), boxes.float()), labels, config)[0]


# ---------------------------------------------------------------------------------------------------------- matching


def plain_cost(logits, boxes, classes, true_boxes, config):
    """Costs (N, Q, n) of N images with n boxes each, in float64, written plainly."""
    logits, boxes, true_boxes = logits.double(), boxes.double(), true_boxes.double()
    p = logits.sigmoid()
    class_cost = {
        "cross_entropy": -logits.softmax(-1),
        "focal": 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log(),
    }[config.classification_loss]
    class_cost = torch.stack([cost[:, own] for cost, own in zip(class_cost, classes, strict=True)])
    overlap, _ = generalized_iou(corners(boxes)[:, :, None], corners(true_boxes)[:, None])
    return class_cost + 5 * (boxes[:, :, None] - true_boxes[:, None]).abs().sum(-1) - 2 * overlap


def lowest_cost(costs):
    """The lowest cost of any one-to-one assignment, by trying all, of matrices (N, Q, n)."""
    costs = costs.mT if costs.shape[1] < costs.shape[2] else costs
    num_rows, num_columns = costs.shape[1:]
    every = torch.tensor(list(permutations(range(num_rows), num_columns)), dtype=torch.long)
    return costs[:, every, torch.arange(num_columns)].sum(-1).amin(-1)


@pytest.mark.parametrize("num_queries", range(1, 7))
@pytest.mark.parametrize("kind", KINDS[:2])
def test_no_assignment_is_cheaper(kind, num_queries):
    """Of 10,080 images in all, with none to six boxes: some the same, without area or out of the image."""
    num_images = 120  # of each number of boxes
    config, labels = make_config(kind), make_labels([count for count in range(7) for _ in range(num_images)])
    for label, special in zip(labels, cycle(["none", "no area", "the same", "outside"]), strict=False):
        if special == "no area":
            label["boxes"][:, 2:] = 0
        elif special == "the same":
            label["boxes"][1:], label["class_labels"][1:] = label["boxes"][:1], label["class_labels"][:1]
        elif special == "outside":
            label["boxes"] = 4 * label["boxes"] - torch.tensor([2, 2, 0, 0])
    logits, boxes = (tensor.detach() for tensor in make_predictions(len(labels), 1, num_queries))
    (assignment,) = match([(logits, boxes)], pad_labels(labels), config)
    for count in range(7):
        images = slice(count * num_images, (count + 1) * num_images)
        classes, true_boxes = (torch.stack([label[name] for label in labels[images]]) for name in LABEL_NAMES)
        costs = plain_cost(logits[0, images], boxes[0, images], classes, true_boxes, config)
        pairs = assignment[0, images, :, None] == torch.arange(count)  # (N, Q, n)
        assert (pairs.sum((1, 2)) == min(count, num_queries)).all()
        assert (pairs.sum(1) <= 1).all()  # no box is given to two queries
        assert ((assignment[0, images] >= 0) == pairs.any(-1)).all()
        assert_close((costs * pairs).sum((1, 2)), lowest_cost(costs), rtol=1e-5, atol=1e-5)


def test_layers_and_images_are_matched_on_their_own():
    labels, (logits, boxes) = make_labels([3, 0, 7]), make_predictions(3)
    (together,) = match([(logits, boxes)], pad_labels(labels), make_config())
    for layer in range(3):
        for image in range(3):
            alone = (logits[layer : layer + 1, image : image + 1], boxes[layer : layer + 1, image : image + 1])
            (assignment,) = match([alone], pad_labels(labels[image : image + 1]), make_config())
            assert assignment[0, 0].tolist() == together[layer, image].tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["logits", "boxes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_that_is_not_finite_is_named(kind, which, value):
    """Also of an image without boxes, which is the second."""
    predictions = [tensor.detach() for tensor in make_predictions(3)]
    predictions[which][1, 1, 4, 2] = value
    with pytest.raises(ValueError, match=r"prediction of decoder layer 1 for .* labels\[1\] \(image_id 101\)"):
        loss_of(predictions, make_labels([3, 0, 7]), make_config(kind))


def test_an_encoder_proposal_that_is_not_finite_is_named():
    encoder = [tensor.detach() for tensor in make_predictions(2, num_layers=1, num_queries=40)]
    encoder[1][0, 1, 39] = float("nan")
    with pytest.raises(ValueError, match=r"encoder's proposals for .* labels\[1\]"):
        match([make_predictions(2), encoder], pad_labels(make_labels([3, 1])), make_config("focal"))


WRONG_LABELS = {
    "NaN": ({"boxes": torch.tensor([[0.5, float("nan"), 0.1, 0.1]] * 2)}, "boxes must be finite"),
    "infinite": ({"boxes": torch.tensor([[0.5, 0.5, float("inf"), 0.1]] * 2)}, "boxes must be finite"),
    "negative side": ({"boxes": torch.tensor([[0.5, 0.5, -0.1, 0.1]] * 2)}, "sides of at least 0"),
    "class too high": ({"class_labels": torch.tensor([0, NUM_CLASSES])}, "from 0 to num_labels - 1"),
    "class too low": ({"class_labels": torch.tensor([0, -1])}, "from 0 to num_labels - 1"),
}
MISSHAPED_LABELS = {
    "three numbers": ({"boxes": torch.rand(2, 3)}, r"boxes \(n, 4\)"),
    "more boxes than classes": ({"boxes": torch.rand(3, 4)}, r"boxes \(n, 4\)"),
    "one-hot classes": ({"class_labels": torch.ones(2, 5)}, r"must be \(n,\) whole numbers"),
    "fractions of classes": ({"class_labels": torch.rand(2)}, r"must be \(n,\) whole numbers"),
}


@pytest.mark.parametrize("image_id", [7, torch.tensor([7]), None], ids=repr)
@pytest.mark.parametrize("wrong, message", WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_a_label_that_is_no_box_or_class_is_named(wrong, message, image_id):
    """On the CPU before the model runs; on a device, where to look is to wait, together with the costs."""
    labels = make_labels([1, 2])
    labels[1].update(wrong, image_id=image_id)
    name = r"labels\[1\]" + ("" if image_id is None else r" \(image_id 7\)")
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        check_labels(labels, NUM_CLASSES)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        match([make_predictions(2)], pad_labels(labels), make_config())


@pytest.mark.parametrize("wrong, message", MISSHAPED_LABELS.values(), ids=MISSHAPED_LABELS)
def test_a_label_of_another_shape_is_named(wrong, message):
    labels = make_labels([1, 2])
    labels[1].update(wrong)
    with pytest.raises(ValueError, match=rf"labels\[1\] \(image_id 101\): .*{message}"):
        check_labels(labels, NUM_CLASSES)


def test_a_label_without_boxes_is_named():
    with pytest.raises(ValueError, match=r"labels\[0\].* has no 'boxes'"):
        check_labels([{"class_labels": torch.tensor([1]), "bbox": torch.rand(1, 4)}], NUM_CLASSES)


def test_labels_of_another_number_of_images_are_refused():
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        loss_of(make_predictions(3), make_labels([1, 2]), make_config())


class NoWaiting(TorchDispatchMode):
    """Refuses every operation that would wait for a device to know a value or a shape."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.")
        assert not any(name in str(function) for name in waits), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_is_waited_for_once(kind, monkeypatch):
    transfers, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: transfers.append(tensor) or cpu(tensor))
    config, labels = make_config(kind), make_labels([3, 0, 7])
    encoder = [] if kind == "cross_entropy" else [make_predictions(3, 1, 40)]
    with NoWaiting():
        targets = pad_labels(labels)
        queries = denoising_queries(targets, torch.rand(3, 3, 7, 5), config)
        denoising = (*make_predictions(3, num_queries=queries[0].shape[1]), denoising_assignment(targets, 3))
        mask = torch.arange(40).expand(3, -1) < 30 if encoder else None
        predictions = [make_predictions(3), *encoder]
        loss, _ = detection_loss(predictions, targets, config, denoising=denoising, proposal_mask=mask)
        loss.backward()
    assert len(transfers) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_only_the_transfer_synchronises(kind, monkeypatch):
    config, labels = make_config(kind), make_labels([3, 0, 7])
    expected = loss_of(predictions := make_predictions(3), labels, config)[0]
    predictions = [tensor.detach().cuda() for tensor in predictions]
    labels = [
        {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in label.items()}
        for label in labels
    ]

    def transfer(tensor):
        torch.cuda.set_sync_debug_mode("default")
        tensor = tensor.to("cpu")
        torch.cuda.set_sync_debug_mode("error")
        return tensor

    monkeypatch.setattr(torch.Tensor, "cpu", transfer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = loss_of(predictions, labels, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(loss.to("cpu"), expected.detach(), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- denoising


def test_without_noise_denoising_queries_are_the_boxes():
    targets = pad_labels(make_labels([3, 1]))
    config = make_config(box_noise=0.0, label_noise=0.0)
    classes, boxes = denoising_queries(targets, torch.rand(2, 3, 3, 5), config)
    assert_close(boxes, targets.boxes.repeat(1, 3, 1))
    assert classes.tolist() == targets.classes.repeat(1, 3).tolist()


def test_noise_keeps_a_centre_in_its_box_and_a_side_near_its_length():
    label = {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}
    classes, boxes = denoising_queries(pad_labels([label]), torch.rand(1, 5000, 1, 5), make_config())
    extent = torch.tensor([0.2, 0.4])
    shift, growth = boxes[0, :, :2] - 0.5, boxes[0, :, 2:] / extent
    assert (shift.abs() <= 0.2 * extent + 1e-6).all() and shift.abs().amax() > 0.19 * 0.4
    assert (growth >= 0.6 - 1e-6).all() and (growth <= 1.4 + 1e-6).all() and growth.amax() > 1.39
    parts = classes[0].bincount(minlength=NUM_CLASSES) / 5000
    expected = torch.tensor([0.04, 0.04, 0.84, 0.04, 0.04])  # of a fifth, each class has a fifth
    assert_close(parts, expected, rtol=0, atol=0.02)


def test_denoising_boxes_are_clipped_to_the_image():
    label = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.98, 0.02, 0.9, 0.9]])}
    _, boxes = denoising_queries(pad_labels([label]), torch.rand(1, 200, 1, 5), make_config())
    assert boxes.amin() == 0 and boxes.amax() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_denoising_queries_counts_nothing(kind):
    config, targets = make_config(kind), pad_labels(make_labels([3, 1, 0]))
    logits, boxes = make_predictions(3, num_queries=6)
    assignment = denoising_assignment(targets, 2)
    assert assignment.tolist() == [[0, 1, 2] * 2, [0, -1, -1] * 2, [-1] * 6]
    num_items = {"boxes": 8, "class_weights": 8}
    terms = set_loss(logits, boxes, assignment.expand(3, -1, -1), targets, config, num_items, no_object=False)
    sum(term.sum() for term in terms.values()).backward()
    for gradient in (logits.grad, boxes.grad):
        is_used = (gradient != 0).any(-1)
        assert is_used.tolist() == (assignment >= 0).expand(3, -1, -1).tolist()


def test_denoising_terms_are_summed_over_layers_and_divided_by_all_noised_boxes():
    config, targets = make_config(), pad_labels(make_labels([3, 1]))
    noised, assignment = make_predictions(2, num_queries=9), denoising_assignment(targets, 3)
    loss, terms = detection_loss([make_predictions(2)], targets, config, denoising=(*noised, assignment))
    distances = (noised[1] - targets.boxes.repeat(1, 3, 1)).abs().sum(-1) * targets.is_box.repeat(1, 3)
    assert_close(terms["loss_bbox_denoising"], distances.sum().detach() / (3 * 4))
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    total = sum(weights[name] * value for key, value in terms.items() for name in weights if key.startswith(name))
    assert_close(loss.detach(), total)


def test_nobody_outside_its_group_sees_a_denoising_query_and_nobody_padding():
    is_box = torch.tensor([[True, True], [True, False]])
    allowed = decoder_mask(num_denoising=4, group_size=2, num_queries=3, is_box=is_box)
    group = [0, 0, 1, 1, None, None, None]
    own_group = torch.tensor([[seen is None or seen == own for seen in group] for own in group])
    assert allowed.shape == (2, 1, 7, 7)
    assert allowed[0, 0].equal(own_group)
    assert allowed[1, 0].equal(own_group & torch.tensor([True, False, True, False, True, True, True]))


# ------------------------------------------------------------------------------------------------------------- costs


def test_costs_are_those_of_an_image_s_own_boxes():
    labels, (logits, boxes) = make_labels([3, 7]), make_predictions(2)
    costs = matching_cost(logits, boxes, pad_labels(labels), make_config())
    assert costs.shape == (3, 2, 7, 9)  # layers, images, boxes, queries
    classes, true_boxes = (labels[0][name][None] for name in LABEL_NAMES)
    expected = plain_cost(logits[2, :1], boxes[2, :1], classes, true_boxes, make_config())
    assert_close(costs[2, 0, :3].mT.double(), expected[0], rtol=1e-5, atol=1e-5)
