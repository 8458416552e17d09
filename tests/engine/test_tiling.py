"""Tiled parameters: linear and embedding layers larger than the device budget, in any placement.

The vocabulary model's table and head have 3 chunks each, which neither their rows nor their tiles
divide: tile borders lie inside chunks and inside the blocks over which squares are summed.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import offload
from offload.config import OffloadConfig
from offload.engine import build, gradients
from offload.errors import BudgetError, ConfigError, EngineStateError, GuardError, StorageError
from offload.native import IoEngine
from tests.oracle import (
    Run,
    assert_close,
    assert_identical,
    assert_same_state,
    continue_engine,
    language_loss,
    make_engine,
    relative_difference,
    settings,
    train_engine,
    train_plain,
    transformers_model,
)
from tests.threads import run_in_threads

VOCABULARY, WIDTH = 2_300, 66
HEAD_BYTES = VOCABULARY * WIDTH * 4
STEPS = 3


class Vocabulary(nn.Module):
    """Tokens to logits, through a table and a head that are large beside what is between them."""

    def __init__(self, *, tied: bool = False, recompute: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=-1)
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.reentrant = recompute
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self._logits(self.embed(tokens))
        hidden = self.embed(tokens)
        logits: torch.Tensor = checkpoint(self._logits, hidden, use_reentrant=self.reentrant)
        return logits

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(hidden))


def make_model(**kind: Any) -> Vocabulary:
    torch.manual_seed(0)
    return Vocabulary(**kind)


def loss_of(model: Any, index: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, VOCABULARY, (3, 7), generator=drawn)
    tokens[0, 0] = VOCABULARY - 1  # the padding
    logits = model(tokens).float()
    return functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1).flatten())


def tiled(tiles: int | str = 3, *modules: str) -> dict[str, Any]:
    return {"modules": modules or ("embed", "head"), "tiles": tiles}


def train(path: Path, tier: str, tiles: int, kind: Mapping[str, Any], **sections: Any) -> Run:
    config = settings(tier, path, tiling=tiled(tiles), **sections)
    return train_engine(make_model(**kind), config, loss_of, steps=STEPS)


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [2, 3, 16])
@pytest.mark.parametrize("kind", [{}, {"tied": True}], ids=["untied", "tied"])
def test_tiles_give_the_numbers_of_the_whole(
    kind: dict[str, Any], tiles: int, tmp_path: Path
) -> None:
    plain = train_plain(make_model(**kind), loss_of, steps=STEPS, max_norm=0.5, accumulation=2)
    training = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    run = train(tmp_path, "host", tiles, kind, training=training)
    assert_close(run, plain, tolerance=1e-6)
    whole = train_engine(
        make_model(**kind), settings("host", training=training), loss_of, steps=STEPS
    )
    assert run.norms == pytest.approx(whole.norms, rel=1e-7)
    assert [each.num_tiles for each in run.plan.tiled] == [tiles] * (1 if kind else 2)
    assert f"in {tiles} tiles of" in str(run.plan)


@pytest.mark.parametrize("kind", [{}, {"tied": True}], ids=["untied", "tied"])
def test_placement_changes_no_bit(kind: dict[str, Any], tmp_path: Path) -> None:
    training = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    host = train(tmp_path, "host", 5, kind, training=training)
    for tier in ("nvme", "device"):
        assert_identical(train(tmp_path, tier, 5, kind, training=training), host)
    hurried = train(tmp_path, "nvme", 5, kind, training=training, overlap={"prefetch": False})
    assert_identical(hurried, host)


@pytest.mark.parametrize("recompute", [False, True], ids=["not_reentrant", "reentrant"])
def test_activation_checkpointing_around_tiles(recompute: bool, tmp_path: Path) -> None:
    once = train(tmp_path, "nvme", 3, {})
    again = train(tmp_path, "nvme", 3, {"recompute": recompute})
    assert_identical(again, once)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precisions(compute: str, tmp_path: Path) -> None:
    runs = []
    for tiling in ({}, tiled(3)):
        config = settings("nvme", tmp_path, compute=compute, tiling=tiling)
        runs.append(train_engine(make_model(), config, loss_of, steps=STEPS))
    assert_close(runs[1], runs[0], tolerance=1e-2)
    host = settings("host", compute=compute, tiling=tiled(3))
    assert_identical(train_engine(make_model(), host, loss_of, steps=STEPS), runs[1])


def test_narrow_gradients_are_summed_in_fp32(tmp_path: Path) -> None:
    hidden = torch.randn(8, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    errors = []
    for tiling in ({}, tiled(16)):
        config = settings("host", compute="bf16", tiling=tiling)
        with make_engine(make_model(), config) as engine:
            weight = engine.read_state("head.weight", "weight").double()
            out = engine.module.head(hidden)
            sent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
            (found,) = torch.autograd.grad(out, [hidden], [sent])
            errors.append(relative_difference(found, sent.double() @ weight))
    assert errors[1] <= 1.5 * errors[0]


def test_a_transformers_model_with_a_tied_head_in_bf16(tmp_path: Path) -> None:
    model = transformers_model("gpt2")
    tiling = tiled(4, "lm_head")
    engine = make_engine(
        copy.deepcopy(model), settings("nvme", tmp_path, compute="bf16", tiling=tiling)
    )
    with engine:
        assert [each.name for each in engine.plan.tiled] == ["transformer.wte.weight"]
        untiled = make_engine(copy.deepcopy(model), settings("host", compute="bf16"))
        with untiled:
            for index in range(2):
                losses = [language_loss(each, index) for each in (engine, untiled)]
                assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
                for each, loss in zip((engine, untiled), losses, strict=True):
                    each.backward(loss)
                    each.step()
        engine.eval()
        prompt = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            generated = engine.module.generate(prompt, max_new_tokens=3, do_sample=False)
        assert generated.shape == (1, 6)


def test_autocast_casts_tile_by_tile(tmp_path: Path) -> None:
    def autocast_loss(model: Any, index: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, index)

    runs = [
        train_engine(make_model(), settings("host", tiling=tiling), autocast_loss, steps=1)
        for tiling in ({}, tiled(3))
    ]
    assert_close(runs[1], runs[0], tolerance=1e-2)
    assert runs[1].state["head.weight"]["weight"].dtype == torch.float32


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [2, 4, 16])
def test_peak_falls_by_the_tile_factor(tiles: int, tmp_path: Path) -> None:
    """Two tiles and a tile of the gradient, beside the two largest other pages."""
    with make_engine(make_model(), settings("nvme", tmp_path, tiling=tiled(tiles))) as engine:
        engine.backward(loss_of(engine, 0))
        engine.step()
        tile = -(-VOCABULARY // tiles) * WIDTH * 4
        slot = -(-tile // 4096) * 4096
        others = sum(page.nbytes for page in engine._parts.pages if not page.is_tiled)
        gradient = max(tile, WIDTH * WIDTH * 4)
        assert engine.report().tiers["device"].peak_bytes <= 2 * slot + gradient + others
        assert engine.report().tiers["device"].peak_bytes <= engine.plan.peak_bytes["device"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_what_exceeds_the_device_budget_is_tiled_by_size(
    tier: str, tied: bool, tmp_path: Path
) -> None:
    budget = HEAD_BYTES // 2
    config = settings(tier, tmp_path, device=budget, tiling={})
    run = train_engine(make_model(tied=tied), config, loss_of, steps=STEPS)
    assert_close(run, train_plain(make_model(tied=tied), loss_of, steps=STEPS), tolerance=1e-6)
    assert run.report.tiers["device"].peak_bytes <= budget
    assert {each.name for each in run.plan.tiled} <= {"embed.weight", "head.weight"}
    assert run.plan.tiled


def test_nothing_is_tiled_that_fits(tmp_path: Path) -> None:
    for placement in ("host", "auto"):
        with make_engine(make_model(), settings(placement, tmp_path)) as engine:
            assert not engine.plan.tiled


def test_auto_tiles_keep_room_for_pages() -> None:
    model = make_model()
    planned = offload.plan(model, settings("host", device=HEAD_BYTES))
    assert planned.fits
    assert planned.tiled
    slots = 2 * max(each.tile_bytes for each in planned.tiled)
    assert HEAD_BYTES // 4 <= slots <= HEAD_BYTES // 2
    roomy = settings("host", device=64 << 20, tiling=tiled("auto"))
    assert [each.num_tiles for each in offload.plan(model, roomy).tiled] == [2, 2]


def test_a_shortfall_counts_the_slots() -> None:
    model = make_model()
    short = offload.plan(model, settings("host", device=HEAD_BYTES // 2, tiling=tiled(2)))
    assert not short.fits
    (shortfall,) = short.shortfalls
    assert shortfall.have_bytes == HEAD_BYTES // 2
    assert f"at least {shortfall.need_bytes} bytes" in shortfall.remedy
    enough = settings("host", device=shortfall.need_bytes, tiling=tiled(2))
    assert offload.plan(model, enough).fits


def test_lora_on_a_frozen_tiled_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        base = transformers_model("llama")
        model: nn.Module = get_peft_model(
            base, LoraConfig(target_modules=["q_proj", "gate_proj"], r=4, init_lora_weights=False)
        )
        return model

    plain = train_plain(adapted(), language_loss, steps=2)
    tiling = tiled(3, "*.q_proj.base_layer", "*.gate_proj.base_layer", "*.lm_head")
    config = settings("nvme", tmp_path, tiling=tiling)
    run = train_engine(adapted(), config, language_loss, steps=2)
    assert len(run.plan.tiled) == 5
    assert_close(run, plain, tolerance=1e-6)


# -- what autograd asks ----------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    made = make_engine(make_model(), settings("nvme", tmp_path, tiling=tiled(3)))
    yield made
    made.close()


def gradient_of(engine: Any, name: str) -> torch.Tensor | None:
    return dict(engine.named_state())[name].get("gradient")


def test_a_gradient_that_is_not_asked_for_does_not_arrive(engine: Any) -> None:
    hidden = torch.randn(2, WIDTH, requires_grad=True)
    total = engine.module.head(hidden).square().sum()
    (found,) = torch.autograd.grad(total, [hidden], retain_graph=True)
    weight = engine.read_state("head.weight", "weight")
    bias = engine.read_state("head.bias", "weight")
    expected = 2 * functional.linear(hidden.detach(), weight, bias) @ weight
    assert relative_difference(found, expected) <= 1e-6
    assert gradient_of(engine, "head.weight") is None
    (whole,) = torch.autograd.grad(total, [engine.module.head.weight], retain_graph=True)
    expected = 2 * functional.linear(hidden.detach(), weight, bias).t() @ hidden.detach()
    assert relative_difference(whole, expected) <= 1e-6
    assert gradient_of(engine, "head.weight") is None
    total.backward(inputs=[engine.module.head.weight])
    arrived = gradient_of(engine, "head.weight")
    assert arrived is not None
    assert torch.equal(arrived, whole)
    assert hidden.grad is None
    assert gradient_of(engine, "head.bias") is None


def test_the_whole_gradient_of_a_table(engine: Any) -> None:
    tokens = torch.tensor([[3, 3, VOCABULARY - 1, 1_000]])
    (whole,) = torch.autograd.grad(
        engine.module.embed(tokens).square().sum(), [engine.module.embed.weight]
    )
    table = engine.read_state("embed.weight", "weight").requires_grad_()
    looked_up = functional.embedding(tokens, table, padding_idx=-1).square().sum()
    assert torch.equal(whole, torch.autograd.grad(looked_up, [table])[0])


def test_twice_is_an_error(engine: Any) -> None:
    hidden = torch.randn(2, WIDTH, requires_grad=True)
    total = engine.module.head(hidden).square().sum()
    (first,) = torch.autograd.grad(total, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        first.sum().backward()


def test_a_graph_kept_across_a_step_is_void(engine: Any) -> None:
    hidden = torch.randn(2, WIDTH, requires_grad=True)
    total = engine.module.head(hidden).sum()
    engine.backward(total, retain_graph=True)
    engine.step()
    with pytest.raises(RuntimeError, match=r"head\.weight is at version"):
        engine.backward(total)


def test_threads_in_backward_at_once(engine: Any) -> None:
    with make_engine(make_model(), settings("host")) as whole:
        found = []
        for each in (engine, whole):
            losses = [loss_of(each, index) for index in range(4)]
            run_in_threads(*(loss.backward for loss in losses))
            found.append(dict(each.named_state()))
    for name in ("embed.weight", "head.weight", "mix.0.weight"):
        difference = relative_difference(found[0][name]["gradient"], found[1][name]["gradient"])
        assert difference <= 1e-6, name


def test_transforms_and_inference_mode(engine: Any) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = engine(tokens)
    with torch.inference_mode():
        assert torch.equal(engine(tokens), expected)
    table = engine.module.embed
    with pytest.raises(GuardError, match=r"torch\.func transform"):
        torch.func.vmap(table)(tokens)


def test_frozen_after_the_start(engine: Any) -> None:
    engine.module.head.weight.requires_grad_(False)
    engine.backward(loss_of(engine, 0))
    assert gradient_of(engine, "head.weight") is None
    assert gradient_of(engine, "embed.weight") is not None


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_unfrozen_after_the_start(tier: str, tmp_path: Path) -> None:
    runs = []
    for tiling in ({}, tiled(3)):
        model = make_model()
        model.head.weight.requires_grad_(False)
        with make_engine(model, settings(tier, tmp_path, tiling=tiling)) as engine:
            continue_engine(engine, loss_of, steps=1)
            model.head.weight.requires_grad_(True)
            runs.append(continue_engine(engine, loss_of, steps=2))
            assert engine.report().tiers["device"].peak_bytes <= engine.plan.peak_bytes["device"]
            assert [each.num_tiles for each in engine.plan.tiled] == ([3, 3] if tiling else [])
    assert_close(runs[1], runs[0], tolerance=1e-6)
    assert not torch.equal(runs[1].state["head.weight"]["master"], make_model().head.weight)


def test_any_torch_optimizer(tmp_path: Path) -> None:
    runs = [
        train_engine(
            make_model(),
            settings("nvme", tmp_path, tiling=tiling),
            loss_of,
            steps=2,
            optimizer=lambda parameters: torch.optim.Adamax(parameters, lr=1e-3, eps=1e-5),
        )
        for tiling in ({}, tiled(3))
    ]
    assert runs[1].plan.tiled
    assert_close(runs[1], runs[0], tolerance=1e-6)


def test_a_hook_that_could_change_a_tiled_gradient_is_refused(engine: Any) -> None:
    handle = engine.module.head.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(GuardError, match=r"hook on the gradient of parameter head\.weight"):
        loss_of(engine, 0)
    with torch.no_grad():
        loss_of(engine, 0)
    handle.remove()
    engine.backward(loss_of(engine, 0))


def test_a_hook_on_an_accumulated_gradient_is_refused_too(engine: Any) -> None:
    handle = engine.module.head.weight.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(GuardError, match=r"hook on the gradient of parameter head\.weight"):
        loss_of(engine, 0)
    handle.remove()
    engine.backward(loss_of(engine, 0))


def test_a_gradient_that_went_home_by_tiles_shows_in_grad(engine: Any) -> None:
    engine.backward(loss_of(engine, 0))
    assert type(engine.module.head.weight.grad).__name__ == "DepartedGradient"
    with pytest.raises(GuardError, match=r"of parameter head\.weight"):
        engine.module.head.weight.grad.norm()
    engine.module.zero_grad()
    assert gradient_of(engine, "head.weight") is None


def test_a_gradient_that_is_lost_between_tiles_is_no_gradient(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such sum")

    loss = loss_of(engine, 0)
    with monkeypatch.context() as broken:
        broken.setattr(gradients, "accumulate_gradient", fail)
        with pytest.raises(RuntimeError, match="no such sum"):
            loss.backward()
    with pytest.raises(EngineStateError, match="was lost on its way home"):
        engine.optimizer.step()
    engine.optimizer.zero_grad()
    engine.backward(loss_of(engine, 0))
    taken = engine.step()
    assert taken


def test_a_tile_of_a_weight_that_no_group_trains(tmp_path: Path) -> None:
    def of_the_mix(parameters: Any) -> torch.optim.Optimizer:
        small = [p for p in parameters if p.numel() < VOCABULARY]
        return torch.optim.SGD(small, lr=0.1)

    config = settings("host", tiling=tiled(3))
    with make_engine(make_model(), config, optimizer=of_the_mix) as engine:
        loss = loss_of(engine, 0)
        with pytest.raises(GuardError, match=r"(embed|head)\.weight, which is tiled and not"):
            engine.backward(loss)


# -- other uses ------------------------------------------------------------------------------------


def test_other_ops_take_the_whole_weight_if_it_fits(engine: Any) -> None:
    weight = engine.module.head.weight
    with torch.no_grad():
        assert torch.equal(weight.sum(0), engine.read_state("head.weight", "weight").sum(0))
        weight.mul_(2.0)
    hidden = torch.ones(1, WIDTH)
    with torch.no_grad():
        found = engine.module.head(hidden)
    edited = engine.read_state("head.weight", "weight")
    bias = engine.read_state("head.bias", "weight")
    assert relative_difference(found, functional.linear(hidden, edited, bias)) <= 1e-6
    with engine.gathered("head.weight"):
        assert torch.equal(engine.module.head.weight, edited)


def test_other_ops_on_what_does_not_fit_name_the_way(tmp_path: Path) -> None:
    config = settings("host", tmp_path, device=HEAD_BYTES // 2)
    with make_engine(make_model(), config) as engine:
        with pytest.raises(BudgetError, match=r"sum.*head\.weight.*take a tiled parameter"):
            engine.module.head.weight.sum()
        engine.backward(loss_of(engine, 0))
        taken = engine.step()
        assert taken


def test_options_that_need_the_whole_table(engine: Any) -> None:
    tokens, table = torch.tensor([1, 2]), engine.module.embed.weight
    for option in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(GuardError, match=next(iter(option))):
            functional.embedding(tokens, table, **option)
    with pytest.raises(IndexError):
        functional.embedding(torch.tensor([VOCABULARY]), table)
    assert engine.module.embed(torch.zeros(0, dtype=torch.long)).shape == (0, WIDTH)


def test_shapes_of_any_number_of_dimensions(engine: Any) -> None:
    weight = engine.read_state("head.weight", "weight")
    with torch.no_grad():
        for shape in ((WIDTH,), (2, WIDTH), (2, 3, WIDTH), (0, WIDTH)):
            hidden = torch.randn(shape)
            found = functional.linear(input=hidden, weight=engine.module.head.weight)
            expected = functional.linear(hidden, weight)
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-6)


def test_state_and_checkpoints_are_those_of_one_parameter(tmp_path: Path) -> None:
    whole = settings("host", tmp_path)
    parts = settings("nvme", tmp_path, tiling=tiled(3))
    with make_engine(make_model(), parts) as engine:
        continue_engine(engine, loss_of, steps=1)
        engine.save_checkpoint(tmp_path / "saved")
        state = dict(engine.named_state())
    with make_engine(make_model(), whole) as engine:
        engine.load_checkpoint(tmp_path / "saved")
        assert_same_state(dict(engine.named_state()), state)


@pytest.mark.parametrize(
    ("pattern", "make"),
    [
        ("no_such", make_model),
        ("mix.2", make_model),
        ("*.linear1", lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8))),
        ("0", lambda: nn.Sequential(nn.Embedding(8, 8, max_norm=1.0))),
    ],
)
def test_names_of_what_cannot_be_tiled(pattern: str, make: Any) -> None:
    with pytest.raises(ConfigError, match=r"names no module that can be tiled"):
        offload.plan(make(), settings("host", tiling=tiled(2, pattern)))


def test_gathered_modules_are_not_tiled() -> None:
    config = settings("host", tiling=tiled(2, "mix.0"), guard={"gather": ["mix"]})
    with pytest.raises(ConfigError, match=r"names no module"):
        offload.plan(make_model(), config)


def test_a_closed_engine_has_no_tiles(tmp_path: Path) -> None:
    engine = make_engine(make_model(), settings("host", tmp_path, tiling=tiled(3)))
    engine.close()
    with pytest.raises(EngineStateError):
        engine.module.embed(torch.tensor([1]))


# -- failures --------------------------------------------------------------------------------------


class FailingIo(IoEngine):
    """Fails one read after so many more."""

    left = -1

    def start_read(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise StorageError(
                operation="read", path="disk", offset=0, nbytes=0, errno=errno.EIO, what="a test"
            )
        return super().start_read(*arguments, **options)


@pytest.mark.filterwarnings("ignore:an I/O error, after which:RuntimeWarning")
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_read_that_fails_inside_a_tile_loop_leaves_nothing(
    prefetch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_io(config: OffloadConfig) -> IoEngine:
        return FailingIo(backend="threads", threads=2)

    config = settings("nvme", tmp_path, tiling=tiled(3), overlap={"prefetch": prefetch})
    calm = train_engine(make_model(), config, loss_of, steps=1)
    monkeypatch.setattr(build, "open_io", open_io)
    with make_engine(make_model(), config) as engine:
        io, parts = engine._parts.io, engine._parts
        seen = {"forward": 0, "backward": 0}
        used = parts.host.used_bytes
        for nth in range(1, 30):
            io.left, where = nth, "forward"
            try:
                loss = loss_of(engine, 0)
                where = "backward"
                engine.backward(loss)
            except StorageError:
                seen[where] += 1
            engine.optimizer.zero_grad()
            assert [page.pins for page in parts.pages] == [0] * len(parts.pages)
            if io.left > 0:
                break
        assert min(seen.values()) >= 2
        io.left = -1
        parts.pager.flush()
        parts.pager.release_nodes()
        run = continue_engine(engine, loss_of, steps=1)
        assert_same_state(run.state, calm.state)
        parts.pager.flush()
        assert parts.host.used_bytes <= used
