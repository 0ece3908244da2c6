"""Predict the costs of a run: parameters, FLOPs, memory of a GPU, days."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from cola_lightning.costs.gpus import Gpu
from cola_lightning.costs.memory_layout import MemoryLayout, memory_layout
from cola_lightning.costs.optimizer_states import OptimizerStates, optimizer_states
from cola_lightning.costs.parameters import Parameters, count_parameters
from cola_lightning.costs.trace import Flops, Kept, Trace, Transforms, trace
from cola_lightning.errors import InputError
from cola_lightning.models import Llama, LlamaConfig
from cola_lightning.training.module import LanguageModel


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU at the peak of a step, by their use.

    Attributes:
        weights, gradients, optimizer: This GPU's share of each.
        buffers: Gradient buckets, and weights that sharding gathers.
        activations: Tensors that the layers keep from the forward to the backward pass.
        logits: Bytes that head and loss need in addition.
        backward: Bytes that a layer's backward pass needs in addition to all of these.
        step: Bytes that the optimizer's step needs in addition, when activations and logits are freed.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    logits: float
    backward: float
    step: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Run:
    """Settings of a training run that its costs depend on.

    Args:
        build: Makes the network; a partial of :func:`build_llama`. Any field of :class:`LlamaConfig` and ``projection``
            can be given to it, in place of its own.
        layers: Decoder layers (L).
        make_optimizer: Makes the optimizer from the parameters.
        batch_size: Rows of a micro-batch on one GPU (B).
        sequence_length: Tokens of a row (T).
        transforms: Functions that change the network before it runs, such as activation checkpointing.
        strategy: Value of ``--trainer.strategy``.
        precision: Value of ``--trainer.precision``.
        gpus: Number of GPUs of the run.
        accumulate: Micro-batches of an optimizer step.
        global_batch_size: Rows of an optimizer step, in place of ``accumulate``.
        max_steps: Optimizer steps of the run.
        mask_documents: Tokens attend only to their own document.
        fused_norm: RMSNorm is one kernel, as on GPUs.
        compiled: Layers, head and loss are compiled.
        clips: Gradients are clipped by their norm.
    """

    build: partial[Llama]
    layers: int
    make_optimizer: Callable[..., Optimizer]
    batch_size: int
    sequence_length: int
    transforms: Transforms = ()
    strategy: str | Strategy = "auto"
    precision: Any = "32-true"
    gpus: int = 1
    accumulate: int = 1
    global_batch_size: int | None = None
    max_steps: int = 0
    mask_documents: bool = False
    fused_norm: bool = True
    compiled: bool = False
    clips: bool = False

    @classmethod
    def of(cls, model: LanguageModel, data: Any, **settings: Any) -> "Run":
        """Make the run of a module and a data module.

        Args:
            model: The module.
            data: The data module.
            settings: Arguments of :class:`Run` that the trainer decides.

        Raises:
            InputError: If the data module has no batch size or sequence length.
        """
        for name in ("batch_size", "sequence_length"):
            if not hasattr(data, name):
                raise InputError(f"{type(data).__name__} has no {name}, so a batch's size is not known; give it one")
        shape = getattr(data, "row_shape", None)
        return cls(
            model.build,
            model.config.num_hidden_layers,
            model.make_optimizer,
            data.batch_size,
            data.sequence_length,
            global_batch_size=getattr(data, "global_batch_size", None),
            mask_documents=getattr(shape, "mask_documents", False),
            compiled=model.compile_layers,
            **settings,
        )

    @property
    def config(self) -> LlamaConfig:
        """Sizes of the network that ``build`` makes."""
        changes = dict(self.build.keywords)
        del changes["projection"]
        return replace(changes.pop("config"), **changes)

    @cached_property
    def parameters(self) -> Parameters:
        return count_parameters(self.build)

    @cached_property
    def layout(self) -> MemoryLayout:
        return memory_layout(self.strategy, self.precision, self.gpus)

    @cached_property
    def traced(self) -> Trace:
        return self._trace(self.transforms, self.batch_size)

    def _trace(self, transforms: Transforms, batch_size: int) -> Trace:
        return trace(
            self.build,
            self.layers,
            transforms,
            batch_size,
            self.sequence_length,
            self.layout.computed,
            self.layout.autocast,
            self.mask_documents,
            self.fused_norm,
        )

    # -- computation --------------------------------------------------------------------------------------------------

    @cached_property
    def flops(self) -> Flops:
        """FLOPs of a micro-batch on one GPU."""
        # The recomputed FLOPs are those of the run minus those of the same run without transforms. A chunked loss would
        # hide that, because it computes its gradients in the forward pass.
        plain = self.traced
        if self.transforms or self.config.loss_chunk_size:
            plain = replace(self, build=partial(self.build, loss_chunk_size=None), transforms=()).traced
        # The kernel's backward pass of attention is five products. One of them recomputes the scores.
        model = plain.step_flops - plain.attention_backward_flops / 5
        forward = plain.forward_flops
        return Flops(forward, model - forward, self.traced.step_flops - model)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all GPUs, padding included."""
        return (self.global_batch_size or self.batch_size * self.gpus * self.accumulate) * self.sequence_length

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step on one GPU."""
        if self.global_batch_size is None:
            return self.accumulate
        return max(1, self.global_batch_size // (self.batch_size * self.gpus))

    @property
    def tokens(self) -> int:
        return self.tokens_per_step * self.max_steps

    @property
    def micro_batch_tokens(self) -> int:
        return self.batch_size * self.sequence_length

    def days(self, gpu: Gpu, utilisation: float, of: str = "model") -> float:
        """Return the days of training: tokens times FLOPs per token, divided by GPUs times peak times utilisation.

        Args:
            gpu: Kind of GPU.
            utilisation: MFU if ``of`` is ``model``, HFU if it is ``hardware``.
            of: Which FLOPs of :class:`Flops` count.
        """
        flops = getattr(self.flops, of) / self.micro_batch_tokens * self.tokens
        return flops / (self.gpus * gpu.peak * 1e12 * utilisation) / 86_400

    # -- memory -------------------------------------------------------------------------------------------------------

    @cached_property
    def optimizer_step(self) -> OptimizerStates:
        """States and operations of the optimizer, in the type that it computes in."""
        own = torch.float32 if self.layout.master else self.layout.dtype
        return optimizer_states(self.build, self.layers, self.make_optimizer, own)

    @cached_property
    def static_memory(self) -> Memory:
        """Memory that does not depend on the batch. Its ``step`` is all that the optimizer's step needs."""
        layout, total = self.layout, self.parameters.total
        width = layout.dtype.itemsize
        own = torch.float32 if layout.master else layout.dtype
        states = self.optimizer_step
        copies = 4 * total.trained * layout.master
        # With a float32 copy of the weights, the step makes a float32 copy of the gradients, too.
        step = layout.optimizer * (states.temporary * own.itemsize * total.trained + copies)
        return Memory(
            weights=layout.weights * width * total.parameters + total.buffer_bytes,
            gradients=layout.gradients * width * total.trained,
            optimizer=layout.optimizer * (states.size + copies),
            buffers=layout.buffers(self.parameters)[0],
            activations=0,
            logits=0,
            backward=0,
            step=step,
        )

    @cached_property
    def memory(self) -> Memory:
        """Memory of a GPU at the peak of a step."""
        return self._memory(self.traced.kept)

    def _memory(self, kept: Kept) -> Memory:
        at_head, in_layers = self.layout.buffers(self.parameters)
        backward = max(0, kept.layers + in_layers - kept.logits - at_head)
        # At the optimizer's step activations and logits are freed.
        step = max(0, self.static_memory.step - kept.activations - kept.logits - backward)
        return replace(
            self.static_memory, activations=kept.activations, logits=kept.logits, backward=backward, step=step
        )

    def rows_that_fit(self, gpu: Gpu) -> int:
        """Return the largest micro-batch, in rows, that fits on ``gpu``; 0 if one row does not.

        Memory grows linearly with the batch, but the slope may change once, where another part becomes the largest.
        Therefore the line is followed from this batch size, and then once more from the size that it leads to.
        """
        beside = replace(self.static_memory, step=0).total
        if beside + self.static_memory.step > gpu.usable:
            return 0

        def working(rows: int) -> float:
            memory = self._memory(self._trace(self.transforms, rows).kept)
            return memory.activations + memory.logits + memory.backward

        here = working(self.batch_size)
        per_row = (working(2 * self.batch_size) - here) / self.batch_size
        rows = max(1, self.batch_size + math.floor((gpu.usable - beside - here) / per_row))
        return max(0, rows + math.floor((gpu.usable - beside - working(rows)) / per_row))

    def micro_batch_for(self, rows: int) -> int:
        """Return the largest micro-batch up to ``rows`` that divides this GPU's rows of a step; 0 if none does."""
        if self.global_batch_size is None:
            return rows
        own = self.global_batch_size // self.gpus
        return max((size for size in range(1, min(rows, own) + 1) if own % size == 0), default=0)
