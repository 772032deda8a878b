"""Call the command line in a world of :func:`runs.make_world`."""

import torch
from runs import config, write_config

from prfl_fast.cli import main as cli
from prfl_fast.utils.io import save_tensors


def call(command, root, out, changes=None, *arguments):
    """Run a command on a valid configuration with changes and return its exit code."""
    path = write_config(out.parent / f"{command}.yaml", config(command, root, out, changes))
    return cli.main([command, str(path), *arguments])


def one_line(capsys, command):
    """Return the error of a command, which must be one line."""
    error = capsys.readouterr().err
    assert error.startswith(f"prfl-fast {command}: ") and error.count("\n") == 1, error
    assert "Traceback" not in error and len(error) < 600
    return error


def negative_file(path, *shape, name="encoder_hidden_states"):
    """Write random negative conditions and return their path."""
    save_tensors({name: torch.randn(*shape, generator=torch.Generator().manual_seed(5))}, path)
    return str(path)
