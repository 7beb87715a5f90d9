"""aum_compress.audio.augment: what each augmentation changes, what it leaves, and that its generator alone decides."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aum_compress.audio.augment import (
    DeviceResponses,
    blend,
    freq_mixstyle,
    frequency_mask,
    mixup,
    responses_sha256,
    time_mask,
    time_roll,
)
from aum_compress.errors import DataError

RATE = 16_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, mels: int = 20, frames: int = 30) -> torch.Tensor:
    """(n, 1, F, T): noise whose mean and deviation rise with the mel bin and differ between examples."""
    offset = torch.arange(n)[:, None, None, None] + torch.arange(mels)[:, None] / 10
    return torch.randn(n, 1, mels, frames, generator=seeded(9)) * (1 + offset / 5) + offset


def responses(folder: Path, **rows: np.ndarray) -> Path:
    folder.mkdir()
    for name, row in rows.items():
        soundfile.write(folder / f"{name}.wav", row, RATE, subtype="FLOAT")
    return folder


AUGMENTATIONS = {
    "time_roll": lambda x, generator: time_roll(x, 5, generator),
    "frequency_mask": lambda x, generator: frequency_mask(x, 8, generator),
    "time_mask": lambda x, generator: time_mask(x, 8, generator),
    "freq_mixstyle": lambda x, generator: freq_mixstyle(x, 1.0, 0.3, generator),
    "mixup": lambda x, generator: mixup(x, 0.3, generator)[0],
}


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_the_generator_alone_decides_and_nothing_changes_in_place(augment):
    x = images()
    before, global_state = x.clone(), torch.get_rng_state()
    first, again, other = augment(x, seeded(1)), augment(x, seeded(1)), augment(x, seeded(2))
    assert first.shape == x.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), global_state)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(0, 1000))
def test_time_roll_moves_each_example_by_at_most_max_shift(max_shift, seed):
    waveforms = torch.arange(40.0).repeat(4, 1)
    rolled = time_roll(waveforms, max_shift, seeded(seed))
    for row in rolled:
        shift = int((row == 0).nonzero())
        shift = shift - 40 if shift > 20 else shift
        assert abs(shift) <= max_shift
        assert torch.equal(row, waveforms[0].roll(shift))


def test_time_roll_reaches_both_ends_and_differs_between_examples():
    rolled = time_roll(torch.arange(10.0).repeat(400, 1), 2, seeded())
    assert set(rolled.argmin(dim=1).tolist()) == {0, 1, 2, 8, 9}


def test_time_roll_moves_whole_frames():
    x = images()
    rolled = time_roll(x, 5, seeded())
    assert torch.equal(rolled.sort(dim=-1).values, x.sort(dim=-1).values)
    shift = [s for s in range(-5, 6) if torch.equal(rolled[0], x[0].roll(s, dims=-1))]
    assert len(shift) == 1


@pytest.mark.parametrize(("mask", "axis"), [(frequency_mask, 2), (time_mask, 3)])
@pytest.mark.parametrize("max_width", [8, 100])
def test_masks_write_the_mean_into_one_run(mask, axis, max_width):
    x = images(n=40)
    masked = mask(x, max_width, seeded())
    widths = set()
    for before, after in zip(x, masked, strict=True):
        changed = (before != after)[0].movedim(axis - 2, 0)
        touched = changed.all(dim=1)
        assert torch.equal(touched, changed.any(dim=1)), "a masked row is masked over its whole length"
        places = touched.nonzero().flatten()
        widths.add(len(places))
        assert len(places) <= min(max_width, x.shape[axis])
        assert places.tolist() == list(range(places[0], places[0] + len(places))) if len(places) else True
        torch.testing.assert_close(after[before != after], before.mean().expand(int(changed.sum())))
    assert len(widths) > 4, "each example has a mask of its own"


def test_masks_of_no_width_change_nothing():
    assert torch.equal(frequency_mask(images(), 0, seeded()), images())
    assert torch.equal(time_mask(images(), 0, seeded()), images())


def test_freq_mixstyle_blends_statistics_of_two_examples():
    x = images()
    mixed = freq_mixstyle(x, 1.0, 0.3, seeded(5))
    axes = {"dim": (1, 3), "keepdim": True}
    # The pattern inside each mel bin stays ...
    standard = (x - x.mean(**axes)) / x.std(**axes)
    torch.testing.assert_close((mixed - mixed.mean(**axes)) / mixed.std(**axes), standard, atol=1e-4, rtol=1e-4)
    # ... and one share for each example explains the new means and deviations of all its bins
    for i in range(len(x)):
        fits = []
        for j in range(len(x)):
            mean_gap = x.mean(**axes)[i] - x.mean(**axes)[j]
            std_gap = x.std(**axes)[i] - x.std(**axes)[j]
            gaps = torch.cat([mean_gap, std_gap]).flatten()
            moved = torch.cat([mixed.mean(**axes)[i] - x.mean(**axes)[j], mixed.std(**axes)[i] - x.std(**axes)[j]])
            share = (moved.flatten() @ gaps) / (gaps @ gaps) if i != j else torch.tensor(1.0)
            off = (moved.flatten() - share * gaps).abs().max()
            fits.append(bool(off < 1e-3) and -1e-3 <= float(share) <= 1 + 1e-3)
        assert any(fits)


def test_freq_mixstyle_tosses_once_for_the_batch():
    x = images()
    left_alone = [torch.equal(freq_mixstyle(x, 0.4, 0.3, seeded(seed)), x) for seed in range(200)]
    assert 0.5 < np.mean(left_alone) < 0.7
    assert torch.equal(freq_mixstyle(x, 0.0, 0.3, seeded()), x)


def test_freq_mixstyle_lets_no_gradient_through_its_statistics():
    x = images().requires_grad_()
    mixed = freq_mixstyle(x, 1.0, 0.3, seeded())
    mixed.sum().backward()
    # With detached statistics the gradient of the sum is one scale for each bin, the same at every frame
    assert torch.equal(x.grad, x.grad[..., :1].expand_as(x.grad))
    assert (x.grad > 0).all()


def test_mixup_tells_the_caller_how_to_mix_labels():
    x = images()
    mixed, permutation, own_share = mixup(x, 0.3, seeded())
    assert sorted(permutation.tolist()) == list(range(len(x)))
    assert ((own_share >= 0.5) & (own_share <= 1)).all()
    share = own_share[:, None, None, None]
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[permutation])
    labels = torch.eye(len(x))
    wanted = own_share[:, None] * labels + (1 - own_share[:, None]) * labels[permutation]
    torch.testing.assert_close(blend(labels, permutation, own_share), wanted)


def test_device_responses_convolve_in_place_and_keep_level(tmp_path):
    pulse = np.zeros(50, np.float32)
    pulse[[20, 22]] = 3.0, -1.5
    bank = DeviceResponses(responses(tmp_path / "irs", late=pulse), RATE)
    waveforms = torch.randn(8, 1000, generator=seeded())
    heard = bank(waveforms, 1.0, seeded())
    scale = 1 / np.sqrt(3.0**2 + 1.5**2)
    wanted = 3.0 * scale * waveforms
    wanted[:, 2:] -= 1.5 * scale * waveforms[:, :-2]
    torch.testing.assert_close(heard, wanted, atol=1e-5, rtol=1e-5)
    assert 0.9 < heard.square().mean() / waveforms.square().mean() < 1.1


def test_device_responses_of_other_rates_and_peaks_are_lined_up(tmp_path):
    folder = responses(tmp_path / "irs", early=np.float32([1, 0, 0]), late=np.float32([0] * 70 + [2, 0]))
    soundfile.write(folder / "other_rate.flac", np.float32([0] * 30 + [0.9] + [0] * 30), 48_000)
    (folder / "notes.txt").write_text("credits")
    bank = DeviceResponses(folder, RATE)
    assert [path.name for path in bank.files] == ["early.wav", "late.wav", "other_rate.flac"]
    torch.testing.assert_close(bank.responses.square().sum(dim=1), torch.ones(3))
    assert bank.responses.argmax(dim=1).tolist() == [bank.peak] * 3 == [70] * 3
    tone = torch.sin(torch.arange(2000) / 20).repeat(60, 1)
    heard = bank(tone, 1.0, seeded())
    # All three are pulses, the last one low-passed: nothing moves, whichever is drawn
    gain = (heard * tone).sum(dim=1) / tone.square().sum(dim=1)
    assert len(torch.unique(gain.round(decimals=2))) == 2
    torch.testing.assert_close(heard[:, 50:-50], gain[:, None] * tone[:, 50:-50], atol=2e-2, rtol=0)


def test_device_responses_are_heard_by_a_share_p_of_the_clips(tmp_path):
    bank = DeviceResponses(responses(tmp_path / "irs", a=np.float32([1, -1]), b=np.float32([1, 1])), RATE)
    waveforms = torch.randn(300, 64, generator=seeded())
    heard = bank(waveforms, 0.6, seeded())
    changed = (heard != waveforms).any(dim=1)
    assert 0.5 < changed.float().mean() < 0.7
    assert torch.equal(bank(waveforms, 0.0, seeded()), waveforms)
    assert torch.equal(heard, bank(waveforms, 0.6, seeded()))
    assert bank.state_dict() == {}


def test_device_responses_name_a_folder_that_gives_none(tmp_path):
    with pytest.raises(DataError, match=r"gone: a folder of impulse responses was wanted, there is no such folder"):
        DeviceResponses(tmp_path / "gone", RATE)
    with pytest.raises(DataError, match=r"irs: no impulse response found.*\.flac, \.mp3, \.ogg, \.wav"):
        DeviceResponses(responses(tmp_path / "irs"), RATE)


def test_device_responses_name_all_bad_files(tmp_path):
    folder = responses(tmp_path / "irs", good=np.float32([1, 0]), silent=np.zeros(9, np.float32))
    (folder / "broken.wav").write_bytes(b"RIFF?")
    with pytest.raises(DataError, match="2 impulse responses cannot be used") as caught:
        DeviceResponses(folder, RATE)
    assert "broken.wav: cannot be read as audio" in str(caught.value)
    assert "silent.wav: is silent" in str(caught.value)


def test_device_responses_load_the_real_microphones(real_audio):
    bank = DeviceResponses(real_audio / "micirp", 32_000)
    assert len(bank.files) == 66
    torch.testing.assert_close(bank.responses.square().sum(dim=1), torch.ones(66))
    noise = torch.randn(16, 32_000, generator=seeded())
    level = bank(noise, 1.0, seeded()).square().mean(dim=1)
    assert ((level > 0.7) & (level < 1.3)).all()


def test_responses_of_test_devices_are_left_out(tmp_path):
    folder = responses(tmp_path / "irs", a=np.float32([1, -1]), b=np.float32([1, 1]), c=np.float32([1]))
    bank = DeviceResponses(folder, RATE, exclude=("b.wav",))
    assert [path.name for path in bank.files] == ["a.wav", "c.wav"]
    assert len(bank.responses) == 2
    with pytest.raises(DataError, match=r"(?s)names 2 files that are not among its 3.*\n.*B.wav.*\n.*nought.wav"):
        DeviceResponses(folder, RATE, exclude=("b.wav", "B.wav", "nought.wav"))
    with pytest.raises(DataError, match="no impulse response is left by device_response_exclude"):
        DeviceResponses(folder, RATE, exclude=("a.wav", "b.wav", "c.wav"))
    assert responses_sha256(folder) != responses_sha256(folder, ("b.wav",))
    before = responses_sha256(folder)
    (folder / "a.wav").write_bytes((folder / "b.wav").read_bytes())
    assert responses_sha256(folder) != before
