"""CIFAR-10: the binary layout, what is wrong with a copy of it, and the download."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import tarfile
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from intact.data import Dataset, cifar10, load_dataset
from intact.data.cifar10 import FOLDER, TEST_FILE, TRAIN_FILES, download, read_records
from intact.errors import DataError

RECORD = 3073
FILES = (*TRAIN_FILES, TEST_FILE)
CLASSES = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"


def record_bytes(label: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, 3072, dtype=np.uint8)
    return bytes([label]) + pixels.tobytes()


def full_size(number: int) -> bytes:
    """A file of 10,000 black images, all of one class, whose first image is `number` all over."""
    return (bytes([number]) + bytes([number]) * 3072) + (bytes([number]) + bytes(3072)) * 9_999


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete copy in the right layout: the label of file i is i, as is its first image."""
    folder = tmp_path_factory.mktemp("data") / FOLDER
    folder.mkdir()
    for i, name in enumerate(FILES):
        (folder / name).write_bytes(full_size(i))
    (folder / "batches.meta.txt").write_bytes(CLASSES)
    return folder


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage: links to the files, so that a test replaces what it damages."""
    for source in folder.iterdir():
        (tmp_path / source.name).symlink_to(source)
    return tmp_path


def check(data: Dataset) -> None:
    """What `folder` holds."""
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert data.test_images.shape == (10_000, 3, 32, 32)
    assert np.array_equal(data.train_labels, np.repeat(np.arange(5), 10_000))
    assert (data.test_labels == 5).all()
    for i in range(5):
        assert (data.train_images[10_000 * i] == i).all()
        assert not data.train_images[10_000 * i + 1].any()
    assert (data.test_images[0] == 5).all()
    assert data.classes[0] == "airplane"
    assert len(data.classes) == 10


# -- one file ------------------------------------------------------------------------------------


def test_a_record_is_a_label_then_three_planes_row_by_row(tmp_path):
    path = tmp_path / "two.bin"
    path.write_bytes(record_bytes(3, seed=1) + record_bytes(9, seed=2))
    images, labels = read_records(path, records=2)
    raw = path.read_bytes()
    assert labels.tolist() == [3, 9]
    assert (labels.dtype, images.dtype) == (np.int64, np.uint8)
    rng = np.random.default_rng(0)
    for n, c, y, x in zip(*(rng.integers(0, k, 200) for k in (2, 3, 32, 32)), strict=True):
        assert images[n, c, y, x] == raw[n * RECORD + 1 + c * 1024 + y * 32 + x]


@pytest.mark.parametrize(
    ("size", "message"), [(0, "has 0 bytes"), (3072, "has 3,072 bytes"), (3074, "more than 3,073")]
)
def test_a_file_of_the_wrong_size_is_named_with_its_size(tmp_path, size, message):
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(
        DataError, match=r"data_batch_3\.bin has .* of 3,073 bytes make 3,073"
    ) as error:
        read_records(path, records=1)
    assert message in str(error.value)


def test_a_label_out_of_range_is_named_with_its_record(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(record_bytes(0) + record_bytes(9) + record_bytes(10) + record_bytes(255))
    with pytest.raises(DataError, match=r"data_batch_1\.bin: the label of record 2.* is 10, not 0"):
        read_records(path, records=4)


# -- a folder ------------------------------------------------------------------------------------


def test_the_files_are_read_in_order(folder):
    check(load_dataset("cifar10", folder))


def test_the_folder_may_be_the_parent_and_may_come_from_the_environment(folder, monkeypatch):
    assert cifar10.find(folder.parent) == folder
    monkeypatch.setenv("INTACT_DATA_DIR", str(folder.parent))
    check(load_dataset("cifar10"))


def test_a_folder_without_the_files_is_refused_with_what_it_should_hold(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"holds neither data_batch_1\.bin nor a folder cifar"):
            load_dataset("cifar10", path)


def test_a_folder_that_is_named_is_never_replaced_by_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("INTACT_DATA_DIR", str(folder))
    with pytest.raises(DataError, match="holds neither"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin", "batches.meta.txt"])
def test_a_missing_file_is_named(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(DataError, match=rf"{name} cannot be read: No such file.* Unpack"):
        load_dataset("cifar10", damaged)


def test_a_truncated_file_is_named(damaged):
    (damaged / TEST_FILE).unlink()
    (damaged / TEST_FILE).write_bytes(full_size(5)[:-1])
    with pytest.raises(DataError, match=r"test_batch\.bin has 30,729,999 bytes"):
        load_dataset("cifar10", damaged)


@pytest.mark.parametrize("text", [b"", b"a\nb\n", CLASSES + b"boat\n", b"cat\n" * 10])
def test_the_file_of_class_names_must_name_ten(damaged, text):
    (damaged / "batches.meta.txt").unlink()
    (damaged / "batches.meta.txt").write_bytes(text)
    with pytest.raises(DataError, match=r"batches\.meta\.txt must name 10 classes"):
        load_dataset("cifar10", damaged)


def test_class_names_that_are_not_text_are_refused(damaged):
    (damaged / "batches.meta.txt").unlink()
    (damaged / "batches.meta.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not text"):
        load_dataset("cifar10", damaged)


@pytest.mark.skipif(
    "INTACT_DATA_DIR" not in os.environ, reason="INTACT_DATA_DIR does not name a CIFAR-10"
)
def test_the_real_data_has_a_thousand_test_images_of_every_class():
    data = load_dataset("cifar10")
    assert np.bincount(data.test_labels).tolist() == [1000] * 10
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert 110 < data.train_images[:1000].mean() < 130


# -- download ------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves `content` at /archive.tar.gz; `announced` is the Content-Length it claims."""

    content = b""
    announced = 0
    requests: ClassVar[list[str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path != "/archive.tar.gz":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.requests.clear()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def url(server: Server, path: str = "archive.tar.gz") -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def serve(server: Server, content: bytes, announced: int | None = None) -> str:
    """Let the server offer `content`; returns its MD5."""
    server.content = content
    server.announced = len(content) if announced is None else announced
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def pack(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def named(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


@pytest.fixture(scope="module")
def archive() -> bytes:
    """Like the official one: a folder, the files in any order, and one more that nobody needs."""
    directory = named(FOLDER)
    directory.type = tarfile.DIRTYPE
    members = [(directory, b""), (named(f"{FOLDER}/readme.html"), b"<html>")]
    members += [(named(f"{FOLDER}/{n}"), full_size(i)) for i, n in enumerate(FILES)]
    members.append((named(f"{FOLDER}/batches.meta.txt"), CLASSES))
    return pack(members[::-1])


def refused(cache: Path, *args: str) -> str:
    """The download fails, says what to do, and leaves nothing behind."""
    with pytest.raises(DataError, match="could not be downloaded from") as error:
        download(cache, *args)
    message = str(error.value)
    # pooch leaves the connection of a failed request to the garbage collector. Let it warn of that
    # now and here, not in the middle of another test.
    del error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert "without a network" in message
    assert "INTACT_DATA_DIR" in message
    assert str(cache / FOLDER) in message
    assert list(cache.iterdir()) == []
    return message


def test_a_download_unpacks_the_expected_files_and_nothing_else(server, archive, tmp_path):
    got = download(tmp_path / "new" / "cache", url(server), serve(server, archive))
    assert got == tmp_path / "new" / "cache" / FOLDER
    assert list(got.parent.iterdir()) == [got]
    assert {p.name for p in got.iterdir()} == {*FILES, "batches.meta.txt"}
    check(cifar10.read(got))


def test_what_the_cache_holds_is_not_downloaded_again(folder, monkeypatch):
    monkeypatch.delenv("INTACT_DATA_DIR", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda _: folder.parent)
    monkeypatch.setattr("pooch.retrieve", lambda *_: pytest.fail("downloaded again"))
    check(load_dataset("cifar10"))


def test_an_empty_cache_is_filled_from_the_official_address(tmp_path, monkeypatch):
    asked = []

    def retrieve(*args: str) -> None:
        asked.append(args[:2])
        raise ConnectionError("no network here")

    monkeypatch.delenv("INTACT_DATA_DIR", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda _: tmp_path)
    monkeypatch.setattr("pooch.retrieve", retrieve)
    with pytest.raises(DataError, match="no network here"):
        load_dataset("cifar10")
    assert asked == [
        (
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "md5:c32a1d4ab5d03f1284b67883e8d87530",
        )
    ]


def test_a_corrupted_download_is_refused(server, archive, tmp_path):
    md5 = serve(server, archive)
    flipped = bytearray(archive)
    flipped[len(flipped) // 2] ^= 1
    serve(server, bytes(flipped))
    assert "hash" in refused(tmp_path, url(server), md5)


def test_a_connection_that_breaks_off_is_refused(server, archive, tmp_path):
    md5 = serve(server, archive)
    serve(server, archive[:-1000], announced=len(archive))
    refused(tmp_path, url(server), md5)


def test_a_download_that_ends_early_is_refused(server, archive, tmp_path):
    md5 = serve(server, archive)
    serve(server, archive[:-1000])
    refused(tmp_path, url(server), md5)


def test_a_missing_archive_is_refused(server, tmp_path):
    assert "404" in refused(tmp_path, url(server, "elsewhere.tar.gz"), "0" * 32)


def test_an_unreachable_server_is_refused(server, tmp_path):
    address = url(server)
    server.server_close()  # the port is free now: nobody answers there
    refused(tmp_path, address, "0" * 32)


def test_an_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(url: str, known_hash: str, fname: str, path: str) -> None:
        (Path(path) / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("pooch.retrieve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path)
    assert list(tmp_path.iterdir()) == []


def linked() -> tarfile.TarInfo:
    info = named(f"{FOLDER}/test_batch.bin")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is no archive", "not a gzip file"),
        (pack([]), "the archive lacks"),
        (pack([(named(f"{FOLDER}/test_batch.bin"), b"short")]), "not the file that it should be"),
        (pack([(named(f"{FOLDER}/batches.meta.txt"), b"x" * 9999)]), "not the file that it should"),
        (pack([(linked(), b"")]), "not the file that it should be"),
        (pack([(named(f"../{FOLDER}/test_batch.bin"), b"x")]), "the archive lacks"),
        (pack([(named("/tmp/intact-escaped"), b"x")]), "the archive lacks"),  # noqa: S108
    ],
    ids=["no archive", "empty", "short file", "long file", "link", "path upwards", "absolute path"],
)
def test_an_archive_with_the_right_hash_is_still_not_trusted(server, tmp_path, content, message):
    cache = tmp_path / "cache"
    assert message in refused(cache, url(server), serve(server, content))
    assert list(tmp_path.iterdir()) == [cache]


def test_an_archive_cut_short_is_refused_even_with_its_hash(server, archive, tmp_path):
    content = archive[: len(archive) // 2]
    refused(tmp_path, url(server), serve(server, content))
