"""Train tiny models, each in a fork of this process, so that the packages are imported once.

test_resume.py starts it. Each line of standard input is a run, a JSON object. Each rank of a run is a fork. It writes a
hash of each batch, and the loss, to ``log.RANK``. Some runs are killed.
"""

import json
import os
import signal
import socket
import sys
import traceback
from hashlib import sha256
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cola_lightning.callbacks import SourceTokenCounter
from cola_lightning.data import C4DataModule
from cola_lightning.training.module import LanguageModel

STEPS, ACCUMULATE, SAVE_EVERY = 10, 2, 3


class Witness(L.Callback):
    """Logs a hash of each batch and its loss, and kills the process after optimizer step ``kill_at``."""

    def __init__(self, file: Path, kill_at: int | None) -> None:
        self.file, self.kill_at = file, kill_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        digest = sha256(b"".join(batch[name].numpy().tobytes() for name in ("input_ids", "labels"))).hexdigest()[:16]
        with self.file.open("a") as log:
            log.write(f"{trainer.fit_loop.epoch_loop.batch_idx} {digest} {outputs['loss'].item().hex()}\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(run: dict, rank: int) -> None:
    torch.set_num_threads(1)
    folder = Path(run["folder"])
    world = run["ranks"]
    L.seed_everything(1)
    data = C4DataModule(**run["data"])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=run.get("steps", STEPS),
        accumulate_grad_batches=ACCUMULATE,
        limit_val_batches=run.get("val_batches", 0),
        val_check_interval=4 * ACCUMULATE,
        check_val_every_n_epoch=None,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY, save_top_k=-1, filename="{step}"),
            Witness(folder / f"log.{rank}", run.get("kill_at")),
            SourceTokenCounter(),
        ],
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LanguageModel(vocab_size=300, **sizes)
    trainer.fit(model, data, ckpt_path=run.get("from"), weights_only=True)
    (folder / f"logged.{rank}").write_text(json.dumps({k: float(v) for k, v in trainer.callback_metrics.items()}))
    (folder / f"counts.{rank}").write_text(json.dumps(data.source_counts()))


def start(run: dict, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        if run["ranks"] > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
            os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(run["ranks"])}
        train(run, rank)
    except BaseException:
        Path(run["folder"], f"error.{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        run = json.loads(line)
        Path(run["folder"]).mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [start(run, rank, port) for rank in range(run["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        Path(run["folder"], "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
