"""Networks are built, filled and sharded layer by layer, so that no rank holds all of one."""

import ctypes
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp.wrap import enable_wrap

from cola_lightning.distributed.sharding import shard
from cola_lightning.methods import CoLA
from cola_lightning.training.module import LanguageModel
from tests.conftest import tiny_llama
from tests.distributed.parity_run import (
    Data,
    strategy_named,
)
from tests.processes import Run


class Wrapped(nn.Module):
    """Stands for FSDP of the first generation, which does not run on a CPU."""

    def __init__(self, module, **settings):
        super().__init__()
        self.module = module


def test_bare_fsdp_fills_and_wraps_layer_by_layer():
    strategy = FSDPStrategy(parallel_devices=[torch.device("cpu")])
    with torch.device("meta"):
        network = tiny_llama()
    torch.manual_seed(3)
    with enable_wrap(wrapper_cls=Wrapped):
        shard(network, strategy)
    assert all(isinstance(layer, Wrapped) for layer in network.model.layers)
    whole = tiny_llama(seed=3).state_dict()
    filled = {name.replace(".module.", "."): value for name, value in network.state_dict().items()}
    assert filled.keys() == whole.keys()
    for name, value in filled.items():
        assert torch.equal(value, whole[name]), name


def build(strategy: str, ranks: int, out: str) -> None:
    """Build a network of 240 MB, and write how much more memory that took at its peak, in parts of the whole."""

    def peak() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])

    class Measured(LanguageModel):
        def configure_model(self):
            ctypes.CDLL(None).mallopt(-3, 1 << 20)  # memory of a megabyte goes back when it is freed
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = peak()
            super().configure_model()
            share = (peak() - before) / (4 * self.parameter_count)
            Path(out, f"peak{self.global_rank}").write_text(str(share))
            raise SystemExit

    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy_named(strategy, 1), max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Measured(64, 1024, 2736, 6, 8, projection=partial(CoLA, rank=512)), datamodule=Data(1))


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_3"])
def test_no_rank_holds_the_whole_network_where_it_is_sharded(tmp_path, strategy):
    run = Run(build, strategy, 2, str(tmp_path), ranks=2, folder=tmp_path)
    run.done()
    for rank in range(2):
        share = float((tmp_path / f"peak{rank}").read_text())
        assert share > 0.95 if strategy == "ddp" else 0.45 < share < 0.75, run.output()
