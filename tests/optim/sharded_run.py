"""Runs of test_sharded.py, on ranks that ``tests.processes`` starts: single steps, and training under FSDP2."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from cola_lightning.callbacks import Checkpoints
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.models import FullRank
from cola_lightning.optim import APOLLO, Fira, GaLore, HybridOptimizer, Muon, WarmupCosine
from cola_lightning.optim.parameter_groups import ELEMENTWISE
from cola_lightning.training.module import LanguageModel
from tests.distributed.parity_run import GLOBAL_BATCH, Data
from tests.golden.replay import golden
from tests.optim.test_golden import GIVEN, MUON, replay, with_given_projectors
from tests.recorder import Curve

STEPS, SAVED, GAP = 12, 6, 4
"""Projectors are renewed at steps 1, 5 and 9: the checkpoint of step 6 is between two."""
CHECKPOINT = f"step_{SAVED:08}.ckpt"
OPTIMIZERS = {
    "galore": partial(GaLore, lr=0.05, rank=4, update_proj_gap=GAP),
    "fira": partial(Fira, lr=0.01, rank=4, update_proj_gap=GAP),
    "apollo": partial(APOLLO, lr=0.01, rank=4, update_proj_gap=GAP),
    "apollo_mini": partial(APOLLO, lr=0.01, rank=1, scale=16.0, scaling="tensor", update_proj_gap=GAP),
    "muon": partial(Muon, lr=0.02),
}

ADAMW = partial(AdamW, lr=0.02)
RUNS = {
    name: partial(HybridOptimizer, matrix=make, other=ADAMW, embedding=partial(AdamW, lr=0.01))
    for name, make in OPTIMIZERS.items()
}
# SGD without momentum makes no state for its parameters: here for embedding, head and norms …
RUNS["sgd"] = partial(HybridOptimizer, matrix=ADAMW, other=partial(SGD, lr=0.1))
RUNS["plain_sgd"] = partial(SGD, lr=0.5)  # … and here for none at all


@contextmanager
def iterating_in_float32() -> Iterator[None]:
    """Let torch's Muon iterate in float32. In bfloat16, as it is shipped, the last bit of a gradient may change a whole
    matrix."""
    with_bfloat16 = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = torch.Tensor.float  # which torch's iteration begins with
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = with_bfloat16


# -- single steps -----------------------------------------------------------------------------------------------------

SHAPES = [(5, 7), (7, 5), (6, 6), (3, 9), (9, 3), (2, 8)]
"""On 4 ranks some have no row, and some no column, of a few of them."""
MAKERS = {
    "galore": partial(GaLore, lr=0.1, rank=2, update_proj_gap=3, weight_decay=0.1),
    "fira": partial(Fira, lr=0.1, rank=2, update_proj_gap=3),
    "fira_paper": partial(Fira, lr=0.1, rank=2, update_proj_gap=3, form="paper"),
    "apollo": partial(APOLLO, lr=0.1, rank=2, update_proj_gap=3),
    "apollo_mini": partial(APOLLO, lr=0.1, rank=1, scaling="tensor", update_proj_gap=3),
    "muon": partial(Muon, lr=0.1),
    **{kind.__name__: partial(kind, lr=0.1) for kind in ELEMENTWISE},
}


def join() -> tuple:
    """Join the ranks, and return the mesh and a function that shards a matrix by rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return mesh, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def compare_with_plain() -> None:
    """Seven steps of each optimizer on plain and on sharded matrices give the same weights and states."""
    _, shard = join()
    for name, make in MAKERS.items():
        draw = torch.Generator().manual_seed(1)
        plain = [Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in SHAPES]
        sharded = [Parameter(shard(p.detach().clone())) for p in plain]
        pair = [make(plain), make(sharded)]
        for _ in range(7):
            for p, q in zip(plain, sharded, strict=True):
                p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64)
                q.grad = shard(p.grad.clone())
            for optimizer in pair:
                optimizer.step()
        for p, q in zip(plain, sharded, strict=True):
            bounds = {"rtol": 1e-10, "atol": 1e-13}
            torch.testing.assert_close(whole(q), p, **bounds, msg=lambda text, of=name: f"{of}: {text}")
            states = [pair[0].state[p], pair[1].state[q]]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                if isinstance(value, torch.Tensor):
                    assert isinstance(states[1][key], DTensor) or value.dim() == 0, (name, key)
                    torch.testing.assert_close(whole(states[1][key]), value, **bounds)
                else:
                    assert states[1][key] == value
    dist.destroy_process_group()


def replay_golden(out: str) -> None:
    """Write the distance from the official weights of each method on sharded matrices."""
    _, shard = join()
    found = {}
    for name, (optimizer_class, options) in GIVEN.items():
        data = golden(name)
        make = with_given_projectors(optimizer_class, data, **options)
        found[name] = replay(make, data, data["learning_rate"], shard, whole)
    found["muon"] = replay(MUON, golden("muon", "moonlight"), None, shard, whole)
    with iterating_in_float32():
        found["muon_float32"] = replay(MUON, golden("muon", "moonlight_float32_iteration"), None, shard, whole)
    if dist.get_rank() == 0:
        Path(out, "golden.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    name: str,
    strategy: str,
    ranks: int,
    out: str,
    micro_batch: int = 2,
    resume: str | None = None,
    cola_m: bool = False,
) -> None:
    """Train one layer for twelve steps, and write the curve to OUT/curve.json and checkpoints of steps 6 and 12.

    ``strategy`` ends in ``32`` for float32, in which Muon iterates then, too; otherwise the run is in float64, and Muon
    iterates in bfloat16.
    """
    torch.set_num_threads(1)
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy.removesuffix("32"), max_steps=STEPS, max_epochs=1,
        accumulate_grad_batches=GLOBAL_BATCH // (ranks * micro_batch), log_every_n_steps=1, gradient_clip_val=0.5,
        precision="32-true" if strategy.endswith("32") else "64-true",
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[curve, Checkpoints(SAVED, dirpath=out, minutes_at_end=0), *([CoLAM()] if cola_m else [])],
    )  # fmt: skip
    L.seed_everything(0, verbose=False)
    model = LanguageModel(
        64, 16, 24, 1, 2,
        projection=partial(CoLA, rank=8) if cola_m else FullRank,
        optimizer=RUNS[name],
        schedule=partial(WarmupCosine, warmup_steps=3),
    )  # fmt: skip
    with iterating_in_float32() if strategy.endswith("32") else nullcontext():
        trainer.fit(model, datamodule=Data(micro_batch), ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero:
        Path(out, "curve.json").write_text(json.dumps([curve.losses, curve.norms]))


def refuse(name: str, out: str, resume: str, message: str) -> None:
    """Check that a run under FSDP2 does not resume from a checkpoint, with one line that says why."""
    with pytest.raises(InputError, match=message) as error:
        train(name, "fsdp2", 1, out, resume=resume)
    assert "\n" not in str(error.value)


def train_each(
    names: list[str],
    strategies: list[str],
    ranks: int,
    out: str,
    begun: str | None = None,
    micro_batch: int = 2,
    cola_m: bool = False,
) -> None:
    """Train with each optimizer under each strategy, in OUT/STRATEGY/NAME.

    If BEGUN is given, each run continues from BEGUN/STRATEGY/NAME/CHECKPOINT.
    """
    for strategy in strategies:
        for name in names:
            resume = f"{begun}/{strategy}/{name}/{CHECKPOINT}" if begun else None
            train(name, strategy, ranks, f"{out}/{strategy}/{name}", micro_batch, resume, cola_m)
