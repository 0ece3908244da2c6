"""The output file of ``predict``."""

import json
import math
import warnings
from collections.abc import Sequence, Sized
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from cola_lightning.callbacks.log_lines import write_table
from cola_lightning.data.row_loader import EvalLoader
from cola_lightning.provenance import run_folder


class Predictions(BasePredictionWriter):
    """Write ``predictions.jsonl`` into the run's directory, a line for each held-out row.

    A line has the row's number, how many of its tokens were predicted, and their perplexity (null if none were). Each
    rank writes its own file: rank 0 ``predictions.jsonl``, rank 1 ``predictions.1.jsonl``, and so on.

    The row's number is its index in the data set. Rows without an index, such as those of an iterable data set, are
    numbered in the order in which this rank reads them.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        name = f"predictions.{trainer.global_rank}.jsonl" if trainer.global_rank else "predictions.jsonl"
        self.file = run_folder(trainer) / name
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")
        self.seen = [0] * len(_loaders(trainer))
        if any(isinstance(loader, EvalLoader) for loader in _loaders(trainer)):
            warnings.filterwarnings("ignore", ".*Couldn't infer the batch indices fetched from your dataloader.*")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        loader = _loaders(trainer)[dataloader_idx]
        tokens = prediction["tokens"].tolist()
        if isinstance(loader, EvalLoader):
            numbers, rows = loader.indices(batch_idx), float(len(cast(Sized, loader.rows)))
        else:
            # Lightning knows the indices of a DataLoader over a data set, also if its sampler gives each rank a part.
            known = batch_indices or range(self.seen[dataloader_idx], self.seen[dataloader_idx] + len(tokens))
            numbers, rows = list(known), math.inf
        self.seen[dataloader_idx] += len(tokens)
        several = {"dataloader": dataloader_idx} if len(_loaders(trainer)) > 1 else {}
        perplexity = (prediction["loss_sum"] / prediction["tokens"]).exp().tolist()
        with self.file.open("a", encoding="utf-8") as file:
            for row, count, value in zip(numbers, tokens, perplexity, strict=True):
                if row < rows:  # rows above only fill up the last batch
                    line = several | {"row": row, "tokens": count, "perplexity": value if count else None}
                    file.write(json.dumps(line) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        write_table(trainer, [("rows", str(self.file))])


def _loaders(trainer: L.Trainer) -> list[Any]:
    loaders = trainer.predict_dataloaders
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]
