"""What the system says about its processor. Torch-free."""

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_EXACT_INT8 = frozenset(("avx512_vnni", "avx_vnni", "asimddp", "i8mm"))


def cpuinfo(key: str) -> str:
    """The first core's entry in Linux' list; empty where the system has none, or not this one."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def processor() -> str:
    """Its model in words."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def processor_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; empty where the system does not tell."""
    return frozenset((cpuinfo("flags") or cpuinfo("Features")).split())


def exact_int8_products() -> bool:
    """Whether sums of int8 products are known not to saturate: VNNI, or ARM's dot products."""
    return bool(processor_flags() & _EXACT_INT8)
