"""What a device would notice of a program, counted on a CPU: where the host waits, how many operators are ordered, in which types."""

from collections import Counter
from functools import wraps

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__repr__"}
READS |= {"__format__", "__contains__", "equal", "allclose", "is_nonzero", "nonzero", "masked_select", "unique"}
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "linear", "matmul"}


class HostReads(TorchFunctionMode):
    """Calls from Python after which the host knows something about a tensor's content."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Every operator that computes something: how often, which of them make the host wait, in which types products are taken."""

    def __init__(self):
        super().__init__()
        self.calls, self.waits, self.products, self.types = Counter(), Counter(), Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, out = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        if not function.is_view:
            self.calls[name] += 1
        if name in WAITS:
            self.waits[name] += 1
        made = [value.dtype for value in tree_iter(out) if isinstance(value, torch.Tensor)]
        self.types.update(made)
        if name in PRODUCTS:
            self.products.update(made[:1])
        return out


def unseen(function):
    """The function, with what it does left out of every count: work on tensors that never leave the CPU."""

    @wraps(function)
    def call(*args):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args)

    return call
