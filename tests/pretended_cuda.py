"""A CUDA device that is not there: tensors that say they lie on it and keep their values on the CPU.

What the host does is real: where each tensor lies, its type, autocast, gradient scaling, autograd, optimisers,
Accelerate, and every number but for the rounding of the device's own kernels. What the host waits for is counted by
kind and function. Kernels, NCCL, compilers, CUDA graphs and the device's memory are not there: `torch.compile` notes
what it is given and returns it.

The autograd engine of a CUDA build would ask the driver for a stream; `pretended_stream.cpp` takes that away. It has to
be loaded before torch, which `tests/conftest.py` does where there is a compiler and no GPU.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOADED = [False]  # whether the stub is
FREE = 80 * 2**30  # bytes of the device's memory
STAGED = 2**16  # bytes of pageable memory that a copy takes at once


def load_stub() -> None:
    """Compiles the stub and loads it before torch; does nothing without a compiler or beside a real device."""
    compiler = shutil.which("c++")
    if compiler is None or "torch" in sys.modules or Path("/dev/nvidiactl").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/stream.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "pretended_stream.cpp"], check=True)
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    LOADED[0] = True


load_stub()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

if LOADED[0]:
    torch._C._ensureCUDADeviceGuardSet()  # before the engine counts the devices, which it does once

aten = torch.ops.aten
_SIZES = {  # the size of the result depends on values, which the host has to read
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.equal.default,
}  # fmt: skip
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_PRODUCTS = {
    aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default, aten.bmm.default,
    aten.baddbmm.default,
}  # fmt: skip
_COPIES = {aten._to_copy.default, aten.copy_.default}


ACTIVE: list["Device"] = []


class OnDevice(Tensor):
    """A tensor of the device; `held` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnDevice":
        with torch.inference_mode(values.is_inference()):  # what is a view of a tensor from outside is none from inside
            tensor = Tensor._make_wrapper_subclass(
                cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
                layout=values.layout, device=torch.device("cuda", 0),
            )  # fmt: skip
        tensor.held = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if not ACTIVE:  # something shared was moved there and not back
            raise RuntimeError("a tensor of the pretended device outlives it")
        return ACTIVE[-1].dispatch(func, args, kwargs or {})  # in a thread of its own, or below another mode

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_, **__):
        return self.numpy()


class Device(TorchDispatchMode):
    """Runs what happens on the device.

    Attributes:
        waits: How often the host waited, for each kind and line of the package.
        compiled: What `torch.compile` was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.compiled: list[Any] = []
        self.strict = False  # whether waiting raises

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func, args, kwargs):
        if is_whole(func):  # as under inference_mode, with all that it waits for inside
            with self:
                return func.decompose(*args, **kwargs)
        leaves = [leaf for value in (*args, *kwargs.values()) for leaf in leaves_of(value)]
        there = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        if func is aten.is_pinned.default:
            return getattr(args[0], "pinned", False)
        if func is aten._pin_memory.default:
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        place = kwargs.get("device")
        target = torch.device(place).type if place is not None else "cuda" if there else "cpu"
        if not there and target != "cuda":
            return func(*args, **kwargs)
        check_places(func, args, leaves, target)
        if kind := waits_for(func, args, kwargs, target):
            if self.strict:
                raise RuntimeError(f"called a synchronizing CUDA operation: {kind} {where()}")
            self.waits[f"{kind} {where()}"] += 1
        return self.run(func, args, kwargs, target)

    def run(self, func, args, kwargs, target):
        values = [mapped(value, OnDevice, lambda leaf: leaf.held) for value in args]
        named = {name: mapped(value, OnDevice, lambda leaf: leaf.held) for name, value in kwargs.items()}
        if "device" in named and target == "cuda":
            named["device"] = torch.device("cpu")
        named.pop("pin_memory", None)
        out = accumulated(func, values, named)
        if target != "cuda":
            return out
        if func._schema.name.endswith("_") and out is values[0]:  # in place
            return args[0]
        return mapped(out if out is not values[0] else out.clone(), Tensor, OnDevice)


@cache
def is_whole(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def accumulated(func, values, named):
    """Calls it; sums of products of half precision run in float32, as on a GPU, and many times as fast on a CPU."""
    dtype = next((value.dtype for value in values if isinstance(value, Tensor)), None)
    if func not in _PRODUCTS or dtype not in (torch.float16, torch.bfloat16):
        return func(*values, **named)
    return mapped(func(*mapped(values, Tensor, Tensor.float), **named), Tensor, lambda out: out.to(dtype))


def leaves_of(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in leaves_of(item)] if isinstance(value, (list, tuple)) else [value]


def mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Applies the function to what is of the kind, also in lists."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(item, kind, function) for item in value])
    return function(value) if isinstance(value, kind) else value


def check_places(func, args, leaves, target: str) -> None:
    """Raises as CUDA does where tensors, or a generator, lie on other devices."""
    generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
    if any(generator.device.type != target for generator in generators):
        raise RuntimeError(f"Expected a '{target}' device type for generator but found 'cpu'")
    if func in _COPIES:
        return
    if func in _INDEXING:  # indices may lie on the CPU, where what they index lies on the device
        leaves = [args[0], *args[2:]] if isinstance(args[0], OnDevice) else leaves
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(not isinstance(leaf, OnDevice) and leaf.dim() for leaf in tensors) and len(tensors) > 1:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found cuda:0 and cpu!")
    if not isinstance(args[0] if args else None, OnDevice) and func._schema.name.endswith("_"):
        first = next(iter(leaves_of(args[0])))
        if isinstance(first, Tensor) and not isinstance(first, OnDevice):
            raise RuntimeError(f"{func}: a tensor on the CPU cannot take values of cuda:0")


def waits_for(func, args, kwargs, target: str) -> str:
    """Returns what the host waits for in this call, or ""."""
    if func is aten._local_scalar_dense.default:
        return "value"
    if func in _SIZES:
        return "size"
    if func in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "size"
        return "upload" if any(not isinstance(index, OnDevice) and index.dim() for index in indices) else ""
    if func is aten._to_copy.default and isinstance(args[0], OnDevice) and target == "cpu":
        return "read"
    if func is aten.copy_.default and isinstance(args[1], OnDevice) and not isinstance(args[0], OnDevice):
        return "read"
    source = args[1] if func is aten.copy_.default else args[0]
    if func in _COPIES and not isinstance(source, OnDevice) and source.dim():
        asked = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        return "" if asked and (getattr(source, "pinned", False) or source.nbytes <= STAGED) else "upload"
    return ""


def where() -> str:
    """Returns the file and function of the package that is at work."""
    for frame in reversed(traceback.extract_stack()):
        _, package, path = frame.filename.rpartition("/cdistill/")
        if package:
            return f"{path}:{frame.name}"
    return "tests"


class Functions(TorchFunctionMode):
    """What never comes to the dispatcher: making a tensor there from Python's numbers, and fused attention's choice."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            place = kwargs.pop("device")
            return func(*args, **kwargs).to(place)
        if func is nn.functional.scaled_dot_product_attention and args[0].is_cuda:
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
        return func(*args, **kwargs)


class Event:
    """Measures nothing."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, *_: object) -> None:
        pass

    def elapsed_time(self, _: "Event") -> float:
        return 1.0


@contextmanager
def pretended(monkeypatch) -> Iterator[Device]:
    """Lets torch find a CUDA device."""
    device = Device()

    def compile_(network=None, **options):
        device.compiled.append(network)
        return network

    def forget(*_: object, **__: object) -> None:
        pass

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (FREE, FREE), "get_device_name": lambda *_: "a pretended device",
        "get_device_capability": lambda *_: (8, 0), "is_bf16_supported": lambda *_, **__: True,
        "set_sync_debug_mode": lambda mode: setattr(device, "strict", mode == "error"),
        "Event": Event, "_is_in_bad_fork": lambda: False,
        **dict.fromkeys(("_lazy_init", "manual_seed_all", "set_device", "empty_cache", "synchronize"), forget),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(nn.Module, "compile", lambda network, **options: device.compiled.append(network))
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    ACTIVE.append(device)
    try:
        with Functions(device), device:
            yield device
    finally:
        ACTIVE.pop()
        torch.__future__.set_swap_module_params_on_conversion(swaps)
