"""The tree and its pages: docstrings, maps, lengths, links and named files; no text file names a machine."""

import ast
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

CODE = ("pipeline", "kernels", "jobs", "benchmarks", "tests")
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "conf" / "README.md", *DOCS)

# Written in pieces, so that this file does not name them.
PACKAGE_HOSTS = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "conda." + "anaconda.org",
)
LOCAL_PATH = re.compile(r"(?<![\w./])/(?:home|Users|root|work)/")
# What runs write, and what is yet to be measured.
WRITTEN = {"docker/.env", "docs/results/gpu", "docs/results/windows"}


@cache
def project_files() -> tuple[str, ...]:
    """Tracked files and new ones that git does not ignore, as they are on disk."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60))
    except FileNotFoundError:
        pytest.skip("git is not installed: there is no list of tracked files to compare with")
    if done.returncode:
        pytest.skip(f"not a git checkout, so there is no list of tracked files: {done.stderr.strip()}")
    return tuple(sorted({name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}))


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def docstring(module: Path) -> str:
    return ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""


# ── the map ───────────────────────────────────────────────────────────────────────────────────────


def test_every_module_has_a_docstring() -> None:
    without = [
        str(path.relative_to(ROOT)) for package in CODE for path in modules(package) if not docstring(path)
    ]
    assert not without, f"the first line of a module says what it is for: {without}"


@pytest.mark.parametrize("package", ["pipeline", "kernels", "jobs"])
def test_every_room_and_file_has_a_line_in_its_package_s_map(package: str) -> None:
    rooms = {f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}
    files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py", "__main__.py"}
    lines = re.findall(r"^ *([\w.]+/?) {2,}\S", docstring(ROOT / package / "__init__.py"), re.MULTILINE)
    assert sorted(lines) == sorted(rooms | files)


def test_every_room_has_a_line_in_readme() -> None:
    (block,) = re.findall(r"^```text\n(pipeline/.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    pipeline, _, others = block.partition("kernels/")
    jobs, _, benchmarks = others.partition("benchmarks/")
    for package, text in (("pipeline", pipeline), ("jobs", jobs), ("benchmarks", benchmarks)):
        rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        missing = [room for room in sorted(rooms) if f" {room}/" not in text]
        assert not missing, f"README's map has no {missing} of {package}"


def test_the_files_to_read_first_are_the_same_ten_everywhere() -> None:
    listed = re.findall(r"^ +(\d+)\. (\S+) +\S", docstring(ROOT / "pipeline" / "__init__.py"), re.MULTILINE)
    assert [int(number) for number, _ in listed] == list(range(1, 11))
    shown = re.findall(r"^(\d+)\. `([\w/]+\.py)`: ", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown == listed


@pytest.mark.parametrize("title", ["The config from", "A document of"])
def test_the_map_names_the_four_files_of_a_way_to_the_arithmetic(title: str) -> None:
    text = docstring(ROOT / "pipeline" / "__init__.py")
    words, _, rest = text.partition(title)[2].partition("\n\n")
    lines = re.findall(r"^ +(→ )?(\S+\.py) {2,}", rest.partition("\n\n")[0], re.MULTILINE)
    assert [bool(arrow) for arrow, _ in lines].count(True) == 1 and len(lines) == 5 and "four files" in words
    missing = [file for _, file in lines if not (ROOT / file).is_file()]
    assert not missing, missing


# ── pages ─────────────────────────────────────────────────────────────────────────────────────────


def test_pages_are_short() -> None:
    lengths = {page: len(page.read_text(encoding="utf-8").splitlines()) for page in (README, *DOCS)}
    long = {page.name: lines for page, lines in lengths.items() if lines > (250 if page == README else 200)}
    assert not long, long


def test_readme_leads_to_every_page() -> None:
    text = README.read_text(encoding="utf-8")
    lost = [page.name for page in DOCS if f"(docs/{page.name})" not in text]
    assert not lost, f"README links to no {lost}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [
        link
        for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
        if not link.startswith("https://") and not (page.parent / link.partition("#")[0]).exists()
    ]
    folders = r"conf|pipeline|kernels|jobs|tests|benchmarks|docs|docker|\.github|\.ci"
    named = rf"(?<![\w/.<>-])((?:{folders})/[\w/.-]*[\w/])"
    missing += [
        path for path in re.findall(named, text) if path not in WRITTEN and not (ROOT / path).exists()
    ]
    for module in re.findall(r"python -m ((?:jobs|tests|benchmarks)[\w.]*)", text):
        missing += [] if importlib.util.find_spec(module) else [module]
    assert not missing, f"named, but not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_pages_lead_to_headings(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([\w/.-]*)#([\w-]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / link if link else page).read_text(encoding="utf-8")
        headings = [
            re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        ]
        assert anchor in headings, f"{page.name}: {link}#{anchor}"


def test_every_config_has_a_line_in_conf_readme() -> None:
    folder = ROOT / "conf"
    text = (folder / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.yaml"))]
    assert files and not [file for file in files if f"| `{file}` | " not in text]


# ── what no file may hold ─────────────────────────────────────────────────────────────────────────


def test_no_text_file_names_a_package_host_or_a_local_path() -> None:
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
