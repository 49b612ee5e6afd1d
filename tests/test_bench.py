"""`bench prepare` and what all subjects share: figures, where they go, the bare command."""

import errno
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastidmm import cli, store
from fastidmm.bench import answers, everything, figures, made
from fastidmm.bench import prepare as bench
from fastidmm.bench.figures import measured, ratio, result, stall
from fastidmm.errors import UsageError
from fastidmm.facts import num_cores


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The exit status of a command."""
    monkeypatch.setattr("sys.argv", ["fastidmm", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_made_up_photographs_are_photographs(tmp_path: Path) -> None:
    folder = made.photographs_in(tmp_path / "made", 2)
    files = sorted(folder.iterdir())
    small = made.photographs_in(tmp_path / "small", 1, width=500, height=375) / "00000.jpg"
    found = []
    for file in [*files, small]:
        with Image.open(file) as image:
            found.append((image.format, image.size))
    assert found == [("JPEG", (667, 500))] * 2 + [("JPEG", (500, 375))]
    assert 100_000 < files[0].stat().st_size < 120_000 and 60_000 < small.stat().st_size < 70_000
    assert files[0].read_bytes() != files[1].read_bytes()
    assert made.photographs_in(tmp_path / "again", 1).joinpath("00000.jpg").read_bytes() == (
        files[0].read_bytes()
    )


def test_rows_of_noise_share_its_pictures() -> None:
    store = made.noise(2 * 3 + 1, 3)
    assert len(store) == 7 and store.num_classes == 102
    wide = store.width[:3].tolist()
    assert all(500 <= w < 750 for w in wide) and store.pixels.numel() == 500 * 3 * sum(wide)
    assert torch.equal(store.image(6), store.image(0))
    assert not torch.equal(store.image(1)[:, :500], store.image(2)[:, :500])


def test_every_count_is_measured_in_turn(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[int, str]] = []
    cores = num_cores()

    def rate(folder: Path, at: Path, count: int) -> float:
        with made.at_home(at), bench._held_to(count):
            met.append((num_cores(), os.environ["FASTIDMM_HOME"]))
        return 100.0 * count + len(met)

    monkeypatch.setattr(bench, "_rate", rate)
    told = bench.measure(num_images=2, repeats=2, cores=[cores, 1])
    counts = sorted({1, cores})
    assert [count for count, _ in met] == counts * 2 and num_cores() == cores
    rows = told["tables"]["cores"]
    assert list(rows) == ["1 core", *(f"{n} cores" for n in counts[1:])]
    assert rows["1 core"]["images_per_second"]["raw"] == [101.0, 100.0 + len(counts) + 1]
    assert os.environ["FASTIDMM_HOME"] == str(home) and not Path(met[0][1]).exists()


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_cores_double(most: int, counts: list[int]) -> None:
    assert bench._doubling(most) == counts


@pytest.mark.parametrize("cores", [0, 10_000])
def test_cores_there_are_not(cores: int) -> None:
    with pytest.raises(UsageError, match="this process may use 1 to"):
        bench.measure(num_images=2, repeats=1, cores=[cores])


def test_a_measurement_is_its_middle(home: Path) -> None:
    assert measured([5.0]) == {"median": 5, "low": 5, "high": 5, "raw": [5]}
    assert measured([30, 10, 20]) == {"median": 20, "low": 10, "high": 30, "raw": [30, 10, 20]}
    # Of eleven, two go at either end.
    eleven = measured([9, 1, 8, 2, 7, 3, 6, 4, 5, 1000, -1000])
    assert (eleven["median"], eleven["low"], eleven["high"]) == (5, 2, 8)
    assert measured([1, 2, 3, 6])["median"] == 2.5
    assert measured([1 / 3])["raw"] == [0.333333]
    # Turn by turn: 3, 2 and 4; the medians' own ratio would be 30 / 12.
    paired = ratio([30, 24, 44], [10, 12, 11])
    assert (paired["median"], paired["low"], paired["high"]) == (3, 2, 4)
    assert stall(0.06, 0.08) == pytest.approx(0.25)


def test_a_table_shows_the_first_figure_with_its_spread() -> None:
    rows: figures.Rows = {
        "a": {"status": "ok", "images_per_second": measured([300, 100, 200]), "stall": None},
        "long name": {"status": "ok", "images_per_second": measured([12_000]), "gain": 9.5},
        "c": {"status": "missing: c is not installed: pip install c"},
    }
    told = result("test", "of tables", {"rows": rows}, settings={}, notes=["a note"])
    assert figures.text(told).splitlines() == [
        "test: of tables",
        "           images/s                      gain",
        "a               200  (100 to 300)",
        "long name    12,000  (12,000 to 12,000)  9.50",
        "c          missing: c is not installed: pip install c",
        "a note",
    ]
    two = result("test", "of tables", {"one": rows, "two": rows}, settings={})
    assert [line for line in figures.text(two).splitlines() if line in ("one", "two")] == [
        "one",
        "two",
    ]


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (0.00123, "0.00123"),
        (1.5, "1.50"),
        (99.96, "100.0"),
        (-7, "-7.00"),
        (12345, "12,345"),
    ],
)
def test_numbers_have_three_digits(number: float, shown: str) -> None:
    assert figures.shown("milliseconds", number) == shown


def test_surroundings_say_what_is_there() -> None:
    where = made_result()["surroundings"]
    assert where["packages"]["torch"] == metadata.version("torch")
    assert where["packages"]["pillow"] and "kornia" in where["packages"]
    assert where["cores"] == num_cores() and where["cpu"] and where["memory_gb"] > 0
    assert where["date"].endswith("+00:00") and "/" not in where["command"].split()[0]


def made_result() -> dict[str, Any]:
    """The smallest result there is."""
    row = {"status": "ok", "milliseconds": measured([1.0])}
    return result("test", "small", {"rows": {"a": row}}, settings={})


def test_answers_go_where_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = made_result()
    json_file, html_file = tmp_path / "a.json", tmp_path / "a.html"
    answers.tell(found, json_file=json_file, html_file=html_file)
    assert json.loads(json_file.read_text()) == found
    assert html_file.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == figures.text(found) + "\n"
    answers.tell(found, json_file=Path("-"), html_file=None)
    assert json.loads(capsys.readouterr().out) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json"]


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    answers.check(json=Path("-"), html=tmp_path / "a.html", trace=None)
    for flag, path in (
        ("json", tmp_path),
        ("html", tmp_path / "no" / "a.html"),
        ("html", Path("-/a")),
    ):
        with pytest.raises(UsageError, match=f"--{flag} .*: name a file in a folder that is there"):
            answers.check(**{flag: path})
    with pytest.raises(UsageError, match=r"^--json .* cannot be written \(File name too long\): "):
        answers.check(json=tmp_path / f"{'a' * 300}.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a disk that is mounted to be read; nothing is left where it can be written."""
    place = tmp_path / "answers"
    place.mkdir()
    touch, calls = Path.touch, list[str]()

    def refusing(path: Path, *given: Any, **more: Any) -> None:
        if place in path.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        touch(path, *given, **more)

    def measure(*given: Any, **more: Any) -> dict[str, Any]:
        calls.append("measured")
        return made_result()

    monkeypatch.setattr(Path, "touch", refusing)
    monkeypatch.setattr("fastidmm.bench.loss.measure", measure)
    for flag in ("--json", "--html"):
        assert typed(monkeypatch, "bench", "loss", flag, str(place / "a")) == 2
        told = f"fastidmm: {flag} {place}/a cannot be written (Read-only file system): name a file"
        assert capsys.readouterr() == ("", f"{told} elsewhere.\n")
    assert not calls and list(place.iterdir()) == []
    assert typed(monkeypatch, "bench", "loss", "--json", str(tmp_path / "b.json")) == 0 and calls
    assert json.loads((tmp_path / "b.json").read_text()) == made_result()


def test_bare_bench_is_everything_quickly(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    met = []

    def good(device: torch.device, quick: bool) -> dict[str, Any]:
        met.append(quick)
        return made_result()

    def bad(device: torch.device, quick: bool) -> dict[str, Any]:
        raise ZeroDivisionError("once\nmore")

    assert list(everything.SUBJECTS) == ["loader", "views", "loss", "prepare", "step"]
    monkeypatch.setattr(everything, "SUBJECTS", {"one": good, "two": good})
    assert typed(monkeypatch, "bench") == 0 and met == [True, True]
    assert capsys.readouterr().out.count("test: small") == 2
    monkeypatch.setattr(everything, "SUBJECTS", {"one": good, "bad": bad, "two": good})
    assert typed(monkeypatch, "bench", "--json", "all.json", "--html", "all.html") == 1
    told = json.loads(Path("all.json").read_text())
    assert list(told["subjects"]) == ["one", "bad", "two"] and "cpu" in told["surroundings"]
    failed = told["subjects"]["bad"]["tables"]["bad"]["bad"]
    assert failed == {"status": "failed: ZeroDivisionError: once"}
    assert "failed: ZeroDivisionError" in Path("all.html").read_text()
    assert "could not be measured: bad" in capsys.readouterr().err
    assert typed(monkeypatch, "bench", "all") == 1 and met[-2:] == [False, False]
    assert typed(monkeypatch, "bench", "--json", "x", "all") == 2 and not Path("x").exists()
    assert "behind `bench all`" in capsys.readouterr().err


def test_the_command(
    home: Path, photos: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(Path("photos"), per_class=3)
    words = ["--from", "photos", "--repeats", "2", "--cores", "1", "--json", "-"]
    assert typed(monkeypatch, "bench", "prepare", *words) == 0
    told = json.loads(capsys.readouterr().out)
    rates = told["tables"]["cores"]["1 core"]["images_per_second"]["raw"]
    assert told["about"] == "photos" and len(rates) == 2 and min(rates) > 0
    assert store.prepared() == []
