"""One process; under DDP and FSDP2 see test_loss_guard, whose runs have this callback too."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from cola_lightning.callbacks import GradientNorms
from cola_lightning.callbacks import gradient_norms as file
from cola_lightning.callbacks.gradient_norms import gradient_norms, group_of
from tests.conftest import loader, tiny_llama, tiny_trainer
from tests.recorder import Recorder, metrics


def test_every_parameter_has_the_group_that_its_name_says():
    groups = {}
    for name, _ in tiny_llama(num_hidden_layers=1).named_parameters():
        groups.setdefault(group_of(f"network.{name}"), set()).add(name.removeprefix("model.").removeprefix("layers.0."))
    assert groups == {
        "embedding": {"embed_tokens.weight"},
        "attention": {f"self_attn.{name}_proj.{factor}.weight" for name in "qkvo" for factor in "AB"},
        "mlp": {f"mlp.{name}_proj.{factor}.weight" for name in ("gate", "up", "down") for factor in "AB"},
        "norms": {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"},
        "head": {"lm_head.weight"},
    }
    assert group_of("network.gate.weight") == "other"


def test_norms_are_those_of_all_numbers_of_a_group():
    network = tiny_llama()
    for index, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + index % 3)
    norms = gradient_norms(network)
    expected = {}
    for name, parameter in network.named_parameters():
        expected[group_of(name)] = expected.get(group_of(name), 0.0) + float((parameter.grad.double() ** 2).sum())
    assert {group: float(norm) for group, norm in norms.items()} == pytest.approx(
        {group: math.sqrt(square) for group, square in expected.items()}, rel=1e-5
    )


def test_logged_before_clipping_and_at_log_steps_only(monkeypatch):
    asked, seen = [], Recorder("on_train_batch_start", metrics=metrics)
    monkeypatch.setattr(file, "gradient_norms", lambda module: asked.append(1) or gradient_norms(module))
    run, model, batches = tiny_trainer(GradientNorms(), seen, steps=5, log_every_n_steps=2, gradient_clip_val=1e-3)
    run.fit(model, loader(batches))
    assert len(asked) == 2
    values = seen.by_step("metrics")[2]
    squares = sum(float(value) ** 2 for name, value in values.items() if name.startswith("gradient_norm/"))
    assert math.sqrt(squares) == pytest.approx(float(values["train/gradient_norm"]), rel=1e-5)
    assert squares > 1e-3


def test_flattened_gradients_are_not_logged_and_a_warning_says_so(monkeypatch):
    callback = GradientNorms()
    monkeypatch.setattr(file, "gradient_norms", lambda module: pytest.fail("was asked"))
    with pytest.warns(UserWarning, match="GradientNorms logs nothing: under FSDPStrategy"):
        callback.setup(SimpleNamespace(strategy=FSDPStrategy()), None, "fit")
    callback.on_before_optimizer_step(SimpleNamespace(global_step=0, log_every_n_steps=1), None, None)
