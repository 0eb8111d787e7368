"""Who gets which optimizer, and that two behind one step like two."""

import copy

import pytest
import torch
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, OptimStateKeyType, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from bitnet_lit.config import AdamWConfig, MuonConfig
from bitnet_lit.model import next_token_loss
from bitnet_lit.model.layers import DecoderLayer
from bitnet_lit.training.cautious_decay import CautiousAdamW, decay_where_agreed
from bitnet_lit.training.optimizers import build_optimizer, restore_optimizer, sharded_state
from tests.support import tiny_model


def backward(model):
    ids = torch.arange(33).view(1, -1)
    next_token_loss(model(ids[:, :-1]), ids[:, 1:]).backward()


def test_only_matrices_decay():
    for config in (AdamWConfig(), MuonConfig()):
        model = tiny_model()
        optimizer = build_optimizer(model, config)
        names = {parameter: name for name, parameter in model.named_parameters()}
        seen = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen.append(parameter)
                assert group["weight_decay"] == (0.1 if parameter.ndim == 2 else 0.0), names[parameter]
        assert len(seen) == len(set(seen)) == len(names)


def test_muon_takes_exactly_the_hidden_matrices():
    model = tiny_model(tie_word_embeddings=False)
    optimizer = build_optimizer(model, MuonConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}
    hidden = {names[p] for group in optimizer.parts[0].param_groups for p in group["params"]}
    assert hidden == {name for name in names.values() if "_proj" in name}


def test_one_optimizer_of_two_steps_like_the_two():
    a = tiny_model()
    b = copy.deepcopy(a)
    combined = build_optimizer(a, MuonConfig())
    muon, adamw = build_optimizer(b, MuonConfig()).parts
    for _ in range(3):
        for model in (a, b):
            model.zero_grad()
            backward(model)
        combined.step()
        muon.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_state_survives_a_checkpoint_as_plain_data(tmp_path):
    a = tiny_model()
    optimizer = build_optimizer(a, MuonConfig())
    backward(a)
    optimizer.step()
    torch.save({"model": a.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    b = tiny_model(seed=5)
    b.load_state_dict(saved["model"])
    restored = build_optimizer(b, MuonConfig())
    restored.load_state_dict(saved["optimizer"])
    restored.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.5  # a schedule writes here
    for model, its_optimizer in ((a, optimizer), (b, restored)):
        model.zero_grad()
        backward(model)
        its_optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_where_a_gradient_is_not_finite_no_parameter_changes():
    """The training loop says so in `found_inf`, as it does for PyTorch's fused optimizers."""
    model = tiny_model()
    optimizer = build_optimizer(model, MuonConfig())
    backward(model)
    next(model.parameters()).grad[0, 0] = model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    muon = optimizer.parts[0]
    muon.found_inf = torch.ones(())
    muon.step()  # AdamW has the protocol on GPUs only
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    muon.found_inf = torch.zeros(())
    model.zero_grad()
    backward(model)
    muon.state.clear()
    muon.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "_proj" in name}


@pytest.mark.parametrize("fused", [True, False])
def test_cautious_adamw_is_its_definition(fused):
    torch.manual_seed(0)
    start, lr, decay, betas, eps = torch.randn(7, 5), 0.1, 0.5, (0.8, 0.9), 1e-8
    w, m, v = start.clone(), torch.zeros(7, 5), torch.zeros(7, 5)
    ours, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": lr, "weight_decay": decay, "betas": betas, "eps": eps, "fused": fused}
    optimizer, plain = CautiousAdamW([ours], **options), torch.optim.AdamW([other], **options)
    for step in range(1, 6):
        gradient = torch.randn(7, 5)
        m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
        u = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        w = w - lr * (u + decay * (u * w >= 0) * w)
        ours.grad = other.grad = gradient
        assert optimizer.step(lambda: 3) == 3
        plain.step()
    assert torch.allclose(ours, w, atol=1e-5)  # float32, in another order
    assert (ours - other).abs().max() > 0.01
    assert optimizer.param_groups[0]["weight_decay"] == decay


def test_the_hooks_of_an_optimizer_run_once_a_step():
    """PyTorch wraps `step` of each class, for hooks, when the first optimizer of that class is made."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    torch.optim.AdamW([weight])
    optimizer, called = CautiousAdamW([weight], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert called == ["before", "after"] and weight[0, 0] < 1


def test_cautious_decay_waits_for_nobody_where_a_gradient_is_not_finite():
    parameter = torch.nn.Parameter(torch.ones(3))
    decay_where_agreed([parameter.data], [torch.tensor([torch.nan, torch.inf, 1.0])], torch.ones(()))
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize("config", [AdamWConfig, MuonConfig])
def test_cautious_decay_reaches_every_matrix(config):
    """An update of 0 agrees with every weight, so all matrices lose a tenth, and vectors nothing."""
    model = tiny_model(tie_word_embeddings=False)
    optimizer = build_optimizer(model, config(cautious_weight_decay=True, weight_decay=1.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] * (0.9 if parameter.ndim == 2 else 1.0)), name


def test_normuon_goes_on_from_a_checkpoint_and_from_plain_muon(tmp_path):
    config = MuonConfig(normuon=True, normuon_beta2=0.9)
    a = tiny_model()
    optimizer = build_optimizer(a, config)
    backward(a)
    optimizer.step()
    torch.save({"model": a.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    found = []
    for load in (lambda o, state: o.load_state_dict(state), restore_optimizer):
        model = tiny_model(seed=5)
        model.load_state_dict(saved["model"])
        restored = build_optimizer(model, config)
        load(restored, copy.deepcopy(saved["optimizer"]))  # an optimizer takes the tensors themselves
        found.append((model, restored))
    for model, its_optimizer in [(a, optimizer), *found]:
        model.zero_grad()
        backward(model)
        its_optimizer.step()
    for model, _ in found:
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), model.parameters(), strict=True))
    plain = build_optimizer(a, MuonConfig())  # switched off and on again, as a resume with the key may do
    plain.load_state_dict(optimizer.state_dict())
    plain.step()
    again = build_optimizer(a, config)
    again.load_state_dict(build_optimizer(a, MuonConfig()).state_dict())
    again.step()
    assert {"momentum_buffer", "second_momentum_buffer"} == set(next(iter(again.parts[0].state.values())))


@pytest.mark.filterwarnings("ignore:.*are being deprecated:FutureWarning")
def test_a_run_of_fsdp1_goes_on(tmp_path):
    """Lightning numbered the parameters of FSDP1 in the order of the network, and not in that of the groups."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(
            tiny_model(tie_word_embeddings=False),
            auto_wrap_policy=ModuleWrapPolicy({DecoderLayer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        optimizer = build_optimizer(wrapped, AdamWConfig())
        backward(wrapped)
        optimizer.step()
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            saved = FullyShardedDataParallel.optim_state_dict(wrapped, optimizer)
        saved = FullyShardedDataParallel.rekey_optim_state_dict(saved, OptimStateKeyType.PARAM_ID, wrapped)
        moments = {
            name.replace("_fsdp_wrapped_module.", ""): optimizer.state[parameter]["exp_avg"]
            for name, parameter in wrapped.named_parameters()
        }
    finally:
        torch.distributed.destroy_process_group()
    assert [key for group in saved["param_groups"] for key in group["params"]] != sorted(saved["state"])
    model = tiny_model(tie_word_embeddings=False)
    for load in (
        lambda optimizer: optimizer.load_state_dict(sharded_state(optimizer, saved)),
        lambda optimizer: restore_optimizer(optimizer, saved),
    ):
        ours = build_optimizer(model, AdamWConfig())
        load(ours)
        for name, parameter in model.named_parameters():
            assert torch.equal(ours.state[parameter]["exp_avg"], moments[name]), name
