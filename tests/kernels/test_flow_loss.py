"""flow_loss: mean squared error against noise - latents without widened copies."""

import pytest
import torch
from numerics import assert_within_twice
from op_checks import check_compiled, run, saved_bytes, wide

from prfl_fast.kernels import flow_loss
from prfl_fast.kernels.flow_loss import CHUNK


def naive(velocity, noise, latents):
    target = wide(noise) - wide(latents)
    return torch.nn.functional.mse_loss(wide(velocity), target)


def make(shape, *dtypes):
    names = ("velocity", "noise", "latents")
    return {n: torch.randn(shape).to(d) for n, d in zip(names, dtypes, strict=True)}


def value_and_gradient(function, tensors, double=False):
    copies = {n: t.detach().double() if double else t.detach() for n, t in tensors.items()}
    velocity = copies["velocity"].clone().requires_grad_()
    loss = function(velocity, copies["noise"], copies["latents"])
    (3 * loss).backward()
    return loss.detach(), velocity.grad


@pytest.mark.parametrize(
    "shape", [(), (1,), (7, 13), (2, 16, 3, 8, 12), (CHUNK + 5,), (3, CHUNK // 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target", ["same", torch.float32])
def test_value_and_gradient(shape, dtype, target):
    target = dtype if target == "same" else target
    tensors = make(shape, dtype, target, target)
    out, plain = (value_and_gradient(f, tensors) for f in (flow_loss, naive))
    oracle = value_and_gradient(naive, tensors, double=True)
    for name, *triple in zip(("loss", "d_velocity"), out, plain, oracle, strict=True):
        # In float64 the oracle itself is one of the two roundings compared.
        assert_within_twice(*triple, name=name, rounding=8 if dtype == torch.float64 else 1)
    assert out[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_float64_target_makes_the_loss_float64():
    tensors = make((40,), torch.float32, torch.float64, torch.float32)
    out = flow_loss(**tensors)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, naive(*(t.double() for t in tensors.values())))


def test_bfloat16_velocity_does_not_round_the_target():
    tensors = make((64, 64), torch.bfloat16, torch.float32, torch.float32)
    exact = naive(*(t.double() for t in tensors.values()))
    assert abs(flow_loss(**tensors).item() - exact.item()) < 1e-6 * exact.item()


def test_strided_velocity():
    tensors = make((2, 6, 4, 10), *[torch.float32] * 3)
    moved = {n: t.permute(0, 3, 1, 2) for n, t in tensors.items()}
    assert not moved["velocity"].is_contiguous()
    a, b = value_and_gradient(flow_loss, moved), value_and_gradient(naive, moved)
    torch.testing.assert_close(a, b)


def test_same_bits_twice():
    tensors = make((CHUNK + 17,), torch.bfloat16, torch.float32, torch.float32)
    first, second = (value_and_gradient(flow_loss, tensors) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_saves_its_inputs_only():
    tensors = make((128, 64), torch.bfloat16, torch.float32, torch.float32)
    tensors["velocity"].requires_grad_()
    kept = saved_bytes(lambda: flow_loss(**tensors))
    assert kept == 128 * 64 * (2 + 4 + 4)
    assert saved_bytes(lambda: naive(**tensors)) >= 128 * 64 * 8


def test_gradcheck():
    tensors = make((3, 4), *[torch.float64] * 3)
    velocity = tensors.pop("velocity").requires_grad_()
    assert torch.autograd.gradcheck(lambda v: flow_loss(v, **tensors), velocity)


def test_opcheck():
    tensors = tuple(make((3, 5), torch.bfloat16, torch.float32, torch.float32).values())
    velocity = tensors[0].clone().requires_grad_()
    torch.library.opcheck(torch.ops.prfl_fast.flow_loss, (velocity, *tensors[1:]))
    torch.library.opcheck(torch.ops.prfl_fast.flow_loss_backward, (torch.tensor(2.0), *tensors))


def test_compiles_without_graph_break():
    noise, latents = torch.randn(4, 6), torch.randn(4, 6)
    check_compiled(
        lambda velocity: flow_loss(velocity, noise, latents), {"velocity": torch.randn(4, 6)}
    )


def test_bad_arguments():
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    for args, message in (
        ((x.long(), y, y), "velocity is int64"),
        ((x, torch.ones(3, 2), y), r"noise is float32\[3, 2\].*\[2, 3\]"),
        ((x, y, torch.ones(2)), r"latents is float32\[2\]"),
        ((x[:0], y[:0], y[:0]), "velocity is .*at least one element"),
        ((x, y.to("meta"), y), "noise is .*meta.*on cpu"),
        ((x, torch.ones(2, 3, requires_grad=True), y), r"noise is .*no gradient.*\.detach"),
        ((x, y, torch.ones(2, 3, requires_grad=True)), r"latents is .*no gradient.*\.detach"),
    ):
        with pytest.raises(ValueError, match="flow_loss: " + message):
            flow_loss(*args)


def test_a_gradient_that_nobody_records_is_no_error():
    noise = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        assert flow_loss(torch.zeros(2, 3), noise, torch.zeros(2, 3)) == 1.0


def test_velocity_gradient_through_the_chain():
    noise, latents = torch.randn(5), torch.randn(5)
    out, grads = run(
        lambda v: 2 * flow_loss(v, noise, latents), {"v": torch.randn(5)}, [torch.ones(())]
    )
    assert out[0].shape == () and grads["v"].shape == (5,)
