"""Batches that are sent between processes."""

import pickle
from multiprocessing.reduction import ForkingPickler

import torch
from torch.utils.data import DataLoader, IterableDataset

from cola_lightning.data.transfer import SentBatch

BATCH = {
    "input_ids": torch.tensor([[0, 1, 2**31 - 1], [5, 6, 7]]),
    "labels": torch.tensor([[-100, 1, 2**31 - 1], [-100, -100, 7]]),
    "document_ids": torch.tensor([[0, 0, 1], [0, 1, 2]]),
}


class Two(IterableDataset):
    def __iter__(self):
        yield SentBatch(BATCH, {"3": {"tokens": [7], "rest": None}})
        yield ValueError("no batch")


def test_a_worker_sends_the_same_tensors_and_states():
    sent, error = DataLoader(Two(), batch_size=None, num_workers=1)
    assert sent.states == {"3": {"tokens": [7], "rest": None}}
    assert sent.batch.keys() == BATCH.keys()
    for name, tensor in BATCH.items():
        assert sent.batch[name].dtype == torch.int64
        assert torch.equal(sent.batch[name], tensor)
        sent.batch[name][0, 0] = 9  # a received batch must be writable
    assert error.args == ("no batch",)


def test_a_batch_is_sent_as_int32_bytes_without_shared_memory():
    """PyTorch pickles a tensor as the name of an open file in shared memory; the bytes must contain none."""
    batch = {name: torch.arange(32 * 256).reshape(32, 256) for name in ("input_ids", "labels")}
    message = bytes(ForkingPickler.dumps(SentBatch(batch)))
    assert 0 <= len(message) - 2 * 32 * 256 * 4 < 1000
    assert b"rebuild_tensor" not in message
    assert torch.equal(pickle.loads(message).batch["labels"], batch["labels"])
