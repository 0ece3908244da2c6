"""Measure generation on one thread, one row: python recipes/generation/measure.py PART [options].

PART is one of:

    transformers   60M, this package against transformers' generate on its own export
    sizes          CoLA against full rank, plain and compiled
    int8           speed and memory of int8 against bfloat16, each in a process of its own

Weights are random. In each round every network continues the same prompt, in turns. Medians over the rounds are
printed, and ratios round by round with their range. The compiler's time is printed by itself.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from cola_lightning.benchmark.report import spread
from cola_lightning.costs.counters import Recorder
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.hub import write_folder
from cola_lightning.inference.prepare import prepare_for_generation
from cola_lightning.methods import CoLA
from cola_lightning.models import FullRank, Llama, LlamaConfig, generate

SHAPES = {  # as in configs/llama_*.yaml and configs/cola_*.yaml
    "60m": ((32000, 512, 1376, 8, 8), 128, True),
    "130m": ((32000, 768, 2048, 12, 12), 256, True),
    "350m": ((32000, 1024, 2736, 24, 16), 256, False),
    "1b": ((32000, 2048, 5461, 24, 32), 512, False),
}


def make(size: str, cola: bool, dtype: torch.dtype) -> Llama:
    """Make a network of a published size with random weights."""
    sizes, rank, gate_silu = SHAPES[size]
    config = LlamaConfig(*sizes, max_position_embeddings=1024, gate_silu=gate_silu or not cola)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return Llama(config, partial(CoLA, rank=rank) if cola else FullRank).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def prepared(network: Llama, **how: bool) -> Llama:
    """Return a copy that shares its weights, prepared for generation."""
    own = deepcopy(network, {id(weight): weight for weight in network.parameters()})
    prepare_for_generation(own, **how)
    return own


def compare(contenders: dict[str, Callable[[], Tensor]], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Time continuations in turns; print and return tokens per second of each, round by round."""
    first = {}
    for name, run in contenders.items():
        begin = time.perf_counter()
        run()
        first[name] = time.perf_counter() - begin
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            speeds[name].append(tokens / (time.perf_counter() - begin))
    for name, values in speeds.items():
        print(f"{name}: {spread(values, '.2f')} tokens/s; the first call took {first[name]:.1f} s", flush=True)
    return speeds


def ratio(speeds: dict[str, list[float]], one: str, other: str) -> None:
    """Print the ratio of two contenders."""
    values = [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
    print(f"{one} / {other}: {spread(values, '.2f')}", flush=True)


def against_transformers(options: argparse.Namespace) -> None:
    """Compare with transformers, which loads what this package exports."""
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.train(iter(["a text for a tokenizer that is not used"]), 300)
    for dtype in (torch.float32, torch.bfloat16):
        print(f"== {options.size or '60m'}, {dtype}, {options.prompt} + {options.tokens} tokens")
        networks = {
            "CoLA": make(options.size or "60m", True, dtype),
            "full rank": make(options.size or "60m", False, dtype),
        }
        ids = torch.randint(1, 32000, (1, options.prompt))
        contenders: dict[str, Callable[[], Tensor]] = {}
        for name, network in networks.items():
            with TemporaryDirectory() as folder:
                write_folder(network, Path(folder) / "model", tokenizer, lambda config: "")
                theirs = AutoModelForCausalLM.from_pretrained(
                    Path(folder) / "model", trust_remote_code=True, dtype="auto"
                ).eval()
            settings = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
            ours = {"": network, ", compiled": prepared(network, compile=True)}
            for how, mine in ours.items():
                contenders[f"ours, {name}{how}"] = partial(generate, mine, ids, options.tokens, temperature=0)
            contenders[f"transformers, {name}"] = partial(
                theirs.generate, ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings
            )
        speeds = compare(contenders, options.rounds, options.tokens)
        same = torch.equal(contenders["ours, CoLA"](), contenders["transformers, CoLA"]())
        print(f"the same tokens as transformers: {same}")
        for name in networks:
            ratio(speeds, f"ours, {name}", f"transformers, {name}")
            ratio(speeds, f"ours, {name}, compiled", f"transformers, {name}")
        ratio(speeds, "ours, CoLA, compiled", "ours, full rank, compiled")


def against_full_rank(options: argparse.Namespace) -> None:
    """Compare CoLA with full rank, in bfloat16."""
    size = options.size or "1b"
    print(f"== {size}, bfloat16, {options.prompt} + {options.tokens} tokens")
    ids = torch.randint(1, 32000, (1, options.prompt))
    contenders: dict[str, Callable[[], Tensor]] = {}
    for name, cola in (("CoLA", True), ("full rank", False)):
        network = make(size, cola, torch.bfloat16)
        contenders[name] = partial(generate, network, ids, options.tokens, temperature=0)
        compiled = prepared(network, compile=True)
        contenders[f"{name}, compiled"] = partial(generate, compiled, ids, options.tokens, temperature=0)
    speeds = compare(contenders, options.rounds, options.tokens)
    ratio(speeds, "CoLA", "full rank")
    ratio(speeds, "CoLA, compiled", "full rank, compiled")
    ratio(speeds, "CoLA, compiled", "CoLA")


def against_bfloat16(options: argparse.Namespace) -> None:
    """Compare int8 with bfloat16: speed in turns, then memory in processes of their own."""
    size = options.size or "60m"
    print(f"== {size}, int8 and bfloat16, {options.prompt} + {options.tokens} tokens")
    ids = torch.randint(1, 32000, (1, options.prompt))
    contenders: dict[str, Callable[[], Tensor]] = {}
    for name, how in (("bfloat16", {}), ("int8", {"int8": True})):
        for compiled in (False, True):
            network = prepared(make(size, True, torch.bfloat16), compile=compiled, **how)
            contenders[name + ", compiled" * compiled] = partial(generate, network, ids, options.tokens, temperature=0)
    speeds = compare(contenders, options.rounds, options.tokens)
    ratio(speeds, "int8", "bfloat16")
    ratio(speeds, "int8, compiled", "bfloat16, compiled")
    memory = {}
    for name in ("bfloat16", "int8"):
        command = [sys.executable, __file__, "memory", "--size", size, "--dtype", name]
        command += ["--prompt", str(options.prompt), "--tokens", str(options.tokens)]
        memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(name, memory[name])
    for key in memory["int8"]:
        print(f"{key}, int8 / bfloat16: {memory['int8'][key] / memory['bfloat16'][key]:.3f}")


def memory(options: argparse.Namespace) -> None:
    """Print the bytes of weights, what generation adds at most as counted, and how much resident memory has grown."""
    before = status("VmRSS")
    network = make(options.size, True, torch.bfloat16)
    prepare_for_generation(network, int8=options.dtype == "int8")
    weights = [*network.parameters(), *(buffer for buffer in network.buffers())]
    ids = torch.randint(1, 32000, (1, options.prompt))
    generate(network, ids, 2)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that making the weights took
    generate(network, ids, options.tokens)
    resident = status("VmHWM") - before
    with Recorder([*weights, ids]) as recorder:
        generate(network, ids, options.tokens)
    held = sum(weight.nbytes for weight in weights)
    print(json.dumps({"weights": held, "counted_peak": held + recorder.peak, "resident_growth": resident}))


def status(name: str) -> int:
    """Read a number of bytes about this process from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure the part that the command line names."""
    parts = {
        "transformers": against_transformers, "sizes": against_full_rank, "int8": against_bfloat16, "memory": memory
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--size", choices=SHAPES)
    parser.add_argument("--dtype", choices=("bfloat16", "int8"), default="bfloat16", help="for the part memory")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a continuation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts[options.part](options)


if __name__ == "__main__":
    main()
