"""Streaming from the Hugging Face hub, played by a server of this machine, in the layouts of the overlays."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus, find
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.conftest import sentences, write_shard
from tests.data.hub import Hub

REPOSITORY = Path(__file__).parents[2]
LAYOUTS = ["c4", "mixture", "fineweb_edu", "dclm", "slimpajama", "the_pile", "redpajama"]


def write_zst(file: Path, texts: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "meta": {"set": "x"}}) + "\n" for text in texts)
    file.write_bytes(zstandard.compress(lines.encode()))


def write_parquet(file: Path, texts: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "score": [1.0] * len(texts)}), file, row_group_size=10)


def card(folder: Path, name: str, files: dict[str, str]) -> None:
    listed = "".join(f"  - split: {split}\n    path: {pattern}\n" for split, pattern in files.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{listed}---\n")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The documents of each data set begin with its name."""
    folder = tmp_path_factory.mktemp("hub")
    data = folder / "datasets"
    c4 = data / "allenai/c4"
    card(c4, "en", {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"})
    (c4 / "en").mkdir()
    for number in range(96):
        write_shard(c4 / f"en/c4-train.{number:05}-of-00096.json.gz", sentences(f"cfour{number} ", 4))
    write_shard(c4 / "en/c4-validation.00000-of-00001.json.gz", sentences("held ", 20))
    for name, sample in (("fineweb", "10BT"), ("fineweb-edu", "10BT")):
        card(data / "HuggingFaceFW" / name, f"sample-{sample}", {"train": f"sample/{sample}/*"})
        for number in range(3):
            write_parquet(
                data / f"HuggingFaceFW/{name}/sample/{sample}/{number:03}_00000.parquet",
                sentences(f"fineweb{number} ", 60),
            )
    for number in range(4):
        write_zst(
            data / f"mlfoundations/dclm-baseline-1.0/global-shard_01_of_10/local-shard_{number}_of_10/"
            f"shard_0000000{number}_processed.jsonl.zst",
            sentences(f"dclm{number} ", 60),
        )
        write_zst(
            data / f"cerebras/SlimPajama-627B/train/chunk1/example_train_{number}.jsonl.zst",
            sentences(f"slim{number} ", 30),
        )
        write_zst(data / f"monology/pile-uncopyrighted/train/0{number}.jsonl.zst", sentences(f"pile{number} ", 30))
    for split, name in (("validation", "holdout"), ("test", "holdout")):
        write_zst(
            data / f"cerebras/SlimPajama-627B/{split}/chunk1/example_{name}_0.jsonl.zst", sentences(f"held{split} ", 20)
        )
    write_zst(data / "monology/pile-uncopyrighted/val.jsonl.zst", sentences("held ", 20))
    write_zst(data / "monology/pile-uncopyrighted/test.jsonl.zst", sentences("test ", 20))
    red = data / "togethercomputer/RedPajama-Data-1T-Sample"
    red.mkdir(parents=True)
    (red / "RedPajama-Data-1T-Sample.py").write_text("raise SystemExit('code of a data set was run')")
    for number, part in enumerate(("arxiv", "book", "c4")):
        texts = sentences(f"red{number} ", 80)
        (red / f"{part}_sample.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(sentences("cfour fineweb dclm slim pile red held ", 200), 300).save(folder / "models/someone/words")
    hub = Hub(folder)
    yield hub
    hub.close()


def arguments(name: str, cache: Path) -> dict:
    overlay = REPOSITORY / f"configs/data/{name}.yaml"
    written = yaml.safe_load(overlay.read_text())["data"]["init_args"] if overlay.exists() else {}
    small = {"tokenizer": "someone/words", "sequence_length": 64, "batch_size": 4, "shuffle_buffer": 6}
    small |= {"validation_tokens": 300, "retry_wait": 0.01, "cache_dir": str(cache)}
    return written | small


def run(hub: Hub, jobs: list[dict], home: Path, **environment) -> list[dict]:
    environment = (
        os.environ
        | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "no_proxy": "127.0.0.1",
        }
        | environment
    )
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("hub_runs.py")],
        input="\n".join(map(json.dumps, jobs)),
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    seen = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(seen) == sum(job["ranks"] for job in jobs), result.stderr
    return seen


@pytest.fixture(scope="module")
def seen(hub, tmp_path_factory) -> dict[str, dict]:
    """What a run over each of the layouts saw; of C4 while the hub is busy."""
    shard = "datasets/allenai/c4/resolve/{}/en/c4-validation.00000-of-00001.json.gz"
    commit = "0" * 40
    hub.busy = {"datasets/allenai/c4/resolve/main/README.md": [503], shard.format(commit): [429, 503]}
    cache = tmp_path_factory.mktemp("cache")
    jobs = [
        {"arguments": arguments(name, cache), "ranks": 1, "batches": 40 if name != "c4" else 20} for name in LAYOUTS
    ]
    return dict(zip(LAYOUTS, run(hub, jobs, tmp_path_factory.mktemp("home")), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_streamed_and_validated_on(seen, name):
    found = seen[name]
    assert "error" not in found
    begins = {
        "c4": ("cfour",),
        "mixture": ("cfour", "fineweb"),
        "fineweb_edu": ("fineweb",),
        "dclm": ("dclm",),
        "slimpajama": ("slim",),
        "the_pile": ("pile",),
        "redpajama": ("red",),
    }[name]
    assert all(text.strip().startswith(begins) for text in found["texts"])
    assert all(any(text.strip().startswith(begin) for text in found["texts"]) for begin in begins)
    shards = {"c4": 96, "mixture": 96, "fineweb_edu": 3, "dclm": 4, "slimpajama": 4, "the_pile": 4, "redpajama": 3}
    assert found["shards"] == shards[name]
    assert found["held_out"]
    if name in ("fineweb_edu", "dclm", "redpajama"):  # which have no split but train
        assert all(text.strip().startswith(begins) for text in found["held_out"])
        assert not set(found["held_out"]) & set(found["texts"])
    else:
        assert all(text.strip().startswith("held") for text in found["held_out"])
    for text in set(found["texts"]):
        assert found["texts"].count(text) <= 1 or len(found["texts"]) > 100


def test_one_rank_asks_the_hub_for_all(hub, tmp_path):
    """Everything but the shards is asked for once, by two ranks with a worker each as by one."""
    hub.busy = {}
    asked = []
    for ranks in (1, 2):
        hub.requests.clear()
        job = {"arguments": arguments("c4", tmp_path / str(ranks)), "ranks": ranks, "batches": 2}
        assert all("error" not in rank for rank in run(hub, [job], tmp_path / f"home{ranks}"))
        asked.append([request for request in hub.requests if ".json.gz" not in request and "harness" not in request])
    assert sorted(asked[0]) == sorted(asked[1])
    assert len(asked[0]) <= 25
    listed = [request for request in asked[0] if "/tree/" in request]
    assert len(listed) <= 4  # the pages of one folder, and the root
    assert sum("/revision/" in request for request in asked[0]) <= 1


def test_offline_is_said_at_once(hub, tmp_path):
    job = {"arguments": arguments("c4", tmp_path) | {"retry_wait": 60.0}, "ranks": 1, "batches": 1}
    job["arguments"]["tokenizer"] = str(hub.folder / "models/someone/words")
    began = time.monotonic()
    [found] = run(hub, [job], tmp_path / "home", HF_HUB_OFFLINE="1")
    assert "allenai/c4/en is not on this machine, and HF_HUB_OFFLINE is set" in found["error"]
    assert time.monotonic() - began < 60


def test_a_package_that_is_missing_for_a_bucket_is_named(monkeypatch):
    def missing(protocol):
        raise ImportError(f"Install it to access {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for address, extra in (("s3://bucket/*.jsonl", "s3"), ("gs://bucket/*.jsonl", "gcs")):
        fix = rf"needs the package \w+; pip install 'cola-lightning\[{extra}\]'"
        with pytest.raises(InputError, match=f"{address[:2]}://bucket.* {fix}"):
            find(Source("json", data_files=address), Retry(0, 0))


def test_files_behind_fsspec_are_read_by_their_addresses(c4):
    filesystem = fsspec.filesystem("memory")
    write_parquet(c4.parent / "bucket/one.parquet", sentences("bucket", 30))
    filesystem.pipe("/bucket/one.parquet", (c4.parent / "bucket/one.parquet").read_bytes())
    corpus = TextCorpus(Source("parquet", data_files="memory://bucket/*.parquet"), None, Retry(0, 0))
    assert [text for _, text in corpus.read(0, 7)] == sentences("bucket", 30)[7:]
