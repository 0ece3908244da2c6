import math

import pytest
import torch

from cola_lightning.training.metrics import Perplexity, PublishedPerplexity

BATCHES = [(30.0, 10), (8.0, 4), (0.0, 0), (5.0, 1)]  # loss sum, tokens


def fill(metric):
    for loss_sum, tokens in BATCHES:
        metric.update(torch.tensor(loss_sum), torch.tensor(tokens))
    return metric


def test_perplexity_weighs_tokens():
    assert fill(Perplexity()).compute().item() == pytest.approx(math.exp(43 / 15))


def test_published_perplexity_weighs_batches_and_divides_by_one_too_many():
    assert fill(PublishedPerplexity()).compute().item() == pytest.approx(math.exp((3 + 2 + 5) / 4))


def test_sums_stay_exact_beyond_float32_and_under_bf16():
    metric = Perplexity().to(torch.bfloat16)
    for _ in range(3):
        metric.update(torch.tensor(2.0**25 + 1, dtype=torch.float64), torch.tensor(2**25 + 1))
    assert metric.tokens.item() == 3 * (2**25 + 1)
    assert metric.compute().item() == pytest.approx(math.e)


def test_reset_counts_the_extra_batch_again():
    metric = fill(PublishedPerplexity())
    metric.reset()
    assert fill(metric).compute().item() == pytest.approx(math.exp(10 / 4))
