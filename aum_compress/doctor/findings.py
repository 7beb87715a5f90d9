"""One thing that was looked at. Torch-free."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "absent", "problem"]
"""`absent`: something optional; `problem`: aum-compress does not work, or not as it should."""


@dataclass(frozen=True)
class Finding:
    section: str
    name: str
    state: State
    found: str
    """A version, a folder, a time."""
    note: str = ""
    """What it is for, what is wrong with it, how to mend it."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
