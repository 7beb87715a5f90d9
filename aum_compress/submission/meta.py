"""The meta information that is submitted beside the predictions: `<label>_<index>.meta.yaml`.

Keys are those of the challenge's template of 2025. What only the authors know is null, unless a file of theirs says it.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from aum_compress.audio.config import KaldiConfig
from aum_compress.bundle import RECIPE, Bundle
from aum_compress.errors import RecipeError
from aum_compress.models.config import AudioMambaConfig, ConvStem, CPMobileConfig
from aum_compress.recipe import load_recipe, read_yaml
from aum_compress.recipe_schema import Recipe

_PERSON = {
    "lastname": None,
    "firstname": None,
    "email": None,
    "corresponding": True,
    "affiliation": {"abbreviation": None, "institute": None, "department": None, "location": None},
}
_STUDENT = ("student", "distill", "prune")
"""Stages that make a general model in floating point, in their order."""
_AUGMENTATIONS = {
    "time_roll_seconds": "time rolling",
    "frequency_mask_mels": "frequency masking",
    "time_mask_frames": "time masking",
    "mixstyle_p": "freq-mixstyle",
    "mixup_alpha": "mixup",
    "device_response_p": "dir augmentation",
}


def meta_information(
    name: str,
    bundles: Mapping[str, Bundle],
    costs: Mapping[str, int],
    results: Mapping[str, Any],
    given: Path | None,
) -> dict[str, Any]:
    """What the file holds.

    Args:
        name: `<label>_<index>`.
        bundles: name of each model -> its bundle, the general one first.
        costs: `total_model_size`, `total_parameters` and `macs` of the largest model.
        results: `general` and, where devices have models of their own, `device_specific`; empty where not measured.
        given: a file with the authors' own values, which replace these.

    Raises:
        RecipeError: a key in `given` that the template does not have, with its place.
    """
    general = next(iter(bundles.values()))
    recipe = _recipe_of(general)
    behind = _sections_behind(recipe, bundles) if recipe else frozenset()
    front_end = general.card.input.front_end
    meta = {
        "submission": {"label": name, "name": None, "abbreviation": None, "authors": [_PERSON]},
        "system": {
            "inference_code": None,
            "source_code": None,
            "description": {
                "input_sampling_rate": f"{front_end.sample_rate_hz / 1000:g}kHz",
                "acoustic_features": "log-mel energies (kaldi)"
                if isinstance(front_end, KaldiConfig)
                else "log-mel energies",
                "data_augmentation": _augmentation(recipe, behind) if recipe else None,
                "machine_learning_method": _method(general.card.model),
                "external_data_usage": None,
                "complexity_management": _complexity_management(recipe, behind, bundles),
                "pipeline": _pipeline(recipe, behind) if recipe else None,
                "framework": "pytorch",
                "device_information": "per-device end-to-end fine-tuning" if "devices" in behind else None,
                "num_models_at_inference": len(bundles),
                "model_weight_sharing": "fully device-specific" if len(bundles) > 1 else "fully shared",
            },
            "complexity": dict(costs),
            "external_datasets": None,
        },
        "results": {"development_dataset": dict(results) or None},
    }
    return meta if given is None else _replaced(meta, read_yaml(given), str(given))


def _replaced(old: Any, new: Any, place: str) -> Any:
    if not isinstance(old, dict):
        return new
    if not isinstance(new, dict):
        raise RecipeError(f"{place}: found {new!r}, wanted keys among {', '.join(old)}")
    if unknown := [str(key) for key in new if key not in old]:
        raise RecipeError(f"{place}: the template has no {', '.join(unknown)} there; it has {', '.join(old)}")
    return old | {key: _replaced(old[key], value, f"{place}: {key}") for key, value in new.items()}


def _recipe_of(bundle: Bundle) -> Recipe | None:
    return load_recipe(bundle.path / RECIPE) if RECIPE in bundle.card.files else None


def _sections_behind(recipe: Recipe, bundles: Mapping[str, Bundle]) -> frozenset[str]:
    """Sections of the recipe that had a part in the packed models: a stage's bundle does not know those after it, and
    its recipe lists them all the same."""
    general, *own = bundles.values()
    stage = general.card.stage
    if stage in ("quantize", "devices"):  # of the general model in a pack, devices is the stage that wrote it there
        found = {*_STUDENT}
    else:
        found = set(_STUDENT[: _STUDENT.index(stage) + 1]) if stage in _STUDENT else {stage}
    if taught := recipe.distillation if found & {"distill", "prune"} else None:
        found |= {*taught.teachers} & {"teacher", "reference"}
    if any(one.card.quantized_layers for one in bundles.values()):
        found.add("quantize")
    found = {name for name in found if getattr(recipe, name) is not None}
    return frozenset(found | ({"devices"} if any(_is_fine_tuned(one) for one in own) else set()))


def _is_fine_tuned(bundle: Bundle) -> bool:
    """Whether a device's model comes from the stage `devices`, after which it may have been quantised."""
    recipe, stage = _recipe_of(bundle), bundle.card.stage
    return stage == "devices" or (stage == "quantize" and recipe is not None and recipe.devices is not None)


def _augmentation(recipe: Recipe, behind: Set[str]) -> str | None:
    used = [train.augment for place, train in recipe.trainings().items() if place.partition(".")[0] in behind]
    found = [word for key, word in _AUGMENTATIONS.items() if any(getattr(augment, key) for augment in used)]
    return ", ".join(found) or None


def _method(config: AudioMambaConfig | CPMobileConfig) -> str:
    if isinstance(config, CPMobileConfig):
        return "CNN"
    mixers = {block.mixer for block in config.blocks}
    found = ["CNN"] if "conv" in mixers or isinstance(config.stem, ConvStem) else []
    spaces = [name for mixer, name in (("mamba", "Mamba"), ("mamba2", "Mamba-2")) if mixer in mixers]
    return ", ".join(found + [f"state space model ({name})" for name in spaces])


def _complexity_management(recipe: Recipe | None, behind: Set[str], bundles: Mapping[str, Bundle]) -> str:
    found = ["network design"]
    found += ["knowledge distillation"] if recipe and recipe.distillation and behind & {"distill", "prune"} else []
    found += ["pruning"] if "prune" in behind else []
    found += ["weight quantization"] if any(one.card.quantized_layers for one in bundles.values()) else []
    # a model without quantised layers is packed in float16
    found += ["precision_16"] if any(not one.card.quantized_layers for one in bundles.values()) else []
    return ", ".join(found)


def _pipeline(recipe: Recipe, behind: Set[str]) -> str | None:
    steps = []
    taught = recipe.distillation if behind & {"distill", "prune"} else None
    if taught:
        steps += ["train teachers"] if {*taught.teachers} & behind else []
        steps += ["ensemble teachers"] if len(taught.teachers) > 1 else []
    if "distill" in behind:
        steps += ["train general student model with knowledge distillation"]
    elif not taught:
        steps += ["train general model"]
    steps += ["structured pruning with fine-tuning"] if "prune" in behind else []
    steps += ["device-specific end-to-end fine-tuning"] if "devices" in behind else []
    if "quantize" in behind:
        steps += ["quantization-aware training" if recipe.quantize.train else "post-training quantization"]
    return ", ".join(steps)
