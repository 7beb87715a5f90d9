"""What pruning is worth on ESC10-mobile, at equal training time, and what half of the states costs.

    python benchmarks/prune_bar.py --data DIR --responses DIR [--fold 1] [--epochs 40]
    python benchmarks/prune_bar.py --summary               Markdown of benchmarks/results/prune_bar.jsonl

DIRs as for esc10_mobile.py, whose teachers, augmentation and rules hold here too: give it the same --work, and teachers
that are there are not trained again. Four runs, all distilled, each a recipe that the package runs:

    pruned      a student of about three times the limits, trained, then pruned to them in steps with fine-tuning
    scratch     the very configuration that pruning left, from scratch, for the same total time
    by-hand     the preset student-edge, from scratch, for the same total time; its bytes and MACs are the limits
    half-state  the preset trained for --epochs, then half of d_state pruned, then fine-tuned

Time is that of training and of choosing what to prune, in seconds of a batch, measured once, interleaved, for each
configuration: so the epochs of `scratch` and `by-hand` do not depend on what else the machine has been doing. A killed
benchmark goes on at the epoch where it was. The bars: `pruned` at least 1 point above `scratch`; `half-state` at most 1
point below what it began with. Accuracy is that of the int8 file in onnxruntime on the test part, which chose nothing.
"""

import argparse
import math
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from esc10_mobile import EDGE, EDGE_FRONT_END, Benchmark, add_training_arguments, append, parsed, read, run_config

from aum_compress.audio.config import LogMelConfig
from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import analytic_stored
from aum_compress.bundle import read_bundle
from aum_compress.models.config import AudioMambaConfig
from aum_compress.models.factory import build_model
from aum_compress.models.presets import PRESETS
from aum_compress.train.module import parameter_groups

RESULTS = Path(__file__).parent / "results" / "prune_bar.jsonl"
RUNS = ("pruned", "scratch", "by-hand", "half-state")
WIDER = 1.85
"""Factor on every width of the preset: about three times its bytes and its MACs."""
BAR_ABOVE_SCRATCH, BAR_HALF_STATE = 1.0, 1.0
TIMED_ROUNDS = 7
BATCH = 32


def multiple_of_8(width: float) -> int:
    return max(8, round(width / 8) * 8)


def section_of(config: AudioMambaConfig) -> dict[str, Any]:
    """A configuration as the `student` section of a recipe."""
    return {
        "preset": "student",
        "d_model": config.d_model,
        "blocks": [block.model_dump() for block in config.blocks],
        "stem": config.stem.model_dump(exclude={"folded"}),
        "pool": config.pool,
        "position": config.position,
        "head": config.head,
        "mean_subtraction": config.mean_subtraction,
    }


def wider(config: AudioMambaConfig, factor: float) -> AudioMambaConfig:
    """Every width of the preset times `factor`, the first stage's apart, whose map is large; twice the states."""
    first, *rest = config.stem.stages
    stages = (first, *(s.model_copy(update={"channels": multiple_of_8(factor * s.channels)}) for s in rest))
    blocks = tuple(
        block.model_copy(
            update={
                "d_inner": multiple_of_8(factor * block.d_inner),
                "d_state": 2 * block.d_state,
                "dt_rank": round(factor * block.dt_rank),
            }
        )
        for block in config.blocks
    )
    stem = config.stem.model_copy(update={"stages": stages})
    return config.model_copy(update={"stem": stem, "blocks": blocks, "d_model": multiple_of_8(factor * config.d_model)})


def cost(config: AudioMambaConfig) -> dict[str, int]:
    stored = sum(layer.param_bytes for layer in analytic_stored(config, "int8").values())
    return {
        "max_param_bytes": stored,
        "max_macs": sum(analytic_macs(config.model_copy(update={"head": "linear"})).values()),
    }


def batch_seconds(configs: list[AudioMambaConfig], rounds: int = TIMED_ROUNDS) -> list[tuple[float, float]]:
    """Median seconds of a training step and of an evaluation of one batch, of each configuration.

    All are measured in turn, one round after the other, on one thread, so that what else the machine does falls on all.
    """
    torch.set_num_threads(1)
    trained = []
    for config in configs:
        model = build_model(config).train().to(memory_format=torch.channels_last)
        trained.append((model, torch.optim.AdamW(parameter_groups(model, 1e-3))))
    steps: list[list[float]] = [[] for _ in configs]
    evaluations: list[list[float]] = [[] for _ in configs]
    for turn in range(rounds + 1):
        for place, (model, optimizer) in enumerate(trained):
            config = configs[place]
            x = torch.randn(BATCH, 1, config.n_mels, config.n_frames)
            start = perf_counter()
            F.cross_entropy(model.train()(x), torch.arange(BATCH) % config.n_classes).backward()
            optimizer.step()
            optimizer.zero_grad()
            between = perf_counter()
            with torch.inference_mode():
                model.eval()(x)
            if turn:  # the first one is slower
                steps[place].append(between - start)
                evaluations[place].append(perf_counter() - between)
    return [(statistics.median(own), statistics.median(other)) for own, other in zip(steps, evaluations)]


def total_seconds(
    epochs: list[int], evaluated: list[int], seconds: list[tuple[float, float]], batches: int, measured_batches: int
) -> float:
    """Of training and of choosing what goes.

    Args: epochs: of each configuration. evaluated: how often each was evaluated whole, to choose the next one. seconds:
        of a step and an evaluation of each. batches: of an epoch. measured_batches: of one evaluation.
    """
    training = sum(n * batches * step for n, (step, _) in zip(epochs, seconds, strict=True))
    return training + sum(n * measured_batches * each for n, (_, each) in zip(evaluated, seconds))


class Bar:
    """The runs of one fold, and what is known of those that are finished."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.fold = arguments, Benchmark(arguments, arguments.fold)
        front_end = LogMelConfig.model_validate(EDGE_FRONT_END)
        self.hand = PRESETS[EDGE["preset"]](front_end.n_mels, front_end.n_frames(1.0), 10)
        self.wide = wider(self.hand, WIDER)
        self.limits = cost(self.hand)

    def key(self, run: str) -> dict[str, Any]:
        own = self.arguments
        return {
            "config": f"prune-bar-{run}",
            "fold": own.fold,
            "seed": own.seed,
            "epochs": own.epochs,
            "steps": [own.steps, own.step_epochs, own.last_epochs],
        }

    def done(self, run: str) -> dict[str, Any] | None:
        wanted = self.key(run)
        return next((line for line in read(self.arguments.results) if wanted.items() <= line.items()), None)

    def trained(self, epochs: int) -> dict[str, Any]:
        """A `distill` section of so many epochs."""
        section = self.fold.distillation()
        return section | {"train": section["train"] | {"epochs": epochs}}

    def prune(self, last: int, **changes: Any) -> dict[str, Any]:
        tuned = self.fold.training() | {
            "epochs": self.arguments.step_epochs,
            "learning_rate": 1e-3,
            "warmup_epochs": 0.5,
        }
        return {"finetune": tuned, "last_epochs": last} | changes

    def sections(self, run: str) -> dict[str, Any]:
        return {"features": EDGE_FRONT_END} | self.stages(run)

    def stages(self, run: str) -> dict[str, Any]:
        own = self.arguments
        if run == "pruned":
            return {
                "student": section_of(self.wide),
                "distill": self.trained(own.epochs),
                "prune": self.prune(own.last_epochs, to_budget=True, steps=own.steps),
                "budget": self.limits,
            }
        if run == "half-state":
            half = self.prune(own.last_epochs, ratio=0.5, dimensions=["d_state"])
            return {"student": section_of(self.hand), "distill": self.trained(own.epochs), "prune": half}
        times = self.done("pruned")["times"]
        student = self.hand if run == "by-hand" else AudioMambaConfig.model_validate(times["configs"][-1])
        return {"student": section_of(student), "distill": self.trained(times[f"{run}_epochs"])}

    def times(self, train_clips: int) -> dict[str, Any]:
        """Of the run `pruned`: what it took, and the epochs in which its rivals take as long."""
        own = self.arguments
        card = read_bundle(own.work / "runs" / self.fold.name("prune-bar-pruned") / "05-prune").card
        recipe = self.fold.recipe("prune-bar-pruned", **self.sections("pruned"))
        steps = card.notes["steps"]
        configs = [self.wide, *(AudioMambaConfig.model_validate(step["model"]) for step in steps)]
        epochs = [own.epochs, *(step["epochs"] for step in steps)]
        *seconds, hand = batch_seconds([*configs, self.hand])
        # Taylor's gradients are worth three evaluations; the loss is taken whole, cut and fine-tuned
        evaluated = [len(step["measured"]) + 6 for step in steps]
        batches = math.ceil(train_clips / BATCH)
        measured = math.ceil(min(recipe.prune.importance_clips, train_clips) / BATCH)
        total = total_seconds(epochs, evaluated, seconds, batches, measured)
        return {
            "configs": [config.model_dump(mode="json") for config in configs],
            "epochs": epochs,
            "evaluated": evaluated,
            "batch_seconds": [*seconds, hand],
            "total_seconds": total,
            "scratch_epochs": max(1, round(total / (batches * seconds[-1][0]))),
            "by-hand_epochs": max(1, round(total / (batches * hand[0]))),
        }

    def run(self, run: str) -> dict[str, Any]:
        line = run_config(self.fold, f"prune-bar-{run}", self.sections(run)) | self.key(run)
        if run == "pruned":
            line["times"] = self.times(line["train_clips"])
        if run == "half-state":  # what it began with, through the same quantisation
            base = run_config(
                self.fold, "prune-bar-whole-state", {k: v for k, v in self.sections(run).items() if k != "prune"}
            )
            line["whole"] = base["files"]
        return line


def summary(lines: list[dict[str, Any]]) -> str:
    """Markdown: the runs, and whether the bars are met."""
    rows = [("run", "fold", "param bytes", "MACs", "accuracy, int8", "accuracy, fp32"), ("---",) * 2 + ("---:",) * 4]
    by_run: dict[str, dict[str, Any]] = {}
    for line in lines:
        run = line["config"].removeprefix("prune-bar-")
        by_run[run] = line["files"]
        if "whole" in line:
            by_run["whole-state"] = line["whole"]
    for run, files in by_run.items():
        fold = next(line["fold"] for line in lines)
        figures = [f"{files['int8'][key]:,}" for key in ("param_bytes", "macs")]
        rows.append((run, str(fold), *figures, *(f"{files[p]['all']:.2f}" for p in ("int8", "fp32"))))
    text = ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    pairs = (("pruned", "scratch", BAR_ABOVE_SCRATCH), ("half-state", "whole-state", -BAR_HALF_STATE))
    for run, rival, bar in pairs:
        if run in by_run and rival in by_run:
            gap = by_run[run]["int8"]["all"] - by_run[rival]["int8"]["all"]
            met = "met" if gap >= bar else f"missed by {bar - gap:.2f}"
            text.append(f"{run} against {rival}: {gap:+.2f} points; wanted at least {bar:+.1f}: {met}")
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, RESULTS, epochs=40)  # of the wide student, and of half-state before pruning
    parser.add_argument("--fold", type=int, default=1, choices=range(1, 6))
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--step-epochs", type=int, default=5, help="behind each step of pruning")
    parser.add_argument("--last-epochs", type=int, default=20, help="behind the last one")
    arguments = parsed(parser)
    if not arguments.summary:
        bar = Bar(arguments)
        for run in (run for run in RUNS if run in arguments.runs):
            if run in ("scratch", "by-hand") and bar.done("pruned") is None:
                parser.error(
                    f"--runs {run}: how long it may train follows from the run `pruned`, which is not finished"
                )
            if bar.done(run) is None:
                append(arguments.results, bar.run(run))
    print(summary(read(arguments.results)))


if __name__ == "__main__":
    main()
