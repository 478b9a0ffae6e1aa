"""Ids of models: the caches first, then a download, which resumes and is checked; every failure is one line."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from fastgpt_jax.checkpoint import HubSettings, load_model, parse_model_id
from fastgpt_jax.checkpoint.hub import ModelId, find_on_hub
from fastgpt_jax.errors import UserError
from tests.checkpoint.folders import make_folder, split_into_shards
from tests.checkpoint.hub_server import COMMIT, Hub, serve

IDS = {"huggingface": "org/model", "modelscope": "modelscope:org/model"}
UNWANTED = {
    "pytorch_model.bin": b"x",
    "README.md": b"x",
    "onnx/model.safetensors": b"x",
    "model.fp16.safetensors": b"x",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_folder(folder)
    split_into_shards(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files):
    hub = Hub(files | UNWANTED)
    server = serve(hub)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(hub, tmp_path):
    return HubSettings(
        huggingface_cache=tmp_path / "hf",
        huggingface_endpoint=hub.endpoint,
        modelscope_cache=tmp_path / "ms",
        modelscope_endpoint=hub.endpoint,
        timeout_s=5,
    )


def find(name, settings):
    return find_on_hub(parse_model_id(IDS.get(name, name)), settings)


def assert_refused(name, settings, *needles):
    with pytest.raises(UserError) as caught:
        find(name, settings)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


def without_network(settings):
    closed = "http://127.0.0.1:9"
    return dataclasses.replace(settings, huggingface_endpoint=closed, modelscope_endpoint=closed)


def test_what_is_an_id_and_what_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_model_id("org/name") == ModelId("huggingface", "org", "name")
    assert parse_model_id("Org-1/na.me_2@refs/pr/1") == ModelId("huggingface", "Org-1", "na.me_2", "refs/pr/1")
    assert parse_model_id("modelscope:org/name@v1") == ModelId("modelscope", "org", "name", "v1")
    assert str(parse_model_id("modelscope:org/name@v1")) == "modelscope:org/name@v1"
    for path in [
        "./org/name",
        "/org/name",
        "org/name/",
        "name",
        "a/b/c",
        "org/m.gguf",
        "~/name",
        "../name",
        "a b/c",
        "",
    ]:
        assert parse_model_id(path) is None, path
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_model_id("org/name") is None
    assert parse_model_id(Path("other/name")) is None


def test_what_looks_like_a_path_and_is_not_there_is_no_such_folder(tmp_path):
    for path in ["./org/name", str(tmp_path / "x"), "org/name/"]:
        with pytest.raises(UserError, match="no such folder"):
            load_model(path)


@pytest.mark.parametrize("name", IDS)
def test_a_model_is_fetched_once_without_what_loading_does_not_read(name, hub, settings, files):
    folder = find(name, settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert not {path for path, _ in hub.fetched()} & UNWANTED.keys()
    before = len(hub.requests)
    assert find(name, without_network(settings)) == folder
    assert len(hub.requests) == before
    loaded = load_model(IDS[name], hub=settings)
    assert (loaded.name, loaded.vocab_size) == ("model", 23)


def test_an_interrupted_download_goes_on_where_it_stopped(hub, settings, files):
    shard = "model-00002-of-00002.safetensors"
    hub.break_after[shard] = 1000
    assert_refused("modelscope", settings, f"{shard} of modelscope:org/model broke off after 1,000 of", "run again")
    assert not (settings.modelscope_cache / "models" / "org" / "model").exists()
    folder = find("modelscope", settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert [asked for path, asked in hub.fetched() if path == shard] == [None, "bytes=1000-"]
    assert len(hub.fetched()) == len(files) + 1


@pytest.mark.slow
def test_hugging_faces_library_goes_on_where_it_stopped(hub, settings, capfd):
    """It keeps whole chunks of 10 MiB."""
    hub.files = {"a.gguf": bytes(range(256)) * (11 * 4096)}
    hub.break_after["a.gguf"] = 10 * 2**20 + 1000
    assert (find("huggingface", settings) / "a.gguf").read_bytes() == hub.files["a.gguf"]
    assert [asked for _, asked in hub.fetched()] == [None, f"bytes={10 * 2**20}-"]
    assert "Fetching" not in capfd.readouterr().err  # a bar is for terminals


def test_a_server_that_ignores_ranges_is_asked_for_all_of_a_file(hub, settings, files):
    hub.break_after["config.json"] = 10
    assert_refused("modelscope", settings, "broke off after 10 of")
    hub.ignores_ranges = True
    assert (find("modelscope", settings) / "config.json").read_bytes() == files["config.json"]


@pytest.mark.parametrize("name", IDS)
def test_a_file_of_another_digest_is_removed_and_fetched_again(name, hub, settings, files):
    hub.wrong_sha256 = True
    assert_refused(name, settings, "arrived damaged", "SHA-256", "fetch it again")
    hub.wrong_sha256 = False
    if name == "huggingface":  # its library keeps what the hub once said of a commit
        shutil.rmtree(settings.huggingface_cache)
    assert {path.name: path.read_bytes() for path in find(name, settings).iterdir()} == files


def test_a_file_of_another_size_is_removed(hub, settings):
    hub.added_bytes = -1
    assert_refused("modelscope", settings, "arrived damaged", "bytes, the hub says")
    hub.added_bytes = 0
    assert find("modelscope", settings).is_dir()


@pytest.mark.parametrize("name", IDS)
def test_no_such_model_a_gated_one_and_a_broken_server(name, hub, settings):
    other = IDS[name].replace("model", "other", 1) if name == "huggingface" else "modelscope:org/other"
    assert_refused(other, settings, "org/other", hub.endpoint, "check the name")
    hub.status, hub.error_code = 403, "GatedRepo"
    assert_refused(name, settings, "gated")
    hub.refuses_files_alone = True  # anybody may list what only some may read
    assert_refused(name, settings, "gated")
    hub.refuses_files_alone = False
    hub.status, hub.error_code = 500, None
    assert_refused(name, settings, "try again later")


def test_a_private_model_and_a_missing_revision_say_what_to_do(hub, settings):
    hub.status, hub.error_code = 401, "RepoNotFound"
    assert_refused("huggingface", settings, "HF_TOKEN")
    hub.status, hub.error_code = 404, "RevisionNotFound"
    assert_refused("org/model@v9", settings, "no revision 'v9'")


@pytest.mark.parametrize("name", IDS)
def test_without_a_network_one_line_names_the_cache_and_the_way_out(name, hub, settings, tmp_path):
    for way in (without_network(settings), dataclasses.replace(settings, is_offline=True)):
        assert_refused(name, way, IDS[name], str(tmp_path), "fetch it where there is a network", "model folder")
    assert not hub.requests


@pytest.mark.parametrize("name", IDS)
def test_a_snapshot_that_lacks_a_shard_is_completed(name, hub, settings, files):
    folder = find(name, settings)
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert_refused(name, dataclasses.replace(settings, is_offline=True), "no whole")
    assert {path.name: path.read_bytes() for path in find(name, settings).iterdir()} == files


def test_caches_that_other_programs_filled_are_used_as_they_are(settings, tmp_path):
    offline = dataclasses.replace(settings, is_offline=True)
    folder = tmp_path / "hf" / "models--org--model"
    make_folder(folder / "snapshots" / COMMIT)
    assert_refused("huggingface", offline, "no whole model")
    assert find(f"org/model@{COMMIT}", offline) == folder / "snapshots" / COMMIT
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    assert find("org/model", offline) == folder / "snapshots" / COMMIT
    for place, name in {"models/org/a___b": "a.b", "models/org/c.d": "c.d", "org/old": "old"}.items():
        make_folder(tmp_path / "ms" / place)
        assert find(f"modelscope:org/{name}", offline) == tmp_path / "ms" / place


@pytest.mark.parametrize("name", IDS)
def test_repositories_of_gguf_files_and_of_nothing_that_loads(name, hub, settings):
    hub.files = {"a.gguf": b"GGUF", "README.md": b""}
    assert [path.name for path in find(name, settings).iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("name", IDS)
def test_several_gguf_files_and_pickles_alone_are_refused(name, hub, settings):
    hub.files = {"a.gguf": b"GGUF", "b.gguf": b"GGUF"}
    assert_refused(name, settings, "2 GGUF files", "a.gguf")
    hub.files = {"pytorch_model.bin": b"x", "config.json": b"{}"}
    assert_refused(name, settings, "neither safetensors nor GGUF")


def test_an_answer_that_is_no_list_and_a_place_that_cannot_be_written(hub, settings, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = dataclasses.replace(settings, modelscope_cache=tmp_path / "file", huggingface_cache=tmp_path / "file")
    for name in IDS:
        assert_refused(name, blocked, "cannot write", str(tmp_path / "file"))
    hub.status = 200
    assert_refused("modelscope", settings, "answered something other")
