"""Memory that will not be read again, handed back to the system before its owner is gone."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

# Of Linux since 5.4; Python knows no name for it.
_MADV_PAGEOUT = 21


def trim() -> None:
    """Hands back memory that was freed and that malloc keeps for later, where it is glibc's."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def page_out(tensors: Iterable[Tensor]) -> None:
    """Pages of a mapped file that were read count as this process's until they are dropped. No content is ever lost.

    Where the system knows no such advice, they are dropped when memory is short.
    """
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None, use_errno=True).madvise
    for tensor in tensors:
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.numel() * tensor.itemsize - begin
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_PAGEOUT)
