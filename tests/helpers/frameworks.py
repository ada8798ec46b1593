"""A tiny language model, trained by each framework in `STEPS` steps, for `test_integration.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import DEVICE
from lab.language_model import Transformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

os.environ["HF_HUB_OFFLINE"] = "1"  # read when Hugging Face's packages are imported

STEPS, BATCH, WIDTH, VOCABULARY, CONTEXT = 8, 4, 32, 16, 8
CLIP = 0.5  # below the norm of every gradient here

Make = Callable[[Any], Optimizer]
Batch = dict[str, Tensor]


class Outcome(NamedTuple):
    losses: list[float]
    params: list[Tensor]


def rows() -> Any:
    """Sequences that count, each from a token of its own: a data set of `STEPS` batches."""
    starts = torch.randint(
        VOCABULARY, (STEPS * BATCH, 1), generator=torch.Generator().manual_seed(0)
    )
    tokens = (starts + torch.arange(CONTEXT)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return Transformer(VOCABULARY, WIDTH, CONTEXT)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    tokens = batch["input_ids"]
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def training_arguments(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2, max_grad_norm=CLIP, logging_steps=1, save_steps=STEPS // 2,
        report_to="none", disable_tqdm=True, use_cpu=DEVICE == "cpu",
    )  # fmt: skip


def with_trainer(
    make: Make | None, folder: Path, checkpoint: Path | None = None, **kwargs: Any
) -> Outcome:
    """Hugging Face's `Trainer`; it saves a checkpoint after half of the steps."""
    transformers = pytest.importorskip("transformers")
    model = llama()
    if make is not None:
        optimizer = make(model.parameters())
        kwargs["optimizers"] = (optimizer, ExponentialLR(optimizer, 0.9))
    arguments = training_arguments(folder)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(), **kwargs)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(losses, list(model.parameters()))


def accelerator(**kwargs: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # it is the same for a whole process
    return accelerate.Accelerator(cpu=DEVICE == "cpu", **kwargs)


def with_accelerate(make: Make, folder: Path, *, resume: bool = False) -> Outcome:
    """Gradients accumulated over two batches, and clipped.

    Args:
        folder: where the state is saved after half of the steps.
        resume: take it from there, and make the other half of the steps.
    """
    accelerated = accelerator(gradient_accumulation_steps=2)
    model = language_model()
    optimizer = make(model.parameters())
    half = STEPS * BATCH // 2
    loaders = [DataLoader(part, BATCH // 2) for part in (rows()[:half], rows()[half:])]
    model, optimizer, scheduler, *loaders = accelerated.prepare(
        model, optimizer, ExponentialLR(optimizer, 0.9), *loaders
    )
    if resume:
        accelerated.load_state(str(folder))
        del loaders[0]
    losses = []
    for loader in loaders:
        for batch in loader:
            with accelerated.accumulate(model):
                loss = loss_of(model, batch)
                losses.append(loss.item())
                accelerated.backward(loss)
                if accelerated.sync_gradients:
                    assert accelerated.clip_grad_norm_(model.parameters(), CLIP) > CLIP
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if loader is not loaders[-1]:
            accelerated.save_state(str(folder))
    return Outcome(losses, list(model.parameters()))


def lightning_module(make: Make) -> Any:
    base: Any = pytest.importorskip("lightning").LightningModule

    class Module(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = language_model()
            self.losses: list[float] = []

        def training_step(self, batch: Batch) -> Tensor:
            loss = loss_of(self.model, batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = make(self.parameters())
            scheduler = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return Module()


def fit(module: Any, epochs: int = 2, checkpoint: Path | None = None) -> Any:
    """Lightning's trainer, half of the steps an epoch."""
    lightning = pytest.importorskip("lightning")
    trainer = lightning.Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu", devices=1, max_epochs=epochs,
        limit_train_batches=STEPS // 2, gradient_clip_val=CLIP, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows(), BATCH), ckpt_path=checkpoint)
    return trainer
