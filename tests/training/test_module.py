import math
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from cola_lightning.callbacks import GradientNorms, LossGuard, Memory, Throughput
from cola_lightning.data.packing import add_step_tokens
from cola_lightning.distributed import strategies
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.optim import WarmupCosine
from cola_lightning.training.module import LanguageModel
from tests.recorder import Recorder


def tiny(**settings) -> LanguageModel:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection": partial(CoLA, rank=4),
    }
    return LanguageModel(**(sizes | settings))


def rows(labels) -> dict[str, torch.Tensor]:
    labels = torch.tensor(labels)
    return {"input_ids": labels.clamp(min=0), "labels": labels}


def test_impossible_sizes_are_refused_at_construction_without_building():
    with pytest.raises(InputError, match="num_attention_heads 3 does not divide"):
        tiny(num_attention_heads=3)
    assert not hasattr(tiny(hidden_size=65536, intermediate_size=65536), "network")


def test_loss_is_the_mean_over_kept_tokens_shifted_by_one():
    model = tiny()
    model.configure_model()
    batch = rows([[3, 4, 5, -100], [6, 7, -100, -100]])
    log_probabilities = model(batch["input_ids"]).log_softmax(-1)
    picked = [log_probabilities[0, 0, 4], log_probabilities[0, 1, 5], log_probabilities[1, 0, 7]]
    model.trainer = trainer()
    torch.testing.assert_close(model.training_step(add_step_tokens([batch])[0], 0), -sum(picked) / 3)
    scores = model.predict_step(batch, 0)
    torch.testing.assert_close(scores["loss_sum"], -torch.stack([picked[0] + picked[1], picked[2]]))
    assert scores["tokens"].tolist() == [2, 1]


def test_a_batch_with_nothing_to_learn_gives_zero_and_no_nan():
    model = tiny()
    model.configure_model()
    model.trainer = trainer()
    loss = model.training_step(add_step_tokens([rows([[-100, -100, -100]])])[0], 0)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def trainer(**settings) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_validation_reports_both_perplexities(precision):
    model = tiny()
    batches = [rows([[3, 4, 5, 6, 7], [8, 9, -100, -100, -100]]), rows([[1, 2, -100, -100, -100]])]
    (result,) = trainer(precision=precision).validate(model, DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        scores = [model.predict_step(batch, 0) for batch in batches]
    sums, tokens = ([float(score[key].sum()) for score in scores] for key in ("loss_sum", "tokens"))
    tolerance = 1e-5 if precision == "32-true" else 0.02
    assert result["val/perplexity"] == pytest.approx(math.exp(sum(sums) / 6), rel=tolerance)
    published = math.exp((sums[0] / tokens[0] + sums[1] / tokens[1]) / 3)
    assert result["val/perplexity_as_published"] == pytest.approx(published, rel=tolerance)


def norms() -> tuple[Recorder, Recorder]:
    """Return recorders of the logged norm of each step, and of that of the gradient with which it was made."""

    def clipped(trainer, module, optimizer):
        return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).item()

    return (
        Recorder(norm=lambda trainer, *_: float(trainer.callback_metrics["train/gradient_norm"])),
        Recorder("on_before_zero_grad", norm=clipped),
    )


def test_clips_by_global_norm_and_logs_the_norm_before():
    logged, clipped = norms()
    batches = [rows([[3, 4, 5, 6, 7]])] * 4
    run = trainer(max_steps=4, max_epochs=1, gradient_clip_val=0.01, callbacks=[logged, clipped])
    run.fit(tiny(), DataLoader(batches, batch_size=None))
    assert min(logged.values["norm"]) > 0.02
    assert clipped.values["norm"][1:] == pytest.approx([0.01] * 3, rel=1e-3)
    assert {"train/loss", "train/learning_rate"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("limit", [0, 0.0, -1.0])
def test_a_clip_val_of_0_clips_nothing_as_in_lightning(limit):
    """Lightning's own ``clip_gradients`` returns for a value that is not above 0. The weights are those without it."""

    def weights(**settings):
        torch.manual_seed(0)
        model = tiny(schedule=partial(WarmupCosine, warmup_steps=0))
        run = trainer(max_steps=3, max_epochs=1, **settings)
        run.fit(model, DataLoader([rows([[3, 4, 5, 6, 7]])] * 3, batch_size=None))
        return torch.nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(gradient_clip_val=limit), weights())
    assert not torch.equal(weights(gradient_clip_val=1e-3), weights())


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("values", "limit"), [
    ([3.0, 4.0], 1.0), ([3.0, 4.0], 5.0), ([3.0, 4.0], 5.1), ([3.0, 4.0], float("inf")),
    ([float("inf"), 1.0], 1.0), ([float("nan"), 1.0], 1.0),
])  # fmt: skip
def test_clipping_is_that_of_torch_bit_for_bit(values, limit, dtype, on_host, monkeypatch):
    monkeypatch.setattr(strategies, "_is_on_host", lambda tensor: on_host)
    ours, theirs = ([nn.Parameter(torch.zeros(1, dtype=dtype)) for _ in range(3)] for _ in range(2))
    for parameters in (ours, theirs):
        for parameter, value in zip(parameters, values, strict=False):  # the last one has no gradient
            parameter.grad = torch.full_like(parameter, value)
    norm = strategies.clip_by_global_norm(iter(ours), limit)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, limit)) or norm.isnan()
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_gradients_within_the_limit_are_not_multiplied():
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    version = parameter.grad._version
    strategies.clip_by_global_norm([parameter], 2.1)
    assert parameter.grad._version == version
    strategies.clip_by_global_norm([parameter], 1.9)
    assert parameter.grad._version > version


class Logged(Logger):
    """Keeps what it is handed."""

    name = version = "logged"

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, *_):
        pass


def test_log_every_n_steps_0_logs_no_step_as_in_lightning():
    logger = Logged()
    run = trainer(max_steps=3, max_epochs=1, callbacks=[Throughput(), GradientNorms(), Memory(), LossGuard()])
    run.log_every_n_steps = 0
    run.loggers = [logger]
    run.fit(tiny(), DataLoader([rows([[3, 4, 5, 6, 7]])] * 3, batch_size=None))
    assert run.global_step == 3
    assert not [metrics for _, metrics in logger.metrics if "train/loss" in metrics]


class Asked(L.Callback):
    """How often a step that is not logged asks for a number, for which the device would have to finish first."""

    def __init__(self):
        self.mode = None
        self.asked = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mode = Questions()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mode.__exit__(None, None, None)
        self.asked.append(self.mode.count)


class Questions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A fused optimizer counts its steps on the device, and the host never looks.
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [None, "residual_and_latents", "latents"])
def test_a_step_that_is_not_logged_never_waits_for_the_device(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(strategies, "_is_on_host", lambda tensor: False)  # as on a GPU
    asked = Asked()
    checkpointing = [] if keep is None else [CoLAM(keep)]
    run = L.Trainer(
        accelerator="cpu", logger=CSVLogger(tmp_path), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=3, max_steps=6, max_epochs=1, gradient_clip_val=0.5,
        accumulate_grad_batches=2, callbacks=[asked, Throughput(), *checkpointing],
    )  # fmt: skip
    model = tiny(optimizer=partial(torch.optim.AdamW, fused=True), fused_projections=True, loss_chunk_size=4)
    run.fit(model, DataLoader([rows([[3, 4, 5, 6, 7]])] * 12, batch_size=None))
    logged = [index for index, count in enumerate(asked.asked) if count]
    assert set(logged) <= {5, 11}
    assert len(asked.asked) == 12


def test_the_count_of_waits_notices_a_logged_step(tmp_path):
    """So that the test above can fail."""

    class Curious(LanguageModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.last = loss.item()
            return loss

    asked = Asked()
    run = trainer(max_steps=2, max_epochs=1, callbacks=[asked])
    model = Curious(50, 16, 24, 1, 2, projection=partial(CoLA, rank=4))
    run.fit(model, DataLoader([rows([[3, 4, 5, 6, 7]])] * 2, batch_size=None))
    assert min(asked.asked) >= 1


def test_a_fused_optimizer_is_clipped_after_gradients_are_unscaled():
    """Under 16-mixed. Lightning leaves unscaling to the step of such an optimizer, which comes after clipping."""
    logged, clipped = norms()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    run = trainer(max_steps=3, max_epochs=1, gradient_clip_val=0.01, callbacks=[logged, clipped], plugins=[plugin])
    model = tiny(optimizer=partial(torch.optim.AdamW, fused=True))
    run.fit(model, DataLoader([rows([[3, 4, 5, 6, 7]])] * 3, batch_size=None))
    assert 0.02 < min(logged.values["norm"]) < max(logged.values["norm"]) < 20
    assert clipped.values["norm"][1:] == pytest.approx([0.01] * 2, rel=1e-2)


def test_clipping_by_value_is_refused():
    run = trainer(max_steps=1, max_epochs=1, gradient_clip_val=0.1, gradient_clip_algorithm="value")
    with pytest.raises(InputError, match="gradient_clip_algorithm value is not offered"):
        run.fit(tiny(), DataLoader([rows([[3, 4, 5]])], batch_size=None))


def test_a_run_needs_a_length():
    run = trainer(max_epochs=1)
    with pytest.raises(InputError, match=r"set --trainer\.max_steps"):
        run.fit(tiny(), DataLoader([rows([[3, 4, 5]])], batch_size=None))


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        (
            {},
            {"vocab_size": 60},
            r"tokenizer t has 60 ids, but the embedding has only 50 rows; set --model.vocab_size 60",
        ),
        ({"max_position_embeddings": 8}, {}, r"sequence_length 9 is beyond --model.max_position_embeddings 8"),
        (
            {},
            {"pad_id": None},
            r"pad_token_id 0 would hold the embedding of '!' at zero.*set --model.pad_token_id null",
        ),
        ({"pad_token_id": 3}, {"pad_id": 0}, r"set --model.pad_token_id 0"),
    ],
)
def test_data_that_does_not_fit_the_network_is_refused(model, tokenizer, message):
    kind = SimpleNamespace(**({"vocab_size": 50, "pad_id": 0, "name": "t", "decode": lambda ids: "!"} | tokenizer))
    module = tiny(**model)
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(sequence_length=9, tokenizer=kind))
    with pytest.raises(InputError, match=message):
        module.setup("fit")
