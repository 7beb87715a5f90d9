"""The inference package of DCASE 2025 Task 1: what its models compute and cost, and that it runs as it is called."""

import copy
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from answers import answer, message, record
from audio_trees import noise
from exported import SPEC as SMALL_SPEC
from exported import model as small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import CP_MOBILES, audio_mambas
from tiny_recipe import write_recipe

from aum_compress.budget.check import check_model, check_module
from aum_compress.budget.dcase import submission_complexity
from aum_compress.budget.records import Limits
from aum_compress.bundle import read_bundle
from aum_compress.export.onnx_writer import fold_if_needed, round_to_half
from aum_compress.models.factory import build_model
from aum_compress.models.quantized import stored_tensors
from aum_compress.submission import package as writing
from aum_compress.submission.checkpoint import Part, part_of
from aum_compress.submission.sources import vendored_sources
from aum_compress.submission.stored import StoredModel

LABEL = "Doe_XY_task1"

pytestmark = pytest.mark.usefixtures("cache_of_finished")


def stored(network) -> StoredModel:
    return StoredModel(copy.deepcopy(network), stored_tensors(network, half=True, pack=False))


# --- what is measured by the challenge's script


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_stored_model_computes_what_the_model_does_and_is_counted_in_full(precision):
    network = fold_if_needed(small_model(precision))
    found = stored(network)
    x = torch.randn(5, 1, 32, 17, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(found(x), network(x), rtol=1e-5, atol=1e-5)
    report = check_model(network, SMALL_SPEC, stored_tensors(network, half=True))
    macs, size = submission_complexity(found, (1, 1, 32, 17))
    weights = sum(p.numel() for p in found.parameters() if p.dtype == torch.int8)
    packed = weights // 2 if precision == "int4" else 0
    # each layer with an odd number of weights of 4 bits fills up half a byte
    assert size == pytest.approx(report.param_bytes + packed, abs=len(report.layers) if packed else 0)
    assert macs > report.dcase_macs
    assert {p.dtype for p in found.parameters()} >= ({torch.int8} if precision != "fp16" else set())


@settings(max_examples=12, deadline=None)
@given(config=st.one_of(audio_mambas(), CP_MOBILES), seed=st.integers(0, 2**32 - 1))
def test_every_model_is_counted_at_its_real_length(config, seed):
    """torchinfo's figure: all multiplications of linear layers and convolutions, and what it adds for biases (one for
    each output) and for norms (one for each weight and sequence)."""
    torch.manual_seed(seed)
    network = round_to_half(fold_if_needed(build_model(config).eval()))
    found = stored(network)
    shape = (1, 1, config.n_mels, config.n_frames)
    x = torch.randn(3, *shape[1:])
    with torch.inference_mode():
        torch.testing.assert_close(found(x), network(x), rtol=1e-4, atol=1e-4)
    report = check_module(network, torch.zeros(shape), stored=stored_tensors(network, half=True))
    wanted = sum(layer.macs for layer in report.layers if layer.kind in ("linear", "conv"))

    def add_what_torchinfo_adds(module, _, output):
        nonlocal wanted
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
            wanted += 0 if module.bias is None else output.numel()
        else:
            own = [tensor for name, tensor in module.named_parameters() if name in ("weight", "bias")]
            wanted += len(output) * sum(tensor.numel() for tensor in own)

    for module in network.modules():
        if not any(module.children()):
            module.register_forward_hook(add_what_torchinfo_adds)
    with torch.inference_mode():
        network(torch.zeros(shape))
    assert submission_complexity(found, shape) == (wanted, report.param_bytes)


# --- the package


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory) -> Path:
    """A package of the tiny run: its int8 student for all, its CP-Mobile for device a."""
    base = tmp_path_factory.mktemp("package")
    runs, tree = finished.out / "runs" / "tiny", finished.tree
    evaluation = base / "evaluation"
    rows = []
    (evaluation / "audio").mkdir(parents=True)
    for seed, device in enumerate(("a", "s8", "never heard of")):
        soundfile.write(evaluation / "audio" / f"{seed}.wav", noise(seed), 44_100, subtype="PCM_24")
        rows.append(f"audio/{seed}.wav\t{device}\n")
    (evaluation / "evaluation_setup").mkdir()
    (evaluation / "evaluation_setup" / "fold1_test.csv").write_text("filename\tdevice_id\n" + "".join(rows))
    (base / "meta.yaml").write_text("submission: {name: Tiny, abbreviation: tiny}\nsystem: {source_code: there}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUM_CACHE", str(finished.cache))
        found = record(
            *("package", runs / "06-quantize", "--label", LABEL, "--to", base / "package"),
            *("--device", f"a={runs / '01-reference'}", "--data", write_recipe(base, tree)),
            *("--evaluation-set", evaluation, "--meta", base / "meta.yaml"),
        )
    (base / "found.json").write_text(json.dumps(found))
    return base


ORGANISERS = """
import copy, importlib, importlib.resources, json, sys
sys.modules["aum_compress"] = None  # it is not installed where the organisers run this
import torch, torchinfo
import torch.nn.functional as F
label = sys.argv[1]
api = importlib.import_module(f"{label}.{label}_1")
devices = ["a", "b", "c"] + [f"s{k}" for k in range(1, 11)]
widths = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.int8: 1, torch.uint8: 1, torch.int32: 4}
model = api.load_model()
costs = {}
with importlib.resources.path(f"{label}.resources", "dummy.wav") as dummy:
    inputs = api.load_inputs([str(dummy) for _ in devices], devices, model)
for one, device in zip(inputs, devices):
    own = api.get_model_for_device(model, device)
    found = torchinfo.summary(copy.deepcopy(own).float(), input_size=tuple(one.shape), verbose=0)
    size = sum(parameter.numel() * widths[parameter.dtype] for parameter in own.parameters())
    costs[device] = {"MACs": found.total_mult_adds, "Params": size}
files = json.loads(sys.argv[2])
asked = json.loads(sys.argv[3])
predictions, classes = api.predict(
    file_paths=files, device_ids=asked, model_file_path=None, use_cuda=torch.cuda.is_available()
)
labels = [one.argmax().item() for one in predictions]
shares = F.softmax(torch.stack(predictions), dim=1)
assert labels == torch.argmax(shares, dim=1).tolist()
torch.save(api.load_model().model.state_dict(), sys.argv[4])
print(json.dumps({"costs": costs, "shares": shares.tolist(), "classes": classes, "module": api.__file__}))
"""


def test_installed_by_pip_it_answers_the_organisers_calls(written, tmp_path):
    """Installed as pip does it, without aum-compress, called as test_complexity.py and evaluate_submission.py do."""
    place = tmp_path / "installed"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(place))
    source = Path(shutil.copytree(written / "package", tmp_path / "source"))  # pip builds in the folder itself
    done = subprocess.run([sys.executable, *install, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = sorted((written / "evaluation" / "audio").iterdir())
    asked = json.dumps(["a", "s8", "never heard of"])
    words = (LABEL, json.dumps(list(map(str, files))), asked, str(tmp_path / "state.pt"))
    done = subprocess.run(
        [sys.executable, "-c", ORGANISERS, *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["module"].startswith(str(place))
    outputs = written / "package" / "predictions" / f"{LABEL}_1"
    assert found["costs"] == json.loads((outputs / "complexity.json").read_text())["per_device"]
    assert (tmp_path / "state.pt").stat().st_size > 1000
    rows = list(csv.DictReader((outputs / "output.csv").open(), delimiter="\t"))
    assert list(rows[0]) == ["filename", "scene_label", *found["classes"]]
    shares = [[float(row[name]) for name in found["classes"]] for row in rows]
    np.testing.assert_allclose(shares, found["shares"], atol=1e-4)
    assert shares[0] != pytest.approx(shares[1], abs=1e-3), "device a has a model of its own"


def test_the_figures_are_those_of_the_budget_and_of_evaluate(written, finished):
    found = json.loads((written / "found.json").read_text())
    runs = finished.out / "runs" / "tiny"
    budget = read_bundle(runs / "06-quantize").card.budget
    assert found["budget"]["models"]["general"]["param_bytes"] == budget["param_bytes"]
    assert found["complexity"]["per_device"]["s10"]["Params"] == budget["param_bytes"]
    assert found["budget"]["models"]["general"]["macs"] == budget["macs"]
    outputs = written / "package" / "predictions" / f"{LABEL}_1"
    meta = yaml.safe_load((outputs / f"{LABEL}_1.meta.yaml").read_text())
    assert meta["submission"]["label"] == f"{LABEL}_1"
    assert (meta["submission"]["name"], meta["system"]["source_code"]) == ("Tiny", "there")
    assert meta["system"]["complexity"]["total_model_size"] == found["complexity"]["max_Params"]
    general = record("evaluate", runs / "06-quantize", "--data", written / "tiny.yaml", "--draws", 0)
    own = record("evaluate", runs / "01-reference", "--data", written / "tiny.yaml", "--draws", 0)
    results = meta["results"]["development_dataset"]
    assert results["general"]["overall"]["accuracy"] == pytest.approx(general["accuracy"], abs=0.01)
    assert results["general"]["device_wise"]["a"]["accuracy"] == pytest.approx(general["by_device"]["a"], abs=0.01)
    assert results["device_specific"]["device_wise"]["a"]["accuracy"] == pytest.approx(own["by_device"]["a"], abs=0.01)
    assert results["device_specific"]["device_wise"]["s4"] == results["general"]["device_wise"]["s4"]
    text = (outputs / "test_accuracy.json").read_text()
    right = sum(results["device_specific"]["device_wise"][d]["accuracy"] for d in ("a", "s1", "s4")) / 3
    assert json.loads(text) == {"Test Accuracy": pytest.approx(right, abs=0.02)}, "6 clips of each device"
    readme = (written / "package" / "README.md").read_text()
    assert f"| {LABEL}_1 | general | {budget['param_bytes']:,} | {budget['param_bytes']:,} |" in readme
    assert f"| {budget['macs']:,} |" in readme
    test_list = (written / "package" / LABEL / "resources" / "test.csv").read_text().splitlines()
    assert (test_list[0], len(test_list)) == ("filename\tscene_label", 19)


def test_a_second_system_joins_the_first(written, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "check_package", lambda *_: None)
    place = Path(shutil.copytree(written / "package", tmp_path / "package"))
    first = (place / LABEL / "ckpts" / f"{LABEL}_1.safetensors").read_bytes()
    words = ("package", runs / "05-prune", "--label", LABEL, "--to", place, "--index", 2)
    assert "wrote" in answer(*words)
    assert (place / LABEL / "ckpts" / f"{LABEL}_1.safetensors").read_bytes() == first
    assert (place / LABEL / f"{LABEL}_2.py").is_file()
    readme = (place / "README.md").read_text()
    assert f"| {LABEL}_1 | a |" in readme
    assert f"| {LABEL}_2 | general |" in readme
    assert "holds something other than a package of Roe_XY_task1" in message(*words[:3], "Roe_XY_task1", *words[4:])
    (place / "thesis").mkdir()
    record_path = place / LABEL / "package.json"
    record_path.write_text(record_path.read_text().replace('"sources_sha256": "', '"sources_sha256": "0'))
    assert "written by another version of aum-compress" in message(*words)
    assert (place / "thesis").is_dir()


def test_a_system_packed_anew_keeps_no_answers_of_the_one_before(written, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "check_package", lambda *_: None)
    place = Path(shutil.copytree(written / "package", tmp_path / "package"))
    outputs = place / "predictions" / f"{LABEL}_1"
    assert {"output.csv", "test_accuracy.json"} <= {path.name for path in outputs.iterdir()}
    record("package", runs / "05-prune", "--label", LABEL, "--to", place)
    assert {path.name for path in outputs.iterdir()} == {"complexity.json", f"{LABEL}_1.meta.yaml"}


def test_a_package_that_answers_otherwise_is_not_written(runs, tmp_path, monkeypatch):
    def altered(bundle):
        part = part_of(bundle)
        wrong = {name: -t if name == "head.weight" else t for name, t in part.tensors.items()}
        return Part(part.network, wrong, part.quantized_layers)

    monkeypatch.setattr(writing, "part_of", altered)
    text = message("package", runs / "05-prune", "--label", LABEL, "--to", tmp_path / "package", code=4)
    assert "logits of the package differ" in text
    assert list(tmp_path.iterdir()) == []


def test_a_model_over_the_limits_is_no_package(runs, tmp_path, monkeypatch):
    size = read_bundle(runs / "06-quantize").card.budget["param_bytes"]
    monkeypatch.setattr(writing, "Limits", lambda: Limits(max_param_bytes=size))
    text = message(
        *("package", runs / "06-quantize", "--label", LABEL, "--to", tmp_path / "p"),
        *("--device", f"b={runs / '01-reference'}"),
        code=3,
    )
    assert "over budget: 1 of 2 models of the pack" in text
    assert "b: " in text
    assert list(tmp_path.iterdir()) == []


def test_what_the_organisers_script_counts_is_held_to_the_limits_too(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "check_package", lambda *_: None)
    monkeypatch.setattr(writing, "submission_complexity", lambda *_: (30_000_001, 128_000))
    text = message("package", runs / "06-quantize", "--label", LABEL, "--to", tmp_path / "p", code=3)
    assert "as the organisers' script counts: 30,000,001 MACs of one clip, the limit is 30,000,000" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--label", "../Doe_task1"), "wanted letters, digits and underscores, with _task1"),
        (("--label", "Doe_XY"), "wanted letters, digits and underscores, with _task1"),
        (("--label", LABEL, "--device", "a"), "wanted NAME=BUNDLE"),
        (("--label", LABEL, "--device", "general=x"), "is the name of the model for all other devices"),
        (("--label", LABEL, "--device", "a=x", "--device", "a=y"), "one device has two models"),
        (("--label", LABEL, "--device", "a=none"), "not a bundle: no such folder"),
        (("--label", LABEL, "--data", "none"), "no folder of audio there"),
    ],
)
def test_what_is_asked_for_wrongly_is_named(words, wanted, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "check_package", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert wanted in message("package", runs / "06-quantize", *words)
    assert list(tmp_path.iterdir()) == []


def test_an_exported_bundle_is_sent_back_to_where_it_came_from(exports, tmp_path):
    text = message("package", exports, "--label", LABEL, "--to", tmp_path / "package")
    assert "holds ONNX files, and the challenge's script measures a torch model" in text


def test_names_of_the_evaluation_list_cannot_leave_its_folder(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "check_package", lambda *_: None)
    (tmp_path / "set" / "evaluation_setup").mkdir(parents=True)
    listed = tmp_path / "set" / "evaluation_setup" / "fold1_test.csv"
    words = ("package", runs / "06-quantize", "--label", LABEL, "--to", tmp_path / "p", "--evaluation-set")
    assert "no such file; wanted a table" in message(*words, tmp_path / "none")
    for name in ("../secret.wav", "/secret.wav", "audio/../../secret.wav"):
        listed.write_text(f"filename\tdevice_id\n{name}\ta\n")
        assert f"names that lead out of the folder:\n  - {name}" in message(*words, tmp_path / "set")
    listed.write_text("filename\tdevice_id\naudio/1.wav\ta\n")
    assert "there is no such file" in message(*words, tmp_path / "set")
    assert not (tmp_path / "p").exists()


def test_meta_values_that_the_template_does_not_have_are_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "check_package", lambda *_: None)
    words = (
        "package",
        runs / "06-quantize",
        "--label",
        LABEL,
        "--to",
        tmp_path / "p",
        "--meta",
        tmp_path / "meta.yaml",
    )
    for text, wanted in (
        ("submission: {nam: x}", "meta.yaml: submission: the template has no nam there"),
        ("submission: 3", "meta.yaml: submission: found 3, wanted keys among label, name"),
        ("submission: {", "meta.yaml: is not YAML"),
        ("!!python/object/apply:os.system [ls]", "meta.yaml: is not YAML"),
    ):
        (tmp_path / "meta.yaml").write_text(text)
        assert wanted in message(*words)


def test_the_sources_are_those_of_inference_alone_and_renamed():
    sources = vendored_sources(LABEL)
    assert {"submission/inference.py", "models/audio_mamba.py", "kernels/scan.c", "__init__.py"} <= sources.keys()
    assert not [name for name in sources if name.startswith(("train/", "data/", "export/", "compress/", "budget/"))]
    text = b"\n".join(sources.values()).decode()
    assert "from aum_compress" not in text
    assert '"aum_compress::' not in text
    assert f'"{LABEL}_aum_compress::selective_scan"' in text
