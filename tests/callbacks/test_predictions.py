"""Predictions of each row of the data, under the row's number."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cola_lightning.callbacks import Predictions
from tests.conftest import tiny_trainer
from tests.processes import Run

pytestmark = pytest.mark.slow


class Numbered(Dataset):
    """Data set of ten rows. In row i, i // 2 tokens are predicted."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        labels = torch.arange(1, 9)
        labels[index // 2 + 1 :] = -100
        return {"input_ids": torch.arange(1, 9), "labels": labels}


class Streamed(IterableDataset):
    def __iter__(self):
        return (Numbered()[index] for index in range(10))


def predict(folder: str, ranks: int, data: str) -> None:
    flags = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    trainer, model, _ = tiny_trainer(Predictions(), steps=1, default_root_dir=folder, **flags)
    data = {"map": DataLoader(Numbered(), 4), "stream": DataLoader(Streamed(), 4),
            "two": [DataLoader(Numbered(), 4), DataLoader(Numbered(), 3)]}[data]  # fmt: skip
    trainer.predict(model, data, return_predictions=False)


def read(folder: Path) -> list[dict]:
    files = sorted(folder.glob("predictions*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("data", ["map", "stream"])
def test_predictions_have_the_row_numbers_of_the_data(data, tmp_path):
    predict(str(tmp_path), 1, data)
    rows = read(tmp_path)
    assert [(row["row"], row["tokens"]) for row in rows] == [(index, index // 2) for index in range(10)]
    assert [row["perplexity"] is None for row in rows] == [True, True] + 8 * [False]


def test_of_several_loaders_each_row_says_which(tmp_path):
    predict(str(tmp_path), 1, "two")
    expected = [(loader, index) for loader in (0, 1) for index in range(10)]
    assert [(row["dataloader"], row["row"]) for row in read(tmp_path)] == expected


def test_on_two_ranks_each_row_is_there_once_under_its_number(tmp_path):
    Run(predict, str(tmp_path), 2, "map", ranks=2, folder=tmp_path / "logs").done()
    rows = read(tmp_path)
    assert sorted((row["row"], row["tokens"]) for row in rows) == [(index, index // 2) for index in range(10)]
