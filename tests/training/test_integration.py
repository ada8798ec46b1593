"""Frameworks that drive an optimizer: as with torch's for-loop, and through the kernels.

They come with the extra `integration`; tests of those that are not installed skip themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import frameworks
import pytest
import torch
from cases import DEVICE, Case
from frameworks import STEPS, Make, Outcome
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

import triton_optim
from triton_optim.launch import backend
from triton_optim.launch.launcher import record_launches

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning.pytorch.utilities._pytree"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

BLOCK_SIZES = backend.INTERPRETED_BLOCK_SIZES

rules = pytest.mark.parametrize(
    "case",
    [
        Case("adamw", "AdamW", {"lr": 1e-3}),
        Case("rmsprop", "RMSprop", {"lr": 1e-3}),
        Case("sgd-momentum", "SGD", {"lr": 0.1, "momentum": 0.9}),
    ],
    ids=lambda case: case.name,
)


@pytest.fixture(autouse=True)
def _large_blocks(_small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs: these tests are not about blocks."""
    monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", BLOCK_SIZES)


def _compare(case: Case, run: Callable[[Make], Outcome]) -> None:
    """A launch a step, and what torch's for-loop gives but for rounding."""
    with record_launches() as launches:
        ours = run(case.ours)
        assert len(launches) == STEPS
        theirs = run(case.theirs)
        assert len(launches) == STEPS
    assert ours.losses[-1] < ours.losses[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _assert_resumed(whole: Outcome, run: Callable[[], Outcome]) -> None:
    """The second half of the steps, with the bits of a run that never stopped."""
    with record_launches() as launches:
        rest = run()
    assert len(launches) == STEPS // 2
    assert rest.losses == whole.losses[-len(rest.losses) :]
    torch.testing.assert_close(rest.params, whole.params, rtol=0, atol=0)


@rules
def test_trainer(case: Case, tmp_path: Path) -> None:
    _compare(case, lambda make: frameworks.with_trainer(make, tmp_path))


@rules
def test_trainer_resumes(case: Case, tmp_path: Path) -> None:
    whole = frameworks.with_trainer(case.ours, tmp_path)
    half = tmp_path / f"checkpoint-{STEPS // 2}"
    _assert_resumed(whole, lambda: frameworks.with_trainer(case.ours, tmp_path, half))


@rules
def test_accelerate(case: Case, tmp_path: Path) -> None:
    _compare(case, lambda make: frameworks.with_accelerate(make, tmp_path))


@rules
def test_accelerate_resumes(case: Case, tmp_path: Path) -> None:
    whole = frameworks.with_accelerate(case.ours, tmp_path)
    _assert_resumed(whole, lambda: frameworks.with_accelerate(case.ours, tmp_path, resume=True))


def _with_lightning(make: Make, checkpoint: Path | None = None) -> Outcome:
    module = frameworks.lightning_module(make)
    frameworks.fit(module, checkpoint=checkpoint)
    return Outcome(module.losses, list(module.parameters()))


@rules
def test_lightning(case: Case) -> None:
    _compare(case, _with_lightning)


@rules
def test_lightning_resumes(case: Case, tmp_path: Path) -> None:
    half = tmp_path / "half.ckpt"
    frameworks.fit(frameworks.lightning_module(case.ours), epochs=1).save_checkpoint(half)
    _assert_resumed(_with_lightning(case.ours), lambda: _with_lightning(case.ours, half))


in_bfloat16 = pytest.mark.parametrize(
    "options",
    [
        {"master_weight_bits": 32},
        {"stochastic_rounding": True},
        {"master_weight_bits": 32, "state_dtype": "8bit"},
    ],
    ids=str,
)


def _of_bfloat16(options: dict[str, Any]) -> Make:
    """Makes an optimizer of a model that it converts."""

    def make(params: Any) -> Any:
        params = [*params]
        for param in params:
            param.data = param.data.bfloat16()
        return triton_optim.AdamW(params, lr=1e-3, **options)

    return make


@in_bfloat16
def test_trainer_in_bfloat16(options: dict[str, Any], tmp_path: Path) -> None:
    """The model's weights are loaded behind the optimizer's back, and then their remainders."""
    make, half = _of_bfloat16(options), tmp_path / f"checkpoint-{STEPS // 2}"
    whole = frameworks.with_trainer(make, tmp_path)
    _assert_resumed(whole, lambda: frameworks.with_trainer(make, tmp_path, half))


@in_bfloat16
def test_accelerate_in_bfloat16(options: dict[str, Any], tmp_path: Path) -> None:
    make = _of_bfloat16(options)
    whole = frameworks.with_accelerate(make, tmp_path)
    _assert_resumed(whole, lambda: frameworks.with_accelerate(make, tmp_path, resume=True))


@in_bfloat16
def test_lightning_in_bfloat16(options: dict[str, Any], tmp_path: Path) -> None:
    make, half = _of_bfloat16(options), tmp_path / "half.ckpt"
    frameworks.fit(frameworks.lightning_module(make), epochs=1).save_checkpoint(half)
    _assert_resumed(_with_lightning(make), lambda: _with_lightning(make, half))


def _run_guide(framework: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the guide's lines for a framework, given what they take as given."""
    guide = (Path(__file__).parents[2] / "triton_optim" / "README.md").read_text()
    blocks = re.findall(r"\n([^\n]+):\n\n```python\n(.*?)```", guide, re.DOTALL)
    (code,) = (code for before, code in blocks if framework in before)
    optimizers = {name: getattr(triton_optim, name) for name in triton_optim.OPTIMIZERS}
    given = {"triton_optim": triton_optim, "ExponentialLR": ExponentialLR, **optimizers, **names}
    exec(code, given)
    return given


@pytest.mark.parametrize("lines", ["without weight decay itself", "a scheduler of your own"])
def test_guide_trainer(lines: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = frameworks.training_arguments(tmp_path)
    with record_launches() as launches:
        names = {"Trainer": transformers.Trainer, "data": frameworks.rows()}
        _run_guide(lines, {**names, "model": frameworks.llama(), "arguments": arguments})
    assert len(launches) == STEPS


def test_trainer_makes_the_optimizer(tmp_path: Path) -> None:
    """And its groups, of a class and arguments."""
    kwargs = {"lr": 1e-3, "betas": (0.9, 0.95)}

    def run(optimizer_class: Any, **more: Any) -> Outcome:
        choice = (optimizer_class, {**kwargs, **more})
        return frameworks.with_trainer(None, tmp_path, optimizer_cls_and_kwargs=choice)

    with record_launches() as launches:
        ours = run(triton_optim.AdamW, fused=True)
    assert len(launches) == STEPS
    torch.testing.assert_close(ours, run(torch.optim.AdamW, foreach=False), rtol=1e-5, atol=1e-5)


def _steps(optimizer: Any, model: torch.nn.Module) -> int:
    """The launches of a step."""
    model(torch.ones(2, 4, device=DEVICE)).sum().backward()
    with record_launches() as launches:
        optimizer.step()
    return len(launches)


def test_guide_torchtitan() -> None:
    optimizer = pytest.importorskip("torchtitan.components.optimizer")
    names = {n: getattr(optimizer, n) for n in ("OptimizersContainer", "ParamGroupConfig")}
    given = _run_guide("torchtitan", {**names, "dataclass": dataclass})
    model = torch.nn.Linear(4, 3, device=DEVICE)
    assert _steps(given["optimizer"].build(model_parts=[model]), model) == 1


def test_guide_axolotl() -> None:
    plugin = _run_guide("Axolotl", {"BasePlugin": object})["TritonOptimPlugin"]()
    model = torch.nn.Linear(4, 3, device=DEVICE)
    cfg = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1)
    assert _steps(plugin.create_optimizer(cfg, SimpleNamespace(model=model)), model) == 1


def test_guide_groups() -> None:
    model = torch.nn.Linear(4, 3, device=DEVICE)
    optimizer = _run_guide("three lines", {"model": model})["optimizer"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert _steps(optimizer, model) == 1


def test_guide_accelerate() -> None:
    names = {"accelerator": frameworks.accelerator(), "loss": frameworks.loss_of}
    loader = DataLoader(frameworks.rows(), frameworks.BATCH)
    with record_launches() as launches:
        _run_guide("Accelerate", {**names, "model": frameworks.language_model(), "loader": loader})
    assert len(launches) == STEPS


def test_guide_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    base = type(frameworks.lightning_module(triton_optim.SGD))
    names = _run_guide("Lightning", {"LightningModule": base})
    with record_launches() as launches:
        frameworks.fit(names["Model"]())
    assert len(launches) == STEPS
    assert issubclass(base, lightning.LightningModule)


@pytest.mark.parametrize("fused", [None, True])
def test_accelerate_learns_of_skipped_steps(fused: bool | None) -> None:
    """And its scheduler steps twice in four steps of which two overflow."""
    optimizers = pytest.importorskip("accelerate.optimizer")
    schedulers = pytest.importorskip("accelerate.scheduler")
    frameworks.accelerator()
    param = torch.nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = triton_optim.SGD([param], lr=1.0, fused=fused)
    plain = ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=16.0, growth_interval=100)
    wrapped = optimizers.AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    scheduler = schedulers.AcceleratedScheduler(plain, wrapped)
    skipped = []
    for factor in (1.0, float("inf"), 1.0, float("inf")):
        wrapped.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        wrapped.step()
        scheduler.step()
        skipped.append(wrapped.step_was_skipped)
    assert skipped == [False, True, False, True]
    assert optimizer.param_groups[0]["lr"] == 0.25
    torch.testing.assert_close(param.detach(), torch.full_like(param, -0.5))
