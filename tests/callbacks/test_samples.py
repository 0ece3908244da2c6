import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cola_lightning.callbacks import Samples
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.conftest import loader, tiny_trainer


class Data(L.LightningDataModule):
    def __init__(self, batches, tokenizer):
        super().__init__()
        self.batches, self.tokenizer = batches, tokenizer

    def train_dataloader(self):
        return loader(self.batches)

    def val_dataloader(self):
        return loader(self.batches[:1])


def test_texts_are_logged_to_tensorboard_and_the_last_is_printed(texts, tmp_path, caplog):
    tokenizer = Tokenizer.train(iter(texts), 280)
    prompts = ["the nation", "peace"]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run, model, batches = tiny_trainer(
        Samples(prompts, max_new_tokens=5), steps=4, val_check_interval=2, logger=logger, vocab_size=280
    )
    run.fit(model, datamodule=Data(batches, tokenizer))
    events = EventAccumulator(str(tmp_path)).Reload()
    for prompt in prompts:
        written = events.Tensors(f"samples/{prompt}/text_summary")
        assert [event.step for event in written] == [2, 4]
        assert written[-1].tensor_proto.string_val[0].decode().startswith(prompt)
    told = [record.message for record in caplog.records if "The model continues" in record.message]
    assert len(told) == 2


def test_a_network_that_gives_nan_does_not_end_the_run(texts):
    tokenizer = Tokenizer.train(iter(texts), 280)
    samples = Samples(["the nation"], max_new_tokens=5)
    run, model, batches = tiny_trainer(samples, steps=2, val_check_interval=2, vocab_size=280)
    model.configure_model()
    with torch.no_grad():
        model.network.model.norm.weight[0] = float("nan")
    run.fit(model, datamodule=Data(batches, tokenizer))
    assert run.global_step == 2
    assert samples.texts[0].startswith("the nation (the logits are NaN")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": float("nan")}, "Samples: temperature is nan; it must be"),
        ({"temperature": -1.0}, "Samples: temperature is -1.0; it must be at least 0"),
        ({"seed": 2**64}, "Samples: seed is 18446744073709551616"),
        ({"top_k": 0}, "Samples: top_k is 0"),
        ({"max_new_tokens": 0}, "Samples: max_new_tokens is 0"),
    ],
)
def test_settings_out_of_range_are_refused_when_it_is_made(settings, message):
    with pytest.raises(InputError) as refused:
        Samples(["a"], **settings)
    assert message in str(refused.value)


def test_a_prompt_without_tokens_is_refused_before_training(texts):
    tokenizer = Tokenizer.train(iter(texts), 280)
    run, model, batches = tiny_trainer(Samples(["the", ""]), steps=2, vocab_size=280)
    with pytest.raises(InputError, match="Samples: the prompt '' holds no token"):
        run.fit(model, datamodule=Data(batches, tokenizer))
    assert run.global_step == 0
