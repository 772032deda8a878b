"""No kernel multiplies its way to an address in 32 bits: packed 14B projections pass 2³¹ elements.

75 600 tokens × 15 360 channels × 2 samples are 2.3·10⁹ elements. A product formed in 32 bits wraps
there even if it is widened afterwards. So in every compiled kernel no 32-bit product or left shift
of run-time values may reach an address, through whatever follows it. Tests beside each operation
run such strides in the interpreter as well.
"""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

from prfl_fast.kernels import _aot

pytestmark = pytest.mark.triton

DEFINITION = re.compile(r"^\s*(%[\w:, %]+?)\s*=\s*(?:\"([\w.]+)\"|([\w.]+))(.*)$")
VALUE = re.compile(r"%[\w]+(?:#\d+)?")
PRODUCTS = {"arith.muli", "arith.shli"}
# What comes out of these is not the product that went in: data, a quotient, a truth value.
BARRIERS = {"tt.load", "arith.cmpi", "arith.divsi", "arith.divui", "arith.remsi", "arith.remui"}


def narrow_products(ttir: str) -> list[str]:
    """Lines of TTIR whose 32-bit product of run-time values reaches the offset of an address."""
    uses: dict[str, set[str]] = {}  # value -> values computed from it
    products: dict[str, str] = {}
    constants: set[str] = set()
    offsets: set[str] = set()
    loops: list[tuple[list[str], list[str]]] = []  # results and carried values, innermost last
    for line in ttir.splitlines():
        code = line.split(" loc(")[0]
        found = DEFINITION.match(code)
        carried = re.search(r"iter_args\((.*?)\)\s*->", code)
        if code.strip().startswith(("scf.yield", '"scf.yield"', "scf.condition")) and loops:
            for value in VALUE.findall(code):
                for target in (*loops[-1][0], *loops[-1][1]):
                    uses.setdefault(value, set()).add(target)
        before = re.match(r"^\s*\^bb\d+\((.*)\):", code)
        if before and loops:
            loops[-1][1].extend(VALUE.findall(before[1]))
        if found is None:
            if code.strip().startswith(("scf.for", "scf.while", "scf.if")):
                loops.append(([], VALUE.findall(carried[1]) if carried else []))
            elif re.match(r"^\s*\}\s*(loc|$)", line) and loops:
                loops.pop()
            continue
        results, name, rest = found[1], found[2] or found[3], found[4]
        results = [v.split(":")[0] for v in VALUE.findall(results)]
        operands = [v.split("#")[0] for v in VALUE.findall(rest)]
        if name.startswith("scf."):
            loops.append((results, VALUE.findall(carried[1])[::2] if carried else []))
            for value in operands:
                for target in (*results, *loops[-1][1]):
                    uses.setdefault(value, set()).add(target)
            continue
        if name == "arith.constant":
            constants.update(results)
        if name == "tt.splat" and operands[0] in constants:
            constants.update(results)
        if name == "tt.addptr":
            offsets.add(operands[1])
        kind = rest.rsplit(":", 1)[-1]
        if name in PRODUCTS and "i32" in kind and not set(operands) <= constants:
            products[results[0]] = code.strip()
        if name not in BARRIERS:
            for value in operands:
                uses.setdefault(value, set()).update(results)
    reaching = []
    for start, code in products.items():
        seen, todo = {start}, [start]
        while todo:
            todo += [v for v in uses.get(todo.pop(), ()) if v not in seen and not seen.add(v)]
        if seen & offsets:
            reaching.append(code)
    return reaching


def compiled(body: str) -> dict[str, str]:
    """What a process whose kernels are not decorated for the interpreter prints, as JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(body)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("op", list(_aot.operations()))
def test_no_product_in_32_bits_reaches_an_address(op):
    texts = compiled(f"""
        import json
        from prfl_fast.kernels import _aot
        cases = _aot.operations()["{op}"].aot_cases((9, 0))
        print(json.dumps({{c.label: _aot.compile_case(c, 90).asm["ttir"] for c in cases}}))
    """)
    for label, ttir in texts.items():
        assert "tt.addptr" in ttir
        assert not narrow_products(ttir), f"{label}: {narrow_products(ttir)[:3]}"


KERNEL = """
import json, triton, triton.language as tl
from prfl_fast.kernels import _aot
from prfl_fast.kernels._triton import AotCase

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
print(json.dumps({k: _aot.compile_case(c, 90).asm["ttir"] for k, c in cases.items()}))
"""


def test_the_check_finds_a_kernel_that_would_wrap(tmp_path):
    """Widening after the product does not help, neither straight nor through a loop."""
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)
    texts = compiled(f"import runpy; runpy.run_path({str(path)!r})")
    for name, ttir in texts.items():
        assert bool(narrow_products(ttir)) == name.startswith("0"), f"{name}\n{ttir}"
