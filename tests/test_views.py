"""Views of training clips: drawn by seed, clip and number alone, made once, the very same for student and teacher."""

from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audio_trees import SECONDS, write_tau_tree

from aum_compress.audio.config import KaldiConfig, LogMelConfig
from aum_compress.audio.frontend import front_end_module
from aum_compress.data import views as views_module
from aum_compress.data.cache import cache_index
from aum_compress.data.config import TauData
from aum_compress.data.datamodule import ClipsDataModule
from aum_compress.data.index import load_index
from aum_compress.data.views import CLEAN, Rendering, render_views
from aum_compress.errors import DataError

RATE = 16_000
FRONT_END = LogMelConfig(sample_rate_hz=RATE, n_fft=512, window_samples=400, hop_samples=160, n_mels=16)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tau_tree(tmp_path_factory.mktemp("tau") / "tree")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def parts_of(tree, cache, front_end=FRONT_END, what="logmel"):
    index = load_index(TauData(kind="tau", root=tree, clip_seconds=SECONDS, validation_fraction=0.3), seed=0)
    return cache_index(index, front_end, what=what, cache_dir=cache)


@pytest.fixture(scope="module")
def parts(tree, cache):
    return parts_of(tree, cache)


@pytest.fixture(scope="module")
def waveforms(tree, cache):
    return parts_of(tree, cache, what="waveform").train


@pytest.fixture(scope="module")
def irs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("responses")
    soundfile.write(folder / "bright.wav", np.r_[1.0, -0.9, np.zeros(30)], RATE)
    soundfile.write(folder / "dull.wav", np.r_[1.0, 0.9, np.zeros(30)], RATE)
    return folder


def rendering(irs, **changes):
    given = {"count": 4, "seed": 0, "time_roll_seconds": 0.02, "device_response_p": 0.5, "device_response_folder": irs}
    return Rendering(**(given | changes))


def never():
    raise AssertionError("computed again")


def test_first_view_is_the_clip_itself(parts, waveforms, irs, tmp_path):
    viewed = render_views(rendering(irs), parts.train, lambda: waveforms, cache_dir=tmp_path)
    n = len(parts.train)
    assert len(viewed) == 4 * n
    assert viewed.names[0] == CLEAN
    np.testing.assert_array_equal(viewed[:n], parts.train[:])
    assert viewed[:].shape == (4 * n, 16, 11)
    assert viewed[:].dtype == np.float32
    np.testing.assert_array_equal(viewed[[3 * n, 1, n + 1]], viewed[:][[3 * n, 1, n + 1]])
    assert len({viewed[np.array([v * n])].tobytes() for v in range(4)}) == 4
    assert viewed[np.array([], dtype=np.int64)].shape == (0, 16, 11)


def test_view_is_roll_and_response_of_the_waveform(parts, waveforms, irs, tmp_path):
    """By a plain restatement: numpy's roll and convolution, then the front-end; to float16's rounding."""
    drawn = rendering(irs)
    viewed = render_views(drawn, parts.train, lambda: waveforms, cache_dir=tmp_path)
    front_end, n = front_end_module(FRONT_END), len(parts.train)
    responses = [np.r_[1.0, sign * 0.9] / np.sqrt(1 + 0.81) for sign in (-1, 1)]
    heard = 0
    for view in range(1, 4):
        for row, clip in enumerate(parts.train.clips):
            _, _, seconds, which = drawn.draw(clip.clip_id, view, 2)
            x = np.roll(waveforms[row : row + 1][0], round(seconds * RATE))
            if which is not None:
                heard += 1
                x = np.convolve(x, responses[which])[: len(x)].astype(np.float32)
            wanted = front_end(torch.from_numpy(x)[None])[0, 0].numpy()
            found = viewed[[view * n + row]][0]
            # weak cells hold the rounding of the convolution, which is by FFT there
            np.testing.assert_allclose(found, wanted, rtol=2**-11, atol=0.02)
            assert np.abs(found - wanted).mean() < 2e-3
    assert 0.3 < heard / (3 * n) < 0.7


def test_draws_depend_on_seed_clip_and_view_alone(irs):
    one = rendering(irs)
    draws = [
        rendering(irs, seed=s, count=c).draw(f"clip{k}", v, 2)
        for s in (0, 1)
        for k in (0, 1)
        for v in (1, 2)
        for c in (3, 9)
    ]
    assert len(set(draws)) == 2 * 2 * 2
    rolls = np.array([one.draw(f"clip{k}", 1, 2).roll_seconds for k in range(400)])
    assert np.abs(rolls).max() <= 0.02
    assert abs(rolls.mean()) < 0.002
    assert {one.draw(f"clip{k}", 1, 2).response for k in range(50)} == {None, 0, 1}
    assert {one.draw(f"clip{k}", 1, 2)[:2] for k in range(50)} == {(0.0, 1.0)}, "switched off"
    moved = rendering(irs, window_shift_seconds=0.5, speed_factor=1.25)
    draws = [moved.draw(f"clip{k}", 1, 2) for k in range(400)]
    assert np.abs([draw.shift_seconds for draw in draws]).max() <= 0.5
    assert abs(np.mean([draw.shift_seconds for draw in draws])) < 0.05
    speeds = np.array([draw.speed for draw in draws])
    assert (speeds.min(), speeds.max()) == (0.8, 1.25)
    assert abs(np.log(speeds).mean()) < 0.02, "as often slower as faster"
    assert [draw[2:] for draw in draws] == [one.draw(f"clip{k}", 1, 2)[2:] for k in range(400)], "nothing else moves"


def test_views_are_made_once_and_more_can_be_added(parts, waveforms, irs, tmp_path):
    first = render_views(rendering(irs, count=2), parts.train, lambda: waveforms, cache_dir=tmp_path)
    again = render_views(rendering(irs, count=2), parts.train, never, cache_dir=tmp_path)
    assert again.files == first.files
    steps = []
    more = render_views(
        rendering(irs), parts.train, lambda: waveforms, cache_dir=tmp_path, progress=lambda *done: steps.append(done)
    )
    assert more.files[:1] == first.files
    assert steps[-1] == (2 * len(parts.train), 2 * len(parts.train)), "the view that was there is not made again"


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"time_roll_seconds": 0.03}, {"device_response_p": 0.6}, {"device_response_exclude": ("dull.wav",)}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_the_content_is_in_the_key(parts, waveforms, irs, tmp_path, changes):
    first = render_views(rendering(irs, count=2), parts.train, lambda: waveforms, cache_dir=tmp_path)
    other = render_views(rendering(irs, count=2, **changes), parts.train, lambda: waveforms, cache_dir=tmp_path)
    assert first.names[1] != other.names[1]
    assert first.files != other.files
    assert not np.array_equal(first[:], other[:])


def test_bytes_of_the_responses_are_in_the_key(parts, waveforms, irs, tmp_path):
    copy = tmp_path / "irs"
    copy.mkdir()
    for path in irs.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    settings = {"cache_dir": tmp_path / "cache"}
    first = render_views(rendering(irs, count=2), parts.train, lambda: waveforms, **settings)
    assert render_views(rendering(copy, count=2), parts.train, never, **settings).files == first.files
    soundfile.write(copy / "dull.wav", np.r_[1.0, 0.5, np.zeros(30)], RATE)
    changed = render_views(rendering(copy, count=2), parts.train, lambda: waveforms, **settings)
    assert changed.files != first.files


def test_other_clips_are_other_views(parts, waveforms, irs, tmp_path):
    first = render_views(rendering(irs, count=2), parts.train, lambda: waveforms, cache_dir=tmp_path)
    fewer = parts.train.only(parts.train.clips[3:])
    second = render_views(rendering(irs, count=2), fewer, lambda: waveforms, cache_dir=tmp_path)
    assert second.files != first.files
    np.testing.assert_array_equal(second[len(fewer) :], first[:][len(parts.train) + 3 :])


def test_altered_view_is_made_again(parts, waveforms, irs, tmp_path):
    first = render_views(rendering(irs, count=2), parts.train, lambda: waveforms, cache_dir=tmp_path)
    whole = first[:]
    content = bytearray(first.files[0].read_bytes())
    content[-1] ^= 1
    first.files[0].write_bytes(content)
    np.testing.assert_array_equal(
        render_views(rendering(irs, count=2), parts.train, lambda: waveforms, cache_dir=tmp_path)[:], whole
    )


def test_killed_while_rendering_leaves_whole_views_alone(parts, waveforms, irs, tmp_path):
    def die(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_views(rendering(irs), parts.train, lambda: waveforms, cache_dir=tmp_path, progress=die)
    assert len(list(tmp_path.glob("*/clips.npy"))) == 1
    assert not list(tmp_path.glob("*.partial"))
    steps = []
    render_views(
        rendering(irs), parts.train, lambda: waveforms, cache_dir=tmp_path, progress=lambda *d: steps.append(d)
    )
    assert steps[-1][1] == 2 * len(parts.train)


def test_full_disk_is_said_before_anything_is_written(parts, waveforms, irs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(views_module.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match=r"3 views of \d+ clips need [\d,]+ bytes, 1,000 are free.*train.views"):
        render_views(rendering(irs), parts.train, never, cache_dir=tmp_path)


def test_missing_responses_are_named(parts, waveforms, irs, tmp_path):
    with pytest.raises(DataError, match=r"(?s)device_response_exclude names 1 files.*\n.*dul.wav"):
        render_views(rendering(irs, device_response_exclude=("dul.wav",)), parts.train, never, cache_dir=tmp_path)


def test_other_front_end_hears_the_same_sound(tree, cache, parts, waveforms, irs, tmp_path):
    """A teacher's views: the rolls and responses are the student's, whatever its sample rate."""
    kaldi = KaldiConfig(sample_rate_hz=8000, window_samples=200, hop_samples=80, n_mels=12)
    theirs = parts_of(tree, cache, kaldi).train
    audio = parts_of(tree, cache, kaldi, what="waveform").train
    ours = render_views(rendering(irs), parts.train, lambda: waveforms, cache_dir=tmp_path)
    heard = render_views(rendering(irs), theirs, lambda: audio, cache_dir=tmp_path)
    assert heard.names == ours.names
    assert heard.files != ours.files
    assert heard.clips == ours.clips
    assert heard[:].shape[1] == 12


def batches(parts, viewed, epoch, seed=7):
    loader = ClipsDataModule(parts, batch_size=16, seed=seed, views=viewed).train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_each_clip_comes_once_an_epoch_in_a_view_of_its_own(parts, waveforms, irs, tmp_path):
    viewed = render_views(rendering(irs), parts.train, lambda: waveforms, cache_dir=tmp_path)
    n = len(parts.train)
    seen = []
    for epoch in range(30):
        found = batches(parts, viewed, epoch)
        positions = torch.cat([index for _, _, index in found])
        assert sorted((positions % n).tolist()) == list(range(n))
        seen.append(positions.sort(stable=True).values)
        for x, y, index in found:
            np.testing.assert_array_equal(x[:, 0], viewed[index.numpy()])
            assert [parts.index.labels[k] for k in y] == [parts.train.clips[k % n].label for k in index]
    counts = torch.bincount(torch.cat(seen) // n, minlength=4) / (30 * n)
    assert counts.sub(0.25).abs().max() < 0.05, "every view equally often"
    again = torch.cat([index for _, _, index in batches(parts, viewed, 3)])
    assert torch.equal(again.sort().values, seen[3]), "by seed and epoch alone"
    other = torch.cat([index for _, _, index in batches(parts, viewed, 3, seed=8)])
    assert not torch.equal(other.sort().values, seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_without_views_the_order_is_the_clips_own(parts):
    loader = ClipsDataModule(parts, batch_size=16, seed=7).train_dataloader()
    positions = torch.cat([index for _, _, index in loader])
    assert sorted(positions.tolist()) == list(range(len(parts.train)))
