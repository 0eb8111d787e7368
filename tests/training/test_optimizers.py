"""Who gets which optimizer, and that two behind one step like two."""

import copy

import torch

from bitnet_lit.config import AdamWConfig, MuonConfig
from bitnet_lit.model import next_token_loss
from bitnet_lit.training.optimizers import build_optimizer
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
