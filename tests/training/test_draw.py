import pytest
import transformers
from PIL import Image

from hf_models import ZooGPTModel, ZooViTMAEForPreTraining
from tests.training.runs import TRAINING, write_metrics
from training import draw
from training.processors import create_detection_processor


@pytest.fixture
def run(tmp_path, capsys):
    """Saves a model, and a tokenizer if given, and draws it: the names of the pictures, and what was printed."""

    def run(model, *options, tokenizer=None):
        model.save_pretrained(tmp_path / "checkpoint")
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / "checkpoint")
        draw.main([str(tmp_path / "checkpoint"), *map(str, options)])
        pictures = sorted((tmp_path / "checkpoint" / "figures").iterdir())
        assert all(Image.open(picture).size[0] > 300 for picture in pictures)
        return [picture.stem for picture in pictures], capsys.readouterr().out

    return run


VIT_FIGURES = ["attention_maps", "first_filters", "position_similarity"]
TEXT_FIGURES = ["token_attention", "token_attention_last_layer"]


def test_a_vit_is_drawn_on_photographs_and_its_training_beside_it(run, make_vit, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    write_metrics(tmp_path / "checkpoint", TRAINING)
    assert run(make_vit())[0] == sorted([*VIT_FIGURES, "curves"])


def test_a_vit_of_grey_images_is_drawn_on_digits(run, make_vit):
    assert run(make_vit(num_channels=1, position_embedding_type="learned_2d"))[0] == VIT_FIGURES


def test_why_a_figure_is_missing_is_said(run, make_vit):
    pictures, printed = run(make_vit(position_embedding_type="rotary"))
    assert pictures == ["attention_maps", "first_filters"]
    assert "no position_similarity: position_embedding_type='rotary'" in printed


def test_a_masked_autoencoder_is_drawn_with_its_reconstructions(run, make_vit):
    assert run(make_vit(ZooViTMAEForPreTraining))[0] == sorted([*VIT_FIGURES, "reconstructions"])


@pytest.mark.parametrize("model_class", [transformers.ViTForImageClassification, transformers.ViTMAEForPreTraining])
def test_stock_models_of_images_are_drawn(run, stock_vit, model_class):
    assert set(VIT_FIGURES) <= set(run(stock_vit(model_class))[0])


DETR_FIGURES = ["decoder_attention", "detections"]


def test_a_detr_is_drawn_on_photographs(run, make_detr, detection_processor, tmp_path):
    detection_processor.save_pretrained(tmp_path / "checkpoint")
    pictures, printed = run(make_detr())
    assert pictures == DETR_FIGURES
    assert "no query_slots: 2 images are too few" in printed


def test_a_detr_of_grey_images_is_drawn_on_digits(run, make_detr, tmp_path):
    create_detection_processor(32, 48, [0.5], [0.5]).save_pretrained(tmp_path / "checkpoint")
    assert run(make_detr(num_channels=1))[0] == [*DETR_FIGURES, "query_slots"]


def test_a_stock_detr_is_drawn(run, tmp_path):
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    backbone = transformers.ResNetConfig(**resnet, out_features=["stage2"])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}
    stock = transformers.DetrImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 100})
    stock.save_pretrained(tmp_path / "checkpoint")
    config = transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes)
    assert run(transformers.DetrForObjectDetection(config))[0] == DETR_FIGURES


def test_models_of_text_are_drawn(run, make_gpt, tokenizer):
    assert run(make_gpt(ZooGPTModel), "--text", "a cat", tokenizer=tokenizer)[0] == TEXT_FIGURES


def test_stock_models_of_text_are_drawn(run, stock_bert, masking_tokenizer):
    assert run(stock_bert(), tokenizer=masking_tokenizer)[0] == TEXT_FIGURES


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image", "nowhere.png"], "--image nowhere.png: "),
        (["--image", __file__], "test_draw.py: not an image"),
        (["--text", "a"], "is a model of images, give --image"),
    ],
)
def test_what_does_not_suit_is_refused_in_one_line(run, make_vit, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        run(make_vit(), *options)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_other_checkpoints_are_refused(run, make_gpt, make_vit, tokenizer, tmp_path, capsys):
    refused = {
        "is a model of text, give --text": lambda: run(make_gpt(), "--image", "a.png", tokenizer=tokenizer),
        "num_channels is 4: only models of grey": lambda: run(make_vit(num_channels=4)),
        "is a t5; there are figures of": lambda: draw.main([str(tmp_path / "t5")]),
        "nowhere": lambda: draw.main([str(tmp_path / "nowhere")]),
    }
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    for message, command in refused.items():
        with pytest.raises(SystemExit, match="2"):
            command()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
