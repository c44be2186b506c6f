import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.pictures import content, deep_png, picture, png_head
from training.images import decoding
from training.images.batches import SelectedRows
from training.images.rows import ArrayRows, BadImageLimit, BadImages, Decoder, EncodedRows


class Contents:
    """Encoded images in memory."""

    def __init__(self, images: list[str | bytes]):
        self.images = images

    def __len__(self):
        return len(self.images)

    def encoded(self, indices):
        return [self.images[index] for index in indices]

    def name(self, index):
        return f"image {index}"


def open_rows(images, labels=None, num_workers=0, num_channels=3, max_bad_images=0.5, quick=False):
    labels = None if labels is None else np.array(labels)
    options = {"num_channels": num_channels, "decoder": Decoder(num_workers), "limit": BadImageLimit(max_bad_images)}
    return EncodedRows(Contents(images), labels, quick=quick, **options)


def expected_pixels(image: Image.Image, size, box=None):
    pixels = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC, box))
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


@pytest.fixture
def boxes():
    random = np.random.default_rng(0)
    corner, extent = random.uniform(0, 0.5, (24, 2)), random.uniform(0.1, 0.5, (24, 2))
    return torch.tensor(np.hstack([corner, extent]), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------ odd images

GREY = picture(3, mode="L")
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
ODD = {  # what it is, and what it looks like; None: it is bad
    "RGB": (content(picture(3)), picture(3), None),
    "grey": (content(GREY), GREY, "grey"),
    "16-bit": (content(DEEP), GREY, "16-bit"),
    "16-bit RGB": (deep_png(picture(3)), picture(3), "16-bit"),
    "16-bit TIFF": (content(DEEP, "TIFF"), GREY, "16-bit"),
    "palette": (content(picture(3).quantize(16)), picture(3).quantize(16), "palette"),
    "palette with transparency": (content(GREY.convert("P"), transparency=3), GREY, "palette"),
    "grey with transparency": (content(GREY.convert("LA")), GREY, "transparent"),
    "transparent": (content(picture(3).convert("RGBA")), picture(3), "transparent"),
    "CMYK": (content(picture(3).convert("CMYK"), "TIFF"), picture(3), "CMYK"),
    "1-bit": (content(picture(3).convert("1")), picture(3).convert("1"), "1-bit"),
    "1x1": (content(Image.new("RGB", (1, 1), (9, 80, 7))), Image.new("RGB", (1, 1), (9, 80, 7)), None),
    "GIF": (content(GREY, "GIF"), GREY, "palette"),
}


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_image_is_converted_and_named(kind, num_channels):
    file, image, conversion = ODD[kind]
    rows = open_rows([file], num_channels=num_channels)
    mode = "L" if num_channels == 1 else "RGB"
    [pixels] = rows.images([0], size=image.size[::-1])
    expected = expected_pixels(image.convert("RGB").convert(mode), image.size[::-1])
    assert (pixels.int() - expected.int()).abs().max() <= 2
    if num_channels == 1:
        conversion = {"grey": None, None: "colour"}.get(conversion, conversion)
    assert rows.report() == ([f"1 {conversion} images converted (image 0)"] if conversion else [])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_an_image_is_turned_as_its_exif_says(orientation, form):
    upright = picture(1, (40, 24))
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = orientation
    back = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright if orientation == 1 else upright.transpose(decoding.UPRIGHT[back])
    quality = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
    rows = open_rows([content(stored, form, exif=exif, **quality)])
    box = np.array([[0.1, 0.5, 0.4, 0.25]])
    [pixels] = rows.images([0], box, (8, 8))
    expected = expected_pixels(upright, (8, 8), (2.4, 20, 12, 30))
    assert (pixels.int() - expected.int()).abs().max() <= (12 if form == "JPEG" else 1)
    assert rows.aspects([0]) == pytest.approx(0.6)


BAD = {
    "empty": (b"", "no content"),
    "no image": (b"once upon a time", "not an image"),
    "cut off": (content(picture(1, (60, 60)), "JPEG")[:500], "runcated"),
    "cut off PNG": (content(picture(1, (60, 60)))[:-700], "truncated"),
    "a bomb": (png_head(10_000, 9_000), "10000x9000 pixels, more than 89478485"),
    "a larger bomb": (png_head(100_000, 100_000), "exceeds limit"),
    "not there": ("/nowhere/cat.png", "No such file"),
    "floating point": (content(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"), "no fixed range"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_replaced_by_the_next_sound_one_of_its_class_and_named(capfd, num_workers):
    files = [file for file, _ in BAD.values()] + [content(picture(number)) for number in range(8)]
    labels = [number % 2 for number in range(16)]
    rows = open_rows(files, labels, num_workers)
    sound = {label: 8 + label for label in (0, 1)}  # the first of each
    expected = rows.images([sound[number % 2] for number in range(8)], size=(6, 5))
    assert torch.equal(rows.images(range(8), size=(6, 5)), expected)
    assert rows.bad.keys() == set(range(8))
    for number, (_, reason) in enumerate(BAD.values()):
        assert reason in rows.bad[number]
    [line] = rows.report()
    assert line.startswith("8 bad images replaced by others (image 0: no content, image 1: not an image, image 2: ")
    elsewhere = ({0: "no content", 9: "torn"}, {"grey": {9, 10}})  # what another process found
    of_all = rows.report(gather=lambda findings: [*findings, elsewhere])
    assert of_all[0] == "2 grey images converted (image 9, image 10)" and of_all[1].startswith("9 bad images")
    rows.images(range(16), size=(6, 5))
    errors = capfd.readouterr().err
    assert errors.count("bad image, replaced by another: image") == 8  # each once


def test_a_bad_image_among_chosen_ones_is_replaced_by_one_of_them():
    """Or a run with few labels would use the label of another image."""
    rows = open_rows([b"", *(content(picture(number)) for number in range(1, 8))], [0, 1] * 4)
    few = SelectedRows(rows, np.array([0, 1, 6]))
    assert torch.equal(few.images([0], size=(6, 5)), rows.images([6], size=(6, 5)))
    assert torch.equal(rows.images([0], size=(6, 5)), rows.images([2], size=(6, 5)))
    assert few.report() == rows.report() == ["1 bad images replaced by others (image 0: no content)"]


def test_the_last_image_is_replaced_by_the_first_and_none_is_found_twice():
    files = [content(picture(number)) for number in range(4)] + [b"", b""]
    for order in ([5, 4], [4, 5]):
        rows = open_rows(files)
        assert torch.equal(rows.images(order, size=(4, 4)), rows.images([0, 0], size=(4, 4)))
    assert list(rows.aspects([4, 0])) == [1.0, pytest.approx(10 / 12)]


def test_too_many_bad_images_stop_the_run_and_are_named():
    files = [b""] * 3 + [content(picture(number)) for number in range(97)]
    rows = open_rows(files, np.arange(100) % 50, max_bad_images=0.02)
    rows.images([0, 1, 3, 4], size=(4, 4))
    message = (
        r"3 of 100 images are bad, more than the part of 0.02 that max_bad_images allows: image 0: no content, "
        r"image 1: no content, image 2: no content; mend or remove them"
    )
    with pytest.raises(BadImages, match=message):
        rows.images([50, 2], size=(4, 4))
    with pytest.raises(ValueError, match="1 of 100 images are bad"):
        open_rows(files, max_bad_images=0).images([0], size=(4, 4))
    with pytest.raises(BadImages, match="every image like image 0 is bad"):
        open_rows(files, [0] * 3 + [1] * 97).images([0], size=(4, 4))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_disk_that_fails_is_no_bad_image(tmp_path, num_workers):
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    rows = open_rows([str(loop)], num_workers=num_workers)
    with pytest.raises(OSError, match="symbolic links") as raised:
        rows.images([0], size=(4, 4))
    assert not isinstance(raised.value, BadImages) and raised.value.filename == str(loop)


def test_damaged_exif_harms_no_image():
    rows = open_rows([content(picture(0), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")])
    rows.images([0], size=(4, 4))
    assert rows.report() == []


# ----------------------------------------------------------------------------------------- what is cut out of them


@pytest.mark.parametrize("source", ["file", "memory"])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (40, 20), (9, 30)])
@pytest.mark.parametrize("size", [(28, 28), (8, 12), (50, 30)])
def test_boxes_are_cut_out_and_resized_as_pillow_does(boxes, source, height, width, size):
    images = [picture(number, (height, width), "L") for number in range(len(boxes))]
    if source == "file":
        rows = open_rows([content(image) for image in images], num_channels=1)
    else:
        rows = ArrayRows(np.stack([np.asarray(image)[None] for image in images]), None, num_channels=1)
    pixels = rows.images(range(len(images)), boxes, size)
    for image, got, (left, top, across, down) in zip(images, pixels, boxes.double().tolist(), strict=True):
        box = (left * width, top * height, (left + across) * width, (top + down) * height)
        assert (got.int() - expected_pixels(image, size, box).int()).abs().max() <= (source == "memory")
    scale = max(size[0] / height, size[1] / width)
    x, y = (width - size[1] / scale) / 2, (height - size[0] / scale) / 2
    middle = expected_pixels(images[0], size, (x, y, width - x, height - y))
    assert torch.equal(rows.images([0], size=size)[0], middle)
    assert rows.aspects([0, 1]) == pytest.approx([width / height] * 2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_large_jpeg_is_decoded_in_part_to_train_on_and_looks_the_same(num_workers):
    file = content(picture(1, (1600, 1200)), "JPEG", quality=95)
    image = Image.open(io.BytesIO(file))
    whole, quick = (open_rows([file], num_workers=num_workers, quick=quick) for quick in (False, True))
    for box in (None, (0.25, 0.5, 0.5, 0.5)):
        part = (0, 200, 1200, 1400) if box is None else (300, 800, 900, 1600)
        expected = expected_pixels(image, (48, 48), part)
        boxes = None if box is None else np.array([box])
        assert torch.equal(whole.images([0], boxes, (48, 48))[0], expected)
        difference = (quick.images([0], boxes, (48, 48))[0].int() - expected.int()).abs().max()
        assert 0 < difference <= 4


@pytest.mark.parametrize("box", [(0.5, 0, 0.6, 1), (0, -0.1, 1, 1), (0, 0, 0, 1), (0, 0, float("nan"), 1), (0, 0, 1)])
def test_a_box_outside_of_the_image_is_refused(box):
    with pytest.raises(ValueError, match=r"boxes must be \(B, 4\): left, top, width and height"):
        open_rows([content(picture(0))]).images([0], np.array([box]), (4, 4))


def test_images_in_memory_come_as_they_are_in_any_number_of_channels():
    random = np.random.default_rng(0)
    for channels in (1, 3, 4):
        array = random.integers(0, 256, (7, channels, 6, 5), np.uint8)
        rows = ArrayRows(array, None, num_channels=3)
        assert (
            rows.images([3, 1], size=(6, 5)).tolist()
            == np.broadcast_to(array, (7, channels, 6, 5))[[3, 1]][:, :3].repeat(3 if channels == 1 else 1, 1).tolist()
        )
        grey = ArrayRows(array, None, num_channels=1).images([3], size=(6, 5))
        mode = "L" if channels == 1 else "RGB"
        image = Image.fromarray(array[3, :3].transpose(1, 2, 0).squeeze(), mode).convert("L")
        assert torch.equal(grey[0, 0], torch.tensor(np.asarray(image)))


# -------------------------------------------------------------------------------------------- processes and order


def many_files(tmp_path, count=40):
    """Half of them files, some of them bad."""
    files = [content(picture(number, (30 + number, 40)), "JPEG") for number in range(count)]
    files[7] = files[20] = b"nothing"
    for number in range(0, count, 2):
        path = tmp_path / f"ünï {number}.jpg"
        path.write_bytes(files[number])
        files[number] = str(path)
    return files


def test_pixels_do_not_depend_on_processes_nor_on_the_rest_of_the_batch(tmp_path, boxes):
    files = many_files(tmp_path)
    indices = np.random.default_rng(0).integers(0, 40, 24)
    expected = open_rows(files).images(indices, boxes, (16, 12))
    for num_workers in (1, 3):
        rows = open_rows(files, num_workers=num_workers)
        assert torch.equal(rows.images(indices, boxes, (16, 12)), expected)
        for first in range(0, 24, 8):
            part = slice(first, first + 8)
            rows.prefetch(indices[part], boxes[part], (16, 12))
        for first in range(16, -1, -8):
            part = slice(first, first + 8)
            assert torch.equal(rows.images(indices[part], boxes[part], (16, 12)), expected[part])


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_what_was_prefetched_is_not_done_again(monkeypatch, boxes, kind):
    if kind == "files":
        rows = open_rows([content(picture(number)) for number in range(24)])
    else:
        rows = ArrayRows(np.arange(24 * 36, dtype=np.uint8).reshape(24, 1, 6, 6), None, num_channels=1)
    expected, number_loaded, load = rows.images(range(24), boxes, (6, 6)), [], rows._load
    monkeypatch.setattr(rows, "_load", lambda *request: number_loaded.append(1) or load(*request))
    rows.prefetch(range(24), boxes, (6, 6))
    rows.prefetch(range(24), boxes, (6, 6))
    assert torch.equal(rows.images(range(24), boxes, (6, 6)), expected) and len(number_loaded) == 1
    rows.images(range(24), boxes, (6, 6))
    assert len(number_loaded) == 2


def test_what_goes_wrong_in_the_background_is_told_where_it_is_asked_for():
    rows = open_rows([b"", content(picture(0))], max_bad_images=0)
    rows.prefetch([0], None, (4, 4))
    with pytest.raises(BadImages):
        rows.images([0], None, (4, 4))


def test_every_epoch_has_every_image_once_in_its_own_order():
    rows = ArrayRows(np.zeros((10, 1, 2, 2), np.uint8), None, num_channels=1)
    drawn = rows.draw(0, 30, seed=1)
    epochs = drawn.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert np.array_equal(rows.draw(7, 9, seed=1), drawn[7:16])
    assert not np.array_equal(rows.draw(0, 30, seed=2), drawn)


def decoding_processes(parent: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(parent).children(True) if decoding.__file__ in child.cmdline()]


def is_gone(pid: int) -> bool:
    import psutil

    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_process_that_was_killed_is_replaced():
    others = set(decoding_processes(os.getpid()))
    rows = open_rows([content(picture(number)) for number in range(8)], num_workers=1)
    expected = rows.images(range(8), size=(4, 4))
    [process] = set(decoding_processes(os.getpid())) - others
    os.kill(process, signal.SIGKILL)
    assert torch.equal(rows.images(range(8), size=(4, 4)), expected)
    [other] = set(decoding_processes(os.getpid())) - others - {process}
    for number in (signal.SIGINT, signal.SIGTERM):  # as a launcher sends them to all, for the trainer to save
        os.kill(other, number)
    assert torch.equal(rows.images(range(8), size=(4, 4)), expected)
    assert set(decoding_processes(os.getpid())) - others == {other}
    del rows
    wait_until(lambda: is_gone(other))


def test_a_process_that_dies_of_an_image_every_time_stops_the_run(monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import sys; sys.stdin.buffer.read(1); sys.exit(7)")
    monkeypatch.setattr(decoding, "__file__", str(script))
    rows = open_rows(["cat.png"], num_workers=1)
    with pytest.raises(ChildProcessError, match=r"died twice \(code 7\) over the same ones: cat.png"):
        rows.images([0], size=(4, 4))


def test_the_decoding_processes_end_with_the_trainer(tmp_path):
    """Whether it is killed in the midst of its work or comes to its end."""
    picture(0, (600, 600)).save(tmp_path / "a.jpg")
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys\n"
        "from training.images.rows import Decoder\n"
        "decoder = Decoder(2)\n"
        "for _ in range(int(sys.argv[1])):\n"
        f"    decoder.decode([{str(tmp_path / 'a.jpg')!r}] * 8, None, (64, 64), 3)\n"
        "    print('decoded', flush=True)\n"
        "input()\n"
    )
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options["env"] = {**os.environ, "PYTHONPATH": os.getcwd()}
    trainers = [subprocess.Popen([sys.executable, str(script), times], **options) for times in ("1000000", "2")]
    processes = []
    for trainer in trainers:
        for _ in range(2):
            assert trainer.stdout.readline() == "decoded\n"
        processes += decoding_processes(trainer.pid)
    assert len(processes) == 4
    trainers[0].kill()
    for trainer in trainers:
        trainer.communicate("done\n", 60)
    wait_until(lambda: all(map(is_gone, processes)))
    assert [trainer.returncode for trainer in trainers] == [-signal.SIGKILL, 0]
