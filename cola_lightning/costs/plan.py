"""Choose the runs that ``estimate`` compares: the configured one, and the same model with other methods."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from cola_lightning.costs.run_costs import Run
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.models import FullRank
from cola_lightning.training.gradient_accumulation import count_micro_batches
from cola_lightning.training.module import LanguageModel


@dataclass(frozen=True)
class Plan:
    """Run, its name, and what its layers keep (``checkpointing``)."""

    name: str
    run: Run
    checkpointing: str


def plan(model: LanguageModel, data: Any, trainer: Any, gpus: int | None) -> Plan:
    """Make the run of a configuration.

    Args:
        model: The module.
        data: The data module.
        trainer: The trainer's settings: ``callbacks``, ``strategy``, ``precision``, ``devices`` and others.
        gpus: Number of GPUs, in place of the settings' devices.
    """
    gpus = gpus or _devices(trainer.devices) * trainer.num_nodes
    callbacks = [callback for callback in trainer.callbacks or [] if isinstance(callback, CoLAM)]
    # Give the callbacks settings in place of a trainer, which would need the devices. They check them as in a run.
    settings: Any = SimpleNamespace(callbacks=callbacks, strategy=trainer.strategy)
    for callback in callbacks:
        callback.setup(settings, model, "fit")
    run = Run.of(
        model,
        data,
        transforms=tuple(model.transforms),
        strategy=trainer.strategy,
        precision=trainer.precision,
        gpus=gpus,
        accumulate=trainer.accumulate_grad_batches,
        max_steps=max(trainer.max_steps, 0),
        clips=bool(trainer.gradient_clip_val),
    )
    if run.global_batch_size:
        count_micro_batches(run.global_batch_size, run.batch_size, run.gpus)
    return Plan("this run", run, _describe(callbacks[0]) if callbacks else "nothing recomputed")


def _devices(devices: int | str | list) -> int:
    """Return how many devices a setting names; 1 if that depends on the machine."""
    if isinstance(devices, str):
        devices = [each for each in devices.split(",") if each.strip()] if "," in devices else devices
    if isinstance(devices, list):
        return len(devices)
    try:
        return 1 if devices == "auto" or int(devices) < 1 else int(devices)
    except ValueError:
        raise InputError(f"--trainer.devices is {devices}; it must be a number, a list of numbers, or auto") from None


def _describe(callback: CoLAM) -> str:
    extra = [callback.latents_dtype, "attention" if callback.keep_attention else None]
    return ", ".join(["keep: " + callback.keep, *filter(None, extra)])


def beside(this: Plan) -> list[Plan]:
    """Make the same model with full rank, CoLA and CoLA-M, at its own rank or else a quarter of its width."""
    run = this.run
    with torch.device("meta"):
        layer: Any = run.build(num_hidden_layers=1).model.layers[0]
    projection = layer.self_attn.q_proj
    rank = projection.A.out_features if isinstance(projection, LowRank) else run.config.hidden_size // 4
    plain, cola_m = "nothing recomputed", CoLAM()
    # If the run is one of these, its own parts are used, so that it is not traced twice.
    full = cola = run.build
    if not (isinstance(projection, FullRank) and layer.mlp.gate_silu):
        full = partial(run.build, projection=FullRank, gate_silu=True)
    if not isinstance(projection, CoLA):
        cola = partial(run.build, projection=partial(CoLA, rank=rank))
    is_it = cola is run.build and this.checkpointing == _describe(cola_m)
    transforms = run.transforms if is_it else (cola_m.apply,)
    return [
        Plan("full rank", replace(run, build=full, transforms=()), plain),
        Plan(f"CoLA, rank {rank}", replace(run, build=cola, transforms=()), plain),
        Plan(f"CoLA-M, rank {rank}", replace(run, build=cola, transforms=transforms), _describe(cola_m)),
    ]
