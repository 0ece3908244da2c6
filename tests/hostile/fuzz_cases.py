"""The inputs that the fuzzer alters, and its cases: each alters some and returns a command line."""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from cola_lightning.cli.app import main
from cola_lightning.cli.lightning_cli import resolve

NUMBERS = [-1, 0, 1, 2, 3, 7, 0.5, -0.0, 1e-30, 1e30, 2**31, 2**63, 10**30, float("nan"), float("inf")]
WORDS = [
    "",
    " ",
    "x",
    "null",
    "true",
    "1:30",
    "010",
    "1e-3",
    "../..",
    "/",
    "/dev/null",
    "é\u2028",
    "\x00",
    "a" * 5000,
    "{",
    "[1,",
]
SHAPES: list[Any] = [
    None,
    True,
    [],
    {},
    [[]],
    [1, "x"],
    {"a": 1},
    {"class_path": "CoLA"},
    {"class_path": "subprocess.Popen"},
]
CODE = [{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "TRACE"]}}, "os.system", "evil_module.Evil"]


@dataclass
class Prepared:
    """The inputs that cases alter: a corpus, a run on it, and a folder that was exported from the run."""

    folder: Path
    flags: list[str]
    config: dict[str, Any]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def exported(self) -> Path:
        return self.folder / "exported"


def prepare(folder: Path) -> Prepared:
    """Make the inputs in a folder."""
    draw, words = random.Random(0), ["the", "law", "of", "land", "and", "peace", "upon", "people"]
    (folder / "corpus").mkdir()
    for index in range(12):
        (folder / "corpus" / f"{index:02}.txt").write_text(" ".join(draw.choices(words, k=60)))
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=30))}) for _ in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.write("\n".join(rows))
    settings = {
        "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.max_steps": 2, "trainer.log_every_n_steps": 1,
        "trainer.num_sanity_val_steps": 0, "trainer.enable_progress_bar": "false", "trainer.limit_val_batches": 1,
        "model.vocab_size": 300, "model.hidden_size": 16, "model.intermediate_size": 24, "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2, "model.projection": "CoLA", "model.projection.rank": 4,
        "checkpoint.every_n_train_steps": 1, "data": "TextDataModule", "data.paths": f'["{folder}/corpus"]',
        "data.vocab_size": 300, "data.sequence_length": 16, "data.batch_size": 2, "data.cache_dir": f"{folder}/cache",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    main(["fit", *flags, f"--run_dir={folder}/run"])
    main(["export", f"{folder}/run", f"{folder}/exported"])
    return Prepared(folder, flags, resolve(flags))


def value(draw: random.Random) -> Any:
    return draw.choice([draw.choice(NUMBERS), draw.choice(WORDS), draw.choice(SHAPES), draw.choice(CODE)])


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [place for key, each in items for place in places(each, (*path, key))]


def alter_tree(tree: Any, draw: random.Random) -> Any:
    """Set, remove or add one to three values in nested dicts and lists."""
    for _ in range(draw.randint(1, 3)):
        found = places(tree)
        if not found:
            return value(draw)
        *above, last = draw.choice(found)
        owner = tree
        for key in above:
            owner = owner[key]
        match draw.randrange(4):
            case 0:
                del owner[last]
            case 1 if isinstance(owner, dict):
                owner[draw.choice(["x", "class_path", "init_args", 3, "a.b"])] = value(draw)
            case _:
                owner[last] = value(draw)
    return tree


def alter_bytes(file: Path, draw: random.Random) -> None:
    """Cut a file, flip bits, repeat or insert bytes, or empty it."""
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content) + 1)
    match draw.randrange(5):
        case 0:
            del content[at:]
        case 1:
            for _ in range(draw.randint(1, 8)):
                if content:
                    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        case 2:
            content[at:at] = content[:at][-200:]
        case 3:
            content[at:at] = draw.choice([b"\x00", b"\xff\xfe", b"\n\n", b"{", b"}" * 3, b"*a", b"&a ", b"NaN"])
        case 4:
            content.clear()
    file.write_bytes(content)


def alter_file(file: Path, draw: random.Random) -> None:
    """Alter a JSON or YAML file as a tree, or any file as bytes."""
    if file.suffix in (".json", ".yaml") and draw.random() < 0.7:
        load, dump = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
        try:
            content = load(file.read_text())
        except (ValueError, yaml.YAMLError):  # an earlier change has made it invalid
            alter_bytes(file, draw)
        else:
            file.write_text(dump(alter_tree(content, draw)))
    else:
        alter_bytes(file, draw)


def any_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()))


def use(path: Path, draw: random.Random, prepared: Prepared) -> list[str]:
    """Draw a command that opens a checkpoint, the directory of a run, or an exported folder."""
    corpus = f"{prepared.folder}/corpus/00.txt"
    return draw.choice(
        [
            ["generate", str(path), "--prompt", "the", "--max_new_tokens", "3"],
            ["evaluate", str(path), "--text", corpus, "--json", "out.json"],
            ["export", str(path), "out"],
        ]
    )


def resumed(path: Path | str, draw: random.Random, prepared: Prepared, run_dir: str = "out") -> list[str]:
    command = draw.choice(["fit", "validate", "predict"])
    more = [f"--run_dir={run_dir}", "--trainer.max_steps=3"] if command == "fit" else [f"--run_dir={run_dir}"]
    return [command, *prepared.flags, f"--ckpt_path={path}", *more]


def config_file(draw: random.Random, prepared: Prepared) -> list[str]:
    Path("run.yaml").write_text(yaml.safe_dump(alter_tree(prepared.config, draw)))
    if draw.random() < 0.3:
        alter_bytes(Path("run.yaml"), draw)
    ends = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--run_dir=out"]
    command = draw.choice(["fit", "fit", "validate", "estimate"])
    return [command, "--config=run.yaml", *(ends if command != "estimate" else ends[:1])]


def flags(draw: random.Random, prepared: Prepared) -> list[str]:
    given = list(prepared.flags)
    for _ in range(draw.randint(1, 3)):
        index = draw.randrange(len(given))
        name, _, old = given[index].partition("=")
        match draw.randrange(5):
            case 0:
                del given[index]
            case 1:
                given[index] = f"{name[:-1]}={old}"
            case 2:
                given.insert(
                    index, draw.choice(["--", "-", "--x", "fit", "--config", "--seed_everything=-1", "--data.seed=-5"])
                )
            case _:
                new = value(draw)
                given[index] = f"{name}={new if isinstance(new, str) else json.dumps(new)}".replace("\x00", "0")
    command = draw.choice(["fit", "fit", "validate", "estimate", "nothing"])
    return [command, *given, *(["--run_dir=out", "--trainer.max_steps=2"] if command == "fit" else [])]


def checkpoint_bytes(draw: random.Random, prepared: Prepared) -> list[str]:
    shutil.copytree(prepared.run, "run", symlinks=True)
    alter_bytes(draw.choice(sorted(p for p in Path("run/checkpoints").glob("step*"))), draw)
    if draw.random() < 0.5:
        return use(Path("run"), draw, prepared)
    return resumed(draw.choice(["last", "run/checkpoints/last.ckpt"]), draw, prepared, run_dir="run")


def checkpoint_content(draw: random.Random, prepared: Prepared) -> list[str]:
    state = torch.load(prepared.run / "checkpoints" / "last.ckpt", weights_only=True)
    part = draw.choice(
        ["hyper_parameters", "loops", "callbacks", "lr_schedulers", "optimizer_states", "all", "all", "weights"]
    )
    if part == "all":
        state = alter_tree(dict(state), draw)
    elif part == "weights":
        name = draw.choice(sorted(state["state_dict"]))
        state["state_dict"][name] = draw.choice(
            [torch.zeros(2, 2), torch.tensor(float("nan")), torch.zeros(0), None, 3, torch.ones(3, dtype=torch.int64)]
        )
    else:
        state[part] = alter_tree(
            json.loads(json.dumps(state[part], default=str)) if part != "optimizer_states" else state[part], draw
        )
    torch.save(state, "altered.ckpt")
    return (use if draw.random() < 0.4 else resumed)(Path("altered.ckpt"), draw, prepared)


def foreign_checkpoint(draw: random.Random, prepared: Prepared) -> list[str]:
    one = torch.ones(1)
    foreign: list[Any] = [{}, [], 3, one, {"model": {"w": one}}, {"state_dict": {}}, {"state_dict": {"w": one}}]
    foreign += [{"state_dict": {"network.model.layers.0.x": one}}, {"hyper_parameters": 1, "state_dict": None}]
    torch.save(draw.choice(foreign), "foreign.ckpt")
    return (use if draw.random() < 0.5 else resumed)(Path("foreign.ckpt"), draw, prepared)


def run_directory(draw: random.Random, prepared: Prepared) -> list[str]:
    shutil.copytree(prepared.run, "run", symlinks=True)
    for _ in range(draw.randint(1, 2)):
        file = any_file(Path("run"), draw)
        if not file.name.startswith("step"):
            alter_file(file, draw)
    return use(Path("run"), draw, prepared) if draw.random() < 0.7 else resumed("last", draw, prepared, run_dir="run")


def exported_folder(draw: random.Random, prepared: Prepared) -> list[str]:
    shutil.copytree(prepared.exported, "folder")
    file = any_file(Path("folder"), draw)
    file.unlink() if draw.random() < 0.15 else alter_file(file, draw)
    if draw.random() < 0.2:
        return ["fit", *prepared.flags, "--model.initial_weights=folder", "--run_dir=out"]
    return use(Path("folder"), draw, prepared)


def data(draw: random.Random, prepared: Prepared) -> list[str]:
    shutil.copytree(prepared.folder / "corpus", "corpus")
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        shutil.copy(prepared.folder / name, f"corpus/{name}")
    for _ in range(draw.randint(1, 3)):
        alter_bytes(any_file(Path("corpus"), draw), draw)
    return ["fit", *prepared.flags, '--data.paths=["corpus"]', "--data.cache_dir=cache", "--run_dir=out"]


def cache(draw: random.Random, prepared: Prepared) -> list[str]:
    shutil.copytree(prepared.folder / "cache", "cache")
    for _ in range(draw.randint(1, 2)):
        file = any_file(Path("cache"), draw)
        file.unlink() if draw.random() < 0.2 else alter_file(file, draw)
    return ["fit", *prepared.flags, "--data.cache_dir=cache", "--run_dir=out"]


Case = Callable[[random.Random, Prepared], list[str]]


CASES: list[Case] = [
    config_file, config_file, flags, flags, checkpoint_bytes, checkpoint_content, checkpoint_content,
    foreign_checkpoint, run_directory, exported_folder, exported_folder, data, cache,
]  # fmt: skip
