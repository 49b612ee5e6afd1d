"""The benchmark measures what it says, on the cores it says, and leaves nothing behind."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastidmm import cli, store
from fastidmm.bench import prepare as bench
from fastidmm.errors import UsageError
from fastidmm.preparing.decode import num_cores


def test_made_up_photographs_are_photographs(tmp_path: Path) -> None:
    folder = bench.photographs_in(tmp_path / "made", 2)
    files = sorted(folder.iterdir())
    sizes = []
    for file in files:
        with Image.open(file) as image:
            sizes.append((image.format, image.size))
    assert sizes == [("JPEG", (667, 500))] * 2
    assert files[0].read_bytes() != files[1].read_bytes()
    assert bench.photographs_in(tmp_path / "again", 1).joinpath("00000.jpg").read_bytes() == (
        files[0].read_bytes()
    )


def test_every_count_is_measured_in_turn(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[int, str]] = []
    cores = num_cores()

    def rate(folder: Path, at: Path, count: int) -> float:
        with bench._at_home(at), bench._held_to(count):
            met.append((num_cores(), os.environ["FASTIDMM_HOME"]))
        return 100.0 * count + len(met)

    monkeypatch.setattr(bench, "_rate", rate)
    told = bench.measure(None, num_images=2, repeats=2, cores=[cores, 1])
    counts = sorted({1, cores})
    assert [count for count, _ in met] == counts * 2 and num_cores() == cores
    assert [result["cores"] for result in told["results"]] == counts
    assert told["results"][0]["rates"] == [101.0, 100.0 + len(counts) + 1]
    assert os.environ["FASTIDMM_HOME"] == str(home) and not Path(met[0][1]).exists()


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_cores_double(most: int, counts: list[int]) -> None:
    assert bench._doubling(most) == counts


def test_a_table_shows_median_spread_and_gain() -> None:
    results = [{"cores": 1, "rates": [300, 100, 200]}, {"cores": 16, "rates": [2600, 1800, 1900]}]
    assert bench.text({"from": "x", "results": results}).splitlines()[1:] == [
        "cores  images/s  (least to most)  gain",
        "    1       200  (100 to 300)     1.00",
        "   16     1,900  (1,800 to 2,600)  9.50",
    ]


@pytest.mark.parametrize("cores", [0, 10_000])
def test_cores_there_are_not(cores: int) -> None:
    with pytest.raises(UsageError, match="this process may use 1 to"):
        bench.measure(None, num_images=2, repeats=1, cores=[cores])


def test_the_command(
    home: Path, photos: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(Path("photos"), per_class=3)
    words = ["bench", "prepare", "--from", "photos", "--repeats", "2", "--cores", "1", "--json"]
    monkeypatch.setattr("sys.argv", ["fastidmm", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert not end.value.code and told["from"] == "photos"
    assert len(told["results"][0]["rates"]) == 2 and min(told["results"][0]["rates"]) > 0
    assert store.prepared() == []
