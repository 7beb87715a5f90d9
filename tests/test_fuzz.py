"""Some damaged files for every reader of bytes from outside, and those that were found to break one.

`benchmarks/fuzz.py` runs as many as one has time for.
"""

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from fuzzing import Target, mutated, survives, targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aum_compress.bundle import CARD, GOLDEN, TENSORS, file_sha256, read_bundle
from aum_compress.errors import AumError, BundleError, ModelFileError, RecipeError

EXAMPLES = 6
"""Of each reader; an hour's worth is `benchmarks/fuzz.py`."""


@pytest.fixture(scope="module")
def readers(finished, tmp_path_factory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    made = targets(folder, finished.out / "runs" / "tiny" / "06-quantize", finished.outcome.folder)
    return {target.name: target for target in made}


NAMES = (
    *("wav, PCM_16", "wav, FLOAT", "flac, PCM_16", "ogg, VORBIS", "wav, response"),
    *("csv, meta", "csv, split", "csv, test list", "csv, groups", "csv, data check"),
    *(
        "json, card",
        "json, card compared",
        "yaml, recipe compared",
        "safetensors, bundle",
        "npz, golden",
        "npz, logits",
    ),
    *("onnx, budget", "onnx, runtime", "ort, runtime", "ort, operators"),
    *("yaml, recipe", "json, report", "zip, checkpoint"),
    *("json, pack", "json, package", "yaml, meta", "journal, sweep"),
)


@contextmanager
def damaged(target: Target) -> Iterator[bytes]:
    """Its valid content, which is there again afterwards."""
    valid = target.path.read_bytes()
    try:
        yield valid
    finally:
        target.path.write_bytes(valid)
        target.beside(target.path)


def test_every_reader_is_named(readers):
    assert list(readers) == [*NAMES]
    for target in readers.values():
        target.read(target.path)


@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,  # a new damage is for benchmarks/fuzz.py to find, not for somebody's unrelated change
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(generator=st.randoms(use_true_random=False))
def test_a_damaged_file_gives_a_result_or_a_message(readers, name, generator):
    target = readers[name]
    assert survives(target, mutated(target.path.read_bytes(), generator)) is None


def archive(flags: int = 0, packed: int = 0, content: bytes = b"\x93NUMPY") -> bytes:
    """An .npz with the members of golden.npz, in whose headers these stand."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("inputs", "logits"):
            file.writestr(f"{name}.npy", content)
    found = bytearray(buffer.getvalue())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of each member, and of the directory
        for start in (match.start() for match in re.finditer(re.escape(mark), bytes(found))):
            found[start + at] |= flags
            found[start + at + 2] |= packed
    return bytes(found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TENSORS, b"", "cannot be read as safetensors"),
        (TENSORS, b"\xff" * 64, "cannot be read as safetensors"),
        (TENSORS, (2**62).to_bytes(8, "little") + b"{}", "cannot be read as safetensors"),
        (GOLDEN, b"", "cannot be read as golden inputs"),
        (GOLDEN, b"PK\x03\x04" + bytes(40), "cannot be read as golden inputs"),
        (GOLDEN, b"\x80\x04K\x01.", "cannot be read as golden inputs"),
        (GOLDEN, archive(flags=1), "is encrypted"),
        (GOLDEN, archive(flags=32), "compressed patched data"),
        (GOLDEN, archive(packed=77), "compression method is not supported"),
        (GOLDEN, archive(content=b"no array"), "inputs, logits: not stored as arrays"),
    ],
)
def test_a_file_that_its_card_vouches_for_is_read_with_care(readers, name, content, message):
    """Found by fuzzing: whoever damages a file can write its checksum too."""
    target = readers["safetensors, bundle" if name == TENSORS else "npz, golden"]
    with damaged(target):
        target.path.write_bytes(content)
        target.beside(target.path)
        with pytest.raises(BundleError, match=message):
            target.read(target.path)


def test_golden_arrays_of_other_shapes_are_refused(readers):
    target = readers["npz, golden"]
    valid = target.path.read_bytes()
    with np.load(target.path) as stored:
        inputs, logits = stored["inputs"], stored["logits"]
    try:
        for changed in ((inputs[:, :, :-1], logits), (inputs, logits[:-1]), (inputs.astype(np.float64), logits)):
            np.savez(target.path, inputs=changed[0], logits=changed[1])
            target.beside(target.path)
            with pytest.raises(BundleError, match="make the bundle again"):
                target.read(target.path)
        with zipfile.ZipFile(target.path, "w") as archive:
            archive.writestr("inputs.npy", b"no array")
        target.beside(target.path)
        with pytest.raises(BundleError, match="cannot be read as golden"):
            target.read(target.path)
    finally:
        target.path.write_bytes(valid)
        target.beside(target.path)


def test_a_bundle_does_not_lead_out_of_its_folder(readers, tmp_path):
    folder = readers["json, card"].path.parent
    valid = (folder / CARD).read_text()
    secret = tmp_path / "secret"
    secret.write_text("outside")
    link = folder / "link.txt"
    os.symlink(secret, link)
    try:
        for name in ("link.txt", str(secret), os.path.relpath(secret, folder)):
            card = json.loads(valid)
            card["files"][name] = file_sha256(secret)
            (folder / CARD).write_text(json.dumps(card))
            with pytest.raises(BundleError, match="leads out of the (bundle.s )?folder"):
                read_bundle(folder)
        card = json.loads(valid) | {"quantized_layers": ["layers.9.mixer.in_proj"]}
        (folder / CARD).write_text(json.dumps(card))
        with pytest.raises(BundleError, match="quantized_layers names layers.9.mixer.in_proj"):
            read_bundle(folder).load_model()
    finally:
        link.unlink()
        (folder / CARD).write_text(valid)
    os.symlink(folder, tmp_path / "bundle")
    assert read_bundle(tmp_path / "bundle").card.kind == "model", "a link to a whole bundle is none"


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("ort, operators", lambda content: content[:1000], "its operators cannot be read"),
        ("ort, operators", lambda content: b"", "its operators cannot be read"),
        ("ort, runtime", lambda content: content[:1000], "cannot load it"),
        ("json, package", lambda content: b"[" * 100_000, "something other than a package"),
        ("json, package", lambda content: content.replace(b'"dcase_bytes"', b'"bytes"', 1), "other than a package"),
        ("json, package", lambda content: content.replace(b'"1": {', b'"9": {', 1), "other than a package"),
        ("json, package", lambda content: content.replace(b"Doe_XY_task1", b"../../task1", 1), "other than a package"),
        ("json, package", lambda content: content.replace(b'"checkpoints": {', b'"checkpoints": [', 1), "package of"),
        ("json, pack", lambda content: content.replace(b'"a":', b'"../a":', 1), "cannot name a model's folder"),
        ("json, card compared", lambda content: content.replace(b'"verdict"', b'"vice"', 1), "metrics or budget are"),
        ("yaml, recipe compared", lambda content: b"data: []", "does not say its data.kind"),
        ("yaml, recipe compared", lambda content: b"data: {kind: ", "is not YAML"),
        ("journal, sweep", lambda content: content.replace(b'"op_code":4', b'"op_code":"4"', 1), "used as a study"),
        ("journal, sweep", lambda content: content.replace(b'"complete"', b'"done"', 1), "cannot be used as a study"),
        ("journal, sweep", lambda content: content.replace(b'"result":{', b'"result":1,"r":{', 1), "as a study"),
    ],
)
def test_what_stumbled_over_damage_says_so(readers, name, changed, message):
    """Found by fuzzing, or beside what it found."""
    target = readers[name]
    with damaged(target) as valid:
        assert changed(valid) != valid
        target.path.write_bytes(changed(valid))
        target.beside(target.path)
        with pytest.raises(AumError, match=message):
            target.read(target.path)


def test_a_type_of_tensors_that_there_is_not_is_refused(readers, tmp_path):
    """Found by fuzzing: onnxruntime says so with an exception of its own kind."""
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    content = bytearray(readers["ort, runtime"].path.read_bytes())
    tensor = InferenceSession.GetRootAsInferenceSession(content, 0).Model().Graph().Initializers(0)
    content[tensor._tab.Pos + tensor._tab.Offset(10)] = 138  # its data_type
    path = tmp_path / "model.ort"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="cannot load it .*type"):
        readers["ort, runtime"].read(path)


@pytest.mark.parametrize("name", ["yaml, recipe", "yaml, meta"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("submission: " + "[" * 500, "is not YAML"),
        ("submission: !!int ''", "is not YAML"),
        ("submission: !!bool maybe", "is not YAML"),
        ("submission: !!timestamp now", "is not YAML"),
        ("submission: 2026-13-01", "is not YAML"),
        ("submission: " + "9" * 5000, "is not YAML"),
        ("submission: &one {name: *one}", "anchors hold themselves"),
        (
            "submission:\n  - &a0 [1]\n" + "".join(f"  - &a{k} [{f'*a{k - 1}, ' * 9}]\n" for k in range(1, 30)),
            "anchors hold",
        ),
    ],
)
def test_yaml_that_its_parser_stumbles_over_is_refused(readers, name, text, message):
    target = readers[name]
    valid = target.path.read_bytes()
    try:
        target.path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            target.read(target.path)
    finally:
        target.path.write_bytes(valid)


def test_a_card_cannot_call_an_activation_a_layer(readers):
    """Found by fuzzing: a storage that fits another kind of module."""
    target = readers["json, card"]
    with damaged(target) as valid:
        card = json.loads(valid)
        slot = next(name for name, storage in card["quantized_layers"].items() if storage == "uint8")
        target.path.write_text(json.dumps(card | {"quantized_layers": card["quantized_layers"] | {slot: "int8"}}))
        with pytest.raises(BundleError, match=f"{slot} is a ActivationSlot, which cannot be stored as int8"):
            target.read(target.path)
