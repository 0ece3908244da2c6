"""A network as a folder in Hugging Face's layout, which ``load_model`` reads back bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, LowRank
from cola_lightning.models import FullRank, Llama

MODELLING = Path(__file__).parent / "modeling_cola_llama.py"
LATENT_ACT = {LowRank: "linear", CoLA: "silu"}


def write_folder(
    network: Llama,
    folder: Path,
    tokenizer: Tokenizer,
    card: Callable[[dict[str, Any]], str],
    merge: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write ``config.json``, ``model.safetensors`` (in parts, with an index, above ``max_shard_size``), tokenizer,
    ``generation_config.json`` and ``README.md``; for low-rank projections the modelling file too.

    The folder appears when it is whole. Weights keep their dtype.

    Args:
        network: What to write.
        folder: Where to; must not exist, or be empty.
        tokenizer: Of the text that the network was trained on.
        card: Makes the content of ``README.md`` from that of ``config.json``.
        merge: Multiply low-rank factors out, so that a plain ``LlamaForCausalLM`` comes out.
        max_shard_size: Such as ``5GB``.

    Raises:
        InputError: If the folder holds something, or the network has parts that this layout cannot express.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something already; choose another folder")
    weights, low_rank = _weights(network, merge)
    tokenizer.check_fits(network.model.embed_tokens.num_embeddings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        config = _config(network, weights, low_rank, tokenizer)
        _write(scratch / "config.json", config)
        generation = {"eos_token_id": tokenizer.eos_id, "pad_token_id": _pad_id(tokenizer), "do_sample": True}
        _write(scratch / "generation_config.json", generation)
        _save_tokenizer(tokenizer, scratch, network.max_position_embeddings)
        save_torch_state_dict(weights, scratch, max_shard_size=max_shard_size)
        if low_rank:
            shutil.copy(MODELLING, scratch)
        (scratch / "README.md").write_text(card(config), encoding="utf-8")
        scratch.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _weights(network: Llama, merge: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by Hugging Face's names, and what its configuration says of low-rank projections, if there are any."""
    if type(network) is not Llama:
        raise InputError(f"a {type(network).__name__} is not LLaMA, and cannot be written as a Hugging Face folder")
    weights = dict(network.state_dict())
    kinds = {}
    for index, block in enumerate(network.model.layers):
        for part, module in (("self_attn", block.self_attn), ("mlp", block.mlp)):
            for name, projection in module.named_children():
                prefix = f"model.layers.{index}.{part}.{name}."
                act = LATENT_ACT.get(type(projection))
                if act and not (merge and act == "linear"):
                    kinds[prefix] = {"rank": projection.A.out_features, "latent_act": act}
                    continue
                kinds[prefix] = {}
                if type(projection) is not FullRank:
                    for key in [key for key in weights if key.startswith(prefix)]:
                        del weights[key]
                    weights[f"{prefix}weight"] = _dense(projection)
    first = next(iter(kinds))
    for prefix, kind in kinds.items():
        if kind != kinds[first]:
            raise InputError(
                f"{prefix[:-1]} is {kind or 'dense'} and {first[:-1]} {kinds[first] or 'dense'}; in such a folder all "
                f"projections are of one kind"
            )
    if merge and kinds[first]:
        raise InputError("CoLA cannot be merged into dense matrices, for a nonlinearity lies between its factors")
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}, kinds[first]


def _dense(projection: Any) -> Tensor:
    dense = projection.dense()
    if dense is None:
        raise InputError(
            f"{type(projection).__name__} can be written neither as a dense matrix nor as low-rank factors; "
            f"LLaMA and CoLA folders hold nothing else"
        )
    return dense


def _config(network: Llama, weights: dict[str, Tensor], low_rank: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    decoder = network.model
    last = "B.weight" if low_rank else "weight"
    hidden_size = decoder.embed_tokens.embedding_dim
    dtype = str(network.lm_head.weight.dtype).removeprefix("torch.")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": decoder.embed_tokens.num_embeddings,
        "hidden_size": hidden_size,
        "intermediate_size": len(weights[f"model.layers.0.mlp.gate_proj.{last}"]),
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": hidden_size // decoder.head_dim,
        "num_key_value_heads": len(weights[f"model.layers.0.self_attn.k_proj.{last}"]) // decoder.head_dim,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu" if decoder.layers[0].mlp.gate_silu else "linear",
        "max_position_embeddings": network.max_position_embeddings,
        "rms_norm_eps": decoder.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        "rope_theta": decoder.rope_theta,  # where transformers 4 looks for it
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": decoder.embed_tokens.padding_idx,
        "dtype": dtype,
        "torch_dtype": dtype,  # likewise
    }
    if low_rank:
        here = MODELLING.stem
        config |= low_rank | {
            "architectures": ["CoLALlamaForCausalLM"],
            "model_type": "cola_llama",
            "auto_map": {
                "AutoConfig": f"{here}.CoLALlamaConfig",
                "AutoModelForCausalLM": f"{here}.CoLALlamaForCausalLM",
            },
        }
    return config


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """As it was used in training: no id is put before or after a text, so that a prompt can be continued, and special
    ids above all others (T5's sentinels), which may have no row in the embedding, are gone."""
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
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
