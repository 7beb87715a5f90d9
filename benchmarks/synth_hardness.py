"""How hard the synthetic soundscapes are: average spectra against the quickstart's models, on seen and unseen devices.

    aum-compress run quickstart
    python benchmarks/synth_hardness.py exports/quickstart/report.json --out benchmarks/synth_hardness.json

Wanted: logistic regression on time-averaged log-mel stays 15 points or more below the student, and devices that no
training clip was recorded with cost points. The test part chooses nothing: the regression's penalty is chosen on
validation places. Needs scikit-learn (the extra `test`).
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aum_compress.data.cache import CachedClips, cache_index
from aum_compress.data.index import load_index
from aum_compress.recipe import find_recipe, load_recipe
from aum_compress.train.metrics import classification_metrics

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
GROUPS = ("accuracy", "seen", "unseen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of a finished quickstart")
    parser.add_argument("--out", type=Path, help="JSON file; standard output when left out")
    arguments = parser.parse_args()

    report = json.loads(arguments.report.read_text(encoding="utf-8"))
    recipe = load_recipe(find_recipe("quickstart"))
    parts = cache_index(load_index(recipe.data, recipe.seed), recipe.features)
    labels = parts.index.labels
    if report["data"]["test"] != len(parts.test) or tuple(report["data"]["labels"]) != labels:
        raise SystemExit(f"{arguments.report}: is not about the quickstart's data ({len(parts.test)} test clips)")

    spectra = [_average_spectra(part) for part in (parts.train, parts.validation, parts.test)]
    targets = [_targets(part, labels) for part in (parts.train, parts.validation, parts.test)]
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000)).fit(spectra[0], targets[0])
        for penalty in PENALTIES
    ]
    best = max(models, key=lambda model: model.score(spectra[1], targets[1]))
    devices = [clip.device for clip in parts.test.clips]
    regression = classification_metrics(
        best.predict_log_proba(spectra[2]), targets[2], labels, devices, parts.index.seen_devices
    )

    found = {"average spectrum, logistic regression": {key: round(regression[key], 1) for key in GROUPS}}
    found |= {row["title"]: {key: round(row["test"][key], 1) for key in GROUPS} for row in report["road"]}
    result = {
        "command": "python benchmarks/synth_hardness.py exports/quickstart/report.json",
        "machine": {"cpu": platform.machine(), "python": platform.python_version(), "sklearn": sklearn.__version__},
        "clips": {part: report["data"][part] for part in ("train", "validation", "test")},
        "macro_accuracy_percent": found,
    }
    text = json.dumps(result, indent=2)
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def _average_spectra(part: CachedClips) -> np.ndarray:
    """(n,F): each clip's log-mel, averaged over time."""
    return part[:].mean(-1)


def _targets(part: CachedClips, labels: tuple[str, ...]) -> np.ndarray:
    return np.array([labels.index(clip.label) for clip in part.clips])


if __name__ == "__main__":
    main()
