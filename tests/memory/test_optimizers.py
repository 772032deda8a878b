"""AdamW of every kind: what it computes, what it stores, and how many bytes that takes."""

import io
import sys

import pytest
import torch
from allocations import allocator_peak
from compiled import run_python
from offload_models import assert_same
from torch import nn

from prfl_fast.memory import optimizers
from prfl_fast.memory.ledger import Ledger
from prfl_fast.memory.optimizers import (
    KINDS,
    MasterAdamW,
    gradient_norm,
    make_optimizer,
    set_learning_rate,
    state_bytes,
    step_bytes,
)
from prfl_fast.utils.optional import MissingExtraError

HERE = [kind for kind in KINDS if kind != "paged-adamw8bit"]  # what runs without CUDA
SHAPES = [(64, 256), (7,), (4096,), (63, 65), (), (2, 16, 128)]
RATE = 5e-6  # PRFL's


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.grad_dtype)


def take(optimizer, params, seeds):
    for seed in seeds:
        torch.manual_seed(seed)  # of the stochastic rounding
        give_gradients(params, seed)
        optimizer.step()


def resume(make, optimizer, params):
    """Return ``make()``'s parameters and optimizer with the values and the state of these."""
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed, again = make()
    for p, weight in zip(resumed, weights, strict=True):
        p.data.copy_(weight)
    again.load_state_dict(state)
    return resumed, again


def tensors(state):
    for value in state.values():
        if hasattr(value, "__tensor_flatten__"):
            yield from (getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor):
            yield value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", HERE)
def test_predicted_bytes_are_those_of_the_states(kind, dtype):
    params = parameters(dtype)
    if dtype is torch.float64 and kind in ("adamw-sr", "adamw8bit"):
        with pytest.raises(ValueError, match=r"parameter 0 is torch.float64, expected torch"):
            make_optimizer(kind, params, learning_rate=RATE)
        with pytest.raises(ValueError, match=r"parameter \[7\] is torch.float64"):
            state_bytes(kind, (7,), dtype)
        return
    optimizer = make_optimizer(kind, params, learning_rate=RATE)
    take(optimizer, params, [0])
    real = [sum(t.untyped_storage().nbytes() for t in tensors(optimizer.state[p])) for p in params]
    predicted = [state_bytes(kind, p.shape, dtype) for p in params]
    assert [sum(pair) for pair in predicted] == real
    assert all(pair[kind != "adamw-cpu"] == 0 for pair in predicted)


def test_predicted_bytes_of_paged_states_are_those_of_bitsandbytes():
    import bitsandbytes

    params = parameters(shapes=[(300, 400), (100, 1000), (99, 1000), (4096,), (4095,), (65, 64)])
    optimizer = bitsandbytes.optim.AdamW8bit(params)  # paged ones are the same, but for where
    give_gradients(params, 0)
    optimizer.step()
    for p in params:
        state = optimizer.state[p]
        moments = state["state1"].nbytes + state["state2"].nbytes
        scales = sum(state[name].nbytes for name in ("absmax1", "absmax2") if name in state)
        paged = p.numel() >= 1e5
        expected = (scales, moments) if paged else (scales + moments, 0)
        assert state_bytes("paged-adamw8bit", p.shape, p.dtype) == expected


@pytest.mark.cases(1)
@pytest.mark.parametrize("gradients", ["parameter", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HERE)
def test_saved_and_loaded_it_goes_on_bit_for_bit(kind, dtype, gradients):
    def make():
        params = parameters(dtype)
        return params, make_optimizer(
            kind, params, learning_rate=1e-2, weight_decay=0.1, gradient_dtype=gradients
        )

    params, optimizer = make()
    take(optimizer, params, range(3))
    resumed, again = resume(make, optimizer, params)
    take(optimizer, params, range(3, 6))
    take(again, resumed, range(3, 6))
    assert_same(resumed, params)
    for p, q in zip(params, resumed, strict=True):
        assert_same(list(tensors(again.state[q])), list(tensors(optimizer.state[p])))


def test_paged_states_are_put_back_in_buffers_of_their_own(monkeypatch):
    """On the CPU, where bitsandbytes pages nothing: what is asked for again, and what is in it."""
    made = []
    paged = optimizers._paged_class()
    buffer = paged.get_state_buffer
    monkeypatch.setattr(
        paged, "get_state_buffer", lambda *a, **k: made.append(buffer(*a, **k)) or made[-1]
    )

    def make():
        made.clear()
        params = parameters(shapes=[(300, 400), (100,), (4096,)])
        return params, paged(params, lr=1e-2)

    params, optimizer = make()
    take(optimizer, params, range(2))
    resumed, again = resume(make, optimizer, params)
    held = [again.state[p][name] for p in resumed for name in ("state1", "state2")]
    assert [id(t) for t in held] == [id(t) for t in made]
    take(optimizer, params, range(2, 4))
    take(again, resumed, range(2, 4))
    assert_same(resumed, params)


@pytest.mark.parametrize("kind", HERE)
def test_the_rate_can_be_changed(kind):
    params = parameters(torch.bfloat16)
    optimizer = make_optimizer(kind, params, learning_rate=0.5)
    before = [p.detach().clone() for p in params]
    set_learning_rate(optimizer, 0.0)
    take(optimizer, params, [0])
    assert_same(params, before)
    set_learning_rate(optimizer, 0.5)
    take(optimizer, params, [1])
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_float32_adamw_is_torchs():
    optimizer = make_optimizer("adamw", parameters(), learning_rate=RATE)
    assert type(optimizer) is torch.optim.AdamW and not optimizer.defaults["fused"]


@pytest.mark.parametrize("on_host", [False, True])
def test_masters_are_the_float32_trajectory(on_host):
    kind = "adamw-cpu" if on_host else "adamw"
    # The mixed layout of diffusers, and a parameter that has no gradient in every second step.
    params = parameters(torch.bfloat16) + parameters(torch.float32, [(5, 3), (300,)])
    wide = [nn.Parameter(p.detach().float().clone()) for p in params]
    options = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    optimizer = make_optimizer(kind, params, learning_rate=1e-3, **options)
    assert isinstance(optimizer, MasterAdamW)
    oracle = torch.optim.AdamW(wide, lr=1e-3, fused=True, **options)
    for seed in range(6):
        give_gradients(params, seed)
        params[0].grad = None if seed % 2 else params[0].grad
        for p, q in zip(params, wide, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        oracle.step()
    for p, q in zip(params, wide, strict=True):
        assert torch.equal(p, q.to(p.dtype))
        assert ("master" in optimizer.state[p]) == (on_host or p.dtype is torch.bfloat16)
        assert torch.equal(optimizer.state[p].get("master", p), q)


def test_rounding_to_nearest_stands_still_at_the_usual_rate():
    weight = torch.linspace(0.01, 2, 4096).bfloat16()
    plain, master = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    plain_optimizer = torch.optim.AdamW([plain], lr=RATE, weight_decay=0.01)
    optimizer = make_optimizer("adamw", [master], learning_rate=RATE)
    for _ in range(100):
        plain.grad = torch.ones_like(plain)
        master.grad = torch.ones_like(master)
        plain_optimizer.step()
        optimizer.step()
    assert torch.equal(plain, weight)
    moved = optimizer.state[master]["master"] - weight.float()
    torch.testing.assert_close(moved, torch.full_like(moved, -100 * RATE), rtol=0.03, atol=0)


def run(kinds, weights, gradients):
    """Displacements of every weight after one step of size RATE per gradient, by kind."""
    params = [nn.Parameter(weight.clone()) for weight in weights]
    optimizers = [
        make_optimizer(kind, [p], learning_rate=RATE) for kind, p in zip(kinds, params, strict=True)
    ]
    for gradient in gradients:
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = gradient.to(p.dtype)
            optimizer.step()
    return [p.detach().float() - w.float() for p, w in zip(params, weights, strict=True)]


@pytest.mark.slow
def test_stochastic_rounding_follows_float32_in_expectation():
    generator = torch.Generator().manual_seed(1)
    start = torch.empty(16384).uniform_(0.02, 1, generator=generator).bfloat16()
    mean = torch.randn(start.shape, generator=generator) * torch.logspace(0, -3, len(start))
    noise = torch.randn(100, len(start), generator=generator) * 0.5 * mean.abs()
    torch.manual_seed(2)
    # Twelve seeds: each weight draws its own numbers.
    *moved, oracle = run(
        ["adamw-sr"] * 12 + ["adamw"], [start] * 12 + [start.float()], (mean + noise).bfloat16()
    )
    moved = torch.stack(moved)
    # A single weight jumps by whole spacings; it is the mean that is right.
    assert (moved[0] == 0).float().mean() > 0.5 and oracle.abs().min() > 0
    slopes = (moved * oracle).sum(1) / oracle.square().sum()
    error = slopes.std() / len(slopes) ** 0.5
    assert error < 0.02 and abs(slopes.mean() - 1) < 4 * error
    # Nor is there a bias in one direction, at any size of gradient.
    for part, whole in zip((moved - oracle).chunk(4, 1), oracle.chunk(4), strict=True):
        bias = part.mean(1)
        error = bias.std() / len(bias) ** 0.5
        assert error < 0.1 * whole.abs().mean() and abs(bias.mean()) < 4 * error


@pytest.mark.slow
def test_8bit_moments_follow_float32_roughly():
    """Measured: 4 % root-mean-square, 2 % median, where noise dominates the gradients.

    A gradient that always stays below 1/2000 of the largest in its block of 256 has a second moment
    that rounds to zero: such a weight, 2 of 1000 here, steps up to 60 times as far as the others.
    """
    generator = torch.Generator().manual_seed(1)
    start, mean = torch.randn(2, 16384, generator=generator)
    noise = torch.randn(100, len(start), generator=generator)
    kinds = ["adamw8bit", "adamw"]
    moved, oracle = run(kinds, [start, start], mean + 3 * noise)
    assert (moved - oracle).norm() < 0.06 * oracle.norm()
    assert abs((moved @ oracle) / (oracle @ oracle) - 1) < 0.01
    moved, oracle = run(kinds, [start, start], mean * (1 + noise / 2))
    ratio = (moved - oracle).abs() / oracle.abs()
    assert ratio.median() < 0.03
    assert 0 < (ratio > 1).float().mean() < 0.004


def test_8bit_moments_round_bfloat16_weights_stochastically():
    start = torch.full((65536,), 0.75, dtype=torch.bfloat16)
    torch.manual_seed(2)
    moved, oracle = run(["adamw8bit", "adamw"], [start, start.float()], torch.ones(20, len(start)))
    error = float(moved.std()) / len(moved) ** 0.5
    assert 0 < error < 0.1 * float(oracle[0].abs())
    assert abs(float(moved.mean() - oracle[0])) < 4 * error


def test_small_states_of_8bit_adamw_are_float32():
    p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = make_optimizer("adamw8bit", [p], learning_rate=RATE)
    take(optimizer, [p], range(2))
    assert {optimizer.state[p][n].dtype for n in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_float32_gradients_keep_what_bfloat16_loses():
    sums = {}
    for gradients in ("parameter", "fp32"):
        (p,) = parameters(torch.bfloat16, [(8,)])
        p.grad = torch.zeros_like(p)  # of a run before, in the parameter's dtype
        make_optimizer("adamw", [p], learning_rate=RATE, gradient_dtype=gradients)
        for _ in range(1000):
            (p * 1.0).sum().backward()
        sums[gradients] = p.grad
    assert sums["parameter"].dtype is torch.bfloat16 and sums["fp32"].dtype is torch.float32
    assert torch.equal(sums["fp32"], torch.full((8,), 1000.0))
    assert float(sums["parameter"].max()) == 256  # 256 + 1 rounds to 256


def test_norm_is_float32_and_that_of_torch():
    params = parameters()
    give_gradients(params, 0)
    gradients = [p.grad for p in params]
    assert_same(gradient_norm(gradients), nn.utils.get_total_norm(gradients))
    half = [g.bfloat16() for g in gradients]
    norm = gradient_norm(half)
    exact = torch.cat([g.double().flatten() for g in half]).norm()
    assert norm.dtype is torch.float32
    torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=0)


def test_clipping_and_stepping_make_no_second_copy_of_the_gradients():
    params = parameters(torch.bfloat16, [(64, 1024)] * 8)
    optimizer = make_optimizer("adamw", params, learning_rate=RATE, gradient_dtype="fp32")
    take(optimizer, params, [0])
    give_gradients(params, 1)
    addresses = [p.grad.data_ptr() for p in params]
    with Ledger() as ledger:
        norm = gradient_norm([p.grad for p in params])
        nn.utils.clip_grads_with_norm_(params, 1.0, norm)
        optimizer.step()
    assert addresses == [p.grad.data_ptr() for p in params]
    assert gradient_norm([p.grad for p in params]) <= 1.0001
    assert ledger.peak < 1000
    # Gradients in bfloat16 are widened one at a time.
    optimizer = make_optimizer("adamw", params, learning_rate=RATE)
    take(optimizer, params, [0])
    with Ledger() as ledger:
        optimizer.step()
    assert 4 * 64 * 1024 <= ledger.peak < 4 * 64 * 1024 + 1000


@pytest.mark.cases(2)
@pytest.mark.parametrize("gradients", ["parameter", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw-sr", "adamw8bit"])
def test_a_step_is_bounded_by_its_parts(kind, dtype, gradients, monkeypatch):
    monkeypatch.setattr(optimizers, "STEP_ELEMENTS", 1 << 16)
    params = parameters(dtype, [(1000, 256), (64, 256)])
    optimizer = make_optimizer(kind, params, learning_rate=RATE, gradient_dtype=gradients)
    take(optimizer, params, [0])
    give_gradients(params, 1)
    bound = step_bytes(kind, params)
    assert 0.4 * bound < allocator_peak(optimizer.step) <= bound < 16 * 4 << 16


@pytest.mark.parametrize("kind", ["adamw-sr", "adamw8bit"])
def test_parts_of_a_step_have_the_bits_of_a_whole_one(kind, monkeypatch):
    def final():
        params = parameters(shapes=[(33, 256), (64, 256), (63, 65)])  # float32: nothing is drawn
        optimizer = make_optimizer(kind, params, learning_rate=1e-2, weight_decay=0.1)
        take(optimizer, params, range(3))
        return [*params, *(t for p in params for t in tensors(optimizer.state[p]))]

    whole = final()
    monkeypatch.setattr(optimizers, "STEP_ELEMENTS", 4096)
    assert_same(final(), whole)


def test_a_sharded_parameter_is_updated_whole(monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(optimizers, "STEP_ELEMENTS", 4096)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        for kind in ("adamw-sr", "adamw8bit"):
            (plain,) = parameters(shapes=[(32, 256)])
            sharded = nn.Parameter(DTensor.from_local(plain.detach().clone(), mesh, [Shard(0)]))
            plain.grad = torch.ones(32, 256)
            sharded.grad = DTensor.from_local(plain.grad, mesh, [Shard(0)])
            for p in (plain, sharded):
                make_optimizer(kind, [p], learning_rate=RATE).step()
            assert_same([sharded.detach().to_local()], [plain])
    finally:
        torch.distributed.destroy_process_group()


def test_parts_of_a_step_round_stochastically(monkeypatch):
    monkeypatch.setattr(optimizers, "STEP_ELEMENTS", 4096)
    test_8bit_moments_round_bfloat16_weights_stochastically()


@pytest.mark.parametrize(
    ("kind", "params", "gradients", "message"),
    [
        ("adam", parameters(), "parameter", "optimizer is 'adam', expected one of 'adamw', "),
        ("adamw", parameters(), "half", "gradient_dtype is 'half', expected"),
        ("adamw", [], "parameter", r"parameters is \[\], expected at least one"),
        ("adamw", parameters(torch.float16), "parameter", "parameter 0 is torch.float16, ex"),
        ("paged-adamw8bit", parameters(torch.bfloat16), "parameter", "expected torch.float32 for"),
        ("paged-adamw8bit", parameters(), "parameter", "on a CUDA device; adamw8bit does not"),
    ],
)
def test_bad_arguments(kind, params, gradients, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(kind, params, learning_rate=RATE, gradient_dtype=gradients)


@pytest.mark.slow
def test_libraries_are_imported_when_asked_for_and_silently(tmp_path):
    script = """
        import sys, torch, prfl_fast
        from prfl_fast.memory.optimizers import make_optimizer
        p = torch.nn.Parameter(torch.ones(3))
        make_optimizer("adamw", [p], learning_rate=1.0)
        assert not {"torchao", "bitsandbytes"} & set(sys.modules)
        make_optimizer("adamw8bit", [p], learning_rate=1.0)
        assert "torchao" in sys.modules and "bitsandbytes" not in sys.modules
    """
    done = run_python(script, cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw-sr", "adamw8bit"])
def test_the_compiled_step_is_the_eager_one(kind, dtype):
    results = []
    for compiled in (False, True):
        (p,) = parameters(dtype, [(32, 256)])
        optimizer = make_optimizer(kind, [p], learning_rate=1e-2, gradient_dtype="fp32")
        step = super(type(optimizer), optimizer).step if compiled else optimizer.step
        for seed in range(3):
            give_gradients([p], seed)
            step()
        results.append(p.detach())
    # Stochastic rounding draws other numbers: a spacing for each of the three steps.
    tolerance = {"rtol": 3 * 2**-7, "atol": 3e-4} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(*results, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda(kind, dtype, device="cuda"):
    """Real copies and compiled steps: near float32's trajectory; loaded, it goes on bit for bit."""
    if kind == "paged-adamw8bit" and dtype is torch.bfloat16:
        pytest.skip("paged-adamw8bit trains float32")
    shapes = [(1024, 512)] * 5 + SHAPES
    wide, start = parameters(shapes=shapes), parameters(dtype, shapes)
    with torch.no_grad():
        for q, p in zip(wide, start, strict=True):
            q.copy_(p)
    oracle = torch.optim.AdamW(wide, lr=0.1)

    def make():
        params = [nn.Parameter(p.detach().to(device, copy=True)) for p in start]
        return params, make_optimizer(kind, params, learning_rate=0.1)

    runs = [make()]
    for seed in range(4):
        if seed == 2:
            params, optimizer = runs[0]
            runs.append(resume(make, optimizer, params))
        for params, optimizer in runs:
            take(optimizer, params, [seed])
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.cpu().float()
        oracle.step()
    (params, _), (resumed, _) = runs
    for p, twin, q, before in zip(params, resumed, wide, start, strict=True):
        assert torch.equal(p, twin)
        moved, expected = p.detach().cpu().float() - before.float(), q.detach() - before.float()
        assert (moved - expected).abs().median() < 0.05 * expected.abs().median()
        if kind in ("adamw", "adamw-cpu"):
            tolerance = {"rtol": 2**-8} if dtype is torch.bfloat16 else {"rtol": 1e-4}
            torch.testing.assert_close(p.detach().cpu().float(), q.detach(), atol=1e-5, **tolerance)


def test_an_error_leaves_parameters_as_they_were(monkeypatch):
    """Of a missing library, and of a number that the library refuses."""
    made = optimizers._stochastic_class
    monkeypatch.setattr(optimizers, "_stochastic_class", made.__wrapped__)  # without its cache
    params = parameters(torch.bfloat16)
    give_gradients(params, 0)
    before = [p.grad for p in params]
    options = {"learning_rate": RATE, "gradient_dtype": "fp32"}
    with pytest.raises(ValueError, match="[Ll]earning rate"):
        make_optimizer("adamw8bit", params, **options | {"learning_rate": -1.0})
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(MissingExtraError, match="torchao is not installed"):
        make_optimizer("adamw8bit", params, **options)
    assert all(p.grad is g and p.grad_dtype == p.dtype for p, g in zip(params, before, strict=True))
