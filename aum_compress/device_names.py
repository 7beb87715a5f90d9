"""What recording devices may be called where one has a model of its own."""

import re
from collections.abc import Sequence

from aum_compress.errors import DataError

GENERAL = "general"
"""Name of the model for devices without one of their own: those that training has not heard, and unknown names."""
_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,63}")


def names_a_folder(name: str) -> bool:
    """Whether a folder can be called so, without leading elsewhere."""
    return _NAME.fullmatch(name) is not None


def require_device_names(names: Sequence[str], where: str) -> None:
    """Raises DataError for names that cannot name a folder: they stand in data that anybody may have written."""
    if bad := [repr(name) for name in names if not names_a_folder(name) or name == GENERAL]:
        raise DataError(
            f"{where}: devices named {', '.join(bad)}: a device with a model of its own names a folder, so up to 64 "
            f"letters, digits and _ . + - were wanted, no dot first, and not {GENERAL}"
        )
