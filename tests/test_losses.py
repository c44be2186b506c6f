"""The losses, and cross-entropy that never holds all logits, against the same formulas written plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hf_models.base import TransformerConfig
from hf_models.losses import classification_loss, cross_entropy, head_loss, linear_cross_entropy


def plain_cross_entropy(hidden_states, weight, targets):
    return F.cross_entropy(hidden_states @ weight.T, targets)


def loss_and_gradients(loss_function, hidden_states, weight, targets, **kwargs):
    hidden_states, weight = hidden_states.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_function(hidden_states, weight, targets, **kwargs)
    (3 * loss).backward()  # a factor, so that the incoming gradient counts
    return loss.detach(), hidden_states.grad, weight.grad


@pytest.fixture
def problem():
    """Hidden states (M, D), head weights (V, D), and targets (M,) of which some are not scored."""

    def problem(num_tokens=40, vocab_size=50, hidden_size=8):
        targets = torch.randint(0, vocab_size, (num_tokens,))
        targets[::5] = -100
        return torch.randn(num_tokens, hidden_size), torch.randn(vocab_size, hidden_size), targets

    return problem


def test_linear_cross_entropy_is_cross_entropy_of_the_logits(problem):
    hidden_states, weight, targets = problem()
    actual = loss_and_gradients(linear_cross_entropy, hidden_states, weight, targets)
    expected = loss_and_gradients(plain_cross_entropy, hidden_states.double(), weight.double(), targets)
    assert_close(actual, expected, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_in_slices_is_the_same(problem):
    """1,101 tokens of a vocabulary of 16,384 are more than one slice, and the last slice is a short one."""
    hidden_states, weight, targets = problem(1101, 16384)
    actual = loss_and_gradients(linear_cross_entropy, hidden_states, weight, targets)
    expected = loss_and_gradients(plain_cross_entropy, hidden_states, weight, targets)
    assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_linear_cross_entropy_in_slices_of_bfloat16_is_nearly_the_same(problem):
    """Two slices of products in bfloat16, whose sum is in float32."""
    hidden_states, weight, targets = problem(1101, 16384)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_gradients(linear_cross_entropy, hidden_states, weight, targets)
    expected = loss_and_gradients(plain_cross_entropy, hidden_states, weight, targets)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("num_items", [7, 7.0, torch.tensor(7)], ids=repr)
def test_the_sum_of_losses_is_divided_by_num_items(problem, num_items):
    hidden_states, weight, targets = problem()
    loss = linear_cross_entropy(hidden_states, weight, targets, num_items)
    assert_close(loss, F.cross_entropy(hidden_states @ weight.T, targets, reduction="sum") / 7)


def test_a_number_of_items_of_zero_is_a_loss_of_zero(problem):
    hidden_states, weight, targets = problem()
    assert linear_cross_entropy(hidden_states, weight, torch.full_like(targets, -100), torch.tensor(0)) == 0
    assert cross_entropy(hidden_states @ weight.T, torch.full_like(targets, -100), num_items=0) == 0


def test_a_bias_is_part_of_the_head(problem):
    hidden_states, weight, targets = problem()
    biases = [torch.linspace(-1, 1, 50).requires_grad_() for _ in range(2)]
    loss = linear_cross_entropy(hidden_states, weight, targets, bias=biases[0])
    expected = F.cross_entropy(hidden_states @ weight.T + biases[1], targets)
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_close(biases[0].grad, biases[1].grad, rtol=1e-5, atol=1e-6)


def test_small_gradients_survive_float16(problem):
    """A loss scale reaches the backward pass only, so nothing may be divided before it."""
    hidden_states, weight, targets = problem()
    num_items = 2**19
    _, *expected = loss_and_gradients(plain_cross_entropy, hidden_states, weight, targets)
    hidden_states.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden_states, weight, targets, num_items)
    (3 * loss).backward()
    share = (targets != -100).sum() / num_items
    for actual, whole in zip((hidden_states.grad, weight.grad), expected, strict=True):
        assert (actual - whole * share).norm() < 0.01 * (whole * share).norm()


def test_without_gradients_none_are_computed(problem, monkeypatch):
    """Several slices: from the second on, `addmm_` adds to the weight's gradient."""
    hidden_states, weight, targets = problem(1101, 16384)
    weight.requires_grad_()
    calls = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda total, *_: calls.append(1) or total)
    linear_cross_entropy(hidden_states, weight, targets)
    assert len(calls) == 3  # so four slices
    with torch.no_grad():
        linear_cross_entropy(hidden_states, weight, targets)
    assert len(calls) == 3


def test_a_second_derivative_is_refused(problem):
    hidden_states, weight, targets = problem()
    loss = linear_cross_entropy(hidden_states.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, hidden_states, create_graph=True)


def test_another_ignore_index_is_honoured(problem):
    hidden_states, weight, targets = problem()
    actual = linear_cross_entropy(hidden_states, weight, targets.where(targets >= 0, 3), ignore_index=3)
    assert_close(actual, F.cross_entropy(hidden_states @ weight.T, targets.where(targets >= 0, 3), ignore_index=3))


def test_nothing_scored_is_a_loss_of_zero_and_gradients_of_zero(problem):
    hidden_states, weight, targets = problem()
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden_states, weight, torch.full_like(targets, -100))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)  # and so not NaN


# ----------------------------------------------------------------------------------------------- label smoothing

ONE_SLICE, FOUR_SLICES = (40, 50), (1101, 16384)


def smoothed(hidden_states, weight, targets, bias=None, ignore_index=-100):
    options = {"label_smoothing": 0.1, "ignore_index": ignore_index}
    return F.cross_entropy(F.linear(hidden_states, weight, bias), targets, **options)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("sizes", [ONE_SLICE, FOUR_SLICES], ids=["one slice", "four slices"])
def test_label_smoothing_is_that_of_cross_entropy(problem, sizes, with_bias, ignore_index):
    *given, targets = problem(*sizes)
    targets = targets.where(targets >= 0, ignore_index)
    given += [torch.linspace(-1, 1, sizes[1])] if with_bias else []
    ours, theirs = ([one.to(dtype).requires_grad_() for one in given] for dtype in (torch.float32, torch.float64))
    loss = linear_cross_entropy(
        *ours[:2], targets, bias=ours[2] if with_bias else None, ignore_index=ignore_index, label_smoothing=0.1
    )
    expected = smoothed(*theirs[:2], targets, *theirs[2:], ignore_index=ignore_index)
    assert_close(loss, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert (expected - F.cross_entropy(F.linear(*theirs), targets, ignore_index=ignore_index)).abs() > 1e-3
    actual, expected = (torch.autograd.grad(one, inputs) for one, inputs in ((loss, ours), (expected, theirs)))
    assert_close(actual, expected, check_dtype=False, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [ONE_SLICE, FOUR_SLICES], ids=["one slice", "two slices"])
def test_label_smoothing_in_bfloat16_is_nearly_that_of_cross_entropy(problem, sizes):
    hidden_states, weight, targets = problem(*sizes)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_gradients(linear_cross_entropy, hidden_states, weight, targets, label_smoothing=0.1)
    expected = loss_and_gradients(smoothed, hidden_states, weight, targets)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("way", ["plain head", "hooked head", "given logits"])
@pytest.mark.parametrize("sizes", [ONE_SLICE, FOUR_SLICES], ids=["one slice", "four slices"])
def test_the_loss_of_a_head_smooths_labels_whichever_way_it_is_computed(problem, sizes, way):
    """Where a hook may change the head's output, the head is called."""
    hidden_states, weight, targets = problem(*sizes)
    head = torch.nn.Linear(*reversed(weight.shape))
    torch.nn.init.normal_(head.weight), torch.nn.init.normal_(head.bias)
    calls, hidden_states = [], hidden_states.requires_grad_()
    if way == "hooked head":
        head.register_forward_hook(lambda _, __, logits: calls.append(1) or logits + 1)
    given = {"logits": head(hidden_states)} if way == "given logits" else {}
    inputs = [hidden_states, *head.parameters()]
    rows = (hidden_states[None], targets[None])
    loss = head_loss(head, *rows, num_items=900, label_smoothing=0.1, **given)
    logits = F.linear(hidden_states.double(), head.weight.double(), head.bias.double())
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum") / 900  # adding 1 changes nothing
    assert_close(loss, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    actual, expected = (torch.autograd.grad(one, inputs) for one in (loss, expected))
    assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert len(calls) == (way == "hooked head")


@pytest.mark.parametrize("frozen", ["hidden_states", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_its_own(problem, frozen):
    hidden_states, weight, targets = problem()
    _, *expected = loss_and_gradients(plain_cross_entropy, hidden_states, weight, targets)
    hidden_states.requires_grad_(frozen != "hidden_states")
    weight.requires_grad_(frozen != "weight")
    (3 * linear_cross_entropy(hidden_states, weight, targets)).backward()
    if frozen == "weight":
        assert weight.grad is None
        assert_close(hidden_states.grad, expected[0], rtol=1e-5, atol=1e-6)
    else:
        assert hidden_states.grad is None
        assert_close(weight.grad, expected[1], rtol=1e-5, atol=1e-6)


def test_under_autocast_the_products_are_bfloat16_and_the_loss_float32(problem):
    hidden_states, weight, targets = problem()
    expected = loss_and_gradients(plain_cross_entropy, hidden_states, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_gradients(linear_cross_entropy, hidden_states, weight, targets)
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    assert_close(actual, expected, rtol=0.03, atol=0.01)
    assert not torch.equal(actual[0], expected[0])


def test_bfloat16_weights_get_bfloat16_gradients(problem):
    hidden_states, weight, targets = problem()
    expected = loss_and_gradients(plain_cross_entropy, hidden_states, weight, targets)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden_states.bfloat16(), weight.bfloat16(), targets)
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    assert_close((loss, *gradients), expected, check_dtype=False, rtol=0.03, atol=0.01)


def test_a_second_backward_pass_is_refused(problem):
    """The gradients were made in the forward pass and are scaled in place: they can be handed out once."""
    hidden_states, weight, targets = problem()
    loss = linear_cross_entropy(hidden_states.requires_grad_(), weight.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------- classifiers of whole samples


def config_of(problem_type=None, num_labels=3, **fields):
    return TransformerConfig(problem_type=problem_type, num_labels=num_labels, **fields)


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 4.0]], ids=str)
@pytest.mark.parametrize("num_items", [None, 20])
def test_labels_may_be_probabilities_of_the_classes(class_weights, num_items):
    """-sum over the classes of p log q, each term with the weight of its class."""
    config = config_of("single_label_classification", class_weights=class_weights)
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3).softmax(-1).double()
    weights = torch.tensor(class_weights or [1.0, 1.0, 1.0], dtype=torch.float64)
    terms = labels * weights * -torch.log(logits.exp() / logits.exp().sum(-1, keepdim=True))
    expected = terms.sum() / (num_items or (labels * weights).sum())
    assert_close(classification_loss(logits, labels, config, num_items).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 4.0]], ids=str)
def test_certain_probabilities_are_class_ids(class_weights):
    config = config_of("single_label_classification", class_weights=class_weights)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    certain = F.one_hot(labels, 3).float()
    assert_close(classification_loss(logits, certain, config), classification_loss(logits, labels, config))


@pytest.mark.parametrize(
    ("num_labels", "labels", "expected"),
    [
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (3, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), "multi_label_classification"),
        (1, torch.tensor([0.5, -1.0]), "regression"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_kind_of_problem_is_read_off_the_labels(num_labels, labels, expected):
    config = config_of(num_labels=num_labels)
    loss = classification_loss(torch.randn(2, num_labels), labels, config)
    assert config.problem_type == expected and loss.isfinite()
