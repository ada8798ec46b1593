"""What is built is what runs: wheel, sdist, bare checkout; and nobody's `kernels` is shadowed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STEP = """
import torch, triton_optim
from triton_optim.launch import backend
assert backend.DEVICE_TYPE == "cpu", backend.DEVICE_TYPE
param = torch.nn.Parameter(torch.ones(5))
param.grad = torch.ones(5)
triton_optim.SGD([param], lr=0.5, fused=True).step()
assert torch.equal(param, torch.full((5,), 0.5))
print(triton_optim.__file__)
"""


def _python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(path or "")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=cwd, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that an sdist builds."""
    for module in ("build", "hatchling"):
        pytest.importorskip(module, reason=f"needs {module}")
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".git", ".*cache", "dist", "build")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_has_the_kernels_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("triton_optim/kernels/rules.py", "triton_optim/py.typed"):
        assert names.count(name) == 1
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "perf/"))]
    assert "triton_optim/kernels/__init__.py" not in names


def test_wheel_steps_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert _python(STEP, cwd=tmp_path, path=site).startswith(str(site))


@pytest.mark.parametrize("symlink", [True, False])
def test_bare_checkout_steps(tmp_path: Path, symlink: bool) -> None:
    """Also one whose symlink became a file, as on a system without them."""
    checkout = tmp_path / "checkout"
    for folder in ("kernels", "triton_optim"):
        shutil.copytree(ROOT / folder, checkout / folder, symlinks=True)
    if not symlink:
        (checkout / "triton_optim" / "kernels").unlink()
        (checkout / "triton_optim" / "kernels").write_text("../kernels")
    assert _python(STEP, cwd=checkout).startswith(str(checkout))


def test_another_package_named_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """Hugging Face's `kernels` is imported by transformers, with the checkout on sys.path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True")
    code = "import kernels, triton_optim; assert kernels.theirs"
    _python(f"import sys; sys.path.append({str(tmp_path)!r}); {code}", cwd=ROOT)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_import_triton_alone() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} == {"triton"}, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, file
