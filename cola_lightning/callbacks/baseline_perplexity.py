"""Perplexities of simple models, printed beside that of the trained model when training ends."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from cola_lightning.callbacks.log_lines import write_lines
from cola_lightning.data.packing import IGNORE
from cola_lightning.stored_data import ALTERED, StoredDataError
from cola_lightning.training.module import LanguageModel


class BaselinePerplexity(L.Callback):
    """Print, when training ends, the validation perplexity beside those of two models without context.

    These are the uniform distribution over the vocabulary, and the unigram model: frequencies of the tokens trained on,
    with one added to each count. All three are measured on the same validation tokens.
    """

    def __init__(self) -> None:
        self._train = self._validation = torch.zeros(0)  # counts of this rank and process
        self._carried: Tensor | None = None  # counts of all ranks before this process
        self._sum: Callable[[Tensor], Tensor] = lambda counts: counts  # over the ranks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._sum = partial(trainer.strategy.reduce, reduce_op="sum")
        device = trainer.strategy.root_device  # where ranks can add them up
        if not len(self._train):
            self._train = torch.zeros(cast(LanguageModel, pl_module).config.vocab_size, dtype=torch.int64)
        self._train = self._train.to(device)

    def _counted(self) -> Tensor:
        """Return counts of training tokens by id (V,), of all ranks since the run began; all ranks call this."""
        counts = self._sum(self._train.clone())  # because the sum over ranks is made in place
        return counts if self._carried is None else counts + self._carried.to(counts.device)

    def state_dict(self) -> dict[str, Any]:
        """Return counts of all ranks. Every rank of a resumed run loads them, on any number of ranks."""
        return {"train": self._counted()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counts = state_dict.get("train")
        if not isinstance(counts, Tensor) or counts.is_floating_point() or counts.dim() != 1:
            raise StoredDataError(
                f"in the state of BaselinePerplexity sets train to {counts!r:.80}, not to counts; {ALTERED}"
            )
        self._carried, self._train = state_dict["train"], torch.zeros_like(self._train)

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
        counts = self._counted(), self._sum(self._validation.clone())
        train, validation = (each.cpu().double() for each in counts)  # Apple's GPU has no float64
        unigram = unigram_perplexity(train, validation)
        write_lines(
            trainer,
            [
                "",
                f"Perplexity on {int(validation.sum()):,} held-out tokens",
                f"  uniform over the vocabulary {len(train):10,.1f}",
                f"  unigram                     {unigram:10,.1f}",
                f"  this model                  {float(model):10,.1f}",
            ],
        )


def unigram_perplexity(train: Tensor, validation: Tensor) -> float:
    """Compute the perplexity of the unigram model with counts ``train`` (V,) plus one, on tokens counted in
    ``validation`` (V,)."""
    log_probabilities = ((train + 1) / (train + 1).sum()).log()
    return float((-(validation * log_probabilities).sum() / validation.sum()).exp())


def _add(counts: Tensor, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"][:, 1:].flatten()
    kept = labels != IGNORE
    # index_add_ rather than bincount, which makes the device wait for the largest value
    return counts.to(labels.device).index_add_(0, labels.where(kept, 0), kept.to(counts.dtype))
