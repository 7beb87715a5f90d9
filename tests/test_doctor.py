"""The doctor: what is in order, what is missing for what, and every illness that it knows."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
from tiny_recipe import command

from aum_compress.doctor import machine, packages
from aum_compress.doctor.examine import examine
from aum_compress.doctor.tiny_run import tiny_run
from aum_compress.kernels import build


def test_a_healthy_machine_has_no_problems():
    result = command("doctor", "--json")
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    assert found["ok"]
    by_name = {f"{one['section']}: {one['name']}": one for one in found["findings"]}
    assert float(by_name["scan: largest difference"]["found"]) < 1e-4
    assert by_name["tiny run: training"]["found"].endswith("clips/s")
    assert by_name["tiny run: onnxruntime"]["state"] == "ok"
    assert {one["section"] for one in found["findings"]} == {
        *("packages", "processor", "scan", "onnxruntime", "cache", "tiny run")
    }


def test_the_table_says_the_same_without_the_tiny_run(monkeypatch):
    result = command("doctor", "--no-time")
    assert result.exit_code == 0, result.stdout
    assert "no problems" in result.stdout
    assert "tiny run" not in result.stdout


@pytest.fixture
def requirements(monkeypatch):
    """Packages as they are asked for, and as they are installed."""

    def set_to(wanted: list[str] | None, installed: dict[str, str]) -> dict[str, packages.Finding]:
        def requires(name):
            if wanted is None:
                raise PackageNotFoundError(name)
            return wanted

        def version(name):
            if name not in installed:
                raise PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(packages, "requires", requires)
        monkeypatch.setattr(packages, "version", version)
        return {finding.name: finding for finding in packages.package_findings()}

    return set_to


def test_missing_and_wrong_versions_are_told_apart(requirements):
    wanted = ["numpy>=1.26", "torch>=2.11,<2.14", "onnx>=1.18", 'wandb>=0.18; extra == "wandb"']
    found = requirements(wanted, {"torch": "2.20.0", "onnx": "1.23.0"})
    assert {name: one.state for name, one in found.items()} == {
        **{"aum-compress": "ok", "numpy": "problem", "torch": "problem", "onnx": "ok", "wandb": "absent"}
    }
    assert found["torch"].note == (
        'wanted <2.14,>=2.11, for training, pruning, quantising, export: pip install "torch<2.14,>=2.11"'
    )
    assert found["wandb"].note == 'needed for train.logger: wandb: pip install "aum-compress[wandb]"'


def test_a_source_folder_asks_for_the_packages_without_their_ranges(requirements):
    found = requirements(None, {"numpy": "1.0"})
    assert found["aum-compress"].state == "absent"
    assert found["numpy"].state == "ok"
    assert found["torch"].state == "problem"


def test_every_package_of_pyproject_has_a_purpose():
    import tomllib
    from pathlib import Path

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert {Requirement(text).name for text in project["dependencies"]} == set(packages.PURPOSE)
    assert set(project["optional-dependencies"]) == set(packages.OPTIONAL)
    assert str(packages.PYTHON) == str(SpecifierSet(project["requires-python"]))


@pytest.mark.parametrize(
    ("flags", "found", "warned"),
    [("flags : sse2 avx2", "AVX2", True), ("flags : avx2 avx512_vnni", "VNNI, AVX2", False), ("", "unknown", False)],
)
def test_int8_features_are_read_from_the_system(tmp_path, monkeypatch, flags, found, warned):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\nmodel name : Some CPU\n{flags}\n\nprocessor : 1\n")
    monkeypatch.setattr("aum_compress.processor._CPUINFO", path)
    cores, int8 = machine.cpu_findings()
    assert cores.note == "Some CPU"
    assert int8.found == found
    assert ("keep quantize.weight_bits at 7" in int8.note) == warned


@pytest.fixture
def fresh_kernel():
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.usefixtures("fresh_kernel")
@pytest.mark.parametrize(
    ("name", "value", "note"),
    [("AUM_NO_KERNEL", "1", "switches the fused scan off"), ("CC", "no-such-compiler", "no C compiler found")],
)
def test_the_loop_is_named_with_its_reason(monkeypatch, name, value, note):
    monkeypatch.setenv(name, value)
    backend, agreement, _ = machine.scan_findings()
    assert (backend.found, backend.state) == ("loop in torch", "absent")
    assert note in backend.note
    assert agreement.state == "ok"


def test_a_scan_that_computes_something_else_is_a_problem(monkeypatch):
    from aum_compress.models import scan

    true = scan.selective_scan
    monkeypatch.setattr(scan, "selective_scan", lambda *args, **kwargs: 1.01 * true(*args, **kwargs))
    assert [one.state for one in machine.scan_findings() if one.name == "largest difference"] == ["problem"]


def test_an_export_that_computes_something_else_is_a_problem(monkeypatch):
    from aum_compress.export.runtime import Classifier

    true = Classifier.logits
    monkeypatch.setattr(Classifier, "logits", lambda *args: true(*args) + 0.01)
    (found,) = (one for one in tiny_run() if one.name == "onnxruntime")
    assert found.state == "problem"
    assert "wanted at most 0.001" in found.note


def test_a_cache_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUM_CACHE", str(tmp_path / "file" / "cache"))
    found = machine.cache_finding()
    assert found.state == "problem"
    assert "name another folder in AUM_CACHE" in found.note


def test_what_fails_while_it_is_looked_at_is_a_finding(monkeypatch):
    def fails():
        raise RuntimeError("out of\norder")

    monkeypatch.setattr("aum_compress.doctor.examine.scan_findings", fails)
    found = next(one for one in examine(timed=False) if one.section == "scan")
    assert (found.state, found.note) == ("problem", "RuntimeError: out of order")
