"""Muon against torch.optim.Muon, on stacks, on replicas and on shards."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bitnet_lit.training import muon
from bitnet_lit.training.muon import Muon
from bitnet_lit.training.optimizers import sharded_state
from bitnet_lit.training.orthogonalize import orthogonalize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(24, 16), (16, 24), (16, 16), (24, 16), (24, 16), (7, 16), (16, 16)]  # 7 rows: no multiple of two ranks


def draw(shapes, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def trained(make, shapes=SHAPES, device="cpu", place=lambda matrix: matrix, steps=3, **options):
    """The parameters after some steps, whole, and the optimizer."""
    parameters = [torch.nn.Parameter(place(matrix)) for matrix in draw(shapes, 0, device)]
    optimizer = make(parameters, lr=0.02, **options)
    for step in range(steps):
        for parameter, gradient in zip(parameters, draw(shapes, step + 1, device), strict=True):
            parameter.grad = place(gradient)
        optimizer.step()
    return [getattr(p.detach(), "full_tensor", p.detach)() for p in parameters], optimizer


def one_by_one(parameters, lr, nesterov=True, row_beta2=None, is_cautious=False):
    """Muon as it is defined, one matrix after the other, in float32; with the options of NorMuon and cautious decay."""

    class Plain(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                average = state.setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                direction = p.grad.lerp(average, 0.95) if nesterov else average
                update = orthogonalize(direction, COEFFICIENTS, 5, 1e-7)
                if row_beta2 is not None:  # algorithm 1 of the paper, with the norm kept as in the authors' code
                    mean = state.setdefault("rows", torch.zeros(len(p), 1))
                    mean.mul_(row_beta2).add_((1 - row_beta2) * update.square().mean(dim=1, keepdim=True))
                    divided = update / (mean.sqrt() + 1e-10)
                    update = divided * update.norm() / divided.norm()
                p.mul_(torch.where(update * p >= 0, 1 - lr * 0.1, 1.0) if is_cautious else 1 - lr * 0.1)
                p.add_(update, alpha=-lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))

    return Plain(parameters, {})


def off(ours, theirs, shapes=SHAPES):
    """The largest relative difference of an update of a matrix."""
    start = draw(shapes, 0, ours[0].device)
    return max(float((a - b).norm() / (b - s).norm()) for a, b, s in zip(ours, theirs, start, strict=True))


def test_orthogonalize_keeps_directions():
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix, COEFFICIENTS, 5, 1e-7)
    core = u.T @ result @ v.T
    assert float((core - torch.diag(core.diagonal())).abs().max()) < 1e-4  # float32 through five iterations
    assert 0.6 < float(core.diagonal().min()) <= float(core.diagonal().max()) < 1.3  # the source's: 0.5 to 1.5


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_a_stack_is_its_matrices(shape):
    matrices = draw([shape] * 3, 0)
    stack = orthogonalize(torch.stack(matrices), COEFFICIENTS, 5, 1e-7)
    for ours, matrix in zip(stack, matrices, strict=True):
        alone = orthogonalize(matrix, COEFFICIENTS, 5, 1e-7)
        assert float((ours - alone).norm() / alone.norm()) < 1e-4  # products of a batch sum in another order


@pytest.mark.parametrize("nesterov", [True, False])
def test_on_a_cpu_it_is_its_definition_bit_for_bit(monkeypatch, nesterov):
    monkeypatch.setattr(muon.library, "is_available", lambda: False)  # tests/native tests the compiled one
    wanted, _ = trained(one_by_one, nesterov=nesterov)
    for elements in (2**26, 500):  # 500: stacks of one matrix
        monkeypatch.setattr(muon, "STACK_ELEMENTS", elements)
        ours, _ = trained(Muon, nesterov=nesterov)
        assert all(map(torch.equal, ours, wanted))


OPTIONS = [{"row_beta2": 0.9}, {"is_cautious": True}, {"row_beta2": 0.5, "is_cautious": True, "nesterov": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("is_native", [True, False])
def test_normuon_and_cautious_decay_are_their_definitions(monkeypatch, options, is_native):
    if not is_native:
        monkeypatch.setattr(muon.library, "is_available", lambda: False)
    elif not muon.library.is_available():
        pytest.skip("there is no C++ compiler")
    ours, optimizer = trained(Muon, steps=4, **options)
    wanted, definition = trained(one_by_one, steps=4, **options)
    # Sums of a row run in another order; the C++ iterations do too, and five of them amplify that.
    assert off(ours, wanted) < (1e-4 if is_native else 1e-6)
    assert off(ours, trained(Muon, steps=4)[0]) > 0.02  # plain Muon is another one
    if "row_beta2" in options:
        for mine, its in zip(optimizer.param_groups[0]["params"], definition.param_groups[0]["params"], strict=True):
            moment, literal = optimizer.state[mine]["second_momentum_buffer"], definition.state[its]["rows"]
            assert torch.allclose(moment, literal, rtol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_matrix_whose_gradient_is_zero_stays_finite(options):
    parameter = torch.nn.Parameter(torch.ones(4, 8))
    parameter.grad = torch.zeros(4, 8)
    Muon([parameter], lr=0.5, weight_decay=0.1, **options).step()
    assert torch.allclose(parameter, torch.full((4, 8), 0.95))  # no update, and decay of all that agree with it


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_normuon_and_cautious_decay_on_a_gpu(options):
    shapes = [(768, 768)] * 2 + [(2048, 768), (768, 2048)]
    ours, _ = trained(Muon, shapes, "cuda", **options)
    wanted, _ = trained(one_by_one, shapes, **options)
    assert off([p.cpu() for p in ours], wanted, shapes) < 0.05  # bfloat16, as plain Muon


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_replayed_moves_are_those_of_plain_steps_bit_for_bit(options):
    """A resumed run begins with plain steps where an unbroken one replays. Step 3 is not finite, step 5 has another
    momentum, and at step 7 the gradients have moved."""
    shapes = [(768, 768)] * 3 + [(2048, 768)] * 2 + [(768, 2048), (24, 16)]

    def train(gradients_stay):
        parameters = [torch.nn.Parameter(matrix) for matrix in draw(shapes, 0, "cuda")]
        optimizer = Muon(parameters, lr=0.02, **options)
        optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.gradients_stay, recorded = gradients_stay, []
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        for step in range(11):
            optimizer.found_inf.fill_(step == 3)
            optimizer.param_groups[0] |= {"lr": 0.02 / (step + 1), "momentum": 0.95 if step < 5 else 0.9}
            for parameter, gradient in zip(parameters, draw(shapes, step + 1, "cuda"), strict=True):
                if step == 7:
                    parameter.grad = gradient
                parameter.grad.copy_(gradient * torch.nan if step == 3 else gradient)
            optimizer.step()
            recorded.append(optimizer._recorded is not None)
            if step == 3:  # the momentum is lost, and no run goes on with it
                for parameter in parameters:
                    optimizer.state[parameter]["momentum_buffer"].zero_()
        return parameters, recorded

    plain, never = train(False)
    replayed, recorded = train(True)
    assert not any(never)
    assert recorded == [step not in (0, 5, 7) for step in range(11)]
    assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(plain, replayed, strict=True))


def test_it_is_torchs_up_to_bfloat16():
    ours, optimizer = trained(Muon)
    theirs, other = trained(torch.optim.Muon)
    assert off(ours, theirs) < 0.03  # bfloat16 has 8 bits, and five iterations amplify its rounding
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shapes",
    [[(768, 768)] * 3 + [(2048, 768)] * 2 + [(768, 2048)], [(1024, 1024)] * 3 + [(2048, 1024), (1024, 1280)], SHAPES],
)
def test_on_a_gpu_it_is_torchs_up_to_bfloat16(shapes):
    ours, _ = trained(Muon, shapes, "cuda")
    theirs, _ = trained(torch.optim.Muon, shapes, "cuda")
    exact, _ = trained(one_by_one, shapes)
    # Both round to bfloat16, in another order. So both are about equally far from float32, and from each other.
    assert off([p.cpu() for p in ours], exact, shapes) < 1.2 * off([p.cpu() for p in theirs], exact, shapes) + 0.005


def test_a_parameter_without_a_gradient_stays():
    parameters = [torch.nn.Parameter(matrix) for matrix in draw([(8, 8)] * 2, 0)]
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones(8, 8)
    optimizer = Muon(parameters, lr=0.1)
    optimizer.step()
    assert torch.equal(parameters[1], before) and parameters[1] not in optimizer.state


KINDS = [{}, OPTIONS[2]]


def _on_a_rank(rank, folder):
    """One of two processes that train replicas, and rows of the same matrices. They call no deprecated collective."""
    warnings.filterwarnings("error", category=FutureWarning, message=r"`torch\.distributed\.")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def shard(matrix):
        return distribute_tensor(matrix, mesh, [Shard(0)])

    results = [trained(Muon, place=place, **options)[0] for options in KINDS for place in (lambda p: p, shard)]
    _, optimizer = trained(Muon, place=shard, **OPTIONS[0])
    state = optimizer.state_dict()
    whole = {
        number: {name: value.full_tensor() for name, value in values.items()}
        for number, values in state["state"].items()
    }
    _, plain = trained(Muon, place=shard, steps=0)
    plain.load_state_dict(sharded_state(plain, {**state, "state": whole}))
    both = [
        [each.state[parameter]["second_momentum_buffer"].full_tensor() for parameter in each.param_groups[0]["params"]]
        for each in (optimizer, plain)
    ]
    torch.save((results, both), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    torch.multiprocessing.spawn(_on_a_rank, (tmp_path,), nprocs=2)
    wanted = [trained(Muon, **options)[0] for options in KINDS for _ in range(2)]
    for rank in range(2):
        results, (saved, restored) = torch.load(tmp_path / f"{rank}.pt")
        for parameters, each in zip(results, wanted, strict=True):
            # Products on a CPU may depend on where a matrix lies in memory, in their last bits.
            assert off(parameters, each) < 1e-4
        assert [tuple(moment.shape) for moment in saved] == [(rows, 1) for rows, _ in SHAPES]
        assert all(map(torch.equal, saved, restored))


def test_one_rank_has_all_rows(tmp_path):
    """FSDP2 on one device: a DTensor has no memory of its own, so the C++ for CPUs must not get it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shards, _ = trained(Muon, place=lambda matrix: distribute_tensor(matrix, mesh, [Shard(0)]))
    finally:
        dist.destroy_process_group()
    assert off(shards, trained(Muon)[0]) < 1e-4


def test_normuon_trains_weights_in_bfloat16():
    weight = torch.nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16))
    optimizer = Muon([weight], lr=0.1, row_beta2=0.95)
    before = weight.detach().clone()
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.isfinite().all() and not torch.equal(weight, before)
