"""Make a low-rank LLaMA from a dense one, from folder to folder."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import yaml

from cola_lightning.data.documents import find_files
from cola_lightning.hub import write_folder
from cola_lightning.hub.card import model_card
from cola_lightning.hub.folder import check_target
from cola_lightning.inference.evaluate import evaluate_text, window_sizes
from cola_lightning.inference.load import LoadedModel, load_model_for_inference, pick_device
from cola_lightning.methods import CoLA, LowRank
from cola_lightning.methods.factorize import low_rank
from cola_lightning.models import Llama, MakeProjection

RUN_FILE = "model.yaml"
"""Name of the config in the new folder, with which 'fit' trains the model further."""


def factorize(
    model: str,
    folder: str,
    projection: MakeProjection = CoLA,  # type: ignore[assignment]  # the command line adds the rank
    text: str | list[str] | None = None,
    tokenizer: str | None = None,
    sequence_length: int | None = None,
    device: str | None = None,
    trust: list[str] | None = None,
) -> None:
    """Write a low-rank model with projections that begin at the best approximation of a dense model's.

    The new folder also holds a config, model.yaml, with which 'fit' trains the model further. CoLA has a nonlinearity
    between the factors, so its result is a start for training and not a compressed model.

    Args:
        model: Folder of a Hugging Face LLaMA, or a full-rank checkpoint.
        folder: Folder to write. It must not exist yet, or be empty.
        projection: Low-rank method and its rank: --projection CoLA --projection.rank 128.
        text: File, folder or a list of them, with text on which the loss is measured before and after.
        tokenizer: Folder, tokenizer.json or repository on the hub; the model's own if not given.
        sequence_length: Tokens of a window in that measurement; the model's longest if not given.
        device: Device to compute on; a GPU if there is one.
        trust: Classes or packages that a checkpoint may name, in addition to this package's.

    Raises:
        InputError: If the model is not dense, the projection is not low-rank, or the folder cannot be written.
    """
    files = find_files([text] if isinstance(text, str) else text) if text else []
    target, where = Path(folder).expanduser(), pick_device(device)
    check_target(target)
    dense = load_model_for_inference(model, trust or ())
    vocabulary = dense.tokenizer(tokenizer)
    window_sizes(dense.network, sequence_length)  # refuses a length out of range before the work
    network = low_rank(dense.network, projection, where)
    example = next(network.blocks()).self_attn.q_proj
    assert isinstance(example, LowRank)
    method = type(example)
    if files:
        candidates = {"dense": dense.network}
        if method is not LowRank:
            candidates["LowRank"] = low_rank(dense.network, partial(LowRank, rank=example.rank), where)
        candidates[method.__name__] = network
        for name, candidate in candidates.items():
            result = evaluate_text(candidate.to(where), vocabulary, files, sequence_length=sequence_length)
            print(f"{name:<10} loss {result['loss']:7.4f}   perplexity {result['perplexity']:,.2f}")
            candidate.cpu()
    card = partial(model_card, LoadedModel(network, dense.path), target.resolve().name)
    write_folder(network, target, vocabulary, card)
    (target / RUN_FILE).write_text(_config_file(network, target), encoding="utf-8")
    print(f"wrote {target}; go on with: fit --config … --config {target / RUN_FILE}")


def _config_file(network: Llama, folder: Path) -> str:
    """Make the config with which ``fit`` starts from the weights in ``folder``."""
    example = next(network.blocks()).self_attn.q_proj
    method = type(example)
    sizes = asdict(network.config)
    del sizes["fused_projections"], sizes["loss_chunk_size"]  # each run chooses how it computes
    model = {
        "initial_weights": str(folder.resolve()),
        **sizes,
        "num_key_value_heads": network.config.key_value_heads,
        "projection": {
            "class_path": f"{method.__module__}.{method.__qualname__}",
            "init_args": {"rank": example.rank},
        },
    }
    data = {"init_args": {"tokenizer": str(folder.resolve())}}
    return yaml.safe_dump({"model": model, "data": data}, sort_keys=False)
