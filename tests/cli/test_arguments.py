"""Values of options, which are refused before torch is imported (test_start_up.py)."""

import pytest

from prfl_fast.cli import arguments
from prfl_fast.cli import main as cli

COMMANDS = {
    "encode": "encode clips out --model m",
    "evaluate": "evaluate reward data",
    "sample": "sample out --model m --prompt p",
    "compare": "compare a --out out --model m --prompt p",
}
BAD = {
    "encode --fps 0": "--fps: '0', expected a positive number",
    "encode --crops 0": "--crops: '0', expected a positive integer",
    "encode --workers 1.5": "--workers: '1.5', expected a positive integer",
    "encode --budget 24": "--budget: '24 bytes', expected a size like 24GiB",
    "evaluate --batch-size 0": "--batch-size: '0', expected a positive integer",
    "evaluate --shift -1": "--shift: '-1', expected a positive number",
    "sample --samples 0": "--samples: '0', expected a positive integer",
    "sample --frames -5": "--frames: '-5', expected a positive integer",
    "sample --fps inf": "--fps: 'inf', expected a number",
    "sample --num-inference-steps 0": "--num-inference-steps: '0', expected a positive integer",
    "sample --guidance-scale nan": "--guidance-scale: 'nan', expected a number",
    "sample --guidance-scale 1,2,3": "--guidance-scale: '1,2,3', expected a number or HIGH,LOW",
    "sample --prompts p.txt": "--prompts: not allowed with argument --prompt",
    "compare --batch-size 0": "--batch-size: '0', expected a positive integer",
    "compare --budget much": "--budget: 'much', expected bytes or a size like 24GiB or 24GB",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_values_name_the_option(capsys, words):
    command, rest = words.split(maxsplit=1)
    with pytest.raises(SystemExit) as caught:
        cli.main([*COMMANDS[command].split(), *rest.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"prfl-fast {command}: error: argument {BAD[words]}")


def test_good_values():
    assert arguments.count("3") == arguments.count("3", least=3) == 3
    assert arguments.finite("-2.5") == -2.5 and arguments.positive("1e-3") == 1e-3
    assert arguments.memory_size("1.5GiB") == 3 << 29
