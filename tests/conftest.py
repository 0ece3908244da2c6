import ast
import gc
import os
import random
import signal
import sys
import threading
from functools import cache, partial
from pathlib import Path

# Tests run in two processes (see pyproject.toml): each has one core, and compiles into a folder of its own, for each
# value of ATEN_CPU_CAPABILITY. Otherwise torch 2.13 takes code from there that was compiled for other vector units,
# and it computes NaN or does not compile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = "-".join(
    ["/tmp/torchinductor-test", *(os.environ.get(name, "") for name in ("PYTEST_XDIST_WORKER", "ATEN_CPU_CAPABILITY"))]
)

import lightning as L
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from cola_lightning.cli.app import main
from cola_lightning.methods import CoLA
from cola_lightning.models import Llama, LlamaConfig
from cola_lightning.models.projection import MakeProjection
from cola_lightning.private_apis.lightning import unwrap_data_loaders
from cola_lightning.private_apis.torch import allow_compilations
from cola_lightning.training.module import LanguageModel
from tests import processes
from tests.processes import child_processes, end_all

# A background job of a script starts with SIGINT ignored, and one of nohup with SIGHUP. What the tests start would
# inherit that, and they send both.
if threading.current_thread() is threading.main_thread():
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)

GOLDEN = Path(__file__).parent / "golden" / "cola_tiny"
REPOSITORY = Path(__file__).parent.parent


@cache
def source_tree(file: Path) -> ast.Module:
    """Parse a file of the package; several tests read all of them."""
    return ast.parse(file.read_text(encoding="utf-8"))


def tiny_llama(projection: MakeProjection | None = None, seed: int = 0, **sizes) -> Llama:
    torch.manual_seed(seed)
    arguments = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return Llama(LlamaConfig(**(arguments | sizes)), projection or partial(CoLA, rank=8))


def loader(batches: list) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def tiny_trainer(*callbacks, steps: int, vocab_size: int = 50, **trainer) -> tuple:
    """Make a trainer on the CPU, a module and six batches (3, 8) with some labels that are ignored."""
    torch.manual_seed(0)
    model = LanguageModel(vocab_size, 16, 24, 1, 2, projection=partial(CoLA, rank=4))
    batches = []
    for ids in torch.randint(1, vocab_size, (6, 3, 8)):
        batches.append({"input_ids": ids, "labels": ids.where(torch.rand(3, 8) < 0.8, -100)})
    settings = {
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "limit_train_batches": steps,
        "devices": 1,
    }
    run = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=1, num_sanity_val_steps=0, enable_model_summary=False,
        callbacks=list(callbacks), **({"enable_progress_bar": False} | settings | trainer),
    )  # fmt: skip
    return run, model, batches


@pytest.fixture(autouse=True)
def _nothing_stays_behind():
    """Fail a test that leaves a process group, a thread or a process behind, after ending it.

    With a process group in this process, the next run would take itself for one of several ranks. Threads that end with
    the process (daemons) may stay, and so may the servers of pytest and multiprocessing. Environment variables of the
    test are removed: with Lightning's LOCAL_RANK, the next run would wait for other ranks.
    """
    if "torch._dynamo" in sys.modules:
        allow_compilations()  # or the tests before would have used up PyTorch's limit, and this one would not compile
    variables, threads, children = dict(os.environ), set(threading.enumerate()), child_processes()
    yield
    left = end_all()
    unwrap_data_loaders()
    if dist.is_initialized():
        dist.destroy_process_group()
        left.append("a process group (use the fixture `process_group`)")
    for name in [name for name in os.environ if name not in variables and not name.startswith("PYTEST")]:
        del os.environ[name]
    left += [f"thread {t.name}" for t in set(threading.enumerate()) - threads if not t.daemon and not _ends(t)]
    left += [f"process {child}" for child in sorted(child_processes() - children)]
    assert not left, f"the test left behind: {', '.join(left)}"


def _ends(thread: threading.Thread) -> bool:
    """Wait a little for a thread to end. Threads of a library's pool may stay."""
    if thread.name.startswith(("asyncio_", "ThreadPoolExecutor", "QueueFeederThread")):
        return True
    thread.join(5)
    return not thread.is_alive()


@pytest.fixture
def process_group():
    """End the process group of a test that trains under a distributed strategy in this process; Lightning keeps it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all that was imported, in each test that collects garbage."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let only tests that are marked start ranks, so that the fast subset stays in one process."""
    processes.allowed = bool(item.get_closest_marker("distributed") or item.get_closest_marker("slow"))
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Make forty short documents of the same few words."""
    words = [
        "the",
        "of",
        "and",
        "nation",
        "people",
        "congress",
        "war",
        "peace",
        "year",
        "upon",
        "great",
        "commerce",
        "law",
        "land",
        "treaty",
        "sum",
    ]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(30, 120))) for _ in range(40)]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory) -> Path:
    """Write each document into a .txt file, and return their folder."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, text in enumerate(texts):
        (folder / f"{index:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_run(corpus, tmp_path_factory) -> list[str]:
    """Return the flags of a training run that takes a second, without its directory."""
    cache = tmp_path_factory.mktemp("cache")
    flags = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 6,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 3,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false",
        "model.vocab_size": 300,
        "model.hidden_size": 32,
        "model.intermediate_size": 48,
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": 4,
        "model.projection": "CoLA",
        "model.projection.rank": 8,
        "model.schedule.warmup_steps": 2,
        "checkpoint.every_n_train_steps": 2,
        "data": "TextDataModule",
        "data.paths": f'["{corpus}"]',
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "data.batch_size": 4,
        "data.cache_dir": str(cache),
    }
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="session")
def trained_run(tiny_run, tmp_path_factory) -> Path:
    """Train such a run, and return its directory."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    main(["fit", *tiny_run, f"--run_dir={folder}"])
    return folder


@pytest.fixture
def work_folder(tmp_path, monkeypatch):
    """Run the test in a folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def fit(tiny_run, tmp_path):
    """Return a function that trains in ``run`` of the temporary folder, and returns that directory."""

    def run(*flags: str, folder: str = "run", command: str = "fit") -> Path:
        main([command, *tiny_run, f"--run_dir={tmp_path / folder}", *flags])
        return tmp_path / folder

    return run


@pytest.fixture
def refused(fit, capsys):
    """Return a function that gives the one line by which a run with these flags is refused."""

    def line(*flags: str, **options) -> str:
        with pytest.raises(SystemExit, match="2"):
            fit(*flags, **options)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return line


def curve(run_dir: Path, tag: str) -> dict[int, float]:
    """Read the values that a run logged under a tag, by step."""
    events = EventAccumulator(str(run_dir)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
