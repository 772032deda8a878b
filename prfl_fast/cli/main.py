"""``prfl-fast``: the command line, from clips to compared videos.

All inputs of a run are checked and loaded before the first file is written. An input error is the
last line on stderr and exit code 2. Other codes: 1 if no plan fits, 3 after non-finite losses, 4 if
a device was full, 5 if another process of torchrun failed, 128 + the signal's number after a
signal. Each command imports the optional packages that it needs, so ``doctor`` works with torch
alone.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from prfl_fast.cli import options as command_options
from prfl_fast.cli.plan_options import add_plan, check_plan
from prfl_fast.utils.collection import no_collection
from prfl_fast.utils.interrupts import Terminated, interrupts_held, termination_raised
from prfl_fast.utils.optional import MissingExtraError, hidden, need
from prfl_fast.utils.quiet import quiet_libraries
from prfl_fast.utils.version import __version__

BAD_INPUT, NON_FINITE, OUT_OF_MEMORY, OTHER_RANK = 2, 3, 4, 5

# Commands whose modules have run_<command>: their lines of help, and the beginning of their usage.
_OPTIONS = {
    "encode": ("encode clips and captions to a dataset", "CLIPS OUT --model MODEL "),
    "plan": ("choose the fastest memory policy that fits a GPU; needs no GPU", "[FILE.yaml] "),
    "evaluate": ("compare the scores of a reward model with labels or preferences", "REWARD DATA "),
    "sample": ("sample videos of prompts or images", "OUT --model MODEL "),
    "compare": (
        "compare generators on the same prompts and noise, in one HTML page",
        "[NAME=]PATH ... --out OUT --model MODEL ",
    ),
}
_YAML = {
    "train-reward": "train a latent reward model",
    "train": "train a generator: PRFL, supervised steps, Flow-DPO, Flow-RWR",
    "score": "compute the rewards of a dataset at several timesteps",
    "calibrate": "choose the fastest rollout of a train file within rollout.drift",
}
# Python's constants as YAML writes them, patterns of a string and of a tuple of tuples or values.
_WORDS = {"None": "null", "True": "true", "False": "false"}
_STRING = r"""(?<!\w)(?:'[^']*'|"[^"]*")"""
_TUPLE = r"\((?:[^()]|\([^()]*\))*\)"
_CONTINUED = ("encode", "train-reward", "train", "sample", "compare")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the program's arguments, and return its exit code."""
    program = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    quiet_libraries()
    # The command is read before it is parsed: errors name it, and only its options are added.
    command = next((word for word in arguments if not word.startswith("-")), "")
    # Planning imports and simulates much, and some of it would drop a KeyboardInterrupt.
    planning = interrupts_held() if command == "plan" else contextlib.nullcontext()
    try:
        with termination_raised(), planning:
            return _run(_parser(command).parse_args(arguments), program)
    except KeyboardInterrupt as interrupt:
        stopped_by = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        again = "; run again to continue" if command in _CONTINUED else ""
        _print_error(f"prfl-fast {command}", f"stopped by {stopped_by.name}{again}")
        return 128 + stopped_by  # as shells do
    except (ValueError, TypeError, OSError, MissingExtraError) as error:
        has_file = command in _YAML or command == "plan"
        _print_error(f"prfl-fast {command}", _in_yaml(str(error)) if has_file else str(error))
        return BAD_INPUT
    except RuntimeError as error:
        return _failed(command, error)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage, and exit."""
        _print_error(f"{self.prog}: error", f"{message}. See {self.prog} --help")
        self.exit(BAD_INPUT)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="prfl-fast",
        description="Reward feedback learning (PRFL) of video models. docs/quickstart.md runs all "
        "commands on a tiny model.",
        epilog="exit codes: 0 done, 1 no plan fits, 2 bad input, 3 non-finite losses, "
        "4 device memory full, 5 another process of torchrun failed, 128 + N after signal N",
    )
    parser.add_argument("--version", action="version", version=f"prfl_fast {__version__}")
    commands = parser.add_subparsers(
        title="commands, in the order of a project",
        dest="command",
        metavar="COMMAND",
        required=True,
    )
    text = "show versions, devices, and the backend of each operation"
    told = _command(commands, "doctor", text)
    told.add_argument("--json", action="store_true", help="print one JSON object")
    _add_options(commands, "encode", command)
    text = "print the content of a dataset, the folder of a command, a checkpoint or a model"
    looked = _command(commands, "inspect", text)
    looked.add_argument("path", metavar="PATH", help="its file or folder; nothing is written")
    new = _command(commands, "init", "write a commented YAML file with every key of a command")
    new.add_argument("kind", choices=["train-reward", "train", "score"], help="the command")
    new.add_argument("path", nargs="?", help="new file (default: print to stdout)")
    _add_yaml(commands, "train-reward")
    _add_options(commands, "evaluate", command)
    _add_yaml(commands, "score")
    _add_options(commands, "plan", command)
    _add_yaml(commands, "calibrate")
    _add_yaml(commands, "train")
    for name in ("sample", "compare"):
        _add_options(commands, name, command)
    _add_file_commands(commands)
    return parser


def _add_options(commands: Any, name: str, command: str) -> None:
    """Add a command, and its options if it is the one that runs."""
    text, usage = _OPTIONS[name]
    sub = _command(commands, name, text, usage=f"prfl-fast {name} {usage}[options]")
    if command != name:
        return
    add = add_plan if name == "plan" else getattr(command_options, f"add_{name}")
    add(sub)


def _add_yaml(commands: Any, name: str) -> None:
    """Add a command that takes a YAML file."""
    written = "train" if name == "calibrate" else name
    epilog = f"prfl-fast init {written} FILE writes a YAML file with every key, to fill in"
    sub = _command(commands, name, _YAML[name], epilog=epilog)
    sub.add_argument("config", help="YAML file; docs/configuration.md lists its keys")
    if name == "calibrate":
        return
    text = "check configuration, models and data; print the configuration and write nothing"
    sub.add_argument("--check", action="store_true", help=text)
    if name == "score":
        return
    text = "with --check: also read every sample and check its values"
    sub.add_argument("--deep", action="store_true", help=text)
    text = "resume even if the data or the models have changed since the run began"
    sub.add_argument("--accept-changed-inputs", action="store_true", help=text)


def _module(name: str) -> Any:
    need("pydantic")
    return importlib.import_module(f"prfl_fast.cli.{name}")


def _command(commands: Any, name: str, text: str, **options: Any) -> argparse.ArgumentParser:
    """Add a command whose own help begins with its line in the list of commands."""
    description = f"{text[0].upper()}{text[1:]}."
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=description, **options
    )
    return made


def _add_file_commands(commands: Any) -> None:
    """Add convert and merge, which read and write weights and run no model."""
    layouts = ["diffusers", "official", "comfyui", "kohya"]
    model = "file or folder of weights of diffusers, official Wan or ComfyUI"
    out = (
        "new folder, or new file *.safetensors: a file for ComfyUI and for a LoRA, a folder for "
        "models and rewards of diffusers, either for official Wan"
    )
    convert = _command(
        commands,
        "convert",
        "write a generator, a LoRA or a reward model in another layout",
        epilog="example: prfl-fast convert runs/prfl/final lora.safetensors --layout comfyui",
    )
    text = f"{model}; LoRA of any trainer; or reward model of prfl_fast or HY-Video-PRFL"
    convert.add_argument("source", metavar="IN", help=text)
    convert.add_argument("out", metavar="OUT", help=out)
    text = "layout of OUT; for a reward, diffusers is prfl_fast's and official HY-Video-PRFL's"
    convert.add_argument("--layout", required=True, choices=layouts, help=text)
    merge = _command(
        commands,
        "merge",
        "add a LoRA to the weights of a generator",
        epilog="example: prfl-fast merge Wan2.1-T2V-14B runs/prfl/final merged",
    )
    merge.add_argument("source", metavar="MODEL", help=model)
    merge.add_argument("adapter", metavar="LORA", help="file or folder of a LoRA of any trainer")
    text = "new folder for diffusers, new file *.safetensors for ComfyUI, either for official Wan"
    merge.add_argument("out", metavar="OUT", help=text)
    text = "layout of OUT (default: that of MODEL)"
    merge.add_argument("--layout", choices=layouts[:3], help=text)


def _import_models() -> None:
    """Import diffusers' models and peft without the optional packages that they import.

    The planner needs none of these there, and importing them takes longer than some plans.
    """
    with (
        hidden("bitsandbytes", "scipy", "torchao"),
        contextlib.suppress(ImportError, AttributeError),
    ):
        importlib.import_module("diffusers.models.transformers")
        peft = importlib.import_module("peft.import_utils")
        # peft asks when it adds the first adapter, and remembers the answers.
        peft.is_bnb_available()
        peft.is_torchao_available()


def _run(options: argparse.Namespace, program: bool) -> int:
    if options.command == "plan":
        check_plan(options)
    if getattr(options, "deep", False) and not options.check:
        raise ValueError("--deep is given alone, expected --check --deep")
    if options.command == "doctor":
        from prfl_fast.cli.doctor import run_doctor

        return run_doctor(options.json)
    if options.command == "inspect":
        from prfl_fast.cli.inspect import run_inspect

        return run_inspect(options.path)
    if options.command in ("convert", "merge"):
        from prfl_fast.cli import convert

        return (convert.run_convert if options.command == "convert" else convert.run_merge)(options)
    need("pydantic")
    if options.command == "init":
        from prfl_fast.cli.reference import init

        return init(options.kind, options.path)
    if options.command in _OPTIONS:
        name = f"run_{options.command}"
        # Importing torch and diffusers takes seconds, so this line is printed first.
        if options.command == "plan" and "torch" not in sys.modules:
            each = " for each row" if options.table else ""
            print(f"prfl-fast plan: simulates training steps{each}, please wait", file=sys.stderr)
        with no_collection():  # imports leave no garbage behind
            if options.command == "plan" and program:
                _import_models()
            run: Callable[[argparse.Namespace], int] = getattr(_module(options.command), name)
            if program:
                # The collector need not visit imported objects again: at the exit it takes 2 s.
                gc.freeze()
        return run(options)
    from prfl_fast.cli.config import ScoreFile, TrainFile, TrainRewardFile
    from prfl_fast.cli.score import run_score
    from prfl_fast.cli.train import RunOptions, run_train, train_reward
    from prfl_fast.cli.yaml_config import load_config

    commands: dict[str, tuple[type[Any], Any]] = {
        "calibrate": (TrainFile, run_train),
        "train": (TrainFile, run_train),
        "train-reward": (TrainRewardFile, train_reward),
        "score": (ScoreFile, run_score),
    }
    kind, command = commands[options.command]
    if options.command == "calibrate":
        chosen = RunOptions(file=options.config, calibrate=True)
    elif options.command == "score":
        chosen = options.check
    else:
        chosen = RunOptions(
            options.check, options.deep, options.accept_changed_inputs, options.config
        )
    with _reasons_shown() if options.command != "score" else contextlib.nullcontext():
        return command(load_config(kind, options.config), chosen)


def _failed(command: str, error: RuntimeError) -> int:
    """Report an expected failure of a run and return its exit code; re-raise any other error."""
    from prfl_fast.parallel.launch import is_first_to_report, is_lost_rank, wait_for_report
    from prfl_fast.parallel.ranks import OtherRankError
    from prfl_fast.training.oom import is_out_of_memory
    from prfl_fast.training.trainer import NonFiniteTrainingError, OutOfMemoryError

    if isinstance(error, OtherRankError):
        wait_for_report()  # torchrun ends all ranks when the first one ends
        return OTHER_RANK
    if is_lost_rank(error):
        lost = "another process of this job has ended or does not answer. Start the job again: it "
        _print_error(f"prfl-fast {command}", f"{lost}continues from the newest checkpoint")
        return OTHER_RANK
    if isinstance(error, OutOfMemoryError):  # a report of the device's memory on several lines
        is_first_to_report()  # lets the ranks that wait for a report end
        print(f"prfl-fast {command}: {error}", file=sys.stderr)
        return OUT_OF_MEMORY
    if is_out_of_memory(error):  # before or after the training loop
        _print_error(f"prfl-fast {command}", str(error).splitlines()[0])
        return OUT_OF_MEMORY
    if not isinstance(error, NonFiniteTrainingError):
        is_first_to_report()  # likewise, the traceback is the report
        raise error
    _print_error(f"prfl-fast {command}", str(error))
    return NON_FINITE


def _in_yaml(text: str) -> str:
    """Return an error with its values as a YAML file has them: null for None, lists for tuples."""

    def listed(value: Any) -> Any:
        return [*map(listed, value)] if isinstance(value, tuple) else value

    def worded(match: re.Match[str]) -> str:
        found = match[0]
        if found.startswith("("):
            with contextlib.suppress(ValueError, SyntaxError):  # words in brackets
                value = ast.literal_eval(found)
                return str(listed(value)) if isinstance(value, tuple) else found
        return _WORDS.get(found, found)

    for values in (_TUPLE, "|".join(_WORDS)):
        # A value stands alone: not in a path, nor in expandable_segments:True.
        alone = rf"(?<![^\s(\[{{,])(?:{values})(?![^\s)\]}},.;:])"
        text = re.sub(f"{_STRING}|{alone}", worded, text)
    return text


def _print_error(program: str, problem: str) -> None:
    """Print one line, on the first rank that has an error."""
    if "RANK" in os.environ:
        from prfl_fast.parallel.launch import is_first_to_report

        if not is_first_to_report():
            return
    print(f"{program}: {' '.join(problem.split())}", file=sys.stderr)


@contextlib.contextmanager
def _reasons_shown() -> Iterator[None]:
    """Show the package's messages about rollouts on stderr, each once, and warnings in one line."""
    logger, handler, seen = logging.getLogger("prfl_fast"), logging.StreamHandler(), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        known = text in seen
        seen.add(text)
        return not known

    handler.addFilter(is_new)
    handler.setFormatter(logging.Formatter("prfl-fast: %(message)s"))
    level, former = logger.level, warnings.formatwarning

    def without_source(
        message: Any, category: Any, filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(Path(__file__).parents[1]):
            return f"prfl-fast: {message}\n"
        return former(message, category, filename, lineno, line)

    logger.addHandler(handler)
    warnings.formatwarning = without_source
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        warnings.formatwarning = former
        logger.removeHandler(handler)
        logger.setLevel(level)
