"""What the synthetic soundscapes sound like, before a device records them. numpy only.

A clip is a noise bed and two trains of events, its scene's own in front and another scene's further away, often with a
hum or chatter; all of it rings in the room and the colour of its place. All trains are sung by the same kind of voice,
at random pitch, from pure tone to noise, so the average spectrum says little about the scene: it lies in the order of
events in time, in their rhythm, rate, attack and glide. Measured by benchmarks/synth_hardness.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

SAMPLE_RATE_HZ = 44_100
EVENT_RATE_HZ = SAMPLE_RATE_HZ // 2
"""Events are sung at half the rate, in half the time: little of theirs lies above 11 kHz."""

Range = tuple[float, float]
"""Lowest and highest of values drawn uniformly."""


@dataclass(frozen=True, slots=True)
class Train:
    """A train of events."""

    rhythm: Literal["regular", "paired", "irregular"]
    events_per_second: Range
    event_seconds: Range
    """Length of one event."""
    shape: Literal["strike", "swell"]
    """`strike`: at once there, then dying away; `swell`: coming and going alike."""
    glide_octaves: Range = (0.0, 0.0)
    """From the pitch at the start of an event to that at its end."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One class: its own train, and weak habits of colour that overlap with every other scene's."""

    train: Train
    bed_slope_db: float
    """Mean slope of the noise bed in dB an octave."""
    pitch_hz: float
    """Median pitch of the voices."""


def _passing(low_octaves: float, high_octaves: float) -> Train:
    return Train("regular", (1.0, 1.4), (0.7, 1.0), "swell", (low_octaves, high_octaves))


SCENES: dict[str, Scene] = {
    # a source that passes: pitch up, pitch down
    "airport": Scene(_passing(0.5, 1.2), -4.0, 1100.0),
    "metro_station": Scene(_passing(-1.2, -0.5), -7.0, 650.0),
    # vehicles one after another, without glide
    "street_traffic": Scene(Train("irregular", (3.0, 5.0), (0.16, 0.26), "swell"), -8.0, 550.0),
    # engine and rail: slow and fast throbbing
    "bus": Scene(Train("regular", (4.5, 6.5), (0.13, 0.2), "swell"), -9.0, 400.0),
    "metro": Scene(Train("regular", (9.5, 13.0), (0.06, 0.09), "swell"), -6.0, 600.0),
    # rail joints, steps, things put down
    "tram": Scene(Train("paired", (3.5, 5.5), (0.08, 0.2), "strike"), -8.0, 900.0),
    "street_pedestrian": Scene(Train("regular", (3.5, 5.5), (0.08, 0.2), "strike"), -5.0, 1400.0),
    "shopping_mall": Scene(Train("irregular", (6.0, 9.0), (0.08, 0.2), "strike"), -2.5, 1100.0),
    # calls and birds: falling and rising chirps
    "public_square": Scene(Train("regular", (4.0, 7.0), (0.08, 0.14), "swell", (-1.3, -0.7)), -4.0, 1600.0),
    "park": Scene(Train("regular", (4.0, 7.0), (0.08, 0.14), "swell", (0.7, 1.3)), -1.5, 2200.0),
}
"""The ten TAU scenes."""

_CHATTER = Train("irregular", (4.0, 7.0), (0.1, 0.22), "swell", (-0.2, 0.2))

_PITCH_SPREAD_OCTAVES = 0.6
_CHATTER_CHANCE, _HUM_CHANCE = 0.4, 0.4
_OWN_LEVEL_DB = (6.0, 15.0)
_OTHER_LEVEL_DB = (-18.0, -8.0)
_CHATTER_LEVEL_DB = (-8.0, 2.0)
_HUM_LEVEL_DB = (-12.0, 0.0)
"""Peak levels of the layers against the noise bed's RMS; `other` against the scene's own train."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where clips are recorded: its room, colour and habits are the same in all of them."""

    scene: str
    city: str
    number: int
    bed_slope_db: float
    pitch_hz: float
    level_db: float
    room: np.ndarray = field(repr=False)
    """(S // 2 + 1,) complex: spectrum of the room's response to the events."""
    colour: np.ndarray = field(repr=False)
    """(S // 2 + 1,): gain of everything heard there."""

    @property
    def identifier(self) -> str:
        """City and number, as in TAU's meta.csv."""
        return f"{self.city}-{self.number}"


def make_place(rng: np.random.Generator, scene: str, city: str, number: int, n_samples: int) -> Place:
    """A place of the scene for clips of S = `n_samples`."""
    habits = SCENES[scene]
    time_s = np.arange(n_samples) / SAMPLE_RATE_HZ
    # The room's response: direct sound, then noise that dies away, by 60 dB in `decay_s` (Polack's statistical model)
    decay_s = _log_uniform(rng, (0.15, 1.0))
    tail = rng.standard_normal(n_samples) * np.exp(-6.9 * time_s / decay_s)
    tail *= _gain(rng.uniform(-12.0, 0.0)) / np.linalg.norm(tail)
    tail[0] += 1.0
    return Place(
        scene=scene,
        city=city,
        number=number,
        bed_slope_db=habits.bed_slope_db + rng.normal(0.0, 1.0),
        pitch_hz=habits.pitch_hz * 2 ** rng.normal(0.0, 0.4),
        level_db=rng.uniform(-38.0, -24.0),
        room=np.fft.rfft(tail),
        colour=smooth_response(rng, n_samples, ripple_db=3.0),
    )


def soundscape(rng: np.random.Generator, place: Place, n_samples: int) -> np.ndarray:
    """One clip at the place, as the air carries it: (S // 2 + 1,) complex, the spectrum of S samples at full scale 1.

    Rooms and filters wrap around: what rings on past the end of the clip is heard at its beginning, as if the place had
    sounded before.
    """
    own, other = SCENES[place.scene], SCENES[rng.choice([name for name in SCENES if name != place.scene])]
    own_level_db = rng.uniform(*_OWN_LEVEL_DB)
    layers = [(own_level_db, own.train), (own_level_db + rng.uniform(*_OTHER_LEVEL_DB), other.train)]
    if rng.random() < _CHATTER_CHANCE:
        layers.append((rng.uniform(*_CHATTER_LEVEL_DB), _CHATTER))
    events = np.zeros(n_samples // 2)
    for level_db, train in layers:
        pitch_hz = place.pitch_hz * 2 ** rng.normal(0.0, _PITCH_SPREAD_OCTAVES)
        events += _gain(level_db) * play(rng, train, pitch_hz, len(events))
    if rng.random() < _HUM_CHANCE:
        hum_hz = np.full(len(events), _log_uniform(rng, (80.0, 400.0)))
        events += _gain(rng.uniform(*_HUM_LEVEL_DB)) * voice(rng, hum_hz, 0.002)
    spectrum = _bed(rng, place.bed_slope_db + rng.normal(0.0, 1.0), n_samples)
    heard = len(events) // 2 + 1
    spectrum[:heard] += 2 * np.fft.rfft(events) * place.room[:heard]  # of twice as many samples: twice the sums
    spectrum *= place.colour
    rms = np.sqrt(2) * np.linalg.norm(spectrum) / n_samples  # Parseval
    return spectrum * (_gain(place.level_db + rng.normal(0.0, 3.0)) / rms)


def onsets(rng: np.random.Generator, train: Train, seconds: float) -> np.ndarray:
    """When a train's events begin, in seconds, sorted; the first may have begun before 0."""
    interval = 1 / rng.uniform(*train.events_per_second)
    count = int(np.ceil(seconds / interval)) + 1
    strays = rng.uniform(-0.45, 0.45, count) if train.rhythm == "irregular" else rng.normal(0.0, 0.02, count)
    times = interval * (np.arange(count) + strays - rng.random())
    if train.rhythm == "paired":
        # every second event comes early, close behind the one before it
        times[1::2] -= interval * rng.uniform(0.6, 0.7)
    return times


def voice(rng: np.random.Generator, frequency_hz: np.ndarray, breath: float) -> np.ndarray:
    """A source of about unit peak with two overtones and noise in its phase: (S,) at EVENT_RATE_HZ.

    `frequency_hz` (S,) is its pitch. The phase's random walk widens the fundamental to a Lorentzian band, `breath`
    times the pitch wide at half maximum: 0.002 is a whistle, 0.5 coloured noise.
    """
    step = 2 * np.pi * frequency_hz / EVENT_RATE_HZ
    step = step + np.sqrt(breath * step) * rng.standard_normal(len(step))
    wave = np.sin(np.cumsum(step) + rng.uniform(0.0, 2 * np.pi))
    second, third = rng.uniform(0.0, 0.4, 2)
    square = wave * wave  # powers of a sine are its overtones
    return wave * (1 + third * square) + second * (2 * square - 1)


def play(rng: np.random.Generator, train: Train, pitch_hz: float, n_samples: int) -> np.ndarray:
    """A train sung by a voice of random breath: (S,) at EVENT_RATE_HZ; events peak within 4 dB of the voice's level."""
    times = onsets(rng, train, n_samples / EVENT_RATE_HZ)
    length = round(rng.uniform(*train.event_seconds) * EVENT_RATE_HZ)
    progress = np.arange(length) / length
    shape = np.exp(-5 * progress) if train.shape == "strike" else np.sin(np.pi * progress) ** 2
    glide = rng.uniform(*train.glide_octaves) * (progress - 0.5)
    loudness, octaves = np.zeros(n_samples), np.zeros(n_samples)
    for time_s, event_db in zip(times, rng.uniform(-4.0, 0.0, len(times))):
        begin = round(time_s * EVENT_RATE_HZ)
        first, last = max(begin, 0), min(begin + length, n_samples)
        if first < last:
            part = slice(first - begin, last - begin)
            loudness[first:last] = np.maximum(loudness[first:last], _gain(event_db) * shape[part])
            octaves[first:last] = glide[part]
    return loudness * voice(rng, pitch_hz * np.exp2(octaves), _log_uniform(rng, (0.003, 0.5)))


def smooth_response(rng: np.random.Generator, n_samples: int, *, ripple_db: float) -> np.ndarray:
    """(S // 2 + 1,) gains that wander with frequency: normal with `ripple_db` at every octave, linear in between."""
    octave = np.log2(np.maximum(_frequencies(n_samples), 20.0) / 20.0)
    knots = np.arange(12)
    return _gain(np.interp(octave, knots, rng.normal(0.0, ripple_db, len(knots))))


def _bed(rng: np.random.Generator, slope_db: float, n_samples: int) -> np.ndarray:
    """(S // 2 + 1,) complex: spectrum of stationary noise of unit RMS, falling by `slope_db` an octave above 50 Hz."""
    octaves = np.log2(np.maximum(_frequencies(n_samples), 50.0) / 50.0)
    real, imaginary = rng.standard_normal((2, n_samples // 2 + 1))
    spectrum = (real + 1j * imaginary) * _gain(slope_db * octaves)
    spectrum[0] = 0.0
    return spectrum * (n_samples / np.sqrt(2) / np.linalg.norm(spectrum))


def _frequencies(n_samples: int) -> np.ndarray:
    """(S // 2 + 1,) in Hz."""
    return np.fft.rfftfreq(n_samples, 1 / SAMPLE_RATE_HZ)


def _gain(decibels: np.ndarray | float) -> np.ndarray | float:
    return 10 ** (decibels / 20)


def _log_uniform(rng: np.random.Generator, bounds: Sequence[float]) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))
