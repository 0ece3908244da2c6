"""Operations on matrices that FSDP2 shards by rows: DTensors with placement ``Shard(0)`` on a mesh of one dimension.

Every function takes plain tensors too, and then sends nothing, so that an optimizer has one code for both.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from cola_lightning.optim.rows import Rows, chunk, from_rows, is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Shape = tuple[int, int]


def replicate(x: Tensor) -> Tensor:
    """Gather a tensor on every rank. The result is still a DTensor."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate  # here, because it takes 0.8 s and plain matrices do without

    return x.redistribute(placements=[Replicate()])


def shard_columns(x: Tensor) -> Tensor:
    """Shard a matrix by its columns. If each rank has one term of a sum, the terms are added (a reduce-scatter)."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Shard

    return x.redistribute(placements=[Shard(1)])


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor like another of its shape. It mostly is already; of a matrix with fewer rows than there are ranks,
    torch may return the whole on each rank."""
    if is_dtensor(x) and is_dtensor(like):
        return x.redistribute(placements=like.placements)
    return x


def is_sharded_by_rows(x: Tensor) -> bool:
    """Whether each rank has some of the rows. The transpose of a matrix of FSDP2 is sharded by columns."""
    return is_dtensor(x) and x.placements[0].is_shard(0)


def to_scalar(x: Tensor) -> Tensor:
    """Convert a number that is a DTensor to a plain tensor, which has the same value on all ranks (an all-reduce)."""
    return x.full_tensor() if is_dtensor(x) else x


def distribute_like(x: Tensor, like: Tensor) -> Tensor:
    """Make a matrix that every rank has whole a DTensor that multiplies ``like``. Nothing is sent.

    Args:
        x: Plain, the same on all ranks; as many rows as ``like``.
        like: If plain, the result is ``x``. If sharded by rows, each rank has the same rows of the result. If sharded
            by columns, each rank has the whole result.
    """
    if not is_dtensor(like):
        return x
    mesh = like.device_mesh
    if not is_sharded_by_rows(like):
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return from_rows(x[chunk(x.shape[0], mesh.size(), mesh.get_local_rank())], x.shape, mesh)


def map_whole(
    parameters: Sequence[Tensor],
    matrix_of: Callable[[Tensor], Tensor],
    function: Callable[[Tensor, Tensor], Tensor],
    shape_of: Callable[[Tensor], Shape],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Apply a function to whole matrices, each on one rank only, and shard the results by rows.

    Sharded matrices are processed in rounds of as many as there are ranks. The most expensive come first, so that those
    of one round take about as long. In a round every rank gathers one matrix, computes, and sends every other rank its
    rows of the result. So a rank has at most one whole matrix, and each matrix is computed once.

    Args:
        parameters: The same on all ranks.
        matrix_of: Returns the matrix of a parameter, plain or sharded by rows as this is. Called once for each.
        function: Returns the result for a parameter and its whole matrix, which is a plain tensor.
        shape_of: Returns the shape of the result.

    Yields:
        Each parameter with its result, of the matrix's dtype: plain if the parameter is, else sharded by rows.
    """
    for p in parameters:
        if not is_dtensor(p):
            matrix = matrix_of(p)
            yield p, function(p, matrix).to(matrix.dtype)
    sharded = [p for p in parameters if is_dtensor(p)]
    if not sharded:
        return
    sharded.sort(key=lambda p: p.numel() * min(p.shape), reverse=True)  # the cost of a decomposition
    mesh = sharded[0].device_mesh
    for first in range(0, len(sharded), mesh.size()):
        yield from _round(sharded[first : first + mesh.size()], mesh, matrix_of, function, shape_of)


def _round(
    owned: "list[DTensor]",
    mesh: DeviceMesh,
    matrix_of: Callable[[Tensor], Tensor],
    function: Callable[[Tensor, Tensor], Tensor],
    shape_of: Callable[[Tensor], Shape],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Do one round of :func:`map_whole`, in which rank i computes the i-th matrix."""
    group, rank = mesh.get_group(), mesh.get_local_rank()
    mine = owned[rank] if rank < len(owned) else None  # the last round may have fewer matrices than there are ranks
    # Gather: rank i receives all rows of matrix i.
    matrices = [matrix_of(p) for p in owned]
    pieces, dtype = [local(matrix).contiguous() for matrix in matrices], matrices[0].dtype
    whole = pieces[0].new_empty(matrices[rank].shape) if mine is not None else None
    matrices.clear()
    _exchange(pieces, whole, group, to_owner=True)
    pieces.clear()
    # Compute.
    result = None
    if mine is not None and whole is not None:
        result = function(mine, whole).to(dtype).contiguous()
    del whole
    # Scatter: rank i sends every rank its rows of result i.
    shapes = [torch.Size(shape_of(p)) for p in owned]
    parts = []
    for shape in shapes:
        rows = chunk(shape[0], mesh.size(), rank)
        parts.append(torch.empty(rows.stop - rows.start, shape[1], dtype=dtype, device=owned[0].device))
    _exchange(parts, result, group, to_owner=False)
    del result
    for p, shape in zip(owned, shapes, strict=True):
        yield p, from_rows(parts.pop(0), shape, mesh)


def _exchange(parts: list[Tensor], whole: Tensor | None, group: ProcessGroup, to_owner: bool) -> None:
    """Send rows between each matrix's owner, which is rank i for matrix i, and all ranks.

    Args:
        parts: This rank's rows of each matrix.
        whole: The matrix that this rank owns, if any.
        group: The ranks.
        to_owner: Fill ``whole`` from the parts of all ranks; else fill ``parts`` from the whole matrices of all ranks.
    """
    rank, ranks = group.rank(), group.size()
    operations = []
    for other in range(ranks):
        if whole is not None:
            theirs = whole[chunk(whole.shape[0], ranks, other)]
            if other == rank:
                source, target = (parts[rank], theirs) if to_owner else (theirs, parts[rank])
                target.copy_(source)
            elif theirs.numel():
                operations.append(P2POp(dist.irecv if to_owner else dist.isend, theirs, group=group, group_peer=other))
        if other != rank and other < len(parts) and parts[other].numel():
            send_or_receive = dist.isend if to_owner else dist.irecv
            operations.append(P2POp(send_or_receive, parts[other], group=group, group_peer=other))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def gather_on_first(rows: Rows, mesh: DeviceMesh | None) -> Tensor:
    """Gather a matrix on the first rank of a mesh, in the CPU's memory.

    Args:
        rows: This rank's rows of the matrix, on any device.
        mesh: The ranks; None if every rank has all rows.

    Returns:
        The matrix. On the other ranks, one without rows.
    """
    if mesh is None:
        return rows.part
    device = torch.device(mesh.device_type)
    first = mesh.get_local_rank() == 0
    part = rows.part.to(device)
    whole = part.new_empty(rows.total, part.shape[1]) if first else None
    _exchange([part], whole, mesh.get_group(), to_owner=True)
    return whole.cpu() if whole is not None else part[:0].cpu()
