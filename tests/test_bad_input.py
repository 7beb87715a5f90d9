"""What goes wrong outside the program: a message that helps, its exit code, nothing half-written, and the next run
goes on from the last whole stage."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import soundfile
import yaml
from audio_trees import write_class_folders
from tiny_recipe import TRAIN, assert_nothing_half_written, command, raw_recipe, write_recipe

from aum_compress.bundle import read_bundle

pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.fixture
def tree(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.tree, tmp_path / "tree"))


def refused(*words: object, code: int = 2) -> str:
    """The message of a command that fails as expected."""
    result = command(*words)
    assert result.exit_code == code, result.stderr or result.exception
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.partition("error: ")[2]


# --- recipes


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"studnet": {}}, "studnet: unknown key; did you mean student?"),
        ({"quantize": {"bits": 8}}, "quantize.bits: unknown key"),
        ({"seed": "seven"}, "seed: Input should be a valid integer"),
        ({"prune": {"ratio": [1], "finetune": TRAIN}}, "prune.ratio: Input should be a valid number"),
        ({"data": "audio"}, "data: "),
        ({"teacher": None}, "distill.teachers: names teacher, but the recipe has no section teacher"),
    ],
)
def test_recipe_that_is_not_valid(finished, tmp_path, changes, wanted):
    path = write_recipe(tmp_path, finished.tree, **changes)
    text = refused("run", path, "--out", tmp_path / "out")
    assert text.startswith(f"{path}: not a valid recipe:\n")
    assert wanted in text
    assert not (tmp_path / "out").exists()


def test_recipe_that_cannot_be_read(tmp_path):
    text = refused("run", tmp_path / "none.yaml")
    assert "none.yaml: no such recipe: neither a file nor one of the shipped ones (esc10-mobile, folder, " in text
    (tmp_path / "list.yaml").write_text("- one\n- two\n")
    assert "wanted sections (data:, student:, ...), found list" in refused("run", tmp_path / "list.yaml")
    (tmp_path / "cut.yaml").write_bytes(b"data: {kind: tau, ro")
    assert f"{tmp_path / 'cut.yaml'}: is not YAML: " in refused("run", tmp_path / "cut.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    assert f"{tmp_path / 'binary.yaml'}: is not YAML: " in refused("run", tmp_path / "binary.yaml")


# --- data


def test_missing_data_root(finished, tmp_path):
    path = write_recipe(tmp_path, tmp_path / "none")
    text = refused("run", path, "--out", tmp_path / "out")
    assert text.startswith(f"{tmp_path / 'none'}: no folder audio/ in it; data.root wants the folder of a TAU")
    assert_nothing_half_written(tmp_path / "out")


def test_unreadable_audio_is_named_all_at_once_then_left_out(tree, tmp_path):
    cut, empty = sorted((tree / "audio").iterdir())[:2]
    cut.write_bytes(b"RIFF")
    empty.write_bytes(b"")
    path = write_recipe(tmp_path, tree)
    text = refused("run", path, "--out", tmp_path / "out", "--until", "reference")
    assert cut.name in text
    assert empty.name in text
    assert "on_bad_files" in text, "how to go on without them"
    assert list((tmp_path / "out").rglob("bundle.json")) == []
    words = ("run", path, "--out", tmp_path / "out", "--until", "data", "--json")
    result = command(*words, "--set", "data.on_bad_files=skip")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)["data"]
    assert data["train"] + data["validation"] + data["test"] == 90 - 2


def folder_recipe(root: Path, tmp_path: Path) -> Path:
    path = tmp_path / "folders.yaml"
    data = {"kind": "folders", "root": str(root), "clip_seconds": 0.1, "validation_fraction": 0.3}
    raw = {key: value for key, value in raw_recipe(root).items() if key in ("features", "reference")}
    path.write_text(yaml.safe_dump(raw | {"data": data}))
    return path


def test_empty_class(tmp_path):
    root = write_class_folders(tmp_path / "sounds", files=4)
    (root / "wind").mkdir()
    text = refused("run", folder_recipe(root, tmp_path), "--out", tmp_path / "out")
    assert "class folders without a" in text
    assert "fill them or move them away:\n  - wind" in text


def test_class_missing_from_training(tree, tmp_path):
    split = tree / "evaluation_setup" / "split25.csv"
    lines = split.read_text().splitlines(keepends=True)
    split.write_text("".join(line for line in lines if "metro_station" not in line))
    text = refused("run", write_recipe(tmp_path, tree), "--out", tmp_path / "out")
    assert "metro_station" in text
    assert "train" in text
    root = write_class_folders(tmp_path / "sounds", files=4)
    for path in sorted((root / "rain").iterdir())[1:]:
        path.unlink()
    assert "rain" in refused("run", folder_recipe(root, tmp_path), "--out", tmp_path / "out")


# --- bundles and ONNX files


@pytest.mark.parametrize("verb", ["run", "budget", "export", "evaluate", "quantize"])
@pytest.mark.parametrize("damage", ["altered", "cut"])
def test_damaged_bundle_is_refused_with_its_file(copied, recipe, damage, verb):
    bundle = copied / "runs" / "tiny" / "05-prune"
    path = bundle / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "altered" else content[:-10])
    words = {
        "run": ("run", recipe, "--out", copied),
        "budget": ("budget", bundle),
        "export": ("export", bundle, "--to", copied / "new"),
        "evaluate": ("evaluate", bundle, "--data", recipe),
        "quantize": ("quantize", bundle),
    }
    text = refused(*words[verb])
    assert f"{bundle}: files differ from bundle.json; delete the folder and run its stage again:" in text
    assert "  - model.safetensors: altered or cut short: sha256 " in text
    assert ", wanted " in text


def test_damaged_card_and_absent_file(copied):
    bundle = copied / "runs" / "tiny" / "06-quantize"
    (bundle / "golden.npz").unlink()
    assert "  - golden.npz: absent" in refused("budget", bundle)
    card = bundle / "bundle.json"
    card.write_bytes(card.read_bytes()[:200])
    assert f"{card}: cannot be read as a bundle card of schema 1; cut short or altered?" in refused("budget", bundle)


@pytest.mark.parametrize("verb", ["budget", "verify", "predict", "evaluate"])
@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "absent", "folder"])
def test_onnx_file_that_is_not_one(finished, recipe, tmp_path, kind, verb):
    path = tmp_path / "model.onnx"
    whole = (finished.out / "exports" / "tiny" / "model-int8.onnx").read_bytes()
    content = {"text": b"Not a model.\n" * 20, "empty": b"", "truncated": whole[: len(whole) // 2]}
    if kind == "folder":
        path.mkdir()
    elif kind in content:
        path.write_bytes(content[kind])
    wav = sorted((finished.tree / "audio").iterdir())[0]
    rest = {"predict": (wav,), "evaluate": ("--data", recipe)}
    text = refused(verb, path, *rest.get(verb, ()))
    assert str(path) in text
    if kind in content:
        assert any(words in text for words in ("not an ONNX file", "Not an ONNX file", "cut short")), text


# --- no space left


def fill_disk(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Writing a file whose name holds `part` fails, as it would on a full disk."""
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if part in self.name:
            write_bytes(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)


def test_no_space_for_features(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("AUM_CACHE", str(tmp_path / "cache"))
    words = ("run", recipe, "--out", tmp_path / "out", "--until", "data")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("aum_compress.data.cache.examine_files", full)
        text = refused(*words)
    assert f"{tmp_path / 'cache' / 'features'}: cannot keep " in text
    assert "No space left on device" in text
    assert "environment variable AUM_CACHE" in text
    assert_nothing_half_written(tmp_path)
    assert command(*words).exit_code == 0


def test_no_space_for_a_checkpoint(recipe, tmp_path, monkeypatch):
    words = ("run", recipe, "--out", tmp_path, "--until", "reference")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a write that fails names no file

    with monkeypatch.context() as patch:
        patch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", full)
        text = refused(*words)
    assert text.startswith(f"{tmp_path / 'runs' / 'tiny' / '.work'}{os.sep}reference-")
    assert "No space left on device. Free space and run again: it goes on after the last whole epoch" in text
    assert list(tmp_path.rglob("bundle.json")) == []
    assert command(*words).exit_code == 0
    assert_nothing_half_written(tmp_path)


def test_no_space_for_a_bundle(recipe, copied, monkeypatch):
    words = ("run", recipe, "--out", copied, "--until", "quantize", "--set", "quantize.calibration_clips=8")
    before = read_bundle(copied / "runs" / "tiny" / "06-quantize").sha256
    with monkeypatch.context() as patch:
        fill_disk(patch, "model.safetensors")
        text = refused(*words)
    bundle = copied / "runs" / "tiny" / "06-quantize"
    assert f"{bundle}: cannot be written: No space left on device. Free space or choose another --out" in text
    assert read_bundle(bundle).sha256 == before, "what was there is still there"
    assert_nothing_half_written(copied)
    result = command(*words)
    assert result.exit_code == 0
    assert "prune: nothing has changed, kept" in result.stderr
    assert read_bundle(bundle).sha256 != before


def test_no_space_for_an_export(copied, monkeypatch):
    bundle, to = copied / "runs" / "tiny" / "05-prune", copied / "new"
    with monkeypatch.context() as patch:
        fill_disk(patch, ".onnx.writing")
        text = refused("export", bundle, "--to", to, "--precision", "fp32")
    assert "model-fp32.onnx: cannot be written: No space left on device. Free space" in text
    assert not to.exists()
    assert_nothing_half_written(copied)


def test_no_space_for_the_report(recipe, copied, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch, "report.html")
        text = refused("run", recipe, "--out", copied)
    assert text.startswith(f"{copied / 'runs' / 'tiny'}: No space left on device.")
    assert command("run", recipe, "--out", copied).exit_code == 0


def test_recording_that_is_no_audio_does_not_stop_the_others(finished, tmp_path):
    (tmp_path / "notes.wav").write_text("not audio")
    wav = sorted((finished.tree / "audio").iterdir())[0]
    samples, rate = soundfile.read(wav)
    soundfile.write(tmp_path / "good.wav", samples, rate)
    model = finished.out / "exports" / "tiny" / "model-int8.onnx"
    result = command("predict", model, tmp_path / "notes.wav", tmp_path / "good.wav")
    assert result.exit_code == 2
    assert result.stdout.startswith(f"{tmp_path / 'good.wav'}\n")
    assert "notes.wav" in result.stderr
