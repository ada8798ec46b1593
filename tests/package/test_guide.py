"""The code of the guide's "Your own rule" runs, and links of the documents lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import backend

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "triton_optim" / "README.md"
LION = ROOT / "tests" / "helpers" / "lion.py"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "triton_optim/*.md", "perf/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)


def _blocks(title: str = "Your own rule") -> list[str]:
    """A section's Python blocks; of that one: Lion, its use, Signum, AveragedSGD, the test."""
    section = re.split(r"^## ", GUIDE.read_text(), flags=re.MULTILINE)
    (rule,) = [text for text in section if text.startswith(f"{title}\n")]
    return re.findall(r"```python\n(.*?)```", rule, re.DOTALL)


def _code(source: str) -> str:
    """Without comments, the module's docstring and imports from the future."""
    module = ast.parse(source)
    if ast.get_docstring(module) is not None:
        del module.body[0]
    module.body = [
        node
        for node in module.body
        if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
    ]
    return ast.unparse(module)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A file with the rules of the guide: Triton reads a function's source."""
    lion, _, signum, averaged, _ = _blocks()
    path = tmp_path_factory.mktemp("guide") / "shown_rules.py"
    path.write_text(f"{lion}\n{signum}\n{averaged}")
    spec = importlib.util.spec_from_file_location("shown_rules", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lion_is_the_one_that_is_tested() -> None:
    assert _code(_blocks()[0]) == _code(LION.read_text())


def test_lion_is_used_as_shown(shown: ModuleType) -> None:
    model = torch.nn.Linear(3, 2, device=DEVICE)
    names = {"Lion": shown.Lion, "model": model}
    exec(_blocks()[1], names)
    model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    before = model.weight.detach().clone()
    names["optimizer"].step()
    torch.testing.assert_close(model.weight.detach(), before - 3e-4)


def test_lion_is_checked_as_shown(
    shown: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = partial(triton_optim.testing.check, compiled=False)
    monkeypatch.setattr(triton_optim.testing, "check", check)
    monkeypatch.setattr(backend, "INTERPRETED_BLOCK_SIZES", (4096,))
    names = {"Lion": shown.Lion, "triton_optim": triton_optim}
    exec(_blocks()[4], names)
    names["test_lion"]()
    assert "Lion(lr=0.001, weight_decay=0.1): largest error" in capsys.readouterr().out


def test_signum(shown: ModuleType) -> None:
    """Two groups, one without an average and with a sparse gradient."""
    averaged, table = (Parameter(torch.ones(shape, device=DEVICE)) for shape in ((3,), (3, 2)))
    groups = [{"params": [averaged]}, {"params": [table], "beta": 0.0}]
    optimizer = shown.Signum(groups, lr=0.5, beta=0.5, lr_decay=1.0, fused=True)
    for first, row in ((-4.0, 1), (1.0, 2)):
        averaged.grad = torch.tensor([first, 1.0, 0.0], device=DEVICE)
        index = torch.tensor([[row]], device=DEVICE)
        values = torch.ones(1, 2, device=DEVICE)
        table.grad = torch.sparse_coo_tensor(index, values, (3, 2), check_invariants=False)
        optimizer.step()
    # The first step is 0.5, the second 0.5 / 2; the average of -4 and 1 is negative.
    assert averaged.tolist() == [1.75, 0.25, 1.0]
    assert table.tolist() == [[1.0, 1.0], [0.5, 0.5], [0.75, 0.75]]
    assert [*optimizer.state[averaged]] == ["step", "exp_avg"]
    assert [*optimizer.state[table]] == ["step"]


@pytest.mark.parametrize("option", ["host", "device"])
def test_averaged_sgd(shown: ModuleType, option: str) -> None:
    """The averages of a loop in Python, whoever counts; a parameter without a gradient waits."""
    params = [Parameter(torch.full((3,), value, device=DEVICE)) for value in (4.0, 8.0)]
    options = {"max_grad_norm": 1e9, "skip_nonfinite": True} if option == "device" else {}
    optimizer = shown.AveragedSGD([{"params": [param]} for param in params], fused=True, **options)
    values, averages, total = [4.0, 8.0], [0.0, 0.0], [0.0, 0.0]
    for rate in (0.5, 0.25, 1.0):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = rate * (i + 1)
            params[i].grad = None if i == 1 and rate == 0.25 else torch.ones_like(params[i])
            if params[i].grad is not None:
                total[i] += group["lr"]
                values[i] -= group["lr"]
                averages[i] += group["lr"] / total[i] * (values[i] - averages[i])
        optimizer.step()
    for i, param in enumerate(params):
        state = optimizer.state[param]
        assert param.tolist() == [values[i]] * 3
        assert state["average"].tolist() == pytest.approx([averages[i]] * 3, rel=1e-6)
        assert float(state["sum_of_rates"]) == total[i]


def test_bfloat16_as_shown() -> None:
    making, weights_there_and_back = _blocks("Training in bfloat16 without a float32 copy")
    model, made = torch.nn.Linear(3, 2, device=DEVICE), []

    def recorded(*args: Any, **kwargs: Any) -> triton_optim.AdamW:
        made.append(triton_optim.AdamW(*args, **kwargs))
        return made[-1]

    names = {"model": model, **vars(triton_optim), "torch": torch, "AdamW": recorded}
    exec(making, names)
    model(torch.ones(1, 3, device=DEVICE, dtype=torch.bfloat16)).sum().backward()
    for optimizer in made:
        optimizer.step()
        names["optimizer"] = optimizer
        if optimizer.defaults["master_weight_bits"]:
            exec(weights_there_and_back, names)
            assert {weight.dtype for weight in names["weights"].values()} == {torch.float32}
    states = [optimizer.state[model.weight] for optimizer in made]
    assert [state["exp_avg"].dtype for state in states] == [
        torch.float32, torch.bfloat16, torch.bfloat16, torch.uint8,
    ]  # fmt: skip
    assert ["param_remainder" in state for state in states] == [True, True, False, True]


def _anchors(path: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link
