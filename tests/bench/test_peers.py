"""Memory methods of other libraries: their copies and bytes, counted by hand for a tiny model."""

import pytest
import torch
from bench_runs import assert_rectangular, make_context
from harness import UnavailableError
from suites import peers

pytest.importorskip("diffusers")
pytest.importorskip("peft")

# Weights of a block in float32: 8 square matrices and 2 of the feed-forward layer, 4 norms of
# queries and keys, 1 affine norm. Biases stay.
D, FFN = 32, 64
SWAPPED = 4 * (8 * D * D + 2 * D * FFN + 5 * D)
TENSORS = 15


@pytest.fixture
def small(monkeypatch, one_round):
    sizes = {"latent": (3, 4, 4), "dim": D, "heads": 2, "ffn_dim": FFN, "layers": 6}
    monkeypatch.setattr(peers, "SIZES", sizes)
    monkeypatch.setattr(peers, "TEXT_TOKENS", 5)
    monkeypatch.setattr(peers, "RANK", 1)

    def run(*names):
        monkeypatch.setattr(peers, "ROWS", {n: peers.ROWS[n] for n in (peers.BASE, *names)})
        return make_context()

    return run


def needs_groups():
    source = pytest.importorskip("diffusers.hooks.group_offloading")
    if not hasattr(source, "TorchDeviceBackend"):
        pytest.skip("this diffusers is older than 0.42")


@pytest.mark.slow
def test_copies_and_bytes_of_methods_that_move_weights(small):
    needs_groups()
    groups = "diffusers: groups of a block, whole recompute"
    swap, streamed = "musubi-tuner: 4 of 6 blocks swapped", "prfl_fast: full, weights streamed"
    records, problems = peers.measure(small(groups, swap, streamed))
    assert problems == []
    found = {record["row"]: record for record in records}
    base = found[peers.BASE]
    assert base["copies"] == {} and base["host_bytes"] == 0
    assert found[swap]["copies"] == dict.fromkeys(
        ("to_device", "to_host"), (2 * 4 * TENSORS, 2 * 4 * SWAPPED)
    )
    assert found[swap]["before_bytes"] == base["before_bytes"] - 4 * SWAPPED
    # Both block-sized copies of the last forward are still there when its backward begins.
    count, size = found[streamed]["copies"]["to_device"]
    assert count == 2 * 6 - 2 and found[streamed]["copies"]["to_host"] == (0, 0)
    assert size == count * found[streamed]["host_bytes"] // 6
    assert found[groups]["copies"]["to_device"] == found[groups]["copies"]["to_host"]
    assert all(record["flops"] > 1.3 * base["flops"] for record in records[1:])
    assert_rectangular(peers._table(records, make_context()))


@pytest.mark.slow
def test_offloaded_activations_copy_a_storage_once(small):
    activations = "TRL: activations offloaded"
    records, problems = peers.measure(small(activations))
    assert problems == []
    (base, moved) = records
    saved, back = (moved["copies"][way] for way in ("to_host", "to_device"))
    assert 0 < moved["between_bytes"] < base["between_bytes"]
    assert back[0] < saved[0] and back[1] < saved[1] == moved["host_bytes"]
    assert moved["flops"] == base["flops"]


@pytest.mark.slow
def test_a_wrong_gradient_is_a_problem(small, monkeypatch):
    name = "diffusers: checkpointing"
    context = small(name)
    apply = peers.ROWS[name]

    def wrong(model):
        next(p for p in model.parameters() if p.requires_grad).data.mul_(1.01)
        return apply(model)

    monkeypatch.setitem(peers.ROWS, name, wrong)
    assert peers.measure(context)[1] == [f"{name}: a gradient differs from that of {peers.BASE}"]


@pytest.mark.slow
def test_all_methods(small):
    needs_groups()
    records, problems = peers.measure(small(*peers.ROWS))
    assert problems == [] and [record["row"] for record in records] == list(peers.ROWS)
    found = {record["row"]: record for record in records}
    theirs = found["torch: selective checkpointing, attention"]
    for key in ("between_bytes", "peak_bytes", "flops"):
        assert theirs[key] == found["prfl_fast: attention"][key]
    # A recompute that stops early leaves its block on the device.
    groups = found["diffusers: groups of a block, whole recompute"]["before_bytes"]
    assert found["diffusers: groups of a block"]["before_bytes"] > groups + 5 * SWAPPED
    assert all((r["gradient_off"] > 0) == (r["row"] in peers.ROUNDED) for r in records)


def test_the_suite_needs_a_cpu():
    with pytest.raises(UnavailableError, match="use --device cpu"):
        peers.run(make_context(device=torch.device("cuda")))
