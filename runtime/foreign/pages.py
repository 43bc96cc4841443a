"""Hands memory of tensors that will not be read again back to the system, while their owner still exists."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

# In Linux since 5.4; Python has no name for it.
_MADV_PAGEOUT = 21


def trim() -> None:
    """Hands back memory that was freed and that malloc keeps for later, where it is glibc's."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def page_out(tensors: Iterable[Tensor]) -> None:
    """Drops the pages under `tensors`: pages read from a mapped file count as this process's memory until dropped.

    No content is lost. On a system without this advice they are dropped when memory is short.
    """
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None, use_errno=True).madvise
    for tensor in tensors:
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.numel() * tensor.itemsize - begin
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_PAGEOUT)
