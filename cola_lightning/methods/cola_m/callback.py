"""CoLAM, the callback that chooses what a training step keeps for the backward pass."""

from typing import Literal

import lightning as L
from torch import nn

from cola_lightning.errors import InputError
from cola_lightning.methods.arguments import check_choice
from cola_lightning.methods.cola_m.reversible import Reversible
from cola_lightning.methods.cola_m.selective import Selective
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.methods.recompute_callback import RecomputeCallback
from cola_lightning.models import CrossLayer, Llama
from cola_lightning.models.activation_checkpointing import set_recompute
from cola_lightning.private_apis.lightning import has_own_checkpointing


class CoLAM(RecomputeCallback):
    """Activation checkpointing that keeps the low-rank latents (CoLA-M, arXiv 2502.10940).

    Parameter names and checkpoints are the same with and without it, so a run can switch it on or off when it resumes.
    Validation is never checkpointed.

    Args:
        keep: ``residual_and_latents`` keeps a layer's input and its seven latents, 2.75 D numbers per token and layer
            at R = D / 4, and computes up-projections and attention again in backward. ``latents`` keeps 1.75 D and
            reconstructs the residual stream from the last layer down. ``block_input`` keeps 1 D and computes everything
            again; full rank works with this one only. ``attention_and_mlp_latents`` keeps as much as
            ``residual_and_latents``: the attention's output in place of the latents of q, k, v and o. Their four
            down-projections are then computed again instead of attention.
        latents_dtype: ``float8`` stores the latents in 8 bits, with ``keep: latents``. This costs accuracy, see
            recipes/cola_m.
        keep_attention: Also keep the attention's output (about 1 D more). Attention, whose work grows with the square
            of the sequence length, is then not computed again.

    Raises:
        InputError: When the run starts, for a combination that cannot work.
    """

    def __init__(
        self,
        keep: Literal[
            "residual_and_latents", "attention_and_mlp_latents", "latents", "block_input"
        ] = "residual_and_latents",
        latents_dtype: Literal["float8"] | None = None,
        keep_attention: bool = False,
    ) -> None:
        choices = ("residual_and_latents", "attention_and_mlp_latents", "latents", "block_input")
        check_choice("CoLAM", "keep", keep, *choices)
        check_choice("CoLAM", "latents_dtype", latents_dtype, "float8", None)
        if latents_dtype and keep != "latents":
            raise InputError(f"CoLAM: latents_dtype {latents_dtype} goes with keep: latents, not with keep: {keep}")
        self.keep, self.latents_dtype, self.keep_attention = keep, latents_dtype, keep_attention

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and has_own_checkpointing(trainer.strategy):
            raise InputError(
                "the FSDP strategy has an activation_checkpointing_policy of its own; remove it or the CoLAM callback"
            )
        super().setup(trainer, pl_module, stage)

    def apply(self, network: Llama) -> None:
        if self.keep != "block_input":
            self._check_low_rank(network)
        if self.keep == "latents":
            Reversible(self.latents_dtype == "float8", self.keep_attention).attach(network)
            return
        attention_in_place_of_latents = self.keep == "attention_and_mlp_latents"
        dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
        scheme = Selective(
            self.keep != "block_input", self.keep_attention or attention_in_place_of_latents, dropout=dropout
        )
        for block in network.blocks():
            set_recompute(block, scheme)
            for projection in block.self_attn.children():
                if isinstance(projection, LowRank):
                    projection.keeps_latent = not attention_in_place_of_latents

    def _check_low_rank(self, network: Llama) -> None:
        for block in network.blocks():
            for name, projection in block.projections():
                if not isinstance(projection, LowRank):
                    raise InputError(
                        f"CoLAM with keep: {self.keep} keeps low-rank latents, but {name} is "
                        f"{type(projection).__name__}; set keep: block_input, or --model.projection CoLA"
                    )
                if self.keep == "latents" and isinstance(projection, CrossLayer):
                    raise InputError(
                        f"CoLAM with keep: latents recomputes each layer on its own, but {name} is "
                        f"{type(projection).__name__}, which passes a tensor to the next layer; set keep: "
                        f"residual_and_latents"
                    )
