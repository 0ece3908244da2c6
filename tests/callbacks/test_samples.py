import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cola_lightning.callbacks import Samples
from cola_lightning.data.tokenizer import Tokenizer
from tests.conftest import loader, tiny_trainer


class Data(L.LightningDataModule):
    def __init__(self, batches, tokenizer):
        super().__init__()
        self.batches, self.tokenizer = batches, tokenizer

    def train_dataloader(self):
        return loader(self.batches)

    def val_dataloader(self):
        return loader(self.batches[:1])


def test_texts_go_to_tensorboard_and_the_last_to_the_terminal(texts, tmp_path, caplog):
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
