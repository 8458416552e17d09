"""Deferred initialization: bit-equal to an ordinary build, and never a number that is not true."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import DoesNotFitError, OffloadError
from offload.state import recording
from offload.state.recording import materialized, version_of
from tests.threads import run_in_threads

FP32 = {"precision": {"compute": "fp32"}}


@pytest.fixture(params=[1, recording.THRESHOLD_ELEMENTS], ids=["all deferred", "large deferred"])
def threshold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(recording, "THRESHOLD_ELEMENTS", request.param)
    return int(request.param)


@pytest.fixture
def all_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "THRESHOLD_ELEMENTS", 1)


def both(build: Callable[[], Any]) -> tuple[Any, Any]:
    """What `build` makes ordinarily and deferred; the generator ends in the same state."""
    torch.manual_seed(7)
    plain = build()
    after = torch.get_rng_state()
    torch.manual_seed(7)
    with offload.deferred_init():
        deferred = build()
    assert torch.equal(after, torch.get_rng_state())
    return plain, deferred


def values(tensor: torch.Tensor) -> torch.Tensor:
    """The true values; making them draws nothing that anybody notices."""
    generator = torch.get_rng_state()
    real = tensor.detach() if version_of(tensor) is None else materialized([tensor])[0]
    assert torch.equal(generator, torch.get_rng_state())
    return real


def assert_same(plain: nn.Module, deferred: nn.Module) -> int:
    """Every parameter and buffer is equal, with its strides; returns how many are deferred."""
    expected = plain.state_dict(keep_vars=True)
    found = deferred.state_dict(keep_vars=True)
    assert list(expected) == list(found)
    num_deferred = 0
    for name, tensor in expected.items():
        num_deferred += version_of(found[name]) is not None
        assert found[name].dtype == tensor.dtype
        assert found[name].stride() == tensor.stride(), name
        assert torch.equal(values(found[name]), tensor), name
    for (name, tensor), (same, other) in zip(
        plain.named_buffers(), deferred.named_buffers(), strict=True
    ):
        assert name == same
        assert version_of(other) is None
        assert torch.equal(tensor, other)
    return num_deferred


class Unusual(nn.Module):
    """What initialization code does beside drawing once."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.empty(130, 200))
        self.square = nn.Parameter(torch.empty(160, 160))
        self.moved = nn.Conv2d(16, 32, 8).to(memory_format=torch.channels_last)
        self.half = nn.Linear(150, 150).to(torch.bfloat16)
        nn.init.orthogonal_(self.wide)
        nn.init.trunc_normal_(self.square, std=0.02)
        scale = 1.0 / float(
            self.wide.detach().abs().max()
        )  # a number that depends on what was drawn
        with torch.no_grad():
            self.square.mul_(scale)
            for row in range(0, 160, 5):
                self.square[row].uniform_(-1, 1)
            self.square[3].zero_()
            shift = torch.full((160,), 0.5)
            self.square.add_(shift)
            shift.zero_()  # what has been added does not follow
            self.square[:130, :130] += self.wide[:, :130].t()
        self.drawn_between = nn.Parameter(torch.randn(3))
        self.copied = nn.Parameter(torch.empty(160, 160))
        self.copied.data.copy_(self.square.data)
        with torch.no_grad():
            self.square.add_(1)  # what was copied before does not follow
        self.kinds = nn.ParameterList(torch.empty(140, 140) for _ in range(3))
        nn.init.sparse_(self.kinds[0], 0.3)
        nn.init.eye_(self.kinds[1])
        self.kinds[2].data.bernoulli_(0.3)
        self.dirac = nn.Parameter(nn.init.dirac_(torch.empty(32, 32, 5, 5)))
        self.computed = nn.Parameter(torch.rand(150, 150).cumsum(0).tril() @ torch.ones(150, 130))
        own = torch.Generator().manual_seed(3)
        self.own_generator = nn.Parameter(torch.empty(150, 150).normal_(generator=own))
        self.register_buffer("table", torch.rand(200, 200).softmax(0))
        self.register_buffer("steps", torch.arange(20_000), persistent=False)
        if bool((self.table.sum() > 0).item()):
            self.chosen = nn.Parameter(torch.full((130, 130), float(self.table[0, 0])))
        torch.manual_seed(11)
        self.reseeded = nn.Parameter(torch.randn(150, 150))


def parametrized() -> nn.Module:
    utils = nn.utils.parametrizations
    return nn.ModuleList(
        [
            utils.weight_norm(nn.Linear(150, 150)),
            utils.spectral_norm(nn.Linear(150, 160)),
            utils.orthogonal(nn.Linear(140, 140)),
        ]
    )


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(200, 300),
    "conv": lambda: nn.Conv2d(32, 64, 5),
    "embedding": lambda: nn.Embedding(500, 64, padding_idx=3),
    "lstm": lambda: nn.LSTM(96, 96, num_layers=2, bidirectional=True),
    "attention": lambda: nn.MultiheadAttention(160, 4),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(144, 4, batch_first=True), 2
    ),
    "unusual": Unusual,
    "parametrized": parametrized,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_bit_equal(name: str, threshold: int) -> None:
    plain, deferred = both(MODULES[name])
    num_deferred = assert_same(plain, deferred)
    assert num_deferred > 0
    if threshold == 1:
        assert num_deferred == len(list(deferred.parameters()))


def hugging_face(name: str) -> nn.Module:
    import transformers

    small = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "intermediate_size": 96}
    given: dict[str, Any] = {
        "LlamaForCausalLM": small,
        "GPT2LMHeadModel": {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4}
        | {"bos_token_id": 0, "eos_token_id": 1},
        "BertForMaskedLM": small,
        "T5ForConditionalGeneration": {"vocab_size": 300, "d_model": 64, "d_ff": 96}
        | {"num_layers": 2, "d_kv": 16, "num_heads": 4},
        "ViTForImageClassification": {k: v for k, v in small.items() if k != "vocab_size"},
        "MixtralForCausalLM": small | {"num_key_value_heads": 2, "num_local_experts": 4},
    }[name]
    model_class = getattr(transformers, name)
    model: nn.Module = model_class(model_class.config_class(**given))
    return model


HUGGING_FACE = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "MixtralForCausalLM",
]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_hugging_face_model_is_bit_equal(name: str, all_deferred: None) -> None:
    plain, deferred = both(lambda: hugging_face(name))
    assert assert_same(plain, deferred) > 0
    aliases = dict(deferred.named_parameters(remove_duplicate=False))
    for alias, parameter in plain.named_parameters(remove_duplicate=False):
        same = [n for n, p in plain.named_parameters(remove_duplicate=False) if p is parameter]
        assert all(aliases[alias] is aliases[n] for n in same)


def network() -> nn.Module:
    module = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 200))
    module.register_buffer("table", torch.randn(200, 200))
    return module


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_training_is_that_of_the_ordinary_model(compute: str, tmp_path: Any) -> None:
    config = {
        "precision": {"compute": compute},
        "tiers": {"nvme": {"paths": [str(tmp_path)]}, "device": {"memory": "4MiB"}},
        "placement": {"weights": "nvme", "optimizer": "nvme"},
        "partition": {"bucket_elements": 65_536},
    }
    states = []
    for module in both(network):
        with offload.initialize(module, config) as engine:
            torch.manual_seed(1)
            dtype = torch.float32 if compute == "fp32" else torch.bfloat16
            for _ in range(3):
                engine.backward(engine(torch.randn(4, 200, dtype=dtype)).float().square().mean())
                engine.step()
            states.append([s for _, s in engine.named_state()])
    for expected, found in zip(*states, strict=True):
        assert expected.keys() == found.keys()
        for field, tensor in expected.items():
            assert torch.equal(tensor, found[field]), field


def test_edits_after_the_block_are_kept() -> None:
    plain, deferred = both(network)
    for module in (plain, deferred):
        with torch.no_grad():
            module[0].weight.data.mul_(3)
            module[0].weight[2:4].zero_()
            module[0].weight.t()[5].fill_(1.5)
            torch.manual_seed(4)
            nn.init.xavier_normal_(module[2].weight)
            module[2].weight.clamp_(-0.1, 0.1)
            module.half()
            module.load_state_dict({**module.state_dict(), "0.bias": torch.ones(150)})
        module.float()
    assert version_of(deferred[0].weight) is not None
    assert_same(plain, deferred)
    with offload.initialize(deferred, FP32) as engine:
        for name, state in engine.named_state():
            assert torch.equal(state["weight"], plain.get_parameter(name))


def test_a_value_that_is_given_makes_it_real() -> None:
    _, module = both(network)
    module[0].weight.data = torch.ones(150, 200)
    assert type(module[0].weight) is nn.Parameter
    assert module[0].weight.sum().item() == 150 * 200
    assert version_of(module[0].weight) is None


def test_a_copy_is_deferred_and_its_own() -> None:
    plain, deferred = both(network)
    deferred[0].weight.marked = True
    copied = copy.deepcopy(deferred)
    with torch.no_grad():
        deferred[0].weight.zero_()
    assert isinstance(copied[0].weight, nn.Parameter)
    assert copied[0].weight.marked
    assert_same(plain, copied)
    assert not values(deferred[0].weight).any()


def test_uses_of_deferred_weights_raise_and_change_nothing() -> None:
    plain, deferred = both(network)
    weight = deferred[0].weight
    refused: dict[str, Callable[[], Any]] = {
        "forward": lambda: deferred(torch.randn(2, 200)),
        "an op": lambda: weight.sum(),
        "an op out of place": lambda: weight + 1,
        "an alias in an op": lambda: weight.data @ torch.ones(200),
        "a view in an op": lambda: torch.relu(weight[0]),
        "numpy": lambda: weight.detach().numpy(),
        "data_ptr": weight.data_ptr,
        "untyped_storage": weight.untyped_storage,
        "resize_": lambda: weight.data.resize_(3),
        "share_memory_": lambda: weight.data.share_memory_(),
        "torch.save": lambda: torch.save(deferred.state_dict(), io.BytesIO()),
    }
    for name, use in refused.items():
        with pytest.raises(OffloadError, match=r"offload\.initialize") as error:
            use()
        if name in ("forward", "an op", "numpy"):
            assert "parameter weight of a Linear" in str(error.value)
    assert "nan" not in repr(weight)
    assert weight.shape == (150, 200)
    assert weight[1, 2].item() == plain[0].weight[1, 2].item()
    assert torch.equal(weight, plain[0].weight)
    assert weight[0].tolist() == plain[0].weight[0].tolist()
    assert_same(plain, deferred)


def test_true_values_inside_the_block() -> None:
    def build() -> list[Any]:
        weight = nn.Parameter(torch.randn(150, 150))
        return [
            weight[1].tolist(),
            weight[2, 3].item(),
            repr(weight.detach()[:2, :2]),
            bool((weight.std() > 0.5).item()),
            torch.equal(weight, weight.clone()),
            float(weight.detach().sum()),
        ]

    plain, deferred = both(build)
    assert plain == deferred
    with offload.deferred_init():
        weight = torch.randn(150, 150)
        for use in (weight.numpy, weight.data_ptr, lambda: weight.resize_(3)):
            with pytest.raises(OffloadError, match="deferred"):
                use()


def test_an_op_that_cannot_be_deferred_names_its_module() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(150, 150).resize_(100, 150))

    with pytest.raises(OffloadError, match=r"resize_.*in Stubborn"), offload.deferred_init():
        Stubborn()


def test_an_exception_in_the_block_restores_everything() -> None:
    kept = []
    with pytest.raises(ZeroDivisionError), offload.deferred_init():
        kept.append(nn.Linear(200, 200))
        raise ZeroDivisionError
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert version_of(torch.randn(200, 200)) is None
    with pytest.raises(OffloadError, match=r"offload\.initialize"):
        kept[0](torch.randn(1, 200))
    with offload.initialize(kept[0], FP32) as engine:
        assert torch.isfinite(engine(torch.randn(1, 200))).all()


def test_blocks_nest() -> None:
    def build() -> nn.Module:
        with offload.deferred_init():
            inner = nn.Linear(150, 150)
        with torch.no_grad():
            doubled = inner.weight * 2  # still inside the outer block
        inner.other = nn.Parameter(doubled)
        return inner

    torch.manual_seed(7)
    with offload.deferred_init():
        deferred = build()
    torch.manual_seed(7)
    plain = nn.Linear(150, 150)
    assert torch.equal(values(deferred.other), plain.weight * 2)


def test_other_threads_build_ordinary_modules() -> None:
    made: list[nn.Module] = []
    with offload.deferred_init():
        run_in_threads(lambda: made.append(nn.Linear(200, 200)))
        mine = nn.Linear(200, 200)
    assert version_of(made[0].weight) is None
    assert type(made[0].weight) is nn.Parameter
    assert version_of(mine.weight) is not None


def test_a_write_that_nothing_has_seen_raises() -> None:
    """Another thread does not record; the memory is read-only, and must not end the process."""
    with offload.deferred_init():
        tensor = torch.randn(200, 200)
        with pytest.raises(RuntimeError):
            run_in_threads(lambda: tensor.fill_(1))


def test_dtypes_and_defaults_inside_the_block() -> None:
    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            module = nn.ModuleList([nn.Linear(150, 150)])
        finally:
            torch.set_default_dtype(before)
        module.append(nn.Linear(150, 150).to(torch.bfloat16))
        module.append(nn.Linear(150, 150).half().float())
        return module

    plain, deferred = both(build)
    assert_same(plain, deferred)
    assert deferred[0].weight.dtype is torch.float64


def test_ties_stay_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(300, 64)
            self.head = nn.Linear(64, 300, bias=False)
            self.head.weight = self.embed.weight

    plain, deferred = both(Tied)
    assert deferred.head.weight is deferred.embed.weight
    with offload.initialize(deferred, FP32) as engine:
        (item,) = engine.named_state()
        assert torch.equal(item[1]["weight"], plain.embed.weight)


def test_parameters_over_the_same_memory_are_refused_and_others_are_not() -> None:
    with offload.deferred_init():
        base = torch.arange(30_000.0).view(300, 100)
        module = nn.ParameterList([nn.Parameter(base[:200]), nn.Parameter(base[100:])])
        apart = nn.ParameterList([nn.Parameter(base[:200]), nn.Parameter(base[200:])])
    with pytest.raises(OffloadError, match="different objects over the same memory"):
        offload.initialize(module, FP32)
    with offload.initialize(apart, FP32) as engine:
        found = [state["weight"] for _, state in engine.named_state()]
    assert torch.equal(torch.cat(found), torch.arange(30_000.0).view(300, 100))


def test_a_refused_plan_leaves_the_model_deferred() -> None:
    plain, deferred = both(network)
    with pytest.raises(DoesNotFitError):
        offload.initialize(deferred, {"tiers": {"device": {"memory": "8KiB"}}})
    assert_same(plain, deferred)
    with pytest.raises(OffloadError, match=r"offload\.initialize"):
        deferred(torch.randn(1, 200))
    with offload.initialize(deferred, FP32) as engine:
        batch = torch.randn(3, 200)
        assert torch.equal(engine(batch), plain(batch))


def test_plan_of_a_deferred_model_is_that_of_the_model() -> None:
    plain, deferred = both(network)
    config = {**FP32, "tiers": {"device": {"memory": "8MiB"}, "host": {"memory": "8MiB"}}}
    assert str(offload.plan(deferred, config)) == str(offload.plan(plain, config))
    assert version_of(deferred[0].weight) is not None


def test_no_engine_inside_the_block() -> None:
    with pytest.raises(OffloadError, match="leave the block"), offload.deferred_init():
        offload.initialize(nn.Linear(200, 200), FP32)


def test_a_meta_model_is_pointed_here() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(OffloadError, match=r"deferred_init"):
        offload.initialize(module, FP32)


def test_what_is_overwritten_is_forgotten() -> None:
    """Drawing a weight again and again keeps one op on its tape, and no copies of what it read."""
    with offload.deferred_init():
        weight = nn.Parameter(torch.empty(150, 150))
        for _ in range(20):
            nn.init.normal_(weight)
            with torch.no_grad():
                weight.copy_(torch.full((150, 150), 2.0))
        nn.init.normal_(weight)
    version = version_of(weight)
    assert version is not None
    origin = version.origin
    assert isinstance(origin, recording.Operation)
    assert [before.origin for before in origin.writes] == [None]
    assert origin.reads == ()


def test_the_table_forgets_dead_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_next_sweep", 0)
    with offload.deferred_init():
        for _ in range(3000):
            torch.empty(20_000)
    gc.collect()
    assert len(recording._table) < 3000


def test_nothing_is_kept_of_what_has_been_placed() -> None:
    """Tapes hold copies of real tensors: a model that is placed needs none of them any more."""
    _, module = both(network)
    with torch.no_grad():
        module[0].weight.copy_(torch.full((150, 200), 2.0))  # the tape keeps a copy of it
    assert version_of(module[0].weight) is not None
    with offload.initialize(module, FP32):
        known = [entry for entry in recording._table.values() if entry.alive.expired()]
        assert known == []


def test_nothing_is_kept_of_what_a_block_has_thrown_away() -> None:
    with offload.deferred_init():
        torch.empty(20_000).copy_(torch.arange(20_000.0))
        kept = nn.Parameter(torch.empty(20_000))
    assert version_of(kept) is not None
    assert not any(entry.alive.expired() for entry in recording._table.values())


def test_real_tensors_among_deferred_ones_are_returned_themselves() -> None:
    plain, deferred = both(network)
    real = torch.ones(2)
    found = materialized([deferred[0].weight, real, deferred[2].weight])
    assert found[1] is real
    assert torch.equal(found[0], plain[0].weight)
    assert torch.equal(found[2], plain[2].weight)
    assert materialized([real])[0] is real


@pytest.mark.parametrize("empty", [(0, 1), (0, 0), (130, 0)], ids=str)
def test_a_random_op_on_an_empty_view_draws_nothing(empty: tuple[int, int]) -> None:
    def build() -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(130, 130))
        with torch.no_grad():
            weight[: empty[0], : empty[1]].normal_()
        return weight

    plain, deferred = both(build)
    assert torch.equal(values(deferred), plain)


def test_a_long_chain_of_ops_is_evaluated() -> None:
    def build() -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(130, 130))
        with torch.no_grad():
            for index in range(3000):
                weight[index % 130] += index
        return weight

    plain, deferred = both(build)
    assert torch.equal(values(deferred), plain)
