"""Find 32-bit products that reach an address of a compiled Triton kernel, in its Triton IR."""

import re

DEFINITION = re.compile(r"^\s*(%[\w:, %]+?)\s*=\s*(?:\"([\w.]+)\"|([\w.]+))(.*)$")
VALUE = re.compile(r"%[\w]+(?:#\d+)?")
PRODUCTS = {"arith.muli", "arith.shli"}
# Of constants and ranges these give numbers that are known when the kernel is compiled.
SHAPING = PRODUCTS | {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans"}
SHAPING |= {"arith.addi", "arith.subi", "arith.extsi", "arith.divsi", "arith.remsi", "arith.andi"}
# The results of these do not carry the product on: data, a quotient, a truth value.
BARRIERS = {"tt.load", "arith.cmpi", "arith.divsi", "arith.divui", "arith.remsi", "arith.remui"}
# Products that are small whatever the model, by the name the kernel gives them.
SMALL = {"o_table": "a row of the rotary table: positions of an axis × 64 pairs"}


class _Graph:
    """Values of a TTIR text, and the values computed from each."""

    def __init__(self):
        self.uses: dict[str, set[str]] = {}
        self.products: dict[str, str] = {}  # 32-bit products of run-time values, with their line
        self.offsets: set[str] = set()  # of tt.addptr
        self.constants: set[str] = set()
        self.loops: list[
            tuple[list[str], list[str]]
        ] = []  # results, carried values; innermost last

    def flow(self, values, targets):
        for value in values:
            self.uses.setdefault(value, set()).update(targets)

    def add_control(self, line, code):
        """Follow a line that defines nothing: yields, block arguments, starts and ends of loops."""
        if self.loops and code.strip().startswith(("scf.yield", '"scf.yield"', "scf.condition")):
            self.flow(VALUE.findall(code), (*self.loops[-1][0], *self.loops[-1][1]))
        before = re.match(r"^\s*\^bb\d+\((.*)\):", code)
        if before and self.loops:
            self.loops[-1][1].extend(VALUE.findall(before[1]))
        if code.strip().startswith(("scf.for", "scf.while", "scf.if")):
            carried = re.search(r"iter_args\((.*?)\)\s*->", code)
            self.loops.append(([], VALUE.findall(carried[1]) if carried else []))
        elif re.match(r"^\s*\}\s*(loc|$)", line) and self.loops:
            self.loops.pop()

    def add_definition(self, code, results, name, rest):
        results = [v.split(":")[0] for v in VALUE.findall(results)]
        operands = [v.split("#")[0] for v in VALUE.findall(rest)]
        if name.startswith("scf."):
            carried = re.search(r"iter_args\((.*?)\)\s*->", code)
            self.loops.append((results, VALUE.findall(carried[1])[::2] if carried else []))
            self.flow(operands, (*results, *self.loops[-1][1]))
            return
        known = set(operands) <= self.constants
        if name in ("arith.constant", "tt.make_range") or (name in SHAPING and known):
            self.constants.update(results)
        if name == "tt.addptr":
            self.offsets.add(operands[1])
        small = re.sub(r"_\d+$", "", results[0].removeprefix("%")) in SMALL
        if name in PRODUCTS and "i32" in rest.rsplit(":", 1)[-1] and not small and not known:
            self.products[results[0]] = code.strip()
        if name not in BARRIERS:
            self.flow(operands, results)


def narrow_products(ttir: str) -> list[str]:
    """Return the lines whose 32-bit product of run-time values reaches the offset of an address."""
    graph = _Graph()
    for line in ttir.splitlines():
        code = line.split(" loc(")[0]
        found = DEFINITION.match(code)
        if found is None:
            graph.add_control(line, code)
        else:
            graph.add_definition(code, found[1], found[2] or found[3], found[4])
    reaching = []
    for start, code in graph.products.items():
        seen, todo = {start}, [start]
        while todo:
            new = graph.uses.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        if seen & graph.offsets:
            reaching.append(code)
    return reaching
