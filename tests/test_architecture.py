"""Imports go down, files stay short, and the public face stays small: read from the source."""

import ast
import inspect
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import prfl_fast
from prfl_fast import kernels

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    "cli planning training sampling data feedback parallel memory rewards rollout models utils "
    "kernels"
).split()
KERNEL_FLOORS = {"norm": 0, "attn": 0, "linear": 0, "flow": 0, "common": 1, "runtime": 2}


@cache
def sources():
    """Return the syntax tree of every module by its dotted name."""
    found = {}
    for folder, prefix in (("prfl_fast", ""), ("kernels", "prfl_fast.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


@cache
def imports():
    """Return what every module imports of ours, wherever in the file the import stands."""
    known, found = sources(), {}
    for name, tree in known.items():
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {a.name for a in node.names if a.name in known}
            elif isinstance(node, ast.ImportFrom) and (node.module or "") in known:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name].add(inner if inner in known else node.module)
    return found


def package(module):
    """Return the floor of a module: ``rollout`` of ``prfl_fast.rollout.engine``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "root"


def longest(graph, node):
    """Return the length of the longest chain of imports that starts at ``node``."""
    return 1 + max((longest(graph, other) for other in graph[node]), default=0)


def test_no_two_modules_import_each_other():
    # A package's __init__ only re-exports, and importing a submodule runs it: it has no edge back.
    graph = {m: {o for o in others if o != m} for m, others in imports().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_imports_only_go_down():
    upward = [
        (module, other)
        for module, others in imports().items()
        for other in others
        if "root" not in (package(module), package(other))
        and FLOORS.index(package(other)) < FLOORS.index(package(module))
    ]
    assert upward == []
    root = [m for m, others in imports().items() if package(m) != "root" and "prfl_fast" in others]
    assert root == [], "modules import prfl_fast itself"


def test_kernel_families_never_import_each_other():
    for module, others in imports().items():
        family = module.split(".")[2] if module.count(".") > 2 else None
        for other in others if family in KERNEL_FLOORS else ():
            target = other.split(".")[2] if other.startswith("prfl_fast.kernels.") else None
            assert target in KERNEL_FLOORS, f"{module} imports {other}"
            deeper = KERNEL_FLOORS[target] > KERNEL_FLOORS[family]
            assert target == family or deeper, f"{module} imports {other}"


def test_package_levels():
    graph = {floor: set() for floor in FLOORS}
    for module, others in imports().items():
        for other in others:
            a, b = package(module), package(other)
            if "root" not in (a, b) and a != b:
                graph[a].add(b)
    levels = {floor: longest(graph, floor) for floor in FLOORS}
    print("\n".join(f"{levels[f]:2d} {f}: {' '.join(sorted(graph[f]))}" for f in FLOORS))
    assert max(levels.values()) <= 10


def test_files_are_short():
    lengths = {
        path: len(path.read_text().splitlines())
        for folder in ("prfl_fast", "kernels", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "_version.py"
    }
    longest_files = sorted(lengths.items(), key=lambda item: -item[1])[:5]
    print([(str(path.relative_to(ROOT)), lines) for path, lines in longest_files])
    assert [path for path, lines in lengths.items() if lines > 500] == []


def test_the_public_face_is_small():
    print(len(prfl_fast.__all__), len(kernels.__all__))
    assert len(prfl_fast.__all__) <= 15 and len(kernels.__all__) <= 16
    for module in (prfl_fast, kernels):
        for name in module.__all__:
            value = getattr(module, name)
            assert inspect.isfunction(value) or inspect.isclass(value), name
            assert inspect.getdoc(value), f"{name} has no docstring"


def test_no_private_name_crosses_a_package():
    crossing = []
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prfl_fast."):
                home = node.module.rpartition(".")[0]
                own = module.startswith(home) and home != "prfl_fast"
                crossing += [
                    (module, node.module, a.name)
                    for a in node.names
                    if a.name.startswith("_") and not own and a.name not in ("_C", "__version__")
                ]
    assert crossing == []


def test_no_function_has_the_name_of_its_module():
    same = [
        module
        for module, tree in sources().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name == module.rpartition(".")[2] != "main"
    ]
    assert same == []


def test_only_kernels_hold_triton_code():
    outside = [
        name
        for name, tree in sources().items()
        if package(name) != "kernels"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "jit" and "triton" in ast.dump(node)
    ]
    assert outside == []
