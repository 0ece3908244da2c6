"""Predict the seconds that the GPUs of a run spend on collectives, and how much of it computation hides."""

import math
from dataclasses import dataclass, replace

from cola_lightning.costs.devices import NODE_GPUS, NVLINK_SHARE, Device, Network
from cola_lightning.costs.run_costs import Run

BUCKET = 25 * 2**20
"""Bytes of a bucket of gradients of DDP (``bucket_cap_mb`` in its documentation). The last one is sent when nothing is
left to compute."""
RING_START, RING_STEP = 10e-6, 1.9e-6
"""Seconds that a ring over NVLink takes at least, and for each further GPU: NCCL's own model, by which it chooses
between its algorithms (NVIDIA/nccl, src/graph/tuning.cc, ``baseLat`` and ``hwLat`` of protocol LL128)."""
TREE_START, TREE_STEP = 4.4e-6, 1.2e-6
"""The same of a tree, which only an all-reduce can use."""


@dataclass(frozen=True)
class Communication:
    """Seconds of collectives in an optimizer step.

    Attributes:
        kind: What is exchanged, in words.
        seconds: All of it.
        exposed: What computation does not hide.
    """

    kind: str
    seconds: float = 0
    exposed: float = 0


def bus_bandwidth(gpus: int, device: Device, network: Network) -> float:
    """Return the bytes per second at which a ring passes through each GPU.

    Within a node that is the link's. Between nodes the rings share the node's network, which each of them enters once.
    """
    if gpus <= NODE_GPUS:
        return device.link
    return min(device.link, network.bandwidth * NVLINK_SHARE)


def ring_latency(gpus: int, network: Network) -> float:
    """Return the seconds of an all-gather or a reduce-scatter that sends nothing: a step for each further GPU."""
    nodes = math.ceil(gpus / NODE_GPUS)
    return RING_START + (gpus - nodes) * RING_STEP + (nodes - 1) * network.ring


def tree_latency(gpus: int, network: Network) -> float:
    """Return the seconds of an all-reduce over a tree that sends nothing: up and down, a chain in each node."""
    nodes = math.ceil(gpus / NODE_GPUS)
    return TREE_START + 2 * ((min(gpus, NODE_GPUS) - 1) * TREE_STEP + math.log2(nodes) * network.tree)


def gather_seconds(size: float, gpus: int, device: Device, network: Network, calls: float = 1) -> float:
    """Predict the seconds of an all-gather or a reduce-scatter of ``size`` bytes in all, in ``calls`` collectives.

    (N - 1) / N of the bytes pass through each GPU.
    """
    if gpus == 1:
        return 0
    return size * (gpus - 1) / gpus / bus_bandwidth(gpus, device, network) + calls * ring_latency(gpus, network)


def reduce_seconds(size: float, gpus: int, device: Device, network: Network, calls: float = 1) -> float:
    """Predict the seconds of an all-reduce, which moves as many bytes as a reduce-scatter and an all-gather."""
    if gpus == 1:
        return 0
    least = min(2 * ring_latency(gpus, network), tree_latency(gpus, network))
    return 2 * gather_seconds(size, gpus, device, network, 0) + calls * least


def communication(
    run: Run, device: Device, network: Network, forward: float, backward: float, micro_batches: int
) -> Communication:
    """Predict the collectives of an optimizer step.

    Args:
        run: The run. Its memory layout says what is sharded, and thereby what is exchanged.
        device: The GPUs.
        network: The network between nodes.
        forward: Seconds of the computation of a forward pass.
        backward: Seconds of that of a backward pass.
        micro_batches: Micro-batches of an optimizer step.
    """
    gpus = run.gpus
    if gpus == 1:
        return Communication("none")
    shares = replace(run, gpus=2).layout  # one of two GPUs: what is sharded has a share of a half
    total, layers = run.parameters.total, run.layers
    weights = run.layout.computed.itemsize * total.parameters
    gradients = run.layout.dtype.itemsize * total.trained

    def seconds(size: float, calls: float) -> float:
        return gather_seconds(size, gpus, device, network, calls)

    if shares.weights < 1:
        # Each layer is gathered while the one before computes, in both passes, and its gradients are scattered while
        # the next computes. The first gather and the last scatter wait: embedding or head, and a layer.
        gather, scatter = seconds(weights, layers + 1), seconds(gradients, layers + 1)
        ends = 2 / (layers + 1) * gather + scatter / (layers + 1)
        hidden = max(0, gather - forward) + max(0, gather + scatter - backward)
        exposed = max(ends, hidden)
        return Communication(
            "weights gathered twice, gradients scattered",
            micro_batches * (2 * gather + scatter),
            micro_batches * exposed,
        )
    if shares.optimizer < 1:
        # Gradients are reduced during the last backward pass; the weights are gathered after the step, and nothing
        # computes meanwhile. ZeRO-2 reduces them in every micro-batch.
        times = micro_batches if shares.gradients < 1 else 1
        reduce = seconds(gradients, math.ceil(gradients / BUCKET))
        gather = seconds(weights, 1)
        exposed = times * max(reduce * min(1.0, BUCKET / gradients), reduce - backward) + gather
        return Communication("gradients reduced, weights gathered after the step", times * reduce + gather, exposed)
    buckets = math.ceil(gradients / BUCKET)
    reduce = reduce_seconds(gradients, gpus, device, network, buckets)
    # The last bucket holds the embedding's gradient, which is ready at the very end.
    end = min(gradients, max(BUCKET, 2 * run.parameters.parts["embedding"].trained))
    last = reduce_seconds(end, gpus, device, network)
    return Communication("gradients reduced", reduce, max(last, reduce - backward))
