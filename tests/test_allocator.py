"""Freed memory stays in the process; a setting of the user's own is left alone."""

import subprocess
import sys

import pytest

from aum_compress.train.allocator import keep_freed_memory

# fewest page faults of a training step, once the heap has grown to its size
FAULTS = """
import resource, torch
from aum_compress.train.allocator import keep_freed_memory
torch.set_num_threads(1)
assert keep_freed_memory()
model = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU())
x = torch.zeros(16, 1, 128, 64)
found = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(x).sum().backward()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(found[6:]))
"""


def faults() -> int:
    clean = {"PATH": "/usr/bin:/bin"}
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=clean, check=True)
    return int(found.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is told, and there is none here")
def test_a_training_step_uses_the_memory_of_the_one_before():
    # without it some processes have thousands a step and some none: malloc learns thresholds by chance
    assert faults() < 100


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_"])
def test_a_setting_from_the_environment_is_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert keep_freed_memory() is False


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
