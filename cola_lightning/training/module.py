"""The LightningModule: loss, measures and optimizer around a network that ``configure_model`` builds."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import AdamW, Optimizer, SparseAdam

from cola_lightning.checkpoints.initialize import initialize_from_folder
from cola_lightning.checkpoints.restore import check_progress, first_step_explained
from cola_lightning.data.packing import IGNORE
from cola_lightning.distributed.sharding import builds_lazily, shard
from cola_lightning.distributed.strategies import check_optimizer, clip_gradients
from cola_lightning.errors import InputError
from cola_lightning.host_memory import check_memory
from cola_lightning.models import FullRank, Llama, LlamaConfig, MakeProjection
from cola_lightning.models.llama import build_llama
from cola_lightning.optim import MakeOptimizer, MakeSchedule, Parameters, WarmupCosine
from cola_lightning.optim.schedules import check_schedule, make_schedule
from cola_lightning.private_apis import is_accumulating, unscales_by_itself
from cola_lightning.training.fit_loop import prepare_fit_loop
from cola_lightning.training.gradient_accumulation import (
    accumulate,
    check_last_group,
    loss_scale,
    rescale_progress,
    step_tokens_of_all_ranks,
    tell_step_tokens,
)
from cola_lightning.training.metrics import Perplexity, PublishedPerplexity, TokenLoss
from cola_lightning.training.resumed_settings import OptimizerSettings, keep_patience

BeforeUpdate = Callable[["LanguageModel", Optimizer, Tensor | None], None]
"""``f(module, optimizer, norm)`` is called between clipping and the optimizer's update, with the gradient norm before
clipping (none under DeepSpeed, which knows it only afterwards)."""
MOST_LAYERS = 10_000
"""A network of more would take minutes to build, and means a slip of the keyboard or a hostile file."""


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """The trainer of a module; None where it has none."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def at_log_step(trainer: L.Trainer, uncounted: int = 0) -> bool:
    """Whether an optimizer step that the trainer will log has just been made; ``uncounted`` is 1 where the trainer has
    yet to count it."""
    step = trainer.global_step + uncounted
    every = trainer.log_every_n_steps  # 0 for never, as under --trainer.barebones
    return every > 0 and step % every == 0 and not is_accumulating(trainer)


def next_token_losses(
    network: nn.Module, batch: dict[str, Tensor], reduction: Literal["none", "sum"] = "none"
) -> tuple[Tensor, Tensor]:
    """Next-token losses in nats (B, T), zero where ignored, or their sum; and where they were not ignored (B, T). The
    last token of a row has none that follows, so it is ignored always."""
    targets = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    losses = network(batch["input_ids"], batch.get("document_ids"), targets=targets, reduction=reduction)
    return losses, targets != IGNORE


def _refusal(flag: str, error: Exception) -> str:
    """One line of what an optimizer or a schedule says as it is made."""
    if isinstance(error, InputError):
        return str(error)
    text = " ".join(str(error).split())
    matrices = "; name it for the projections' matrices and another for the rest, as configs/method/muon.yaml does"
    return f"{flag}: {text}{matrices if '2D' in text else ''}"


class LanguageModel(L.LightningModule):
    """Pre-trains a LLaMA whose projections come from a factory.

    Args:
        vocab_size: Rows of the embedding and of the head (V).
        hidden_size: Width of the residual stream (D).
        intermediate_size: Width inside the MLP (F).
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads (H).
        num_key_value_heads: Key and value heads; as many as query heads if not given.
        max_position_embeddings: Longest sequence that is accepted, in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How they are stretched to longer texts: ``rope_type`` (linear, dynamic, yarn or llama3) and its
            settings, by Hugging Face's names; null for not at all.
        rms_norm_eps: Epsilon inside RMSNorm.
        gate_silu: Keep LLaMA's SiLU on the MLP's gate; the CoLA paper drops it from 350M up.
        pad_token_id: Id whose embedding stays zero; null where the tokenizer has no padding id.
        projection: Makes each of the seven projections of a layer from (in_features, out_features).
        optimizer: Makes the optimizer from the parameters.
        schedule: Makes the learning-rate schedule from the optimizer. Its argument ``total_steps``, ``T_max`` or
            ``total_iters`` is the number of optimizer steps of the run where it is not given.
        fused_projections: Make one product of the matrices of q, k and v, and of gate and up, which share their input.
            Parameters keep their names. Cross-layer methods, and CoLA-M with ``keep: latents``, do without.
        loss_chunk_size: Tokens whose logits exist at a time in training; null for all at once. Where the vocabulary is
            large beside the hidden size, logits and their gradients take most of the memory.
        compile: Compile each decoder layer, and head and loss, with ``torch.compile``.
        mean_of_micro_batches: Average the mean losses of micro-batches, as the published scripts do. Rows differ in
            length, so the gradient then depends on how the batch is cut into micro-batches and ranks. Without it, every
            token of the global batch counts alike.
        initial_weights: Folder with weights to begin with in place of drawn ones, as ``export`` and ``factorize`` write
            it. Where the command line names a checkpoint, that one's weights count.

    Raises:
        InputError: Where the sizes do not fit together; the message names the value and the fix.
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
        schedule: MakeSchedule = WarmupCosine,
        fused_projections: bool = False,
        loss_chunk_size: int | None = None,
        compile: bool = False,
        mean_of_micro_batches: bool = False,
        initial_weights: str | None = None,
    ) -> None:
        # The sizes are arguments of this class, because its arguments are the command line's flags and a checkpoint's
        # hyper-parameters: --model.hidden_size, not --model.config.hidden_size. From here on they are one object.
        arguments = locals()
        config = LlamaConfig(**{field.name: arguments[field.name] for field in fields(LlamaConfig)})
        super().__init__()
        check_schedule(schedule)
        self.save_hyperparameters()
        # Only plain data may go into a checkpoint, which then loads without unpickling anything. On the command line
        # everything is: there Lightning stores what was typed. From Python the three factories are code.
        for name in [name for name, value in self.hparams.items() if callable(value)]:
            del self.hparams[name]
        if num_hidden_layers > MOST_LAYERS:  # each is built, if without memory
            raise InputError(f"--model.num_hidden_layers is {num_hidden_layers}; {MOST_LAYERS:,} is the most")
        self.build = partial(build_llama, config=config, projection=projection)
        with torch.device("meta"):
            network = self.build()  # refuses impossible projections now rather than after the data is prepared
        self.parameter_count = sum(parameter.numel() for parameter in network.parameters())
        self.initial_weights, self.mean_of_micro_batches = initial_weights, mean_of_micro_batches
        self._step_tokens: Tensor | None = None  # of all ranks; known from a step's first micro-batch to its last
        self.make_optimizer, self.make_schedule, self.compile_layers = optimizer, schedule, compile
        self.config = config
        self._optimizer_settings: OptimizerSettings  # there once the optimizer is made
        self._stored_settings: list[dict[str, Any]] | None = None  # of the run that wrote the checkpoint
        self._stored_position = 0  # of its schedule, in steps
        self.transforms: list[Callable[[Llama], None]] = []
        self._is_restored = False  # and no step made since
        self._has_weights = initial_weights is not None  # others than those drawn
        self._transformed = 0  # how many of them the network has
        self._finished = False  # compiled or sharded, so that no transform can follow
        self.before_update: list[BeforeUpdate] = []
        self.train_loss = TokenLoss()
        self.perplexity = Perplexity()
        self.published_perplexity = PublishedPerplexity()

    @classmethod
    def load_from_checkpoint(cls, *_: Any, **__: Any) -> "LanguageModel":
        """Lightning's way imports and calls what the file names;
        ``cola_lightning.inference.load.load_model_for_inference`` does not.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "load_from_checkpoint runs code that the file names; use "
            "cola_lightning.inference.load.load_model_for_inference(path).network"
        )

    # -- network ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self._check_data()
        if stage != "fit":
            return
        if self.trainer.max_steps < 1:
            raise InputError(
                "the run has no length: schedule and data are counted in optimizer steps; set --trainer.max_steps"
            )
        data = self.trainer.datamodule
        if getattr(data, "global_batch_size", None):
            accumulate(self.trainer, data.global_batch_size, data.batch_size)
        tell_step_tokens(self.trainer)

    def configure_model(self) -> None:
        """The one place where the network comes to be: build, transform (checkpointing), compile, shard; DDP, FSDP
        and DeepSpeed wrap it afterwards.

        Lightning calls it once per stage, and callbacks may call it before their fellows' ``setup``. The network is
        built by the first call. A later one applies the transforms that were registered since.

        Raises:
            InputError: If a transform comes too late, the network being compiled or sharded already.
        """
        if hasattr(self, "network"):
            self._transform()
            return
        rank_zero_info(f"Building a network of {self.parameter_count:,} parameters")
        trainer = attached_trainer(self)
        strategy = trainer.strategy if trainer else None
        lazily = builds_lazily(strategy)
        if strategy and not lazily and strategy.root_device.type == "cpu":
            check_memory(4 * self.parameter_count, "its weights", "lower --model.hidden_size or another of its sizes")
        with torch.device("meta") if lazily else nullcontext():
            self.network = self.build()
        self._transformed = 0
        if self.initial_weights:
            initialize_from_folder(self.network, self.initial_weights)
        self._transform()
        if self.compile_layers:
            for layer in self.network.model.layers:
                layer.compile()
            self.network.lm_head.compile()
        shard(self.network, strategy)
        self._finished = self.compile_layers or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)

    def _transform(self) -> None:
        """Apply the registered transforms that the network does not have yet."""
        for transform in self.transforms[self._transformed :]:
            if self._finished:
                owner = type(getattr(transform, "__self__", transform)).__name__
                raise InputError(
                    f"{owner} has to change the network before it is compiled and sharded, but a stage before this one "
                    f"did that; give that stage's Trainer the same callbacks, or make a new LanguageModel"
                )
            transform(self.network)
            self._transformed += 1

    def _check_data(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        length = getattr(data, "sequence_length", None)
        if length is not None and length > self.config.max_position_embeddings:
            raise InputError(
                f"--data.sequence_length {length} is beyond --model.max_position_embeddings "
                f"{self.config.max_position_embeddings}; lower the first or raise the second"
            )
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is None:
            return
        if tokenizer.vocab_size > self.config.vocab_size:
            raise InputError(
                f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the embedding has only "
                f"{self.config.vocab_size} rows; set --model.vocab_size {tokenizer.vocab_size}"
            )
        if self.config.pad_token_id is not None and self.config.pad_token_id != tokenizer.pad_id:
            fix = "null" if tokenizer.pad_id is None else tokenizer.pad_id
            raise InputError(
                f"--model.pad_token_id {self.config.pad_token_id} would hold the embedding of "
                f"{tokenizer.decode([self.config.pad_token_id])!r} at zero, for tokenizer {tokenizer.name} pads with "
                f"{tokenizer.pad_id}; set --model.pad_token_id {fix}"
            )

    def forward(self, ids: Tensor, document_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V); arguments as for :class:`~cola_lightning.models.Llama`."""
        return self.network(ids, document_ids, **options)

    # -- steps --------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        prepare_fit_loop(self.trainer)

    def on_train_start(self) -> None:
        self._has_weights = True
        check_last_group(self.trainer)
        self._step_tokens = None
        if self.trainer.global_step:
            self.restore_settings()

    def restore_settings(self) -> None:
        """After a checkpoint was loaded, let what this run was made with win over what the checkpoint holds."""
        self._optimizer_settings.restore(self._stored_settings, self._stored_position)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The share of this micro-batch in the loss of its optimizer step: the sum of its losses, divided by the tokens
        of the whole global batch. Summed over micro-batches and ranks, that is the mean over all tokens."""
        loss_sum, kept = next_token_losses(self, batch, reduction="sum")
        tokens = kept.sum()
        self.train_loss.update(loss_sum.detach(), tokens)
        if self.mean_of_micro_batches:
            return loss_sum / tokens.clamp(min=1)
        if self._step_tokens is None:
            self._step_tokens = step_tokens_of_all_ranks(self.trainer, batch)
        return loss_sum * loss_scale(self.trainer) / self._step_tokens

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Make the step, and where it is to be logged, log the mean over all tokens of all ranks since the last log;
        the device is asked no more often. By the end of a batch, when a checkpoint may be written, it is logged."""
        with first_step_explained(self.trainer.ckpt_path) if self._is_restored else nullcontext():
            super().optimizer_step(*arguments, **options)
        self._is_restored = False
        if not is_accumulating(self.trainer):  # DeepSpeed comes here for every micro-batch
            self._step_tokens = None
        if not at_log_step(self.trainer, uncounted=1):  # it is counted when this returns
            return
        loss = self.train_loss.compute()
        self.log("train/loss", loss)
        self.log("loss", loss, prog_bar=True, logger=False)
        self.train_loss.reset()
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):  # it clips in its own step
            norm = self.trainer.strategy.model.get_global_grad_norm()
            self.log("train/gradient_norm", norm if norm is not None else float("nan"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next logged mean has so far, of all ranks."""
        sums = torch.stack([self.train_loss.loss_sum, self.train_loss.tokens])
        checkpoint["train_loss"] = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        checkpoint["optimizer_settings"] = self._optimizer_settings.groups
        checkpoint["micro_batches"] = self.trainer.accumulate_grad_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = attached_trainer(self)
        if trainer:
            check_progress(checkpoint, trainer)
        trains = trainer and trainer.state.fn == TrainerFn.FITTING
        averages = trains and any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
        if trains and not averages and "current_model_state" in checkpoint:
            # Its state_dict is the average, and does not belong to its optimizer's state.
            raise InputError(
                "the checkpoint holds an average of weights, of the callback WeightAveraging or EMAWeightAveraging, "
                "which is not among --trainer.callbacks; name it again to go on"
            )
        self._stored_settings, self._is_restored = checkpoint.get("optimizer_settings"), trains
        if schedules := checkpoint.get("lr_schedulers"):
            # ``restore_settings`` steps the schedule there. Its own state may be that of a schedule of another class.
            self._stored_position, checkpoint["lr_schedulers"] = schedules[0]["last_epoch"], []
        if trainer:
            keep_patience(trainer, checkpoint.get("callbacks", {}))
        if trainer and "micro_batches" in checkpoint and "loops" in checkpoint:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            rescale_progress(progress, checkpoint["micro_batches"], trainer.accumulate_grad_batches)
        self._has_weights = True
        self.train_loss.reset()
        sums = torch.tensor(checkpoint.get("train_loss", (0.0, 0.0)), dtype=torch.float64)
        if trainer and trainer.is_global_zero and sums.any():
            self.train_loss.update(*sums)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        self._has_weights = True
        return super().load_state_dict(*arguments, **options)

    def _tell_untrained(self) -> None:
        if not self._has_weights and self.trainer.state.fn != TrainerFn.FITTING:
            rank_zero_warn(
                f"The network is untrained: {self.trainer.state.fn.value} was given no checkpoint, so its weights are "
                "those that training would begin with; name one by --ckpt_path"
            )

    on_validation_start = on_test_start = on_predict_start = _tell_untrained

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Per row: the summed loss in nats and the number of predicted tokens, each (B,)."""
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

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = Parameters(self.network)
        try:
            optimizer = self.make_optimizer(parameters)
        except (TypeError, ValueError, RuntimeError) as error:  # as torch's Muon, which takes nothing but matrices
            raise InputError(_refusal("--model.optimizer", error)) from error
        if isinstance(optimizer, SparseAdam):
            raise InputError("--model.optimizer SparseAdam takes sparse gradients, of which there are none; take AdamW")
        check_optimizer(self.trainer.strategy, optimizer)
        try:
            schedule = make_schedule(self.make_schedule, optimizer, self.trainer.max_steps)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(_refusal("--model.schedule", error)) from error
        self._optimizer_settings = OptimizerSettings(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by global norm and log the norm as it was before."""
        if gradient_clip_algorithm == "value":
            raise InputError(
                "--trainer.gradient_clip_algorithm value is not offered; clipping is by norm, as in the papers"
            )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and unscales_by_itself(optimizer):
            scaler.unscale_(optimizer)  # 16-mixed leaves it to a fused optimizer, whose step comes after clipping
        norm = clip_gradients(self.trainer.strategy, list(self.parameters()), gradient_clip_val)
        if norm is not None:
            self.log("train/gradient_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        for hook in self.before_update:
            hook(self, optimizer, norm)
