"""Predict the speed of a run: seconds of a step by part and by what bounds it, tokens per second, and MFU."""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from cola_lightning.costs.collectives import Communication, communication
from cola_lightning.costs.devices import NETWORKS, Device, Network
from cola_lightning.costs.kernels import Kernel, alone, compiled, eager
from cola_lightning.costs.roofline import kernel_seconds
from cola_lightning.costs.run_costs import Run
from cola_lightning.costs.trace import Section


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: ``embedding``, ``layers``, ``head and loss`` with the pass, ``optimizer`` or ``communication``.
        seconds: Seconds of an optimizer step.
        bounds: Share of these by what bounds them: products, attention, memory, launch, host, network.
        flops: FLOPs of its products and attention.
    """

    name: str
    seconds: float
    bounds: dict[str, float] = field(default_factory=dict)
    flops: float = 0

    @property
    def bound(self) -> str:
        """Return what bounds most of its time."""
        return max(self.bounds, key=lambda name: self.bounds[name], default="")


@dataclass(frozen=True)
class Speed:
    """Predicted speed of a run.

    Attributes:
        device: The device.
        parts: Parts of an optimizer step.
        tokens: Tokens of an optimizer step of all GPUs.
        model_flops: FLOPs of an optimizer step on one GPU, as MFU counts them.
        peak: FLOP/s of the device, in the type of the products.
        gpus: Number of GPUs.
        communication: Collectives, with what is hidden.
        products: Seconds of a micro-batch by product, with its sizes, over all layers.
    """

    device: Device
    parts: list[Part]
    tokens: float
    model_flops: float
    peak: float
    gpus: int
    communication: Communication
    products: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs, padding included."""
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        return self.model_flops / self.step_seconds / self.peak


NAMES = {"embedding": "embedding", "layer": "layers", "head": "head and loss"}


def predict(run: Run, device: Device, network: Network = NETWORKS[0]) -> Speed:
    """Predict the speed of a run.

    Args:
        run: The run.
        device: The device of each rank.
        network: Network between nodes of eight GPUs.
    """
    sections, accumulations = _split(run)
    kernels = compiled(sections) if run.compiled else eager(sections)
    micro_batches = run.micro_batches
    parts: list[Part] = []
    totals = {False: 0.0, True: 0.0}
    products: dict[str, float] = defaultdict(float)
    for backward in (False, True):
        merged: dict[str, list[tuple[int, list[Kernel]]]] = {}
        for section, its in zip(sections, kernels, strict=True):
            if section.backward == backward:
                merged.setdefault(section.part, []).append((section.times, its))
        for part, runs in merged.items():
            made, shapes = _part(NAMES[part] + (", backward" if backward else ", forward"), runs, run, device, backward)
            parts.append(made)
            for shape, seconds in shapes.items():
                products[shape] += seconds
        own = [part for part in parts if part.name.endswith("backward" if backward else "forward")]
        totals[backward] = sum(part.seconds for part in own)
    parts = [replace(part, seconds=part.seconds * micro_batches, flops=part.flops * micro_batches) for part in parts]
    if micro_batches > 1:
        adding, _ = _part("adding gradients", [(micro_batches - 1, accumulations)], run, device, True)
        parts.append(adding)
    parts.append(_optimizer(run, device))
    exchanged = communication(run, device, network, totals[False], totals[True], micro_batches)
    if run.gpus > 1:
        parts.append(Part("communication, exposed", exchanged.exposed, {"network": exchanged.exposed}))
    itemsize = (run.layout.autocast or run.layout.computed).itemsize
    return Speed(
        device,
        parts,
        run.tokens_per_step,
        run.flops.model * micro_batches,
        device.peak[min(4, max(2, itemsize))],
        run.gpus,
        exchanged,
        dict(products),
    )


def _split(run: Run) -> tuple[list[Section], list[Kernel]]:
    """Separate what adds gradients to those of earlier micro-batches, which the first micro-batch does not do."""
    traced = run.traced
    sections, adding = [], []
    for section in traced.sections:
        kept = []
        for operation in section.operations:
            written = {number for number, _ in operation.writes}
            if operation.name == "aten::add_" and written & traced.gradients:
                adding += [alone(operation)] * section.times
            else:
                kept.append(operation)
        sections.append(replace(section, operations=tuple(kept)))
    return sections, adding


def _part(
    name: str, runs: list[tuple[int, list[Kernel]]], run: Run, device: Device, backward: bool
) -> tuple[Part, dict[str, float]]:
    """Add up the kernels of a part of the network.

    The processor runs ahead of the GPU. So a part takes as long as the slower of the two.
    """
    bounds: dict[str, float] = defaultdict(float)
    products: dict[str, float] = defaultdict(float)
    host = flops = 0.0
    for times, kernels in runs:
        for kernel in kernels:
            seconds, bound = kernel_seconds(kernel, device, backward, pads=run.compiled)
            bounds[bound] += times * seconds
            flops += times * kernel.flops
            if kernel.product is not None:
                tile = kernel.product
                products[f"{tile.m} x {tile.k} x {tile.n}, {tile.alignment} bytes"] += times * seconds
        if run.compiled:
            host += times * (len(kernels) * device.host_compiled + device.host_graph)
        else:
            host += times * len(kernels) * device.host_eager
    busy = sum(bounds.values())
    if host > busy:
        bounds["host"] += host - busy
    return Part(name, max(busy, host), dict(bounds), flops), products


def _optimizer(run: Run, device: Device) -> Part:
    """Predict clipping and the optimizer's step, on this GPU's share of the parameters."""
    step, share = run.optimizer_step, run.layout.optimizer or 1 / run.gpus
    bounds: dict[str, float] = defaultdict(float)
    trained = run.parameters.total.trained
    width = run.layout.dtype.itemsize
    for operation in step.operations:
        seconds, bound = kernel_seconds(alone(operation), device, False, False)
        bounds[bound] += seconds * step.share * share
    if not step.traced:  # reads weights, gradients and two states, and writes all but the gradients
        bounds["memory"] += 7 * width * trained * share / device.bandwidth
    if run.clips:  # the norm reads the gradients; scaling reads and writes them
        bounds["memory"] += 3 * width * trained * run.layout.gradients / device.bandwidth
    return Part("optimizer" + (" and clipping" if run.clips else ""), sum(bounds.values()), dict(bounds))
