"""Networks that are measured, in training steps or in generation: of this package, or of others."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from cola_lightning.callbacks.throughput import flops_per_token
from cola_lightning.costs.counters import count_flops
from cola_lightning.distributed.strategies import clip_by_global_norm
from cola_lightning.errors import InputError
from cola_lightning.inference.prepare import check_compiler, prepare_for_generation
from cola_lightning.methods import CoLAM, CRNetRecompute
from cola_lightning.models.loss import at_least_float32
from cola_lightning.optim import Parameters
from cola_lightning.private_apis.torch import tree_leaves
from cola_lightning.training.losses import next_token_losses
from cola_lightning.training.module import LanguageModel

Mark = Callable[[str], Any]
"""``mark(part)`` is called at the end of each part of a step."""


class BenchmarkTarget(ABC):
    """A network with its loss and optimizer, and with precision, device and clipping of a trainer.

    Args:
        name: Its name in tables.
        trainer: A trainer that does not run.
        shape: Rows and tokens of a micro-batch (B, T).
        vocab_size: Number of ids (V); they are drawn at random.
    """

    network: nn.Module
    optimizer: Optimizer

    def __init__(self, name: str, trainer: L.Trainer, shape: tuple[int, int], vocab_size: int) -> None:
        self.name, self.trainer, self.shape, self.vocab_size = name, trainer, shape, vocab_size
        self.device = trainer.strategy.root_device
        self.precision = trainer.precision_plugin

    @abstractmethod
    def make_network(self) -> nn.Module:
        """Make the network, in training mode, on any device."""

    @abstractmethod
    def make_optimizer(self) -> Optimizer:
        """Make the optimizer of ``self.network``."""

    @abstractmethod
    def loss(self, ids: Tensor) -> Tensor:
        """Compute the mean next-token loss of ids (B, T), in nats."""

    @abstractmethod
    def model_flops(self) -> float:
        """Count the FLOPs of a step, forward and backward, without recompute."""

    def build(self) -> None:
        """Make the network, prepare it, and make a random batch, on the device."""
        with self.precision.module_init_context():
            network = self.make_network()
        self.network = self.precision.convert_module(network.to(self.device))
        self.prepare()
        # A data loader leaves a batch in pinned host memory, so that a GPU copies it while it computes.
        self.batch = torch.randint(self.vocab_size, self.shape, pin_memory=self.device.type == "cuda")

    def prepare(self) -> None:
        """Prepare the network for what is measured: for steps, make the optimizer."""
        self.optimizer = self.make_optimizer()

    def release(self) -> None:
        """Free the device's memory."""
        for name in ("network", "optimizer", "batch"):
            vars(self).pop(name, None)
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def reset_peak_memory(self) -> None:
        """Forget the peak so far of the allocator, on CUDA."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int | None:
        """Return the peak of the allocator in bytes, on CUDA; else None."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def autocast(self) -> Any:
        return self.precision.forward_context()

    def forward(self) -> Tensor:
        with self.autocast():
            return self.loss(self.batch.to(self.device, non_blocking=True))

    def step(self, mark: Mark = lambda part: None) -> None:
        """Make an optimizer step of one micro-batch."""
        ids = self.batch.to(self.device, non_blocking=True)
        mark("data")
        with self.autocast():
            loss = self.loss(ids)
        mark("forward")
        loss.backward()
        mark("backward")
        self.update()
        mark("optimizer")

    def update(self) -> None:
        """Clip the gradients, update the weights, and delete the gradients."""
        if (most := self.trainer.gradient_clip_val or 0) > 0:
            self.clip(most)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clip(self, most: float) -> None:
        """Clip the gradients to a global norm."""
        nn.utils.clip_grad_norm_(self.network.parameters(), most)

    def states(self) -> list[Tensor]:
        """Tensors of the optimizer's state."""
        return [leaf for leaf in tree_leaves([*self.optimizer.state.values()]) if isinstance(leaf, Tensor)]


class PackageModel(BenchmarkTarget):
    """The network of a run of this package, with the run's activation checkpointing."""

    def __init__(self, name: str, trainer: L.Trainer, model: LanguageModel, data: Any) -> None:
        super().__init__(name, trainer, (data.batch_size, data.sequence_length), model.config.vocab_size)
        self.model = model

    def make_network(self) -> LanguageModel:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it in a connector
            if isinstance(callback, CoLAM | CRNetRecompute):
                callback.setup(self.trainer, self.model, "fit")
        self.model.configure_model()
        return self.model

    def make_optimizer(self) -> Optimizer:
        return self.model.make_optimizer(Parameters(self.model.network))

    def loss(self, ids: Tensor) -> Tensor:
        losses, learnt = next_token_losses(self.model, {"input_ids": ids, "labels": ids}, reduction="sum")
        return losses / learnt.sum()

    def clip(self, most: float) -> None:
        clip_by_global_norm(self.network.parameters(), most)

    def model_flops(self) -> float:
        return flops_per_token(self.model, self.shape[1]).model * self.shape[0] * self.shape[1]

    def release(self) -> None:
        super().release()
        del self.model.network
        self.model.transforms.clear()


class GeneratingModel(PackageModel):
    """The network of a run of this package, prepared as the command ``generate`` prepares it. It cannot be trained.

    Args:
        name, trainer, model, data: As for :class:`PackageModel`.
        int8, compile: As for :func:`~cola_lightning.inference.prepare.prepare_for_generation`.

    Raises:
        InputError: If generation cannot be compiled: on a GPU, without a compiler, or of several rows.
    """

    def __init__(
        self, name: str, trainer: L.Trainer, model: LanguageModel, data: Any, int8: bool = False, compile: bool = False
    ) -> None:
        super().__init__(name, trainer, model, data)
        self.int8, self.compiled = int8, compile
        if compile:
            check_compiler(self.device, "--trainer.accelerator cpu")
            if self.shape[0] != 1:  # other rows would be generated uncompiled
                raise InputError(
                    f"--compile is for one row, and --data.batch_size is {self.shape[0]}; leave it out, or add "
                    "--data.batch_size 1"
                )

    def make_network(self) -> LanguageModel:
        self.model.compile_layers = False  # for training steps; generation is compiled by ``prepare``
        self.model.configure_model()
        return self.model

    def prepare(self) -> None:
        # There is no optimizer: it would keep the matrices that int8 replaces.
        prepare_for_generation(self.model.network, int8=self.int8, compile=self.compiled)

    @property
    def prepared(self) -> str:
        """How the network was prepared, in words for the table."""
        return ", ".join(["int8"] * self.int8 + ["compiled"] * self.compiled) or "plain"


class ExternalModel(BenchmarkTarget):
    """A network of others, trained as a run of this package would train it.

    Args:
        path: ``module:callable``. The callable takes no argument and returns a module that maps ids (B, T) to logits
            (B, T, V), or to an object with the attribute ``logits``. It may have its own activation checkpointing.
        like: The network whose precision, device, batch, clipping and optimizer it gets.

    Raises:
        InputError: If it cannot be imported, or does not return a module.
    """

    def __init__(self, path: str, like: PackageModel) -> None:
        super().__init__(path, like.trainer, like.shape, like.vocab_size)
        self.optimizer_of: Callable[[Iterable], Optimizer] = like.model.make_optimizer
        module, _, name = path.partition(":")
        sys.path.insert(0, str(Path.cwd()))
        try:
            self.make: Callable[[], nn.Module] = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"--peer {path} is not to be had ({error}); give it as module:callable, to be imported from here"
            ) from error
        finally:
            sys.path.pop(0)

    def make_network(self) -> nn.Module:
        network = self.make()
        if not isinstance(network, nn.Module):
            raise InputError(f"--peer {self.name} returned a {type(network).__name__}; it must return a torch module")
        return network.train()

    def make_optimizer(self) -> Optimizer:
        return self.optimizer_of(list(self.network.parameters()))

    def loss(self, ids: Tensor) -> Tensor:
        logits = self.network(ids)
        logits = getattr(logits, "logits", logits)[:, :-1]
        return cross_entropy(at_least_float32(logits).flatten(0, 1), ids[:, 1:].flatten())

    def model_flops(self) -> float:
        """Return three times the FLOPs of a forward pass, which is right if all matrices are trained."""
        with torch.no_grad(), eagerly():
            return 3 * count_flops(self.forward)


def eagerly() -> Any:
    """Return a context in which nothing is compiled, because counters do not see inside compiled code."""
    return torch.compiler.set_stance("force_eager")
