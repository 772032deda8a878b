"""Call the command line in a world of :func:`runs.make_world`."""

import torch
from runs import config, log, write_config

from prfl_fast.cli import main as cli
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.utils.io import save_tensors


def call(command, root, out, changes=None, *arguments):
    """Run a command on a valid configuration with changes and return its exit code."""
    path = write_config(out.parent / f"{command}.yaml", config(command, root, out, changes))
    return cli.main([command, str(path), *arguments])


def train(root, out, changes=None):
    """Train with a valid configuration with changes and return the records of the log."""
    assert call("train", root, out, changes) == 0
    return log(out)


def refused(capsys, command, *arguments):
    """Return the one-line error of a :func:`call` that must be refused."""
    capsys.readouterr()
    assert call(command, *arguments) == 2
    return one_line(capsys, command)


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


def reference_layout(root, folder):
    """Write the world's reward as the reference stores it and return its section of the YAML."""
    parts = LatentRewardModel.load(root / "reward").save_reference(folder)
    paths = dict(zip(("transformer", "mlp", "pool"), map(str, parts), strict=True))
    return {**paths, "num_heads": 2}
