"""What an earlier release stopped goes on today, to the losses it would have had."""

import shutil
from pathlib import Path

import make
import pytest

from fastidmm import stages
from fastidmm.record import Record

RELEASES = sorted(path.parent for path in make.HERE.glob(f"*/{make.LOSSES}"))


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_release_is_gone_on_with(release: Path, tmp_path: Path) -> None:
    """To the bit with the torch and the CPU they are of; others round: to 1e-4.

    Where numbers are made otherwise on purpose, and round otherwise, they are told anew.
    """
    head, *told = (release / make.LOSSES).read_text().splitlines()
    with make.at(tmp_path):
        run = Path(shutil.copytree(release, "runs/run"))
        assert [Record(f).steps for f in (run, run / make.STAGE)] == [make.STOPPED] * 2
        stages.resume(run)
        found = make.following(run)
        assert "test_top1" in Record(run / make.STAGE).metrics()[-1]
    assert len(told) == 2 * make.FOLLOWING
    if head == f"# {make.machine()}":
        assert found == told
    for one, other in zip(map(str.split, found), map(str.split, told), strict=True):
        assert one[:2] == other[:2]
        assert float.fromhex(one[2]) == pytest.approx(float.fromhex(other[2]), rel=1e-4)


def test_the_first_is_there() -> None:
    assert [path.name for path in RELEASES][:1] == ["0.1.0"]
