"""Ahead-of-time compilation of every Triton kernel for every architecture, without a GPU."""

import re

import aot
import pytest
import ttir
from aot_types import AotCase, argument_types
from compiled import compile_in_process

from prfl_fast.kernels.runtime.triton import INTERPRETING

pytestmark = pytest.mark.aot
OPERATIONS = list(aot.OPERATIONS)
# The default tier compiles one case of each kernel, as all of them take 85 s.
TIERS = [
    pytest.param(90, True, id="90-widest"),
    *(pytest.param(c, False, id=f"{c}", marks=pytest.mark.slow) for c in aot.CAPABILITIES),
]


def assert_fits(found):
    spilled = [r for r in found if r.spilled_bytes]
    assert not spilled, f"{len(spilled)} of {len(found)} spill, for example {spilled[0]}"
    for r in found:
        assert r.registers * r.num_warps * 32 <= 65536, f"does not fit a multiprocessor: {r}"
        # What sm_86 runs is compiled for sm_80 here.
        kilobytes = 227 if r.capability in (90, 100) else 99
        assert r.shared_bytes <= kilobytes * 1024, f"more than {kilobytes} KiB: {r}"


@pytest.mark.parametrize("capability, widest", TIERS)
def test_no_kernel_spills_and_no_address_wraps(capability, widest, tmp_path):
    """Compile a case of each kernel for sm_90, in the slow tier every case of every architecture.

    A packed 14B projection of 75 600 tokens × 15 360 channels × 2 samples has 2.3·10⁹ elements: a
    product formed in 32 bits wraps there even if it is widened afterwards. Tests beside each
    operation run such strides in the interpreter as well.
    """
    found = aot.measure(OPERATIONS, [capability], ttir=tmp_path, widest=widest)
    assert {r.capability for r in found} == {capability}
    assert {r.op for r in found} == set(OPERATIONS)
    assert len({(r.op, r.label) for r in found}) == len(found)
    assert_fits(found)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(texts) == len(found)
    for name, text in texts.items():
        assert "tt.addptr" in text
        assert not ttir.narrow_products(text), f"{name}: {ttir.narrow_products(text)[:3]}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_no_combination_of_flags_spills(op, capability):
    assert_fits(aot.measure([op], [capability], every=True))


KERNEL = """
import json, triton, triton.language as tl
import aot
from aot_types import AotCase

@triton.jit
def kernel(x_ptr, y_ptr, stride, tokens, WIDE: tl.constexpr, LOOP: tl.constexpr):
    i_token = tl.program_id(0)
    if WIDE:
        i_token = i_token.to(tl.int64)
    o_d = tl.arange(0, 64)
    offset = i_token * stride
    if LOOP:
        i = i_token
        while i < tokens:
            offset += stride
            if not WIDE:
                offset = (i * stride).to(offset.dtype)
            i += 1
    x = tl.load(x_ptr + offset.to(tl.int64) + o_d)
    tl.store(y_ptr + o_d, x)

types = dict(x_ptr="*bf16:16", y_ptr="*bf16:16", stride="i32:16", tokens="i32")
cases = {f"{wide} {loop}": AotCase("", kernel, types, dict(WIDE=wide, LOOP=loop), 1)
         for wide in (0, 1) for loop in (0, 1)}
print(json.dumps({k: aot.compile_case(c, 90).asm["ttir"] for k, c in cases.items()}))
"""


@pytest.mark.slow
def test_the_check_of_addresses_finds_a_kernel_that_would_wrap(tmp_path):
    """Widening after the product does not help, neither straight nor through a loop."""
    path = tmp_path / "kernel.py"  # Triton reads the source of a kernel from its file
    path.write_text(KERNEL)
    script = "import runpy, sys; runpy.run_path(sys.argv[1])"
    for name, text in compile_in_process(script, str(path)).items():
        assert bool(ttir.narrow_products(text)) == name.startswith("0"), f"{name}\n{text}"


@pytest.mark.slow
def test_no_kernel_is_compiled_again_for_another_number_of_tokens():
    """Read which integers that are no strides Triton specializes."""
    script = """
        import json
        import aot
        found = {}
        for op, cases in aot.OPERATIONS.items():
            for case in cases((9, 0), False):
                found[op] = [
                    p.name for p in case.kernel.params
                    if not p.is_constexpr and not p.do_not_specialize
                    and case.types.get(p.name, "").startswith("i")
                ]
        print(json.dumps(found))
    """
    fixed = {"heads", "dim", "gate_group", "norm_group"}  # of a model
    # The masks of latents need the factor of 16, which every latent of 16 channels has.
    latents = ("flow_loss", "flow_step")
    for op, names in compile_in_process(script).items():
        left = {name for name in names if not name.startswith("stride")} - fixed
        assert op in latents or not left, f"{op}: {left}"


def test_operations_are_found():
    assert "norm_modulate" in OPERATIONS
    for cases in aot.OPERATIONS.values():
        labels = [case.label for case in cases((9, 0), False)]
        assert labels and len(set(labels)) == len(labels)


WRONG = [
    (["no_such_op"], "no cases of no_such_op; there are "),
    (["--capability", "35"], "invalid choice: 35"),  # which Triton cannot compile for
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        aot.main(arguments)
    out, err = capsys.readouterr()
    assert not out and message in err


@pytest.mark.slow
def test_measuring_an_unknown_operation_is_refused():
    with pytest.raises(RuntimeError, match="no cases of no_such_op"):
        aot.measure(["no_such_op"])


def test_a_failure_is_one_line_and_a_status(monkeypatch, capsys):
    monkeypatch.setitem(aot.OPERATIONS, "broken", lambda capability, every: [None])
    assert aot.main(["broken", "--capability", "90"]) == 1
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(r"error: \w+: [^\n]+\n", err)


def test_interpreted_kernels_are_refused():
    if not INTERPRETING:
        pytest.skip("the kernels of this process are compiled ones")
    case = aot.OPERATIONS["norm_modulate"]((9, 0), False)[0]
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot.compile_case(case, 90)


class _Kernel:
    arg_names = ["x_ptr", "bias_ptr", "stride_xt", "length", "eps", "softmax_scale", "BLOCK_D"]


def test_argument_types_follow_the_names():
    found = argument_types(_Kernel, {"x_ptr": "bf16"})
    floats = dict.fromkeys(("eps", "softmax_scale"), "fp32")
    assert found == {"x_ptr": "*bf16:16", "stride_xt": "i32:16", "length": "i32"} | floats
    others = {"length": None, "stride_xt": "i64"}
    found = argument_types(_Kernel, {"x_ptr": "fp32", "bias_ptr": "fp16"}, others)
    expected = {"x_ptr": "*fp32:16", "bias_ptr": "*fp16:16", "stride_xt": "i64"}
    assert found == expected | floats


def test_a_case_that_names_no_parameter_is_refused(monkeypatch):
    monkeypatch.setattr(aot, "INTERPRETING", False)
    case = AotCase("typo", _Kernel, {"z_ptr": "*fp32"}, {"BLOCK": 1}, 4)
    with pytest.raises(ValueError, match="typo: _Kernel has no parameter BLOCK, z_ptr"):
        aot.compile_case(case, 90)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(aot, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        aot.compile_case(AotCase("any", _Kernel, {}, {}, 4), 90)
