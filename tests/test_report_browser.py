"""Reports in a real browser, where there is one: a page is drawn and printed, and the console stays silent."""

import shutil
import subprocess
from pathlib import Path

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


def console(browser: str, flag: str, page: str, user: Path) -> str:
    """What a browser has to say about a page that it draws into a file."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={user}"]
    command = [browser, *flags, "--window-size=390,3000", flag, page]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
    return "\n".join(line for line in said.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("page", ["run", "several"], indirect=True)
def test_a_browser_draws_and_prints_it_without_a_word(browser, page, tmp_path):
    for flag, name in (("--screenshot", "page.png"), ("--print-to-pdf", "page.pdf")):
        assert console(browser, f"{flag}={tmp_path / name}", page.as_uri(), tmp_path / "user") == ""
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_broken_page_would_be_heard(browser, tmp_path):
    """The counterpart: what a policy forbids is said on the console."""
    page = tmp_path / "page.html"
    policy = "default-src 'none'"
    page.write_text(f'<meta http-equiv="Content-Security-Policy" content="{policy}"><img src="http://localhost/a.png">')
    assert console(browser, f"--screenshot={tmp_path}/page.png", page.as_uri(), tmp_path / "user")
