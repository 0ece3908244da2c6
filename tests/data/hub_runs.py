"""Data modules that stream from the hub; started by test_hub.py, because the hub's address is read at import.

Standard input names the runs, one JSON object a line: ``arguments``, ``ranks``, ``batches``. What each rank saw, or the
error that it ended with, is one JSON object a line of standard output.
"""

import json
import os
import socket
import sys
import warnings

import torch.distributed as dist

from cola_lightning.data import C4DataModule, Source
from cola_lightning.errors import InputError
from tests.data.test_c4 import ready, take


def run(arguments: dict, ranks: int, rank: int, batches: int) -> dict:
    sources = arguments.pop("sources", None)
    validation = arguments.pop("validation", None)
    data = C4DataModule(
        **arguments,
        sources=sources and [Source(**source) for source in sources],
        validation=validation and Source(**validation),
    )
    if rank:
        data.prepare_data = lambda: None  # as Lightning, which leaves it to the first rank of a node
    ready(data, ranks, rank)
    seen = [batch["input_ids"].tolist() for batch in take(data, batches)]
    texts = [data.tokenizer.decode(row) for batch in seen for row in batch]
    held_out = [data.tokenizer.decode(batch["input_ids"][0].tolist()) for batch in data.val_dataloader()]
    return {"texts": texts, "held_out": held_out, "shards": len(data._corpora[0].shards), "ledger": data.ledger()}


def main() -> None:
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(job["ranks"]):
            if child := os.fork():
                children.append(child)
                continue
            try:
                if job["ranks"] > 1:
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                    dist.init_process_group("gloo", rank=rank, world_size=job["ranks"])
                seen = run(job["arguments"], job["ranks"], rank, job["batches"])
            except InputError as error:
                seen = {"error": str(error)}
            sys.stdout.write(json.dumps(seen) + "\n")
            sys.stdout.flush()
            os._exit(0)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
