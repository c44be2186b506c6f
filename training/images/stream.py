"""Images from a stream, which may be larger than the disk or still on its way."""

import functools
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from training.data.fingerprints import fingerprint_of
from training.data.shards import ShardFolder
from training.images.formats import content_of, label_ids, name_of, read_dataset, undecoded, unknown_label
from training.images.rows import BadImageLimit, Decoder, EncodedRows, permutation

NUM_HELD_OUT = 1000
ROWS_PER_SHARD = 2048


def stream_images(
    splits,
    source: str,
    image_column: str,
    label_column: str | None,
    label_names: list[str] | None,
    *,
    root: Path = Path(),
    num_channels: int,
    decoder: Decoder,
    limit: BadImageLimit,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> tuple["StreamedRows", EncodedRows, list[str], str | None, str]:
    """Opens a `datasets.IterableDatasetDict` to train on as it arrives.

    The first NUM_HELD_OUT images of the split "validation" or "test" validate; without such a split, the first images
    of "train" do, and training begins behind them.

    Args:
        root: the folder that paths in the data are relative to.

    Returns:
        Training images, validation images, the names of the classes, the licence, and a fingerprint, which covers the
        name and the validation images, because the others have not arrived yet.
    """
    import datasets

    train, validation = splits["train"], splits.get("validation", splits.get("test"))
    if train.features is None:
        train = train._resolve_features()
    held_out = (train if validation is None else validation).take(NUM_HELD_OUT)
    held_out, _ = undecoded(held_out, source, image_column, label_column)
    train, names = undecoded(train, source, image_column, label_column)
    if label_column is not None and names is None and label_names is None:
        raise ValueError(f"{source}: a stream does not say which classes will come: name them with label_names")
    if validation is None:
        train = train.skip(NUM_HELD_OUT)
    if not (rows := list(held_out)):
        raise ValueError(f"{source}: the stream has no images")
    held_out = read_dataset(
        datasets.Dataset.from_list(rows, held_out.features), f"{source}, held out", image_column, label_column, root
    )
    class_names = (label_names or names or []) if label_column is not None else []
    ids = label_ids(class_names, names is None and held_out.labels)

    def label_of(row: dict, where: str) -> int:
        label = row[label_column] if names is None else name_of(row[label_column], names, where)
        if str(label) not in ids:
            raise ValueError(f"{where} has {unknown_label(label, ids)}")
        return ids[str(label)]

    labels = None
    if label_column is not None:
        labels = [label_of(row, f"{source}, held out, row {number}") for number, row in enumerate(rows, 1)]
    digests = [digest.hex() for digest in held_out.images.digests()]
    fingerprint = fingerprint_of("stream", source, class_names, digests, labels)
    shards = Shards(
        train,
        source,
        fingerprint,
        image_column,
        None if labels is None else label_of,
        root=root,
        rows_per_shard=rows_per_shard,
    )
    options = {"num_channels": num_channels, "decoder": decoder, "limit": limit}
    held_out = EncodedRows(held_out.images, None if labels is None else np.array(labels), **options)
    streamed = StreamedRows(shards, None, quick=True, **options)
    return streamed, held_out, class_names, train.info.license or None, fingerprint


class Shards(ShardFolder):
    """The undecoded images of a stream, on disk.

    A shard holds `rows_per_shard` images, one behind the other. The JSON file beside it says where each image ends, and
    its label.
    """

    def __init__(
        self,
        dataset,
        source: str,
        fingerprint: str,
        image_column: str,
        label_of,
        *,
        root: Path,
        rows_per_shard: int,
        timeout=600.0,
    ):
        self.dataset, self.source, self.image_column, self.label_of = dataset, source, image_column, label_of
        self.root, self.rows_per_shard = root, rows_per_shard
        self.labels = np.zeros(0, np.int64)  # of all images that have arrived
        self._rows = None  # the open stream; it continues behind the last shard
        self._open = functools.lru_cache(maxsize=4)(self._map)
        key = fingerprint_of(fingerprint, image_column, rows_per_shard, 1)
        super().__init__(Path(constants.HF_HOME) / "hf_models" / "images" / f"stream-{key[:32]}", timeout)

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def encoded(self, indices):
        images = []
        for index in indices:
            shard, first = self.shard_of(int(index))
            ends = self.found[shard]["ends"]
            row = int(index) - first
            images.append(self._open(shard)[ends[row - 1] if row else 0 : ends[row]].tobytes())
        return images

    def name(self, index):
        return f"{self.source}, row {index + 1} of the stream"

    def _map(self, shard: int) -> np.ndarray:
        if not self.found[shard]["size"]:
            return np.zeros(0, np.uint8)
        return np.asarray(np.memmap(self.path(shard), np.uint8, mode="r"))

    def take_in(self, shard):
        entry = self.found[shard]
        self.labels = np.concatenate([self.labels, np.array(entry["labels"], np.int64)])
        return len(entry["ends"])

    def forget(self):
        self._rows = None

    def make_shard(self):
        if self._rows is None:
            self._rows = iter(self.dataset.skip(len(self)))
            self._next = next(self._rows, None)
        contents, labels, ends, size = [], [], [], 0
        while self._next is not None and len(contents) < self.rows_per_shard:
            content = content_of(self._next[self.image_column])
            if isinstance(content, str):
                file = self.root / content
                content = (
                    file.read_bytes() if file.is_file() else b""
                )  # a bad image, which is replaced when its turn comes
            size += len(content)
            where = self.name(len(self) + len(contents))
            labels.append(-1 if self.label_of is None else self.label_of(self._next, where))
            contents.append(content)
            ends.append(size)
            self._next = next(self._rows, None)
        if not contents:
            raise ValueError(f"{self.source}: the stream has no image to train on behind those that validate")
        return b"".join(contents), {"ends": ends, "labels": labels, "is_last": self._next is None}


class StreamedRows(EncodedRows):
    """Images of a stream, of which only as many are on disk as were needed so far.

    Shards are used in order of arrival, and the images of a shard in a new order in each epoch. When the stream has
    ended, the next epoch begins.
    """

    source: Shards

    @property
    def labels(self):
        return None if self.source.label_of is None else self.source.labels

    def draw(self, first, count, seed):
        self.source.provide(first + count)
        drawn = []
        for sample in range(first, first + count):
            epoch, index = divmod(sample, len(self)) if self.source.has_ended else (0, sample)
            shard, begin = self.source.shard_of(index)
            size = self.source.ends[shard] - begin
            drawn.append(begin + permutation(size, seed, epoch, shard)[index - begin])
        return np.array(drawn, np.int64)

    def external_files(self):
        return self.source.external_files()

    def _alike(self, index):
        """Only images of the same shard: later ones may have arrived or not."""
        shard, begin = self.source.shard_of(index)
        numbers = np.arange(begin, self.source.ends[shard])
        return numbers if self.labels is None else numbers[self.labels[numbers] == self.labels[index]]
