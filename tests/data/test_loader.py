"""Workers read the same batches, from any position, and their end does not end the run."""

import gc
import os
import signal
import time

import pytest
import torch
from runs import samples

from prfl_fast.data import Batches, LoadedBatches, write_dataset


def same(a, b):
    parts = [(a.latents, b.latents), *((a.conditions[k], b.conditions[k]) for k in b.conditions)]
    return a.labels == b.labels and all(torch.equal(x, y) for x, y in parts)


@pytest.fixture
def batches(tmp_path):
    """Batches of two buckets."""
    items = [*samples(5), *samples(4, 1, size=(3, 4, 6), rows=2)]
    return Batches(write_dataset(tmp_path, items), 2, seed=3)


def test_workers_read_the_same_bits_from_any_position(batches):
    torch.manual_seed(1)
    state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    loaded = LoadedBatches(batches, 2)
    for n in (*range(7), 2, 3, 11):  # an objective goes back after an error
        assert same(loaded[n], batches[n])
    assert torch.equal(torch.get_rng_state(), state)
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_an_unreadable_sample_is_one_line_and_reading_goes_on(batches):
    path = batches.dataset.files()[batches.order.indices(*batches.order.place(2))[0]]
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    loaded = LoadedBatches(batches, 1)
    assert same(loaded[1], batches[1])
    with pytest.raises(ValueError) as error:
        loaded[2]
    with pytest.raises(ValueError) as direct:
        batches[2]
    assert str(error.value) == str(direct.value) and "\n" not in str(error.value)
    path.write_bytes(content)
    assert same(loaded[2], batches[2])


def test_workers_end_at_once_in_a_reference_cycle(batches):
    """Errors and trainers are in such cycles; torch would wait five seconds for each worker."""
    cycle = {"loaded": LoadedBatches(batches, 2)}
    cycle["itself"] = cycle
    assert same(cycle["loaded"][0], batches[0])
    del cycle
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 4


def test_a_worker_that_is_killed_is_replaced_by_the_run_itself(batches, caplog):
    loaded = LoadedBatches(batches, 1)
    assert same(loaded[0], batches[0])
    (worker,) = loaded._iterators[0]._workers
    assert os.getpgid(worker.pid) != os.getpgid(0)  # Ctrl-C does not reach it
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    for n in range(1, 6):  # two were read ahead
        assert same(loaded[n], batches[n])
    assert loaded.workers == 0 and "Batches are read without workers from now on" in caplog.text
    with pytest.raises(ValueError, match="workers is 0, expected a positive integer"):
        LoadedBatches(batches, 0)
