"""What is measured: a torch bundle or an ONNX file, behind one way to get logits."""

from pathlib import Path

import numpy as np

from aum_compress.audio.config import InputSpec
from aum_compress.bundle import CARD, Bundle, read_bundle
from aum_compress.console import Advance
from aum_compress.data.cache import CachedClips
from aum_compress.export.runtime import Classifier

BATCH = 64


class Subject:
    """A bundle (an exported one is measured through the ONNX file that ships) or a .onnx file, whichever `path` is.

    Raises AumError when it is neither, cut short or altered.
    """

    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    spec: InputSpec
    measured_with: str
    """`torch` or `onnxruntime`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bundle: Bundle | None = None
        if path.is_dir() or path.name == CARD:
            bundle = read_bundle(path if path.is_dir() else path.parent)
            if bundle.card.kind == "model":
                self._bundle = bundle
            else:
                path = bundle.path / f"model-{bundle.card.precision}.onnx"
        if self._bundle:
            card = self._bundle.card
            self.labels, self.spec, self.measured_with = card.labels, card.input, "torch"
        else:
            self._classifier = Classifier(path)
            self.labels = self._classifier.labels
            self.spec = InputSpec.model_validate(dict(self._classifier.metadata.input))
            self.measured_with = "onnxruntime"

    def logits(self, cached: CachedClips, advance: Advance) -> np.ndarray:
        """(n,C) for all clips, whose features are those of `spec.front_end`."""
        if self._bundle:
            from aum_compress.train.predict import predict_logits

            return predict_logits(self._bundle.load_model(), cached, self.spec, advance)
        return onnx_logits(self._classifier, cached, self.spec, advance)


def onnx_logits(classifier: Classifier, cached: CachedClips, spec: InputSpec, advance: Advance) -> np.ndarray:
    """(n,C) of one file in onnxruntime."""
    found = []
    for start in range(0, len(cached), BATCH):
        features = (cached[start : start + BATCH] - spec.mean) / spec.std
        found.append(classifier.logits(features.astype(np.float32)[:, None]))
        advance(min(start + BATCH, len(cached)), len(cached))
    return np.concatenate(found)
