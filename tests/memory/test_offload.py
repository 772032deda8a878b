"""Offloading: bytes held on either side, ownership after exceptions, order of copies and uses."""

import mmap

import pytest
import torch
import wan
from offload_models import SMALL, assert_same, build, gradients, gradients_of_loss, held, loss
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import prfl_fast
from prfl_fast.memory import offload as offloading
from prfl_fast.memory.checkpointing import MODES, activation_checkpointing, offload_bytes
from prfl_fast.memory.ledger import Ledger
from prfl_fast.memory.offload import Handle, HostMemoryError, Offloader, host_memory

pytest.importorskip("diffusers")


EACH_MODE = pytest.mark.parametrize("mode", MODES)


def drop_gradient(parameter):
    parameter.grad = None


@pytest.mark.cases(1)
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
@EACH_MODE
def test_two_blocks_on_the_device_at_most(mode, patched):
    """By the offloader's counts, and by all storages alive, whoever holds them."""
    live, peak = {}, {}
    for layers in (1, 2, 4, 8):
        model = build(layers, mode, patched)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(drop_gradient)
        with Ledger() as ledger:
            value = loss(model)
            live[layers], forward = ledger.live, offload_bytes(model)
            value.backward()
            del value
        backward = offload_bytes(model)
        peak[layers] = ledger.peak
        if layers == 1:
            block = forward["device_peak"]
        assert forward["device_now"] == backward["device_peak"] == min(layers, 2) * block > 0
        assert forward["host_now"] == (layers - 1) * block  # the last has not been copied yet
        # Out go all but the last, back come all but the last two.
        assert backward["transferred"] == block * (max(0, layers - 1) + max(0, layers - 2))
        assert held(model) == (0, 0)
    # Tensors below the limit stay: rows of modulation and statistics of every block.
    for bytes_by_depth in (live, peak):
        assert bytes_by_depth[8] - bytes_by_depth[4] <= 4 * SMALL


@pytest.mark.cases(1)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_two_blocks_at_most_in_the_backward_of_a_graph_that_stays(mode):
    model, seen = build(6, mode), []
    for block in model.blocks:
        block.attn1.to_out[0].weight.register_hook(lambda grad: seen.append(held(model)))
    value = loss(model)
    block = offload_bytes(model)["device_now"] // 2
    for _ in range(2):
        value.backward(retain_graph=True)
        assert max(device for device, _ in seen) == 2 * block
        # Of the graph before this one, which stays as well, nothing is left on the device.
        other = loss(model)
        assert held(model)[0] == 2 * block
        del other


@pytest.mark.cases(1)
@EACH_MODE
def test_models_that_follow_each_other_share_the_two_blocks(mode):
    """Generator, then reward; the reward's backward fetches the generator's last block ahead."""
    generator, reward = build(4, mode), build(3, mode)
    x, timestep, conditions = wan.inputs(size=(2, 4, 4))
    text = conditions["encoder_hidden_states"]
    peak = 0

    def watched(*_):
        nonlocal peak
        peak = max(peak, held(generator)[0] + held(reward)[0])

    for block in (*generator.blocks, *reward.blocks):
        block.register_forward_hook(watched)
        block.attn1.to_out[0].weight.register_hook(watched)

    def run():
        h = generator(x, timestep, text, return_dict=False)[0]
        return reward(h, timestep, text, return_dict=False)[0].square().sum()

    value = run()
    assert held(generator)[0] == 0
    value.backward()
    ours = [gradients(generator), gradients(reward)]
    one = offload_bytes(reward)["device_peak"] // 2
    assert peak == 2 * one
    for model in (generator, reward):
        assert held(model) == (0, 0)
        activation_checkpointing(model, "none")
    run().backward()
    assert_same([gradients(generator), gradients(reward)], ours)


def test_host_buffers_serve_again():
    model = build()
    for _ in range(3):
        gradients_of_loss(model)
    now = offload_bytes(model)
    assert now["host_pool"] == now["host_peak"] > 0
    loss(model, size=(3, 4, 6)).backward()
    assert offload_bytes(model)["host_pool"] > now["host_pool"]


def test_host_limit_raises_before_it_is_passed():
    model = build(6)
    plain, need = gradients_of_loss(model), offload_bytes(model)["host_peak"]
    activation_checkpointing(model, "none", "cpu", host_limit=need)
    assert_same(gradients_of_loss(model), plain)
    activation_checkpointing(model, "none", "cpu", host_limit=need - 1)
    for _ in range(2):
        with pytest.raises(HostMemoryError, match="bytes in use, expected at most") as caught:
            loss(model)
        assert str(need - 1) in str(caught.value) and "Raise host_limit" in str(caught.value)
        del caught
        assert held(model) == (0, 0)
        assert offload_bytes(model)["host_pool"] <= need - 1
    # Buffers of another size make room.
    loss(model, size=(1, 4, 4)).backward()
    model.zero_grad(set_to_none=True)
    activation_checkpointing(model, "full", "cpu", host_limit=need - 1)
    assert_same(gradients_of_loss(model), plain)


def test_buffers_of_old_sizes_make_room():
    model = build(4, "full")
    loss(model, size=(4, 4, 4)).backward()
    limit = offload_bytes(model)["host_pool"]
    activation_checkpointing(model, "full", "cpu", host_limit=limit)
    with Ledger() as ledger:
        for frames in (2, 4, 3, 4):
            loss(model, size=(frames, 4, 4)).backward()
            assert offload_bytes(model)["host_pool"] <= limit
    assert 0 < ledger.host_peak <= limit


def test_default_limit_is_what_is_available(monkeypatch):
    available, total = host_memory()
    assert 0 < available <= total
    model = build()
    monkeypatch.setattr(offloading, "host_memory", lambda: (1000 + 2**20, 10 * 2**20))
    with pytest.raises(RuntimeError, match="offload=None"):
        loss(model)
    monkeypatch.setattr(offloading, "host_memory", lambda: (2**30, 10 * 2**20))
    loss(model).backward()


def test_page_locked_buffers_are_whole_pages_and_unlocked_after_the_copies(monkeypatch):
    calls, page = [], mmap.PAGESIZE

    class Runtime:
        code = 0

        def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
            calls.append(("lock", address, nbytes))
            return self.code

        def cudaHostUnregister(self, address):  # noqa: N802
            calls.append(("unlock", address))

    class Stream:
        device = torch.device("cpu")

        def synchronize(self):
            calls.append("wait")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    buffer = offloading._page_locked(page + 5, Stream())
    address = buffer.data_ptr()
    assert buffer.nbytes == page + 5 and address % page == 0
    buffer.fill_(1)
    del buffer
    assert calls == [("lock", address, 2 * page), "wait", ("unlock", address)]
    Runtime.code = 2
    with pytest.raises(HostMemoryError, match=r"could not lock 9 bytes of host memory \(error 2\)"):
        offloading._page_locked(9, Stream())


# What is offloaded.
def pack_all(*tensors, block=None, x=None, shared=()):
    offloader = Offloader()
    group = offloader.open(block or nn.Linear(4, 4), x or torch.ones(1), shared)
    return offloader, group, [group.pack(tensor) for tensor in tensors]


def there_and_back(group):
    group.copy_to_host()
    group.leave_device()


def offloaded(*tensors):
    offloader, group, handles = pack_all(*tensors)
    there_and_back(group)
    return offloader, handles


def test_a_storage_is_copied_once_and_views_come_back():
    base = torch.randn(8, 6, 4)
    views = [base, base[2:4], base.transpose(0, 2), base.view(-1)[5:90:7], base.view(torch.int32)]
    values = [view.clone() for view in views]
    offloader, handles = offloaded(*views)
    assert offloader.bytes["host_now"] == base.nbytes and offloader.bytes["device_now"] == 0
    for handle, view, value in zip(handles, views, values, strict=True):
        back = handle.unpack()
        assert torch.equal(back, value) and back.dtype == view.dtype
        assert back.stride() == view.stride() and back.storage_offset() == view.storage_offset()
        assert back.untyped_storage()._cdata != base.untyped_storage()._cdata
    assert offloader.bytes["device_now"] == base.nbytes
    del handle, handles
    assert offloader.bytes["host_now"] == offloader.bytes["device_now"] == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex128, torch.float8_e4m3fn, torch.int64])
def test_dtypes(dtype):
    tensor = torch.randn(16, 16).to(dtype)
    offloader, (handle,) = offloaded(tensor)
    assert offloader.bytes["host_now"] == tensor.nbytes
    assert torch.equal(handle.unpack().view(torch.uint8), tensor.view(torch.uint8))


def test_a_stream_beside_the_input_leaves_with_it():
    both = torch.randn(2, 40, 8)
    x, text = both.split((32, 8), dim=1)
    offloader = Offloader()
    group = offloader.open(nn.Linear(4, 4), x, [text, None])
    handles = [group.pack(tensor) for tensor in (x, text)]
    there_and_back(group)
    assert offloader.bytes["host_now"] == both.nbytes and offloader.bytes["device_now"] == 0
    assert torch.equal(torch.cat([handle.unpack() for handle in handles], 1), both)


def test_what_stays(monkeypatch):
    monkeypatch.setattr(offloading, "SMALLEST", 4096)
    block, shared = nn.Linear(64, 64), torch.randn(64, 64)
    block.register_buffer("table", torch.randn(64, 64))
    other = nn.Parameter(torch.randn(64, 64))  # as FSDP's gathered ones, made inside the call
    stay = [
        torch.randn(16, 16),
        block.weight,
        block.weight.t(),
        block.weight.detach()[1:],
        block.table.view(-1),
        shared,
        shared[3:],
        other,
        other.t(),
        torch.randn(64, 64, dtype=torch.complex64).conj(),
        torch.empty(64, 64, device="meta"),
    ]
    offloader, group, handles = pack_all(*stay, block=block, shared=[shared, None, "rope"])
    group.copy_to_host()
    assert offloader.bytes["device_peak"] == offloader.bytes["host_peak"] == 0
    for handle, tensor in zip(handles, stay, strict=True):
        assert handle.unpack().untyped_storage()._cdata == tensor.untyped_storage()._cdata


@pytest.mark.parametrize("moves", [True, False])
def test_changed_in_place_raises(moves):
    base = torch.randn(16, 16) if moves else torch.randn(2)
    offloader, (handle,) = offloaded(base.t())
    assert (offloader.bytes["host_now"] > 0) == moves
    handle.unpack()
    base.view(-1).add_(1)  # through another view
    with pytest.raises(RuntimeError, match="modified by an inplace operation.*at version 1"):
        handle.unpack()


def test_saved_before_and_after_a_change_are_two():
    base = torch.zeros(16, 16)
    _, group, (old,) = pack_all(base)
    group.copy_to_host()
    base.add_(1)
    new = group.pack(base)
    there_and_back(group)
    assert torch.equal(new.unpack(), torch.ones(16, 16))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.unpack()


# Exceptions.
class LateCopies:
    """Stands in for a device whose copies run only when a stream waits for them."""

    def __init__(self, monkeypatch):
        self.queue, self.early = [], 0
        late = self

        class Event:
            done = False

        class Stream:
            def wait_event(self, event):
                while not event.done:
                    target, source, first = late.queue.pop(0)
                    target.copy_(source)
                    first.done = True

            def record_stream(self, stream):
                raise AssertionError("one compute stream")

        stream = Stream()

        def copy(window, target, source, after):
            assert after is stream
            target.fill_(77)  # what is read before the copy has run is wrong
            event = Event()
            late.queue.append((target, source, event))
            return event

        drop = offloading._Saved._drop

        def checked_drop(saved):
            drop(saved)
            late.early += saved._copied is not None and not saved._copied.done

        monkeypatch.setattr(offloading._Window, "copy", copy)
        monkeypatch.setattr(offloading._Window, "compute_stream", lambda window: stream)
        monkeypatch.setattr(offloading._Saved, "_drop", checked_drop)


@pytest.mark.cases(1)
@EACH_MODE
def test_every_use_and_every_release_waits_for_its_copy(mode, monkeypatch):
    model, plain = build(6, mode), gradients_of_loss(build(6, offload=None))
    late = LateCopies(monkeypatch)
    for _ in range(3):  # host buffers serve again while copies are pending
        first, second = loss(model), loss(model)
        del second  # its copies are pending
        first.backward()
        assert_same(gradients(model), plain)
        del first
    assert late.early == 0
    assert held(model) == (0, 0)


@EACH_MODE
def test_copies_run_one_block_ahead(mode, monkeypatch):
    """In the backward a block finds its tensors already asked for, by the block after it."""
    model, waited, asked = build(6, mode), [], []
    fetch, storage = offloading.Group.fetch, offloading._Saved.storage
    monkeypatch.setattr(
        offloading.Group, "fetch", lambda group: (asked.append(id(group)), fetch(group))[1]
    )

    def checked(saved):
        if not waited or waited[-1] != id(saved._group):
            waited.append(id(saved._group))
            late.append(saved._device is None)
        return storage(saved)

    late = []
    monkeypatch.setattr(offloading._Saved, "storage", checked)
    loss(model).backward()
    assert len(waited) == 6 and not any(late)


# Fake tensors, as the planner uses them.
@pytest.mark.cases(1)
@EACH_MODE
def test_fake_tensors_count_the_same_bytes(mode, monkeypatch):
    real = build(4, mode)
    loss(real).backward()
    monkeypatch.setattr(offloading, "host_memory", lambda: (0, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(4, mode)
        with Ledger() as ledger:
            value = loss(model)
            value.backward()
    del value
    assert offload_bytes(model) == offload_bytes(real)
    assert ledger.host_peak == offload_bytes(real)["host_peak"]
    block = offload_bytes(real)["device_peak"] // 2
    assert any(categories["checkpoints"] >= 2 * block for _, categories in ledger.timeline)


def test_handle_keeps_no_memory_of_what_is_saved():
    tensor = torch.randn(64, 64, requires_grad=True) * 2
    _, _, (handle,) = pack_all(tensor)
    assert isinstance(handle, Handle) and handle._alias.untyped_storage().nbytes() == 0


@pytest.mark.gpu
@EACH_MODE
def test_on_cuda(mode):
    """Real streams: the same gradients, and memory that does not grow with depth."""
    torch.use_deterministic_algorithms(True)
    try:
        peaks = {}
        for layers in (4, 16):
            model = wan.tiny_wan(layers=layers, heads=8, head_dim=64).cuda().bfloat16()
            prfl_fast.patch(model)
            x, timestep, conditions = wan.inputs(size=(5, 32, 32), batch=1)
            x, timestep = x.cuda().bfloat16(), timestep.cuda()
            text = conditions["encoder_hidden_states"].cuda().bfloat16()

            def run(model=model, x=x, timestep=timestep, text=text):
                out = model(x, timestep, text, return_dict=False)[0]
                out.float().square().sum().backward()
                return gradients(model)

            plain = run()
            activation_checkpointing(model, mode, "cpu")
            for _ in range(3):
                assert_same(run(), plain)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            parameters = sum(p.nbytes for p in model.parameters())
            peaks[layers] = torch.cuda.max_memory_allocated() - before - parameters
            assert held(model) == (0, 0)
        assert peaks[16] <= 1.1 * peaks[4] + (4 << 20)
    finally:
        torch.use_deterministic_algorithms(False)
