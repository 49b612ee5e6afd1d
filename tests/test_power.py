"""What is written has reached the disk before it gets its name, and the name before we say so."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import made_run
from power import Disk
from webserver import Site

from fastidmm.datasets.folder import Folder
from fastidmm.exporting.embed import embed
from fastidmm.exporting.export import export
from fastidmm.preparing import prepare as module
from fastidmm.preparing.fetch import Remote, fetch
from fastidmm.preparing.prepare import prepare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
MakePhotos = Callable[..., Path]


def names(disk: Disk) -> list[str]:
    return [path.name for path in disk.renamed]


def test_a_store_and_what_names_it(
    home: Path, photos: MakePhotos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several files, then instead of that in one; marks of the journal in between."""
    source = Folder().open(from_=photos(tmp_path / "photos", per_class=10, side=6), seed=0)
    monkeypatch.setattr(module, "SYNC_BYTES", 300)
    disk = Disk(home, monkeypatch)
    prepare(source, "mine", shard_bytes=1000)
    assert names(disk) == ["test.safetensors", "mine", "current"]
    prepare(source, "mine")
    assert names(disk)[3:] == [
        "train.safetensors", "test.safetensors", ".mine.old", "mine", "current"
    ]  # fmt: skip
    assert disk.amiss() == []
    marked = [to_sync for path, to_sync in disk.synced if path.name == ".mine.journal"]
    assert len(marked) > 5
    assert not [name for to_sync in marked for name in to_sync if name.endswith(".safetensors")]


def test_an_export(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(Path("runs/one"))
    disk = Disk(tmp_path / "deep", monkeypatch)
    export(Path("runs/one"), "timm", Path("deep/out"))
    assert names(disk) == ["out"] and disk.amiss() == []


def test_features(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(Path("runs/one"))
    disk, out = Disk(tmp_path / "deep", monkeypatch), Path("deep/features.npz")
    embed(Path("runs/one"), toy, out, normalise=False, device=None, quiet=True)
    assert names(disk) == ["features.npz"] and disk.amiss() == []


def test_a_fetched_file_and_its_checksum(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / "archives", monkeypatch)
    fetch(Remote("x.tgz", (site.add("x.tgz", b"content"),)), tmp_path / "archives")
    assert names(disk) == ["x.tgz.sha256", "x.tgz"] and disk.amiss() == []


def test_what_it_catches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that nobody synced, and a name."""
    disk = Disk(tmp_path, monkeypatch)
    (tmp_path / "a").write_text("text")
    (tmp_path / "a").rename(tmp_path / "b")
    assert disk.amiss() == ["a before it was synced", "the name b was not synced now"]
