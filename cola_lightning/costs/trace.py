"""What a training step computes and keeps, found by running it without numbers.

Three layers of the network run on fake tensors, which have a shape, a type and a size but no content: the operations
are those of a real step, of any projection and any checkpointing policy, but none is carried out and no memory is
taken. The last of them then stands for all that follow.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.optim import Optimizer

from cola_lightning.costs.counters import Recorder
from cola_lightning.models import Llama
from cola_lightning.optim import Parameters
from cola_lightning.private_apis import fake_tensors
from cola_lightning.training.module import next_token_losses

Build = Callable[..., Llama]
Transforms = tuple[Callable[[Llama], None], ...]
TRACED = 3


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step over B rows of T tokens, a multiply-add counting as two, attention as if it were not causal.

    With P numbers in a token's matrix products (the projections' and the head's), L layers, forward is
    B T (2 P + 4 L T D), and a backward pass without recomputation twice as much.

    Attributes:
        forward: Forward pass.
        backward: Backward pass, without what it does a second time.
        recomputed: What backward does a second time: by the checkpointing policy, and within the attention kernel,
            which always forms its scores again (2 B T² D in a layer).
    """

    forward: float
    backward: float
    recomputed: float

    @property
    def model(self) -> float:
        """What the mathematics asks for; MFU is measured by it."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What the device carries out; HFU is measured by it."""
        return self.model + self.recomputed


@dataclass(frozen=True)
class Kept:
    """Bytes of a step besides weights, gradients and optimizer states.

    Attributes:
        activations: Alive between the forward and the backward pass of the decoder: embedding and layers.
        logits: What final norm, head and loss need on top of that, at most, in either pass.
        layers: What the layers' backward pass needs on top of the activations, at most. The logits are gone by then.
    """

    activations: float
    logits: float
    layers: float

    @property
    def peak(self) -> float:
        return self.activations + max(self.logits, self.layers)


@dataclass(frozen=True)
class _Mark:
    """Where a step stands at a layer's boundary."""

    live: int
    flops: int


@dataclass(frozen=True)
class Trace:
    """A traced step of ``TRACED`` layers; ``layers`` says how many the network has."""

    layers: int
    forward_marks: list[_Mark]
    end: _Mark
    backward_marks: list[_Mark]
    last: _Mark
    peaks: tuple[int, int, int]
    attention_backward: float
    autocast_cache_bytes: int

    @property
    def _more(self) -> int:
        return self.layers - min(self.layers, TRACED)

    @cached_property
    def forward_flops(self) -> float:
        return self.end.flops + self._more * self._layer_forward_flops

    @cached_property
    def step_flops(self) -> float:
        layer = self._layer_forward_flops + self.backward_marks[1].flops - self.backward_marks[0].flops
        return self.last.flops + self._more * layer

    @property
    def _layer_forward_flops(self) -> int:
        return self.forward_marks[-1].flops - self.forward_marks[-2].flops

    @property
    def attention_backward_flops(self) -> float:
        return self.attention_backward * self.layers / min(self.layers, TRACED)

    @property
    def kept(self) -> Kept:
        # Between the entries of two layers. With fewer than three there is nothing to go on from.
        layer = self.forward_marks[-2].live - self.forward_marks[-3].live if self._more else 0
        # Autocast holds on to its copies of the weights until the forward pass ends, also where no layer keeps them.
        in_forward, in_backward = (
            self._more * layer,
            self._more * (layer - self.autocast_cache_bytes / min(self.layers, TRACED)),
        )
        activations = self.forward_marks[-1].live - self.autocast_cache_bytes + in_backward
        forward, head, layers = self.peaks
        logits = max(forward + in_forward, head + in_backward) - activations
        return Kept(activations, logits, layers + in_backward - activations)


@lru_cache(maxsize=64)
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
        layers: Decoder layers of the whole network.
        transforms: What is done to the network before it runs, such as a checkpointing policy; it must not hold on to
            the network.
        batch_size: Rows (B).
        sequence_length: Tokens of a row (T).
        dtype: Of the weights.
        autocast: Of the matrix products, under mixed precision.
        apart: Attention keeps to its own document.
        fused_norm: RMSNorm is one kernel, as on GPUs; on a CPU it is several, which keep more.
    """
    with ExitStack() as stack:
        stack.enter_context(fake_tensors())
        stack.enter_context(default_dtype(dtype))
        network = build(num_hidden_layers=min(layers, TRACED))
        for transform in transforms:
            transform(network)
        for norm in (module for module in network.modules() if fused_norm and isinstance(module, nn.RMSNorm)):
            norm.forward = lambda x, norm=norm: _FusedNorm.apply(x, norm.weight)
        ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids} | ({"document_ids": ids} if mask_documents else {})
        trained = [p for p in network.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        known = [*network.parameters(), *network.buffers(), *(p.grad for p in trained), ids]
        recorder = stack.enter_context(Recorder(known))
        # The CPU's autocast, whatever the device: fake tensors of others need a PyTorch that is built for them.
        products = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
        return _step(network, batch, products, layers, recorder)


def _step(network: Llama, batch: dict[str, Tensor], products: Any, layers: int, recorder: Recorder) -> Trace:
    forward_marks: list[_Mark] = []
    backward_marks: list[_Mark] = []
    at_head: list[int] = []

    def mark() -> _Mark:
        return _Mark(recorder.live(), recorder.flops.total())

    def enter(module: nn.Module, args: tuple) -> None:
        """Note where the forward pass stands before a layer, and the backward pass when it has come down there."""
        forward_marks.append(mark())

        def arrived(gradient: Tensor) -> None:
            if module is network.model.norm:
                at_head.append(recorder.peak)
                recorder.peak = 0
            backward_marks.append(mark())

        if args[0].requires_grad:
            args[0].register_hook(arrived)

    handles = [module.register_forward_pre_hook(enter) for module in (*network.model.layers, network.model.norm)]
    with products:
        total, kept = next_token_losses(network, batch, reduction="sum")
        loss = total / kept.sum().clamp(min=1)
        del total, kept
        inside = recorder.live()
    for handle in handles:
        handle.remove()
    forward_peak, recorder.peak = recorder.peak, 0
    end = mark()
    loss.backward()
    attention = sum(n for name, n in recorder.flops.items() if "attention" in name and "backward" in name)
    peaks = forward_peak, at_head[0], recorder.peak
    return Trace(layers, forward_marks, end, backward_marks, mark(), peaks, attention, inside - end.live)


class _FusedNorm(Function):
    """RMSNorm as GPUs run it, in shapes and sizes: the kernel keeps its input and one float32 number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@dataclass(frozen=True)
class OptimizerStates:
    """What an optimizer needs.

    Attributes:
        size: Bytes of its states.
        temporary: Copies of the trained parameters that its step makes for a moment: one where it works on all of them
            at once (``foreach``, PyTorch's default on GPUs), none where it is fused or goes one by one.
        traced: Whether this was found by a step on fake tensors. It is not for an optimizer that looks at numbers to
            decide what to do; then two states a parameter are assumed, as Adam has.
    """

    size: float
    temporary: int
    traced: bool


def optimizer_states(
    build: Build, layers: int, make_optimizer: Callable[..., Optimizer], dtype: torch.dtype
) -> OptimizerStates:
    """Make a step on fake parameters of ``dtype`` and see what the optimizer holds afterwards."""
    with fake_tensors(), default_dtype(dtype):
        network = build(num_hidden_layers=min(layers, TRACED))
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer = make_optimizer(Parameters(network))
        settings = optimizer.defaults
        temporary = int("foreach" in settings and settings["foreach"] is not False and not settings.get("fused"))
        try:
            optimizer.step()
            traced = True
        except RuntimeError:
            traced = False
        more = 1 + layers - min(layers, TRACED)
        last = set(network.model.layers[-1].parameters())
        size = 0.0
        for parameter in network.parameters():
            if not traced:
                own = 2 * parameter.numel() * parameter.element_size() * parameter.requires_grad
            else:
                states = optimizer.state.get(parameter, {}).values()
                own = sum(state.untyped_storage().nbytes() for state in states if isinstance(state, Tensor))
            size += own * (more if parameter in last else 1)
        return OptimizerStates(size, temporary, traced)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have weights of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
