"""The command ``generate``: let a model continue prompts."""

import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cola_lightning.cli.parser import OptionParser
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.inference.load import load_model_for_inference, pick_device
from cola_lightning.models import Llama
from cola_lightning.models.generation import check_sampling, pad_left, stream


def main(args: list[str]) -> None:
    """Let a model continue prompts. One is written as it comes; several are a batch, written when all are done."""
    parser = OptionParser("cola_lightning generate", allow_abbrev=False, description=main.__doc__)
    parser.add_argument("model", help="checkpoint, directory of a run, or folder in Hugging Face's layout")
    parser.add_argument("--prompt", action="append", default=[], help="beginning of a text; may be given several times")
    parser.add_argument("--file", help="file with a prompt on each line")
    parser.add_argument("--tokenizer", help="folder, tokenizer.json or hub repository; the model's if not given")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the logits; 0 takes the likeliest")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="sample among the likeliest that together have this probability")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling")
    parser.add_argument("--device", help="cuda, cpu, …; what there is if not given")
    parser.add_argument("--trust", nargs="+", default=[], help="classes or packages whose code a checkpoint may name")
    options = parser.parse_args(args)
    prompts = options.prompt + (_lines(options.file) if options.file else [])
    _check(options, prompts)
    device = pick_device(options.device)
    trained = load_model_for_inference(options.model, options.trust)
    tokenizer = trained.tokenizer(options.tokenizer)
    progress = continue_texts(
        trained.network.to(device),
        tokenizer,
        prompts,
        options.stop,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    if len(prompts) > 1:
        *_, texts = progress
        print("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
        return
    print(prompts[0], end="", flush=True)
    shown, texts = 0, [""]
    for texts in progress:
        certain = _certain(texts[0], options.stop)
        print(texts[0][shown:certain], end="", flush=True)
        shown = max(shown, certain)
    print(texts[0][shown:])


def continue_texts(
    network: Llama, tokenizer: Tokenizer, prompts: list[str], stops: list[str], **sampling: Any
) -> Iterator[list[str]]:
    """Continue each prompt until its document ends or one of ``stops`` comes up, which is not part of it.

    Args:
        network: The network, on the device to use.
        tokenizer: Its tokenizer.
        prompts: Beginnings of text.
        stops: Texts that end a continuation.
        sampling: As for :func:`cola_lightning.models.generation.stream`.

    Yields:
        After each token, what there is of all continuations.

    Raises:
        InputError: If a prompt holds no token, or ids that the network has not.
    """
    encoded = [ids[:-1] for ids in tokenizer.encode(prompts)]  # without their ends
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise InputError(f"the prompt {prompt!r} holds no token; begin with a word at least")
    tokenizer.check_fits(network.config.vocab_size)
    ids, padding = pad_left(encoded)
    device = network.lm_head.weight.device
    begun = [len(tokenizer.decode(ids)) for ids in encoded]
    texts, done = [""] * len(prompts), [False] * len(prompts)
    for tokens in stream(network, ids.to(device), padding=padding, **sampling):
        for row, token in enumerate(tokens.flatten().tolist()):
            if done[row] or token in tokenizer.stop_ids:
                done[row] = True
                continue
            encoded[row].append(token)
            # All of it is decoded anew, for what a token spells depends on those before it.
            text = tokenizer.decode(encoded[row])[begun[row] :]
            ends = [text.index(stop) for stop in stops if stop in text]
            texts[row], done[row] = text[: min(ends, default=None)], bool(ends)
        yield list(texts)
        if all(done):
            return


def _certain(text: str, stops: list[str]) -> int:
    """How many characters of a text will stay: not what may become a stop, nor a letter of which bytes are missing."""
    certain = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    for stop in stops:
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                certain = min(certain, len(text) - length)
    return certain


def _check(options: Namespace, prompts: list[str]) -> None:
    if not prompts:
        raise InputError("there is no prompt; give --prompt TEXT, or --file with one on each line")
    check_sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    for name, texts in (("prompt", prompts), ("stop", options.stop)):
        for text in texts:
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # what Python makes of other bytes
                raise InputError(f"--{name} {text!r} is not UTF-8; type it in a terminal that is set to UTF-8")
    if "" in options.stop:
        raise InputError("--stop is empty; name a text that ends the continuation, or leave it out")


def _lines(file: str) -> list[str]:
    try:
        # Lines end as they do in an editor; splitlines would also cut at what is not a line's end, as U+2028.
        return [line for line in re.split("\r?\n", Path(file).read_text(encoding="utf-8-sig")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file {file} cannot be read: {error}") from error
