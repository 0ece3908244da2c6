"""Make a low-rank LLaMA of a dense one, by truncated singular value decomposition."""

from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import track

from cola_lightning.data.documents import find_files
from cola_lightning.errors import InputError
from cola_lightning.hub import write_folder
from cola_lightning.hub.card import model_card
from cola_lightning.hub.folder import check_target
from cola_lightning.inference.evaluate import evaluate_text, window_sizes
from cola_lightning.inference.load import LoadedModel, load_model_for_inference, pick_device
from cola_lightning.methods import CoLA, LowRank
from cola_lightning.models import Llama, MakeProjection

RUN_FILE = "model.yaml"


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
    """Write a low-rank model whose projections begin at the best approximation of a dense model's.

    Beside the weights lies a config, model.yaml, by which 'fit' goes on from there. With CoLA a nonlinearity stands
    between the factors, so that it is a beginning and no compression.

    Args:
        model: Folder of a Hugging Face LLaMA, or a full-rank checkpoint.
        folder: Where to; must not exist, or be empty.
        projection: Low-rank method and its rank: --projection CoLA --projection.rank 128.
        text: File, folder or a list of them with text on which the loss before and after is measured.
        tokenizer: Folder, tokenizer.json or repository on the hub; that of the model if not given.
        sequence_length: Tokens of a window in that measurement; what the model takes if not given.
        device: Where to compute; a GPU if there is one.
        trust: Classes, or packages, of which a checkpoint may name code besides this package's.

    Raises:
        InputError: If the model is not dense, or the projection not low-rank.
    """
    files = find_files([text] if isinstance(text, str) else text) if text else []
    target, where = Path(folder).expanduser(), pick_device(device)
    check_target(target)
    dense = load_model_for_inference(model, trust or ())
    vocabulary = dense.tokenizer(tokenizer)
    window_sizes(dense.network, sequence_length)  # says now if it is out of range
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


def low_rank(dense: Llama, projection: MakeProjection, device: torch.device) -> Llama:
    """The same network with each projection replaced by one that begins at its best approximation.

    Args:
        dense: Network whose projections are linear maps.
        projection: Makes a low-rank one.
        device: Where the singular value decompositions are done.

    Returns:
        A network that shares everything but the projections with ``dense``, in its dtype, in eval mode.

    Raises:
        InputError: If a projection is no linear map already, or the new one not low-rank.
    """
    network = _shallow(dense)
    for block in track(list(network.blocks()), "factorizing", console=Console(stderr=True)):
        for name, old in list(block.projections()):
            weight = old.dense()
            if weight is None:
                raise InputError(f"{name} is {type(old).__name__}, which is not dense; start from a full-rank model")
            new = projection(weight.shape[1], weight.shape[0]).to(weight.dtype)
            if not isinstance(new, LowRank):
                raise InputError(
                    f"--projection {type(new).__name__} is not low-rank; name LowRank or CoLA, with a rank"
                )
            new.approximate(weight.to(device))
            setattr(block.self_attn if hasattr(block.self_attn, name) else block.mlp, name, new)
    return network.eval()


def _shallow(network: Llama) -> Llama:
    """A copy whose modules are its own and whose tensors are shared."""
    return deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def _config_file(network: Llama, folder: Path) -> str:
    example = next(network.blocks()).self_attn.q_proj
    method = type(example)
    sizes = asdict(network.config)
    del sizes["fused_projections"], sizes["loss_chunk_size"]  # how a run computes, which is its own choice
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
