"""Published checkpoints of Audio Mamba, and of Vision Mamba (Vim) trained on ImageNet, as weights of our models.

Keys and conversions: `AudioMamba.__init__` (`aum_pretrain`, `imagenet_pretrain`) in AuM's src/models/mamba_models.py,
and src/utilities/tokenization.py.
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aum_compress.errors import ModelFileError, join_problems
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import AudioMambaConfig, BlockType, Grid, PatchStem
from aum_compress.models.positions import resample_positions

AUM_MELS = 128
"""All published AuM models hear 128 mel bins; the file itself says only how many tokens it was made for."""
IMAGE_MODEL, IMAGE_POSITIONS, IMAGE_CHANNELS = "model", "pos_embed", 3
PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed.pos_embed"
IN_PROJ = "layers.0.mixer.in_proj.weight"
ROTARY = ("rope.freqs_cos", "rope.freqs_sin")
"""Tables that AuM stores and we compute."""


@dataclass(frozen=True)
class Published:
    """What a checkpoint holds, under AuM's names, and where it comes from."""

    path: Path
    tensors: Mapping[str, Tensor]
    from_images: bool
    """Vim on ImageNet: three input channels, position rows in the order of the tokens, a head for other things."""

    @property
    def block_type(self) -> BlockType:
        """Told by the parameters of the backward direction."""
        mixer = "layers.0.mixer."
        if f"{mixer}conv1d_b.weight" in self.tensors:
            return "v2"
        return "v1" if f"{mixer}A_b_log" in self.tensors else "none"


def read_published(path: Path) -> Published:
    """Reads a checkpoint of AuM (a flat state dict) or Vim (a state dict under `model`), `module.` taken off the names.

    Raises:
        ModelFileError: absent, no checkpoint of torch's, cut short, or without an Audio Mamba's first block in it.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # Vim's files carry their command line
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}; a checkpoint was wanted") from None
    except Exception as error:  # torch's readers raise whatever such bytes lead them to
        reason = str(error).partition("\n")[0][:200]
        raise ModelFileError(
            f"{path}: not a whole checkpoint of tensors ({path.stat().st_size} bytes): {reason}. Wanted what "
            "torch.save writes of a state dict; download or copy the file again"
        ) from None
    nested = isinstance(found, Mapping) and isinstance(found.get(IMAGE_MODEL), Mapping)
    state = found[IMAGE_MODEL] if nested else found
    tensors = {}
    if isinstance(state, Mapping):
        tensors = {str(name).removeprefix("module."): t for name, t in state.items() if isinstance(t, Tensor)}
    if [tensors[name].dim() for name in (PATCHES, IN_PROJ) if name in tensors] != [4, 2]:
        names = ", ".join(list(tensors)[:5]) or f"no tensor but {type(state).__name__}"
        raise ModelFileError(
            f"{path}: no checkpoint of Audio Mamba or Vision Mamba: holds {names}; wanted {PATCHES} and "
            f"{IN_PROJ} among its keys, at the top or under `model`"
        )
    from_images = IMAGE_POSITIONS in tensors or tensors[PATCHES].shape[1] == IMAGE_CHANNELS
    if IMAGE_POSITIONS in tensors:
        tensors[POSITIONS] = tensors.pop(IMAGE_POSITIONS)
    return Published(path, tensors, from_images)


def state_for(published: Published, config: AudioMambaConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The checkpoint as weights (float32) of `build_model(config)`, and what was done to make it so, in words.

    Kernels of another patch size, positions of another grid and the head of other classes are converted or left out;
    everything else has to fit.

    Raises:
        ModelFileError: tensors that are missing, unexpected or of another shape, all named at once; positions whose
            grid cannot be told.
    """
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in AudioMamba(config).state_dict().items()}
    state = {name: tensor.float() for name, tensor in published.tensors.items()}
    notes = []
    if config.position == "rope":
        state = {name: tensor for name, tensor in state.items() if name not in ROTARY}
    if isinstance(config.stem, PatchStem):
        notes += _fit_patches(state, published, config)
    head = {name: tensor.shape for name, tensor in state.items() if name.startswith("head.")}
    wanted_head = {name: shape for name, shape in wanted.items() if name.startswith("head.")}
    if published.from_images or head != wanted_head:
        notes.append(f"head: left fresh: the checkpoint's is not the {config.head} head for {config.n_classes} classes")
        state = {name: tensor for name, tensor in state.items() if name not in head}
        wanted = {name: shape for name, shape in wanted.items() if name not in wanted_head}
    problems = [f"{name}: missing" for name in wanted.keys() - state.keys()]
    problems += [f"{name}: unexpected" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name}: shape {tuple(state[name].shape)}, wanted {tuple(wanted[name])}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name]
    ]
    if problems:
        raise ModelFileError(
            join_problems(f"{published.path}: does not fit the model:", sorted(problems, key=_by_number))
            + f"\nThe checkpoint is {_described(published)}; set preset, block_type, pool, position and stem to match"
        )
    return state, notes


def load_published(model: AudioMamba, path: Path) -> list[str]:
    """Loads a published checkpoint into `model`, in place; returns what was converted or left fresh, in words.

    Raises:
        ModelFileError: all that `read_published` and `state_for` raise.
    """
    state, notes = state_for(read_published(path), model.config)
    model.load_state_dict(state, strict=False)  # a fresh head is all that may be missing
    return notes


def resize_kernel(kernel: Tensor, size: Grid) -> Tensor:
    """(M,1,rows,columns) patch kernel for patches of another size: what it gives for a patch that is resized with them.

    Pseudo-inverse of bilinear resizing: Beyer et al. 2023, "FlexiViT", section 3.4; exact for larger patches.
    """
    old = (kernel.shape[2], kernel.shape[3])
    pixels = torch.eye(math.prod(old), dtype=torch.float64).unflatten(1, (1, *old))
    resize = F.interpolate(pixels, size=size, mode="bilinear").flatten(1)  # old pixels x new pixels
    resized = kernel.double().flatten(2) @ torch.linalg.pinv(resize).T
    return resized.unflatten(2, size).to(kernel.dtype)


def _fit_patches(state: dict[str, Tensor], published: Published, config: AudioMambaConfig) -> list[str]:
    """Brings patch kernel and positions of `state` to the configuration's channels, patch size and grid, in place."""
    notes = []
    kernel, patch = state[PATCHES], (config.stem.patch_mels, config.stem.patch_frames)
    if kernel.shape[1] == IMAGE_CHANNELS:
        kernel = kernel.mean(1, keepdim=True)
        notes.append(f"{PATCHES}: mean over {IMAGE_CHANNELS} channels")
    old_patch = (kernel.shape[2], kernel.shape[3])
    if old_patch != patch:
        kernel = resize_kernel(kernel, patch)
        notes.append(f"{PATCHES}: {_sized(old_patch)} resized to {_sized(patch)}")
    state[PATCHES] = kernel
    if POSITIONS in state and state[POSITIONS].dim() == 3 and config.position == "absolute":
        prefix = int(config.pool == "class_token")
        rows = state[POSITIONS]
        if published.from_images and prefix:
            middle = (rows.shape[1] - 1) // 2
            rows = torch.cat([rows[:, middle : middle + 1], rows[:, :middle], rows[:, middle + 1 :]], dim=1)
        old = _position_grid(published, rows.shape[1] - prefix, old_patch, config)
        if old != config.token_grid:
            notes.append(f"{POSITIONS}: {_sized(old)} resampled to {_sized(config.token_grid)}")
        state[POSITIONS] = resample_positions(rows, old, config.token_grid, prefix)
    return notes


def _position_grid(published: Published, count: int, patch: Grid, config: AudioMambaConfig) -> Grid:
    """The grid that `count` position rows were learned for: a square for images, columns of 128 mel bins for AuM."""
    if published.from_images:
        rows = math.isqrt(count)
    elif config.n_mels == AUM_MELS and count == math.prod(config.token_grid):
        return config.token_grid  # also where patches overlap
    else:
        rows = AUM_MELS // patch[0]
    if rows == 0 or count % rows or (published.from_images and rows * rows != count):
        kind = "a square" if published.from_images else f"rows of {AUM_MELS} mel bins in patches of {patch[0]}"
        raise ModelFileError(
            f"{published.path}: {POSITIONS}: {count} rows beside the class token's cannot be laid out as {kind}; "
            "wanted a model with one class token and patches that do not overlap"
        )
    return rows, count // rows


def _described(published: Published) -> str:
    tensors = published.tensors
    depth = len({match[1] for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))})
    parts = [
        f"{depth} blocks of type {published.block_type}",
        f"d_model {tensors[PATCHES].shape[0]}",
        f"d_inner {tensors[IN_PROJ].shape[0] // 2}",
        "a class token" if "cls_token" in tensors else "no class token",
        "learned positions" if POSITIONS in tensors else "no learned positions",
    ]
    return ", ".join(parts)


def _sized(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"


def _by_number(problem: str) -> list[int | str]:
    """Block 2 before block 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", problem)]
