"""Damaged files for every reader of bytes from outside: valid ones, mutated; wanted is a result or an AumError.

`tests/test_fuzz.py` runs some examples of each; `benchmarks/fuzz.py` as many as an hour takes.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from audio_trees import noise, write_class_folders, write_tau_tree
from exported import written

from aum_compress.audio.augment import DeviceResponses
from aum_compress.audio.reading import audio_info, read_audio
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.bundle import CARD, file_sha256, now, read_bundle
from aum_compress.comparing import compare_models
from aum_compress.data.check import check_data
from aum_compress.data.config import FolderData, TauData
from aum_compress.data.index import load_index
from aum_compress.device_names import GENERAL
from aum_compress.errors import AumError
from aum_compress.evaluate.subject import Subject
from aum_compress.export.ort_format import required_operators, write_ort
from aum_compress.export.runtime import Classifier
from aum_compress.models.checkpoints import load_published
from aum_compress.models.factory import build_model
from aum_compress.packs import PACK, PackCard, read_pack
from aum_compress.recipe import load_recipe
from aum_compress.report.write import read_report, report_files
from aum_compress.submission.meta import meta_information
from aum_compress.submission.record import Costs, Record, read_record, write_record
from aum_compress.sweep.space import parse_space, values_of
from aum_compress.sweep.study import Study, study_places
from aum_compress.sweep.trial import Result, Sweep
from aum_compress.sweep.worker import write_summary
from aum_compress.train.teachers import load_outputs, save_outputs

MOST_BYTES = 400_000
TOKENS = (
    *(b"nan", b"-1", b"1e999", b"null", b"[]", b"{}", b'"'),
    *(b"\x00", b"\xff\xfe", b"../../x", b"9" * 40, b"\t", b"\n"),
)


@dataclass(frozen=True)
class Target:
    """One reader, and the valid file that it reads."""

    name: str
    path: Path
    read: Callable[[Path], object]
    beside: Callable[[Path], None] = lambda path: None
    """Called after the file was changed: what has to fit it, so that the reader gets to see the change."""


def mutated(content: bytes, generator: random.Random) -> bytes:
    """`content` with one to four changes: bits flipped; pieces cut, doubled, moved, overwritten or replaced."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        at, length = generator.randrange(len(found) + 1), generator.choice((1, 2, 4, 8, 64, 1024))
        piece = bytes(found[at : at + length])
        kind = generator.randrange(7)
        if kind == 0 and found:
            for _ in range(generator.randint(1, 8)):
                found[generator.randrange(len(found))] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = piece * generator.randint(1, 4)
        elif kind == 3:
            to = generator.randrange(len(found) + 1)
            found[to : to + length] = piece
        elif kind == 4:
            found[at : at + length] = generator.randbytes(min(length, 64))
        elif kind == 5:
            found[at : at + generator.choice((0, 1, length))] = generator.choice(TOKENS)
        else:
            del found[at:]
    return bytes(found[:MOST_BYTES])


def survives(target: Target, content: bytes) -> BaseException | None:
    """What a reader did with `content` that it should not have done; None for a result or an AumError."""
    valid = target.path.read_bytes()
    target.path.write_bytes(content)
    try:
        target.beside(target.path)
        target.read(target.path)
    except AumError as error:
        return None if str(error) else AssertionError("an error without a word")
    except Exception as error:
        return error
    finally:
        target.path.write_bytes(valid)
        target.beside(target.path)
    return None


def targets(folder: Path, bundle: Path, report: Path) -> list[Target]:
    """All readers, on files in `folder`.

    Args:
        bundle: a bundle of kind model to copy. report: a folder with a report.json.
    """
    tree = write_tau_tree(folder / "tree")
    folders = write_class_folders(folder / "sounds", files=3)
    rows = [f"bark/{k}.wav,{k}\nrain/{k}.wav,r{k}\n" for k in range(3)]
    (folders / "groups.csv").write_text("file,group\n" + "".join(rows))
    found = [*_audio(folder), *_tables(tree, folders), *_bundles(folder, bundle), *_npz(folder), *_models(folder)]
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe()))
    found.append(Target("yaml, recipe", recipe, load_recipe))
    shutil.copytree(report, folder / "report")
    written_report = folder / "report" / "report.json"
    found.append(Target("json, report", written_report, lambda path: report_files(read_report(path.parent))))
    return [*found, _checkpoint(folder), _pack(folder, report), *_submission(folder), _sweep(folder, recipe)]


def _audio(folder: Path) -> list[Target]:
    found = []
    for suffix, subtype in (("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("ogg", "VORBIS")):
        path = folder / f"{subtype}.{suffix}"
        soundfile.write(path, noise(0, 0.2, 8000), 8000, subtype=subtype)
        found.append(Target(f"{suffix}, {subtype}", path, lambda path: (audio_info(path), read_audio(path, 8000))))
    responses = folder / "responses"
    responses.mkdir()
    for name in ("one", "two"):
        soundfile.write(responses / f"{name}.wav", noise(1, 0.02, 8000), 8000, subtype="FLOAT")

    def hear(path: Path) -> torch.Tensor:
        return DeviceResponses(path.parent, 16_000)(torch.ones(2, 1600), 1.0, torch.Generator().manual_seed(0))

    return [*found, Target("wav, response", responses / "one.wav", hear)]


def _tables(tree: Path, folders: Path) -> list[Target]:
    def tau(path: Path) -> object:
        return load_index(TauData(kind="tau", root=tree, clip_seconds=0.1), 0)

    def grouped(path: Path) -> object:
        data = FolderData(kind="folders", root=folders, groups_csv=folders / "groups.csv", clip_seconds=0.1)
        return load_index(data, 0)

    return [
        Target("csv, meta", tree / "meta.csv", tau),
        Target("csv, split", tree / "evaluation_setup" / "split25.csv", tau),
        Target("csv, test list", tree / "evaluation_setup" / "test.csv", tau),
        Target("csv, groups", folders / "groups.csv", grouped),
        Target("csv, data check", tree / "meta.csv", lambda path: check_data(tree, clip_seconds=0.1)),
    ]


def _bundles(folder: Path, bundle: Path) -> list[Target]:
    """A bundle's files, its card made to fit them: the checksum does not save the reader behind it."""
    copy = Path(shutil.copytree(bundle, folder / "bundle"))
    card = json.loads((copy / CARD).read_text())

    def seal(path: Path) -> None:
        files = {name: file_sha256(copy / name) for name in card["files"]}
        (copy / CARD).write_text(json.dumps(card | {"files": files}))

    def load(path: Path) -> object:
        return read_bundle(copy).load_model()

    return [
        Target("json, card", copy / CARD, load),
        Target("json, card compared", copy / CARD, lambda path: compare_models([copy])),
        Target("yaml, recipe compared", copy / "recipe.yaml", lambda path: compare_models([copy]), seal),
        Target("safetensors, bundle", copy / "model.safetensors", load, seal),
        Target("npz, golden", copy / "golden.npz", load, seal),
    ]


def _npz(folder: Path) -> list[Target]:
    path, ids, labels = folder / "logits.npz", [f"clip{k}" for k in range(12)], ["bark", "rain"]
    sums = [f"{k:064x}" for k in range(12)]
    logits = np.random.default_rng(0).normal(size=(1, 12, 2))
    save_outputs(path, ids, sums, labels, logits, embeddings=np.ones((1, 12, 4)))
    return [Target("npz, logits", path, lambda path: load_outputs(path, ids, sums, labels))]


def _models(folder: Path) -> list[Target]:
    (folder / "onnx").mkdir()
    model = written(folder / "onnx", "int8")
    ort = model.with_suffix(".ort")
    write_ort(model, ort)

    def answer(path: Path) -> object:
        return Classifier(path).logits(np.zeros((1, 1, 32, 17), dtype=np.float32))

    return [
        Target("onnx, budget", model, check_onnx),
        Target("onnx, runtime", model, answer),
        Target("ort, runtime", ort, answer),
        Target("ort, operators", ort, lambda path: required_operators([path])),
    ]


def _pack(folder: Path, exported: Path) -> Target:
    """What a pack's card says is held against its bundles, which are as they were."""
    place = folder / "pack"
    models = {}
    for name in (GENERAL, "a"):
        shutil.copytree(exported, place / name)
        models[name] = file_sha256(place / name / CARD)
    rest = {"created": now(), "inputs_sha256": "", "devices": [{"device": "a", "gain": 1.0}], "test": {}}
    card = PackCard(recipe="tiny", precision="int8", models=models, **rest)
    (place / PACK).write_text(json.dumps(card.model_dump(mode="json"), indent=1))

    def open_all(path: Path) -> object:
        pack = read_pack(place)
        return Subject(place), [pack.onnx_file(name) for name in pack.card.models], pack.model_for("b")

    return Target("json, pack", place / PACK, open_all)


def _submission(folder: Path) -> list[Target]:
    """The record of a package that a second system joins, and what its authors say of themselves."""
    from aum_compress.submission.texts import readme

    costs = Costs(bundle_sha256="0" * 64, param_bytes=1000, macs=2000, dcase_bytes=1000, dcase_macs=1500)
    systems = {1: {GENERAL: costs, "a": costs}}
    place, label = folder / "package", "Doe_XY_task1"
    (place / label).mkdir(parents=True)
    record = Record(label=label, sources_sha256="0" * 64, systems=systems, checkpoints={f"{label}_1": "0" * 64})
    written_record = write_record(place, record)
    (folder / "meta.yaml").write_text(yaml.safe_dump(_META, sort_keys=False))

    def join(path: Path) -> object:
        found = read_record(place, label).joined(2, systems[1], "0" * 64)
        return readme(label, found.systems, ["bus", "tram"])

    def describe(path: Path) -> str:
        bundles = {GENERAL: read_bundle(folder / "bundle")}
        return yaml.safe_dump(meta_information(f"{label}_1", bundles, {}, {}, path), allow_unicode=True)

    return [
        Target("json, package", written_record, join),
        Target("yaml, meta", folder / "meta.yaml", describe),
    ]


_META = {
    "submission": {"name": "Tiny", "authors": [{"lastname": "Doe", "corresponding": True}]},
    "system": {"source_code": "https://example.org", "description": {"external_data_usage": None}},
    "results": {"development_dataset": {"general": {"overall": {"accuracy": 61.5}}}},
}


def _sweep(folder: Path, recipe: Path) -> Target:
    """A study with a trial done, one whose worker was killed and some that wait; a worker reads a copy of it."""
    sweep = Sweep(
        recipe, (), parse_space(["student.d_model=32,48", "distill.lambda=0.1,0.2"]), *study_places(folder / "study")
    )
    result = Result("complete", "", 50.0, 1000, 2000, "bundle")
    study = Study(sweep)
    study.finish(study.next(), result)
    study.next().lock.release()
    # what differs from one making to the next would have other files drawn
    journal = re.sub(r'(?<="worker_id":")[^"]+', "worker", sweep.storage.read_text())
    journal = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+", "2026-01-01T00:00:00.000000", journal)
    (folder / "study.journal").write_text(journal)

    def work(path: Path) -> object:
        shutil.copy(path, sweep.storage)
        study = Study(sweep)
        if (taken := study.next()) is not None:
            try:
                values_of(sweep.space, taken.drawn)
                study.finish(taken, result)
            finally:
                taken.lock.release()
        return write_summary(sweep, study)

    return Target("journal, sweep", folder / "study.journal", work)


def _checkpoint(folder: Path) -> Target:
    """A published checkpoint: a zip with a pickle in it, of which nothing but tensors is read."""
    from aum_compress.models.config import AudioMambaConfig, PatchStem, uniform_blocks

    config = AudioMambaConfig(
        n_mels=128,
        n_frames=32,
        n_classes=5,
        d_model=16,
        blocks=uniform_blocks(1, 16, d_state=4),
        stem=PatchStem(),
        pool="class_token",
        position="absolute",
    )
    path = folder / "published.pth"
    torch.save({"model": build_model(config).state_dict()}, path)
    return Target("zip, checkpoint", path, lambda path: load_published(build_model(config), path))


def _recipe() -> dict:
    train = {"epochs": 3, "augment": {"mixstyle_p": 0.4}}
    return {
        "name": "fuzzed",
        "data": {"kind": "tau", "root": "somewhere", "validation_fraction": 0.2},
        "student": {"preset": "student", "d_model": 32, "train": train},
        "quantize": {"calibration_clips": 4},
        "export": {"precisions": ["fp32", "int8"]},
        "verify": {},
    }


def fuzzed(target: Target, seed: int) -> tuple[bytes, BaseException | None]:
    """One example, and what went wrong with it."""
    content = mutated(target.path.read_bytes(), random.Random(f"{target.name} {seed}"))
    return content, survives(target, content)


def quiet() -> None:
    """libsndfile's decoders write to the terminal as they please."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
