"""Measure a model: perplexity on any text, and the tasks of lm-eval."""

import importlib.util
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy

from cola_lightning.data.documents import find_files, read_documents
from cola_lightning.data.encoding import encode_in_batches
from cola_lightning.data.packing import IGNORE
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError, UnusableModelError
from cola_lightning.hub import write_folder
from cola_lightning.inference.load import LoadedModel, load_model_for_inference, pick_device
from cola_lightning.inference.prepare import prepare_for_generation
from cola_lightning.models import Llama
from cola_lightning.models.loss import at_least_float32
from cola_lightning.output_files import check_output_file, to_json, write_json


def evaluate(
    model: str,
    text: Sequence[str] = (),
    text_column: str = "text",
    sequence_length: int | None = None,
    stride: int | None = None,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    tokenizer: str | None = None,
    device: str | None = None,
    trust: Sequence[str] = (),
    json: str | None = None,
    int8: bool = False,
) -> None:
    """Measure a model on text and on tasks, and print the result as JSON.

    Args:
        model: Checkpoint, directory of a run, or folder in Hugging Face's layout.
        text: Files or folders of text.
        text_column: Key or column that holds the text.
        sequence_length: Tokens of a window; those of the run if not given.
        stride: Tokens from one window to the next; ``sequence_length`` if not given.
        tasks: Names of lm-eval tasks.
        include_path: Folder with task files of one's own.
        limit: Examples of each task; all if not given.
        batch_size: Windows, or examples, at a time.
        tokenizer: Folder, tokenizer.json or hub repository; the model's if not given.
        device: Where to compute; a GPU if there is one.
        trust: Classes or packages whose code a checkpoint may name.
        json: File to which the result is written too.
        int8: Round the matrices to int8 before text is measured, see
            :func:`~cola_lightning.inference.prepare.prepare_for_generation`.

    Raises:
        InputError: If a file, a task or the model cannot be found, or a value is out of range.
        UnusableModelError: If the loss is NaN.
    """
    check_output_file(json)
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include_path {include_path} is no folder; name one with task files")
    files = find_files(list(text)) if text else []
    if tasks:
        find_tasks(tasks, include_path)  # before the model is loaded
    where = pick_device(device)
    trained = load_model_for_inference(model, trust)
    vocabulary = trained.tokenizer(tokenizer)
    result: dict[str, Any] = {}
    if files:
        length = trained.sequence_length() if sequence_length is None else sequence_length
        network = trained.network.to(where)
        if int8:
            prepare_for_generation(network, int8=True)
        measured = evaluate_text(network, vocabulary, files, text_column, length, stride, batch_size)
        if math.isinf(measured["perplexity"]):
            print(f"the perplexity, exp({measured['loss']:.6g}), is beyond any number: null", file=sys.stderr)
        result["text"] = measured
    if tasks:
        result["tasks"] = evaluate_tasks(trained, vocabulary, tasks, include_path, limit, batch_size, where)
    write_json(json, result)
    print(to_json(result))


# -- text -------------------------------------------------------------------------------------------------------------


def evaluate_text(
    network: Llama,
    tokenizer: Tokenizer,
    files: list[Path],
    text_column: str = "text",
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Loss on the documents of files. Each document stands by itself, and ends with the end-of-document id.

    Every token but a document's first is predicted once, from the tokens of its window that come before it; where the
    tokenizer puts an id before each text, the first too.

    Args:
        network: The network, on the device to use.
        tokenizer: Its tokenizer.
        files: As for :func:`cola_lightning.data.documents.read_documents`.
        text_column: Likewise.
        sequence_length: Tokens that the network sees at once (T); all that it accepts if not given.
        stride: Tokens by which a window is further on than the one before. Less than ``sequence_length`` gives each
            token more context, and costs as many times more.
        batch_size: Windows at a time (B).

    Returns:
        ``perplexity`` and ``loss`` (nats), per predicted token; ``tokens``, how many those were; ``documents``,
        ``bytes``; ``bits_per_byte``, the loss over all tokens, those that begin documents included, per byte of UTF-8
        (The Pile, arXiv 2101.00027).

    Raises:
        InputError: If there is no text, or sizes cannot work.
        UnusableModelError: If the loss is NaN.
    """
    length, step = window_sizes(network, sequence_length, stride)
    tokenizer.check_fits(network.config.vocab_size)
    total = sum(len(text.encode()) for text in read_documents(files, text_column))  # also looks through all files first
    if not total:
        raise InputError(f"{', '.join(map(str, files[:3]))} holds no text; every document is empty")
    counts = {"documents": 0, "bytes": 0, "tokens": 0, "predicted": 0}
    nats = 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("evaluating", total=total)
        windows = _windows(read_documents(files, text_column), tokenizer, length, step, counts)
        while batch := list(islice(windows, batch_size)):
            loss_sum, predicted = _loss(network, batch)
            nats += loss_sum
            counts["predicted"] += predicted
            mean = nats / max(counts["predicted"], 1)
            if math.isnan(mean):
                raise UnusableModelError(
                    f"the loss is NaN after {counts['predicted']:,} tokens: the network overflows in "
                    f"{network.lm_head.weight.dtype}; take an earlier checkpoint"
                )
            description = f"{counts['predicted']:,} tokens, perplexity {_exp(mean):,.2f}"
            progress.update(task, completed=counts["bytes"], description=description)
    if not counts["predicted"]:
        raise InputError("no document has two tokens, so there is nothing to predict")
    mean = nats / counts["predicted"]
    return {
        "perplexity": _exp(mean),
        "loss": mean,
        "bits_per_byte": mean / math.log(2) * counts["tokens"] / counts["bytes"],
        "tokens": counts["predicted"],
        "documents": counts["documents"],
        "bytes": counts["bytes"],
        "sequence_length": length,
        "stride": step,
    }


def window_sizes(network: Llama, sequence_length: int | None, stride: int | None = None) -> tuple[int, int]:
    """Tokens of a window and from one to the next, from what was asked for.

    Raises:
        InputError: If they are out of range.
    """
    longest = network.config.max_position_embeddings
    length = min(longest, 2048) if sequence_length is None else sequence_length
    step = length if stride is None else stride
    if not 1 <= length <= longest:
        raise InputError(f"--sequence_length is {length}; this model takes from 1 to {longest} tokens")
    if not 1 <= step <= length:
        raise InputError(f"--stride is {step}; it must lie between 1 and the sequence_length, {length}")
    return length, step


def _exp(mean: float) -> float:
    """exp, or infinity where that is more than a float holds."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


Window = tuple[list[int], list[int]]
"""Ids that are shown, and of the same number what is to be predicted after each, IGNORE where that was done before."""


def _windows(
    documents: Iterable[str], tokenizer: Tokenizer, length: int, step: int, counts: dict[str, int]
) -> Iterator[Window]:
    prefix = len(tokenizer.prefix)
    for text, ids in encode_in_batches(((text, text) for text in documents), tokenizer.encode):
        counts["documents"] += 1
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(ids) - prefix
        done = max(prefix - 1, 0)  # of what stands before a text nothing is predicted
        for begin in range(0, len(ids) - 1, step):
            shown, labels = ids[begin : begin + length], ids[begin + 1 : begin + length + 1]
            shown = shown[: len(labels)]
            yield shown, [IGNORE] * (done - begin) + labels[done - begin :]
            done = begin + len(labels)
            if done == len(ids) - 1:
                break


@torch.no_grad()
def _loss(network: Llama, windows: list[Window]) -> tuple[float, int]:
    """Return the summed loss in nats, and the number of predicted tokens."""
    longest = max(len(shown) for shown, _ in windows)
    device = network.lm_head.weight.device
    # Padded on the right, where by causality it changes nothing.
    ids = torch.tensor([shown + [0] * (longest - len(shown)) for shown, _ in windows], device=device)
    labels = torch.tensor([row + [IGNORE] * (longest - len(row)) for _, row in windows], device=device)
    logits: Tensor = network(ids)
    loss = cross_entropy(at_least_float32(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss.item(), int((labels != IGNORE).sum())


# -- tasks ------------------------------------------------------------------------------------------------------------


def evaluate_tasks(
    trained: LoadedModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of lm-eval's tasks, through its Hugging Face model class on a folder exported for the purpose.

    Args:
        trained: The model.
        tokenizer: Its tokenizer.
        tasks: Names.
        include_path: Folder with task files besides those that lm-eval brings.
        limit: Examples of each task.
        batch_size: Examples at a time.
        device: Where to.

    Raises:
        InputError: If lm-eval is not installed, or knows no such task.
    """
    manager = find_tasks(tasks, include_path)
    from lm_eval import simple_evaluate

    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        # Written anew from tensors, so that no code is run but that of this package.
        write_folder(trained.network, folder, tokenizer, lambda config: "")
        try:
            result = simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "trust_remote_code": True, "dtype": "auto"},
                tasks=tasks,
                task_manager=manager,
                limit=limit,
                batch_size=batch_size,
                device=str(device or "cpu"),
            )
        except OSError as error:  # a data set that is not here, or cannot be fetched
            raise InputError(f"lm-eval cannot read the data of {', '.join(tasks)}: {error}") from error
    # Keys are "acc,none": the measure and the filter of the answers.
    return {
        task: {key.removesuffix(",none"): value for key, value in scores.items() if isinstance(value, int | float)}
        for task, scores in result["results"].items()
    }


def find_tasks(tasks: Sequence[str], include_path: str | None) -> Any:
    """Lm-eval's index of tasks, in which these are.

    Raises:
        InputError: If lm-eval is not installed, or knows no such task.
    """
    for module in ("lm_eval", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"--tasks needs {module}, which is not installed; run: pip install 'cola-lightning[eval]'")
    from lm_eval.tasks import TaskManager

    # Lm-eval's own tasks are thousands of files to look through; not where all that are named are the user's.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=include_path)
    if missing := [name for name in tasks if not manager.match_tasks([name])]:
        raise InputError(f"lm-eval knows no task {', '.join(missing)}; set --include_path for task files of your own")
    return manager
