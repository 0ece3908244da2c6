"""What the model writes, to be read."""

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from cola_lightning.callbacks.monitoring_forward import monitoring_forward
from cola_lightning.callbacks.text_and_figures import write_text
from cola_lightning.errors import InputError, UnusableModelError
from cola_lightning.models import generate
from cola_lightning.models.sampling import check_sampling


class Samples(L.Callback):
    """Continues each prompt after every validation; the texts go to TensorBoard, the last ones to the terminal.

    Args:
        prompts: Beginnings of text.
        max_new_tokens: Length of a continuation.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among the k likeliest tokens only.
        seed: Of the sampling, the same each time, so that only the model differs.

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
        self._texts: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            raise InputError("Samples does not go with --trainer.strategy fsdp; take fsdp2, or leave Samples out")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for prompt, ids in zip(self.prompts, trainer.datamodule.tokenizer.encode(self.prompts), strict=True):
            if not ids[:-1]:
                raise InputError(f"Samples: the prompt {prompt!r} holds no token; begin with a word at least")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        tokenizer = trainer.datamodule.tokenizer
        self._texts = []
        for prompt in self.prompts:
            ids = torch.tensor(tokenizer.encode([prompt]), device=pl_module.device)[:, :-1]  # without its end
            generator = torch.Generator(pl_module.device).manual_seed(self.seed)
            try:
                with monitoring_forward(trainer) as network:
                    ids = generate(
                        network,
                        ids,
                        self.max_new_tokens,
                        temperature=self.temperature,
                        top_k=self.top_k,
                        stop_id=tokenizer.eos_id,
                        generator=generator,
                    )
            except UnusableModelError as error:  # a run that can go on, or whose guard goes back, is not ended by this
                self._texts.append(f"{prompt} ({error})")
                continue
            self._texts.append(tokenizer.decode(ids[0].tolist()))
        for prompt, text in zip(self.prompts, self._texts, strict=True):
            write_text(trainer, f"samples/{prompt}", text)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for prompt, text in zip(self.prompts, self._texts, strict=False):  # none if nothing was validated
            rank_zero_info(f"\nThe model continues {prompt!r}:\n  {' '.join(text.split())}")
