"""What views cost and save, and what it does to logits that they are kept as float16.

    python benchmarks/views.py --responses DIR [--out benchmarks/views.json]

On the synthetic soundscapes of the quickstart through the DCASE front-end, with the impulse responses of DIR (such as
MicIRP), one thread. Times are CPU time, which other processes disturb little; medians.

- `render_ms`: one view of one clip of 1 s: roll, response (with probability 0.6), log-mel, written to the cache.
- `batch_ms`: what a batch of 32 takes until it is ready for the model: from views, from features of clean clips (rolled
  by frames), and from waveforms, which are rolled, convolved and transformed at each step.
- `average_ms`: one update of `weight_average`, by preset.
- `float16`: features of a view as float32 and as they are kept, and the logits of an untrained CP-Mobile on both.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import process_time

import numpy as np
import torch
from scan import machine

from aum_compress.audio.augment import DeviceResponses
from aum_compress.audio.config import LogMelConfig
from aum_compress.audio.frontend import front_end_module
from aum_compress.data.datamodule import ClipsDataModule
from aum_compress.data.views import render_views
from aum_compress.models.factory import build_model
from aum_compress.models.presets import PRESETS
from aum_compress.recipe import find_recipe, load_recipe
from aum_compress.recipe_schema import TrainConfig
from aum_compress.train.averaging import average_into
from aum_compress.train.module import TrainingModule
from aum_compress.workspace import Workspace

BATCH, VIEWS = 32, 4


def batch_ms(space: Workspace, config: TrainConfig, cache: Path) -> float:
    """From the data loader to normalised, augmented features; two epochs, the first one not counted."""
    parts, views, responses = space.parts, None, None
    if config.views > 1:
        views = render_views(space.rendering(config), parts.train, lambda: space.waveforms.train, cache_dir=cache)
    elif config.augment.device_response_p:
        parts = space.waveforms
        rate = space.spec.front_end.sample_rate_hz
        responses = DeviceResponses(config.augment.device_response_folder, rate)
    data = ClipsDataModule(parts, BATCH, 0, views=views)
    model = build_model(PRESETS["student"](*space.spec.feature_shape[1:], len(space.labels)))
    sizes = {"n_classes": len(space.labels), "steps_per_epoch": 1, "seed": 0}
    module = TrainingModule(model, space.spec, config, responses=responses, **sizes)
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    with torch.no_grad():
        for epoch in range(2):
            loader = iter(data.train_dataloader())
            for _ in range(data.train_batches):
                start = process_time()
                x, _, _ = next(loader)
                module._augmented(x, generator)
                if epoch:
                    found.append(process_time() - start)
    return 1e3 * statistics.median(found)


def average_ms(preset: str) -> float:
    """One update of the moving average."""
    model = build_model(PRESETS[preset](256, 65, 10))
    averaged, found = build_model(model.config).requires_grad_(False), []
    for _ in range(50):
        start = process_time()
        average_into(averaged, model, 0.999)
        found.append(process_time() - start)
    return 1e3 * statistics.median(found)


def float16_error(space: Workspace, config: TrainConfig, cache: Path) -> dict[str, float]:
    """Without responses: the view's float32 features are then those of a rolled waveform, made here again."""
    plain = config.model_copy(update={"augment": config.augment.model_copy(update={"device_response_p": 0.0})})
    rendering, train = space.rendering(plain), space.parts.train
    kept = render_views(rendering, train, lambda: space.waveforms.train, cache_dir=cache)
    rows = np.arange(0, len(train), 4)
    rate, waveforms = space.spec.front_end.sample_rate_hz, space.waveforms.train
    rolls = [round(rendering.draw(train.clips[row].clip_id, 1, 0)[0] * rate) for row in rows]
    rolled = np.stack([np.roll(one, shift) for one, shift in zip(waveforms[rows], rolls, strict=True)])
    with torch.no_grad():
        exact = front_end_module(space.spec.front_end)(torch.from_numpy(rolled))
        stored = torch.from_numpy(kept[len(train) + rows])[:, None]
        torch.manual_seed(0)
        model = build_model(PRESETS["cp-mobile"](*space.spec.feature_shape[1:], len(space.labels))).eval()
        one, other = (model((x - space.spec.mean) / space.spec.std) for x in (exact, stored))
    return {
        "views": len(rows),
        "features_largest_error": float((exact - stored).abs().max()),
        "features_deviation": float(exact.std()),
        "logits_largest_error": float((one - other).abs().max()),
        "logits_deviation": float(one.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    augment = {"time_roll_seconds": 0.1, "device_response_p": 0.6, "device_response_folder": str(arguments.responses)}
    viewed = TrainConfig.model_validate({"epochs": 1, "views": VIEWS, "augment": augment})
    at_each_step = viewed.model_copy(update={"views": 1})
    clean = TrainConfig.model_validate({"epochs": 1, "augment": {"time_roll_seconds": 0.1}})
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(find_recipe("quickstart"), []).model_copy(update={"features": LogMelConfig()})
        space = Workspace(recipe, Path(folder))
        cache, train, waveforms = Path(folder), space.parts.train, space.waveforms.train
        start = process_time()
        kept = render_views(space.rendering(viewed), train, lambda: waveforms, cache_dir=cache)
        render = 1e3 * (process_time() - start) / ((VIEWS - 1) * len(train))
        report = {
            "machine": machine(),
            "clips": len(train),
            "view_bytes_a_clip": kept.files[0].stat().st_size // len(train),
            "render_ms": render,
            "batch_ms": {
                "views": batch_ms(space, viewed, cache),
                "clean features": batch_ms(space, clean, cache),
                "waveforms": batch_ms(space, at_each_step, cache),
            },
            "average_ms": {preset: average_ms(preset) for preset in ("student", "cp-mobile", "aum-small")},
            "float16": float16_error(space, viewed, cache),
        }
    print(json.dumps(report, indent=2))
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
