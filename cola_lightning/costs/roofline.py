"""Predict the seconds of a kernel on a device, and what bounds it."""

import math

from cola_lightning.costs.devices import ATTENTION_BLOCK, SPLITS, TILE_START, TILES, Device
from cola_lightning.costs.kernels import Kernel
from cola_lightning.costs.operations import Tile


def kernel_seconds(kernel: Kernel, device: Device, backward: bool, pads: bool) -> tuple[float, str]:
    """Return the seconds of a kernel, and what bounds it: ``products``, ``attention``, ``memory`` or ``launch``.

    Args:
        kernel: The kernel.
        device: Where it runs.
        backward: Whether it runs in the backward pass.
        pads: Whether rows of a bad alignment are copied to aligned ones if that is faster, as ``torch.compile`` does.
    """
    moving = kernel.bytes / device.bandwidth
    if kernel.slow:
        moving = max(moving, kernel.bytes / kernel.itemsize / device.slow.get("exp", math.inf))
    computing, name = 0.0, "products"
    if kernel.product is not None:
        computing = product_seconds(kernel.product, kernel.itemsize, device)
        slowdown = 1 / alignment_share(kernel.product, device)
        if slowdown > 1:
            # Padding reads and writes every matrix once.
            padded = computing + 2 * kernel.bytes / device.bandwidth
            computing = min(padded, computing * slowdown) if pads else computing * slowdown
    elif kernel.is_attention:
        name = "attention"
        computing = attention_seconds(kernel, device, backward)
    elif kernel.flops:
        computing = kernel.flops / (device.peak[4] * device.sustained)
    longest, bound = max((computing, name), (moving, "memory"))
    return (longest + device.launch, bound) if longest > device.launch else (2 * device.launch, "launch")


def product_seconds(tile: Tile, itemsize: int, device: Device) -> float:
    """Predict the seconds of an aligned product by its FLOPs alone.

    On a GPU each multiprocessor computes one tile of the result at a time. The last round may leave most of them idle:
    133 tiles take two rounds on 132 multiprocessors. A library picks the tile that is the fastest.
    """
    speed = device.peak[min(4, max(2, itemsize))] * device.sustained
    if not device.multiprocessors:
        thinnest = min(tile.m, tile.n, tile.k)
        return tile.batch * 2 * tile.m * tile.n * tile.k / speed * (1 + device.thin.get(itemsize, 0) / thinnest)
    fastest = math.inf
    for rows, columns, share in TILES:
        tiles = tile.batch * math.ceil(tile.m / rows) * math.ceil(tile.n / columns)
        for parts in SPLITS:
            if parts > 1 and tile.k / parts < 2 * TILE_START:
                break
            rounds = math.ceil(tiles * parts / device.multiprocessors)
            work = 2 * rows * columns * (tile.k / parts + TILE_START)
            seconds = rounds * work / (speed * share / device.multiprocessors)
            if parts > 1:  # the parts are written and added up in float32
                seconds += tile.batch * tile.m * tile.n * 4 * 2 * parts / device.bandwidth
            fastest = min(fastest, seconds)
    return fastest


def alignment_share(tile: Tile, device: Device) -> float:
    """Return the speed of a product as a share of that with aligned rows."""
    if not device.multiprocessors or tile.alignment >= 16:
        return 1
    if tile.alignment <= 2 and tile.only_result:
        return device.misaligned_result
    return device.misaligned[max(2, tile.alignment)]


def attention_seconds(kernel: Kernel, device: Device, backward: bool) -> float:
    """Predict the seconds of an attention kernel by its FLOPs.

    A causal mask leaves half of the scores, and the other half of the blocks on the diagonal.
    """
    share = (1 + min(1.0, ATTENTION_BLOCK / kernel.length)) / 2 if kernel.causal and kernel.length else 1
    return kernel.flops * share / device.attention[backward]
