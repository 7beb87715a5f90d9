"""Cutting clips into parts: whole groups at a time, every class in proportion, the same for the same seed."""

import csv
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from aum_compress.data.clips import Clip
from aum_compress.errors import DataError, join_problems


def read_table(path: Path, required: Sequence[str], delimiters: str = "\t") -> list[dict[str, str]]:
    """Rows of a table with a header line; the delimiter is the first of `delimiters` that the header contains.

    Raises DataError for a file that is missing, not text, lacks a column, has a row of another length or no row.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; wanted a table with the columns {', '.join(required)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a UTF-8 table: {error}") from error
    header = lines[0] if lines else ""
    delimiter = next((mark for mark in delimiters if mark in header), delimiters[0])
    columns = [column.strip() for column in header.split(delimiter)]
    if lacking := [column for column in required if column not in columns]:
        wanted = {"\t": "tab"}.get(delimiter, repr(delimiter))
        raise DataError(
            f"{path}: no column {', '.join(lacking)}; the first line is {header[:120]!r}, "
            f"wanted a header with {', '.join(required)}, {wanted}-separated"
        )
    rows, problems = [], []
    for number, fields in enumerate(csv.reader(lines[1:], delimiter=delimiter), start=2):
        if not any(fields):
            continue
        if len(fields) != len(columns):
            problems.append(f"line {number}: {len(fields)} fields, wanted {len(columns)}")
        rows.append(dict(zip(columns, (field.strip() for field in fields))))
    if problems:
        raise DataError(join_problems(f"{path}: rows that do not fit the header:", problems))
    if not rows:
        raise DataError(f"{path}: has a header but no rows")
    return rows


def take_groups(clips: Sequence[Clip], fraction: float, seed: int, what: str) -> tuple[list[Clip], list[Clip]]:
    """Take about `fraction` of the clips of each class away, whole groups at a time: (rest, taken), in the given order.

    Groups are visited in a seeded random order; one is taken when that brings the class shares, as a whole, nearer to
    `fraction` and leaves every one of its classes something. A class that was left without is then given its smallest
    group, so that each class stands on both sides. A fraction of 0 takes nothing.

    Raises DataError when a class has one group only; `what` names the part to be made in that message.
    """
    if not fraction:
        return list(clips), []
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        groups[clip.group][clip.label] += 1
    total = Counter(clip.label for clip in clips)
    group_count = Counter(label for counts in groups.values() for label in counts)
    if single := sorted(label for label in total if group_count[label] < 2):
        raise DataError(
            f"cannot cut a {what} part: all clips of {', '.join(single)} are of one group (recording place, source "
            f"file or group of the csv), and groups are never split. Add recordings of other groups"
        )

    taken: set[str] = set()
    share: Counter[str] = Counter()

    def leaves_some(group: str) -> bool:
        return all(share[label] + count < total[label] for label, count in groups[group].items())

    def gain(group: str) -> float:
        """By how much taking the group brings the squared distances of its classes to their targets down."""
        before = sum((share[label] / total[label] - fraction) ** 2 for label in groups[group])
        after = sum(((share[label] + n) / total[label] - fraction) ** 2 for label, n in groups[group].items())
        return before - after

    def take(group: str) -> None:
        taken.add(group)
        share.update(groups[group])

    order = sorted(groups)
    random.Random(seed).shuffle(order)
    for group in order:
        if gain(group) > 0 and leaves_some(group):
            take(group)
    for label in sorted(total):
        if share[label] == 0:
            holders = [group for group in order if label in groups[group] and leaves_some(group)]
            if not holders:
                raise DataError(
                    f"cannot cut a {what} part that has clips of {label}: each of its groups is all that another class "
                    f"has. Add recordings of other groups"
                )
            take(min(holders, key=lambda group: groups[group].total()))
    rest = [clip for clip in clips if clip.group not in taken]
    return rest, [clip for clip in clips if clip.group in taken]


def take_stratified(clips: Sequence[Clip], limit: int, seed: int) -> list[Clip]:
    """At most `limit` of the clips, chosen at random with every class in proportion, in the given order."""
    by_label: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_label[clip.label].append(clip)
    chance = random.Random(seed)
    ranked = []
    for label, members in sorted(by_label.items()):
        for rank, clip in enumerate(chance.sample(members, len(members))):
            # the rank as a share of the class: taking the lowest of all classes keeps them in proportion
            ranked.append(((rank + 0.5) / len(members), label, clip.clip_id))
    kept = {clip_id for _, _, clip_id in sorted(ranked)[:limit]}
    return [clip for clip in clips if clip.clip_id in kept]
