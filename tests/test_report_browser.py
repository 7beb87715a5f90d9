"""Reports in a real browser, where there is one: a page is drawn and printed, and the console stays silent."""

import json
import shutil
import subprocess

import pytest
from tiny_recipe import command

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    return found


@pytest.fixture
def page(exports, runs, tmp_path, request):
    if request.param == "run":
        return exports / "report.html"
    assert command("report", exports, runs / "06-quantize", "--to", tmp_path / "both").exit_code == 0
    return tmp_path / "both" / "report.html"


@pytest.mark.parametrize("page", ["run", "several"], indirect=True)
def test_a_browser_draws_and_prints_it_without_a_word(browser, page, tmp_path):
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/user",
    ]
    for what in ("--screenshot", "--print-to-pdf"):
        picture = tmp_path / what.strip("-")
        command = [browser, *flags, "--window-size=390,3000", f"{what}={picture}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in done.stderr
        assert picture.stat().st_size > 10_000, done.stderr


def test_a_broken_page_would_be_heard(browser, tmp_path):
    """The counterpart: what the policy forbids is said on the console."""
    page = tmp_path / "page.html"
    policy = "default-src 'none'"
    page.write_text(f'<meta http-equiv="Content-Security-Policy" content="{policy}"><img src="http://localhost/a.png">')
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/user",
    ]
    command = [browser, *flags, f"--screenshot={tmp_path}/picture", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" in done.stderr, json.dumps(done.stderr[-500:])
