"""Who is who in a run of several processes, and what is refused before anything is started."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.errors import DyditError
from dydit_cli.processes.environment import has_our_launcher, is_launched, rank_in
from dydit_cli.processes.world import ALONE, World, join


def test_one_process_has_nobody_to_ask() -> None:
    assert join(1, "cpu") is ALONE
    assert ALONE.is_first
    value = torch.tensor([1.0, 2.0])
    assert ALONE.mean(value) is value
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.gather("word") == ["word"]
    assert ALONE.to_first("word") == ["word"]
    ALONE.wait()


def test_several_processes_need_a_launcher() -> None:
    with pytest.raises(DyditError, match="asks for 3 processes") as error:
        join(3, "cpu")
    assert "--processes 3" in error.value.fix


@pytest.mark.parametrize(("started", "asked"), [(2, 4), (4, 2), (2, 1)])
def test_another_world_size_than_asked_for_is_an_error_that_names_both(
    monkeypatch: pytest.MonkeyPatch, started: int, asked: int
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", str(started))
    with pytest.raises(DyditError) as error:
        join(asked, "cpu")
    assert f"asks for {asked} process" in error.value.what
    assert f"{started} were started" in error.value.what
    assert f"processes={started}" in error.value.fix


def test_shares_are_whole_runs_that_cover_everything() -> None:
    for count in (0, 1, 5, 8):
        shares = [World(rank, 3).share(list(range(count))) for rank in range(3)]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    owners = [[number for number in range(7) if World(rank, 3).has(number)] for rank in range(3)]
    assert owners == [[0, 3, 6], [1, 4], [2, 5]]


def test_the_environment_tells_who_started_a_process() -> None:
    torchrun = {"RANK": "2", "WORLD_SIZE": "4"}
    assert not is_launched({})
    assert rank_in({}) == 0
    assert is_launched(torchrun)
    assert rank_in(torchrun) == 2
    assert not has_our_launcher(torchrun)
    assert has_our_launcher(torchrun | {"DYDIT_LAUNCHER": "1"})
    assert not has_our_launcher({"DYDIT_LAUNCHER": "1"})
