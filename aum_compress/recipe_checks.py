"""What the sections of a recipe have to agree on. Torch-free."""

from typing import Any

from aum_compress.models.storage import QUANTISED

CUMULATIVE_SUM = ("cumsum", "cumulative", "cumulative-sum")
"""Names under which a form of the scan is asked for that is refused."""
NO_CUMULATIVE_SUM = (
    "exp(s) * cumsum(drive * exp(-s)), with s the running sum of dt*A, is refused: exp(-s) leaves float32 once s has "
    "fallen by 89, as dt 0.2 and A -16 make it in 28 tokens; clamping exp(s) hides that and stays wrong. Wanted scan, "
    "chunked, unrolled (docs/latency.md)"
)
NOT_IN_ORT_FORMAT = frozenset(("int4", "mixed"))
NO_ORT_FORMAT = "onnxruntime cannot read weights of 4 bits back from its own format; leave it out, or the format"
NO_BLOCKS = "train.activation_checkpointing: works on Mamba blocks, and cp-mobile has none"


def misfits(recipe: Any) -> list[str]:
    """All that is wrong between sections of a `recipe_schema.Recipe`, each by its place."""
    problems = []
    if not recipe.features.n_frames(recipe.data.clip_seconds):
        clip = recipe.features.clip_samples(recipe.data.clip_seconds)
        problems.append(f"features.window_samples: {recipe.features.window_samples}, but a clip has {clip} samples")
    from_teacher = recipe.prune is not None and recipe.prune.start == "teacher"
    needing = recipe.distill or recipe.prune or recipe.quantize or recipe.devices or recipe.export
    if recipe.student is None and needing and not from_teacher:
        problems.append("student: needed by distill, prune, quantize, devices and export")
    if recipe.export and recipe.export.ort and (narrow := NOT_IN_ORT_FORMAT.intersection(recipe.export.precisions)):
        problems.append(f"export.ort: {', '.join(sorted(narrow))}: {NO_ORT_FORMAT}")
    if recipe.devices and recipe.data.kind == "folders":
        problems.append("devices: class folders do not say which device recorded; wanted data in TAU's layout")
    if from_teacher and recipe.teacher is None:
        problems.append("prune.start: teacher, but the recipe has no section teacher")
    if from_teacher and (recipe.student or recipe.distill):
        problems.append("prune.start: the teacher is pruned; leave out student and distill, which would go unused")
    if recipe.student and not recipe.student.train and not recipe.distill:
        problems.append("student.train: needed, since there is no distill section to train the student")
    if not recipe.data.validation_fraction:
        problems += [
            f"{place}.keep: best is chosen on validation clips, and data.validation_fraction is 0; set keep: last"
            for place, config in recipe.trainings().items()
            if config.keep == "best"
        ]
    if recipe.distillation:
        softened = {
            "distill.train": recipe.distill and recipe.distill.train,
            "prune.finetune": recipe.prune and recipe.prune.finetune,
            "quantize.train": recipe.quantize and recipe.quantize.train,
            "devices.finetune": recipe.devices and recipe.devices.finetune,
        }
        problems += [
            f"{place}.label_smoothing: has no part in the distillation loss, whose targets are soft; leave it out"
            for place, config in softened.items()
            if config and config.label_smoothing
        ]
        for stage in ("teacher", "reference"):
            if recipe.distill and stage in recipe.distill.teachers and getattr(recipe, stage) is None:
                problems.append(f"distill.teachers: names {stage}, but the recipe has no section {stage}")
    pruned = recipe.teacher if from_teacher else recipe.student
    if recipe.prune and pruned and pruned.preset == "cp-mobile":
        problems.append("prune: works on Audio Mamba, and cp-mobile is none")
    checkpointed = recipe.distill and recipe.distill.train.activation_checkpointing
    if recipe.student and recipe.student.preset == "cp-mobile" and checkpointed:
        problems.append(f"distill.{NO_BLOCKS}")
    if recipe.quantize and recipe.quantize.train and recipe.quantize.train.activation_checkpointing:
        problems.append(
            "quantize.train.activation_checkpointing: a block that is computed again would move the ranges of its "
            "inputs twice, and round by other ranges than before; leave it out"
        )
    for name in sorted(set(recipe.export.precisions if recipe.export else ()) & set(QUANTISED)):
        if recipe.quantize is None:
            problems.append(f"export.precisions: {name} needs a quantize section")
        elif name != recipe.quantize.precision:
            problems.append(f"export.precisions: {name}, but quantize makes {recipe.quantize.precision}: name that")
    if recipe.export and recipe.export.input_rate_hz and not recipe.export.waveform:
        problems.append("export.input_rate_hz: of files that read waveforms, and export.waveform is false")
    if recipe.verify and recipe.export is None:
        problems.append("verify: needs an export section")
    return problems
