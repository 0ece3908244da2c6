"""Let a model continue prompts."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.inference.load import load_model_for_inference, pick_device
from cola_lightning.inference.prepare import check_compiler, prepare_for_generation
from cola_lightning.models import Llama
from cola_lightning.models.generation import pad_left, stream
from cola_lightning.models.sampling import check_sampling


def print_continuations(
    model: str,
    prompts: list[str],
    file: str | None = None,
    tokenizer: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    stops: Sequence[str] = (),
    seed: int = 42,
    device: str | None = None,
    trust: Sequence[str] = (),
    int8: bool = False,
    compile: bool = False,
) -> None:
    """Let a model continue prompts, and print them. One is printed token by token, several when all are done.

    Args:
        model: Checkpoint, directory of a run, or folder in Hugging Face's layout.
        prompts: Beginnings of text.
        file: File with a further prompt on each line.
        tokenizer: Folder, tokenizer.json or hub repository; the model's if not given.
        max_new_tokens, temperature, top_k, top_p: As for :func:`cola_lightning.models.generation.stream`.
        stops: Texts that end a continuation.
        seed: Of the sampling.
        device: Where to compute; a GPU if there is one.
        trust: Classes or packages whose code a checkpoint may name.
        int8, compile: As for :func:`cola_lightning.inference.prepare.prepare_for_generation`.

    Raises:
        InputError: If there is no prompt, a value is out of range, or the model cannot be loaded.
    """
    prompts = prompts + (_lines(file) if file else [])
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    _check_texts(prompts, stops)
    where = pick_device(device)
    if compile:
        if len(prompts) > 1:  # several would be continued uncompiled
            raise InputError(f"--compile is for one prompt, and there are {len(prompts)}; leave it out, or give one")
        check_compiler(where)
    trained = load_model_for_inference(model, trust)
    network = trained.network.to(where)
    prepare_for_generation(network, int8=int8, compile=compile)
    if compile:
        print("the second token waits for the compiler, whose result later calls find on disk", file=sys.stderr)
    progress = continue_texts(
        network,
        trained.tokenizer(tokenizer),
        prompts,
        list(stops),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(where).manual_seed(seed),
    )
    if len(prompts) > 1:
        *_, texts = progress
        print("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
        return
    print(prompts[0], end="", flush=True)
    shown, texts = 0, [""]
    for texts in progress:
        certain = _certain(texts[0], stops)
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
    rows, padding = pad_left(encoded)
    device = network.lm_head.weight.device
    continuations = [Continuation(tokenizer, ids, stops) for ids in encoded]
    for tokens in stream(network, rows.to(device), padding=padding, **sampling):
        for continuation, token in zip(continuations, tokens.flatten().tolist(), strict=True):
            continuation.append(token)
        yield [continuation.text for continuation in continuations]
        if all(continuation.done for continuation in continuations):
            return


class Continuation:
    """The text of a continuation, decoded token by token.

    What a token spells depends on the tokens before it: a letter may be spread over several, and a tokenizer may leave
    out a space at the beginning of a text. So the last tokens are decoded again with each new one, from the last but
    one place where the text ended in a whole letter. The time for a token does not grow with the text.

    Args:
        tokenizer: The tokenizer.
        prompt: Ids of the prompt.
        stops: Texts that end a continuation.

    Attributes:
        text: The continuation so far, up to where it ends.
        done: Whether it has ended.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.text, self.done = "", False
        self.settled = ""  # text that no later token changes
        self.before, self.recent = list(prompt), list[int]()  # ids that are decoded again: settled ones, and others

    def append(self, token: int) -> None:
        """Add an id, unless the continuation has ended."""
        if self.done or token in self.tokenizer.stop_ids:
            self.done = True
            return
        self.recent.append(token)
        known = len(self.tokenizer.decode(self.before))
        added = self.tokenizer.decode(self.before + self.recent)[known:]
        text = self.settled + added
        # A stop may begin in the settled text, which held none.
        begins = [text.find(stop, max(0, len(self.settled) - len(stop) + 1)) for stop in self.stops]
        self.text = text[: min((begin for begin in begins if begin >= 0), default=None)]
        self.done = max(begins, default=-1) >= 0
        if added and not added.endswith("\N{REPLACEMENT CHARACTER}"):
            self.settled, self.before, self.recent = text, self.recent, []


def _certain(text: str, stops: Sequence[str]) -> int:
    """How many characters of a text will stay: not what may become a stop, nor a letter of which bytes are missing."""
    certain = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    for stop in stops:
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                certain = min(certain, len(text) - length)
    return certain


def _check_texts(prompts: Sequence[str], stops: Sequence[str]) -> None:
    if not prompts:
        raise InputError("there is no prompt; give --prompt TEXT, or --file with one on each line")
    for name, texts in (("prompt", prompts), ("stop", stops)):
        for text in texts:
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # what Python makes of other bytes
                raise InputError(f"--{name} {text!r} is not UTF-8; type it in a terminal that is set to UTF-8")
    if "" in stops:
        raise InputError("--stop is empty; name a text that ends the continuation, or leave it out")


def _lines(file: str) -> list[str]:
    try:
        # Lines end as they do in an editor; splitlines would also cut at what is not a line's end, as U+2028.
        return [line for line in re.split("\r?\n", Path(file).read_text(encoding="utf-8-sig")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file {file} cannot be read: {error}") from error
