"""The config of small comparisons."""

import json
import random

import pytest
import yaml

from cola_lightning.cli.lightning_cli import resolve


@pytest.fixture(scope="session")
def config_file(tiny_run, tmp_path_factory) -> str:
    """Return what all methods here build on: a tiny network, and a schedule with a constant part."""
    folder = tmp_path_factory.mktemp("plans")
    draw = random.Random(0)
    with (folder / "held_out.jsonl").open("w") as file:
        for number in range(12):
            words = ["law", "land", "treaty", "sum"] if number % 2 else ["peace", "war"]
            source = "laws" if number % 2 else "wars"
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=60)), "url": f"x://{source}/1"}) + "\n")
    settings = resolve([*tiny_run, f"--data.validation_paths=['{folder / 'held_out.jsonl'}']"])
    settings["model"]["schedule"] = {
        "class_path": "cola_lightning.optim.WarmupStableDecay",
        "init_args": {"warmup_steps": 2, "decay_share": 0.2, "shape": "linear", "min_ratio": 0.0},
    }
    kept = ("trainer", "checkpoint", "model", "data")
    (folder / "run.yaml").write_text(yaml.safe_dump({name: settings[name] for name in kept}))
    return str(folder / "run.yaml")
