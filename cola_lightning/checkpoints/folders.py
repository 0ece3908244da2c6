"""Networks out of folders: Hugging Face's LLaMA, what ``export`` writes, and the reference's CoLA and CoLA-M.

Only safetensors and JSON are read; nothing is unpickled.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, LowRank
from cola_lightning.models import FullRank, Llama, MakeProjection

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# The reference's CoLA-M cuts each layer into regions and owns the two factors of a projection in different ones; B of a
# layer's down-projection even belongs to the next layer.
_REGIONS = (
    (re.compile(r"(layers\.\d+)\.pre_attn\.pre_([qkv])_proj\."), r"\1.self_attn.\2_proj."),
    (re.compile(r"(layers\.\d+)\.self_attn\.(?:post_([qkv])|pre_(o))_proj\."), r"\1.self_attn.\2\3_proj."),
    (re.compile(r"(layers\.\d+)\.post_attn\.post_o_proj\."), r"\1.self_attn.o_proj."),
    (re.compile(r"(layers\.\d+)\.pre_mlp\.pre_(gate|up)_proj\."), r"\1.mlp.\2_proj."),
    (re.compile(r"(layers\.\d+)\.self_mlp\.(?:post_(gate|up)|pre_(down))_proj\."), r"\1.mlp.\2\3_proj."),
    (re.compile(r"(layers\.\d+)\.post_mlp\.post_down_proj\."), r"\1.mlp.down_proj."),
)
_NEXT_LAYER = re.compile(r"layers\.(\d+)\.last_layer_post_mlp\.post_down_proj\.")


def load_model(folder: str | Path) -> Llama:
    """The network of a folder with ``config.json`` and safetensors, in eval mode and in the dtype of the file.

    Understands Hugging Face's ``LlamaForCausalLM``, what ``export`` writes, and ``ColaForCausalLM`` and
    ``ColaMForCausalLM`` of the reference implementation (which stores the factors transposed).

    Returns:
        A network that maps token ids (B, T) int64 to logits (B, T, V).

    Raises:
        InputError: If the folder is incomplete, or describes a network that is not one of these.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    weights = dict(_translate(name, tensor) for name, tensor in _read_weights(folder).items())
    with torch.device("meta"):
        network = _network(config, folder)
    if config.get("tie_word_embeddings"):
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    check_shapes(network, weights, f"{folder} does not fit its config.json")
    network.load_state_dict(weights, assign=True)
    return network.eval()


def check_shapes(network: nn.Module, weights: dict[str, Tensor], trouble: str) -> None:
    """Compare weights with those that a network has.

    Raises:
        InputError: For the first that differs; the message begins with ``trouble``.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{trouble}: {name} should have shape {expected.get(name)}, the file has {found.get(name)}"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; name a folder with {file.name} and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(_read_json(folder / INDEX)["weight_map"].values()))]
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except FileNotFoundError:
            hint = "; pytorch_model.bin is not read, for it can run code: convert it to safetensors"
            raise InputError(f"{file} does not exist{hint if list(folder.glob('*.bin')) else ''}") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a whole safetensors file: {error}") from error
    return weights


def _translate(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The name and layout in our network of a tensor of the reference's."""
    name = _NEXT_LAYER.sub(lambda match: f"layers.{int(match[1]) - 1}.mlp.down_proj.", name)
    for pattern, plain in _REGIONS:
        name = pattern.sub(plain, name)
    for theirs, ours in ((".cola_a", ".A.weight"), (".cola_b", ".B.weight")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours, tensor.T.contiguous()
    return name, tensor


def _network(config: dict[str, Any], folder: Path) -> Llama:
    kind = config.get("model_type")
    if kind not in ("llama", "cola_llama", "cola"):
        raise InputError(
            f"{folder / 'config.json'} describes a {kind!r} model; llama, cola_llama and cola can be loaded"
        )
    hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    different = {
        "hidden_act": config.get("hidden_act", "silu") not in (("silu",) if kind == "cola" else ("silu", "linear")),
        "latent_act": config.get("latent_act", "silu") not in ("silu", "linear"),
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "rope_scaling": rope.get("rope_type", "default") != "default",
        "head_dim": config.get("head_dim") not in (None, hidden_size // heads),
    }
    for key, differs in different.items():
        if differs:
            raise InputError(f"{folder / 'config.json'} sets {key} to {config.get(key, rope)}, which is not supported")
    gate_silu = config.get("hidden_act", "silu") == "silu"
    projection: MakeProjection = FullRank
    if kind != "llama":
        method = LowRank if config.get("latent_act") == "linear" else CoLA
        projection = partial(method, rank=config.get("rank", hidden_size // 4))
    if kind == "cola":
        gate_silu = not config.get("only_lr_act", True)
    return Llama(
        vocab_size=config["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads"),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        gate_silu=gate_silu,
        # Hugging Face's LLaMA writes -1 for none in this lineage's configurations
        pad_token_id=None if config.get("pad_token_id") in (None, -1) else config["pad_token_id"],
        projection=projection,
    )
