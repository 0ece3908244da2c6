"""Write a network as a folder in Hugging Face's layout; ``load_model`` reads the same weights from it."""

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor

from cola_lightning.checkpoints.pretrained import HEAD, check_finite, load_model
from cola_lightning.checkpoints.pretrained_config import rope_keys
from cola_lightning.checkpoints.projection_formats import LAYOUTS, Layout, example_projection, layout_of
from cola_lightning.data.folder_tokenizer import FolderTokenizer
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.models import FullRank, Llama, Projection


def write_folder(
    network: Llama,
    folder: Path,
    tokenizer: Tokenizer,
    card: Callable[[dict[str, Any]], str],
    merge: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights, tokenizer and model card as one folder. Weights keep their dtype.

    The files are ``config.json``, ``model.safetensors`` (above ``max_shard_size`` several files and an index), the
    tokenizer, ``generation_config.json`` and ``README.md``, and for low-rank projections a modelling file. They are
    written into a folder beside the target, and compared with the network. Then that folder is renamed, so that the
    target appears only when it is complete.

    Args:
        network: The network to write.
        folder: Target. It must not exist yet, or be empty.
        tokenizer: Tokenizer of the network's training data. The files of a :class:`FolderTokenizer` are copied as they
            are, with its chat template and generation settings.
        card: Makes the content of ``README.md`` from the content of ``config.json``.
        merge: Multiply low-rank factors out, to write a plain ``LlamaForCausalLM``.
        max_shard_size: Largest size of a file of weights, such as ``5GB``.

    Raises:
        InputError: If the folder is not empty or cannot be written, or the network has parts that this layout cannot
            express.
    """
    check_target(folder, max_shard_size)
    weights, layout = _weights(network, merge)
    check_finite(weights, folder.name)
    if _tied(network):
        del weights[HEAD]
    tokenizer.check_fits(network.config.vocab_size)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error}; choose another place") from error
    try:
        config = _config(network, weights, layout, tokenizer)
        _write(scratch / "config.json", config)
        if isinstance(tokenizer, FolderTokenizer):
            tokenizer.copy_files(scratch)
        else:
            generation = {"eos_token_id": tokenizer.eos_id, "pad_token_id": _pad_id(tokenizer), "do_sample": True}
            _write(scratch / "generation_config.json", generation)
            _save_tokenizer(tokenizer, scratch, network.config.max_position_embeddings)
        save_torch_state_dict(weights, scratch, max_shard_size=max_shard_size)
        _read_back(network, weights, scratch, folder.name)
        if layout is not None:
            shutil.copy(Path(__file__).parent / layout.modelling_file, scratch)
        (scratch / "README.md").write_text(card(config), encoding="utf-8")
        # Not data.cache.new_folder: that accepts a folder that another run has made meanwhile, this must not.
        scratch.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
        if folder.exists():
            folder.rmdir()  # fails if it is not empty any more
        scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} could not be written: {error}; nothing is left of it") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_target(folder: Path, max_shard_size: str = "5GB") -> None:
    """Refuse a folder that cannot be written, before the work.

    Raises:
        InputError: If it is not empty, cannot be made, or ``max_shard_size`` is not a size.
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise InputError(f"--max_shard_size {max_shard_size} is not a size; write it as 5GB or 200MB") from error
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something already; choose another folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder} cannot be made: {above} {'is not writable' if above.is_dir() else 'is a file'}")


def _weights(network: Llama, merge: bool) -> tuple[dict[str, Tensor], Layout | None]:
    """Collect the weights by Hugging Face's names.

    Returns:
        The weights, and the layout of the projections; None if they are written as dense matrices.
    """
    if type(network) is not Llama:
        raise InputError(f"a {type(network).__name__} is not LLaMA, so it cannot be written as a Hugging Face folder")
    weights = dict(network.state_dict())
    example = example_projection(network)
    layout = layout_of(example)
    if layout is not None and merge:
        if _dense(example) is None:
            raise InputError(
                f"{type(example).__name__} cannot be merged into dense matrices, because it is not linear in its input"
            )
        layout = None
    for index, block in enumerate(network.blocks()):
        for name, projection in block.projections():
            place = f"model.layers.{index}.{'self_attn' if hasattr(block.self_attn, name) else 'mlp'}.{name}"
            if layout is not None:
                if not _is_like(projection, example, layout, index):
                    raise InputError(
                        f"{place} is {_kind(projection)}, and the last layer's q_proj {_kind(example)}; in such a "
                        "folder all projections are of one kind"
                    )
                continue
            dense = _dense(projection)
            if dense is None:
                known = ", ".join(layout.projection.__name__ for layout in LAYOUTS)
                raise InputError(
                    f"{place} is {_kind(projection)}, which can be written neither as a dense matrix nor by a "
                    f"modelling file; those that can are {known}"
                )
            # Replace the projection's own parameters, such as A and B, by the matrix.
            for key in [key for key in weights if key.startswith(f"{place}.")]:
                del weights[key]
            weights[f"{place}.weight"] = dense
    dtype = network.lm_head.weight.dtype
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in weights.items()}, layout


def _is_like(projection: Projection, example: Projection, layout: Layout, index: int) -> bool:
    """Say whether a projection of layer ``index`` is described by the same keys of ``config.json`` as the example."""
    if index == 0 and type(projection) is layout.first:
        return True
    return type(projection) is layout.projection and layout.describe(projection) == layout.describe(example)


def _kind(projection: Projection) -> str:
    """Name the class and the rank of a projection, for a message."""
    return type(projection).__name__ + ("" if projection.rank is None else f" of rank {projection.rank}")


@torch.no_grad()
def _dense(projection: Projection) -> Tensor | None:
    """Compute the matrix (out_features, in_features) of a projection; None if it is not linear in its input.

    The product is computed in float32 at least, and rounded once.
    """
    if isinstance(projection, FullRank):
        return projection.dense()
    dtype = torch.promote_types(next(projection.parameters()).dtype, torch.float32)
    return deepcopy(projection).to(dtype).dense()


def _config(network: Llama, weights: dict[str, Tensor], layout: Layout | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Make the content of ``config.json``."""
    sizes = network.config
    dtype = str(network.lm_head.weight.dtype).removeprefix("torch.")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu" if sizes.gate_silu else "linear",
        "rms_norm_eps": sizes.rms_norm_eps,
        **rope_keys(sizes.rope_theta, sizes.rope_scaling, sizes.max_position_embeddings),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": HEAD not in weights,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": sizes.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers 4 reads this key
    }
    if isinstance(tokenizer, FolderTokenizer):
        config |= tokenizer.ids
    if layout is not None:
        module = layout.modelling_file.removesuffix(".py")
        config |= layout.describe(example_projection(network)) | {
            "architectures": [f"{layout.name}ForCausalLM"],
            "model_type": layout.model_type,
            "auto_map": {
                "AutoConfig": f"{module}.{layout.name}Config",
                "AutoModelForCausalLM": f"{module}.{layout.name}ForCausalLM",
            },
        }
    return config


def _tied(network: Llama) -> bool:
    """Say whether embedding and head are one parameter, or share their memory."""
    embedding, head = network.model.embed_tokens.weight, network.lm_head.weight
    return embedding is head or (head.data_ptr() == embedding.data_ptr() and head.shape == embedding.shape)


@torch.no_grad()
def _read_back(network: Llama, weights: dict[str, Tensor], folder: Path, name: str) -> None:
    """Read a folder back and compare it with the network.

    Every weight must be equal bit for bit. The logits of a few ids must be equal up to rounding, which shows whether
    ``config.json`` describes the whole network.

    Raises:
        InputError: If something differs.
    """
    again = load_model(folder)
    found = again.state_dict()
    for key, tensor in weights.items():
        if not torch.equal(found[key], tensor.cpu()):
            raise InputError(f"{name} was not written: read back, {key} has other values")
    length = min(16, network.config.max_position_embeddings)
    # Multiples of a prime, so that the ids (1, T) differ and are spread over the vocabulary.
    ids = torch.arange(length)[None] * 7919 % network.config.vocab_size
    was_training = network.training
    wanted = network.eval()(ids.to(network.lm_head.weight.device)).float().cpu()
    network.train(was_training)
    # Factors that are multiplied out, and other devices, round differently. A wrong formula differs by far more.
    allowed = 1e-4 if network.lm_head.weight.dtype.itemsize > 2 else 0.05
    if not (off := float((again(ids).float() - wanted).norm() / wanted.norm().clamp(min=1e-30))) <= allowed:
        raise InputError(
            f"{name} was not written: read back, its logits are off by {off:.2g} of their size, and rounding explains "
            f"{allowed:.2g}; config.json cannot say all that this network does"
        )


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write the tokenizer as training has used it.

    It adds no id before or after a text, so that a prompt can be continued. Special ids beyond the vocabulary (T5's
    sentinels) are removed, because the embedding may have no row for them.

    Args:
        tokenizer: The tokenizer.
        folder: Folder to write into.
        longest: Tokens of the longest text that the network takes.
    """
    vocab_size = tokenizer.vocab_size
    tokenizer.save(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):
        content["model"]["vocab"] = vocab[:vocab_size]
    else:
        content["model"]["vocab"] = {piece: index for piece, index in vocab.items() if index < vocab_size}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"model_max_length": longest, "clean_up_tokenization_spaces": False}
    _write(folder / "tokenizer_config.json", settings)


def _pad_id(tokenizer: Tokenizer) -> int:
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file. No rename is needed, because the whole folder is renamed."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
