"""Sparse gradients: the same as torch's for-loop, in one sort and one update launch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DEVICE, TORCH, Case, assert_same_bits, largest, refused
from embedding_tables import SPARSE_CASES, Tables, sparse, worst
from guarded_memory import guarded
from lab.traffic import Traffic, watched
from torch import Tensor, nn
from torch.nn import Parameter

import triton_optim
from triton_optim.launch import row_chunking, tuning
from triton_optim.launch.launcher import Launch, recorded
from triton_optim.launch.row_launcher import RowLaunch, RowVariant
from triton_optim.step import row_wise, validation

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="watches Triton's interpreter")
every_case = pytest.mark.parametrize("case", SPARSE_CASES, ids=lambda case: case.name)
ADAGRAD = SPARSE_CASES[2]


def _step(optimizer: Any) -> list[Launch]:
    with recorded() as launches:
        optimizer.step()
    return launches


def _names(launches: Sequence[Launch]) -> list[str]:
    return [launch.name for launch in launches]


@every_case
@pytest.mark.parametrize(
    ("dtype", "dense"),
    [
        (torch.float32, (1,)),
        (torch.float32, (3,)),
        (torch.float32, (16,)),
        (torch.float32, (2, 5)),
        (torch.bfloat16, (8,)),
        (torch.float16, (6,)),
        (torch.float64, (2, 4)),
    ],
    ids=str,
)
def test_errors_are_no_larger_than_torchs(
    case: Case, dtype: torch.dtype, dense: tuple[int, ...]
) -> None:
    runs = [
        Tables([(20, *dense)], dtype),
        Tables([(20, *dense)], dtype),
        Tables([(20, *dense)], dtype, torch.float64),
    ]
    makes = (case.ours, case.theirs, case.theirs)
    optimizers = [make(run.params) for make, run in zip(makes, runs, strict=True)]
    for count in (7, 50, 33):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([count], hot=20)
            optimizer.step()
    ours, theirs, exact = (run.params for run in runs)
    unit = torch.finfo(dtype).eps * largest(exact[0])
    # in float64 torch is the reference, whose coalesce() adds up in another order
    units = 8 if dtype == torch.float64 else 1
    assert worst(ours, exact) <= worst(theirs, exact) + units * unit
    if case.optimizer == "Adagrad":
        sums = [[o.state[r.params[0]]["sum"]] for o, r in zip(optimizers, runs, strict=True)]
        unit = torch.finfo(dtype).eps * largest(sums[2][0])
        assert worst(sums[0], sums[2]) <= worst(sums[1], sums[2]) + 4 * unit


@every_case
def test_a_vector(case: Case) -> None:
    """Beside dense gradients, whose zeros move nothing: torch's sum is wrong for some vectors."""
    runs = [Tables([(40,)]), Tables([(40,)])]
    optimizers = [case.ours(runs[0].params, fused=True), case.theirs(runs[1].params)]
    for count in (7, 90):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([count], hot=20)
            if run is runs[1]:
                assert run.params[0].grad is not None
                run.params[0].grad = run.params[0].grad.to_dense()
            optimizer.step()
    assert worst(runs[0].params, runs[1].params) < 1e-12


@every_case
def test_one_launch_for_all_tables(case: Case) -> None:
    """Of several groups and rates, whatever the number of rows; one sort, and no other plan."""
    shapes = [(50, 8), (3, 8), (1000, 8), (7, 8)]
    runs = [Tables(shapes), Tables(shapes)]
    groups = [[{"params": r.params[:2]}, {"params": r.params[2:], "lr": 0.01}] for r in runs]
    ours, theirs = case.ours(groups[0], fused=True), case.theirs(groups[1])
    plans = []
    for counts in ([40, 1, 90, 0], [3, 5, 0, 200], [0, 0, 0, 1]):
        for run in runs:
            run.new_gradients(counts, hot=10)
        assert _names(_step(ours)) == ["keys_kernel", "rows_kernel"]
        theirs.step()
        plans.append(ours._internals.plan)
        for p, q in zip(runs[0].params, runs[1].params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert plans[0] is plans[1] is plans[2]


def test_tables_of_other_widths_have_launches_of_their_own() -> None:
    shapes = [(9, 8), (9, 3), (9, 7), (9,), (9, 4)]
    runs = [Tables(shapes), Tables(shapes)]
    ours, theirs = ADAGRAD.ours(runs[0].params), ADAGRAD.theirs(runs[1].params)
    for run in runs:
        run.new_gradients([20] * 5)
    launches = [launch for launch in _step(ours) if isinstance(launch, RowLaunch)]
    assert sorted(launch.variant.columns for launch in launches) == [1, 4, 8]
    theirs.step()
    assert worst(runs[0].params, runs[1].params) < 1e-12


def test_dense_and_sparse_gradients_side_by_side() -> None:
    """And in turn, of one parameter, or none."""
    runs = [Tables([(20, 4), (5, 4)]), Tables([(20, 4), (5, 4)])]
    ours, theirs = ADAGRAD.ours(runs[0].params), ADAGRAD.theirs(runs[1].params)
    for step in range(8):
        for run, optimizer in zip(runs, (ours, theirs), strict=True):
            run.new_gradients([30, 5])
            for i, param in enumerate(run.params):
                assert param.grad is not None
                kind = (step >> i) % 3
                param.grad = (param.grad, param.grad.to_dense(), None)[kind]
            optimizer.step()
        assert worst(runs[0].params, runs[1].params) < 1e-12


def _in_order(monkeypatch: pytest.MonkeyPatch, order: Sequence[int]) -> None:
    """Let the update's programs run in this order."""
    from triton.runtime import interpreter

    run = Launch.run

    def launched(launch: Launch, **changed: Any) -> None:
        if not isinstance(launch, RowLaunch):
            run(launch, **changed)
            return
        turns = iter([i for i in order if i < launch.grid[0]])
        set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx
        with monkeypatch.context() as patch:
            patch.setattr(
                interpreter.InterpreterBuilder,
                "set_grid_idx",
                lambda self, *_: set_grid_idx(self, next(turns), 0, 0),
            )
            run(launch, **changed)

    monkeypatch.setattr(Launch, "run", launched)


@interpreted
def test_the_order_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 to 70 duplicates, over up to five programs."""
    results = []
    for order in (range(100), range(99, -1, -1), [*range(1, 100, 2), *range(0, 100, 2)]):
        tables = Tables([(6, 8), (5, 8)], torch.float32)
        optimizer = ADAGRAD.ours(tables.params)
        with monkeypatch.context() as patch:
            _in_order(patch, order)
            for _ in range(3):
                tables.new_gradients([100, 90], hot=70)
                (_, update) = _step(optimizer)
                assert update.grid[0] == 13
        results.append([[p.detach() for p in tables.params], optimizer.state_dict()])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("width", [40, 20, 9, 2])
def test_rows_over_several_programs(width: int) -> None:
    """In blocks of 1, 2, 4 and 32 rows: every number of chunks that a row can have."""
    runs = [Tables([(5, width), (9, width)]), Tables([(5, width), (9, width)])]
    optimizers = [ADAGRAD.ours(runs[0].params, fused=True), ADAGRAD.theirs(runs[1].params)]
    for counts in ([1, 2], [33, 9], [4, 140], [80, 3]):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients(counts, hot=30)
            optimizer.step()
        assert worst(runs[0].params, runs[1].params) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    """Of one gradient among many of its row, over several programs."""
    tables = Tables([(8, 4)], torch.float32)
    (param,) = tables.params
    tables.new_gradients([200], hot=90)
    assert param.grad is not None
    ids, values = param.grad._indices()[0], param.grad._values()
    for row in (4, 1):
        values[(ids == row).nonzero()[3]] = bad
    ADAGRAD.ours([param], fused=True).step()
    finite = torch.isfinite(param.detach()).all(1)
    assert finite.tolist() == [True, False, True, True, False, True, True, True]


def test_the_sort_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or duplicates would be added in any order. On a CPU all sorts happen to be."""
    asked = []
    sort: Any = torch.sort

    def asking(keys: Tensor, **kwargs: bool) -> Any:
        asked.append(kwargs)
        return sort(keys, **kwargs)

    monkeypatch.setattr(torch, "sort", asking)
    tables = Tables([(8, 4)])
    tables.new_gradients([20])
    ADAGRAD.ours(tables.params).step()
    assert asked == [{"stable": True}]


def test_one_row_a_hundred_thousand_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among others; the sum of its gradients is that of float64 to float32's rounding."""
    if DEVICE == "cpu":  # larger programs than other tests have, or it takes minutes
        monkeypatch.setattr("triton_optim.launch.row_launcher.INTERPRETED_ELEMENTS", 1 << 14)
    monkeypatch.setattr(tuning, "PROGRAMS", 16)
    param = Parameter(torch.zeros(1000, 4, device=DEVICE))
    values = torch.rand(100_500, 4, device=DEVICE)
    ids = torch.full((100_500,), 500, device=DEVICE)
    ids[::201] = torch.arange(500, device=DEVICE) * 2 + 1
    param.grad = sparse(ids, values, param)
    launches = _step(triton_optim.SGD([param], lr=1.0))
    assert launches[-1].grid[0] > 10
    exact = torch.zeros(1000, 4, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, ids, values.double())
    relative = ((param + exact).abs() / exact.clamp(min=1e-9)).max()
    assert relative < 1e-6, relative
    others = torch.arange(0, 1000, 2, device=DEVICE)
    assert not param.detach()[others[others != 500]].any()


@every_case
def test_rows_without_a_gradient_keep_their_bits(case: Case) -> None:
    """NaN and all; that nothing stores to them is what the sanitizer sees."""
    tables = Tables([(40, 4)], torch.float32)
    (param,) = tables.params
    optimizer = case.ours([param], fused=True)
    tables.new_gradients([9])
    optimizer.step()
    with torch.no_grad():
        param[1::2] = math.nan
        if case.optimizer == "Adagrad":
            optimizer.state[param]["sum"][1::2] = -math.inf
    before = copy.deepcopy([param.detach(), dict(optimizer.state_dict()["state"])])
    ids = [0, 4, 4, 38, 0]
    param.grad = sparse(ids, tables.draw(5, 4), param)
    optimizer.step()
    after = [param.detach(), dict(optimizer.state_dict()["state"])]
    for a, b in zip(_tensors(after), _tensors(before), strict=True):
        if a.dim():
            a[[0, 4, 38]] = b[[0, 4, 38]]
            assert_same_bits(a.view(torch.int32), b.view(torch.int32))


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    values = nested.values() if isinstance(nested, dict) else nested
    return [t for v in values if isinstance(v, Tensor | dict | list) for t in _tensors(v)]


@interpreted
@every_case
@pytest.mark.parametrize("bad", [-1, 12, -(2**40), 2**40])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_rows_that_are_not_there_are_refused(case: Case, bad: int, steps_before: int) -> None:
    """On the CPU, where that can be known; nothing is written, of the dense parameter neither."""
    tables = Tables([(12, 3), (4, 3)])
    optimizer = case.ours(tables.params)
    for _ in range(steps_before):
        tables.new_gradients([5, 5])
        optimizer.step()
    tables.new_gradients([5, 5])
    tables.params[0].grad = sparse([3, bad, 2], tables.draw(3, 3), tables.params[0])
    message = rf"parameter 0 of group 0 has a row {bad}, the parameter 12 rows"
    with refused(message, optimizer, tables.params):
        optimizer.step()


@every_case
def test_rows_that_are_not_there_are_never_written(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be known, as on a GPU: the others are stepped, of this table and the next."""
    monkeypatch.setattr(row_wise, "check_ids", lambda *_: None)
    monkeypatch.setattr("triton_optim.step.plan.check_ids", lambda *_: None)
    bad = [-1, 12, 13, -(2**40), 2**40, 2**62, -(2**63)]
    good = [0, 11, 3, 3]
    runs = [Tables([(12, 3), (4, 3)]), Tables([(12, 3), (4, 3)])]
    optimizers = [case.ours(runs[0].params), case.theirs(runs[1].params)]
    for _ in range(2):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([0, 6])
            values = run.draw(40 * len(bad) + 4, 3)
            values[: 40 * len(bad)] *= 1e6
            ids = [*bad * 40, *good] if run is runs[0] else good
            param = run.params[0]
            param.grad = sparse(ids, values[-len(ids) :], param)
            if run is runs[1]:
                param.grad = sparse(ids, values[-4:], param)
            optimizer.step()
    assert worst(runs[0].params, runs[1].params) < 1e-12


def test_one_row_that_is_not_there_within_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_optim.step.plan.check_ids", lambda *_: None)
    runs = [Tables([(12, 3)]), Tables([(12, 3)])]
    for run, ids in zip(runs, ([3, 12, 11], [3, 11]), strict=True):
        (param,) = run.params
        param.grad = sparse(ids, torch.ones(len(ids), 3, dtype=torch.float64), param)
    ADAGRAD.ours(runs[0].params).step()
    ADAGRAD.theirs(runs[1].params).step()
    assert worst(runs[0].params, runs[1].params) < 1e-12


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RowwiseAdagrad"])
def test_rows_that_are_not_there_are_refused_on_torchs_way(name: str) -> None:
    """At every step, before it writes."""
    param = Parameter(torch.ones(3, 2))
    optimizer = getattr(triton_optim, name)([param], fused=False)
    param.grad = sparse([0], torch.ones(1, 2), param).cpu()
    optimizer.step()
    for bad in (-1, 3, 10**9):
        param.grad = sparse([0, bad], torch.ones(2, 2), param).cpu()
        with refused(f"has a row {bad}, the parameter 3 rows", optimizer, [param]):
            optimizer.step()


@every_case
def test_an_empty_gradient_is_a_step_that_only_counts(case: Case) -> None:
    tables = Tables([(12, 3)])
    (param,) = tables.params
    optimizer = case.ours([param], fused=True)
    for counted in (1, 2):
        before = param.detach().clone()
        tables.new_gradients([0])
        assert _step(optimizer) == []
        assert_same_bits(param.detach(), before)
        if case.optimizer == "Adagrad":
            state = optimizer.state[param]
            assert state["step"] == counted
            assert (state["sum"] == case.kwargs.get("initial_accumulator_value", 0)).all()
        else:
            assert not optimizer.state


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_tables(shape: tuple[int, ...]) -> None:
    param = Parameter(torch.zeros(shape, device=DEVICE))
    optimizer = ADAGRAD.ours([param], fused=True)
    count = 2 if shape[0] else 0
    param.grad = sparse([0] * count, torch.zeros(count, *shape[1:], device=DEVICE), param)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_keys_of_more_rows_than_an_int32_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for most in (row_chunking.MAX_KEYS, 64):
        monkeypatch.setattr(row_chunking, "MAX_KEYS", most)
        tables = Tables([(40, 4), (30, 4)], torch.float32)
        optimizer = ADAGRAD.ours(tables.params)
        tables.new_gradients([90, 20], hot=30)
        (keys, _) = _step(optimizer)
        dtype = torch.int32 if most > 64 else torch.int64
        assert keys.arguments["keys_ptr"].dtype == dtype
        results.append([param.detach() for param in tables.params])
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("kind", ["expanded", "strided", "misaligned", "int32 ids", "other dtype"])
def test_values_in_other_layouts(kind: str) -> None:
    tables = Tables([(12, 4)], torch.float32)
    (param,) = tables.params
    twin = Parameter(param.detach().clone())
    if kind == "other dtype" and TORCH < (2, 9):
        pytest.skip("torch takes no such gradient")
    ids = torch.tensor([3, 5, 3, 0, 3])
    values = {
        "expanded": tables.draw(1, 1).expand(5, 4),
        "strided": tables.draw(4, 5).t(),
        "misaligned": guarded(tables.draw(5, 4), 1),
        "int32 ids": tables.draw(5, 4),
        "other dtype": tables.draw(5, 4),
    }[kind]
    for p in (param, twin):
        p.grad = sparse(ids.int() if kind == "int32 ids" else ids, values, param)
    if kind == "other dtype":
        param.grad_dtype = None  # as the parameter's, torch says otherwise
        param.grad = sparse(ids, values.bfloat16(), param)
        twin.grad = sparse(ids, values.bfloat16().float(), param)
    ours, theirs = ADAGRAD.ours([param], fused=True), ADAGRAD.theirs([twin])
    for _ in range(2):
        ours.step()
        theirs.step()
    torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_what_the_kernels_do_not_take() -> None:
    """Goes torch's way: two sparse dims, a parameter that is not contiguous, wide rows."""
    shapes = {"two sparse dims": (6, 5), "not contiguous": (6, 5), "wide": (3, 4097)}
    for kind, shape in shapes.items():
        params = [Parameter(torch.ones(shape, device=DEVICE)) for _ in range(2)]
        if kind == "not contiguous":
            params = [Parameter(torch.ones(shape[::-1], device=DEVICE).t()) for _ in range(2)]
        for param in params:
            n_dims = 2 if kind == "two sparse dims" else 1
            param.grad = torch.ones_like(param).contiguous().to_sparse(n_dims)
        ours, theirs = ADAGRAD.ours([params[0]]), ADAGRAD.theirs([params[1]])
        for _ in range(2):
            assert _step(ours) == []
            theirs.step()
        assert_same_bits(params[0].detach(), params[1].detach())
        with pytest.raises(RuntimeError, match=r"`fused=True` cannot be kept for parameter 0"):
            ADAGRAD.ours([params[0]], fused=True).step()


def test_weight_decay_and_momentum_are_torchs() -> None:
    """Adagrad refuses decay, SGD too; momentum of SGD makes a sparse buffer."""
    for case in (
        Case("", "Adagrad", {"weight_decay": 0.1}),
        Case("", "SGD", {"weight_decay": 0.1}),
        Case("", "RMSprop", {}),
    ):
        messages = []
        for make in (case.theirs, case.ours):
            tables = Tables([(12, 3)])
            tables.new_gradients([4])
            before = tables.params[0].detach().clone()
            with pytest.raises(RuntimeError) as caught:
                make(tables.params).step()
            messages.append(str(caught.value))
            assert_same_bits(tables.params[0].detach(), before)
        assert messages[0] == messages[1]
    runs = [Tables([(12, 3)]), Tables([(12, 3)])]
    momentum = Case("", "SGD", {"lr": 0.1, "momentum": 0.9})
    optimizers = [momentum.ours(runs[0].params), momentum.theirs(runs[1].params)]
    for _ in range(3):
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.new_gradients([5])
            optimizer.step()
    assert_same_bits(runs[0].params[0].detach(), runs[1].params[0].detach())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm takes no torch.sparse_coo gradient"),
        pytest.param(
            {"capturable": True}, "would repeat those of this step", marks=pytest.mark.gpu
        ),
    ],
)
def test_options_that_sparse_gradients_exclude(kwargs: dict[str, Any], message: str) -> None:
    tables = Tables([(12, 3)])
    tables.new_gradients([4])
    optimizer = ADAGRAD.ours(tables.params, **kwargs)
    with refused(message, optimizer, tables.params):
        optimizer.step()


@every_case
@pytest.mark.parametrize("factors", [(1, math.inf, 1), (math.inf, 1, 1)], ids=str)
def test_grad_scaler(case: Case, factors: tuple[float, ...]) -> None:
    """Unscaled and skipped in the kernel; state and gradients as torch's."""
    weights = [Parameter(torch.linspace(-1, 1, 36, device=DEVICE).view(12, 3)) for _ in range(2)]
    optimizers = [case.ours([weights[0]], fused=True), case.theirs([weights[1]])]
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=2) for _ in range(2)]
    ids = torch.tensor([3, 5, 3, 0, 11], device=DEVICE)
    for factor in factors:
        grads = []
        for weight, optimizer, scaler in zip(weights, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            rows_ = nn.functional.embedding(ids, weight, sparse=True)
            scaler.scale((rows_ * rows_ * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert weight.grad is not None
            grads.append(weight.grad.to_dense())
        torch.testing.assert_close(weights[0], weights[1])
        if factor == 1:
            torch.testing.assert_close(*grads)
    assert_same_bits(scalers[0].state_dict(), scalers[1].state_dict())
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(*states, check_device=False)


def test_embeddings_and_bags_train_as_torchs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 8, sparse=True, padding_idx=0)
            self.bag = nn.EmbeddingBag(40, 8, sparse=True, mode="mean")
            self.head = nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.words(ids % 30).sum(1) + self.bag(ids))
            return out

    models = [Model().double().to(DEVICE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [ADAGRAD.ours(models[0].parameters()), ADAGRAD.theirs(models[1].parameters())]
    for step in range(5):
        ids = torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(step)).to(DEVICE)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            launches = _step(optimizer)
            if model is models[0]:
                assert sorted(_names(launches)) == [
                    "keys_kernel",
                    "multi_tensor_kernel",
                    "rows_kernel",
                ]
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_in_backward() -> None:
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Linear(8, 2)).to(DEVICE)
        optimizer = ADAGRAD.ours(model.parameters())
        if inside:
            triton_optim.step_in_backward(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.arange(step, step + 9, device=DEVICE) % 5).square().sum().backward()
            optimizer.step()
        results.append([*map(Tensor.detach, model.parameters()), optimizer.state_dict()])
    assert_same_bits(results[1], results[0])


def test_what_a_kernel_is_compiled_for() -> None:
    """Elements that are loaded together: as many as address and width allow."""
    variant = RowVariant(
        True, frozenset(), 1, "bfloat16", "float32", "bfloat16", None, 16, reads_step=False
    )
    for addresses, widths, multiple in (
        ([16, 64], [16, 8], 8),
        ([16, 64], [12], 4),
        ([16, 64], [16, 10], 2),
        ([16, 64], [15], 1),
        ([16, 72], [16], 1),
    ):
        assert variant.loading(addresses, widths).multiple == multiple


@interpreted
@pytest.mark.parametrize("case", [ADAGRAD, SPARSE_CASES[0]], ids=lambda case: case.name)
def test_bytes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values once, rows of parameter and state once in and once out, ids and order beside them."""
    monkeypatch.undo()
    width, n_rows, count = 64, 5000, 3000
    tables = Tables([(n_rows, width)], torch.float32)
    tables.new_gradients([count], hot=100)
    (param,) = tables.params
    assert param.grad is not None
    touched = len(param.grad._indices().unique())
    with watched((traffic := Traffic()).count):
        case.ours([param], fused=True).step()
    n_tensors = 2 if case.optimizer == "Adagrad" else 1
    floor = 4 * width * (count + 2 * n_tensors * touched)
    total = traffic.loaded + traffic.stored
    # Ids 8 bytes, keys written 4 and read twice, the order 8; and some tables.
    assert 0 < total - floor < 32 * count + 2000
    assert total < 1.05 * floor


@pytest.mark.parametrize("change", ["param", "state", "gap in state", "sparse dims"])
def test_a_plan_notices_what_changes(change: str) -> None:
    runs = [Tables([(12, 4)]), Tables([(12, 4)])]
    optimizers = [ADAGRAD.ours(runs[0].params), ADAGRAD.theirs(runs[1].params)]
    for step in range(4):
        for run, optimizer in zip(runs, optimizers, strict=True):
            (param,) = run.params
            run.new_gradients([9])
            assert param.grad is not None
            if step == 2 and change == "param":
                param.data = param.data.clone()
            elif step == 2 and change == "state":
                optimizer.state[param]["sum"] = optimizer.state[param]["sum"].clone()
            elif step == 2 and change == "gap in state":
                sum_ = optimizer.state[param]["sum"]
                optimizer.state[param]["sum"] = torch.cat((sum_, sum_), 1)[:, :4]
            elif step == 2 and change == "sparse dims":
                param.grad = param.grad.to_dense().to_sparse(2)
            optimizer.step()
        assert worst(runs[0].params, runs[1].params) < 1e-12


def test_a_failing_sort_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """As out of memory: the dense parameter of the same step, too."""
    tables = Tables([(12, 4), (12, 4)])
    optimizer = ADAGRAD.ours(tables.params)
    for step in range(2):
        tables.new_gradients([9, 9])
        assert tables.params[1].grad is not None
        tables.params[1].grad = tables.params[1].grad.to_dense()
        if step == 1:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "sort", None)
                before = copy.deepcopy(
                    [[p.detach() for p in tables.params], optimizer.state_dict()]
                )
                with pytest.raises(TypeError):
                    optimizer.step()
            assert_same_bits([[p.detach() for p in tables.params], optimizer.state_dict()], before)
        optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_more_rows_than_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("launch.row_launcher", "step.routing", "step.row_wise"):
        monkeypatch.setattr(f"triton_optim.{module}.MAX_COUNT", 10)
    param = Parameter(torch.ones(11, device=DEVICE))
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="it or its gradient has more than 10 rows"):
        triton_optim.RowwiseAdagrad([param], fused=True).step()
    tables = Tables([(9, 4), (9, 4)])
    tables.new_gradients([11, 1])
    with pytest.raises(RuntimeError, match="it or its gradient has more than 10 rows"):
        ADAGRAD.ours(tables.params, fused=True).step()
    tables.new_gradients([8, 8])
    with refused("have 16 rows together, more than 10", ADAGRAD.ours(tables.params), tables.params):
        ADAGRAD.ours(tables.params).step()


def test_check_ids_knows_every_sparse_dim() -> None:
    ids = torch.tensor([[0, 2], [3, 4]])
    validation.check_ids(ids, (3, 5, 7), "p")
    with pytest.raises(RuntimeError, match="p has a row 4, the parameter 4 rows"):
        validation.check_ids(ids, (3, 4, 7), "p")
