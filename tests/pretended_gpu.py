"""A pretended GPU: tensors that say cuda:0 and compute on the CPU, the rules of a CUDA
graph's recording, and a graph that replays as one would. Only for a process of its own: it
changes torch for good. There is no backward pass, which wants a real accelerator.

    with GPU:                     # sees every operation
        model = model.to("cuda")
"""

import ctypes
from collections import Counter
from pathlib import Path

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SYNCHRONISE = {"_local_scalar_dense", "item", "equal", "is_nonzero"}
SYNCHRONISE |= {"nonzero", "masked_select", "_unique2"}  # their size is known on the GPU
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "to", "cpu", "copy_", "_copy_from"}


def pretend_that_there_is_a_driver() -> None:
    """A build for the CPU has no guard for CUDA devices, and indexing asks for one. c10 has
    one that does nothing, which _ensureCUDADeviceGuardSet() installs, but only in place of
    another that counts no devices: such a one, whose methods all return 0, is made here."""
    zero = ctypes.cast(keep(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)), ctypes.c_void_p)
    methods = keep((ctypes.c_void_p * 64)(*[zero.value] * 64))
    guard = keep((ctypes.c_void_p * 1)(ctypes.addressof(methods)))
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    registry = (ctypes.c_void_p * 21).in_dll(c10, name)
    if not registry[1]:  # 1 is CUDA
        registry[1] = ctypes.addressof(guard)
        torch._C._ensureCUDADeviceGuardSet()
    torch.cuda._lazy_init = lambda: None
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)


KEPT = []  # what C points to must not be collected


def keep(thing):
    KEPT.append(thing)
    return thing


class Cuda(torch.Tensor):
    """A tensor that says cuda:0; `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", 0),
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GPU.run(func, args, kwargs or {})

    def tolist(self):
        GPU.waits("tolist")
        return self.inner.tolist()


class Forbidden(RuntimeError):
    """What a CUDA graph cannot record."""


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor) -> int:
    return tensor.untyped_storage()._cdata


class Machine(TorchDispatchMode):
    """Runs each operation on the CPU, as the GPU would be asked to. Counts what makes the
    GPU wait, forbids it while a step is recorded, and refuses operands on two devices."""

    def __init__(self):
        super().__init__()
        self.tape = None  # of the step that is being recorded
        self.waited = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def waits(self, what):
        if self.tape is not None:
            raise Forbidden(f"{what} in a recorded step")
        self.waited[str(what)] += 1

    def run(self, func, args, kwargs):
        tensors = tensors_of((args, kwargs))
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        on_gpu = device is not None and device.type == "cuda"
        if not on_gpu and not any(isinstance(t, Cuda) for t in tensors):
            with _python_dispatch._disable_current_modes():
                return func(*args, **kwargs)
        if func._schema.name == "prim::device":
            return args[0].device
        self.judge(func, args, tensors, device)
        if self.tape is not None:
            self.remember(func, args)
        out = self.compute(func, args, kwargs)
        to_cpu = device is not None and device.type == "cpu"
        written_cpu = func._schema.name == "aten::copy_" and not isinstance(args[0], Cuda)
        if to_cpu or written_cpu:
            same = any(out is t.inner for t in tensors if isinstance(t, Cuda))
            return out.clone() if same else out
        return tree_map(lambda value: self.wrap(value, tensors), out)

    @staticmethod
    def wrap(value, tensors):
        """A result says cuda, too; what was written in place is the tensor that it was."""
        if not isinstance(value, torch.Tensor) or isinstance(value, Cuda):
            return value
        for t in tensors:
            if isinstance(t, Cuda) and t.inner is value:
                return t
        on_cpu = [t for t in tensors if not isinstance(t, Cuda)]
        shared = any(storage(value) == storage(t) for t in on_cpu)
        return Cuda(value.clone() if shared else value)

    def judge(self, func, args, tensors, device):
        name = func._schema.name.removeprefix("aten::")
        on_cpu = [t for t in tensors if not isinstance(t, Cuda) and t.device.type == "cpu"]
        if name in COPIES:
            if on_cpu or (device is not None and device.type == "cpu"):
                self.waits(func)
        elif name in SYNCHRONISE:
            self.waits(func)
        elif name in INDEXING:
            indices = tensors_of(args[1])
            if any(t.dtype == torch.bool for t in indices) or on_cpu:
                self.waits(func)
        elif any(t.dim() > 0 for t in on_cpu):
            raise RuntimeError(f"{func} meets tensors on the CPU and on the GPU")

    def compute(self, func, args, kwargs):
        """On the CPU; recorded, if a step is. The product with another dtype is CUDA's."""
        args, kwargs = tree_map(on_the_cpu, (args, kwargs))
        kwargs.pop("pin_memory", None)
        if func._schema.name == "aten::mm" and func._overloadname == "dtype":
            func, args, kwargs = float_product, args[:2], {}
        with _python_dispatch._disable_current_modes():
            out = func(*args, **kwargs)
        if self.tape is not None:
            inputs = {storage(t) for t in tensors_of((args, kwargs))}
            self.fresh |= {storage(t) for t in tensors_of(out)} - inputs
            self.tape.append((func, args, kwargs, tensors_of(out)))
        return out

    def remember(self, func, args):
        """Keeps what a recorded operation writes to: it is put back, as nothing ran."""
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info and argument.alias_info.is_write:
                for t in tensors_of(value):
                    key = storage(t.inner)
                    if key not in self.saved and key not in self.fresh:
                        kept = t.inner.untyped_storage().clone()
                        self.saved[key] = t.inner.untyped_storage(), kept


def on_the_cpu(value):
    """What an operation's argument is there: a tensor's numbers, the other device."""
    if isinstance(value, Cuda):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


def float_product(a, b):
    assert a.dim() == b.dim() == 2 and a.dtype == b.dtype == torch.bfloat16
    return a.float() @ b.float()


class Graph:
    """Records a step, which runs nothing; `replay` does each operation again on the same
    tensors, and writes its results to where they went when it was recorded."""

    def __init__(self, step):
        GPU.tape, GPU.saved, GPU.fresh = [], {}, set()
        try:
            step()
        finally:
            self.tape, GPU.tape = GPU.tape, None
        for memory, before in GPU.saved.values():
            memory.copy_(before)

    def replay(self):
        with _python_dispatch._disable_current_modes(), torch.no_grad():
            for func, args, kwargs, outs in self.tape:
                again = tensors_of(func(*args, **kwargs))
                for old, new in zip(outs, again, strict=True):
                    if storage(old) != storage(new):  # else in place, or a view
                        old.copy_(new)


pretend_that_there_is_a_driver()
GPU = Machine()
