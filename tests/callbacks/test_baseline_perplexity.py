import math

import pytest
import torch

from cola_lightning.callbacks.baseline_perplexity import BaselinePerplexity, unigram_perplexity
from tests.conftest import loader, tiny_trainer


def test_unigram_perplexity_is_the_cross_entropy_of_smoothed_frequencies():
    train, validation = torch.tensor([3, 0, 5]), torch.tensor([2, 1, 0])
    expected = math.exp(-(2 * math.log(4 / 11) + 1 * math.log(1 / 11)) / 3)
    assert unigram_perplexity(train, validation) == pytest.approx(expected)


def test_counts_what_was_learnt_and_prints_at_the_end(caplog):
    callback = BaselinePerplexity()
    run, model, batches = tiny_trainer(callback, steps=3)
    run.fit(model, loader(batches), loader(batches))
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches][:3])
    counts = torch.bincount(labels[labels >= 0], minlength=model.config.vocab_size)
    assert torch.equal(callback.state_dict()["train"], counts)
    report = next(record.message for record in caplog.records if "held-out tokens" in record.message)
    held_out = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
    held_out = torch.bincount(held_out[held_out >= 0], minlength=model.config.vocab_size)
    assert f"Perplexity on {int(held_out.sum()):,}" in report
    assert f"{model.config.vocab_size:,.1f}" in report
    assert f"{unigram_perplexity(counts, held_out):,.1f}" in report
    assert f"{float(run.callback_metrics['val/perplexity']):,.1f}" in report


def test_the_count_goes_on_over_a_resume():
    first, second = BaselinePerplexity(), BaselinePerplexity()
    run, model, batches = tiny_trainer(first, steps=2)
    run.fit(model, loader(batches))
    second.load_state_dict(first.state_dict())
    run, model, batches = tiny_trainer(second, steps=2)
    run.fit(model, loader(batches))
    assert torch.equal(second.state_dict()["train"], 2 * first.state_dict()["train"])
