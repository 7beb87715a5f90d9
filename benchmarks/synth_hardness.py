"""How hard the synthetic soundscapes are: average spectra against a small Audio Mamba, on seen and on unseen devices.

    python benchmarks/synth_hardness.py --out synth_hardness.json

Wanted: logistic regression on time-averaged log-mel stays 15 points or more below the student, and devices that no
training clip was recorded with cost points. The test part chooses nothing: the regression's penalty is chosen on
validation places, the student's schedule is fixed. About two minutes on one core.

Measured with the defaults: regression 28.8 %, student 78.3 % (83.8 % on seen, 67.3 % on unseen devices); with --seed 1:
26.4 %, 75.2 % (79.7 %, 66.3 %); with --epochs 10: student 71.8 % (74.8 %, 65.7 %).
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from aum_compress.audio.config import FrontEndConfig
from aum_compress.audio.frontend import LogMel
from aum_compress.audio.reading import read_audio
from aum_compress.data.clips import Clip, DataIndex
from aum_compress.data.config import TauData
from aum_compress.data.synth import write_soundscapes
from aum_compress.data.tau import load_tau
from aum_compress.models.config import AudioMambaConfig, ConvStage, ConvStem, uniform_blocks
from aum_compress.models.factory import build_model

FRONT_END = FrontEndConfig(sample_rate_hz=16_000, n_fft=1024, window_samples=800, hop_samples=320, n_mels=64)
BATCH_CLIPS = 64
PEAK_LEARNING_RATE = 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the sounds and of the training")
    parser.add_argument("--train-clips-per-class", type=int, default=150)
    parser.add_argument("--test-clips-per-class", type=int, default=90)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file; standard output when left out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    with tempfile.TemporaryDirectory() as folder:
        root, start = Path(folder), time.perf_counter()
        write_soundscapes(
            root,
            seed=arguments.seed,
            train_clips_per_class=arguments.train_clips_per_class,
            test_clips_per_class=arguments.test_clips_per_class,
        )
        generate_seconds = time.perf_counter() - start
        index = load_tau(TauData(kind="tau", root=root, train_split="100"), arguments.seed)
        train, validation, test = (_features(part) for part in (index.train, index.validation, index.test))

    regression = _average_spectrum_regression(index, train, validation, test)
    start = time.perf_counter()
    model, student = _quick_student(index, torch.cat([train, validation]), test, arguments.epochs)
    result = {
        "arguments": {name: value for name, value in vars(arguments).items() if name != "out"},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (np, sklearn, torch)},
        },
        "front_end": FRONT_END.model_dump(),
        "model": model.model_dump(),
        "clips": {"train": len(train) + len(validation), "test": len(test)},
        "generate_seconds": generate_seconds,
        "train_seconds": time.perf_counter() - start,
        "accuracy": {"average_spectrum_regression": regression, "student": student},
    }
    text = json.dumps(result, indent=2)
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def _features(clips: tuple[Clip, ...]) -> Tensor:
    """(B,1,F,T) log-mel of all clips."""
    log_mel = LogMel(FRONT_END)
    samples = [torch.from_numpy(read_audio(clip.path, FRONT_END.sample_rate_hz)) for clip in clips]
    return torch.cat([log_mel(torch.stack(samples[i : i + 64])) for i in range(0, len(samples), 64)])


def _labels(index: DataIndex, clips: tuple[Clip, ...]) -> np.ndarray:
    return np.array([index.labels.index(clip.label) for clip in clips])


def _accuracy(index: DataIndex, predicted: np.ndarray) -> dict[str, float]:
    """Of the test part: all of it, by whether the device was trained on, by device."""
    right = predicted == _labels(index, index.test)
    device = np.array([clip.device for clip in index.test])
    seen = np.isin(device, sorted(index.seen_devices))
    chosen = {"all": np.full(len(right), True), "seen devices": seen, "unseen devices": ~seen}
    chosen |= {str(name): device == name for name in np.unique(device)}
    return {name: round(float(right[mask].mean()), 4) for name, mask in chosen.items()}


def _average_spectrum_regression(index: DataIndex, train: Tensor, validation: Tensor, test: Tensor) -> dict[str, float]:
    spectra = [part.mean(-1).flatten(1).numpy() for part in (train, validation, test)]
    labels = [_labels(index, part) for part in (index.train, index.validation)]
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000)).fit(spectra[0], labels[0])
        for penalty in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    ]
    best = max(models, key=lambda model: model.score(spectra[1], labels[1]))
    best.fit(np.concatenate(spectra[:2]), np.concatenate(labels))
    return _accuracy(index, best.predict(spectra[2]))


def _quick_student(
    index: DataIndex, train: Tensor, test: Tensor, epochs: int
) -> tuple[AudioMambaConfig, dict[str, float]]:
    """Its configuration, and its accuracy after a short training: AdamW, one cycle, time roll."""
    stages = (
        ConvStage(channels=16, expansion=0),
        ConvStage(channels=24),
        ConvStage(channels=32),
        ConvStage(channels=32),
        ConvStage(channels=40),
    )
    config = AudioMambaConfig(
        n_mels=train.shape[2],
        n_frames=train.shape[3],
        n_classes=len(index.labels),
        d_model=48,
        blocks=uniform_blocks(2, 48, d_state=8),
        stem=ConvStem(stages=stages),
    )
    model = build_model(config)
    mean, std = train.mean(), train.std()
    train, test = (train - mean) / std, (test - mean) / std
    target = torch.from_numpy(_labels(index, index.train + index.validation))
    steps = len(train) // BATCH_CLIPS
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps, pct_start=0.2
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(train))[: steps * BATCH_CLIPS].view(steps, BATCH_CLIPS):
            roll = int(torch.randint(config.n_frames, (1,)))
            logits = model(train[chosen].roll(roll, dims=-1))
            loss = functional.cross_entropy(logits, target[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in test.split(BATCH_CLIPS)])
    return config, _accuracy(index, logits.argmax(1).numpy())


if __name__ == "__main__":
    main()
