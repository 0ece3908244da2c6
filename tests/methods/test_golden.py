"""LoRA and SLTrain, trained beside their authors' code (tests/golden)."""

from functools import partial

import torch

from cola_lightning.methods import LoRA, SLTrain
from cola_lightning.optim import WarmupCosine
from tests.golden.replay import MATRICES, Net, distance, golden, steps


def check_weights(net, data, number, names):
    for matrix in MATRICES:
        for name in names:
            found = getattr(getattr(net, matrix), name).detach()
            assert distance(found, data[f"weights.{matrix}.{name}"][number]) <= 1e-6, (number, matrix, name)


def test_lora_gives_the_official_losses_and_weights():
    data = golden("lora")
    net = Net(partial(LoRA, rank=4, alpha=32, dropout=0.0))
    net.start(data)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    schedule = WarmupCosine(optimizer, 35, warmup_steps=5, min_ratio=0.1)
    for number in steps(net, data):
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        check_weights(net, data, number, ["A", "B"])


def test_sltrain_gives_the_official_losses_gradients_and_weights():
    data = golden("sltrain")
    net = Net(partial(SLTrain, rank=4, alpha=32, sparsity=0.1))
    net.start(data)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.003, weight_decay=0.0)
    for number in steps(net, data):
        for matrix in MATRICES if number == 0 else ():
            for name in ("A", "B", "values"):
                found = getattr(getattr(net, matrix), name).grad
                assert distance(found, data[f"first_gradient.{matrix}.{name}"]) <= 1e-6
        optimizer.step()
        check_weights(net, data, number, ["A", "B", "values"])
