"""What an exported file is, before anything is run: its names, shapes, labels and weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnxruntime import InferenceSession
from pydantic import ValidationError

from aum_compress.audio.config import InputSpec
from aum_compress.audio.front_ends import LOG_MEL
from aum_compress.bundle import CARD, BundleCard, file_sha256
from aum_compress.errors import DataError
from aum_compress.export.metadata import RATE_KEY, OnnxMetadata
from aum_compress.export.onnx_writer import OUTPUT_NAME, fold_if_needed
from aum_compress.export.runtime import clip_features, run_session
from aum_compress.export.verification import Check, finding
from aum_compress.models.factory import Model
from aum_compress.models.quantized import stored_tensors


def check_names(session: InferenceSession, metadata: OnnxMetadata) -> Check:
    """One input and one output, under the names that runtimes rely on."""
    inputs, outputs = ([v.name for v in values] for values in (session.get_inputs(), session.get_outputs()))
    problems = []
    if inputs != [metadata.reads]:
        problems.append(f"inputs {inputs}, wanted {[metadata.reads]}")
    if outputs != [OUTPUT_NAME]:
        problems.append(f"outputs {outputs}, wanted {[OUTPUT_NAME]}")
    return finding("names", problems)


def check_metadata(session: InferenceSession, metadata: OnnxMetadata) -> Check:
    """What the metadata say, against themselves: a front-end that can be built and makes features of a clip, and the
    sample rate, which stands there a second time for readers that look no deeper."""
    problems = []
    stated = session.get_modelmeta().custom_metadata_map.get(RATE_KEY)
    if stated != json.dumps(metadata.sample_rate_hz):
        problems.append(f"{RATE_KEY} is {stated}, input.front_end says {metadata.sample_rate_hz}")
    try:
        InputSpec.model_validate(dict(metadata.input))
        clip_features(np.zeros(metadata.clip_samples), metadata)
    except ValidationError as error:
        for found in error.errors():
            place = ".".join(map(str, ("input", *found["loc"])))
            problems.append(f"{place}: {found['msg'].removeprefix('Value error, ')}")
    except DataError as error:  # a clip too short for one frame
        problems.append(str(error))
    return finding("metadata", problems)


def check_shapes(session: InferenceSession, front_end: InferenceSession | None, metadata: OnnxMetadata) -> Check:
    """Types and shapes against the metadata's front-end and labels.

    Args:
        front_end: of a file that has one inside; what it makes of a clip must be what the metadata say as well.
    """
    problems = []
    wanted = {"input": list(metadata.input_shape), "output": [len(metadata.labels)]}
    for kind, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for value in values:
            if value.type != "tensor(float)" or value.shape[1:] != wanted[kind]:
                problems.append(f"{value.name} is {value.type} {value.shape}, wanted float32 (batch, *{wanted[kind]})")
            elif isinstance(value.shape[0], int) and value.shape[0] != 1:
                problems.append(f"{value.name} has a batch of {value.shape[0]}, wanted 1 or an open one")
    if front_end is not None and not problems:
        made = run_session(front_end, np.zeros((1, *metadata.input_shape), dtype=np.float32)).shape[1:]
        if made != metadata.feature_shape:
            problems.append(
                f"the front-end inside makes features of {list(made)}, wanted {list(metadata.feature_shape)}"
            )
    return finding("shapes", problems)


def check_identity(metadata: OnnxMetadata, labels: tuple[str, ...], spec: InputSpec, source: str) -> list[Check]:
    """Labels and input of the metadata against those of `source`."""
    problems = [
        f"class {place} is {found!r}, {source} says {wanted!r}"
        for place, (found, wanted) in enumerate(zip(metadata.labels, labels))
        if found != wanted
    ]
    if len(metadata.labels) != len(labels):
        problems.append(f"{len(metadata.labels)} labels, {source} has {len(labels)}")
    found, wanted = _flat(metadata.input), _flat(spec.model_dump(mode="json"))
    differing = [
        f"{key} is {found.get(key)}, {source} says {wanted.get(key)}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    return [finding(f"labels of {source}", problems), finding(f"front-end of {source}", differing)]


def _flat(record: Mapping) -> dict[str, object]:
    return {
        "kind": LOG_MEL,
        **record["front_end"],
        **{key: value for key, value in record.items() if key != "front_end"},
    }


def check_card(path: Path, metadata: OnnxMetadata) -> list[Check]:
    """Against the bundle that the file lies in, if it lies in one."""
    card_path = path.parent / CARD
    if not card_path.is_file():
        return []
    try:
        card = BundleCard.model_validate_json(card_path.read_bytes())
    except (ValidationError, UnicodeDecodeError):
        return [finding("bundle card", [f"{CARD} beside the file cannot be read"])]
    if path.name not in card.files:
        return []
    wanted, found = card.files[path.name], file_sha256(path)
    altered = (
        [] if found == wanted else [f"sha256 {found[:12]}..., the card says {wanted[:12]}...: altered or cut short"]
    )
    return [finding("bundle card", altered), *check_identity(metadata, card.labels, card.input, "the bundle card")]


def check_weights(proto: onnx.ModelProto, model: Model) -> Check:
    """Each tensor of the model against the initialiser of its name, bit by bit; a Linear may be stored transposed."""
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    unfit, differing = [], []
    for name, tensor in stored_tensors(fold_if_needed(model), half=False, pack=False).items():
        wanted = tensor.numpy()
        if name not in found:
            unfit.append(f"{name} is absent")
            continue
        narrow = found[name].dtype in (np.float16, ml_dtypes.int4)
        stored = found[name].astype(wanted.dtype) if narrow else found[name]
        options = [w for w in (wanted, wanted.T) if w.shape == stored.shape and w.dtype == stored.dtype]
        if not options:
            unfit.append(f"{name} is {stored.dtype} {stored.shape}, wanted {wanted.dtype} {wanted.shape}")
        elif count := min(int((stored != option).sum()) for option in options):
            differing.append(f"{name}: {count} of {stored.size} values differ")
    return finding("weights", unfit + differing)
