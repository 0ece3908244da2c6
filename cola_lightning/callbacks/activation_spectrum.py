"""How low-rank the activations are, while the network learns."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from cola_lightning.callbacks.effective_rank import effective_rank, squared_singular_values
from cola_lightning.callbacks.monitoring_forward import monitoring_forward
from cola_lightning.callbacks.spectrum_figure import draw
from cola_lightning.callbacks.text_and_figures import write_figure
from cola_lightning.data.packing import IGNORE
from cola_lightning.errors import InputError
from cola_lightning.methods import LowRank
from cola_lightning.models import Llama
from cola_lightning.private_apis import is_accumulating
from cola_lightning.training.module import LanguageModel

ACTIVATIONS = (
    "self_attn.q_proj.input",
    "self_attn.o_proj.latent",
    "self_attn.o_proj.output",
    "mlp.gate_proj.input",
    "mlp.down_proj.latent",
    "mlp.down_proj.output",
)


class ActivationSpectrum(L.Callback):
    """Measures the effective rank of activations in each layer, the CoLA paper's motivating figure, live.

    Of an activation over N tokens, an N x width matrix, r(α) is the smallest number of leading singular values that
    hold the share α of the sum of all their squares; nothing is centred. Every ``every_n_steps`` optimizer steps the
    batch just trained on goes through the network once more, without gradients; logged are
    ``effective_rank/ACTIVATION/LAYER``, histograms ``spectrum/ACTIVATION`` of log10(σ_i / σ_1) over all layers, and the
    picture ``spectrum``. Padding is left out. Rank 0 computes, on its share of the batch; all ranks run the network.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        share: α.
        tokens: N at most, taken from the first rows of the micro-batch. No rank can be above N: use several times the
            width of the activations, and a micro-batch that has so many.
        activations: What is measured in each layer: the name of a projection, as ``mlp.down_proj``, and ``.input``,
            ``.output``, or ``.latent`` for what a low-rank projection has in the middle, before any nonlinearity; full
            rank has none, and there a latent is passed over.

    Raises:
        InputError: If a number is out of range, an activation is unknown, or matplotlib is missing.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        share: float = 0.95,
        tokens: int = 4096,
        activations: list[str] = list(ACTIVATIONS),  # noqa: B006 never changed; a list is what the command line takes
    ) -> None:
        if every_n_steps < 1:
            raise InputError(f"ActivationSpectrum: every_n_steps is {every_n_steps}; it must be at least 1")
        if not 0 < share <= 1:
            raise InputError(f"ActivationSpectrum: share is {share}; it must be above 0 and at most 1")
        if tokens < 1:
            raise InputError(f"ActivationSpectrum: tokens is {tokens}; it must be at least 1")
        self.every_n_steps, self.share, self.tokens, self.activations = every_n_steps, share, tokens, list(activations)

    def setup(self, trainer: L.Trainer, pl_module: LanguageModel, stage: str) -> None:
        if stage != "fit":
            return
        if find_spec("matplotlib") is None:
            raise InputError("ActivationSpectrum draws with matplotlib; pip install 'cola-lightning[plots]'")
        with torch.device("meta"):
            network = pl_module.build()
        for name in self.activations:
            _find(network.model.layers[0], name)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_accumulating(trainer) or trainer.global_step % self.every_n_steps:
            return
        spectra = self.measure(trainer, pl_module.network, batch)
        if trainer.is_global_zero:
            self._log(trainer, pl_module, spectra)

    def measure(self, trainer: L.Trainer, network: Llama, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Of each activation, the squared singular values layer by layer; empty on ranks after the first."""
        rows = -(-self.tokens // batch["input_ids"].shape[1])
        batch = {name: tensor[:rows] for name, tensor in batch.items()}
        kept = batch["labels"] != IGNORE
        spectra: dict[str, list[Tensor]] = {}
        handles = []
        for layer in network.model.layers if trainer.is_global_zero else []:
            for name in self.activations:
                found = _find(layer, name)
                if found is not None:
                    handles.append(_watch(*found, _Store(spectra.setdefault(name, []), kept, self.tokens)))
        try:
            with monitoring_forward(trainer) as run:
                run(batch["input_ids"], batch.get("document_ids"))
        finally:
            for handle in handles:
                handle.remove()
        return spectra

    def _log(self, trainer: L.Trainer, module: LanguageModel, spectra: dict[str, list[Tensor]]) -> None:
        ranks = {name: [effective_rank(squares, self.share) for squares in layers] for name, layers in spectra.items()}
        scalars = {
            f"effective_rank/{name}/{layer:02}": float(rank)
            for name, layers in ranks.items()
            for layer, rank in enumerate(layers)
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                for name, layers in spectra.items():
                    logs = torch.cat([_relative(squares).log10() for squares in layers])
                    logger.experiment.add_histogram(f"spectrum/{name}", logs, trainer.global_step)
        decays = {name: [_relative(squares) for squares in layers] for name, layers in spectra.items()}
        title = f"Activation spectrum after {trainer.global_step:,} steps"
        write_figure(trainer, "spectrum", draw(decays, ranks, self.share, _bottleneck(module.network), title))


class _Store:
    """Receives an activation and keeps its spectrum, on the spot, so that no layer's activations outlive it."""

    def __init__(self, spectra: list[Tensor], kept: Tensor, tokens: int) -> None:
        self.spectra, self.kept, self.tokens = spectra, kept, tokens

    def __call__(self, x: Tensor) -> None:
        self.spectra.append(squared_singular_values(x[self.kept][: self.tokens]))


def _watch(module: nn.Module, end: str, store: Callable[[Tensor], None]) -> Any:
    if end == "input":
        return module.register_forward_pre_hook(lambda _, args: store(args[0]))
    return module.register_forward_hook(lambda _, args, output: store(output))


def _find(layer: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module, and which end of it, that has the activation ``name``; None for a latent where there is none.

    Raises:
        InputError: If the layer has no such projection.
    """
    path, _, end = name.rpartition(".")
    projections = {
        f"{part}.{child}": projection
        for part in ("self_attn", "mlp")
        for child, projection in layer.get_submodule(part).named_children()
    }
    if path not in projections or end not in ("input", "latent", "output"):
        raise InputError(
            f"ActivationSpectrum: there is no activation {name}; take .input, .latent or .output of one of "
            f"{', '.join(projections)}"
        )
    projection = projections[path]
    if end == "latent":
        return (projection.A, "output") if isinstance(projection, LowRank) else None
    return projection, end


def _relative(squares: Tensor) -> Tensor:
    """σ_i / σ_1, no smaller than what float32 can tell from 0."""
    return (squares / squares[0].clamp(min=1e-30)).clamp(min=1e-7).sqrt()


def _bottleneck(network: Llama) -> int | None:
    """The rank of the network's projections, if they have one and all the same."""
    ranks = {module.A.out_features for module in network.modules() if isinstance(module, LowRank)}
    return ranks.pop() if len(ranks) == 1 else None
