"""The tree: README's section lists every file once, and no text file names a machine."""

import re
import subprocess
from functools import cache

import pytest

from tests.helpers.paths import ROOT

# Written in pieces, so that this file does not name them.
PACKAGE_HOSTS = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "conda." + "anaconda.org",
)
LOCAL_PATH = re.compile(r"(?<![\w./])/(?:home|Users|root|work)/")


@cache
def project_files() -> tuple[str, ...]:
    """Tracked files and new ones that git does not ignore, as they are on disk."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("git is not installed: there is no list of tracked files to compare with")
    if done.returncode:
        pytest.skip(f"not a git checkout, so there is no list of tracked files: {done.stderr.strip()}")
    return tuple(sorted({name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}))


def listed_files() -> dict[str, str]:
    """Path → description, from the fenced blocks of README's section "The tree"."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## The tree$(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section '## The tree'"
    listed: dict[str, str] = {}
    for block in re.findall(r"^```text\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL):
        for line in filter(None, block.splitlines()):
            path, _, description = line.partition("  ")
            assert path not in listed, f"README.md lists {path} twice"
            listed[path] = description.strip()
    return listed


def test_readme_lists_every_file_of_the_tree():
    listed, files = set(listed_files()), set(project_files())
    missing, gone = sorted(files - listed), sorted(listed - files)
    assert not missing, f"add a line in README.md, section 'The tree', for: {missing}"
    assert not gone, f"README.md, section 'The tree', lists files that do not exist: {gone}"


def test_every_listed_file_is_described():
    without = [path for path, description in listed_files().items() if not description]
    assert not without, f"README.md, section 'The tree', says nothing about: {without}"


def test_no_text_file_names_a_package_host_or_a_local_path():
    found = []
    for name in project_files():
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # an image
        for number, line in enumerate(lines, 1):
            if any(host in line for host in PACKAGE_HOSTS) or LOCAL_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
