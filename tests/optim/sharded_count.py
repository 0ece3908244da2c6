"""Runs of test_sharded_count.py: what a rank sends and holds in a step, counted."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cola_lightning.methods import SST, ReLoRA, ReLoRACallback, SSTCallback, SwitchLoRA, SwitchLoRACallback
from cola_lightning.methods.sst import decomposition
from cola_lightning.methods.switch_lora_schedule import Exchange
from cola_lightning.optim import RowAdamW
from tests.conftest import tiny_llama
from tests.optim.sharded_run import GAP, OPTIMIZERS, join

M, N, RANK = 16, 64, 4  # sizes of the matrices, and of projections
WIDE, TALL = (M, N), (N, M)  # out, in


class Meter(TorchDispatchMode):
    """Count the numbers that this rank sends, where collectives go round a ring, and the most memory that tensors made
    since the start have at one time, in numbers of float32.

    A thread of gloo holds a collective's tensors until a moment after its end, which is not counted: before more than
    ``limit`` is counted, the thread gets some seconds.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit
        self.sent: Counter[str] = Counter()
        self.live: dict[StorageWeakRef, float] = {}
        self.peak = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # counted when the DTensor calls the operation on its local part
        known = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if "c10d" in str(func):
            self.count_sent(func.__name__.split(".")[0], args)
        for tensor in tensors(result):
            key = StorageWeakRef(tensor.untyped_storage())
            if key not in known:
                self.live[key] = tensor.untyped_storage().nbytes() / 4
        deadline = time.monotonic() + 5
        while (size := self.size()) > self.limit and size > self.peak and time.monotonic() < deadline:
            time.sleep(0.01)
        self.peak = max(self.peak, size)
        return result

    def size(self) -> float:
        self.live = {key: size for key, size in self.live.items() if not key.expired()}
        return sum(self.live.values())

    def count_sent(self, name: str, args: tuple) -> None:
        ranks = dist.get_world_size()
        match name:
            case "all_gather_into_tensor":
                self.sent["gather"] += args[0].numel() * (ranks - 1)
            case "_allgather_base_":
                self.sent["gather"] += args[1].numel() * (ranks - 1)
            case "reduce_scatter_tensor":
                self.sent["reduce"] += args[0].numel() * (ranks - 1) / ranks
            case "_reduce_scatter_base_":
                self.sent["reduce"] += args[1].numel() * (ranks - 1) / ranks
            case "all_reduce" | "allreduce_":
                self.sent["reduce"] += sum(t.numel() for t in tensors(args[0])) * 2 * (ranks - 1) / ranks
            case "all_to_all_single":
                self.sent["exchange"] += args[0].numel() * (ranks - 1) / ranks
            case "send":
                self.sent["exchange"] += sum(t.numel() for t in tensors(args[0]))
            case "broadcast_":  # of DDP
                self.sent["broadcast"] += args[0][0].numel()
            case "wait_tensor" | "recv_" | "_wrap_tensor_autograd":
                pass
            case _:
                raise AssertionError(f"{name} is not counted")


def tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def measured(row: dict, name: str, limit: float) -> Iterator[None]:
    """Put what is sent, and the peak of memory, which is not expected above ``limit``, into ``row``."""
    with Meter(limit) as meter:
        yield
    row[f"sent at {name}"], row[f"peak at {name}"] = meter.sent.total(), meter.peak


def share(values: list[Tensor]) -> float:
    """Compute which share of these tensors this rank has."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return sum(t.numel() for t in local) / sum(t.numel() for t in values)


def most(alone: float = 0, result: float = 0) -> float:
    """Compute how much a rank may have at any moment beside its share, in numbers: one whole matrix.

    Args:
        alone: What the same computation takes for a matrix on one device, such as the results of a decomposition.
        result: Numbers of a result, of which a rank also has its part.
    """
    few = 8  # numbers that are not of a matrix
    return M * N + (alone + result / dist.get_world_size() + few if alone else 0)


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def count_optimizers(shard, matrices: int) -> dict[str, dict]:
    """Measure the first step of each optimizer, which makes the projectors, and the second."""
    found = {}
    for name, make in OPTIMIZERS.items():
        for kind, shape in (("wide", WIDE), ("tall", TALL)):
            draw = torch.Generator().manual_seed(1)
            ps = [Parameter(shard(torch.randn(shape, generator=draw))) for _ in range(matrices)]
            optimizer, row = make(ps), {}
            found[f"{name} {kind}"] = row
            for p in ps:
                p.grad = shard(torch.randn(shape, generator=draw))
            row["limit"] = most(peak_alone(make, shape), M * N)
            optimizer.step()
            with measured(row, "step", row["limit"]):
                optimizer.step()
            for state in optimizer.state.values():
                state["step"] = GAP
            with measured(row, "renewal", row["limit"]):
                optimizer.step()
            row["share"] = share([*ps, *(p.grad for p in ps), *states_of(optimizer)])
            row["states"] = sum(state.numel() for state in states_of(optimizer)) / matrices
    return found


def peak_alone(make, shape: tuple[int, int]) -> float:
    """Measure the memory of a step that makes a projector, with one plain matrix."""
    alone = Parameter(torch.randn(shape))
    alone.grad = torch.randn(shape)
    plain = make([alone])
    plain.step()
    for state in plain.state.values():
        state["step"] = GAP
    with Meter() as meter:
        plain.step()
    return meter.peak


class Trainer:
    """Stands for the trainer of a run of 100 steps."""

    max_steps = 100


def count_methods(mesh, matrices: int) -> dict[str, dict]:
    """Measure a merge of ReLoRA, exchanges of two rows of A and of B in SwitchLoRA, and refreshes of SST."""
    found = {}
    kinds = {"relora": partial(ReLoRA, dropout=0), "switch_lora": SwitchLoRA, "sst": SST}
    for name, make in kinds.items():
        for kind, (out, within) in (("wide", WIDE), ("tall", TALL)):
            torch.manual_seed(0)
            network = torch.nn.ModuleList([make(within, out, rank=RANK) for _ in range(matrices)])
            for module in network:
                fully_shard(module, mesh=mesh)
            trained = [p for p in network.parameters() if p.requires_grad]
            optimizer = (RowAdamW if name == "switch_lora" else torch.optim.AdamW)(trained, lr=0.01)
            for p in trained:
                p.grad = torch.ones_like(p)
            optimizer.step()
            row = found[f"{name} {kind}"] = {"limit": most()}
            with torch.no_grad():
                if name == "relora":
                    callback = ReLoRACallback(1, seed=0)
                    callback.projections, callback.optimizer = list(network), optimizer
                    with measured(row, "merge", most()):
                        callback.after_step(Trainer(), 2)
                elif name == "switch_lora":
                    callback = SwitchLoRACallback(seed=0)
                    callback.projections, callback.optimizer = list(network), optimizer
                    callback.pools = [callback._candidates(n, module) for n, module in enumerate(network)]
                    callback.schedule.ranks = [RANK] * matrices
                    callback.schedule.reset()
                    for side in "AB":
                        with measured(row, side, most()):
                            for batch in callback._batches([Exchange(n, side, 0, 2) for n in range(matrices)]):
                                callback._exchange(batch, 1)
                    row["pools"] = sum(pool.numel() for pools in callback.pools for pool in pools.values()) / matrices
                else:
                    callback = SSTCallback(1, 2, seed=0)
                    callback.projections, callback.optimizer = list(network), optimizer
                    with Meter() as meter:
                        decomposition(torch.randn(out, within))
                    row["limit"] = most(meter.peak, M * (M + N + 1))
                    for step, event, limit in ((1, "iteration", most()), (2, "round", row["limit"])):
                        with measured(row, event, limit):
                            callback.after_step(Trainer(), step)
            row["share"] = share([*network.parameters(), *(p.grad for p in trained), *states_of(optimizer)])
    return found


def count_fsdp2(mesh, layers: int) -> dict[str, float]:
    """Measure forward and backward pass of a network under FSDP2."""
    network = tiny_llama(num_hidden_layers=layers)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    for layer in network.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    ids = torch.randint(1, 60, (1, 8))
    network(ids[:, :-1], targets=ids[:, 1:]).mean().backward()  # the first pass also agrees on the order of layers
    network.zero_grad()
    with Meter() as meter:
        network(ids[:, :-1], targets=ids[:, 1:]).mean().backward()
    in_layers = sum(size for name, size in sizes.items() if "layers" in name)
    return {**meter.sent, "in layers": in_layers, "outside": sum(sizes.values()) - in_layers}


def count(out: str) -> None:
    """Write all of it, for each rank."""
    mesh, shard = join()
    found = {
        "optimizers": {matrices: count_optimizers(shard, matrices) for matrices in (4, 8)},
        "methods": {matrices: count_methods(mesh, matrices) for matrices in (4, 8)},
        "fsdp2": {layers: count_fsdp2(mesh, layers) for layers in (1, 2, 3)},
    }
    Path(out, f"count{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
