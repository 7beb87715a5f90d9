"""All findings, in order; what needs a package that is absent is left out."""

from collections.abc import Callable, Iterable

from aum_compress.doctor.findings import Finding
from aum_compress.doctor.machine import cache_finding, cpu_findings, onnxruntime_finding, scan_findings
from aum_compress.doctor.packages import package_findings, python_finding


def examine(*, timed: bool = True) -> list[Finding]:
    """What is here, what is missing for what, and how fast a tiny run is; no finding is an exception.

    Args:
        timed: whether to do the tiny run, some seconds.
    """
    findings = [python_finding(), *package_findings(), *cpu_findings()]
    looks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("scan", scan_findings),
        ("onnxruntime", lambda: [onnxruntime_finding()]),
        ("cache", lambda: [cache_finding()]),
    ]
    if timed:
        looks.append(("tiny run", _tiny_run))
    for section, look in looks:
        findings += _looked(section, look)
    return findings


def _tiny_run() -> list[Finding]:
    from aum_compress.doctor.tiny_run import tiny_run

    return tiny_run()


def _looked(section: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """A doctor that falls ill of what it finds would be of no use: what goes wrong is a finding too."""
    try:
        return list(look())
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Finding(section, "could not be looked at", "problem", "", text)]
