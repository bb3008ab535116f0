"""Linear layers of experts on a CPU: products over numbers of rows that come again.

oneDNN compiles a kernel for each shape that it meets and keeps a thousand of them. That takes twice as long as the
product of an expert's few hundred tokens, and half a megabyte; and routers give experts another number of tokens each
time. While `EvenRows()` is entered, tokens are filled up with rows of zeros to one of a few numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

LEAST = 8  # rows; also the number of steps from a power of two to the next: at most an eighth is added


class EvenRows(TorchFunctionMode):
    """While entered, fills up the rows of `torch.nn.functional.linear` in half precision where tokens are a list."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args and _is_compiled(args[0]):
            x, *others = args
            rows = len(x)
            filled = even(rows)
            if filled != rows:
                return func(F.pad(x, (0, 0, 0, filled - rows)), *others, **(kwargs or {}))[:rows]
        return func(*args, **(kwargs or {}))


def even(rows: int) -> int:
    """The least number of at least so many rows that is used: a multiple of an eighth of the power of two below."""
    step = max(LEAST, (1 << rows.bit_length() - 1) // LEAST) if rows else 1
    return -(-rows // step) * step


def _is_compiled(x: torch.Tensor) -> bool:
    """Whether the product is oneDNN's: single precision is not, and batches [batch, tokens, channels] are all alike."""
    if x.device.type != "cpu" or x.dim() != 2:
        return False
    return x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
