"""Turn a traced step into the kernels that a device runs: one for each operation, or joined as by a compiler."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from cola_lightning.costs.operations import Operation, Tile
from cola_lightning.costs.trace import Section

SLOW = ("exp", "softmax", "silu", "sigmoid", "log")
"""Parts of the names of operations that compute exponentials."""


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: The operation's, or ``fused``.
        flops: FLOPs of a product or of attention.
        bytes: Bytes that it reads and writes.
        operations: Operations that it does.
        itemsize: Bytes of a number.
        product: Sizes of a product.
        causal: Whether it is attention with a causal mask.
        length: Tokens of a row, of attention.
        slow: Whether it computes exponentials.
    """

    name: str
    flops: float
    bytes: float
    operations: int
    itemsize: int
    product: Tile | None = None
    causal: bool = False
    length: int = 0
    slow: bool = False

    @property
    def is_attention(self) -> bool:
        return "attention" in self.name


def alone(operation: Operation) -> Kernel:
    """Make the kernel of one operation."""
    slow = any(part in operation.name for part in SLOW)
    return Kernel(
        operation.name.removeprefix("aten::"),
        operation.flops,
        operation.bytes,
        1,
        operation.itemsize,
        operation.product,
        operation.causal,
        operation.length,
        slow,
    )


def eager(sections: list[Section]) -> list[list[Kernel]]:
    """Return the kernels of each section, one for each operation."""
    return [[alone(operation) for operation in section.operations] for section in sections]


def compiled(sections: list[Section]) -> list[list[Kernel]]:
    """Return the kernels of each section as ``torch.compile`` makes them, which compiles each section by itself.

    Operations without products are joined if one reads what the other wrote or read, and no product stands between
    them. Of what is written inside, memory sees only what a product reads, or another group of the same pass. What the
    backward pass reads of the forward pass's other tensors, it computes again from what is kept, at no cost in bytes.

    Example: h = silu(gate) * up; y = h @ W. One kernel reads gate and up, and writes h. silu(gate) is never written.
    In the backward pass one kernel reads gate, up and the gradient of h, and writes two gradients.
    """
    grouped = [_group(index, section) for index, section in enumerate(sections)]
    size: dict[int, int] = defaultdict(int)
    readers: dict[int, set[tuple[bool, object]]] = defaultdict(set)
    for section, groups in zip(sections, grouped, strict=True):
        for key, operations in groups:
            for operation in operations:
                for number, count in operation.reads + operation.writes:
                    size[number] = max(size[number], count)
                for number, _ in operation.reads:
                    # A product reads memory in any case. Its pass does not matter, so that it counts for both.
                    whoever = {(section.backward, key)}
                    if not operation.can_fuse:
                        whoever = {(False, key), (True, key)}
                    readers[number] |= whoever
    never_written: set[int] = set()
    result = []
    for section, groups in zip(sections, grouped, strict=True):
        kernels = []
        for key, operations in groups:
            if not operations[0].can_fuse:
                kernels.append(alone(operations[0]))
                continue
            written = {number for operation in operations for number, _ in operation.writes}
            kept = {n for n in written if any(p == section.backward and k != key for p, k in readers[n])}
            before = _total((operation.reads for operation in operations), size)
            first_written: set[int] = set()
            inputs = set()
            for operation in operations:
                inputs |= {number for number, _ in operation.reads if number not in first_written}
                first_written |= {number for number, _ in operation.writes}
            read = sum(before[number] for number in inputs if number not in never_written)
            out = _total((operation.writes for operation in operations), size)
            write = sum(out[number] for number in kept)
            never_written |= written - kept
            never_written -= kept
            if read + write:
                slow = any(part in operation.name for operation in operations for part in SLOW)
                itemsize = operations[0].itemsize
                kernels.append(Kernel("fused", 0, read + write, len(operations), itemsize, slow=slow))
        result.append(kernels)
    return result


def _total(parts: Iterable[tuple[tuple[int, int], ...]], size: dict[int, int]) -> dict[int, int]:
    """Add up bytes by storage. A storage counts once, even if several operations cover it."""
    total: dict[int, int] = defaultdict(int)
    for part in parts:
        for number, count in part:
            total[number] = min(size[number], total[number] + count)
    return total


def _group(index: int, section: Section) -> list[tuple[object, list[Operation]]]:
    """Split a section's operations into products, each by itself, and groups that one kernel can do.

    The level of a tensor is the number of products on its longest path from the section's inputs. Operations are
    joined only on one level, because a product stands between two levels.
    """
    level: dict[int, int] = defaultdict(int)
    parent: list[int] = []
    members: list[list[Operation]] = []
    owner: dict[tuple[int, int], int] = {}

    def find(group: int) -> int:
        while parent[group] != group:
            group = parent[group]
        return group

    for operation in section.operations:
        here = max((level[number] for number, _ in operation.reads), default=0)
        group = len(parent)
        parent.append(group)
        members.append([operation])
        if not operation.can_fuse:
            for number, _ in operation.writes:
                level[number] = here + 1
            continue
        for number, _ in operation.reads + operation.writes:
            other = find(owner.setdefault((number, here), group))
            if other != find(group):
                first, second = sorted((other, find(group)))
                members[first] += members[second]
                members[second] = []
                parent[second] = first
        for number, _ in operation.writes:
            level[number] = here
    return [((index, group), operations) for group, operations in enumerate(members) if operations]
