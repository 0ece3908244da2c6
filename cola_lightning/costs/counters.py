"""Count FLOPs and bytes of operations while they run, on real tensors or on fake ones, which have no content."""

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from cola_lightning.costs.operations import Operation, describe
from cola_lightning.private_apis.torch import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    TorchDispatchMode,
    storage_key,
    tree_leaves,
)

# PyTorch's counter lacks the CPU's attention kernel. As for the others, causal attention counts as full attention.
CPU_FORMULAS = {
    CPU_ATTENTION: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    CPU_ATTENTION_BACKWARD: (lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v)),
}


def count_flops(run: Callable[[], Any]) -> int:
    """Count the FLOPs of matrix products and attention in ``run()``. A multiply-add counts as two."""
    with FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def kept_bytes(run: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Count the bytes that ``run()`` leaves alive, without its result and the storages of ``known``."""
    known = list(known)
    with Recorder(known) as recorder:
        result = run()
    gc.collect()
    return recorder.live([result])


FORMULAS = {**flop_registry, **{op: shape_wrapper(formula) for op, formula in CPU_FORMULAS.items()}}


class Recorder(TorchDispatchMode):
    """Record what operations compute and allocate.

    PyTorch's own counter also follows modules. It thereby keeps alive what a layer with activation checkpointing
    recomputes, so that it cannot be used to measure memory.

    Args:
        known: Tensors that existed before, which do not count.

    Attributes:
        flops: FLOPs by operation, by PyTorch's formulas.
        operations: What ran, in its order, without views.
        peak: The most bytes that were alive at once since it was last set to zero. What an operation allocates and
            frees inside is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = {storage_key(tensor) for tensor in known}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.flops: Counter[str] = Counter()
        self.operations: list[Operation] = []
        self._numbers: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self._bound = self._last = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        if flops:
            self.flops[str(func.overloadpacket)] += flops
        operation = describe(func, args, kwargs, out, flops, self.number)
        if operation is not None:
            self.operations.append(operation)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage, key = leaf.untyped_storage(), storage_key(leaf)
                if key in self.known or (key in self.seen and not self.seen[key][0].expired()):
                    continue
                self.seen[key] = (StorageWeakRef(storage), storage.nbytes())
                self._bound += storage.nbytes()
        # To ask every storage whether it is alive is slow. It is needed only if a new peak is possible: _bound is the
        # bytes that were alive when last asked, and all allocated since.
        if self._bound > self.peak:
            self.peak = max(self.peak, self.live())
        return out

    def number(self, tensor: Tensor) -> int:
        """Return a number of a tensor's storage, which no other storage has, not even one at the same address later."""
        key = storage_key(tensor)
        if key not in self._numbers or self._numbers[key][0].expired():
            self._last += 1
            self._numbers[key] = StorageWeakRef(tensor.untyped_storage()), self._last
        return self._numbers[key][1]

    def live(self, besides: Iterable[Tensor] = ()) -> int:
        """Count the bytes that are alive now, without those of ``besides``."""
        excluded = {storage_key(tensor) for tensor in besides}
        self.seen = {key: (ref, size) for key, (ref, size) in self.seen.items() if not ref.expired()}
        self._bound = sum(size for _, size in self.seen.values())
        return self._bound - sum(size for key, (_, size) in self.seen.items() if key in excluded)
