"""Tests that every operation passes: a subclass of a class here describes one operation."""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from dtypes import BF16, FP8, FP32, FP64
from e4m3 import assert_one_step, assert_quantizes
from op_checks import (
    RecordedCalls,
    Tensors,
    assert_same_bits,
    bind,
    check,
    check_compiled,
    check_compiled_once,
    check_deterministic,
    check_expanded_gradient,
    check_far_tensors,
    outputs_of,
    random_gradients,
    run,
)
from torch.utils._pytree import tree_map_only

from prfl_fast.kernels.runtime.triton import INTERPRETING


class DescribedOperation:
    """One operation, the tests of its refusals and of tensors past 32-bit offsets.

    A function that a subclass names is not a method.

    Attributes:
        op: name of the operator in ``torch.ops.prfl_fast``, and in errors unless ``name`` is given.
        function: the public function of named tensors and other arguments.
        naive: the same in ordinary PyTorch, without the package; float64 makes it the oracle.
        reference: the module's reference, of other arguments.
        public: the public function itself, where ``function`` calls it with other arguments.
        good: gives good arguments, one of which ``bad_arguments`` replaces.
        bad_arguments: changes of ``good()`` and what the error says after the operation's name.
        at_length: gives the arguments of a call with that many tokens, for one graph of all
            lengths.
        far_shapes: those of tensors whose axis of 3 takes steps of 2³⁰ elements.
    """

    op: str
    name: str | None = None
    function: Callable
    naive: Callable
    reference: Callable | None = None
    public: Callable | None = None
    good: Callable[[], dict]
    bad_arguments: list[tuple[dict, str]] = []
    at_length: Callable[[int], dict]
    far_shapes: Sequence[tuple[int, ...]] = ((1, 3, 64), (3, 1, 64))

    def __init_subclass__(cls) -> None:
        for name in ("function", "naive", "reference", "public"):
            if callable(found := cls.__dict__.get(name)):
                setattr(cls, name, staticmethod(found))

    @classmethod
    def operator(cls, suffix: str = "") -> Callable:
        """Return the registered operator, or its backward."""
        return getattr(torch.ops.prfl_fast, f"{cls.op}{suffix}")

    @classmethod
    def call_reference(cls, **given) -> object:
        """Return what the reference gives for arguments of ``function``."""
        defaults = inspect.signature(cls.function).parameters
        names = inspect.signature(cls.reference).parameters
        every = {n: defaults[n].default for n in names if n in defaults} | given
        return cls.reference(**{n: every[n] for n in names if n in every})

    def test_bad_arguments(self, bad_argument):
        change, message = bad_argument
        pattern = f"^({self.name or self.op}|prfl_fast.kernels): {message}"
        with pytest.raises(ValueError, match=pattern) as error:
            (self.public or self.function)(**(self.good() | change))
        assert ", expected " in str(error.value)

    def test_integers_sparse_tensors_and_other_devices_are_refused(self):
        """Refuse integers, and a sparse tensor or one elsewhere, in place of each tensor."""
        first = next(iter(self.examples(FP32)))
        given = first if isinstance(first, dict) else first[0] | first[1]
        for name, tensor in given.items():
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            wrong = [(tensor.long(), rf"({name}|tensors\[\d\]) is int64")]
            if tensor.dtype != FP8:
                wrong.append((tensor.to_sparse(), r"\S+ is sparse_coo .*, expected "))
            if len(given) > 1:
                wrong.append((tensor.to("meta"), r"\S+ is .* on (meta|cpu), expected a tensor on"))
            for value, message in wrong:
                with pytest.raises(ValueError, match=f"^{self.name or self.op}: {message}"):
                    self.function(**given | {name: value})

    @pytest.mark.triton
    def test_offsets_past_int32(self, sparse_storage):
        """Read far tokens and far samples, of every tensor that has them."""
        for shape in self.far_shapes:
            check_far_tensors(self.near_calls(shape), shape, sparse_storage)


class OperationTests(DescribedOperation):
    """Tests of a differentiable operation; set one to None in a subclass to leave it out.

    Attributes:
        flags: the gradients the backward operator is asked for ("+-": the first of two) when only
            the named tensor needs one; "" if it is not called, None to leave this open.
        rounding: half-ulps of slack for bfloat16.
        examples: yields small tensors with every optional one among them, and the fixed arguments.
        far: gives float16 tensors, among them some of a shape, and the fixed arguments.
    """

    flags: Mapping[str, str | None] = {}
    rounding = 4.0
    examples: Callable[[torch.dtype], Iterator[tuple[Tensors, dict]]]
    far: Callable[[Sequence[int]], tuple[Tensors, dict]]

    def layouts(self, dtype: torch.dtype) -> Iterator[tuple[Tensors, dict]]:
        """Yield the examples whose gradients come in every memory layout."""
        return self.examples(dtype)

    def near_calls(self, shape: Sequence[int]) -> list:
        tensors, fixed = self.far(shape)
        grads = random_gradients(bind(self.naive, fixed), tensors)
        with RecordedCalls() as recorded:
            run(bind(self.function, fixed), tensors, grads)
        return recorded.calls

    @classmethod
    def compare(cls, tensors, rounding=4.0, *, grads=None, intermediate=None, of=None, **fixed):
        """Assert the 2× rule; sums run in another order than PyTorch's, which shows in float32."""
        functions = bind(cls.function, fixed), bind(cls.naive, fixed)
        options = {"grads": grads, "intermediate": intermediate, "of": of}
        check(*functions, tensors, rounding=rounding, **options)

    @pytest.mark.gpu_smoke
    def test_bfloat16(self, smoke_backend):
        tensors, fixed = next(iter(self.examples(BF16)))
        self.compare(tensors, self.rounding, **fixed)

    def test_float64_is_computed_in_float64(self, backend):
        for tensors, fixed in self.examples(FP64):
            ours, naive = bind(self.function, fixed), bind(self.naive, fixed)
            grads = random_gradients(naive, tensors)
            (out, out_grads), (exact, exact_grads) = (run(f, tensors, grads) for f in (ours, naive))
            torch.testing.assert_close(out, exact, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(out_grads, exact_grads, rtol=1e-12, atol=1e-12)

    def test_same_bits_twice_and_for_gradients_of_any_strides(self, backend):
        for i, (tensors, fixed) in enumerate(self.layouts(BF16)):
            check_deterministic(bind(self.function, fixed), tensors)
            if i == 0 or not (INTERPRETING and backend == "triton"):  # the interpreter is slow
                check_expanded_gradient(bind(self.function, fixed), tensors)

    def test_inputs_and_gradients_stay_and_outputs_are_new(self, backend):
        for tensors, fixed in self.examples(FP32):
            leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
            outputs = outputs_of(self.function(**leaves, **fixed))
            grads = [torch.randn_like(o) for o in outputs]
            kept = [g.clone() for g in grads]
            torch.autograd.backward(outputs, grads)
            for output in outputs:
                assert output.is_contiguous()
                output.detach().fill_(7)
            assert all(torch.equal(t, leaves[n]) for n, t in tensors.items())
            assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))

    def test_only_the_gradients_that_are_needed(self, backend):
        tensors, fixed = next(iter(self.examples(FP32)))
        function = bind(self.function, fixed)
        grads = random_gradients(function, tensors)
        with RecordedCalls() as all_needed:
            full = run(function, tensors, grads)[1]
        # A plain call on a CPU may be recorded by PyTorch alone, without the backward operator.
        for (name, flags), mode in itertools.product(
            self.flags.items(), (contextlib.nullcontext, RecordedCalls)
        ):
            leaves = {n: t.clone().requires_grad_(n == name) for n, t in tensors.items()}
            with mode():
                outputs = outputs_of(function(**leaves))
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            with RecordedCalls() as recorded:
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            assert [n for n, t in leaves.items() if t.grad is not None] == [name]
            torch.testing.assert_close(leaves[name].grad, full[name], rtol=1e-6, atol=1e-6)
            calls = recorded.of(f"{self.op}_backward")
            if not calls and mode is contextlib.nullcontext:
                continue
            if flags is not None:
                assert [_flags(args, len(flags)) for args in calls] == [flags] * bool(flags), name
        args = all_needed.of(f"{self.op}_backward")[-1]
        count = len(_flags(args, 9))
        if 0 < count <= 3 and not isinstance(args[-1], list):
            for asked in itertools.product((False, True), repeat=count):
                results = self.operator("_backward")(*args[:-count], *asked)
                assert tuple(result.numel() > 0 for result in results) == asked

    def test_opcheck(self, backend):
        """Run all of opcheck on the reference; on Triton what depends on the implementation."""
        tests = ("test_schema", "test_faketensor")
        if backend == "reference":
            tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
        flags = sorted({f for f in self.flags.values() if f})
        for i, (tensors, fixed) in enumerate(self.examples(FP32)):
            function = bind(self.function, fixed)
            grads = [
                g.mT.contiguous().mT if g.dim() > 1 else g
                for g in random_gradients(function, tensors)
            ]
            with RecordedCalls() as recorded:
                run(function, tensors, grads)
                if len(grads) == 2:
                    run(function, tensors, [grads[0], None])
                    run(function, tensors, [None, grads[1]])
            again = lambda t: t.detach().requires_grad_(t.requires_grad)  # noqa: E731
            args = tree_map_only(torch.Tensor, again, recorded.of(self.op)[0])
            # The first example has every tensor. Tracing takes most of the time.
            torch.library.opcheck(self.operator(), args, test_utils=tests if i == 0 else tests[:2])
            calls = [(args, tests[:2]) for args in recorded.of(f"{self.op}_backward")]
            if i == 0:
                calls[0] = (calls[0][0], tests)
                calls += [(_with_flags(calls[0][0], asked), tests[:2]) for asked in flags]
            for args, kinds in calls:
                args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
                torch.library.opcheck(self.operator("_backward"), args, test_utils=kinds)

    @pytest.mark.slow  # in the default tier the operations of a block compile together
    def test_compiles_without_a_graph_break(self):
        for tensors, fixed in self.examples(FP32):
            check_compiled(bind(self.function, fixed), tensors)

    @pytest.mark.slow  # that of qk_norm_rope, with two lengths and a grid, is in the default tier
    def test_compiles_once_for_all_lengths(self):
        check_compiled_once(self.function, [self.at_length(length) for length in (6, 8, 34)])

    def test_gradcheck_in_float64(self):
        for tensors, fixed in self.examples(FP64):
            names, leaves = list(tensors), [t.requires_grad_() for t in tensors.values()]

            def call(*values, names=names, fixed=fixed):
                return self.function(**dict(zip(names, values, strict=True)), **fixed)

            assert torch.autograd.gradcheck(call, leaves)

    def test_reference_is_an_oracle(self):
        tensors, fixed = next(iter(self.examples(BF16)))
        exact = self.naive(**{n: t.double() for n, t in tensors.items()}, **fixed)
        found = self.call_reference(**tensors, **fixed, upcast=FP64)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


class NoGradientTests(DescribedOperation):
    """Tests of an operation that refuses gradients.

    Attributes:
        opcheck: the parts of opcheck that run on the reference.
        examples: yields the arguments of small calls, the first with every optional tensor.
        check: asserts that the result of such a call is as near to float64 as it has to be.
    """

    opcheck = (
        "test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"
    )  # fmt: skip

    examples: Callable[[torch.dtype], Iterator[dict]]
    check: Callable[..., None]

    def near_calls(self, shape: Sequence[int]) -> list:
        with RecordedCalls() as recorded:
            self.function(torch.randn(shape).half())
        return recorded.calls

    @pytest.mark.gpu_smoke
    def test_bfloat16(self, smoke_backend):
        self.check(**next(iter(self.examples(BF16))))

    def test_same_bits_twice_and_inputs_stay(self, backend):
        for arguments in self.examples(BF16):
            tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
            before = [t.clone() for t in tensors.values()]
            first, second = (outputs_of(self.function(**arguments)) for _ in range(2))
            assert_same_bits(first, second)
            assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))
            assert_same_bits(before, tensors.values())

    def test_gradients_are_refused(self):
        arguments = next(iter(self.examples(FP32)))
        for name, tensor in arguments.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dtype in (FP8, torch.int64):
                continue
            given = arguments | {name: tensor.clone().requires_grad_()}
            match = rf"^{self.name or self.op}: {name} is .*torch\.no_grad\(\)"
            with pytest.raises(ValueError, match=match):
                self.function(**given)
            with torch.no_grad():
                assert not any(o.requires_grad for o in outputs_of(self.function(**given)))
        with torch.inference_mode():
            self.function(**arguments)

    def test_opcheck(self, backend):
        """Run all of opcheck on the reference; on Triton what depends on the implementation."""
        tests = self.opcheck
        if backend == "triton":
            tests = [name for name in tests if name in ("test_schema", "test_faketensor")]
        for i, arguments in enumerate(self.examples(FP32)):
            with RecordedCalls() as recorded:
                self.function(**arguments)
            kinds = tests if i == 0 else tests[:2]  # as for a differentiable operation
            torch.library.opcheck(self.operator(), recorded.of(self.op)[0], test_utils=kinds)

    @pytest.mark.slow  # that of qk_norm_rope, with two lengths and a grid, is in the default tier
    def test_compiles_once_for_all_lengths(self):
        calls = [self.at_length(length) for length in (6, 8, 34)]
        check_compiled_once(lambda **t: outputs_of(self.function(**t)), calls, assert_same_bits)


class QuantizingTests(NoGradientTests):
    """Tests of an operation that returns ``(q, scale)`` of one tensor ``x`` and others."""

    def check(self, **arguments):
        """Assert half a step from float64 at most, and one step from the reference."""
        pair = self.function(**arguments)
        wide = {
            n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for n, t in arguments.items()
        }
        assert_quantizes(pair, self.naive(**wide))
        assert_one_step(pair, self.call_reference(**arguments))

    def test_float64(self, backend):
        for arguments in self.examples(FP64):
            self.check(**arguments)
            assert_same_bits(self.function(**arguments), self.call_reference(**arguments))


def _flags(args: tuple, count: int) -> str:
    """Return which gradients a recorded backward call asks for, as "+-"."""
    asked = args[-1] if isinstance(args[-1], list) else args[-count:] if count else ()
    return "".join("-+"[flag] for flag in asked if isinstance(flag, bool))


def _with_flags(args: tuple, flags: str) -> tuple:
    """Return the arguments of a backward call that asks for other gradients."""
    asked = [flag == "+" for flag in flags]
    return (*args[:-1], asked) if isinstance(args[-1], list) else (*args[: -len(asked)], *asked)
