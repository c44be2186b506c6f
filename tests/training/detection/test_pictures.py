import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from training.detection.pictures import decoder_attention, detect, detections

PHOTOGRAPHS = [Image.fromarray(photograph) for photograph in load_sample_images().images]


def test_detections_are_what_the_processor_makes_of_the_answers(make_detr, detection_processor):
    model = make_detr()
    inputs = detection_processor(PHOTOGRAPHS[0], return_tensors="pt")
    expected = detection_processor.post_process_object_detection(model(**inputs), threshold=0)[0]
    found, *_ = detect(model, detection_processor, PHOTOGRAPHS[0])
    for name in ("scores", "labels", "boxes"):
        np.testing.assert_allclose(found[name], expected[name].detach(), atol=1e-6)
    threshold = float(np.median(found["scores"]))
    (axes,) = detections(model, detection_processor, PHOTOGRAPHS[:1], threshold).axes
    assert len(axes.patches) == len(axes.texts) == 3


@pytest.mark.parametrize(
    "fields", [{}, {"classification_loss": "focal", "anchor_queries": True, "spatial_prior": True}]
)
def test_attention_is_that_of_the_last_layer_for_each_box_found(make_detr, detection_processor, fields):
    model = make_detr(**fields)
    figure = decoder_attention(model, detection_processor, PHOTOGRAPHS[0], threshold=0)
    outputs = model.eval()(**detection_processor(PHOTOGRAPHS[0], return_tensors="pt"), output_attentions=True)
    scores = outputs.logits.softmax(-1)[0, :, :-1].max(-1).values
    expected = outputs.cross_attentions[-1][0].mean(0)[scores.argsort(descending=True)]
    whole, *panels = figure.axes
    assert len(whole.patches) == len(panels) == 5
    np.testing.assert_allclose(
        np.stack([axes.images[1].get_array() for axes in panels]), expected.unflatten(1, (5, 8)).detach(), atol=1e-5
    )
    # 59 pixels are 7.4 cells, so the eighth column reaches out of the image.
    left, right, *_ = panels[0].images[1].get_extent()
    assert (right - left) / PHOTOGRAPHS[0].width == pytest.approx(64 / 59) and panels[0].get_xlim()[1] == 639.5


def test_without_a_likely_box_the_best_one_is_drawn(make_detr, detection_processor):
    assert len(decoder_attention(make_detr(), detection_processor, PHOTOGRAPHS[0], threshold=1.1).axes) == 2
