import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_models.zoo import create_model
from training.run.optim import EMA, Muon, create_optimizers, learning_rate_factor, named_parameters, orthogonalise

OPTIONS = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}


class Model(nn.Module):
    """An embedding tied to the head around two blocks, and a frozen extra."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def held(optimizers) -> list[nn.Parameter]:
    return [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]


def train_step(model, optimizers):
    tokens = torch.arange(11)[None]
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten()).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_trainable_parameter_is_held_once_and_only_matrices_decay(model, name):
    optimizers = create_optimizers(model, optimizer=name, **OPTIONS)
    expected = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, held(optimizers))) == sorted(map(id, expected))
    for group in (group for one in optimizers for group in one.param_groups):
        assert group["initial_lr"] == group["lr"] == 0.01
        assert all((parameter.ndim >= 2) == (group["weight_decay"] == 0.1) for parameter in group["params"])


def test_groups_keep_the_order_of_the_model(model):
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    (optimizer,) = create_optimizers(model, optimizer="adamw", **OPTIONS)
    decay, no_decay = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert decay == ["embed_tokens.weight", "layers.0.0.weight", "layers.1.0.weight"]
    assert no_decay == [f"layers.{i}.{rest}" for i in (0, 1) for rest in ("0.bias", "1.weight", "1.bias")]


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(model):
    muon, adamw = create_optimizers(model, optimizer="muon", matrix_learning_rate=0.5, **OPTIONS)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [id(p) for p in held([muon])] == [id(layer[0].weight) for layer in model.layers]
    assert muon.param_groups[0]["initial_lr"] == 0.5
    assert all(group["initial_lr"] == 0.01 and group["fused"] for group in adamw.param_groups)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layer_decay_lowers_the_rate_from_each_layer_to_the_one_below(model, name):
    model.pooler = nn.Linear(8, 8)
    optimizers = create_optimizers(model, optimizer=name, layer_decay=0.5, matrix_learning_rate=0.02, **OPTIONS)
    rates = {
        id(parameter): group["initial_lr"]
        for one in optimizers
        for group in one.param_groups
        for parameter in group["params"]
        if group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0)
    }
    matrix_rate = 0.02 if name == "muon" else 0.01
    assert {name: rates[id(parameter)] for name, parameter in named_parameters(model).items()} == {
        "embed_tokens.weight": 0.01 / 8,  # tied to the head: where it comes first counts
        "layers.0.0.weight": matrix_rate / 4,
        **dict.fromkeys(["layers.0.0.bias", "layers.0.1.weight", "layers.0.1.bias"], 0.01 / 4),
        "layers.1.0.weight": matrix_rate / 2,
        **dict.fromkeys(["layers.1.0.bias", "layers.1.1.weight", "layers.1.1.bias"], 0.01 / 2),
        "pooler.weight": 0.01,
        "pooler.bias": 0.01,
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_module_may_have_a_rate_of_its_own(model, name):
    scales = {"layers": 0.5, "layers.1": 0.25}  # the later one wins
    optimizers = create_optimizers(model, optimizer=name, rate_scales=scales, matrix_learning_rate=0.02, **OPTIONS)
    rates = {id(p): group["initial_lr"] for one in optimizers for group in one.param_groups for p in group["params"]}
    matrix_rate = 0.02 if name == "muon" else 0.01
    assert {name: rates[id(parameter)] for name, parameter in named_parameters(model).items()} == {
        "embed_tokens.weight": 0.01,
        "layers.0.0.weight": matrix_rate / 2,
        **dict.fromkeys(["layers.0.0.bias", "layers.0.1.weight", "layers.0.1.bias"], 0.01 / 2),
        "layers.1.0.weight": matrix_rate / 4,
        **dict.fromkeys(["layers.1.0.bias", "layers.1.1.weight", "layers.1.1.bias"], 0.01 / 4),
    }
    with pytest.raises(ValueError, match="no parameter in 'layer', whose learning rate was to be another"):
        create_optimizers(model, optimizer=name, rate_scales={"layer": 0.1}, **OPTIONS)


def test_rates_of_layers_and_of_modules_multiply(model):
    options = {**OPTIONS, "layer_decay": 0.5, "rate_scales": {"layers.0": 0.1}}
    (optimizer,) = create_optimizers(model, optimizer="adamw", **options)
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([0.01 / 40, 0.01 / 8, 0.01 / 2])


def test_layer_decay_counts_frozen_layers_too(model):
    model.layers[1].requires_grad_(False)
    (optimizer,) = create_optimizers(model, optimizer="adamw", layer_decay=0.5, **OPTIONS)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01 / 8, 0.01 / 4}


def test_models_and_names_that_no_optimizer_fits_are_refused(model):
    with pytest.raises(ValueError, match="'adamw' or 'muon', not 'sgd'"):
        create_optimizers(model, optimizer="sgd", **OPTIONS)
    with pytest.raises(ValueError, match=r"no trainable matrix under `layers\.`"):
        create_optimizers(nn.Linear(2, 2), optimizer="muon", **OPTIONS)
    with pytest.raises(ValueError, match=r"layer_decay finds no parameter under `layers\.`"):
        create_optimizers(nn.Linear(2, 2), optimizer="adamw", layer_decay=0.9, **OPTIONS)
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_optimizers(nn.Linear(2, 2).requires_grad_(False), optimizer="adamw", **OPTIONS)


def test_names_carry_no_wrapper(model):
    expected = named_parameters(model).keys()
    model.layers[1] = torch.compile(checkpoint_wrapper(model.layers[1]))
    assert named_parameters(torch.compile(model)).keys() == expected


@pytest.mark.parametrize("shape", [(2, 24, 16), (1, 16, 24), (3, 12, 12)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_scale(shape):
    torch.manual_seed(0)
    U, S, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrices = U @ torch.diag_embed(S.clamp(min=0.3)) @ V
    options = Muon([nn.Parameter(torch.zeros(1, 1))], lr=1, weight_decay=0).defaults
    result = orthogonalise(matrices, options["ns_coefficients"], options["ns_steps"], options["eps"]).double()
    diagonal = U.mT @ result @ V.mT
    values = torch.diagonal(diagonal, dim1=-2, dim2=-1)
    assert (diagonal - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("rank", [1, 24])
def test_long_matrices_are_orthogonalised_as_step_by_step(rank):
    torch.manual_seed(0)
    matrices = torch.randn(2, 24, rank) @ torch.randn(2, rank, 96) + 1e-4 * torch.randn(2, 24, 96)
    options = Muon([nn.Parameter(torch.zeros(1, 1))], lr=1, weight_decay=0).defaults
    a, b, c = options["ns_coefficients"]
    X = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(options["ns_steps"]):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    for given, expected in ((matrices, X), (matrices.mT, X.mT)):
        result = orthogonalise(given, options["ns_coefficients"], options["ns_steps"], options["eps"])
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)


def test_muon_is_torchs_muon_up_to_bfloat16():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(20, 12)), nn.Parameter(torch.randn(12, 20))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    start = [parameter.detach().clone() for parameter in ours]
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(5):
        gradients = [torch.randn_like(parameter) for parameter in ours]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for mine, other, initial in zip(ours, theirs, start, strict=True):
        assert (mine - other).norm() < 0.02 * (other - initial).norm()
    ours_state, theirs_state = (optimizer.state_dict()["state"] for optimizer in optimizers)
    torch.testing.assert_close(ours_state, theirs_state)


def test_muon_takes_the_filters_of_a_convolution_as_rows():
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    for parameter in (filters, matrix):
        optimizer = Muon([parameter], lr=0.02, weight_decay=0.1)
        for step in range(3):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(filters.flatten(1), matrix)


@pytest.mark.parametrize(
    ("make", "num_convolutions"),
    [
        (lambda: create_model("vit-hybrid-mini-patch8-32"), 9),
        (lambda: create_model("detr-mini"), 0),
        (lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 4))])}), 0),
    ],
    ids=["a ViT's stem", "our ResNet", "a stock ResNet's layers"],
)
def test_muon_takes_the_filters_of_a_stem_but_not_of_a_backbone(make, num_convolutions):
    model = make()
    muon = create_optimizers(model, optimizer="muon", **OPTIONS)[0]
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    filters = [names[id(parameter)] for parameter in held([muon]) if parameter.ndim == 4]
    assert len(filters) == num_convolutions and all(".stem." in name for name in filters)


@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_training_step_lowers_the_loss_and_state_is_restored_exactly(model, name, layer_decay):
    options = {**OPTIONS, "optimizer": name, "layer_decay": layer_decay}
    optimizers = create_optimizers(model, **options)
    train_step(model, optimizers)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    states = [optimizer.state_dict() for optimizer in optimizers]
    states = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, states)
    train_step(model, optimizers)

    again = Model()
    again.load_state_dict(weights)
    optimizers = create_optimizers(again, **options)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    train_step(again, optimizers)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


@pytest.mark.parametrize("prepare", ["sharded", "accelerated"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_and_averaging_on_fsdp2_shards_equal_training_whole(prepare, name):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1].joinpath("optim_on_two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script), prepare, name], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 2


def factors(**options):
    options = {"max_steps": 100, "warmup_steps": 10, **options}
    return [learning_rate_factor(step, **options) for step in range(options["max_steps"])]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_is_linear_from_above_zero(schedule):
    course = factors(schedule=schedule)
    assert course[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert factors(schedule=schedule, warmup_steps=0)[0] == 1


def test_cosine_and_linear_end_at_their_final_factor():
    cosine, linear = factors(schedule="cosine", final=0.1), factors(schedule="linear", final=0.1)
    assert cosine[55] == linear[55] == pytest.approx(0.55)
    assert cosine[32] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90)))
    for course in (cosine, linear):
        assert course[10:] == sorted(course[10:], reverse=True)
        assert 0.1 < course[-1] < 0.12
    for schedule in ("cosine", "linear"):
        assert learning_rate_factor(100, schedule=schedule, max_steps=100, warmup_steps=10, final=0.1) == 0.1


def test_constant_cools_down_as_one_minus_square_root():
    course = factors(schedule="constant", cooldown_steps=20)
    assert course[10:80] == [1] * 70
    assert course[80:] == pytest.approx([1 - math.sqrt(k / 21) for k in range(1, 21)])
    assert course[-1] > 0
    assert factors(schedule="constant")[10:] == [1] * 90


def test_a_longer_constant_run_has_the_same_beginning():
    short, long = factors(schedule="constant"), factors(schedule="constant", max_steps=200)
    assert long[:100] == short


def test_an_unknown_schedule_and_a_warm_up_longer_than_the_run():
    with pytest.raises(ValueError, match="not 'step'"):
        learning_rate_factor(50, schedule="step", max_steps=100, warmup_steps=0)
    assert factors(schedule="cosine", max_steps=5)[-1] == pytest.approx(5 / 11)


def test_the_average_follows_its_formula_and_leaves_frozen_weights_alone(model):
    average = EMA(model, decay=0.5)
    expected = model.head.weight.detach().clone()
    for step in range(10):
        with torch.no_grad():
            model.head.weight.add_(1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.head.weight.detach()
    torch.testing.assert_close(average.state_dict()["embed_tokens.weight"], expected)
    assert not any(name.startswith(("frozen", "head")) for name in average.state_dict())


def test_swap_restores_the_weights_bit_for_bit_also_after_an_error(model):
    average = EMA(model, decay=0.9)
    train_step(model, create_optimizers(model, optimizer="adamw", **OPTIONS))
    average.update(0)
    own, mean = model.layers[0][0].weight.detach().clone(), average.state_dict()["layers.0.0.weight"].clone()
    assert not torch.equal(own, mean)
    with pytest.raises(KeyError), average.swap():
        assert torch.equal(model.layers[0][0].weight, mean)
        raise KeyError
    assert torch.equal(model.layers[0][0].weight, own)
    assert torch.equal(average.state_dict()["layers.0.0.weight"], mean)


def test_the_average_is_restored_exactly_and_a_stranger_is_refused(model):
    average = EMA(model, decay=0.9)
    saved = {name: torch.randn_like(value) for name, value in average.state_dict().items()}
    average.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in average.state_dict().items())
    with pytest.raises(ValueError, match="embed_tokens.weight is only in the model"):
        average.load_state_dict({name: value for name, value in saved.items() if name != "embed_tokens.weight"})
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \(2, 8\), not \(11, 8\)"):
        average.load_state_dict({**saved, "embed_tokens.weight": torch.zeros(2, 8)})
