"""The meta information that is submitted beside the predictions: `<label>_<index>.meta.yaml`.

Keys are those of the challenge's template of 2025. What only the authors know is null, unless a file of theirs says it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aum_compress.audio.config import KaldiConfig
from aum_compress.bundle import RECIPE, Bundle
from aum_compress.errors import RecipeError
from aum_compress.recipe import load_recipe
from aum_compress.recipe_schema import Recipe

_PERSON = {
    "lastname": None,
    "firstname": None,
    "email": None,
    "corresponding": True,
    "affiliation": {"abbreviation": None, "institute": None, "department": None, "location": None},
}
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
    own_models = len(bundles) > 1
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
                "data_augmentation": _augmentation(recipe),
                "machine_learning_method": "CNN"
                if general.card.model.family == "cp_mobile"
                else "CNN, state space model (Mamba)",
                "external_data_usage": None,
                "complexity_management": _complexity_management(recipe, general.card.precision),
                "pipeline": _pipeline(recipe, own_models),
                "framework": "pytorch",
                "device_information": "per-device end-to-end fine-tuning" if own_models else None,
                "num_models_at_inference": len(bundles),
                "model_weight_sharing": "fully device-specific" if own_models else "fully shared",
            },
            "complexity": dict(costs),
            "external_datasets": None,
        },
        "results": {"development_dataset": dict(results) or None},
    }
    if given is None:
        return meta
    try:
        values = yaml.safe_load(given.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{given}: cannot be read as YAML: {error}") from None
    return _replaced(meta, values, str(given))


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


def _augmentation(recipe: Recipe | None) -> str | None:
    if recipe is None:
        return None
    used = [train.augment for train in recipe.trainings().values()]
    found = [word for key, word in _AUGMENTATIONS.items() if any(getattr(augment, key) for augment in used)]
    return ", ".join(found) or None


def _complexity_management(recipe: Recipe | None, precision: str) -> str:
    found = ["network design"]
    found += ["knowledge distillation"] if recipe and recipe.distill else []
    found += ["pruning"] if recipe and recipe.prune else []
    return ", ".join([*found, "weight quantization" if precision == "int8" else "precision_16"])


def _pipeline(recipe: Recipe | None, own_models: bool) -> str | None:
    if recipe is None:
        return None
    steps = []
    if recipe.distill:
        teachers = len(recipe.distill.teachers)
        steps += ["train teachers"] if recipe.teacher or recipe.reference else []
        steps += ["ensemble teachers"] if teachers > 1 else []
        steps += ["train general student model with knowledge distillation"]
    elif recipe.student:
        steps += ["train general model"]
    steps += ["structured pruning with fine-tuning"] if recipe.prune else []
    steps += ["device-specific end-to-end fine-tuning"] if own_models else []
    steps += ["post-training quantization"] if recipe.quantize else []
    return ", ".join(steps)
