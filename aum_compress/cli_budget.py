"""The verbs `budget ...`: what is named is checked, and `budget plan` lists what would fit."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from aum_compress.cli_options import Json, Precision, print_json
from aum_compress.console import say, show
from aum_compress.errors import AumError


class _CheckByDefault(TyperGroup):
    """`budget X` is `budget check X`, unless the first word is a verb of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["check", *args]
        return super().parse_args(ctx, args)


HELP = """Bytes and MACs of models against limits, and the students that would fit.

\b
  aum-compress budget MODEL...           check one model, or a pack of them
  aum-compress budget --compare A B      what B costs more than A
  aum-compress budget plan               list what would fit

Options of the first two: aum-compress budget check --help. A file named as a verb is given as ./plan.
"""

budget_app = typer.Typer(cls=_CheckByDefault, help=HELP, no_args_is_help=True, rich_markup_mode=None)

Limit = Annotated[
    str,
    typer.Option("--limit", metavar="NAME", help="dcase2025, dcase2024 or dcase2022; docs/budgets.md has their words."),
]
MaxParamBytes = Annotated[int | None, typer.Option(min=1, help="In place of the named limit's.")]
MaxMacs = Annotated[int | None, typer.Option(min=1, help="For one second of audio, in place of the named limit's.")]


class Mixer(StrEnum):
    mamba = "mamba"
    mamba2 = "mamba2"
    conv = "conv"


class Sort(StrEnum):
    use = "use"
    params = "params"
    macs = "macs"
    ms = "ms"


@budget_app.command("check")
def budget_check(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE|MODEL.onnx|PRESET",
            help="What to measure. Several, or a folder with several, are a pack: the largest model decides.",
        ),
    ],
    limit: Limit = "dcase2025",
    max_param_bytes: MaxParamBytes = None,
    max_macs: MaxMacs = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Two models side by side; the second one is held to the limits.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Table of all layers with their shares.")] = False,
    top: Annotated[int | None, typer.Option(min=1, help="The same, but only of the N largest layers.")] = None,
    file_bytes: Annotated[
        bool, typer.Option("--bytes", help="Where each byte of an ONNX file goes, down to names and functions.")
    ] = False,
    dim: Annotated[
        list[str] | None,
        typer.Option("--dim", metavar="NAME=SIZE", help="Size of an open dimension of an ONNX input; repeatable."),
    ] = None,
    trips: Annotated[
        list[str] | None,
        typer.Option("--trips", metavar="NODE=COUNT", help="How often a Loop of an ONNX graph runs; repeatable."),
    ] = None,
    clip_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Length of a clip: of an ONNX file that does not say, of a preset.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Of a preset; 10 when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Parameter bytes and MACs against the limits. Exit code 3 when over."""
    from aum_compress.budget.limits import named_limits
    from aum_compress.budget.pack import enforce_pack, pack_report
    from aum_compress.budget.records import enforce
    from aum_compress.budget.targets import Reading, check_target, named_counts, targets_in

    limits = named_limits(limit, max_param_bytes, max_macs)
    if file_bytes:
        _show_parts(targets, as_json)
        return
    reading = Reading(named_counts("--dim", dim or []), named_counts("--trips", trips or []), clip_seconds, classes)
    names = targets if compare else targets_in(targets)
    if compare and len(names) != 2:
        raise AumError(f"--compare: found {len(names)} models, wanted two: the old one and the new one")
    reports = {name: check_target(name, limits, reading) for name in names}
    if compare:
        _show_comparison([(name, reports[name]) for name in names], top, as_json)
        enforce(reports[names[1]])
    elif len(reports) == 1:
        (report,) = reports.values()
        _show_report(report, layers, top, as_json)
        enforce(report)
    else:
        pack = pack_report(reports)
        _show_pack(pack, layers, top, as_json)
        enforce_pack(pack)


def _show_parts(targets: list[str], as_json: bool) -> None:
    from aum_compress.budget.onnx_parts import file_parts
    from aum_compress.report.budget_table import parts_table

    if foreign := [target for target in targets if not target.endswith(".onnx")]:
        raise AumError(f"--bytes: {foreign[0]} is no .onnx file, and only such a file has more bytes than its tensors")
    found = {target: file_parts(Path(target)) for target in targets}
    if as_json:
        print_json(found)
        return
    for target, parts in found.items():
        say(target)
        show(parts_table(parts))


def _show_report(report: Any, layers: bool, top: int | None, as_json: bool) -> None:
    from aum_compress.report.budget_table import budget_lines, budget_table

    if as_json:
        print_json(report.to_dict())
        return
    if layers or top:
        show(budget_table(report, top))
    for line in budget_lines(report):
        say(line)


def _show_pack(pack: Any, layers: bool, top: int | None, as_json: bool) -> None:
    from aum_compress.report.budget_table import pack_lines, pack_table

    if as_json:
        print_json(pack.to_dict())
        return
    if layers or top:
        for name, report in pack.reports.items():
            say(name)
            _show_report(report, layers, top, as_json=False)
            say()
    show(pack_table(pack))
    for line in pack_lines(pack):
        say(line)


def _show_comparison(pair: list[tuple[str, Any]], top: int | None, as_json: bool) -> None:
    from aum_compress.report.budget_compare import compare_dict, compare_lines, compare_table

    names, (before, after) = zip(*pair)
    if as_json:
        print_json(compare_dict(before, after, names))
        return
    show(compare_table(before, after, top))
    for line in compare_lines(before, after, names):
        say(line)


@budget_app.command("plan")
def budget_plan(
    tokens: Annotated[str, typer.Option(metavar="FEWEST..MOST", help="How many tokens one clip may make.")] = "64..400",
    precision: Annotated[Precision, typer.Option(help="Of the file that ships.")] = Precision.int8,
    mixer: Annotated[
        list[Mixer] | None, typer.Option(metavar="mamba|mamba2|conv", help="Repeatable; mamba when left out.")
    ] = None,
    limit: Limit = "dcase2025",
    max_param_bytes: MaxParamBytes = None,
    max_macs: MaxMacs = None,
    max_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Estimated time for one clip, fp32, one x86 core.")
    ] = None,
    sort: Annotated[
        Sort, typer.Option(help="use: geometric mean of the shares of all limits, largest first.")
    ] = Sort.use,
    top: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 20,
    every: Annotated[
        bool, typer.Option("--every", help="Every student that fits, not the best of each number of tokens alone.")
    ] = False,
    classes: Annotated[int, typer.Option(min=2)] = 10,
    n_mels: Annotated[int, typer.Option("--mels", min=1, help="Mel bins of the features.")] = 256,
    n_frames: Annotated[int, typer.Option("--frames", min=1, help="Frames of one clip.")] = 65,
    clip_seconds: Annotated[float, typer.Option(min=0.001)] = 1.0,
    write: Annotated[
        tuple[int, Path] | None,
        typer.Option(metavar="N FILE", help="Write row N as the student section of a recipe to a new file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Student configurations that fit the limits, counted exactly, sorted. Exit code 3 when there is none."""
    from aum_compress.budget.limits import named_limits
    from aum_compress.budget.plan import Wanted, first_rows, make_plan, token_range
    from aum_compress.budget.plan_recipe import write_student
    from aum_compress.report.plan_table import plan_dict, plan_lines, plan_table

    fewest, most = token_range(tokens)
    wanted = Wanted(
        fewest_tokens=fewest,
        most_tokens=most,
        precision=precision.value,
        mixers=tuple(dict.fromkeys(choice.value for choice in mixer or [Mixer.mamba])),
        limits=named_limits(limit, max_param_bytes, max_macs),
        max_ms=max_ms,
        n_mels=n_mels,
        n_frames=n_frames,
        n_classes=classes,
        clip_seconds=clip_seconds,
    )
    plan = make_plan(wanted, sort.value)
    rows = first_rows(plan, top, every)
    if as_json:
        print_json(plan_dict(plan, rows))
    else:
        show(plan_table(rows))
        for line in plan_lines(plan, len(rows)):
            say(line)
    if write:
        write_student(rows, *write)
