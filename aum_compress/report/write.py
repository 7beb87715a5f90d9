"""A report in its three forms, and read again. Torch-free."""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aum_compress.errors import BundleError, join_problems
from aum_compress.report.comparison import Comparison
from aum_compress.report.html import render_comparison_html, render_html
from aum_compress.report.markdown import render_comparison_markdown, render_markdown
from aum_compress.report.schema import REPORT_SCHEMA, Report

REPORT_JSON = "report.json"


def report_files(report: Report) -> dict[str, bytes]:
    """`report.json`, `report.md` and `report.html`, to be written into a bundle.

    A figure that is not finite becomes null, because JSON has no other word for it, and a dash in the other two.
    """
    report = _finite(report)
    return {
        REPORT_JSON: (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "report.md": render_markdown(report).encode(),
        "report.html": render_html(report).encode(),
    }


def comparison_files(found: Comparison) -> dict[str, bytes]:
    """The same three of several models side by side."""
    found = _finite(found)
    return {
        REPORT_JSON: (json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "report.md": render_comparison_markdown(found).encode(),
        "report.html": render_comparison_html(found).encode(),
    }


def read_report(folder: Path) -> Report:
    """The report of a finished run.

    Args:
        folder: exports/<name> or runs/<recipe>.

    Raises:
        BundleError: there is none, it is of several models, or it is not a whole report of this schema.
    """
    path = folder / REPORT_JSON
    again = "run the recipe again to write it anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read: {error.strerror or error}; wanted a folder that a run has written its report to, "
            "such as exports/quickstart"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: is no JSON ({error}): cut short or altered; {again}") from None
    if isinstance(content, dict) and "comparison_version" in content:
        raise BundleError(
            f"{path}: shows several models side by side and is no report of a run; open {folder / 'report.html'}, or "
            "name the folders of the models again to have it anew"
        )
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != REPORT_SCHEMA:
        raise BundleError(f"{path}: schema_version is {found}, wanted {REPORT_SCHEMA}; {again}")
    try:
        TypeAdapter(Report).validate_python(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise BundleError(join_problems(f"{path}: is not a whole report; {again}:", problems)) from None
    return content


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
