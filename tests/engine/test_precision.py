"""Number formats: what stays in fp32, the loss scale, and random numbers under every placement."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.errors import ConfigError
from tests.faults.lab import LEARNING_RATE, Run, make_engine, run_everywhere
from tests.faults.modules import WIDTH, Blocks, inputs, loss_of, tokens
from tests.oracle import relative_difference

PLACES = ("device", "host", "nvme")
PATTERNS = ["*norm*", "layers.2", "head.bias", "*running_mean"]


class Mixed(nn.Module):
    """Norms, a block and a bias that stay in fp32, and buffers of all kinds; for autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.batch = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.ones(WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            hidden = hidden + torch.tanh(layer(norm(hidden.float())))
        return self.head(hidden).float() * self.table.float()


def _kept(name: str) -> bool:
    return "norm" in name or name.startswith("layers.2") or name == "head.bias"


def _mixed_loss(call: Any, step: int) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        return loss_of(call(tokens(step)), step)


def test_what_stays_in_fp32(tmp_path: Path) -> None:
    engine = make_engine(
        Mixed(), "nvme", tmp_path, precision={"compute": "bf16", "keep_fp32": PATTERNS}
    )
    for name, parameter in engine.module.named_parameters():
        kept = _kept(name)
        assert parameter.dtype is (torch.float32 if kept else torch.bfloat16), name
        assert ("remainder" in engine.state_fields(name)) is not kept, name
    dtypes = {name: buffer.dtype for name, buffer in engine.module.named_buffers()}
    assert dtypes["batch.running_mean"] is torch.float32
    assert dtypes["batch.running_var"] is dtypes["table"] is torch.bfloat16
    for bucket in engine.plan.buckets:
        names = {engine.parameter_names()[slot.param] for slot in bucket.slots}
        assert len({_kept(name) for name in names}) == 1, "buckets are of one dtype"
    engine.backward(_mixed_loss(engine, 0))
    for name, state in engine.named_state():
        if "gradient" in state:
            assert state["gradient"].dtype is (torch.float32 if _kept(name) else torch.bfloat16)
    taken = engine.step()
    assert taken
    exported = engine.state_dict()
    assert exported["norms.0.weight"].dtype is torch.float32
    assert exported["embed.weight"].dtype is torch.bfloat16
    engine.close()


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_mixed_formats_have_the_gradients_of_plain_pytorch(compute: str, tmp_path: Path) -> None:
    """Every placement agrees over the run; each step's gradients are plain PyTorch's, to the bit.

    The update of SGD with this learning rate is exact in fp32, so what is kept moves exactly.
    """
    scale = 4.0
    precision = {"compute": compute, "keep_fp32": PATTERNS, "initial_loss_scale": scale}
    if compute == "bf16":
        del precision["initial_loss_scale"]

    def body(run: Run) -> None:
        engine = run.offloaded
        plain = Mixed()
        for name, parameter in plain.named_parameters():
            if not _kept(name):
                parameter.data = parameter.data.to(getattr(torch, _TORCH_NAMES[compute]))
        for step in range(3):
            before = dict(engine.named_state())
            with torch.no_grad():
                for name, parameter in plain.named_parameters():
                    parameter.copy_(before[name]["weight"])
            plain.zero_grad()
            loss = _mixed_loss(plain, step)
            (loss * scale if compute == "fp16" else loss).backward()
            found = _mixed_loss(engine, step)
            assert torch.equal(found, loss)
            engine.backward(found)
            for name, state in engine.named_state():
                expected = plain.get_parameter(name).grad
                assert ("gradient" in state) is (expected is not None), name
                if expected is not None:
                    unscaled = expected.float() / (scale if compute == "fp16" else 1)
                    assert torch.equal(state["gradient"].float(), unscaled), name
            taken = engine.step()
            assert taken
            run.check_at_rest()
            for name, state in engine.named_state():
                gradient = plain.get_parameter(name).grad
                if _kept(name) and gradient is not None:
                    moved = gradient / (scale if compute == "fp16" else 1) * LEARNING_RATE
                    assert torch.equal(state["weight"], before[name]["weight"] - moved), name

    run_everywhere(body, tmp_path, Mixed, pages=4, runs=(*PLACES, "roomy"), precision=precision)


_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16"}


def test_patterns_that_match_nothing_are_named(tmp_path: Path) -> None:
    model = Mixed()
    keep = {"precision": {"compute": "bf16", "keep_fp32": ["*norm*", "*nrom*", "layer.2"]}}
    for act in (
        lambda: offload.plan(model, keep),
        lambda: make_engine(model, "device", tmp_path, **keep),
    ):
        with pytest.raises(ConfigError) as caught:
            act()
        assert len(caught.value.problems) == 2
        assert all("keep_fp32" in problem for problem in caught.value.problems)
        assert "'*nrom*'" in str(caught.value)
    assert model.head.weight.dtype is torch.float32
    assert type(model.head.weight) is nn.Parameter


def _tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=WIDTH,
            d_ff=WIDTH,
            num_layers=2,
            num_heads=2,
            d_kv=16,
            vocab_size=WIDTH,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


class Wrapped(nn.Module):
    """A transformers model below another module, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Linear(2, 2)
        self.inner = _tiny_t5()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.inner(input_ids=ids, labels=ids).loss
        return loss


def test_what_transformers_keeps_in_fp32_is_kept(tmp_path: Path) -> None:
    """T5 asks for `wo` in fp16 and casts its input; bf16 needs nothing."""

    def body(run: Run) -> None:
        engine = run.offloaded
        for name, parameter in engine.module.named_parameters():
            kept = ".wo." in name
            assert parameter.dtype is (torch.float32 if kept else torch.float16), name
        torch.manual_seed(0)
        plain = run.row.make()
        for name, parameter in plain.named_parameters():
            if ".wo." not in name:
                parameter.data = parameter.data.half()
        for step in range(3):
            loss = engine(tokens(step))
            if not step:
                assert torch.equal(loss, plain(tokens(step)))
            run.record("loss", loss)
            engine.backward(loss)
            run.record("gradients", run.gradients())
            taken = engine.step()
            assert taken

    precision = {"compute": "fp16", "initial_loss_scale": 8.0}
    run_everywhere(body, tmp_path, Wrapped, runs=(*PLACES, "roomy"), precision=precision, pages=3)
    engine = make_engine(Wrapped(), "host", tmp_path, precision={"compute": "bf16"})
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    engine.close()


class Strict(Mixed):
    _keep_in_fp32_modules_strict = ("norms.*weight",)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_what_is_kept_strictly_is_kept_in_both_half_formats(compute: str, tmp_path: Path) -> None:
    engine = make_engine(Strict(), "host", tmp_path, precision={"compute": compute})
    kept = {n for n, p in engine.module.named_parameters() if p.dtype is torch.float32}
    assert kept == {f"norms.{index}.weight" for index in range(3)}
    engine.close()


# -- the loss scale -------------------------------------------------------------------------------


@pytest.mark.parametrize("home", PLACES)
def test_a_run_with_infinities_follows_grad_scaler(home: str, tmp_path: Path) -> None:
    """Scale, growth, backoff, skips, norm and the clipped update, over two micro-batches a step.

    The plain side starts each step from the engine's weights, so gradients are the same bits.
    """
    max_norm, infinite = 0.5, {(2, 1), (6, 0), (7, 1), (8, 0)}
    scaling = {"growth_interval": 2, "growth_factor": 4.0, "backoff_factor": 0.125}
    engine = make_engine(
        Blocks(),
        home,
        tmp_path,
        precision={"compute": "fp16", "initial_loss_scale": 256.0, **scaling},
        training={"gradient_accumulation_steps": 2, "max_grad_norm": max_norm},
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, **scaling)
    plain = Blocks().half()
    masters = {name: p.detach().float().requires_grad_() for name, p in plain.named_parameters()}
    rule = torch.optim.SGD(masters.values(), lr=LEARNING_RATE, foreach=False)
    scales, taken = [], []
    for step in range(14):
        before = dict(engine.named_state())
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(before[name]["weight"])
                masters[name].copy_(before[name]["master"])
        rule.zero_grad()
        assert engine.loss_scale is not None
        assert engine.loss_scale.scale == scaler.get_scale()
        scales.append(scaler.get_scale())
        for micro in range(2):
            blown = math.inf if (step, micro) in infinite else 1.0
            x = inputs(2 * step + micro).half()
            loss = loss_of(plain(x)).float() * blown
            scaler.scale(loss / 2).backward()
            for name, parameter in plain.named_parameters():
                assert parameter.grad is not None
                arrived, master = parameter.grad.float(), masters[name]
                master.grad = arrived if master.grad is None else master.grad + arrived
                parameter.grad = None
            engine.backward(loss_of(engine(x)).float() * blown)
            last = engine.step()
        scaler.unscale_(rule)
        norm = nn.utils.clip_grad_norm_(masters.values(), max_norm).item()
        scaler.step(rule)
        scaler.update()
        taken.append(last)
        assert engine.grad_norm == pytest.approx(norm, rel=1e-6, nan_ok=True) or not last
        for name, state in engine.named_state():
            if last:
                assert relative_difference(state["master"], masters[name].detach()) < 1e-6, name
                assert torch.equal(state["weight"], state["master"].half()), name
            else:
                assert torch.equal(state["master"], before[name]["master"]), name
    assert engine.loss_scale.state_dict() == scaler.state_dict()
    assert taken == [step not in {2, 6, 7, 8} for step in range(14)]
    assert (engine.skipped_steps, engine.global_steps) == (4, 10)
    steps = [after / before for before, after in itertools.pairwise(scales)]
    assert steps.count(4.0) >= 3, "the scale grows"
    assert steps.count(0.125) == 4, "and backs off"
    engine.close()


# -- random numbers -------------------------------------------------------------------------------


class Stochastic(nn.Module):
    """Dropout in modules and functions, noise drawn in forward, and all of it drawn again."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.body = Blocks(3)
        self.drop = nn.Dropout(0.3)
        self.recurrent = nn.LSTM(WIDTH, WIDTH, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(WIDTH, WIDTH)

    def _noisy(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x) + 0.1 * torch.rand_like(x)
        return F.dropout(F.rrelu(x, training=self.training), 0.2, training=self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(
            self._noisy, self.drop(x), use_reentrant=self.reentrant, preserve_rng_state=True
        )
        x, _ = self.recurrent(x[None])
        return self.head(x[0] * torch.bernoulli(torch.full_like(x[0], 0.9)))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_random_numbers_are_those_of_plain_pytorch(
    reentrant: bool, compute: str, tmp_path: Path
) -> None:
    def body(run: Run) -> None:
        for step in range(4):
            torch.manual_seed(step)
            x = inputs(step).to(next(run.module.parameters()).dtype).requires_grad_()
            run.train(loss_of(run(x)).float())
            run.record("drawn next", torch.rand(4))
            run.module.eval()
            with torch.no_grad():
                run.record("evaluated", run(x))
            run.module.train()

    run_everywhere(
        body,
        tmp_path,
        lambda: Stochastic(reentrant=reentrant),
        pages=12,
        runs=("plain", *PLACES, "roomy") if compute == "fp32" else (*PLACES, "roomy"),
        precision={"compute": compute},
    )
