"""A pack: only files that the card of one of its bundles vouches for are opened."""

import json
from pathlib import Path

import pytest
from exported import CONFIG, LABELS, SPEC, exported, model
from exported import written as write_exported

from aum_compress.bundle import BundleCard, golden_inputs, model_files, now, write_bundle
from aum_compress.errors import BundleError
from aum_compress.evaluate.subject import Subject
from aum_compress.models.quantized import quantized_layers
from aum_compress.packs import PACK, PackCard, read_pack


@pytest.fixture
def pack(tmp_path) -> Path:
    """A pack of the general model alone, in int8."""
    small, folder = model("int8"), tmp_path / "pack"
    card = BundleCard(
        kind="model", stage="devices", recipe="small", model=CONFIG, input=SPEC, labels=LABELS, precision="int8",
        quantized_layers=quantized_layers(small), seed=0, versions={}, created=now(),
    )  # fmt: skip
    files = model_files(small, golden_inputs(SPEC), half=True) | {"model-int8.onnx": exported("int8")}
    bundle = write_bundle(folder / "general", card, files)
    about = PackCard(
        recipe="small", created=now(), inputs_sha256="", precision="int8", models={"general": bundle.sha256},
        devices=[], test={},
    )  # fmt: skip
    (folder / PACK).write_text(about.model_dump_json())
    return folder


def set_precision(pack: Path, precision: str) -> None:
    card = json.loads((pack / PACK).read_text())
    (pack / PACK).write_text(json.dumps(card | {"precision": precision}))


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """Whatever would be opened with onnxruntime; nothing is."""
    paths: list[Path] = []
    monkeypatch.setattr("aum_compress.evaluate.subject.Classifier", paths.append)
    return paths


def test_a_whole_pack_is_measured(pack):
    subject = Subject(pack)
    assert (subject.labels, subject.measured_with) == (LABELS, "onnxruntime")
    assert read_pack(pack).onnx_file("general") == pack / "general" / "model-int8.onnx"


def test_no_precision_leads_out_of_the_pack(pack, opened):
    (pack / "general" / "model-x").mkdir()
    outside = pack.parent / "outside"
    outside.mkdir()
    write_exported(outside, "fp32").rename(outside / "evil.onnx")
    set_precision(pack, "x/../../../outside/evil")
    with pytest.raises(BundleError, match=r"(?s)pack\.json: cannot be read as the card of a pack: .*precision"):
        Subject(pack)
    assert opened == []


def test_a_file_that_no_card_names_is_not_opened(pack, opened):
    write_exported(pack / "general", "fp32")
    set_precision(pack, "fp32")
    with pytest.raises(BundleError, match=r"general: its card names no model-fp32\.onnx, wanted by the precision in"):
        Subject(pack)
    assert opened == []


def test_an_altered_file_is_refused_before_it_is_opened(pack, opened):
    file = pack / "general" / "model-int8.onnx"
    file.write_bytes(exported("fp32"))
    with pytest.raises(BundleError, match=r"model-int8\.onnx: altered or cut short"):
        Subject(pack)
    assert opened == []
