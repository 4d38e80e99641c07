"""Watch a step of a model: how many bytes of tensors there are, in a GPU's precision."""

import weakref

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What a GPU's autocast computes in fp32; a CPU's does not.
IN_FP32 = {F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.pow, torch.Tensor.pow}
IN_FP32 |= {torch.rsqrt, torch.exp, torch.cumsum}


class Live(TorchDispatchMode):
    """Writes down, after each operation, how many bytes of tensors there are besides the model."""

    def __init__(self, model):
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        self.seen = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.bytes, self.line = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.line.append(self.bytes)
        return out

    def free(self, key, size):
        self.seen.discard(key)
        self.bytes -= size


class LikeCuda(TorchFunctionMode):
    """Under autocast, the precision that a GPU takes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(in_fp32, (args, kwargs))
        return function(*args, **(kwargs or {}))


def in_fp32(value):
    is_16_bit = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_16_bit else value
