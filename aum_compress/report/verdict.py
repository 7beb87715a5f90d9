"""What is wanted to know first: does the model that ships fit, and does it compute what it should? Torch-free."""

from aum_compress.report.content import Cell, Verdict, figure, share
from aum_compress.report.schema import Report, RoadStep


def verdict(report: Report) -> Verdict:
    """Whether what ships is small enough and computes what it should; open while nothing was exported."""
    budget, step = report["budget"], shipped_step(report)
    if budget is None or not report["road"]:
        return Verdict(None, "No model was made yet", ())
    limits = budget["limits"]
    facts = (
        _against(budget["param_bytes"], limits["max_param_bytes"], "bytes of parameters"),
        _against(budget["macs"], limits["max_macs"], "MACs for one second of audio"),
    )
    if step is None:
        return Verdict(
            None, f"Not exported yet; the newest model, {report['gated']}, is {budget['verdict']} budget", facts
        )
    failed = [name for name, found in report["verification"].items() if not found["passed"]]
    unverified = [name for name in exported(report) if name not in report["verification"]]
    good = budget["verdict"] == "within" and not failed
    headline = f"{budget['verdict'].capitalize()} budget, " + (
        f"verification failed for {', '.join(failed)}"
        if failed
        else f"not verified: {', '.join(unverified)}"
        if unverified
        else "every exported file verified"
    )
    return Verdict(None if good and unverified else good, headline, (*_accuracies(step), *facts))


def shipped_step(report: Report) -> RoadStep | None:
    """The row of the file that ships; None where nothing was exported."""
    return next((step for step in report["road"] if step["file"] and step["file"] == report["gated"]), None)


def exported(report: Report) -> list[str]:
    """The files on the road, then those that were verified beside them."""
    files = (*(step["file"] for step in report["road"] if step["file"]), *report["verification"])
    return list(dict.fromkeys(files))


def step_budget(report: Report, step: RoadStep) -> Cell:
    """Within or over; only what ships has to be within, so only there it is a verdict."""
    within = step["within_budget"]
    return Cell("within" if within else "over", good=within if within or step is shipped_step(report) else None)


def verified_cell(report: Report, name: str) -> Cell:
    """The verdict on one file."""
    found = report["verification"].get(name)
    if found is None:
        return Cell("not verified")
    return Cell("verified" if found["passed"] else "FAILED", good=found["passed"])


def checks_passed(report: Report, name: str) -> str:
    """What was found about one file, in a few words."""
    found = report["verification"].get(name)
    if found is None:
        return ""
    passed = sum(check["passed"] for check in found["checks"])
    return f"{passed} of {len(found['checks'])} checks, largest error {figure(found['max_abs_error'], '.2g')}"


def _accuracies(step: RoadStep) -> list[str]:
    scores = step["test"]
    whole = (
        f"{step['file']}: {figure(scores['accuracy'], '.1f')} % on {scores['clips']:,} test clips, measured in "
        f"{step['measured_with']}"
    )
    groups = [f"{group} devices {figure(scores[group], '.1f')} %" for group in ("seen", "unseen") if group in scores]
    return [whole, ", ".join(groups)] if groups else [whole]


def _against(found: int, limit: int, what: str) -> str:
    return f"{found:,} of {limit:,} {what} ({share(found, limit).text})"
