import pytest

from tests.training.corpora import LINES, write_jsonl, write_text
from training.data.documents import read_documents


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Tokens go to a folder of the test, never to the user's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "hf_home" / "hf_models" / "tokens"


@pytest.fixture
def story(tmp_path):
    return read_documents(write_text(tmp_path / "story.txt"))


@pytest.fixture
def lines(tmp_path):
    return read_documents(write_jsonl(tmp_path / "lines.jsonl", LINES))
