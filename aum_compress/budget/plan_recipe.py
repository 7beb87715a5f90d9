"""A planned student as the `student` section of a recipe. Torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from aum_compress.budget.plan import Student
from aum_compress.errors import AumError
from aum_compress.recipe_schema import StudentSection


def student_section(student: Student) -> dict[str, Any]:
    """What `student:` holds in a recipe; read back, it is the same configuration."""
    section = {
        "preset": "student",
        "d_model": student.d_model,
        "depth": student.depth,
        "blocks": [student.block.model_dump()],
        "stem": student.stem.model_dump(exclude={"folded"}),
    }
    wanted = student.wanted
    read = StudentSection.model_validate(section).resolve(wanted.n_mels, wanted.n_frames, wanted.n_classes)
    if read != student.config:
        raise AumError(f"a recipe cannot say this student: found {read}, wanted {student.config}")
    return section


def write_student(rows: Sequence[Student], number: int, path: Path) -> None:
    """Writes the section of one student, counted from 1, with a head that says what the student costs.

    Raises:
        AumError: no such row; the file exists, which nothing here overwrites, or cannot be written.
    """
    if not 1 <= number <= len(rows):
        raise AumError(f"row {number}: wanted one of 1 to {len(rows)}")
    student = rows[number - 1]
    wanted = student.wanted
    head = (
        f"# {student.n_tokens} tokens, {student.cost.param_bytes:,} bytes at {wanted.precision}, {student.macs:,} MACs "
        f"for one second of audio; {student.binding} bind\n"
        f"# for features of {wanted.n_mels} mel bins x {wanted.n_frames} frames and {wanted.n_classes} classes\n"
    )
    sections: dict[str, Any] = {"student": student_section(student)}
    if wanted.limits.int8_weights:  # those too that are no smaller for it
        sections["quantize"] = {"layers": {"layers": "int8"}}
    text = head + yaml.safe_dump(sections, sort_keys=False, default_flow_style=None)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise AumError(f"{path}: exists and is not overwritten; name a new file") from None
    except OSError as error:
        raise AumError(f"{path}: cannot be written: {error.strerror or error}") from None
