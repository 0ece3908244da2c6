"""The LightningModule: training, validation and prediction steps of a LLaMA."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW, Optimizer

from cola_lightning.checkpoints.initialize import initialize_from_folder
from cola_lightning.checkpoints.restore import explain_restore
from cola_lightning.distributed.sharding import shard
from cola_lightning.errors import InputError
from cola_lightning.models import FullRank, Llama, LlamaConfig, MakeProjection
from cola_lightning.models.llama import build_llama
from cola_lightning.optim import MakeOptimizer, MakeSchedule, WarmupCosine
from cola_lightning.optim.schedules import check_schedule
from cola_lightning.private_apis.lightning import is_accumulating
from cola_lightning.training.allocator import keep_freed_memory
from cola_lightning.training.checkpoint_state import CheckpointState
from cola_lightning.training.data_checks import check_data_fits
from cola_lightning.training.fit_loop import prepare_fit_loop
from cola_lightning.training.gradient_accumulation import (
    accumulate,
    attach_step_tokens,
    check_last_group,
    loss_scale,
    postpone_stop,
    resume_stop,
    sum_step_tokens,
)
from cola_lightning.training.gradient_clipping import clip_by_norm
from cola_lightning.training.log_steps import at_log_step
from cola_lightning.training.losses import next_token_losses
from cola_lightning.training.metrics import Perplexity, PublishedPerplexity, TokenLoss
from cola_lightning.training.network import Transform, allocate_network, apply_transforms, compile_network
from cola_lightning.training.optimizers import make_optimizer_and_schedule
from cola_lightning.training.trainer_attributes import attached_trainer, datamodule_of

BeforeUpdate = Callable[["LanguageModel", Optimizer, Tensor | None], None]
"""``f(module, optimizer, norm)`` is called between clipping and the optimizer's update. ``norm`` is the gradient norm
before clipping; None under DeepSpeed, which knows it only after the update."""
MOST_LAYERS = 10_000
"""Most decoder layers. A network of more takes minutes to build, and means a typing error or a hostile file."""


class LanguageModel(L.LightningModule):
    """Pre-train a LLaMA. A factory makes its projections, such as CoLA's.

    Args:
        vocab_size: Rows of the embedding and of the head (V).
        hidden_size: Width of the residual stream (D).
        intermediate_size: Width inside the MLP (F).
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads (H).
        num_key_value_heads: Key and value heads; as many as query heads if not given.
        max_position_embeddings: Longest sequence that is accepted, in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How rotary frequencies are stretched for longer sequences: ``rope_type`` (linear, dynamic, yarn or
            llama3) and its settings, by Hugging Face's names; null for no stretching.
        rms_norm_eps: Epsilon inside RMSNorm.
        gate_silu: Keep LLaMA's SiLU on the MLP's gate. The CoLA paper drops it from 350M up.
        pad_token_id: Id of padding, which has an embedding of zeros; null if the tokenizer has no padding id.
        projection: Makes each of the seven projections of a layer from (in_features, out_features).
        optimizer: Makes the optimizer from the parameters.
        schedule: Makes the learning-rate schedule from the optimizer. If its argument ``total_steps``, ``T_max`` or
            ``total_iters`` is not given, it is the number of optimizer steps of the run.
        fused_projections: Compute q, k and v in one matrix product, and gate and up in another, because they share
            their input. Parameters keep their names. Cross-layer methods, and CoLA-M with ``keep: latents``, ignore it.
        loss_chunk_size: Number of tokens for which logits are in memory at a time in training; null for all. If the
            vocabulary is much larger than the hidden size, logits and their gradients take most of the memory.
        compile: Compile each decoder layer, and head and loss, with ``torch.compile``. With ``loss_chunk_size``, what
            is done to the logits of a chunk is compiled into one kernel.
        mean_of_micro_batches: Average the mean losses of micro-batches, as the published scripts do. Rows differ in
            length, so the gradient then depends on how the batch is cut into micro-batches and ranks. If false, every
            token of the global batch has the same weight.
        initial_weights: Folder of ``export`` or ``factorize`` with weights to begin with, in place of random ones. The
            weights of ``--ckpt_path`` replace them.

    Raises:
        InputError: If the sizes do not fit together; the message names the value and the fix.
    """

    network: Llama

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        intermediate_size: int = 1376,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, bool | int | float | str | None] | None = None,
        rms_norm_eps: float = 1e-6,
        gate_silu: bool = True,
        pad_token_id: int | None = 0,
        projection: MakeProjection = FullRank,
        optimizer: MakeOptimizer = AdamW,
        schedule: MakeSchedule = WarmupCosine,  # type: ignore[assignment]  # make_schedule binds its total_steps
        fused_projections: bool = False,
        loss_chunk_size: int | None = None,
        compile: bool = False,
        mean_of_micro_batches: bool = False,
        initial_weights: str | None = None,
    ) -> None:
        # The sizes are arguments of this class, because its arguments are the command line's flags and a checkpoint's
        # hyper-parameters: --model.hidden_size, not --model.config.hidden_size. From here on, they are one object.
        arguments = locals()
        config = LlamaConfig(**{field.name: arguments[field.name] for field in fields(LlamaConfig)})
        super().__init__()
        check_schedule(schedule)
        self.save_hyperparameters()
        # A checkpoint holds plain data only, so that it loads without unpickling. On the command line all arguments are
        # plain data, because Lightning stores what was typed. From Python, the three factories are code.
        for name in [name for name, value in self.hparams.items() if callable(value)]:
            del self.hparams[name]
        if num_hidden_layers > MOST_LAYERS:
            raise InputError(f"--model.num_hidden_layers is {num_hidden_layers}; {MOST_LAYERS:,} is the most")
        self.build = partial(build_llama, config=config, projection=projection)
        with torch.device("meta"):
            network = self.build()  # impossible projections raise here, before the data is prepared
        self.parameter_count = sum(parameter.numel() for parameter in network.parameters())
        self.initial_weights, self.mean_of_micro_batches = initial_weights, mean_of_micro_batches
        self._step_tokens: Tensor | None = None  # of all ranks; set from the first micro-batch of a step to its last
        self.make_optimizer, self.make_schedule, self.compile_layers = optimizer, schedule, compile
        self.config = config
        self.transforms: list[Transform] = []
        self.before_update: list[BeforeUpdate] = []
        self.checkpoint_state = CheckpointState(has_weights=initial_weights is not None)
        self._applied_transforms = 0  # how many of ``transforms`` the network has
        self._is_finished = False  # compiled or sharded, so that no transform can follow
        self.train_loss = TokenLoss()
        self.perplexity = Perplexity()
        self.published_perplexity = PublishedPerplexity()

    @classmethod
    def load_from_checkpoint(cls, *_: Any, **__: Any) -> "LanguageModel":
        """Refuse to load: Lightning's way imports and calls what the file names.

        ``cola_lightning.inference.load.load_model_for_inference`` loads without running code.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "load_from_checkpoint runs code that the file names; use "
            "cola_lightning.inference.load.load_model_for_inference(path).network"
        )

    # -- network ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = datamodule_of(self.trainer)
        check_data_fits(data, self.config)
        if stage != "fit":
            return
        if self.trainer.max_steps < 1:
            raise InputError(
                "the run has no length: schedule and data are counted in optimizer steps; set --trainer.max_steps"
            )
        if getattr(data, "global_batch_size", None):
            accumulate(self.trainer, data.global_batch_size, data.batch_size)
        attach_step_tokens(self.trainer)

    def configure_model(self) -> None:
        """Make the network, in this order: allocate, initialize, transform, compile, shard.

        Nothing else builds or changes the network. DDP, FSDP and DeepSpeed wrap it afterwards. Lightning calls this
        once per stage, and a callback may call it before the ``setup`` of other callbacks. The first call builds the
        network; a later call only applies the transforms that were registered since.

        Raises:
            InputError: If a transform was registered after the network was compiled or sharded.
        """
        trainer = attached_trainer(self)
        strategy = trainer.strategy if trainer else None
        is_new = not hasattr(self, "network")
        if is_new:
            self.network = allocate_network(self.build, self.parameter_count, strategy)
            if self.initial_weights:
                initialize_from_folder(self.network, self.initial_weights)
        apply_transforms(self.network, self.transforms[self._applied_transforms :], self._is_finished)
        self._applied_transforms = len(self.transforms)
        if is_new:
            if self.compile_layers:
                compile_network(self.network)
            shard(self.network, strategy)
            self._is_finished = self.compile_layers or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
        # Not before the network is built and sharded: what that frees would stay, and under ZeRO-3 a rank would reach a
        # peak of more than the whole network.
        if strategy and strategy.root_device.type == "cpu":
            keep_freed_memory()

    def forward(self, ids: Tensor, document_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V); arguments as for :class:`~cola_lightning.models.Llama`."""
        return self.network(ids, document_ids, **options)

    # -- steps --------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        prepare_fit_loop(self.trainer)

    def on_train_start(self) -> None:
        self.checkpoint_state.has_weights = True
        check_last_group(self.trainer)
        self._step_tokens = None
        if self.trainer.global_step:
            with explain_restore(lambda: self.trainer.ckpt_path):
                self.checkpoint_state.restore_settings()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the share of a micro-batch in the loss of its optimizer step.

        The share is the sum of the micro-batch's losses, divided by the tokens of the global batch. Summed over
        micro-batches and ranks, the shares are the mean loss over all tokens.
        """
        loss_sum, kept = next_token_losses(self, batch, reduction="sum")
        tokens = kept.sum()
        self.train_loss.update(loss_sum.detach(), tokens)
        if self.mean_of_micro_batches:
            return loss_sum / tokens.clamp(min=1)
        if self._step_tokens is None:
            self._step_tokens = sum_step_tokens(self.trainer, batch)
        return loss_sum * loss_scale(self.trainer) / self._step_tokens

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        postpone_stop(self.trainer)

    def on_validation_end(self) -> None:
        postpone_stop(self.trainer)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Make an optimizer step. At a logging step, log the mean loss over all tokens of all ranks since the last one.

        The host waits for the device only at logging steps. Logging happens here and not at the end of the batch,
        because callbacks write checkpoints there, and the mean must be complete before.
        """
        with self.checkpoint_state.explain_first_step(self.trainer.ckpt_path):
            super().optimizer_step(*arguments, **options)
        if not is_accumulating(self.trainer):  # DeepSpeed comes here for every micro-batch
            self._step_tokens = None
            resume_stop(self.trainer)  # before callbacks ask whether this step is the last
        if not at_log_step(self.trainer, uncounted=1):  # Lightning counts the step after this method
            return
        loss = self.train_loss.compute()
        self.log("train/loss", loss)
        self.log("loss", loss, prog_bar=True, logger=False)
        self.train_loss.reset()
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):  # it clips in its own step
            norm = cast(Any, self.trainer.strategy.model).get_global_grad_norm()
            self.log("train/gradient_norm", norm if norm is not None else float("nan"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.checkpoint_state.store(self.trainer, self.train_loss, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.checkpoint_state.load(attached_trainer(self), self.train_loss, checkpoint)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        self.checkpoint_state.has_weights = True
        return super().load_state_dict(*arguments, **options)

    def _warn_if_untrained(self) -> None:
        self.checkpoint_state.warn_if_untrained(self.trainer)

    on_validation_start = on_test_start = on_predict_start = _warn_if_untrained

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return for each row the summed loss in nats and the number of predicted tokens, each (B,)."""
        losses, kept = next_token_losses(self, batch)
        return {"loss_sum": losses.sum(dim=1), "tokens": kept.sum(dim=1)}

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        loss_sum, kept = next_token_losses(self, batch, reduction="sum")
        tokens = kept.sum()
        self.perplexity.update(loss_sum, tokens)
        self.published_perplexity.update(loss_sum, tokens)
        self.log(f"{stage}/perplexity", self.perplexity, on_epoch=True, prog_bar=True)
        self.log(f"{stage}/perplexity_as_published", self.published_perplexity, on_epoch=True)

    # -- optimizer ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer, schedule = make_optimizer_and_schedule(
            self.trainer, self.network, self.make_optimizer, self.make_schedule
        )
        self.checkpoint_state.set_optimizer(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, log the norm before clipping, and call the hooks in ``before_update``."""
        parameters = list(self.parameters())
        norm = clip_by_norm(self.trainer, optimizer, parameters, gradient_clip_val, gradient_clip_algorithm)
        if norm is not None:
            self.log("train/gradient_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        for hook in self.before_update:
            hook(self, optimizer, norm)
