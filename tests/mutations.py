"""Breaks the code in one place at a time, and shows which test goes red.

Run by hand: `python tests/mutations.py [WORD...]`, for all, or those with a WORD in their names.
Prints a table; exits with 1 if a mutation survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    """What to break, and the tests that should notice."""

    name: str
    old: str  # found once in kernels/ and triton_optim/
    new: str
    test_file: str  # in one of the folders of tests/
    keyword: str  # of pytest -k


def _rule(name: str, case: str, old: str, new: str) -> Mutation:
    """A mutation that shows in the errors of a case of CASES."""
    return Mutation(name, old, new, "test_rules.py", f"test_error_is and {case}-torch.float32")


def _each_rule(name: str, old: str, new: str, test_file: str, test: str) -> list[Mutation]:
    """A mutation of the kernel around the rules, to be noticed with each of them."""
    cases = {
        "SGD": "sgd-dampening",
        "Adagrad": "adagrad-lr_decay",
        "RMSprop": "rmsprop-all",
        "AdamW": "adamw-all",
    }
    return [
        Mutation(f"{rule}: {name}", old, new, test_file, f"{test} and {case}")
        for rule, case in cases.items()
    ]


MUTATIONS = [
    _rule(
        "SGD: sign", "sgd",
        "tl.fma(-lr.to(param.dtype), update, param), state",
        "tl.fma(lr.to(param.dtype), update, param), state",
    ),
    # SGD has no eps. Dampening comes nearest: a scalar beside the gradient, 0 by default.
    _rule(
        "SGD: dampening left out", "sgd-dampening",
        "one_minus_dampening.to(grad.dtype) * update",
        "update",
    ),
    _rule(
        "SGD: first step", "sgd-dampening",
        "tl.where(step == 0, update, one_minus_dampening.to(grad.dtype) * update)",
        "one_minus_dampening.to(grad.dtype) * update",
    ),
    _rule(
        "Adagrad: sign", "adagrad",
        "descend(param, update, lr, weight_decay, FLAGS), (sum,)",
        "descend(param, -update, lr, weight_decay, FLAGS), (sum,)",
    ),
    _rule(
        "Adagrad: eps inside the root", "adagrad-eps",
        "sqrt(sum, FLAGS) + eps.to(param.dtype)",
        "sqrt(sum + eps.to(param.dtype), FLAGS)",
    ),
    _rule("Adagrad: first step", "adagrad-lr_decay", "step * lr_decay", "(step + 1) * lr_decay"),
    _rule(
        "RMSprop: sign", "rmsprop",
        "lr.to(param.dtype) * update, lr, weight_decay, FLAGS), new_state",
        "-lr.to(param.dtype) * update, lr, weight_decay, FLAGS), new_state",
    ),
    _rule(
        "RMSprop: eps inside the root", "rmsprop-eps",
        "sqrt(variance, FLAGS) + eps.to(grad.dtype)",
        "sqrt(variance + eps.to(grad.dtype), FLAGS)",
    ),
    # RMSprop treats no step apart, but its averages must start from zero.
    _rule(
        "RMSprop: first step", "rmsprop",
        'StateTensor("square_avg", is_denominator=True),\n        StateTensor("momentum',
        'StateTensor("square_avg", 1.0),\n        StateTensor("momentum',
    ),
    _rule("Adam: sign", "adam", "    return param - update", "    return param + update"),
    _rule(
        "Adam: eps inside the root", "adam-eps",
        "sqrt(largest, FLAGS) * scale + eps.to(DTYPE)",
        "sqrt(largest + eps.to(DTYPE), FLAGS) * scale",
    ),
    _rule(
        "Adam: first step", "adam",
        "correction1 = one_minus_exp2((step + 1)",
        "correction1 = one_minus_exp2((step + 2)",
    ),
    _rule("Adam: largest", "adam-amsgrad", "tl.maximum(state[2], exp", "tl.minimum(state[2], exp"),
    _rule("AdamW: decay left out", "adamw", "tl.fma(rate, param, update)", "update"),
    _rule("Adamax: eps left out", "adamax-all", "tl.abs(grad) + eps.to(DTYPE)", "tl.abs(grad)"),
    _rule("NAdam: no look ahead", "nadam", "(lr * of_avg)", "(lr * of_grad)"),
    _rule("ASGD: decay left out", "asgd-all", "grad, decay)", "grad, 0 * decay)"),
    Mutation("NAdam: the device advances otherwise", "(step + 2) * momentum_decay * LOG2_096",
             "(step + 1) * momentum_decay * LOG2_096", "test_scalar_state.py", "device_counts_as"),
    Mutation("scalars advance in a skipped step", "new[i].to(SCALAR_DTYPE), mask=counted",
             "new[i].to(SCALAR_DTYPE), mask=mask", "test_scalar_state.py", "device_counts_as"),
    Mutation("scalars advance without a gradient", "after if here else before", "after",
             "test_scalar_state.py", "missing"),
    Mutation("loaded scalars are cast", "elif name in rule.counters[1:]:", "elif name in ():",
             "test_scalar_state.py", "keeps_their_dtype"),
    Mutation("RAdam: rectified later", "length > 5", "length > 6.5", "test_radam.py", "switch"),
    Mutation("RAdam: its length cancels", "x < NEAR, rest", "x < 0, rest", "test_radam.py",
             "switch"),
    _rule(
        "Adadelta: old average", "adadelta",
        "sqrt(square_avg + eps, FLAGS)", "sqrt(state[0] + eps, FLAGS)",
    ),
    _rule("Rprop: a turned gradient is kept", "rprop", "tl.where(turned < 0, 0.0, grad)", "grad"),
    Mutation("Lion: sign", "descend(param, update, lr, weight_decay, DECOUPLED)",
             "descend(param, -update, lr, weight_decay, DECOUPLED)", "test_lion.py", "equation"),
    Mutation("AdamW: decay with a bias", "tl.fma(rate, param, update)",
             "(1 - (1 - rate)) * param + update", "test_adam.py", "no_bias"),
    Mutation("bias corrections cancel", "-y * series", "1 - tl.exp2(x.to(DTYPE))",
             "test_kernels.py", "bias"),
    *_each_rule("group index off by one", "row_ptr + GROUP) * N_HYPERS",
                "row_ptr + GROUP) * N_HYPERS + N_HYPERS",
                "test_step.py", "test_groups_have_their_own"),
    *_each_rule("tail mask off by one", "offsets < remaining", "offsets <= remaining",
                "test_memory.py", "test_nothing_beside"),
    Mutation("a state of another size is taken", "value.shape != param.shape", "False",
             "test_validation.py", "state_that_shrinks"),
    Mutation("a gradient of another shape is taken", "grad.shape != param.shape or", "",
             "test_validation.py", "forced_through_data"),
    Mutation("tensors that share memory are taken", "start < stop", "False",
             "test_validation.py", "share"),
    Mutation("expanded parameters are taken", "stride == 0 and size > 1", "False",
             "test_validation.py", "expanded"),
    Mutation("what is loaded is not checked", "check_loaded(self._fused_view())", "pass",
             "test_state_dict_validation.py", "damaged"),
    Mutation("a bad checkpoint is not rolled back", "self.param_groups, self.state = groups, state",
             "pass", "test_state_dict_validation.py", "damaged"),
    Mutation("a fallback is not looked at again", "not (self.guard.check(tensors) or",
             "not (True or",
             "test_validation.py", "forced_through_data"),
    Mutation("layouts are not compared", "return self._check(*tensors)", "return True",
             "test_validation.py", "shrinks"),
    Mutation("addresses are not compared",
             "[*tensors.written, *tensors.steps]) != self._addresses",
             "[*tensors.written, *tensors.steps]) is None", "test_step.py",
             "param_data_reassigned"),
    Mutation("alignment is not looked at again", "address and is_now != was for",
             "False and is_now != was for", "test_routing.py", "loses_its_alignment"),
    Mutation("what changed is not sent again", "content != self._sent or", "self._sent is None or",
             "test_step.py", "hyperparameters_change"),
    Mutation("what a replay sent is not sent over", "self._sent or self._captured:", "self._sent:",
             "test_cuda_graphs.py", "where_they_were"),
    Mutation("steps are not counted", "pack.index_add_(0, indices, ones)", "pass",
             "test_plan.py", "step_counters"),
    Mutation("autograd is not told", "increment_version([*tensors.written, *tensors.dtensors, "
             "*tensors.counted])\n"
             "        self._rem", "self._rem",
             "test_step.py", "autograd_sees"),
    Mutation("a missing gradient is updated from", "tl.where(grad_address == 0, 0, remaining)\n"
             "    if step_status_ptr", "remaining\n    if step_status_ptr",
             "test_missing_gradients.py", "left_alone"),
    Mutation("a missing gradient counts", "mask & (grad != 0) & step_is_taken",
             "mask & step_is_taken", "test_missing_gradients_routes.py", "max_grad_norm and True"),
    Mutation("a missing gradient counts on the host", "array(typecode, [*pick(present)])",
             "array(typecode, [1 for _ in pick(present)])",
             "test_missing_gradients.py", "are_torchs"),
    Mutation("a missing gradient plans anew", "if not complete and not", "if not complete or not",
             "test_missing_gradients.py", "are_torchs"),
    Mutation("a variance is left negative", "tl.maximum(variance, 0.0, propagate_nan="
             "tl.PropagateNan.ALL)", "variance", "test_rules.py", "storage_made_negative"),
    Mutation("a step on the instance is not seen",
             'vars(optimizer).get("step", type(optimizer).step)', "type(optimizer).step",
             "test_grad_scaler_hooks.py", "on_the_instance"),
    Mutation("a wrapper is not seen", "and not is_scaled_through_wrapper(self)", "",
             "test_grad_scaler_hooks.py", "wrapped"),
    Mutation("the kernels unscale by default", "all(options.is_fused(g) and not", "all(not",
             "test_grad_scaler_hooks.py", "in_the_kernel"),
    Mutation("a plan keeps the state", "self._states, self._new = [], []",
             "pass", "test_released_memory.py", "test_state"),
    Mutation("steps in shared memory are replaced", "and not step.is_shared()", "",
             "test_step_counts.py", "shared_memory"),
    Mutation("tracing is not seen", "return any(torch._C._get_dispatch_mode(key) is not None for "
             "key in _TRACING)", "return False", "test_tracing.py", "make_fx"),
    Mutation("only a found_inf of 1 skips", "tl.load(found_inf_ptr) == 0",
             "tl.load(found_inf_ptr) != 1", "test_grad_scaler.py", "skipped_step and sgd-None"),
    Mutation("unscaled gradients are not written back", "encode(grad, grad_ptr.dtype.element_ty)",
             "encode(grad / unscale, grad_ptr.dtype.element_ty)",
             "test_grad_scaler.py", "unscaling_in"),
    Mutation("skipped steps are counted", "step_is_taken(found_inf_ptr, grad_norm_ptr, "
             "SKIP_NONFINITE)\n    tl.store(step_ptr", "mask\n    tl.store(step_ptr",
             "test_grad_scaler.py", "skipped_step and rmsprop"),
    Mutation("a small norm is clipped too", "coefficient > 1, 1", "coefficient > 1, coefficient",
             "test_clip_grad_norm.py", "is_torchs and float32"),
    Mutation("a norm of NaN clips nothing", "tl.where(coefficient > 1, 1, coefficient)",
             "tl.where(coefficient < 1, coefficient, 1)", "test_max_grad_norm.py", "nan_spreads"),
    Mutation("sums of several launches are not added", "if ACCUMULATE:", "if False:",
             "test_clip_grad_norm.py", "is_torchs and float32"),
    Mutation("a captured step sends nothing at a replay", "self._capture(content)", "pass",
             "test_cuda_graphs.py", "eager_steps"),
    Mutation("the step is not kept from the compiler", "@_disable_dynamo\n    def step(",
             "def step(", "test_compile.py", "many_optimizers"),
    Mutation("formats: a remainder is rounded half down", "(bits + 0x8000) >> 16, 0x7FC0",
             "(bits + 0x7FFF) >> 16, 0x7FC0", "test_master_weights.py", "steps_are_those"),
    Mutation("formats: a remainder without its sign", "remainder.to(tl.int32).to(tl.uint32",
             "(remainder.to(tl.int32) & 0xFFFF).to(tl.uint32", "test_master_weights.py",
             "steps_are_those"),
    Mutation("formats: a stale remainder is kept", "and kept[1] != _written(param)",
             "and kept[1] == ()", "test_master_weights.py", "was_written"),
    Mutation("formats: rounded to nearest", "x.to(tl.uint32, bitcast=True) + noise",
             "x.to(tl.uint32, bitcast=True) + 0x8000", "test_stochastic_rounding.py",
             "probabilities"),
    Mutation("formats: the largest number becomes infinity", "tl.abs(x) < LARGEST_BFLOAT16",
             "tl.abs(x) < float('inf')", "test_stochastic_rounding.py", "largest"),
    Mutation("formats: every step has the same bits", "((key & 0xFFFFFFFF) + step)",
             "(key & 0xFFFFFFFF)", "test_random_bits.py", "other_steps"),
    Mutation("formats: all states have the same bits", "^ (SLOT << 29)", "^ 0",
             "test_random_bits.py", "other_steps"),
    Mutation("formats: shards have the bits of the first", "group + offset // 8", "group",
             "test_random_bits.py", "how_they_are_found"),
    Mutation("formats: fewer rounds of Philox", "ROUNDS = tl.constexpr(7)",
             "ROUNDS = tl.constexpr(6)", "test_random_bits.py", "philox"),
    Mutation("formats: 8 bits overflow", "ROOM = tl.constexpr((3 << 20) - 1)",
             "ROOM = tl.constexpr(0)", "test_eight_bits.py", "no_finite"),
    Mutation("formats: what is masked has a say", "x = tl.where(mask, x, 0.0)", "x = x + 0.0",
             "test_eight_bit_state.py", "is_not_there"),
    Mutation("formats: an infinite element decides a group",
             "tl.where(sizes < INFINITE, sizes, 0)", "sizes", "test_eight_bits.py", "infinities"),
    Mutation("formats: 8 bits are cut off", "scaled + (noise << 4).to(tl.int32) + 8",
             "scaled + 8", "test_eight_bits.py", "in_the_mean"),
    Mutation("formats: a converted model goes on", "if REMAINDER in state and not",
             "if False and not", "test_storage_validation.py", "converted_later"),
]  # fmt: skip


def main(words: list[str]) -> int:
    """Print a row a mutation; 1 if one survives."""
    mutations = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        for name in ("kernels", "perf", "triton_optim", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", tree)
        code, output = _pytest(
            tree, {m.test_file for m in mutations}, " or ".join(f"({m.keyword})" for m in mutations)
        )
        if code != 0:
            raise RuntimeError(f"red without a mutation:\n{output}")
        print("| mutation | caught by |\n|---|---|")
        survivors = 0
        for mutation in mutations:
            caught = _caught_by(mutation, tree)
            survivors += caught is None
            print(f"| {mutation.name} | {caught or 'nothing'} |", flush=True)
    print(f"\n{len(mutations) - survivors} caught, {survivors} survived")
    return 1 if survivors else 0


def _caught_by(mutation: Mutation, tree: Path) -> str | None:
    """The first test that fails, or None."""
    package = [path for path in tree.glob("triton_optim/**/*.py") if path.parent.name != "kernels"]
    sources = [*tree.glob("kernels/*.py"), *package]
    places = [path for path in sources if mutation.old in path.read_text()]
    if len(places) != 1 or places[0].read_text().count(mutation.old) != 1:
        raise RuntimeError(f"{mutation.name}: {mutation.old!r} is not in exactly one place")
    text = places[0].read_text()
    places[0].write_text(text.replace(mutation.old, mutation.new))
    code, output = _pytest(tree, {mutation.test_file}, mutation.keyword)
    places[0].write_text(text)
    if code < 0:
        return f"signal {-code} in `{mutation.test_file}`"
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+::\S+)", output, re.MULTILINE)
    if code != 0 and not failed:
        raise RuntimeError(f"{mutation.name}: pytest exited with {code}:\n{output}")
    return f"`{failed[0]}`" if failed else None


def _pytest(tree: Path, test_files: set[str], keyword: str) -> tuple[int, str]:
    """Exit code and output of pytest over the copy, before what is installed and without caches."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-k", keyword]
    files = [str(path) for name in sorted(test_files) for path in tree.glob(f"tests/**/{name}")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *files],
        cwd=tree, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
