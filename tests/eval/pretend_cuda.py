"""A CUDA device that is none: tensors say that they are on it, and are on the CPU.

Inside :class:`PretendCuda` everything computes as usual, and what a GPU would refuse is refused: operations on tensors
of two devices, NumPy views of what is on the GPU. What would make the host wait for the GPU is noted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA = torch.device("cuda:0")
aten = torch.ops.aten

# Their results, or the shapes of these, depend on numbers that the host has to see.
_WAITS = {
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
    "repeat_interleave",
    "is_nonzero",
}


class PretendTensor(Tensor):
    """A tensor on the device that is none; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CUDA,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"PretendTensor({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of PretendCuda")


class PretendCuda(TorchDispatchMode):
    """The context in which the device exists.

    Attributes:
        waits: names of the operations that made the host wait for the device, in order.
        products: how many matrix products the device computed.
    """

    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # nobody asks for a driver while such a mode is on
        self.waits, self.products = [], 0

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()  # switching to the device does nothing where there is none
        # torch.tensor(..., device="cuda") would ask for a driver.
        self._overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a moved parameter is a new tensor
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrite)
        torch._C._set_only_lift_cpu_tensors(self._lift)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat, spec = tree_flatten((args, kwargs or {}))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        there = [value for value in tensors if isinstance(value, PretendTensor)]
        asked = next((value for value in flat if isinstance(value, torch.device)), None)
        target = CUDA if there else torch.device("cpu")
        if asked is not None:
            target = asked
        name = func.overloadpacket.__name__
        copies = name in ("_to_copy", "copy_")
        self._check(func, name, args, tensors, there, copies)
        if name == "copy_":
            target = args[0].device
        if copies:
            origin = args[1 if name == "copy_" else 0].device
            if origin.type == "cuda" and target.type == "cpu":
                self.waits.append(name)
        elif there and (name in _WAITS or (name in ("index", "index_put_") and _by_mask(args[1]))):
            self.waits.append(name)
        self.products += bool(there) and name in ("mm", "addmm", "bmm")
        known = {id(value.held): value for value in there}
        plain = [_plain(value) for value in flat]
        plain_args, plain_kwargs = tree_unflatten(plain, spec)
        result = func(*plain_args, **plain_kwargs)
        if name == "_to_copy" and any(result is value for value in plain):
            result = result.clone()

        def wrap(value):
            if not isinstance(value, Tensor) or target.type == "cpu":
                return value
            return known[id(value)] if id(value) in known else PretendTensor(value)

        return tree_map(wrap, result)

    @staticmethod
    def _check(func, name, args, tensors, there, copies):
        if not there or copies or len(there) == len(tensors):
            return
        here = [value for value in tensors if not isinstance(value, PretendTensor) and value.dim()]
        if name in ("index", "index_put_", "_index_put_impl_") and isinstance(args[0], PretendTensor):
            values = args[2:3] if name != "index" else ()
            here = [value for value in here if any(value is other for other in values)]  # indices are copied
        if here:
            raise RuntimeError(f"{func}: tensors on cuda:0 and on cpu")


def _by_mask(indices):
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _plain(value):
    if isinstance(value, PretendTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value
