"""Perplexities that a model has to beat, printed beside its own when training ends."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cola_lightning.data.rows import IGNORE


class Yardsticks(L.Callback):
    """Counts tokens as they pass, and at the end prints the validation perplexity of the model beside those of the
    uniform distribution over the vocabulary and of the unigram model (frequencies of the training tokens seen, with
    one added to each count), on the same validation tokens.
    """

    def __init__(self) -> None:
        self._train = self._validation = torch.zeros(0)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not len(self._train):
            self._train = torch.zeros(pl_module.vocab_size, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"train": self._train.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train = state_dict["train"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._train = _add(self._train, batch)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = torch.zeros_like(self._train)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validation = _add(self._validation, batch)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = trainer.callback_metrics.get("val/perplexity")
        if model is None or not len(self._validation):
            return
        train, validation = (
            trainer.strategy.reduce(counts.double(), reduce_op="sum") for counts in (self._train, self._validation)
        )
        unigram = unigram_perplexity(train, validation)
        rank_zero_info(
            f"\nPerplexity on {int(validation.sum()):,} held-out tokens"
            f"\n  uniform over the vocabulary {len(train):10,.1f}"
            f"\n  unigram                     {unigram:10,.1f}"
            f"\n  this model                  {float(model):10,.1f}"
        )


def unigram_perplexity(train: Tensor, validation: Tensor) -> float:
    """Perplexity of the unigram model with counts ``train`` (V,) plus one, on tokens counted in ``validation`` (V,)."""
    log_probabilities = ((train + 1) / (train + 1).sum()).log()
    return float((-(validation * log_probabilities).sum() / validation.sum()).exp())


def _add(counts: Tensor, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"][:, 1:].flatten()
    kept = labels != IGNORE
    # index_add_ rather than bincount, which makes the device wait for the largest value
    return counts.to(labels.device).index_add_(0, labels.where(kept, 0), kept.to(counts.dtype))
