"""Files of teachers' answers: found by clip, checksum and view; everything that does not fit is named."""

import numpy as np
import pytest

from aum_compress.errors import DataError
from aum_compress.train.teachers import average_logits, load_outputs, save_outputs, unit_length

LABELS = ("bus", "tram")
LOGITS = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
VIEWS = ("clean", "a view")


@pytest.fixture
def path(tmp_path):
    """Three clips in two views."""
    path = tmp_path / "t.npz"
    embeddings = np.random.default_rng(0).standard_normal((2, 3, 5))
    save_outputs(path, ["x", "y", "z"], ["1", "2", "3"], LABELS, LOGITS, views=VIEWS, embeddings=embeddings)
    return path


def brought(path, **changes):
    """What a person's own script writes."""
    arrays = {"clip_ids": ["x", "y", "z"], "checksums": ["1", "2", "3"], "labels": LABELS, "logits": LOGITS[0]}
    np.savez(path, **(arrays | changes))
    return path


def load(path, *, ids=("z", "x"), checksums=("3", "1"), labels=LABELS, views=("clean",)):
    return load_outputs(path, ids, checksums, labels, views)


def test_answers_are_found_by_name_checksum_and_view(path):
    np.testing.assert_array_equal(load(path).logits, LOGITS[:1, [2, 0]])
    np.testing.assert_array_equal(load(path, views=VIEWS[::-1]).logits, LOGITS[::-1, [2, 0]])
    kept = load(path, views=VIEWS).embeddings
    wanted = unit_length(np.random.default_rng(0).standard_normal((2, 3, 5)))[:, [2, 0]]
    np.testing.assert_allclose(kept, wanted, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(kept, axis=2), 1, atol=1e-6)


def test_logits_of_clean_clips_stand_for_every_view(tmp_path):
    path = brought(tmp_path / "own.npz", logits=LOGITS[0].astype(np.float64))
    found = load(path, views=VIEWS)
    np.testing.assert_array_equal(found.logits, np.stack([LOGITS[0, [2, 0]]] * 2))
    assert found.logits.dtype == np.float32
    assert found.embeddings is None


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"ids": ("w", "y"), "checksums": ("1", "changed")}, r"(?s)w: has no logits.*y: the teacher heard other audio"),
        ({"labels": ("tram", "bus")}, r"logits are for labels \['bus', 'tram'\], wanted \['tram', 'bus'\]"),
        ({"views": ("clean", "another")}, r"(?s)has no logits for these views.*view 1 \(another\)"),
    ],
)
def test_what_does_not_match_is_named(path, wanted, message):
    with pytest.raises(DataError, match=message):
        load(path, **wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.where(LOGITS[0] == 4, np.nan, LOGITS[0])}, "logits of 1 clips are NaN or infinite"),
        ({"logits": np.where(LOGITS[0] == 4, 1e300, LOGITS[0].astype(float))}, "NaN or infinite .as float32"),
        ({"embeddings": np.full((3, 4), np.inf)}, "embeddings of 2 clips are NaN or infinite"),
        ({"logits": LOGITS[0].T}, r"logits: float32 \(2, 3\), wanted numbers \(3, 2\)"),
        ({"logits": LOGITS}, r"logits: float32 \(2, 3, 2\), wanted numbers \(3, 2\)"),
        ({"logits": LOGITS, "views": ["clean"]}, r"logits: .*wanted numbers \(1, 3, 2\)"),
        ({"logits": np.full((3, 2), "1.0")}, r"logits: <U3"),
        ({"embeddings": np.zeros((2, 4))}, r"embeddings: float64 \(2, 4\), wanted numbers \(3, 4\)"),
        ({"checksums": ["1", "2"]}, "checksums: 2, wanted one for each of 3 clips"),
        ({"clip_ids": ["x", "z", "z"]}, "clip_ids: some clips are named more than once"),
        ({"labels": np.array([LABELS])}, "labels: 2 axes, wanted 1"),
    ],
)
def test_files_of_others_are_checked(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load(brought(tmp_path / "own.npz", **changes), ids=("y", "z"), checksums=("2", "3"))


def test_file_that_is_none(path, tmp_path):
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="not a teacher logits file"):
        load(path)
    np.savez(path, clip_ids=["x"], checksums=["1"], labels=LABELS)
    with pytest.raises(DataError, match="wanted an .npz with clip_ids, checksums, labels, logits"):
        load(path)
    np.save(tmp_path / "plain.npy", LOGITS)
    with pytest.raises(DataError, match="not a teacher logits file"):
        load(tmp_path / "plain.npy")
    np.savez(path, clip_ids=np.array([{}], dtype=object), checksums=["1"], labels=LABELS, logits=LOGITS[0])
    with pytest.raises(DataError, match="not a teacher logits file"):
        load(path)


def test_teachers_are_averaged():
    np.testing.assert_array_equal(average_logits([np.zeros((2, 2)), np.full((2, 2), 4.0)]), np.full((2, 2), 2.0))
