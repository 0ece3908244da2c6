"""Perplexity of a trained model on each source of the held-out documents."""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cola_lightning.compare.outcome import write
from cola_lightning.compare.plan import HeldOut
from cola_lightning.compare.tasks import device_of
from cola_lightning.data.documents import find_files
from cola_lightning.data.readers import read_file
from cola_lightning.errors import InputError
from cola_lightning.inference.evaluate import evaluate_text
from cola_lightning.inference.load import load_model_for_inference
from cola_lightning.output_files import write_whole


def split_by_source(paths: list[str], text_column: str, held_out: HeldOut, folder: Path) -> dict[str, Path]:
    """Write the documents of each group into a file of its own.

    Args:
        paths: JSON Lines or Parquet files.
        text_column: Key of the text.
        held_out: The groups. A document belongs to the first that its source matches.
        folder: Folder of the files that are written.

    Returns:
        The file of each group.

    Raises:
        InputError: If a file is of another format, or a group has no document.
    """
    texts: dict[str, list[str]] = {name: [] for name in held_out.groups}
    for file in find_files(paths):
        sources, documents = (read_file(str(file), column) for column in (held_out.column, text_column))
        if sources is None or documents is None:
            raise InputError(
                f"{file} has no {held_out.column!r}; held_out needs validation documents in JSON or Parquet"
            )
        for (_, source), (_, text) in zip(sources, documents, strict=True):
            group = next((name for name, pattern in held_out.groups.items() if re.search(pattern, source or "")), None)
            if group is not None and text:
                texts[group].append(text)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, found in texts.items():
        if not found:
            raise InputError(f"held_out group {name!r} matches no {held_out.column} of {', '.join(paths)}")
        files[name] = folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.jsonl"
        lines = (json.dumps({"text": text}) + "\n" for text in found)
        write_whole(files[name], "".join(lines))
    return files


def evaluate_sources(run_dir: str, files: dict[str, str], accelerator: str, bf16: bool, result: str) -> None:
    """Write the perplexity of a run's newest checkpoint on each file. Each document is read by itself.

    Args:
        run_dir: Directory of the run.
        files: JSON Lines files with the key ``text``, by group.
        accelerator: The run's, as the Trainer names it.
        bf16: Compute in bf16, as the run did.
        result: JSON file to write.
    """
    model = load_model_for_inference(run_dir, [])
    device = device_of(accelerator)
    model.network.to(device)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        if bf16:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        for name, file in files.items():
            measured = evaluate_text(
                model.network, model.tokenizer(None), [Path(file)], sequence_length=model.sequence_length()
            )
            found[name] = measured["perplexity"]
    write(Path(result), found)
