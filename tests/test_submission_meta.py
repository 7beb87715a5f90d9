"""What the meta file of a submission says was done: of the packed model, not of the rest of its recipe."""

from pathlib import Path

import pytest
from tiny import SPEC, aum_config, cp_config, student_config
from tiny_recipe import TRAIN, recipe

from aum_compress.bundle import RECIPE, Bundle, BundleCard
from aum_compress.models.config import ConvBlockConfig, Mamba2BlockConfig, PatchStem
from aum_compress.recipe import dump_recipe
from aum_compress.submission.meta import meta_information

PATCHES = PatchStem(patch_mels=8, patch_frames=8, stride_mels=8, stride_frames=8)
INT8 = {"head": "int8"}
TEACHERS = "train teachers, ensemble teachers, train general student model with knowledge distillation"
PRUNED = f"{TEACHERS}, structured pruning with fine-tuning"


def bundle(folder: Path, stage: str, precision="fp32", layers=None, config=None, **changes) -> Bundle:
    """A card and a recipe; meta information reads no more. Args: changes: of the recipe."""
    place = folder / f"{len(list(folder.iterdir()))}-{stage}"
    place.mkdir()
    (place / RECIPE).write_text(dump_recipe(recipe(folder, **changes)))
    card = BundleCard(
        kind="model",
        stage=stage,
        recipe="tiny",
        model=config or student_config(),
        input=SPEC,
        labels=("bus", "park", "tram"),
        precision=precision,
        quantized_layers=layers or {},
        seed=0,
        versions={},
        created="",
        files={RECIPE: ""},
    )
    return Bundle(place, card)


def described(*bundles: Bundle) -> dict:
    named = {("general", "a")[place]: one for place, one in enumerate(bundles)}
    return meta_information("Doe_XY_task1_1", named, {}, {}, None)["system"]["description"]


@pytest.mark.parametrize(
    ("stage", "precision", "layers", "changes", "pipeline", "complexity"),
    [
        ("reference", "fp32", {}, {}, "train general model", "precision_16"),
        ("distill", "fp32", {}, {}, TEACHERS, "knowledge distillation, precision_16"),
        ("prune", "fp32", {}, {}, PRUNED, "knowledge distillation, pruning, precision_16"),
        (
            *("quantize", "int8", INT8, {}),
            *(f"{PRUNED}, post-training quantization", "knowledge distillation, pruning, weight quantization"),
        ),
        (
            *("quantize", "int4", {"head": "int4-weight"}, {"prune": None, "quantize": {"train": TRAIN}}),
            *(f"{TEACHERS}, quantization-aware training", "knowledge distillation, weight quantization"),
        ),
        (
            *("quantize", "mixed", INT8, {"distill": None, "student": {"train": TRAIN}, "teacher": None}),
            *("train general model, structured pruning with fine-tuning, post-training quantization",),
            "pruning, weight quantization",
        ),
        (
            *("devices", "int8", INT8, {"devices": {}}),
            *(f"{PRUNED}, post-training quantization", "knowledge distillation, pruning, weight quantization"),
        ),
        (
            *(
                "prune",
                "fp32",
                {},
                {"distill": None, "student": None, "prune": {"start": "teacher", "finetune": TRAIN}},
            ),
            *("train teachers, structured pruning with fine-tuning", "knowledge distillation, pruning, precision_16"),
        ),
    ],
)
def test_steps_are_those_that_the_packed_model_went_through(
    stage, precision, layers, changes, pipeline, complexity, tmp_path
):
    found = described(bundle(tmp_path, stage, precision, layers, **changes))
    assert found["pipeline"] == pipeline
    assert found["complexity_management"] == f"network design, {complexity}"


def test_a_model_of_a_device_is_fine_tuned_where_the_stage_devices_made_it(tmp_path):
    general = bundle(tmp_path, "quantize", "int8", INT8)
    rival = described(general, bundle(tmp_path, "reference"))
    assert "device-specific" not in rival["pipeline"]
    assert rival["device_information"] is None
    assert rival["complexity_management"].endswith("weight quantization, precision_16")
    for own in (
        bundle(tmp_path, "devices", devices={}),
        bundle(tmp_path, "quantize", "int8", INT8, devices={}),
    ):
        found = described(general, own)
        assert "device-specific end-to-end fine-tuning, post-training quantization" in found["pipeline"]
        assert found["device_information"] == "per-device end-to-end fine-tuning"


def test_augmentation_is_that_of_trainings_behind_the_model(tmp_path):
    later = {"ratio": 0.4, "steps": 2, "round_to": 2, "finetune": TRAIN | {"augment": {"mixup_alpha": 0.3}}}
    plain = {
        "augment": {key: 0 for key in ("time_roll_seconds", "frequency_mask_mels", "time_mask_frames", "mixstyle_p")}
    }
    changes = {"distill": {"teachers": ["teacher"], "train": TRAIN | plain}, "prune": later}
    assert "mixup" not in (described(bundle(tmp_path, "distill", **changes))["data_augmentation"] or "")
    assert "mixup" in described(bundle(tmp_path, "prune", **changes))["data_augmentation"]


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (cp_config(), "CNN"),
        (student_config(), "CNN, state space model (Mamba)"),
        (aum_config(), "state space model (Mamba)"),
        (student_config().model_copy(update={"blocks": (ConvBlockConfig(d_inner=24, d_conv=5),)}), "CNN"),
        (
            student_config().model_copy(
                update={
                    "stem": PATCHES,
                    "blocks": (Mamba2BlockConfig(d_inner=24, d_state=4, head_dim=8), student_config().blocks[0]),
                }
            ),
            "state space model (Mamba), state space model (Mamba-2)",
        ),
    ],
)
def test_the_method_is_what_the_blocks_are(config, method, tmp_path):
    assert described(bundle(tmp_path, "student", config=config))["machine_learning_method"] == method
