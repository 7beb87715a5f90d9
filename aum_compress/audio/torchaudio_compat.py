"""The one place that imports torchaudio.

PyPI's torchaudio wheel is linked against CUDA, so beside a CPU-only torch its native extension does not load and
`import torchaudio` raises OSError (RuntimeError where both have CUDA, but of different versions). Nothing here uses
what lives in that extension: lfilter, overdrive, RNN-T loss, forced alignment. torchaudio 2.11 has no switch for it,
but a way for builds without the library: `_load_lib` answers False. When the import fails, and only then, that
answer is given and the import done again.
"""

import importlib
import sys

try:
    import torchaudio
except (OSError, RuntimeError):
    # Python forgets the package whose import failed, yet keeps its helpers that loaded, among them this one.
    sys.modules["torchaudio._extension.utils"]._load_lib = lambda lib: False
    torchaudio = importlib.import_module("torchaudio")

functional = torchaudio.functional
kaldi = torchaudio.compliance.kaldi
transforms = torchaudio.transforms

__all__ = ["functional", "kaldi", "transforms"]
