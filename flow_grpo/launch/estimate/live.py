"""How much memory tensors take that hold no numbers: each storage from its first op to its end."""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What a GPU's autocast computes in fp32 and a CPU's does not, as far as the models call it.
IN_FP32 = {"exp", "group_norm", "layer_norm", "log", "norm", "pow", "prod", "reciprocal"}
IN_FP32 |= {"rms_norm", "rsqrt", "softmax", "softplus", "sum", "__pow__", "__rpow__", "cumsum"}


class Live(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive; those of `known` count from the start."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._add(tensor)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return output

    def rise(self, act: Callable[[], object]) -> int:
        """Return by how many bytes the peak of an act is above what was alive before it."""
        before = self.peak = self.now
        act()
        return self.peak - before

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class AsOnGPU(TorchFunctionMode):
    """Casts to fp32 what a GPU's autocast would, for tensors that say they are on a CPU."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.__name__ in IN_FP32 and torch.is_autocast_enabled("cpu"):
            arguments, keywords = tree_map(_fp32, (arguments, keywords))
        return function(*arguments, **keywords)


def _fp32(value: object) -> object:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value
