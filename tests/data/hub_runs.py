"""Run jobs that stream from the hub, each in a fork of this process, so that the packages are imported once.

test_hub.py starts it with the hub's address in the environment, because the hub's client reads it at import. Each line
of standard input is a job, a JSON object. The answer to each job is one line of JSON, a list with an object per rank:

* ``arguments``, ``ranks``, ``batches``: make a data module; answer with the rows of each rank, or its error;
* ``command``: run the command line with these arguments; answer with its exit status and its output.

``cold`` empties the hub's cache before, and ``offline`` is HF_HUB_OFFLINE.
"""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import lightning as L
import torch.distributed as dist

from cola_lightning.cli.app import main as command_line
from cola_lightning.data import C4DataModule, Source
from cola_lightning.errors import InputError
from tests.data.test_streaming import ready, take


class KillAt(L.Callback):
    """Kill the process after an optimizer step, when its checkpoint is written.

    Args:
        step: Number of the step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def stream(arguments: dict, ranks: int, rank: int, batches: int) -> dict:
    sources = arguments.pop("sources", None)
    validation = arguments.pop("validation", None)
    data = C4DataModule(
        **arguments,
        sources=sources and [Source(**source) for source in sources],
        validation=validation and Source(**validation),
    )
    if rank:
        data.prepare_data = lambda: None  # Lightning calls it on the first rank of a node only
    ready(data, ranks, rank)
    seen = [batch["input_ids"].tolist() for batch in take(data, batches)]
    texts = [data.tokenizer.decode(row) for batch in seen for row in batch]
    held_out = [data.tokenizer.decode(batch["input_ids"][0].tolist()) for batch in data.val_dataloader()]
    return {"texts": texts, "held_out": held_out, "shards": len(data.sources.corpora[0].shards)}


def stream_on_rank(job: dict, rank: int, port: int) -> dict:
    warnings.simplefilter("ignore")
    try:
        if job["ranks"] > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            dist.init_process_group("gloo", rank=rank, world_size=job["ranks"])
        return stream(job["arguments"], job["ranks"], rank, job["batches"])
    except InputError as error:
        return {"error": str(error)}


def run(job: dict, folder: Path) -> list[dict]:
    """Fork for each rank, and collect the answers."""
    if job.get("cold"):
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job.get("ranks", 1)):
        if child := os.fork():
            children.append(child)
            continue
        # Standard output is reserved for the answers.
        output = os.open(folder / f"said.{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            if job.get("offline"):  # both clients read the variable at import
                huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            if "command" in job:
                command_line(job["command"])
            else:
                (folder / f"seen.{rank}").write_text(json.dumps(stream_on_rank(job, rank, port)))
            status = 0
        except SystemExit as exit:
            status = exit.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    answers = []
    for rank, child in enumerate(children):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = {"status": status, "said": (folder / f"said.{rank}").read_text()}
        seen = folder / f"seen.{rank}"
        if seen.exists():
            answer |= json.loads(seen.read_text())
            seen.unlink()
        answers.append(answer)
    return answers


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
