"""Layer-major accumulation: the same bits as the usual order, weights moved twice a step."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload.errors import EngineStateError, OffloadError
from tests.engine.accelerator import use_accelerator
from tests.oracle import (
    Run,
    assert_close,
    assert_identical,
    make_engine,
    settings,
    small_llama,
    train_plain,
    transformers_model,
    two_buckets_bytes,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning"),
]

ORDERS = ("micro_batch_major", "layer_major")
LossOf = Callable[[Any, Any], torch.Tensor]


def tokens(index: int) -> dict[str, torch.Tensor]:
    """Micro-batch number `index` of a language model."""
    drawn = torch.randint(5, 256, (2, 12), generator=torch.Generator().manual_seed(1000 + index))
    return {"input_ids": drawn, "labels": drawn}


def vectors(index: int) -> torch.Tensor:
    """Micro-batch number `index` of a module from vectors to vectors."""
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(index))


def squares(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """A loss that makes every output matter."""
    output: torch.Tensor = model(batch)
    return (output.float() * torch.linspace(0.5, 2, output.numel()).view_as(output)).square().mean()


def config_of(
    order: str, *, count: int = 3, tier: str = "host", path: Path | None = None, **sections: Any
) -> dict[str, Any]:
    """All state in one tier, and an accumulation of `count` micro-batches."""
    training = {
        "gradient_accumulation_steps": count,
        "accumulation": order,
        "max_grad_norm": 0.5,
        **sections.pop("training", {}),
    }
    return settings(tier, path, training=training, **sections)


def accumulate_steps(
    engine: Any,
    batch_of: Callable[[int], Any],
    loss_of: LossOf | None = None,
    *,
    steps: int = 3,
    start: int = 0,
) -> Run:
    """Train by `accumulate`."""
    run = Run()
    count = engine.config.training.gradient_accumulation_steps
    loss = None if loss_of is None else lambda batch: loss_of(engine, batch)
    for step in range(start, start + steps):
        batches = [batch_of(step * count + micro) for micro in range(count)]
        run.losses += [one.item() for one in engine.accumulate(batches, loss)]
        if engine.step():
            run.norms.append(engine.grad_norm)
    run.state, run.steps = dict(engine.named_state()), engine.parameter_steps()
    for name, buffer in engine.module.named_buffers():
        run.state[f"buffer {name}"] = {"value": buffer.clone()}
    run.report = engine.report()
    assert not any(page.pins or page.windows for page in engine._parts.pager.pages)
    assert not engine._parts.pager.is_in_window
    assert not any(thread.name == "micro-batch" for thread in threading.enumerate())
    return run


def run_both(
    build: Callable[[], nn.Module],
    batch_of: Callable[[int], Any],
    loss_of: LossOf | None = None,
    *,
    steps: int = 3,
    **settings_of: Any,
) -> tuple[list[Run], Any]:
    """The runs of both orders, and what the layer-major engine has learnt."""
    runs = []
    knowledge: Any = None
    for order in ORDERS:
        torch.manual_seed(3)
        with make_engine(build(), config_of(order, **settings_of)) as engine:
            runs.append(accumulate_steps(engine, batch_of, loss_of, steps=steps))
            runs[-1].plan = torch.random.get_rng_state()
            knowledge = engine._knowledge
    return runs, knowledge


def assert_layer_major(runs: Sequence[Run], knowledge: Any, *, cuts: int) -> None:
    """Both orders agree, and the second was one, with so many cuts."""
    assert_identical(runs[1], runs[0])
    assert torch.equal(runs[1].plan, runs[0].plan), "the generator goes on from the same state"
    assert knowledge.refusal is None
    assert not knowledge.is_due
    assert len(knowledge.narrow) == cuts


# -- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cuts"), [("llama", 3), ("gpt2", 3), ("bert", 3), ("t5", 6), ("mixtral", 3)]
)
def test_language_models_with_dropout_ties_experts_and_an_encoder(name: str, cuts: int) -> None:
    runs, knowledge = run_both(lambda: transformers_model(name), tokens)
    assert_layer_major(runs, knowledge, cuts=cuts)
    assert not knowledge.wide


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant"])
def test_checkpointed_layers(name: str, kind: str) -> None:
    runs, knowledge = run_both(lambda: transformers_model(name, kind), tokens)
    assert_layer_major(runs, knowledge, cuts=3)


class Blocks(nn.Module):
    """Residual blocks in a list, called by `forward` one after the other."""

    def __init__(self, depth: int = 4, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(self.block(width, dropout) for _ in range(depth))
        self.last = nn.Linear(width, width)

    def block(self, width: int, dropout: float) -> nn.Module:
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout)
        )

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.first(given)
        for layer in self.layers:
            hidden = self.run(layer, hidden)
        output: torch.Tensor = self.last(hidden)
        return output

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + layer(hidden)


def seeded(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """A factory of equal modules."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        random.seed(0)
        return build(*args, **kwargs)

    return make


def test_a_residual_connection_around_the_block_is_cut_with_it() -> None:
    runs, knowledge = run_both(seeded(Blocks), vectors, squares)
    # After the last block the connection runs beside it.
    assert_layer_major(runs, knowledge, cuts=4)


def test_a_sequential_of_batch_norms_updates_them_in_the_order_of_the_micro_batches() -> None:
    def build() -> nn.Module:
        blocks = [
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
            for _ in range(3)
        ]
        return nn.Sequential(*blocks, nn.Linear(16, 16))

    runs, knowledge = run_both(seeded(build), vectors, squares)
    assert_layer_major(runs, knowledge, cuts=4)
    assert len(knowledge.edited) == 9


def test_a_plain_perceptron() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            *(part for _ in range(3) for part in (nn.Linear(16, 16), nn.ReLU(inplace=True)))
        )

    runs, knowledge = run_both(seeded(build), vectors, squares)
    assert_layer_major(runs, knowledge, cuts=4)


class ChangesItsInput(Blocks):
    """Blocks that change in place what they are given."""

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return layer(hidden.mul_(1.5)) + 1


class Views(Blocks):
    """Blocks that are given views."""

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = layer(
            hidden.view(5, 4, 4).transpose(0, 1).transpose(0, 1).view(5, 16)
        )
        return output


class Hooked(Blocks):
    """Tensors at cuts that have hooks or retain their gradients."""

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        doubled = hidden * 2
        doubled.register_hook(lambda gradient: gradient * 0.5)
        doubled.retain_grad()
        output: torch.Tensor = layer(doubled)
        output.register_hook(lambda gradient: gradient + 0.001)
        return output


class Repeated(Blocks):
    """One block that runs three times, as in ALBERT, beside another."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for layer in (self.layers[0], self.layers[1], self.layers[0], self.layers[0]):
            given = given + layer(given)
        return given


class Tied(Blocks):
    """The first weight is the last one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = self.first.weight


class Packed(Blocks):
    """Blocks that get dictionaries of lists, and the state of the first one, too."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = nn.Linear(width, width)

        def forward(self, *, given: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
            hidden, memory = given["both"]
            return {"both": [hidden + self.inner(hidden * memory).tanh(), memory]}

    def block(self, width: int, dropout: float) -> nn.Module:
        return self.Block(width)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        packed = {"both": [self.first(given), self.first(given).relu()]}
        for layer in self.layers:
            packed = layer(given=packed)
        output: torch.Tensor = self.last(packed["both"][0])
        return output


class Checkpointed(Blocks):
    """A function around the blocks' calls that is checkpointed, so that cuts lie inside."""

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = checkpoint(layer, hidden, use_reentrant=False)
        return output


@pytest.mark.parametrize(
    ("model", "cuts"),
    [
        (ChangesItsInput, 5),
        (Views, 5),
        (Hooked, 5),
        (Repeated, 4),
        (Tied, 4),
        (Packed, 5),
        (Checkpointed, 5),
    ],
)
def test_what_passes_a_cut(model: type[nn.Module], cuts: int) -> None:
    runs, knowledge = run_both(seeded(model), vectors, squares)
    assert_layer_major(runs, knowledge, cuts=cuts)


def test_half_of_the_layers_are_frozen() -> None:
    def build() -> nn.Module:
        model = Blocks()
        model.first.requires_grad_(False)
        model.layers[:2].requires_grad_(False)
        return model

    runs, knowledge = run_both(seeded(build), vectors, squares)
    assert_layer_major(runs, knowledge, cuts=4)


def test_a_loss_that_runs_the_module_twice() -> None:
    def contrast(model: Any, batch: torch.Tensor) -> torch.Tensor:
        one, other = model(batch), model(batch.flip(0))
        with torch.no_grad():
            target = model(batch)
        return squares(lambda _: one - other, batch) + (one - target).square().sum()

    runs, knowledge = run_both(seeded(Blocks), vectors, contrast)
    assert_identical(runs[1], runs[0])
    assert knowledge.refusal is None
    # What the first pass returns crosses the cuts of the second.
    assert {cut.occurrence for cut in knowledge.narrow} == {0}
    assert sum(cut.occurrence for cut in knowledge.wide) == 5


# -- wide cuts and other ways ----------------------------------------------------------------------


class Skip(Blocks):
    """What the first block returns is used behind the third, as in a U-Net."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](self.first(given))
        skipped = hidden.sin()
        hidden = self.layers[2](self.layers[1](hidden))
        output: torch.Tensor = self.last(self.layers[3](hidden + skipped))
        return output


def test_wide_cuts_are_left_out() -> None:
    called = []

    def counted(model: Any, batch: torch.Tensor) -> torch.Tensor:
        called.append(batch)
        return squares(model, batch)

    runs, knowledge = run_both(seeded(Skip), vectors, counted)
    assert_layer_major(runs, knowledge, cuts=3)
    assert len(called) == 2 * 3 * 3, "the first step has found them: none has run again"
    assert sorted(knowledge.places[cut.place].name for cut in knowledge.wide) == [
        "layers.1",
        "layers.2",
    ]


class Beside(Blocks):
    """A branch runs beside all blocks."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        branch = self.last(given)
        hidden = self.first(given)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden + branch


class Reentrant(Blocks):
    """Blocks inside reentrant checkpoints of the user's."""

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = checkpoint(layer, hidden, use_reentrant=True)
        return output


class NormalizedTwice(Blocks):
    """Batch norms that a checkpoint updates again in backward."""

    class Block(nn.Sequential):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = checkpoint(super().forward, given, use_reentrant=False)
            return output

    def block(self, width: int, dropout: float) -> nn.Module:
        return self.Block(nn.Linear(width, width), nn.BatchNorm1d(width))


class HiddenParts(Blocks):
    """One weight inside several reentrant checkpoints: no graph shows that it comes in parts."""

    class Block(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = checkpoint(self.shared, given, use_reentrant=True)
            return output

    def block(self, width: int, dropout: float) -> nn.Module:
        if not hasattr(self, "shared"):
            self.shared = nn.Linear(width, width)
        return self.Block(self.shared)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Beside, "crosses the cut"),
        (Reentrant, "reentrant checkpoints hide them"),
        (NormalizedTwice, "changes in backward"),
        (HiddenParts, "comes in parts"),
        (lambda: nn.Linear(16, 16), "no list of equal blocks"),
    ],
)
def test_the_usual_order_stays_where_it_has_to(model: Callable[[], nn.Module], why: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"the usual order: .*{why}") as warned:
        runs, knowledge = run_both(seeded(model), vectors, squares)
    assert len(warned) == 1
    assert_identical(runs[1], runs[0])
    assert knowledge.refusal is not None


class RepeatedNorm(Blocks):
    """A batch norm is updated twice in each forward, the second time in another segment."""

    def block(self, width: int, dropout: float) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for number in (0, 1, 0, 2, 3):
            given = self.layers[number](given)
        return given


def test_a_batch_norm_that_is_updated_twice() -> None:
    runs, knowledge = run_both(seeded(RepeatedNorm), vectors, squares)
    assert_layer_major(runs, knowledge, cuts=4)
    assert [knowledge.places[cut.place].name for cut in sorted(knowledge.wide)] == [
        "layers.1",
        "layers.0",
    ]


class ChecksLater(Blocks):
    """From its second step on it checkpoints a batch norm, or runs a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.then = ""

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if layer is self.layers[2] and self.then == "checkpoint":
            return checkpoint(layer, hidden, use_reentrant=False)
        if layer is self.layers[3] and self.then == "twice":
            hidden = self.layers[2](hidden)
        output: torch.Tensor = layer(hidden)
        return output


def test_a_norm_that_is_updated_in_backward_all_of_a_sudden_is_an_error() -> None:
    with make_engine(seeded(ChecksLater)(), config_of("layer_major")) as engine:
        accumulate_steps(engine, vectors, squares, steps=2)
        engine.module.then = "checkpoint"
        with pytest.raises(EngineStateError, match="changes in backward"):
            accumulate_steps(engine, vectors, squares, steps=1, start=2)
        assert all("gradient" not in tensors for _, tensors in engine.named_state())


def test_a_norm_that_is_updated_twice_all_of_a_sudden() -> None:
    def twice_later(model: Any, batch: tuple[int, torch.Tensor]) -> torch.Tensor:
        model.module.then = "twice" if batch[0] >= 6 else ""
        return squares(model, batch[1])

    runs, _ = run_both(
        seeded(ChecksLater), lambda index: (index, vectors(index)), twice_later, steps=5
    )
    assert_identical(runs[1], runs[0])


class Skipping(Blocks):
    """Blocks are left out at random, by torch's generator or by Python's."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.first(given)
        for layer in self.layers:
            if torch.rand(()) < 0.6 and random.random() < 0.9:
                hidden = layer(hidden) * 2
        output: torch.Tensor = self.last(hidden)
        return output


def test_layers_that_are_skipped_at_random() -> None:
    runs, knowledge = run_both(seeded(Skipping), vectors, squares, steps=8, count=4)
    assert_identical(runs[1], runs[0])
    assert knowledge.refusal is None
    assert len(knowledge.narrow) == 5


class SometimesWide(Blocks):
    """Its third step is another: what the first block has returned is used at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.layers[2] = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.is_wide = False

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.first(given)
        first: Any = 0.0
        for index, layer in enumerate(self.layers):
            hidden = hidden + layer(hidden)
            if index == 0 and self.is_wide:
                first = hidden.sin()
        output: torch.Tensor = self.last(hidden + first)
        return output


def test_a_step_that_turns_out_to_be_wide_runs_again_in_the_usual_order() -> None:
    def at_third_step(model: Any, batch: tuple[int, torch.Tensor]) -> torch.Tensor:
        model.module.is_wide = batch[0] // 3 in (2, 3)
        return squares(model, batch[1])

    runs, knowledge = run_both(
        seeded(SometimesWide), lambda index: (index, vectors(index)), at_third_step, steps=6
    )
    assert_identical(runs[1], runs[0])
    assert knowledge.refusal is None
    assert knowledge.wide


def test_a_leaf_that_is_not_the_engines_is_used_in_two_places() -> None:
    shared = torch.ones(16, requires_grad=True)

    class Outside(Blocks):
        def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + layer(hidden * shared)

    gradients = []
    for order in ORDERS:
        shared.grad = None
        with make_engine(seeded(Outside)(), config_of(order)) as engine:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                accumulate_steps(engine, vectors, squares, steps=2)
            gradients.append(shared.grad)
            assert len(warned) == (order == "layer_major" and engine._knowledge.refusal is not None)
    assert torch.equal(gradients[0], gradients[1])


def halve(parameter: torch.Tensor) -> None:
    """A post-accumulate hook."""
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


@pytest.mark.parametrize("on_the_tied_one", ["tensor hook", "post-accumulate hook"])
def test_hooks_of_the_users_see_whole_gradients_once_in_each_backward(on_the_tied_one: str) -> None:
    def doubled(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(gradient)
        return gradient * 2

    def build() -> nn.Module:
        model: Any = Tied()
        if on_the_tied_one == "tensor hook":
            model.first.weight.register_hook(doubled)
        else:
            model.first.weight.register_post_accumulate_grad_hook(halve)
            model.last.bias.register_hook(doubled)
        model.layers[1][1].weight.register_hook(doubled)
        model.layers[2][1].weight.register_post_accumulate_grad_hook(halve)
        return model

    seen: list[torch.Tensor] = []
    runs = []
    for order in ORDERS:
        seen.clear()
        with make_engine(seeded(build)(), config_of(order)) as engine:
            if order == "layer_major":
                with pytest.warns(RuntimeWarning, match="a leaf of shape"):
                    runs.append(accumulate_steps(engine, vectors, squares))
            else:
                runs.append(accumulate_steps(engine, vectors, squares))
        assert len(seen) == 18
    assert_identical(runs[1], runs[0])


def test_hooks_of_the_users_on_weights_that_are_used_once() -> None:
    def build() -> nn.Module:
        model: Any = Blocks()
        model.layers[1][1].weight.register_hook(lambda gradient: gradient * 2)
        model.layers[2][1].weight.register_post_accumulate_grad_hook(halve)
        return model

    runs, knowledge = run_both(seeded(build), vectors, squares)
    assert_layer_major(runs, knowledge, cuts=4)


# -- placements, precisions, memory ----------------------------------------------------------------


LAYER_ELEMENTS = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64


def tight(model: nn.Module, tier: str, path: Path, **sections: Any) -> dict[str, Any]:
    """A device that holds two layers."""
    itemsize = 4 if sections.get("compute", "fp32") == "fp32" else 2
    device = two_buckets_bytes(model, itemsize=itemsize, bucket_elements=LAYER_ELEMENTS)
    return {
        "tier": tier,
        "path": path,
        "device": device,
        "bucket_elements": LAYER_ELEMENTS,
        **sections,
    }


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_placements_and_budgets_leave_the_numbers_alone(compute: str, tmp_path: Path) -> None:
    runs = []
    for tier in ("device", "host", "nvme"):
        model = small_llama(2)
        placed: dict[str, Any] = {"tier": "device", "compute": compute}
        if tier != "device":
            placed = tight(model, tier, tmp_path, compute=compute)
        if tier == "nvme":
            placed["placement"] = {"activations": "nvme"}
            placed["activations"] = {"min_bytes": 1024, "host_memory": "256KiB"}
        for order in ORDERS:
            torch.manual_seed(3)
            with make_engine(small_llama(2), config_of(order, **placed)) as engine:
                runs.append(accumulate_steps(engine, tokens))
            tiers = runs[-1].report.tiers.values()
            assert all(each.peak_bytes <= each.budget_bytes for each in tiers)
    for run in runs[1:]:
        assert_identical(run, runs[0])


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize(("tier", "lane"), [("host", "h2d"), ("nvme", "nvme_read")])
def test_weights_move_twice_a_step_whatever_the_number_of_micro_batches(
    tier: str, lane: str, tmp_path: Path
) -> None:
    moved: dict[tuple[str, int], int] = {}
    for order in ORDERS:
        for count in (2, 4, 8):
            model = small_llama(4)
            placed = tight(model, tier, tmp_path)
            # What else moves on the lane stays away from it.
            placed["placement"] = {"gradients": "host", "optimizer": "host"}
            placed["training"] = {"max_grad_norm": 0.0}
            with make_engine(model, config_of(order, count=count, **placed)) as engine:
                for step in range(4):
                    engine.accumulate([tokens(step * count + micro) for micro in range(count)])
                    taken = engine.step()
                    assert taken
                report = engine.report()
                moved[order, count] = report.lanes[lane].bytes
                assert report.faults == 0
    weights = sum(p.numel() for p in small_llama(4).parameters()) * 4
    for_the_update = weights if tier == "nvme" else 0  # fp32 weights are the master weights
    (found,) = {moved["layer_major", count] - for_the_update for count in (2, 4, 8)}
    # Once for forward and once for backward, less what is still there when that begins.
    assert 1.5 * weights < found <= 2.05 * weights
    for count in (2, 4, 8):
        in_the_usual_order = moved["micro_batch_major", count] - for_the_update
        assert in_the_usual_order > 0.75 * count * found


@pytest.mark.usefixtures("by_itself")
def test_gradients_on_nvme_are_written_once_a_step(tmp_path: Path) -> None:
    written = {}
    for order in ORDERS:
        model = small_llama(4)
        placed = tight(model, "host", tmp_path)
        placed["placement"] = {"gradients": "nvme"}
        placed["tiers"] = {**settings("nvme", tmp_path, device=placed["device"])["tiers"]}
        with make_engine(model, config_of(order, **placed, count=4)) as engine:
            accumulate_steps(engine, tokens)
            written[order] = engine.report().lanes["nvme_write"].bytes
    numel = sum(p.numel() for p in small_llama(4).parameters())
    assert written["layer_major"] <= 1.1 * 4 * numel
    assert written["micro_batch_major"] > 3 * written["layer_major"]


def test_the_loss_scale_of_fp16_and_steps_that_are_skipped() -> None:
    runs = []
    for order in ORDERS:
        torch.manual_seed(3)
        config = config_of(order, compute="fp16", precision={"initial_loss_scale": 2.0**24})
        with make_engine(seeded(Blocks)(), config) as engine:
            runs.append(accumulate_steps(engine, lambda i: vectors(i).half(), squares, steps=14))
            assert engine.skipped_steps > 2
            assert engine.global_steps > 2
    assert_identical(runs[1], runs[0])


def test_saved_hooks_and_autocast_around_the_call() -> None:
    runs = []
    for order in ORDERS:
        torch.manual_seed(3)
        packed: list[int] = []

        def pack(tensor: torch.Tensor, packed: list[int] = packed) -> torch.Tensor:
            packed.append(tensor.numel())
            return tensor

        with (
            make_engine(seeded(Blocks)(), config_of(order)) as engine,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            runs.append(accumulate_steps(engine, vectors, squares))
        runs[-1].losses += packed and sorted(packed)
    assert_identical(runs[1], runs[0])


class Outer(Blocks):
    """Weights of its own, more than fit on the device beside a block, around the blocks."""

    def __init__(self) -> None:
        super().__init__(width=64)
        for name in ("scale", "rotate", "shift"):
            setattr(self, name, nn.Parameter(torch.randn(64, 64) / 8))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        before = given.repeat(1, 4) @ self.scale @ self.rotate
        output: torch.Tensor = super().forward(before) @ self.shift @ self.rotate
        return output


def test_windows_around_the_blocks_leave_room_for_them() -> None:
    elements = 64 * 64 + 3 * 64
    device = two_buckets_bytes(Outer(), itemsize=4, bucket_elements=elements)
    runs, knowledge = run_both(
        seeded(Outer), vectors, squares, device=device, bucket_elements=elements
    )
    assert_layer_major(runs, knowledge, cuts=4)
    assert runs[1].report.tiers["device"].peak_bytes <= device


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_an_accelerator_whose_copies_end_late(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for simulated in (False, True):
        if simulated:
            use_accelerator(monkeypatch)
        for order in ORDERS:
            torch.manual_seed(3)
            placed = tight(small_llama(2), tier, tmp_path)
            with make_engine(small_llama(2), config_of(order, **placed)) as engine:
                runs.append(accumulate_steps(engine, tokens))
    for run in runs[1:]:
        assert_identical(run, runs[0])


@pytest.mark.parametrize("tied", [False, True])
def test_tiles_chunks_of_the_loss_and_adapters(tied: bool) -> None:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64}
        model: Any = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **sizes, num_hidden_layers=3, num_attention_heads=4, tie_word_embeddings=tied
            )
        )
        adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        adapted: Any = peft.get_peft_model(model, adapters)
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad_(True)
        return adapted.train()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        runs, knowledge = run_both(
            build,
            tokens,
            training={"loss_chunk_tokens": 5},
            tiling={"modules": ["*lm_head", "*embed_tokens"], "tiles": 3},
        )
    assert_identical(runs[1], runs[0])
    # Its gradient arrives by tiles: those of the head, if it is the embedding too, cannot wait.
    assert (knowledge.refusal is not None) == tied
    assert any("a leaf of shape [256, 64]" in str(each.message) for each in warned) == tied


# -- one call --------------------------------------------------------------------------------------


def test_one_micro_batch_is_a_plain_step() -> None:
    def undropped() -> nn.Module:
        return seeded(Blocks, dropout=0.0)()

    expected = train_plain(undropped(), lambda model, i: squares(model, vectors(i)), steps=3)
    for order in ORDERS:
        config = config_of(order, count=1, training={"max_grad_norm": 0.0})
        with make_engine(undropped(), config) as engine:
            assert_close(accumulate_steps(engine, vectors, squares), expected, tolerance=1e-6)


def test_both_orders_equal_the_plain_loop_without_random_numbers() -> None:
    def loss_of(model: Any, index: int) -> torch.Tensor:
        return squares(model, vectors(index))

    expected = train_plain(
        seeded(Blocks, dropout=0.0)(), loss_of, steps=3, accumulation=3, max_norm=0.5
    )
    for order in ORDERS:
        with make_engine(seeded(Blocks, dropout=0.0)(), config_of(order)) as engine:
            found = accumulate_steps(engine, vectors, squares)
        assert_close(found, expected, tolerance=1e-6)


def test_accumulate_refuses_what_is_no_whole_step() -> None:
    with make_engine(seeded(Blocks)(), config_of("layer_major")) as engine:
        with pytest.raises(OffloadError, match="all 3"):
            engine.accumulate([vectors(0)], lambda batch: squares(engine, batch))
        engine.backward(squares(engine, vectors(0)))
        engine.step()
        with pytest.raises(OffloadError, match="after 1 backward"):
            engine.accumulate([vectors(0)] * 3, lambda batch: squares(engine, batch))
        assert engine.micro_steps == 1
        engine.optimizer.zero_grad()
        accumulate_steps(engine, vectors, squares)
        assert engine.global_steps == 3
        assert engine.micro_steps == 9


class Failure(Exception):
    """What a test's model raises."""


class Failing(Blocks):
    """One of its layers fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = ""
        self.passed = 0

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        hidden = super().run(layer, hidden)
        if layer is self.layers[2]:
            self.passed += 1
            if self.fails == "forward" and self.passed % 3 == 2:
                raise Failure
            if self.fails == "backward" and self.passed % 3 == 2:
                hidden.register_hook(self.fail)
        return hidden

    def fail(self, gradient: torch.Tensor) -> None:
        raise Failure


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_an_error_in_one_micro_batch_ends_them_all_and_a_good_step_follows(
    phase: str, tier: str
) -> None:
    runs = []
    for order in ORDERS:
        torch.manual_seed(3)
        with make_engine(seeded(Failing)(), config_of(order, tier=tier)) as engine:
            first = accumulate_steps(engine, vectors, squares, steps=2)
            before = dict(engine.named_state())
            engine.module.passed, engine.module.fails = 0, phase
            state = torch.get_rng_state()
            with pytest.raises(Failure):
                accumulate_steps(engine, vectors, squares, steps=1, start=2)
            assert all("gradient" not in tensors for _, tensors in engine.named_state())
            assert all(
                torch.equal(tensors["master"], before[name]["master"])
                for name, tensors in engine.named_state()
            )
            assert not any(thread.name == "micro-batch" for thread in threading.enumerate())
            engine.module.fails = ""
            torch.set_rng_state(state)
            runs.append(accumulate_steps(engine, vectors, squares, steps=2, start=2))
            runs[-1].losses += first.losses
    assert_identical(runs[1], runs[0])


def test_an_interrupt_ends_the_micro_batches_that_wait() -> None:
    with make_engine(seeded(Failing)(), config_of("layer_major")) as engine:
        accumulate_steps(engine, vectors, squares, steps=2)

        def interrupted(batch: torch.Tensor) -> torch.Tensor:
            if batch is last:
                raise KeyboardInterrupt
            return squares(engine, batch)

        last = vectors(8)
        with pytest.raises(KeyboardInterrupt):
            engine.accumulate([vectors(6), vectors(7), last], interrupted)
        accumulate_steps(engine, vectors, squares, steps=1, start=2)
        assert engine.global_steps == 3
