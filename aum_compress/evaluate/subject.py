"""What is measured: a torch bundle, an ONNX file or a pack of them, behind one way to get logits."""

from pathlib import Path

import numpy as np

from aum_compress.audio.config import InputSpec
from aum_compress.audio.reading import read_audio
from aum_compress.budget.onnx_file import exported_file
from aum_compress.bundle import CARD, Bundle, read_bundle
from aum_compress.console import Advance
from aum_compress.data.cache import CachedClips
from aum_compress.data.clips import Clip
from aum_compress.device_names import GENERAL
from aum_compress.export.metadata import FEATURES, OnnxMetadata
from aum_compress.export.runtime import Classifier, clip_input
from aum_compress.packs import Pack, is_pack, read_pack

BATCH = 64


class Subject:
    """A bundle (one that holds the ONNX file that ships is measured through it), a .onnx file, or a pack, each clip of
    which its device's model answers; whichever `path` is.

    Raises AumError when it is none of these, cut short or altered.
    """

    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    spec: InputSpec
    measured_with: str
    """`torch` or `onnxruntime`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bundle: Bundle | None = None
        self._pack: Pack | None = None
        if is_pack(path):
            self._pack = read_pack(path)
            path = self._pack.onnx_file(GENERAL)
        elif path.is_dir() or path.name == CARD:
            bundle = read_bundle(path if path.is_dir() else path.parent)
            # the models of a pack are tensors and file in one
            if bundle.card.kind == "model" and f"model-{bundle.card.precision}.onnx" not in bundle.card.files:
                self._bundle = bundle
            else:
                path = exported_file(bundle)
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
        if self._pack:
            return _pack_logits(self._pack, cached, self.spec, advance)
        return onnx_logits(self._classifier, cached, self.spec, advance)


def _pack_logits(pack: Pack, cached: CachedClips, spec: InputSpec, advance: Advance) -> np.ndarray:
    asked = np.array([pack.model_for(clip.device) for clip in cached.clips])
    logits: np.ndarray | None = None
    for name in np.unique(asked):
        rows = np.flatnonzero(asked == name)
        own = cached.only([cached.clips[row] for row in rows])
        answers = onnx_logits(Classifier(pack.onnx_file(name)), own, spec, advance)
        logits = np.empty((len(cached), answers.shape[1]), dtype=np.float32) if logits is None else logits
        logits[rows] = answers
    return logits


def onnx_logits(classifier: Classifier, cached: CachedClips, spec: InputSpec, advance: Advance) -> np.ndarray:
    """(n,C) of one file in onnxruntime; one with the front-end inside hears the clips' own audio."""
    metadata, found = classifier.metadata, []
    for start in range(0, len(cached), BATCH):
        if metadata.reads == FEATURES:
            inputs = ((cached[start : start + BATCH] - spec.mean) / spec.std).astype(np.float32)[:, None]
        else:
            inputs = np.concatenate([_waveform(clip, metadata) for clip in cached.clips[start : start + BATCH]])
        found.append(classifier.logits(inputs))
        advance(min(start + BATCH, len(cached)), len(cached))
    return np.concatenate(found)


def _waveform(clip: Clip, metadata: OnnxMetadata) -> np.ndarray:
    """(1,S) at the rate that the file reads."""
    window = {"start_seconds": clip.start_seconds, "duration_seconds": metadata.clip_seconds}
    return clip_input(read_audio(clip.path, metadata.waveform_rate_hz, **window), metadata)
