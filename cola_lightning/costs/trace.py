"""Count the FLOPs and the memory of a training step by running it on fake tensors.

Fake tensors have a shape, a type and a size, but no content. The operations are therefore those of a real step, with
any projection and any activation checkpointing, but nothing is computed and no memory is taken. At most three layers
are traced. In a deeper network, the third counts once more for each layer that was not.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.costs.counters import Recorder
from cola_lightning.costs.fake_network import TRACED, Build, build_on_meta, default_dtype, fuse_norms, make_fake
from cola_lightning.costs.operations import Operation
from cola_lightning.models import Llama
from cola_lightning.private_apis.torch import fake_tensors
from cola_lightning.training.losses import next_token_losses

Transforms = tuple[Callable[[Llama], None], ...]


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step over B rows of T tokens. A multiply-add counts as two, and attention as if it were not causal.

    With P parameters in matrices (projections and head) and L layers, the forward pass has B T (2 P + 4 L T D) FLOPs. A
    backward pass without recompute has twice as many.

    Attributes:
        forward: Forward pass.
        backward: Backward pass, without recompute.
        recomputed: FLOPs that the backward pass computes a second time: by activation checkpointing, and within the
            attention kernel, which always recomputes its scores (2 B T² D per layer).
    """

    forward: float
    backward: float
    recomputed: float

    @property
    def model(self) -> float:
        """FLOPs without recompute, as MFU counts them."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """FLOPs that the device carries out, as HFU counts them."""
        return self.model + self.recomputed


@dataclass(frozen=True)
class Kept:
    """Bytes of a step, without weights, gradients and optimizer states.

    Attributes:
        activations: Bytes that embedding and layers keep from the forward to the backward pass.
        logits: The most that final norm, head and loss need in addition, in either pass.
        layers: The most that the layers' backward pass needs in addition to the activations. The logits are freed by
            then.
    """

    activations: float
    logits: float
    layers: float

    @property
    def peak(self) -> float:
        return self.activations + max(self.logits, self.layers)


@dataclass(frozen=True)
class _Mark:
    """Counts at the boundary of a layer: bytes that are alive, and FLOPs and operations since the step began."""

    live: int
    flops: int
    operations: int


@dataclass(frozen=True)
class Section:
    """Operations of a part of the network in one pass.

    Attributes:
        part: ``embedding``, ``layer``, or ``head`` (final norm, head and loss).
        backward: Whether it is the backward pass, with what that computes again.
        times: How often the whole network runs it.
        operations: What it runs, in its order.
    """

    part: str
    backward: bool
    times: int
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Trace:
    """Counts of a traced step, and what follows from them for the whole network.

    Attributes:
        layers: Layers of the whole network (L); at most ``TRACED`` of them were traced.
        forward_marks: Counts of the forward pass before each traced layer, and before the final norm.
        end: Counts after the forward pass.
        backward_marks: Counts of the backward pass at the same places, in its order: at the final norm first.
        last: Counts after the backward pass.
        peaks: The most bytes that were alive in the forward pass; in the backward pass of head and final norm; and in
            that of the layers.
        attention_backward: FLOPs of attention in the backward pass of the traced layers.
        autocast_cache_bytes: Copies of weights that autocast keeps until the forward pass ends.
        operations: What both passes ran, in their order.
        gradients: Numbers of the storages of the parameters' gradients.
    """

    layers: int
    forward_marks: list[_Mark]
    end: _Mark
    backward_marks: list[_Mark]
    last: _Mark
    peaks: tuple[int, int, int]
    attention_backward: float
    autocast_cache_bytes: int
    operations: tuple[Operation, ...] = ()
    gradients: frozenset[int] = frozenset()

    @property
    def sections(self) -> list[Section]:
        """Operations by part of the network and pass. The last traced layer counts for those that were not traced."""
        # Each mark says how many operations had run, so the marks are bounds of slices of ``operations``. Example with
        # two layers: 2 had run before layer 1, 10 before layer 2, 18 before the norm, 20 at the end of the forward
        # pass. Then 0 to 2 are the embedding's, 2 to 10 and 10 to 18 the layers', 18 to 20 the head's. The backward
        # pass goes on from 20, in the opposite order: head, layer 2, layer 1, embedding.
        layers = len(self.forward_marks) - 1
        forward = [0, *(mark.operations for mark in self.forward_marks), self.end.operations]
        backward = [self.end.operations, *(mark.operations for mark in self.backward_marks), self.last.operations]
        parts = ["embedding", *["layer"] * layers, "head"]
        found = []
        for bounds, names, last, is_backward in (
            (forward, parts, layers, False),  # the last layer is the last before the head
            (backward, parts[::-1], 1, True),  # the last layer is the first after the head
        ):
            for index, name in enumerate(names):
                operations = self.operations[bounds[index] : bounds[index + 1]]
                times = 1 + self._more if index == last else 1
                found.append(Section(name, is_backward, times, operations))
        return found

    @property
    def _more(self) -> int:
        """Layers that were not traced."""
        return self.layers - min(self.layers, TRACED)

    @cached_property
    def forward_flops(self) -> float:
        """FLOPs of the forward pass of the whole network."""
        return self.end.flops + self._more * self._layer_forward_flops

    @cached_property
    def step_flops(self) -> float:
        """FLOPs of both passes of the whole network, recompute included."""
        # The first two marks of the backward pass enclose the last layer.
        layer = self._layer_forward_flops + self.backward_marks[1].flops - self.backward_marks[0].flops
        return self.last.flops + self._more * layer

    @property
    def _layer_forward_flops(self) -> int:
        # The last two marks of the forward pass enclose the last layer: before it, and before the final norm.
        return self.forward_marks[-1].flops - self.forward_marks[-2].flops

    @property
    def attention_backward_flops(self) -> float:
        """FLOPs of attention in the backward pass of the whole network."""
        return self.attention_backward * self.layers / min(self.layers, TRACED)

    @property
    def kept(self) -> Kept:
        """Bytes of the whole network.

        Example: 8 layers, of which 3 are traced. Before layers 1, 2, 3 and the final norm, 10, 14, 18 and 22 MB are
        alive, 3 MB of them autocast's copies of weights (1 MB per layer). So a layer adds 18 - 14 = 4 MB in the forward
        pass, and keeps 3 MB for the backward pass. The 8 layers keep 22 - 3 + 5 * 3 = 34 MB.
        """
        # What a middle layer adds: from its own entry to that of the next. No layer is missing in a network of three.
        layer = self.forward_marks[-2].live - self.forward_marks[-3].live if self._more else 0
        # Autocast keeps its copies of the weights until the forward pass ends, also if no layer saves them. In the
        # example, a layer that was not traced adds 4 MB to the peak of the forward pass and 3 MB to the later ones.
        copies = self.autocast_cache_bytes / min(self.layers, TRACED)
        in_forward, in_backward = self._more * layer, self._more * (layer - copies)
        activations = self.forward_marks[-1].live - self.autocast_cache_bytes + in_backward
        # The peaks are of the traced layers. Add what the missing ones hold at that time, and subtract the activations,
        # which are counted by themselves. In the example, let the peaks be 60 MB in the forward pass, 70 MB in the
        # head's backward pass and 40 MB in the layers'. The whole network reaches 60 + 5 * 4 = 80 and 70 + 5 * 3 = 85
        # MB, so the logits are 85 - 34 = 51 MB; and 40 + 5 * 3 = 55 MB, so the layers are 55 - 34 = 21 MB.
        forward, head, layers = self.peaks
        logits = max(forward + in_forward, head + in_backward) - activations
        return Kept(activations, logits, layers + in_backward - activations)


@lru_cache(maxsize=64)  # FLOPs, memory and speed of a run all ask for its trace
def trace(
    build: Build,
    layers: int,
    transforms: Transforms,
    batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    mask_documents: bool = False,
    fused_norm: bool = True,
) -> Trace:
    """Run one training step on fake tensors.

    Args:
        build: Makes the network; takes ``num_hidden_layers``.
        layers: Decoder layers of the whole network (L).
        transforms: Functions that change the network before it runs, such as activation checkpointing. They must not
            keep a reference to it.
        batch_size: Rows (B).
        sequence_length: Tokens of a row (T).
        dtype: Type of the weights.
        autocast: Type of the matrix products under mixed precision; None for that of the weights.
        mask_documents: Tokens attend only to their own document.
        fused_norm: RMSNorm is one kernel, as on GPUs. On a CPU it is several, which keep more.
    """
    network = build_on_meta(build, layers, dtype)
    with ExitStack() as stack:
        stack.enter_context(fake_tensors())
        stack.enter_context(default_dtype(dtype))
        make_fake(network)
        for transform in transforms:
            transform(network)
        if fused_norm:
            fuse_norms(network)
        ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids} | ({"document_ids": ids} if mask_documents else {})
        # Gradients are there from the beginning, so that they count as neither activations nor part of a peak.
        gradients: list[Tensor] = []
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                gradients.append(parameter.grad)
        known = [*network.parameters(), *network.buffers(), *gradients, ids]
        recorder = stack.enter_context(Recorder(known))
        # The CPU's autocast, whatever the device, because fake tensors of a GPU need a PyTorch that is built for it.
        products = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
        return _step(network, batch, products, layers, recorder)


def _step(network: Llama, batch: dict[str, Tensor], products: Any, layers: int, recorder: Recorder) -> Trace:
    """Run both passes, with a mark at each boundary of a layer.

    Args:
        network: On fake tensors.
        batch: ``input_ids`` and ``labels`` (B, T), and ``document_ids`` if documents are masked.
        products: Context of the forward pass: autocast.
        layers: Decoder layers of the whole network.
        recorder: Active; it counts what runs.
    """
    forward_marks: list[_Mark] = []
    backward_marks: list[_Mark] = []
    at_head: list[int] = []  # the peak of the head's backward pass, once it is over

    def mark() -> _Mark:
        return _Mark(recorder.live(), recorder.flops.total(), len(recorder.operations))

    def enter(module: nn.Module, args: tuple) -> None:
        """Mark the forward pass before a layer, and the backward pass when it has finished that layer."""
        forward_marks.append(mark())

        def arrived(gradient: Tensor) -> None:
            # The gradient of a layer's input is there: the layer's backward pass is over.
            if module is network.model.norm:
                # Now head and final norm are done. Their peak is kept, and the layers' begins.
                at_head.append(recorder.peak)
                recorder.peak = 0
            backward_marks.append(mark())

        if args[0].requires_grad:  # else it gets no gradient, and takes no hook
            args[0].register_hook(arrived)

    handles = [module.register_forward_pre_hook(enter) for module in (*network.model.layers, network.model.norm)]
    with products:
        total, kept = next_token_losses(network, batch, reduction="sum")
        loss = total / kept.sum().clamp(min=1)
        del total, kept  # so that only what the backward pass needs is alive
        inside = recorder.live()  # autocast's copies are alive here, and no longer after the context
    for handle in handles:
        handle.remove()
    forward_peak, recorder.peak = recorder.peak, 0  # what follows is the peak of the head's backward pass
    end = mark()
    loss.backward()
    attention = sum(n for name, n in recorder.flops.items() if "attention" in name and "backward" in name)
    peaks = forward_peak, at_head[0], recorder.peak  # the last is that of the layers, since the mark at the norm
    gradients = frozenset(recorder.number(p.grad) for p in network.parameters() if p.grad is not None)
    operations = tuple(recorder.operations)
    cache = inside - end.live
    return Trace(layers, forward_marks, end, backward_marks, mark(), peaks, attention, cache, operations, gradients)
