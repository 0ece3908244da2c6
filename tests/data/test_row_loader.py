from itertools import chain, islice

import pytest
import torch
from torch.utils.data import Dataset

from cola_lightning.data.row_loader import EvalLoader, TrainLoader


class Numbers(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([index, index]), "labels": torch.tensor([index, index])}


def train(count, batch_size, batches, **settings):
    loader = TrainLoader(Numbers(count), batch_size, batches, seed=7, **settings)
    return loader, [batch["input_ids"][:, 0].tolist() for batch in islice(loader, batches)]


def test_each_pass_has_every_row_once_in_a_new_order():
    _, batches = train(10, 2, 10)
    first, second = list(chain(*batches[:5])), list(chain(*batches[5:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert train(10, 2, 10)[1] == batches


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_after_the_last_batch_returned(workers):
    _, whole = train(10, 3, 8)
    loader = TrainLoader(Numbers(10), 3, 8, seed=7, workers=workers)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    assert loader.position == 12
    assert train(10, 3, 4, position=loader.position, workers=workers)[1] == whole[4:]


def test_ranks_share_the_sequence_and_any_number_of_ranks_continues_it():
    _, alone = train(12, 4, 6)
    ranks = [train(12, 2, 6, replicas=2, rank=rank)[1] for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone
    later = [train(12, 1, 3, replicas=4, rank=rank, position=12)[1] for rank in range(4)]
    assert [list(chain(*batch)) for batch in zip(*later, strict=True)] == alone[3:]


@pytest.mark.parametrize(("count", "replicas"), [(10, 1), (10, 2), (11, 3), (2, 3)])
def test_evaluation_sees_every_row_once_in_equally_many_batches(count, replicas):
    loaders = [EvalLoader(Numbers(count), 2, replicas=replicas, rank=rank) for rank in range(replicas)]
    batches = [list(loader) for loader in loaders]
    assert {len(rank) for rank in batches} == {len(loaders[0])}
    labels = torch.cat([batch["labels"][:, 0] for rank in batches for batch in rank])
    assert sorted(labels[labels >= 0].tolist()) == list(range(count))
    assert (labels[labels < 0] == -100).all()
    assert all(len(batch["labels"]) == 2 for rank in batches for batch in rank)
