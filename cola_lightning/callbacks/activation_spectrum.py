"""Effective rank and singular values of activations during training."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from cola_lightning.callbacks.effective_rank import effective_rank, squared_singular_values
from cola_lightning.callbacks.monitoring_forward import monitoring_forward
from cola_lightning.callbacks.spectrum_figure import draw
from cola_lightning.data.packing import IGNORE
from cola_lightning.errors import InputError, check_at_least
from cola_lightning.loggers import write_figure
from cola_lightning.methods import LowRank
from cola_lightning.models import Llama
from cola_lightning.private_apis.lightning import is_accumulating
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
    """Measure the effective rank of activations in each layer, as in the CoLA paper's motivating figure.

    An activation over N tokens is an N x W matrix. Its effective rank r(α) is the smallest number of leading singular
    values whose squares add up to the share α of all squares; nothing is centred. Every ``every_n_steps`` optimizer
    steps the last micro-batch runs through the network again, without gradients. Logged are
    ``effective_rank/ACTIVATION/LAYER``, histograms ``spectrum/ACTIVATION`` of log10(σ_i / σ_1) over all layers, and the
    figure ``spectrum``. Padding is left out. All ranks run the network; rank 0 measures, on its share of the batch.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        share: α.
        tokens: Largest N, taken from the first rows of the micro-batch. An effective rank cannot be above N, so use
            several times the width of the activations, and a micro-batch that has as many tokens.
        activations: Activations to measure in each layer: the name of a projection, such as ``mlp.down_proj``, and
            ``.input``, ``.output``, or ``.latent`` (between the two factors of a low-rank projection, before any
            nonlinearity). A full-rank projection has no latent, and is skipped.

    Raises:
        InputError: If a number is out of range, an activation is unknown, or matplotlib is missing.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        share: float = 0.95,
        tokens: int = 4096,
        activations: list[str] = list(ACTIVATIONS),  # noqa: B006 (never changed; the command line needs a list)
    ) -> None:
        check_at_least(1, "ActivationSpectrum: ", every_n_steps=every_n_steps, tokens=tokens)
        if not 0 < share <= 1:
            raise InputError(f"ActivationSpectrum: share is {share}; it must be above 0 and at most 1")
        self.every_n_steps, self.share, self.tokens, self.activations = every_n_steps, share, tokens, list(activations)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if find_spec("matplotlib") is None:
            raise InputError("ActivationSpectrum draws with matplotlib; pip install 'cola-lightning[plots]'")
        with torch.device("meta"):
            network = cast(LanguageModel, pl_module).build()
        for name in self.activations:
            _find(network.model.layers[0], name)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_accumulating(trainer) or trainer.global_step % self.every_n_steps:
            return
        module = cast(LanguageModel, pl_module)
        spectra = self.measure(trainer, module.network, batch)
        if trainer.is_global_zero:
            self._log(trainer, module, spectra)

    def measure(self, trainer: L.Trainer, network: Llama, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return for each activation the squared singular values of each layer; nothing on ranks other than 0."""
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
    """Compute the spectrum of an activation at once, so that no activation stays in memory."""

    def __init__(self, spectra: list[Tensor], kept: Tensor, tokens: int) -> None:
        self.spectra, self.kept, self.tokens = spectra, kept, tokens

    def __call__(self, x: Tensor) -> None:
        self.spectra.append(squared_singular_values(x[self.kept][: self.tokens]))


def _watch(module: nn.Module, end: str, store: Callable[[Tensor], None]) -> Any:
    if end == "input":
        return module.register_forward_pre_hook(lambda _, args: store(args[0]))
    return module.register_forward_hook(lambda _, args, output: store(output))


def _find(layer: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Return the module with the activation ``name``, and whether it is its input or output.

    None for the latent of a full-rank projection.

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
    """Return σ_i / σ_1, at least what float32 resolves."""
    return (squares / squares[0].clamp(min=1e-30)).clamp(min=1e-7).sqrt()


def _bottleneck(network: Llama) -> int | None:
    """Return the rank of the network's projections; None if they have none, or several."""
    ranks = {module.A.out_features for module in network.modules() if isinstance(module, LowRank)}
    return ranks.pop() if len(ranks) == 1 else None
