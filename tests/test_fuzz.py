"""Some damaged files for every reader of bytes from outside, and those that were found to break one.

`benchmarks/fuzz.py` runs as many as one has time for.
"""

import json
import os
import zipfile

import numpy as np
import pytest
from fuzzing import Target, mutated, survives, targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aum_compress.bundle import CARD, GOLDEN, TENSORS, file_sha256, read_bundle
from aum_compress.errors import BundleError

EXAMPLES = 6
"""Of each reader; an hour's worth is `benchmarks/fuzz.py`."""


@pytest.fixture(scope="module")
def readers(finished, tmp_path_factory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    made = targets(folder, finished.out / "runs" / "tiny" / "06-quantize", finished.outcome.folder)
    return {target.name: target for target in made}


NAMES = (
    *("wav, PCM_16", "wav, FLOAT", "flac, PCM_16", "ogg, VORBIS"),
    *("csv, meta", "csv, split", "csv, test list", "csv, groups", "csv, data check"),
    *("json, card", "safetensors, bundle", "npz, golden", "npz, logits"),
    *("onnx, budget", "onnx, runtime", "yaml, recipe", "json, report", "zip, checkpoint"),
)


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TENSORS, b"", "cannot be read as safetensors"),
        (TENSORS, b"\xff" * 64, "cannot be read as safetensors"),
        (TENSORS, (2**62).to_bytes(8, "little") + b"{}", "cannot be read as safetensors"),
        (GOLDEN, b"", "cannot be read as golden inputs"),
        (GOLDEN, b"PK\x03\x04" + bytes(40), "cannot be read as golden inputs"),
        (GOLDEN, b"\x80\x04K\x01.", "cannot be read as golden inputs"),
    ],
)
def test_a_file_that_its_card_vouches_for_is_read_with_care(readers, name, content, message):
    """Found by fuzzing: whoever damages a file can write its checksum too."""
    target = readers["safetensors, bundle" if name == TENSORS else "npz, golden"]
    valid = target.path.read_bytes()
    try:
        target.path.write_bytes(content)
        target.beside(target.path)
        with pytest.raises(BundleError, match=message):
            target.read(target.path)
    finally:
        target.path.write_bytes(valid)
        target.beside(target.path)


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
