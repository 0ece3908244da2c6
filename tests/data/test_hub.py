"""Streaming from a server with the protocol of the Hugging Face hub, in the layouts of the overlays."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zstandard

from cola_lightning.data.prepared import PreparedCorpus
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus, find
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.conftest import sentences, write_shard
from tests.data.hub import Hub

pytestmark = pytest.mark.slow

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
    """Serve data sets in which each document begins with the name of its data set."""
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


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Return a function that runs a job of hub_runs.py, and returns the answer of each rank."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "PYTHONPATH": str(REPOSITORY),
        "no_proxy": "127.0.0.1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.data.hub_runs"],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def run(**job) -> list[dict]:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    with process:
        yield run


@pytest.fixture(scope="module")
def seen(hub, run, tmp_path_factory) -> dict[str, dict]:
    """Run over each layout, over C4 while the hub is busy; return the answers."""
    shard = "datasets/allenai/c4/resolve/{}/en/c4-validation.00000-of-00001.json.gz"
    [commit] = hub.commits("datasets", "allenai/c4")
    hub.busy = {"datasets/allenai/c4/resolve/main/README.md": [503], shard.format(commit): [429, 503]}
    cache = tmp_path_factory.mktemp("cache")
    seen = {}
    for name in LAYOUTS:
        [seen[name]] = run(arguments=arguments(name, cache), ranks=1, batches=10)
    assert not any(hub.busy.values()), "the hub was not asked while it was busy"
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_streamed_and_validated_on(seen, name):
    found = seen[name]
    assert "error" not in found
    assert found["status"] == 0, found["said"]
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
    if name in ("fineweb_edu", "dclm", "redpajama"):  # these have only the split train
        assert all(text.strip().startswith(begins) for text in found["held_out"])
        assert not set(found["held_out"]) & set(found["texts"])
    else:
        assert all(text.strip().startswith("held") for text in found["held_out"])
    # 40 rows of one document each, out of 60 documents or more.
    assert len(set(found["texts"])) == len(found["texts"]) == 40


def test_one_rank_sends_the_requests_for_all_ranks(hub, run, tmp_path):
    """All requests except those for shards are sent once, by two ranks with a worker each as by one rank."""
    asked = []
    for ranks in (1, 2):
        hub.requests.clear()
        found = run(arguments=arguments("c4", tmp_path / str(ranks)), ranks=ranks, batches=2, cold=True)
        assert [rank["status"] for rank in found] == [0] * ranks, found
        assert not any("error" in rank for rank in found)
        asked.append([request for request in hub.requests if ".json.gz" not in request and "harness" not in request])
    assert sorted(asked[0]) == sorted(asked[1])
    assert len(asked[0]) <= 25
    listed = [request for request in asked[0] if "/tree/" in request]
    assert len(listed) <= 4  # the pages of one folder, and the root
    assert sum("/revision/" in request for request in asked[0]) <= 1


def test_offline_mode_is_an_error_at_once(hub, run, tmp_path):
    settings = arguments("c4", tmp_path) | {"retry_wait": 600.0, "tokenizer": str(hub.folder / "models/someone/words")}
    hub.requests.clear()
    [found] = run(arguments=settings, ranks=1, batches=1, offline=True, cold=True)
    assert "allenai/c4/en is not on this machine, and HF_HUB_OFFLINE is set" in found["error"]
    assert not hub.requests


def test_a_run_stays_at_the_commit_of_the_hub_that_it_began_with(hub, run, tmp_path):
    """A run that was killed and resumed after main changed on the hub ends with the weights of an uninterrupted run."""
    newer = tmp_path / "newer"
    shutil.copytree(hub.folder / "datasets/allenai/c4", newer)
    for number, shard in enumerate(sorted(newer.glob("en/c4-train.*"))):
        write_shard(shard, sentences(f"newer{number} ", 4))
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    flags = {f"model.{name}": size for name, size in sizes.items()}
    flags |= {"model.num_attention_heads": 2, "model.projection.rank": 4, "data.tokenizer": "someone/words"}
    flags |= {"data.batch_size": 4, "data.global_batch_size": 4, "data.validation_tokens": 300}
    flags |= {"data.shuffle_buffer": 4, "data.cache_dir": tmp_path / "cache", "trainer.accelerator": "cpu"}
    flags |= {"trainer.devices": 1, "trainer.max_steps": 5, "trainer.val_check_interval": 3}
    flags |= {"trainer.enable_progress_bar": "false", "checkpoint.every_n_train_steps": 2}
    fit = ["fit", f"--config={REPOSITORY}/configs/cola_60m.yaml", *(f"--{name}={flags[name]}" for name in flags)]
    [whole] = run(command=[*fit, f"--run_dir={tmp_path}/whole"])
    assert whole["status"] == 0, whole["said"]
    run_dir = f"--run_dir={tmp_path}/killed"
    kill = ["--trainer.callbacks+=tests.data.hub_runs.KillAt", "--trainer.callbacks.step=3"]
    [killed] = run(command=[*fit, run_dir, *kill])
    assert killed["status"] == -signal.SIGKILL, killed["said"]
    [began] = hub.commits("datasets", "allenai/c4")
    hub.newer["allenai/c4"] = [newer]
    hub.requests.clear()
    [resumed] = run(command=[*fit, run_dir, "--ckpt_path=last"])
    asked = {request for request in hub.requests if "c4-train" in request}
    [fresh] = run(arguments=arguments("c4", tmp_path), ranks=1, batches=1)
    assert all(text.strip().startswith("newer") for text in fresh["texts"])  # main did move
    assert resumed["status"] == 0, resumed["said"]
    assert f"allenai/c4/en is read at commit {began}, which the run began with" in resumed["said"]
    assert asked
    assert all(f"/resolve/{began}/" in request for request in asked)
    weights = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "killed")
    ]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_prepare_stays_at_the_commit_of_the_hub_that_it_began_with(hub, run, tmp_path):
    name, last = "HuggingFaceFW/fineweb-edu", "sample/10BT/002_00000.parquet"
    newer = tmp_path / "newer"
    shutil.copytree(hub.folder / "datasets" / name, newer)
    write_parquet(newer / last, sentences("newer ", 7))
    config = tmp_path / "prepare.yaml"
    config.write_text(json.dumps({"source": {"path": name, "name": "sample-10BT"}, "folder": f"{tmp_path}/made"}))
    command = ["prepare", f"--config={config}", "--tokenizer=someone/words", "--num_workers=1"]
    [began] = hub.commits("datasets", name)
    hub.busy = {f"datasets/{name}/resolve/{began}/{last}": [403] * 9}
    [broken] = run(command=command)
    assert broken["status"] == 2, broken["said"]
    assert f"{last} (row 0) cannot be read" in broken["said"]
    hub.busy, hub.newer[name] = {}, [newer]
    [finished] = run(command=command)
    assert finished["status"] == 0, finished["said"]
    assert (
        f"{name}/sample-10BT is read at commit {began}, which {tmp_path}/made/train was begun with" in finished["said"]
    )
    assert PreparedCorpus(Source(f"{tmp_path}/made")).index["documents"] == 3 * 60


def test_a_missing_package_for_a_bucket_is_an_error_that_names_the_extra(monkeypatch):
    def missing(protocol):
        raise ImportError(f"Install it to access {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for address, extra in (("s3://bucket/*.jsonl", "s3"), ("gs://bucket/*.jsonl", "gcs")):
        fix = rf"needs the package \w+; pip install 'cola-lightning\[{extra}\]'"
        with pytest.raises(InputError, match=f"{address[:2]}://bucket.* {fix}"):
            find(Source("json", data_files=address), Retry(0, 0))


def test_files_of_any_fsspec_protocol_are_read(c4):
    filesystem = fsspec.filesystem("memory")
    write_parquet(c4.parent / "bucket/one.parquet", sentences("bucket", 30))
    filesystem.pipe("/bucket/one.parquet", (c4.parent / "bucket/one.parquet").read_bytes())
    corpus = TextCorpus(Source("parquet", data_files="memory://bucket/*.parquet"), None, Retry(0, 0))
    assert [text for _, text in corpus.read(0, 7)] == sentences("bucket", 30)[7:]
