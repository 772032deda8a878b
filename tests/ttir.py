"""Whether 32-bit products reach an address of a compiled Triton kernel, read off its Triton IR."""

import re

DEFINITION = re.compile(r"^\s*(%[\w:, %]+?)\s*=\s*(?:\"([\w.]+)\"|([\w.]+))(.*)$")
VALUE = re.compile(r"%[\w]+(?:#\d+)?")
PRODUCTS = {"arith.muli", "arith.shli"}
# Of constants and ranges these give numbers that are known when the kernel is compiled.
SHAPING = PRODUCTS | {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans"}
SHAPING |= {"arith.addi", "arith.subi", "arith.extsi", "arith.divsi", "arith.remsi", "arith.andi"}
# What comes out of these is not the product that went in: data, a quotient, a truth value.
BARRIERS = {"tt.load", "arith.cmpi", "arith.divsi", "arith.divui", "arith.remsi", "arith.remui"}
# Products that are small whatever the model, by the name the kernel gives them.
SMALL = {"o_table": "a row of the rotary table: positions of an axis × 64 pairs"}


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
        known = name in ("arith.constant", "tt.make_range") or (
            name in SHAPING and set(operands) <= constants
        )
        if known:
            constants.update(results)
        if name == "tt.addptr":
            offsets.add(operands[1])
        kind = rest.rsplit(":", 1)[-1]
        small = re.sub(r"_\d+$", "", results[0].removeprefix("%")) in SMALL
        if name in PRODUCTS and "i32" in kind and not small and not set(operands) <= constants:
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
