"""The Hub of the tests does to the real client what the Hub does."""

import time

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import Fault, HubServer

LARGE = bytes(range(256)) * 400  # binary, so it goes to LFS


@pytest.fixture
def api(hub):
    api = HfApi()
    api.create_repo("me/a")
    return api


@pytest.fixture
def waits(monkeypatch):
    """The seconds for which the client waits before it tries again; it does not."""
    seconds = []
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", seconds.append)
    return seconds


def commit(api, name="me/a", files=(("notes.txt", b"words"), ("large.bin", LARGE)), **options):
    additions = [CommitOperationAdd(path, content) for path, content in files]
    return api.create_commit(name, additions, commit_message="add", **options).oid


def download(tmp_path, filename="large.bin", **options):
    with open(huggingface_hub.hf_hub_download("me/a", filename, cache_dir=tmp_path, **options), "rb") as file:
        return file.read()


def test_what_is_committed_comes_back_and_stays(hub, api, tmp_path):
    first = commit(api)
    second = commit(api, files=[("notes.txt", b"other words"), ("folder/more.txt", b"")])
    api.create_tag("me/a", tag="v1", revision=first)
    api.create_branch("me/a", branch="a/branch", revision=first)
    assert download(tmp_path) == LARGE
    assert download(tmp_path, "notes.txt") == b"other words"
    for revision in (first, "v1", "a/branch"):
        assert download(tmp_path, "notes.txt", revision=revision) == b"words"
    assert sorted(api.list_repo_files("me/a")) == [".gitattributes", "folder/more.txt", "large.bin", "notes.txt"]
    assert [one.commit_id for one in api.list_repo_commits("me/a")][:2] == [second, first]
    api.create_commit("me/a", [CommitOperationDelete("folder/", is_folder=True)], commit_message="remove")
    with pytest.raises(RemoteEntryNotFoundError):
        download(tmp_path, "folder/more.txt")
    with HubServer(hub.folder) as again:
        assert again.repository("me/a").files()["large.bin"] == LARGE


def test_a_large_file_is_sent_once_and_without_the_token(hub, api, tmp_path):
    commit(api)
    commit(api, files=[("elsewhere.bin", LARGE)])
    download(tmp_path)
    stored = [request for request in hub.requests if request.path.startswith("/storage/")]
    assert [(request.method, request.status) for request in stored] == [("PUT", 200), ("GET", 200)]  # else 400
    listed = {entry.path: entry for entry in api.list_repo_tree("me/a")}
    assert listed["large.bin"].lfs.size == listed["large.bin"].size == len(LARGE)
    assert listed["notes.txt"].lfs is None


def test_who_may_do_what(hub, api):
    hub.add_user("you", "hf_yours", organizations=("lab",))
    hub.add_user("me", "hf_reader", role="read")
    api.create_repo("me/secret", private=True)
    you, reader = HfApi(token="hf_yours"), HfApi(token="hf_reader")
    assert [one["name"] for one in you.whoami()["orgs"]] == ["lab"]
    you.create_repo("lab/b")
    assert reader.model_info("me/secret").private
    for someone, status in ((you, 404), (HfApi(token=False), 401)):
        with pytest.raises(RepositoryNotFoundError) as refused:
            someone.model_info("me/secret")
        assert refused.value.response.status_code == status
    for someone, name, status in ((you, "me/a", 403), (reader, "me/a", 403), (HfApi(token="hf_wrong"), "me/a", 401)):
        with pytest.raises(HfHubHTTPError) as refused:
            commit(someone, name)
        assert refused.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("you/a")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/a")


def test_two_writers_do_not_mix(hub, api):
    head = api.model_info("me/a").sha
    commit(api, parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, files=[("notes.txt", b"late")], parent_commit=head)
    with pytest.raises(RevisionNotFoundError):
        commit(api, revision="nowhere")
    assert hub.repository("me/a").files()["notes.txt"] == b"words"


@pytest.mark.parametrize(("action", "has_landed"), [("drop", False), ("fail", False), ("drop_after", True)])
def test_a_commit_can_be_lost_on_the_way_there_or_back(hub, api, action, has_landed):
    hub.faults.append(Fault(action, "POST", "/commit/"))
    with pytest.raises((huggingface_hub.errors.HTTPError, HfHubHTTPError)):
        commit(api)
    assert ("notes.txt" in hub.repository("me/a").files()) is has_landed
    assert hub.faults[0].reached.is_set()


def test_a_fault_hits_the_request_of_its_number_and_says_when_to_come_back(hub, api, waits):
    hub.requests.clear()
    hub.faults.append(Fault("fail", request=1, status=429, retry_after=7))
    commit(api)
    assert [request.status for request in hub.requests[:3]] == [200, 429, 200]
    assert waits == [8]


def test_a_download_that_breaks_goes_on_where_it_was(hub, api, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # bytes; what it keeps comes in these
    commit(api)
    hub.requests.clear()
    hub.faults.append(Fault("drop_after", "GET", "/storage/"))
    assert download(tmp_path) == LARGE
    parts = [request.sent for request in hub.requests if request.method == "GET" and "/storage/" in request.path]
    assert len(parts) == 2 and sum(parts) == len(LARGE)


def test_a_client_does_not_see_a_byte_that_changed_on_the_way(hub, api, tmp_path):
    commit(api)
    hub.faults.append(Fault("corrupt", "GET", "/storage/"))
    received = download(tmp_path)
    assert len(received) == len(LARGE) and received != LARGE


@pytest.mark.parametrize("way", ["in", "out"])
def test_bandwidth_is_what_a_client_gets(hub, api, tmp_path, way):
    if way == "out":
        commit(api)
    hub.bandwidth = len(LARGE) / 0.3
    start = time.perf_counter()
    commit(api) if way == "in" else download(tmp_path)
    assert time.perf_counter() - start > 0.3
