"""Texts that the model generates while it trains."""

from typing import cast

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy

from cola_lightning.callbacks.log_lines import write_lines
from cola_lightning.callbacks.monitoring_forward import monitoring_forward
from cola_lightning.errors import InputError, UnusableModelError
from cola_lightning.loggers import write_text
from cola_lightning.models import Llama, generate
from cola_lightning.models.sampling import check_sampling
from cola_lightning.training.trainer_attributes import datamodule_of


class Samples(L.Callback):
    """Continue each prompt after every validation. Texts go to TensorBoard, and those of the last one to the terminal.

    Args:
        prompts: Beginnings of text.
        max_new_tokens: Length of a continuation, in tokens.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among the k likeliest tokens; null for all tokens.
        seed: Seed of the sampling, the same after each validation, so that only the model changes the text.

    Attributes:
        texts: The prompts with their continuations, of the last validation.

    Raises:
        InputError: If a setting is out of range; before training starts, if a prompt holds no token.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: int = 60,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 0,
    ) -> None:
        check_sampling(max_new_tokens, temperature, top_k, None, seed, prefix="Samples: ")
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.temperature, self.top_k, self.seed = temperature, top_k, seed
        self.texts: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            raise InputError("Samples does not go with --trainer.strategy fsdp; take fsdp2, or leave Samples out")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for prompt, ids in zip(self.prompts, datamodule_of(trainer).tokenizer.encode(self.prompts), strict=True):
            if not ids[:-1]:
                raise InputError(f"Samples: the prompt {prompt!r} holds no token; begin with a word at least")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        tokenizer = datamodule_of(trainer).tokenizer
        self.texts = []
        for prompt in self.prompts:
            ids = torch.tensor(tokenizer.encode([prompt]), device=pl_module.device)[:, :-1]  # without the last id
            generator = torch.Generator(pl_module.device).manual_seed(self.seed)
            try:
                with monitoring_forward(trainer) as network:
                    ids = generate(
                        cast(Llama, network),  # or the wrapper of FSDP (1), which takes the same arguments
                        ids,
                        self.max_new_tokens,
                        temperature=self.temperature,
                        top_k=self.top_k,
                        stop_id=tokenizer.eos_id,
                        generator=generator,
                    )
            except UnusableModelError as error:  # a model with NaN does not end the run: LossGuard may roll it back
                self.texts.append(f"{prompt} ({error})")
                continue
            self.texts.append(tokenizer.decode(ids[0].tolist()))
        for prompt, text in zip(self.prompts, self.texts, strict=True):
            write_text(trainer, f"samples/{prompt}", text)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for prompt, text in zip(self.prompts, self.texts, strict=False):  # no texts if nothing was validated
            write_lines(trainer, ["", f"The model continues {prompt!r}:", f"  {' '.join(text.split())}"])
