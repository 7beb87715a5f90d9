"""Exported files on disk: read whole or not at all, written whole or not at all. Torch-free."""

import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from aum_compress.bundle import CARD
from aum_compress.errors import BundleError, ModelFileError
from aum_compress.export.scan_function import SCAN_DOMAIN

IR_VERSION, OPSET = 10, 20
"""A pair that onnxruntime 1.20 and all its successors read; onnx's own defaults are refused by them."""
INT4_OPSET = 21
"""The first one with weights of 4 bits, and the newest of IR 10; used where a model has such weights."""


def load_onnx(path: Path) -> onnx.ModelProto:
    """The file's graph.

    Raises:
        ModelFileError: absent, no ONNX, cut short, or of another IR, opset or domain than `export_onnx` writes.
    """
    try:
        proto = onnx.load(path, format="protobuf")
        onnx.checker.check_model(proto)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}; an ONNX file was wanted") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelFileError(
            f"{path}: not a whole ONNX file ({path.stat().st_size} bytes): {reason}. Export or copy it again"
        ) from None
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("") not in (OPSET, INT4_OPSET) or proto.ir_version > IR_VERSION or opsets.keys() - {"", SCAN_DOMAIN}:
        found = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in opsets.items())
        raise ModelFileError(
            f"{path}: IR {proto.ir_version} with opsets {found or 'none'}; wanted IR up to {IR_VERSION}, ai.onnx "
            f"{OPSET} or {INT4_OPSET} and no other domain than {SCAN_DOMAIN}: not a file that this version exported; "
            "export it again"
        )
    return proto


def write_whole(proto: onnx.ModelProto, path: Path) -> None:
    """Writes `proto` beside `path` and renames it into place.

    Raises:
        ModelFileError: the disk is full or the place is not writable; what stood at `path` still stands there.
    """
    beside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        beside.write_bytes(proto.SerializeToString(deterministic=True))
        os.replace(beside, path)
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be written: {error.strerror or error}. Free space or choose another place"
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def make_plain_folder(folder: Path) -> None:
    """A folder for single files, made if it is not there.

    Raises:
        BundleError: a bundle, whose files never change.
        ModelFileError: it cannot be made.
    """
    if (folder / CARD).is_file():
        raise BundleError(f"--to {folder}: is a bundle, whose files never change; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelFileError(
            f"--to {folder}: no folder can be made there: {error.strerror or error}. Name another place"
        ) from None
