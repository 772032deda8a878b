"""What importing the package and starting the command line may import."""

import json
import sys

import pytest
from compiled import run_python
from runs import write_config

LISTED = "import json, sys; print(json.dumps([n for n in sys.modules if '.' not in n]))"


def imported(script):
    """Return the packages that a script imports beyond Python's own and what starts Python."""
    start = run_python(LISTED)
    done = run_python(f"{script}\n{LISTED}")
    assert done.returncode == 0, done.stderr
    found, known = (set(json.loads(d.stdout.splitlines()[-1])) for d in (done, start))
    return found - known - sys.stdlib_module_names


def test_the_package_imports_nothing_but_itself():
    assert imported("import prfl_fast; prfl_fast.__version__; dir(prfl_fast)") == {"prfl_fast"}


COMMANDS = ["--help", "--version", "", "train --help", "train", "train a.yaml --deeep", "traain"]
COMMANDS += [f"{name} --help" for name in ("encode", "plan", "evaluate", "sample", "compare")]
COMMANDS += ["sample out", "compare a --timesteps x", "encode a b --model c --condition last"]
COMMANDS += ["plan --gpus 0", "plan --budget 24", "plan nowhere.yaml", "plan --plot a.txt"]
COMMANDS += ["plan --table --json", "train a.yaml --deep", "evaluate a b --batch-size 0"]
COMMANDS += ["sample out --model m --prompt p --samples 0", "encode a b --model m --workers 0"]


def test_help_and_argument_errors_import_neither_torch_nor_diffusers():
    script = "\n".join(
        (
            "from prfl_fast.cli.main import main",
            f"for words in {COMMANDS!r}:",
            "    try:",
            "        code = main(words.split())",
            "    except SystemExit as stop:",
            "        code = stop.code",
            "    assert code in (0, 2), words",
        )
    )
    assert imported(script) == {"prfl_fast"}


def test_plan_says_that_it_runs_before_it_imports_torch():
    lines = ["import importlib, sys", "from prfl_fast.cli import main"]
    lines += ["def stop(name): raise ValueError(f'torch is {\"torch\" in sys.modules}')"]
    lines += ["main._module = stop", "main.main(['plan'])"]
    told, stopped = run_python("\n".join(lines)).stderr.splitlines()
    assert told.startswith("prfl-fast plan: simulates") and stopped.endswith("torch is false")


def test_a_program_does_not_collect_what_it_imported():
    lines = ["import gc, sys, types", "from prfl_fast.cli import main"]
    lines += ["command = types.SimpleNamespace(run_plan=lambda options: gc.get_freeze_count())"]
    lines += ["main._import_models, main._module = lambda: None, lambda name: command"]
    lines += ["assert main.main(['plan']) == 0, 'a program that calls main keeps its collector'"]
    lines += ["sys.argv[1:] = ['plan']", "assert main.main() > 10_000"]
    done = run_python("\n".join(lines))
    assert done.returncode == 0, done.stderr


MODULES = "models memory training rollout".split()
MODULES += "cli.train cli.sample cli.compare cli.encode cli.plan cli.evaluate cli.inspect".split()


def test_no_import_brings_dynamo_or_a_library_of_models_and_an_error_is_one_line(tmp_path):
    """Compilation and diffusers take as long to import as torch, so their first use waits."""
    path = write_config(tmp_path / "c.yaml", "modell: m\n")
    lines = [f"import prfl_fast.{module}" for module in MODULES]
    lines += ["import runpy, sys", f"sys.argv[1:] = ['train', {str(path)!r}]"]
    lines += ["try: runpy.run_module('prfl_fast.cli', run_name='__main__', alter_sys=True)"]
    lines += ["finally: print([name for name in LATE if name in sys.modules])"]
    late = ["torch._dynamo", "torch.fx.experimental.symbolic_shapes", "diffusers", "transformers"]
    late += ["peft", "safetensors.torch", "matplotlib", "pandas", "tensorboard", "sklearn"]
    done = run_python("\n".join([f"LATE = {late!r}", *lines]), cwd=tmp_path)
    assert done.stderr == f"prfl-fast train: {path}: unknown key 'modell': did you mean 'model'?\n"
    assert done.returncode == 2 and done.stdout == "[]\n"


@pytest.mark.slow
def test_plan_imports_no_package_that_it_does_not_need():
    """Adding an adapter, peft imports packages of quantized layers, in as long as a simulation."""
    lines = ["import sys", "from prfl_fast.cli.main import main", "sys.argv[1:] = OPTIONS"]
    lines += ["assert main() == 0", "assert 'peft' in sys.modules"]
    options = "plan --model wan2.1-t2v-1.3b --frames 5 --height 256 --width 256 --gpu h200"
    found = imported("\n".join([f"OPTIONS = {options.split()!r}", *lines]))
    assert not found & {"bitsandbytes", "scipy", "torchao"}
