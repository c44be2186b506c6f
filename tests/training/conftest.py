import pytest

from hf_models import ZooDetrConfig, ZooDetrForObjectDetection
from tests.training.corpora import LINES, write_jsonl, write_text
from training.data.documents import read_documents
from training.processors import create_detection_processor


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


@pytest.fixture
def make_detr():
    """A tiny DETR whose cells have 8 pixels."""

    def make_detr(**fields):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 2}
        backbone = {"backbone": "resnet-mini", "backbone_norm": "group"}
        labels = {"id2label": {0: "cat", 1: "dog", 2: "$x$"}}
        config = ZooDetrConfig(**{"num_attention_heads": 2, "num_queries": 5, **sizes, **backbone, **labels, **fields})
        return ZooDetrForObjectDetection(config).eval()

    return make_detr


@pytest.fixture
def detection_processor():
    return create_detection_processor(40, 100, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
