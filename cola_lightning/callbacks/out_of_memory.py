"""Advice when memory runs out: what to change, and the memory that each change saves."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import cast

import lightning as L
import torch

from cola_lightning.costs import Run
from cola_lightning.errors import InputError
from cola_lightning.host_memory import GIB
from cola_lightning.methods.cola_m.callback import CoLAM
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.training.module import LanguageModel
from cola_lightning.training.trainer_attributes import callbacks_of, datamodule_of


class OutOfMemoryAdvice(L.Callback):
    """Add advice to an out-of-memory error: changes, the cheapest first, each with its predicted memory.

    Predictions come from :mod:`cola_lightning.costs`. The command line prints the advice; from Python it is in the
    notes of the error. Until memory runs out, this callback does nothing.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not out_of_memory(exception):
            return
        # Advice must not hide the error itself, so a run that cannot be estimated gets no advice.
        with suppress(InputError, AttributeError):
            run = Run.of(
                cast(LanguageModel, pl_module),
                datamodule_of(trainer),
                transforms=tuple(callback.apply for callback in callbacks_of(trainer) if isinstance(callback, CoLAM)),
                strategy=trainer.strategy,
                precision=trainer.precision,
                gpus=trainer.world_size,
                accumulate=trainer.accumulate_grad_batches,
                max_steps=trainer.max_steps,
            )
            exception.add_note(advice(run, _capacity(trainer.strategy.root_device)))


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory of a device or of the host ran out. For the host, torch has no class."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def advice(run: Run, capacity: float | None) -> str:
    """List what to try, one line each, the cheapest first.

    Args:
        run: The run that did not fit.
        capacity: Bytes of the device; None if they are not known.
    """
    memory = run.memory
    parts = {"activations": memory.activations, "logits and loss": memory.logits + memory.backward}
    parts |= {"weights, gradients, optimizer, buffers": _held(run)}
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    of = f" of {_gib(capacity)}" if capacity else ""
    lines = [
        f"The run is predicted to need {_gib(memory.total)}{of} on a device, with micro-batches of {run.batch_size} x "
        f"{run.sequence_length} tokens: {listed}. Try, the cheapest first:"
    ]
    for what, other, cost in _options(run):
        if other.memory.total > 0.99 * memory.total:
            continue
        effects = [
            f"{name} {_gib(before)} -> {_gib(after)}"
            for name, before, after in (
                ("activations", memory.activations, other.memory.activations),
                ("logits and loss", memory.logits, other.memory.logits),
                ("weights, gradients, optimizer, buffers", _held(run), _held(other)),
                ("in all", memory.total, other.memory.total),
            )
            if abs(before - after) > 0.01 * before
        ]
        lines.append(f"  {what}: {', '.join(effects)}; {cost}")
    return "\n".join(lines)


def _options(run: Run) -> Iterator[tuple[str, Run, str]]:
    """Yield what can be changed, the changed run, and what the change costs."""
    chunk = min(4096, run.micro_batch_tokens // 4)
    if chunk and not run.config.loss_chunk_size:
        changed = replace(run, build=partial(run.build, loss_chunk_size=chunk))
        yield f"--model.loss_chunk_size {chunk}", changed, "the same result, at the same FLOPs"
    smaller = run.micro_batch_for(run.batch_size // 2)
    if smaller:
        flags = f"--data.batch_size {smaller}"
        accumulate = run.accumulate
        if run.global_batch_size is None:
            accumulate = run.accumulate * run.batch_size // smaller
            flags += f" --trainer.accumulate_grad_batches {accumulate}"
        changed = replace(run, batch_size=smaller, accumulate=accumulate)
        yield flags, changed, "the same result, at the same FLOPs, in more and smaller pieces"
    if run.gpus > 1 and run.layout.weights == 1:
        sharded = replace(run, strategy="fsdp2")
        yield "--trainer.strategy fsdp2", sharded, "the same result, at the same FLOPs, with more communication"
    for what, callback in _checkpointing(run):
        other = replace(run, transforms=(callback.apply,))
        factor = other.traced.step_flops / run.traced.step_flops
        yield what, other, f"the same result, at {factor:.2f} times the FLOPs"
    if run.layout.optimizer and torch.cuda.is_available():
        offloaded = replace(run, strategy="deepspeed_stage_3_offload")
        yield "--trainer.strategy deepspeed_stage_3_offload", offloaded, "slower, because the optimizer runs on the CPU"


def _checkpointing(run: Run) -> list[tuple[str, CoLAM]]:
    with torch.device("meta"):
        block = run.build(num_hidden_layers=1).model.layers[0]
    if all(isinstance(getattr(block.self_attn, name), LowRank) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
        ways = [("--config configs/method/cola_m.yaml", CoLAM()), ("CoLAM with keep: latents", CoLAM("latents"))]
        return ways[1:] if run.transforms else ways
    what = "--trainer.callbacks+=CoLAM --trainer.callbacks.keep=block_input"
    return [] if run.transforms else [(what, CoLAM("block_input"))]


def _held(run: Run) -> float:
    memory = run.memory
    return memory.weights + memory.gradients + memory.optimizer + memory.buffers


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size > 0.05 * GIB else f"{size / 2**20:.2f} MiB"


def _capacity(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
