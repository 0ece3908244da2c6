"""When memory runs out: what to try next, and what it will do."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import lightning as L
import torch

from cola_lightning.costs import Run
from cola_lightning.errors import InputError
from cola_lightning.methods.cola_m.callback import CoLAM
from cola_lightning.methods.low_rank import LowRank

GIB = 2**30


class OutOfMemoryAdvice(L.Callback):
    """Adds to an out-of-memory error what to change, the cheapest first, with the memory that each is predicted to
    take (see :mod:`cola_lightning.costs`). The command line prints that and ends; from Python it stands in the error's
    notes. Until memory runs out it does nothing.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not out_of_memory(exception):
            return
        # Advice must never stand in the way of the error itself: what cannot be estimated gets none.
        with suppress(InputError, AttributeError):
            run = Run.of(
                pl_module,
                trainer.datamodule,
                transforms=tuple(callback.apply for callback in trainer.callbacks if isinstance(callback, CoLAM)),
                strategy=trainer.strategy,
                precision=trainer.precision,
                gpus=trainer.world_size,
                accumulate=trainer.accumulate_grad_batches,
                max_steps=trainer.max_steps,
            )
            exception.add_note(advice(run, _capacity(trainer.strategy.root_device)))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a device, or of the host, for which PyTorch has no class."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def advice(run: Run, capacity: float | None) -> str:
    """What to try, one line each.

    Args:
        run: The run that did not fit.
        capacity: Bytes of the device, None if that is not known.
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
    """What can be changed, the run that it makes, and what it costs."""
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
        yield "--trainer.strategy deepspeed_stage_3_offload", offloaded, "slower, for the optimizer runs on the CPU"


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
