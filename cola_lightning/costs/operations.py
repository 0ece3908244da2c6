"""Describe one operation of a training step: what it computes, reads and writes."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cola_lightning.private_apis.torch import schema_of, tree_leaves

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
BARRIERS = ("attention", "embedding", "sort", "index_put", "linalg", "fused_ad", "foreach")
"""Parts of the names of operations that ``torch.compile`` calls as kernels of their own, beside products."""


@dataclass(frozen=True)
class Tile:
    """Sizes of a batch of matrix products: (batch, M, K) times (batch, K, N).

    Attributes:
        batch, m, n, k: The sizes.
        alignment: Largest power of two, in bytes, that divides the distance between the rows of every matrix.
        only_result: Whether the rows of the result alone are not at multiples of 16 bytes.
    """

    batch: int
    m: int
    n: int
    k: int
    alignment: int
    only_result: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: Its name, without the overload: ``aten::mm``.
        flops: FLOPs of products and attention; 0 of other operations.
        reads, writes: Bytes by the number of the storage. What is changed in place is in both.
        itemsize: Bytes of a number of its first tensor.
        product: Sizes, if it is a matrix product.
        causal: Whether it is attention whose mask is causal.
        length: Tokens of a row, of attention.
    """

    name: str
    flops: float
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]
    itemsize: int
    product: Tile | None = None
    causal: bool = False
    length: int = 0

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.reads + self.writes)

    @property
    def can_fuse(self) -> bool:
        """Whether ``torch.compile`` can join it with its neighbours in one kernel."""
        return self.product is None and not any(part in self.name for part in BARRIERS)

    @property
    def is_attention(self) -> bool:
        return "attention" in self.name


def describe(func: Any, args: Any, kwargs: Any, out: Any, flops: float, number: Any) -> Operation | None:
    """Describe an operation that ran; None if it moves no data, as a view does.

    Args:
        func: The operator.
        args, kwargs: Its arguments.
        out: Its result.
        flops: Its FLOPs.
        number: Function from a tensor to the number of its storage.
    """
    declared = schema_of(func)
    name = declared.name
    if func.is_view or name in ("aten::detach", "aten::_unsafe_view", "aten::empty_like", "aten::new_empty"):
        return None
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    changed: list[Tensor] = []
    values = [*args, *(kwargs or {}).values()]
    schema = list(declared.arguments)
    named = dict(zip((argument.name for argument in schema), args, strict=False)) | (kwargs or {})
    overwritten: set[int] = set()
    for argument in schema:
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named:
            leaves = [leaf for leaf in tree_leaves(named[argument.name]) if isinstance(leaf, Tensor)]
            changed += leaves
            if argument.kwarg_only or name in ("aten::copy_", "aten::fill_", "aten::zero_"):
                overwritten.update(map(id, leaves))  # ``out=``, and operations that do not read what they replace
    known = {number(tensor) for tensor in tensors}
    made = [tensor for tensor in results if number(tensor) not in known]
    if not made and not changed:
        return None  # such as ``to`` without a change
    if name.startswith("aten::empty"):
        return None
    reads = tuple((number(tensor), _bytes(tensor)) for tensor in tensors if id(tensor) not in overwritten)
    writes = tuple((number(tensor), _bytes(tensor)) for tensor in made + changed)
    first = next(iter(made + changed))
    tile = _tile(name, args, first) if name in PRODUCTS else None
    causal = "attention" in name and any(value is True for value in values)
    length = tensors[0].shape[-2] if causal else 0  # the first is a query (B, H, T, E) or its output's gradient
    return Operation(name, flops, reads, writes, first.element_size(), tile, causal, length)


def _bytes(tensor: Tensor) -> int:
    """Count the bytes that a tensor covers. What is broadcast counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def _tile(name: str, args: Any, result: Tensor) -> Tile:
    left, right = args[1:3] if name in ("aten::addmm", "aten::baddbmm") else args[:2]
    inputs, whole = _alignment(left, right), _alignment(left, right, result)
    batch = left.shape[0] if left.dim() == 3 else 1
    only_result = inputs >= 16 > whole
    return Tile(batch, left.shape[-2], right.shape[-1], left.shape[-1], whole, only_result)


def _alignment(*matrices: Tensor) -> int:
    """Return the largest power of two, in bytes, that divides the distance between the rows of every matrix."""
    distances = [max(matrix.stride()[-2:]) * matrix.element_size() for matrix in matrices if min(matrix.shape) > 1]
    aligned = math.gcd(*distances, 1024)
    return aligned & -aligned
