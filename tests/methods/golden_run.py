"""Replays of ReLoRA's and SwitchLoRA's authors' steps, on plain matrices and on those that FSDP2 shards."""

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import silu

from cola_lightning.methods import ReLoRA, ReLoRACallback, SwitchLoRA, SwitchLoRACallback
from cola_lightning.optim import RowAdamW, WarmupCosineRestarts
from cola_lightning.optim.row_adamw import bias_correction
from cola_lightning.optim.rows import own_rows, rows_of, set_rows, whole
from tests.golden.replay import MATRICES, Net, distance, golden, steps
from tests.optim.sharded_run import join

Shard = Callable[[nn.Module], object]
RELORA = [("all_zeroed", 1.0, False, 1e-6), ("random_99", 0.99, True, 5e-6)]


def matrices_of(net: Net) -> list:
    return [getattr(net, matrix) for matrix in MATRICES]


def check_weights(net: Net, data: dict, number: int, names: Iterable[str]) -> None:
    for matrix in MATRICES:
        for name in names:
            found = whole(getattr(getattr(net, matrix), name).detach())
            assert distance(found, data[f"weights.{matrix}.{name}"][number]) <= 1e-6, (number, matrix, name)


class OfficialDraws(ReLoRA):
    """Takes the given values in place of drawing A anew."""

    def new_a(self, draw):
        return self.drawn


class OfficialMasks(ReLoRACallback):
    """Takes the given entries in place of drawing them."""

    def kept(self, moment, draw):
        return next(self.masks)[own_rows(moment)]


class OfficialRounding(SwitchLoRACallback):
    """Rounds by the given numbers, one for each projection and step."""

    def chances(self, step):
        return self.draws[step].tolist()


class NetWithGain(Net):
    """The output is multiplied by a trained vector, which has no counterpart and is never held."""

    def __init__(self, make, sizes):
        super().__init__(make, sizes)
        self.gain = torch.nn.Parameter(torch.ones(9, dtype=torch.float64))

    def loss(self, x, target):
        y = self.gain * self.tall(silu(self.square(silu(self.wide(x)))))
        return 10 * (y - target).square().mean()


def replay_relora(
    name: str, ratio: float, begins_at_official_weights: bool, bound: float, shard: Shard | None = None
) -> None:
    """Compare rates, losses and weights over three merges, with the authors' draws and a mask for each moment, as they
    have it."""
    data = golden("relora", name)
    net = Net(partial(OfficialDraws, rank=4, alpha=32, dropout=0.0))
    net.start(data)
    for module in matrices_of(net) if shard else ():
        shard(module)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    schedule = WarmupCosineRestarts(optimizer, 48, cycle_steps=12, warmup_steps=6, restart_warmup_steps=3)
    merge = OfficialMasks(merge_every=12, prune_ratio=ratio, mask="independent", seed=0)
    merge.projections, merge.optimizer = matrices_of(net), optimizer
    for number in steps(net, data, bound):
        assert schedule.get_last_lr()[0] == pytest.approx(float(data["learning_rate"][number]), rel=1e-12)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        cycle = str(number)  # of the merge that is due after step number + 1
        for matrix in MATRICES if f"drawn_A.wide.{cycle}" in data else ():
            getattr(net, matrix).drawn = data[f"drawn_A.{matrix}.{cycle}"]
        merge.masks = iter([
            data[f"kept.{matrix}.{factor}.{moment}.{cycle}"].bool()
            for matrix in MATRICES for factor in "AB" for moment in ("exp_avg", "exp_avg_sq")
            if f"kept.{matrix}.A.exp_avg.{cycle}" in data
        ])  # fmt: skip
        merge.after_step(None, number + 1)
        assert next(merge.masks, None) is None
        check_weights(net, data, number, ["weight", "A", "B"])
        for matrix in MATRICES if begins_at_official_weights else ():
            for part in ("weight", "A", "B"):
                official = data[f"weights.{matrix}.{part}"][number]
                rows = rows_of(getattr(getattr(net, matrix), part).detach())
                set_rows(rows, torch.arange(rows.total), official)


def official_bias_correction(beta: float, step: Tensor) -> Tensor:
    """Return ``1 - βᵗ`` as theirs computes it: in float32 for rows, where 1 - 0.999 is 1.3e-5 off; exactly for what has
    no rows. Ours does so in float32, but not in float64, in which it is replayed here."""
    return (1 - beta ** step.float()).to(step.dtype) if step.dim() > 1 else bias_correction(beta, step)


def replay_switch_lora(shard: Shard | None = None) -> None:
    """Compare losses and weights over its exchanges. Theirs exchanges before a step, ours after the one before; weights
    are compared in between."""
    data = golden("switch_lora")
    net = NetWithGain(partial(SwitchLoRA, rank=4, alpha=1.0), sizes=((10, 8), (8, 8), (8, 9)))
    net.start(data)
    for module in matrices_of(net) if shard else ():
        shard(module)
    optimizer = RowAdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)
    switch = OfficialRounding(interval=10, descent=10, hold_steps=5, seed=0)
    switch.draws = data["draws"]
    trainer = SimpleNamespace(optimizers=[optimizer], max_steps=40, strategy=None)
    switch.on_fit_start(trainer, SimpleNamespace(network=net))
    assert switch.projections == matrices_of(net)
    switch.pools = [{side: data[f"pool.{matrix}.{side}"].clone() for side in "AB"} for matrix in MATRICES]
    switch._keep_own()
    for number in steps(net, data):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, (number + 1) / 4)
        with patch("cola_lightning.optim.row_adamw.bias_correction", official_bias_correction):
            optimizer.step()
        check_weights(net, data, number, ["weight", "A", "B"])
        assert distance(net.gain.detach(), data["weights.gain"][number]) <= 1e-6
        if number + 1 < 40:
            with torch.no_grad():
                switch.after_step(trainer, number + 1)
    assert sum(count for each in switch.schedule.done for count in each.values()) > 50


def replay_sharded() -> None:
    """Replay all of them as one of several ranks, each of which has the same batch."""
    mesh, _ = join()
    shard = partial(fully_shard, mesh=mesh)
    for case in RELORA:
        replay_relora(*case, shard)
    replay_switch_lora(shard)
    torch.distributed.destroy_process_group()
