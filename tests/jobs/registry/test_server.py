"""The model registry behind a server that does not answer as it should; secrets in its address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.registry.register import register
from jobs.registry.versions import Version, evidence_of, pull, resolve
from jobs.stages.pipeline import run_pipeline
from pipeline.config.registry import Registry
from pipeline.errors import BadData, Incomplete
from tests.helpers.mlflow_server import MlflowServer, Proxy
from tests.helpers.registered import registered_config
from tests.helpers.toys import artifact
from tests.helpers.tracking import planted


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.mark.slow
def test_out_of_reach_is_incomplete_and_a_rerun_registers_once(
    corpus: Path, storage: Path, server: MlflowServer, tmp_path: Path
) -> None:
    """The request is refused; then it is done and the answer is lost; then all is well, twice."""
    proxy = Proxy(server.port)
    uri = proxy.uri.replace("//", "//ann:pa55word@")
    config = registered_config(corpus, storage, uri=uri)
    try:
        for action in ("refuse", "lose"):
            proxy.behave = lambda method, path, action=action: (  # type: ignore[misc]
                action if path.endswith("/model-versions/create") else "pass"
            )
            with pytest.raises(Incomplete, match="MLflow at ") as error:
                run_pipeline(config)
            assert "pa55word" not in str(error.value)
        proxy.behave = lambda method, path: "pass"
        run_pipeline(config)
        version = resolve(uri, None, "1")
        with pytest.raises(BadData, match=r"versions \[1\]"):
            resolve(uri, None, "2")
        fetched = pull(version, tmp_path / "out")
    finally:
        proxy.stop()
    trained = artifact(storage, "drafter-multi_view") / "model" / "model.safetensors"
    assert (fetched / "model.safetensors").read_bytes() == trained.read_bytes()
    assert evidence_of(Version(server.uri, *list(vars(version).values())[1:])).drafter == "multi_view"
    assert not planted(storage, server.folder, fetched.parent)


@pytest.mark.slow
@pytest.mark.parametrize("status", ["413", "500"])
def test_artifacts_that_are_refused_are_incomplete(
    corpus: Path, storage: Path, server: MlflowServer, tmp_path: Path, status: str
) -> None:
    """Sent, listed and fetched; none of it says the password."""
    proxy = Proxy(server.port)
    uri = proxy.uri.replace("//", "//ann:pa55word@")
    own = MlflowClient(server.uri)
    run = own.create_run(own.create_experiment(tmp_path.name)).info.run_id
    config = registered_config(corpus, storage, uri=uri)
    config = config.model_copy(update={"registry": Registry(model=tmp_path.name)})
    report = artifact(storage, "report")

    def refuses(refused: str, ending: str) -> None:
        proxy.behave = lambda method, path: (
            status if method == refused and "/mlflow-artifacts/" in path and path.endswith(ending) else "pass"
        )

    try:
        refuses("PUT", "")
        with pytest.raises(Incomplete, match=status) as sent:
            register(config, report, run)
        assert not own.search_model_versions(f"name = '{tmp_path.name}'")
        refuses("none", "")
        version = register(config, report, run)
        said = [str(sent.value)]
        for ending in ("/artifacts", ".safetensors"):
            refuses("GET", ending)
            with pytest.raises(Incomplete) as fetched:  # MLflow does not always say the status
                pull(version, tmp_path / "out")
            said.append(str(fetched.value))
    finally:
        proxy.stop()
    assert not (tmp_path / "out").exists()
    assert not any("pa55word" in text for text in said) and all("MLflow at http://***@" in t for t in said)
