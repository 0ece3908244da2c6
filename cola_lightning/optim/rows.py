"""Read and write rows of tensors that FSDP2 shards by rows: DTensors with placement ``Shard(0)`` on a mesh of one
dimension.

Every function takes plain tensors too, and then sends nothing, so that a method has one code for both.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Rows(NamedTuple):
    """The rows of a tensor that this rank has.

    Attributes:
        part: The rows.
        own: Which rows of the whole tensor they are.
        total: How many rows the whole tensor has.
    """

    part: Tensor
    own: slice
    total: int


def is_dtensor(x: object) -> "TypeIs[DTensor]":
    """Whether an object is a DTensor, without the 0.8 s that it takes to import them: before that there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def mesh_of(x: Tensor) -> DeviceMesh | None:
    """Return the ranks that have a tensor together; None for a plain one."""
    return x.device_mesh if is_dtensor(x) else None


def chunk(count: int, ranks: int, rank: int) -> slice:
    """Return the rows of a rank by the rule of ``torch.chunk``: of 5 rows, 4 ranks have 2, 2, 1 and none."""
    size = -(-count // ranks)
    return slice(min(rank * size, count), min((rank + 1) * size, count))


def own_rows(x: Tensor, count: int | None = None) -> slice:
    """Return which rows this rank has of a tensor, or of another one with ``count`` rows on the same ranks."""
    count, mesh = x.shape[0] if count is None else count, mesh_of(x)
    return slice(0, count) if mesh is None else chunk(count, mesh.size(), mesh.get_local_rank())


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory."""
    return x.to_local() if is_dtensor(x) else x


def whole(x: Tensor) -> Tensor:
    """Gather a tensor on every rank."""
    return x.full_tensor() if is_dtensor(x) else x


def gathered(parameter: Tensor) -> Tensor:
    """Gather a sharded parameter for a forward pass. Its gradient is the mean over the ranks, as FSDP2's is."""
    mesh = mesh_of(parameter)
    if mesh is None or not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    full = parameter.full_tensor(grad_placements=[Partial()])  # each rank has one term of the gradient's sum
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())
    return full


def rows_of(x: Tensor) -> Rows:
    """Return this rank's part of a tensor, and which rows that is."""
    return Rows(local(x), own_rows(x), x.shape[0])


def from_rows(part: Tensor, shape: Sequence[int], mesh: DeviceMesh) -> "DTensor":
    """Make a DTensor of this shape, a vector or a matrix, of which every rank gives its rows."""
    from torch.distributed.tensor import DTensor, Shard

    stride = (1,) if len(shape) == 1 else (shape[1], 1)
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


def zero_rows(like: Tensor, *sizes: int) -> Tensor:
    """Make a float32 tensor of zeros (rows of ``like``, *sizes), sharded as ``like`` is; one number for a scalar."""
    zeros = torch.zeros((*local(like).shape[:1], *sizes), device=like.device)
    return from_rows(zeros, (like.shape[0], *sizes), like.device_mesh) if is_dtensor(like) else zeros


def gather_rows(wanted: Sequence[tuple[Rows, Tensor]], mesh: DeviceMesh | None, device: torch.device) -> list[Tensor]:
    """Read rows of matrices on every rank, by one all-reduce for all of them.

    Each rank gives the rows that it has and zeros in place of the others, so the sum over the ranks is exact.

    Args:
        wanted: Matrices of one dtype, each with the indices (K,) of the rows to read. The same on all ranks.
        mesh: The ranks; None if every part is the whole matrix.
        device: Where the result is needed.

    Returns:
        The rows (K, columns) of each matrix, on the device.
    """
    if mesh is None or not wanted:
        return [part[rows.to(part.device)].to(device) for (part, _, _), rows in wanted]
    shapes = [(len(rows), part.shape[1]) for (part, _, _), rows in wanted]
    sent = torch.zeros(sum(rows * columns for rows, columns in shapes), dtype=wanted[0][0].part.dtype, device=device)
    found = [piece.view(shape) for piece, shape in zip(sent.split([a * b for a, b in shapes]), shapes, strict=True)]
    for piece, ((part, own, _), rows) in zip(found, wanted, strict=True):
        mine, places = _split(rows, own)
        piece[mine.to(device)] = part[places.to(part.device)].to(device)
    dist.all_reduce(sent, group=mesh.get_group())
    return found


def set_rows(target: Rows, rows: Tensor, values: Tensor | float) -> None:
    """Write rows of a matrix that every rank knows. Each rank writes those that it has.

    Args:
        target: The matrix.
        rows: Indices of the rows (K,).
        values: What to write, (K, columns), or one number for all.
    """
    part = target.part
    if isinstance(values, Tensor):
        values = values.to(part.device, part.dtype)
    if len(part) < target.total:  # else this rank has all rows
        mine, rows = _split(rows, target.own)
        if isinstance(values, Tensor):
            values = values[mine.to(part.device)]
    part[rows.to(part.device)] = values


def _split(rows: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    """Find the indices that lie in a slice: their positions in ``rows``, and their distances from the slice's start."""
    mine = ((rows >= own.start) & (rows < own.stop)).nonzero().flatten()
    return mine, rows[mine] - own.start
