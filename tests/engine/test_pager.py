"""The pager, event by event. A log line is the pager's repr: each bucket's number, then `-` away,
`~` loading, `+` on the device, and a `p` a pin, a `w` a window, a `k` if a raw pointer is out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.engine.engine import Engine
from offload.engine.paging.page_in import PageIn
from offload.engine.paging.pager import Pager
from offload.errors import BudgetError, EngineStateError, OffloadError
from offload.partition.residency import Residency
from tests.faults.lab import make_engine

KEY = (True, True)


@pytest.fixture(params=["host", "nvme"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Five pages of 4 KiB, room for two, and one gradient."""
    torch.manual_seed(0)
    module = nn.Module()
    module.weights = nn.ParameterList(nn.Parameter(torch.randn(32, 32)) for _ in range(5))
    made = make_engine(module, request.param, tmp_path, overlap={"prefetch": False})
    yield made
    made.close()


@pytest.fixture
def pager(engine: Engine) -> Pager:
    return engine._parts.pager


def test_touch_faults_and_the_oldest_goes(pager: Pager) -> None:
    assert repr(pager) == "0- 1- 2- 3- 4-"
    log = []
    for index in (0, 1, 0, 2, 3):
        page = pager.pages[index]
        pager.pin([page], "a test")
        log.append(repr(pager))
        pager.unpin([page])
    assert log == [
        "0+p 1- 2- 3- 4-",
        "0+ 1+p 2- 3- 4-",
        "0+p 1+ 2- 3- 4-",
        "0+ 1- 2+p 3- 4-",
        "0- 1- 2+ 3+p 4-",
    ]
    assert pager.faults == 4


def test_pinned_pages_stay(pager: Pager) -> None:
    pages = pager.pages
    pager.pin(pages[:1], "a test")
    for index in (1, 2, 3):
        pager.pin([pages[index]], "a test")
        pager.unpin([pages[index]])
    assert repr(pager) == "0+p 1- 2- 3+ 4-"
    pager.unpin(pages[:1])
    assert repr(pager) == "0+ 1- 2- 3+ 4-"


def test_more_than_the_budget_is_an_error_that_pins_nothing(pager: Pager) -> None:
    with pytest.raises(BudgetError, match=r"three, which uses weights\.0, weights\.1, weights\.2"):
        pager.pin(pager.pages[:3], "three")
    assert not any(page.pins for page in pager.pages)
    pager.pin(pager.pages[3:], "two")
    assert repr(pager) == "0- 1- 2- 3+p 4+p"
    pager.unpin(pager.pages[3:])


def test_windows_give_way_to_pins_of_their_own_thread_only(pager: Pager) -> None:
    pages = pager.pages
    pager.open_window(pages[:2], "outer")
    assert repr(pager) == "0+w 1+w 2- 3- 4-"
    pager.pin(pages[2:3], "inner")
    assert repr(pager) == "0-w 1+w 2+p 3- 4-"
    pager.unpin(pages[2:3])
    pager._window_threads[-1] = 1  # as if another thread had one open
    with pytest.raises(BudgetError):
        pager.pin(pages[3:5], "another thread's pages are in windows")
    del pager._window_threads[-1]
    pager.close_window(pages[:2])
    assert not any(page.windows for page in pages)


def test_kept_pages_stay_until_the_step_ends(pager: Pager) -> None:
    pages = pager.pages
    pager.pin(pages[:1], "numpy")
    pager.keep_until_step(pages[0])
    pager.unpin(pages[:1])
    for index in (1, 2, 3):
        pager.pin([pages[index]], "a test")
        pager.unpin([pages[index]])
    assert repr(pager) == "0+k 1- 2- 3+ 4-"
    pager.end_raw_access()
    for index in (1, 2):
        pager.pin([pages[index]], "a test")
        pager.unpin([pages[index]])
    assert repr(pager) == "0- 1+ 2+ 3- 4-"


def test_known_trace_chooses_the_victim(pager: Pager) -> None:
    def run(order: tuple[int, ...]) -> list[str]:
        pager.begin(KEY)
        log = []
        for index in order:
            page = pager.pages[index]
            pager.open_window([page], "a test")
            log.append(repr(pager))
            pager.close_window([page])
        pager.end()
        return log

    order = (0, 1, 2, 0, 1, 3, 0)
    run(order)
    second = run(order)
    # At the first 2, 0 is wanted sooner than 1: 1 goes, although 0 was used longer ago.
    assert second[2] == "0+ 1- 2+w 3- 4-"
    # At 3, 0 is wanted next again.
    assert second[5] == "0+ 1- 2- 3+w 4-"
    # A bucket that the trace does not know: nothing breaks, and the oldest goes.
    assert run((4,)) == ["0+ 1- 2- 3- 4+w"]


def test_edits_go_home_before_the_page_leaves(engine: Engine, pager: Pager) -> None:
    weights = list(engine.module.weights)
    with torch.no_grad():
        weights[0].fill_(2.0)
        assert pager.pages[0].parameters[0].home_is_stale
        for weight in weights[1:]:
            weight.sum()
    assert pager.pages[0].residency is Residency.HOME
    assert not pager.pages[0].parameters[0].home_is_stale
    assert torch.equal(engine.read_state("weights.0", "weight"), torch.full((32, 32), 2.0))


def test_absent_parameters_read_as_nan(engine: Engine, pager: Pager) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        assert all(weight.isnan().all() for weight in engine.module.weights)
    engine.module.weights[0].sum()
    with torch._C.DisableTorchFunctionSubclass():
        assert not engine.module.weights[0].isnan().any()


def test_closed_pager_refuses(engine: Engine, pager: Pager) -> None:
    engine.close()
    with pytest.raises(EngineStateError):
        pager.pin(pager.pages[:1], "late")


def test_plan_prefetches_without_faults(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    engine = make_engine(module, "host", tmp_path, pages=3)
    x = torch.randn(4, 32)
    faults = []
    for _ in range(5):
        before = engine._parts.pager.faults
        engine.backward(engine(x).square().mean())
        engine.step()
        faults.append(engine._parts.pager.faults - before)
    assert faults[0] > 0
    assert faults[3:] == [0, 0]
    device = engine._parts.device
    assert device.peak_bytes <= device.budget_bytes
    engine.close()


@pytest.mark.usefixtures("by_itself")
def test_close_frees_every_page_although_a_prefetch_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(5)))
    engine = make_engine(module, "nvme", tmp_path)
    for _ in range(3):
        engine.backward(engine(torch.randn(4, 32)).square().mean())
        engine.step()
    pager = engine._parts.pager
    assert repr(pager) == "0~ 1~ 2- 3- 4-"

    def fail(page_in: PageIn) -> None:
        page_in._abandon()
        raise OffloadError("the disk is gone")

    monkeypatch.setattr(PageIn, "finish", fail)
    engine.close()
    assert repr(pager) == "0- 1- 2- 3- 4-"


def _touch(engine: Engine, indices: Sequence[int]) -> None:
    for index in indices:
        engine.module.weights[index].sum()


def test_a_raw_pointer_outlives_a_gathered_block(engine: Engine) -> None:
    raw = engine.module.weights[0].detach().numpy()
    with engine.gathered("weights.0"):
        pass
    _touch(engine, (1, 2, 3, 4))
    raw[:] = 5.0
    _touch(engine, (1, 2, 3, 4))
    assert torch.equal(engine.read_state("weights.0", "weight"), torch.full((32, 32), 5.0))


def test_a_gathered_block_inside_another_ends_alone(engine: Engine) -> None:
    with engine.gathered("weights.0", writable=True):
        raw = engine.module.weights[0].detach().numpy()
        with engine.gathered("weights.0"):
            pass
        raw[:] = 5.0
    _touch(engine, (1, 2, 3, 4))
    assert torch.equal(engine.read_state("weights.0", "weight"), torch.full((32, 32), 5.0))


def test_an_edit_before_a_gathered_block_is_not_one_inside(engine: Engine) -> None:
    with torch.no_grad():
        engine.module.weights[0].fill_(5.0)
    with engine.gathered("weights.0"):
        pass
    assert torch.equal(engine.read_state("weights.0", "weight"), torch.full((32, 32), 5.0))


def test_a_raw_pointer_sees_what_is_set(engine: Engine) -> None:
    raw = engine.module.weights[0].detach().numpy()
    engine.set_state("weights.0", {"weight": torch.ones(32, 32)})
    assert (raw == 1.0).all()
    others = [engine.read_state(f"weights.{index}", "weight") for index in (1, 2, 3, 4)]
    _touch(engine, (1, 2, 3, 4))
    raw[:] = 5.0
    _touch(engine, (1, 2, 3, 4))
    assert torch.equal(engine.read_state("weights.0", "weight"), torch.full((32, 32), 5.0))
    for index, other in zip((1, 2, 3, 4), others, strict=True):
        assert torch.equal(engine.read_state(f"weights.{index}", "weight"), other)


def test_a_skipped_step_ends_raw_access(engine: Engine, pager: Pager) -> None:
    assert engine.module.weights[0].data_ptr()
    engine.backward(engine.module.weights[1].sum() * float("nan"))
    taken = engine.step()
    assert taken is False
    assert not pager.pages[0].kept
