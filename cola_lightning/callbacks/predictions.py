"""What ``predict`` leaves behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class Predictions(BasePredictionWriter):
    """Writes ``predictions.jsonl`` into the run's directory: for each held-out row its number, how many of its tokens
    were predicted, and their perplexity. Every rank writes a file of its own, the ranks after the first with a number.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        name = f"predictions.{trainer.global_rank}.jsonl" if trainer.global_rank else "predictions.jsonl"
        self.file = Path(trainer.log_dir or trainer.default_root_dir) / name
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")

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
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        size = len(prediction["tokens"])
        first = (batch_idx * ranks["num_replicas"] + ranks["rank"]) * size
        perplexity = (prediction["loss_sum"] / prediction["tokens"]).exp()
        with self.file.open("a") as file:
            for row, (tokens, value) in enumerate(
                zip(prediction["tokens"].tolist(), perplexity.tolist(), strict=True), first
            ):
                if tokens:  # rows that only fill the last batch up have none
                    file.write(json.dumps({"row": row, "tokens": tokens, "perplexity": value}) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank_zero_info(f"Perplexity of each row: {self.file}")
