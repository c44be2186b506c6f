import pytest
from PIL import Image

from hf_models import ZooViTConfig, ZooViTForImageClassification
from tests.training.images.test_features import SIZE, TINY, make_mae
from training import probe
from training.processors import create_image_processor


@pytest.mark.parametrize("kind", ["mae", "vit"])
def test_the_command_probes_a_checkpoint_on_the_embedded_digits(kind, tmp_path, capsys):
    model = make_mae() if kind == "mae" else ZooViTForImageClassification(ZooViTConfig(**TINY))
    model.save_pretrained(tmp_path)
    create_image_processor(SIZE, [0.3], [0.38]).save_pretrained(tmp_path)
    probe.main([str(tmp_path), "--num_workers", "0"])
    train, validation, neighbours, linear = capsys.readouterr().out.splitlines()
    assert train == "train: 1,437 images, 32 features" and validation == "validation: 360 images, 32 features"
    assert neighbours.startswith("20 nearest neighbours: accuracy 0.") and linear.startswith(
        "linear probe: accuracy 0."
    )
    assert float(linear.split()[-1]) > 0.6  # of random features


@pytest.mark.parametrize(
    "options, message",
    [
        (["--k", "0"], "k must be above 0"),
        (["--data", "{folder}/data"], "data"),
        (["--data", "{folder}/single"], "no image to classify"),
        (["--temperature", "-1"], "temperature"),
    ],
    ids=str,
)
def test_what_does_not_suit_is_said_in_one_line(options, message, tmp_path, capsys):
    (tmp_path / "data").mkdir()  # without an image
    for name in "ab":  # none of which can be held out
        (tmp_path / "single" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), name == "a" and "red").save(tmp_path / "single" / name / "1.png")
    make_mae().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        probe.main([str(tmp_path), *(option.format(folder=tmp_path) for option in options)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_model_of_text_is_refused(make_gpt, tmp_path, capsys):
    make_gpt().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        probe.main([str(tmp_path)])
    assert "zoo_gpt" in capsys.readouterr().err
