"""Ahead-of-time compilation of every Triton kernel for every architecture, without a GPU."""

import json
import os
import re
import subprocess
import sys
import textwrap
import types

import pytest

from prfl_fast.kernels import _aot
from prfl_fast.kernels._triton import INTERPRETING, AotCase, argument_types

pytestmark = pytest.mark.triton
OPERATIONS = list(_aot.operations())


def python(*arguments):
    """A Python process whose kernels are not decorated for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def command_line(*arguments):
    return python("-m", "prfl_fast.kernels._aot", *arguments)


def assert_fits(found):
    spilled = [r for r in found if r.spilled_bytes]
    assert not spilled, f"{len(spilled)} of {len(found)} spill, for example {spilled[0]}"
    for r in found:
        assert r.registers * r.num_warps * 32 <= 65536, f"does not fit a multiprocessor: {r}"
        assert r.shared_bytes <= 99 * 1024, f"more than sm_86 and sm_120 have: {r}"


@pytest.mark.parametrize("op", OPERATIONS)
def test_no_kernel_spills(op):
    found = _aot.measure([op])
    assert {r.capability for r in found} == set(_aot.CAPABILITIES)
    assert {r.op for r in found} == {op}
    assert len({(r.label, r.capability) for r in found}) == len(found)
    assert_fits(found)


@pytest.mark.slow
@pytest.mark.parametrize("capability", _aot.CAPABILITIES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_no_combination_of_flags_spills(op, capability):
    assert_fits(_aot.measure([op], [capability], every=True))


def test_norm_modulate_multiplies_in_64_bits():
    """Token and row numbers times strides pass 2³¹ elements in a 14B model's packed projections."""
    script = """
        import json
        from prfl_fast.kernels import _aot
        cases = _aot.operations()["norm_modulate"].aot_cases((9, 0))
        texts = {c.label: _aot.compile_case(c, 90).asm["ttir"] for c in cases}
        print(json.dumps(texts))
    """
    run = python("-c", textwrap.dedent(script))
    assert run.returncode == 0, run.stderr
    for label, ttir in json.loads(run.stdout).items():
        widths = re.findall(r"arith\.muli [^:]+ : (\S+)", ttir)
        assert len(widths) > 3 and set(widths) == {"i64"}, f"{label}: {widths}"


def test_operations_are_found():
    assert "norm_modulate" in OPERATIONS
    for module in _aot.operations().values():
        labels = [case.label for case in module.aot_cases((9, 0))]
        assert labels and len(set(labels)) == len(labels)


def test_an_unknown_operation_is_refused():
    run = command_line("no_such_op")
    assert run.returncode == 2 and not run.stdout
    assert "no aot_cases in no_such_op; there are " in run.stderr
    with pytest.raises(RuntimeError, match="no aot_cases in no_such_op"):
        _aot.measure(["no_such_op"])


def test_a_failure_is_one_line_and_a_status(monkeypatch, capsys):
    broken = types.SimpleNamespace(aot_cases=lambda capability, every: [None])
    monkeypatch.setattr(_aot, "operations", lambda: {"broken": broken})
    assert _aot.main(["broken", "--capability", "90"]) == 1
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(r"error: \w+: [^\n]+\n", err)


def test_an_architecture_triton_cannot_compile_for_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        _aot.main(["--capability", "35"])
    assert "invalid choice: 35" in capsys.readouterr().err


def test_interpreted_kernels_are_refused():
    if not INTERPRETING:
        pytest.skip("the kernels of this process are compiled ones")
    case = _aot.operations()["norm_modulate"].aot_cases((9, 0))[0]
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        _aot.compile_case(case, 90)


class _Kernel:
    arg_names = ["x_ptr", "bias_ptr", "stride_xt", "length", "eps", "softmax_scale", "BLOCK_D"]


def test_argument_types_follow_the_names():
    found = argument_types(_Kernel, {"x_ptr": "bf16"})
    assert found == {
        "x_ptr": "*bf16:16",
        "stride_xt": "i32:16",
        "length": "i32",
        "eps": "fp32",
        "softmax_scale": "fp32",
    }
    others = {"length": None, "stride_xt": "i64"}
    found = argument_types(_Kernel, {"x_ptr": "fp32", "bias_ptr": "fp16"}, others)
    assert found["bias_ptr"] == "*fp16:16" and found["stride_xt"] == "i64"
    assert "length" not in found


def test_a_case_that_names_no_parameter_is_refused(monkeypatch):
    monkeypatch.setattr(_aot, "INTERPRETING", False)
    case = AotCase("typo", _Kernel, {"z_ptr": "*fp32"}, {"BLOCK": 1}, 4)
    with pytest.raises(ValueError, match="typo: _Kernel has no parameter BLOCK, z_ptr"):
        _aot.compile_case(case, 90)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(_aot, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        _aot.compile_case(AotCase("any", _Kernel, {}, {}, 4), 90)
