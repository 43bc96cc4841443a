"""This machine's kernels: its CPU's vector instructions, and the class of machines that compute the same bits."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

_CPU = torch.device("cpu")
_VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
# The values of ONEDNN_MAX_CPU_ISA begin with one of these; the longest come first.
_ONEDNN_LIMITS = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512", "AVX2", "AVX", "SSE41")


class Level(IntEnum):
    """Sets of vector instructions for which torch's libraries have kernels; each includes those before it."""

    OTHER = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


def hardware_level() -> Level:
    """The highest level that the CPU has."""
    has = {
        Level.AMX: torch.cpu._is_amx_tile_supported(),  # noqa: SLF001 (torch has no public name, here and below)
        Level.AVX512_BF16: torch.cpu._is_avx512_bf16_supported(),  # noqa: SLF001
        Level.AVX512: torch.cpu._is_avx512_supported(),  # noqa: SLF001
        Level.AVX2: torch.cpu._is_avx2_supported(),  # noqa: SLF001
    }
    return next((level for level, is_here in has.items() if is_here), Level.OTHER)


def level() -> Level:
    """The highest level that both torch and oneDNN use; the environment may limit them."""
    limits = {"AVX512": Level.AMX, "AVX2": Level.AVX2}
    aten = limits.get(torch.backends.cpu.get_cpu_capability(), Level.OTHER)
    return min(hardware_level(), aten, _onednn_limit())


def sums_bytes() -> bool:
    """Whether the CPU is known or likely to have instructions that sum products of 8 bits in 32."""
    return hardware_level() != Level.AVX2 or "avx_vnni" in cpu_flags().split()


def features() -> str:
    """The level in words, and what limits it if the CPU has more."""
    own, used = hardware_level(), level()
    return used.name if own == used else f"{used.name} (the CPU has {own.name}; the environment limits it)"


def kernel_class(device: torch.device = _CPU) -> str:
    """A name for all machines whose kernels compute the same bits as this one's: for sessions that move, and files of digests."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda {torch.cuda.get_device_name(device)}, sm {major}.{minor}, toolkit {torch.version.cuda}"
    own, used = hardware_level(), level()
    limited = "" if own == used else f" of {own.name.lower()}"
    # Libraries choose the sizes of blocks by those of caches, which differ between CPU models.
    model = "-".join(part for part in (_vendor(), _cpuinfo("cpu family"), _cpuinfo("model")) if part)
    return f"{platform.machine()} {model} {used.name.lower()}{limited}, threads {torch.get_num_threads()}"


@cache
def cpu_flags() -> str:
    """Every feature of the CPU that the system lists, on one line."""
    return _cpuinfo("flags") or _cpuinfo("Features") or platform.processor()


def _vendor() -> str:
    name = _cpuinfo("vendor_id") or platform.processor()
    return _VENDORS.get(name, name.lower() or "unknown")


def _onednn_limit() -> Level:
    name = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    prefix = next((prefix for prefix in _ONEDNN_LIMITS if name.startswith(prefix)), None)
    return {
        "AVX512_CORE_BF16": Level.AVX512_BF16,
        "AVX512_CORE_FP16": Level.AVX512_BF16,
        "AVX512": Level.AVX512,
        "AVX2": Level.AVX2,
        "AVX": Level.OTHER,
        "SSE41": Level.OTHER,
    }.get(prefix or "", Level.AMX)


@cache
def _cpuinfo(field: str) -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""
