"""Quantized frozen bases on any tier: the bytes of torchao, bitsandbytes and any wrapper subclass
move as they are, with their scales, and training gives the numbers of plain PyTorch."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

import offload
from offload.engine.guards import composite, saved
from offload.engine.guards.composite import Composite, find_composites, settle_composites
from offload.errors import CheckpointError, GuardError, OffloadError
from offload.state import export
from tests.oracle import (
    Run,
    assert_close,
    assert_identical,
    continue_engine,
    make_engine,
    settings,
    train_engine,
    train_plain,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning"),
]

TOLERANCE = 1e-6
STEPS = 5
PLACEMENTS = ("device", "host", "nvme", "tight")
WIDTH = 64
VOCABULARY = 64


class Scaled(torch.Tensor):
    """int8 codes with a scale per row. It decides below autograd what ops do, so that autograd
    saves the wrapper itself, where a matmul needs it in backward."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=torch.float32, device=codes.device
        )
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def of(cls, values: torch.Tensor) -> Scaled:
        scale = values.abs().amax(1, keepdim=True) / 127
        return cls((values / scale).round().to(torch.int8), scale)

    def values(self) -> torch.Tensor:
        return self.codes.float() * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: None, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default, aten.clone.default, aten.t.default):
            (weight, *rest) = args
            made = type(weight)(func(weight.codes, *rest), func(weight.scale, *rest))
            return return_and_correct_aliasing(func, args, kwargs, made)
        if func is aten.copy_.default:
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        bare = functools.partial(
            torch.utils._pytree.tree_map_only, Scaled, lambda scaled: scaled.values()
        )
        return func(*bare(args), **bare(kwargs or {}))


class Nested(Scaled):
    """A wrapper whose scale is a wrapper."""


def _codes_of_linear(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(Scaled.of(layer.weight.detach()), requires_grad=False)
    return layer


def _nested_of_linear(layer: nn.Linear) -> nn.Linear:
    scaled = Scaled.of(layer.weight.detach())
    inner = Scaled.of(scaled.scale)
    layer.weight = nn.Parameter(Nested(scaled.codes, inner), requires_grad=False)
    return layer


def _nf4_of_linear(layer: nn.Linear, *, double: bool, storage: torch.dtype) -> nn.Linear:
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
        compress_statistics=double,
        quant_storage=storage,
    )
    made.load_state_dict(layer.state_dict())
    made.to("cpu")
    made.support_avx512bf16_for_cpu = False  # else evaluation repacks the weight, with less bits
    return made


def _int8_of_linear(layer: nn.Linear) -> nn.Linear:
    made = bnb.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def _by_layer(make: Callable[[nn.Linear], nn.Linear]) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        for owner in list(model.modules()):
            for name, child in owner.named_children():
                if type(child) is nn.Linear and name != "lm_head":
                    setattr(owner, name, make(child))

    return apply


def _by_torchao(config: Any) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        quantize_(
            model, config, lambda module, name: type(module) is nn.Linear and "lm" not in name
        )

    return apply


# How a base is quantized, and the inner names of what one layer's weight becomes.
KINDS: dict[str, tuple[Callable[[nn.Module], None], tuple[str, ...]]] = {
    "torchao int8": (_by_torchao(Int8WeightOnlyConfig()), (".qdata", ".scale", ".zero_point")),
    "torchao int8 dynamic": (
        _by_torchao(Int8DynamicActivationInt8WeightConfig()),
        (".qdata", ".scale", ".zero_point"),
    ),
    "torchao int4": (
        _by_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
        (".qdata", ".scale", ".zero_point"),
    ),
    "nf4": (
        _by_layer(functools.partial(_nf4_of_linear, double=False, storage=torch.uint8)),
        ("", ".quant_state.absmax", ".quant_state.code"),
    ),
    "nf4 double": (
        _by_layer(functools.partial(_nf4_of_linear, double=True, storage=torch.uint8)),
        (
            "",
            ".quant_state.absmax",
            ".quant_state.code",
            ".quant_state.offset",
            ".quant_state.state2.absmax",
            ".quant_state.state2.code",
        ),
    ),
    "nf4 in bf16": (
        _by_layer(functools.partial(_nf4_of_linear, double=True, storage=torch.bfloat16)),
        (
            "",
            ".quant_state.absmax",
            ".quant_state.code",
            ".quant_state.offset",
            ".quant_state.state2.absmax",
            ".quant_state.state2.code",
        ),
    ),
    "bitsandbytes int8": (_by_layer(_int8_of_linear), ("", ".SCB")),
    "wrapper": (_by_layer(_codes_of_linear), (".codes", ".scale")),
    "nested wrapper": (
        _by_layer(_nested_of_linear),
        (".codes", ".scale.codes", ".scale.scale"),
    ),
}
EVERY = tuple(KINDS)
SOME = ("torchao int8", "nf4 double", "bitsandbytes int8", "wrapper")


class Lora(nn.Module):
    """Adapters beside a layer, for what peft does not know."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / 8)
        self.lora_b = nn.Parameter(torch.randn(base.out_features, rank) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + (x @ self.lora_a.t()) @ self.lora_b.t()


def make_model(kind: str, checkpointing: str = "off") -> Any:
    """A quantized Llama under seeded adapters that change what the base computes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    )
    if checkpointing != "off":
        enable: Any = model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointing == "reentrant"})
    model.requires_grad_(False)
    KINDS[kind][0](model)
    torch.manual_seed(1)
    if "wrapper" in kind:
        for owner in list(model.modules()):
            for name in ("q_proj", "v_proj", "down_proj"):
                if hasattr(owner, name):
                    setattr(owner, name, Lora(getattr(owner, name)))
    else:
        targets = ["q_proj", "v_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    if checkpointing != "off":
        model.enable_input_require_grads()
    return model.train()


def language_loss(model: Any, index: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(5, VOCABULARY, (2, 16), generator=drawn)
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


# Activations are rounded to int8 here: two runs that differ in the last bit drift apart.
NOT_SMOOTH = ("torchao int8 dynamic",)


@functools.cache
def plain_run(kind: str) -> Run:
    model = make_model(kind)
    run = train_plain(model, language_loss, steps=1 if kind in NOT_SMOOTH else STEPS)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    run.state = {name: state for name, state in run.state.items() if name in trained}
    return run


def config(placement: str, folder: Path, **options: Any) -> dict[str, Any]:
    tier = "nvme" if placement == "tight" else placement
    options.setdefault("bucket_elements", 2048)
    found = settings(tier, folder if tier == "nvme" else None, host=8 << 20, **options)
    if placement == "tight":
        found["tiers"]["device"]["memory"] = options.get("device", tight_bytes())
    return found


@functools.cache
def tight_bytes() -> int:
    """Two largest buckets, which are the embedding and the head, and the largest gradient."""
    plan = offload.plan(make_model("torchao int8"), settings("host", None, bucket_elements=2048))
    return 2 * max(layouts["weights"].nbytes for layouts in plan.layouts) + plan.gradient_bytes


def base_bytes(engine: Any) -> dict[str, torch.Tensor]:
    """The frozen state of an engine, as bytes."""
    found = {}
    for name in engine.parameter_names():
        if "lora" not in name:
            tensor = engine.read_state(name, "weight")
            found[name] = bits(tensor)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def writes_of(engine: Any, *, trainable: bool) -> int:
    """How often chunks of weights have been written to files."""
    store = engine._parts.store
    return sum(
        record.generation
        for bucket in engine.plan.buckets
        if bucket.trainable is trainable
        for record in store.block(bucket.index, "weights").records
    )


@functools.cache
def device_run(kind: str) -> Run:
    """The run that has everything at home on the device."""
    return train_engine(make_model(kind), config("device", Path()), language_loss, steps=STEPS)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", EVERY)
def test_training_is_that_of_plain_pytorch(kind: str, placement: str, tmp_path: Path) -> None:
    with make_engine(make_model(kind), config(placement, tmp_path)) as engine:
        before = base_bytes(engine)
        run = continue_engine(engine, language_loss, steps=STEPS)
        run.report = engine.report()
        assert_same_bytes(base_bytes(engine), before)
        if placement == "nvme":
            assert writes_of(engine, trainable=True) > 0
            assert writes_of(engine, trainable=False) == writes_at_start(engine)
    assert_identical(run, device_run(kind))
    if kind in NOT_SMOOTH:
        first = train_engine(make_model(kind), config("host", tmp_path), language_loss, steps=1)
        assert_close(first, plain_run(kind), tolerance=TOLERANCE)
    else:
        assert_close(run, plain_run(kind), tolerance=TOLERANCE)
    device = run.report.tiers["device"]
    assert device.peak_bytes <= device.budget_bytes


def writes_at_start(engine: Any) -> int:
    store = engine._parts.store
    return sum(
        len(store.block(bucket.index, "weights").records)
        for bucket in engine.plan.buckets
        if not bucket.trainable
    )


@pytest.mark.parametrize("kind", [kind for kind in EVERY if "torchao" in kind or "wrapper" in kind])
def test_wrappers_that_follow_their_parts_to_another_device_train_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an accelerator each wrapper is made anew over its parts; here that is forced."""
    settle = Composite.settle
    rebuilt = []

    def settle_elsewhere(each: Composite, device: torch.device) -> None:
        for wrapper in each.wrappers:
            rebuilt.append(wrapper)
            composite._rebuild(wrapper)
        settle(each, device)

    monkeypatch.setattr(Composite, "settle", settle_elsewhere)
    run = train_engine(make_model(kind), config("host", tmp_path), language_loss, steps=STEPS)
    assert rebuilt
    assert_identical(run, device_run(kind))


@pytest.mark.parametrize("kind", EVERY)
def test_parts_page_as_the_bytes_they_are(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    plain = make_model(kind)
    name = "layers.0.self_attn.k_proj.weight"
    full = next(n for n, _ in model.named_parameters() if n.endswith(name))
    with make_engine(model, config("host", tmp_path, precision={"compute": "bf16"})) as engine:
        parts = [n for n in engine.parameter_names() if n.startswith(full)]
        assert tuple(part.removeprefix(full) for part in parts) == KINDS[kind][1]
        for part in parts:
            expected: Any = plain
            for attribute in part.split("."):
                expected = getattr(expected, attribute)
            (dtype, shape) = engine.state_fields(part)["weight"]
            assert (dtype, shape) == (expected.dtype, tuple(expected.shape)), part
            assert torch.equal(engine.read_state(part, "weight"), expected), part
        weight = functools.reduce(getattr, full.split("."), plain)
        stored = sum(engine.read_state(part, "weight").nbytes for part in parts)
        assert stored < 0.6 * 2 * WIDTH * WIDTH, "far from the bytes of bf16"
        assert isinstance(weight, nn.Parameter)


@pytest.mark.parametrize("checkpointing", ["reentrant", "not_reentrant"])
@pytest.mark.parametrize("kind", SOME)
def test_gradient_checkpointing(kind: str, checkpointing: str, tmp_path: Path) -> None:
    model = make_model(kind, checkpointing)
    run = train_engine(model, config("tight", tmp_path), language_loss, steps=STEPS)
    assert_close(run, plain_run(kind), tolerance=TOLERANCE)


@pytest.mark.parametrize("kind", SOME)
def test_evaluation_between_steps(kind: str, tmp_path: Path) -> None:
    """Evaluation, generation and inference_mode give plain PyTorch's numbers, and change none."""
    tokens = torch.arange(5, 17).view(1, -1)

    def look(model: Any, call: Any) -> list[torch.Tensor]:
        model.eval()
        with torch.inference_mode():
            seen = [call(input_ids=tokens).logits.clone()]
        with torch.no_grad():
            seen.append(call(input_ids=tokens).logits)
            seen.append(model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False))
        model.train()
        return seen

    model, plain = make_model(kind), make_model(kind)
    expected = look(plain, plain)
    with make_engine(model, config("tight", tmp_path)) as engine:
        for found, wanted in zip(look(model, engine), expected, strict=True):
            assert torch.equal(found, wanted)
        run = continue_engine(engine, language_loss, steps=2)
        look(model, engine)
        rest = continue_engine(engine, language_loss, steps=STEPS - 2)
    rest.losses, rest.norms = run.losses + rest.losses, run.norms + rest.norms
    assert_identical(rest, device_run(kind))


def weight_of(model: nn.Module) -> tuple[str, Any]:
    """A quantized weight without adapters on it."""
    return next((n, p) for n, p in model.named_parameters() if n.endswith("0.mlp.up_proj.weight"))


def values_of(kind: str, weight: Any) -> torch.Tensor:
    """What the codes of a weight stand for, through its library."""
    if "nf4" in kind:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "bitsandbytes int8":
        return weight.data.float() * weight.SCB.view(-1, 1) / 127
    return weight.values() if "wrapper" in kind else weight.dequantize()


def send_home(engine: Any) -> None:
    """Evict every page, as the rest of a larger model would."""
    pager = engine._parts.pager
    for page in list(pager._present):
        pager._evict(page)


def plain_parts(weight: Any) -> list[torch.Tensor]:
    """The tensors inside a wrapper, or the memory of any other weight."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight.data]
    inner = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [part for tensor in inner for part in plain_parts(tensor)]


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_read_and_copied_is_true(kind: str, tmp_path: Path) -> None:
    plain, model = make_model(kind), make_model(kind)
    name, expected = weight_of(plain)
    wanted = values_of(kind, expected)
    entries = plain.state_dict()
    with make_engine(model, config("nvme", tmp_path)) as engine:
        _, weight = weight_of(model)
        assert torch.equal(values_of(kind, weight), wanted)
        x = torch.randn(3, WIDTH)
        send_home(engine)
        if "torchao" in kind or "wrapper" in kind:
            assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, expected))
        if "wrapper" in kind:
            assert torch.equal(x @ weight.t(), x @ expected.t())
            send_home(engine)
            with torch._C.DisableTorchFunctionSubclass():  # then only dispatch sees the guard
                assert torch.equal(torch.mm(x, weight.t()), torch.mm(x, expected.t()))
        copied = copy.deepcopy(model)
        assert type(weight_of(copied)[1]) is type(expected)
        with io.BytesIO() as file:
            torch.save(model.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=False)
        states = engine.state_dict()
        with engine.gathered(name):
            assert type(weight) is type(expected)
            assert torch.equal(values_of(kind, weight), wanted)
    # What was copied is not the engine's, and outlives it.
    assert torch.equal(values_of(kind, weight_of(copied)[1]), wanted)
    for found in (states, saved):
        assert list(found) == list(entries)
        for key, entry in entries.items():
            assert type(found[key]) in (type(entry), torch.Tensor), key
            for one, other in zip(plain_parts(found[key]), plain_parts(entry), strict=True):
                assert one.dtype == other.dtype, key
                assert torch.equal(bits(one), bits(other)), key


@pytest.mark.parametrize("kind", SOME)
def test_checkpoints_hold_the_base(kind: str, tmp_path: Path) -> None:
    """A checkpoint resumes to the bit, whatever base the new engine started from."""
    with make_engine(make_model(kind), config("host", tmp_path)) as engine:
        continue_engine(engine, language_loss, steps=2)
        engine.save_checkpoint(tmp_path / "saved")
        before = base_bytes(engine)
        expected = continue_engine(engine, language_loss, steps=2)
    with make_engine(make_model(kind), config("nvme", tmp_path)) as engine:
        for name in before:
            engine.write_state(name, "weight", torch.ones_like(engine.read_state(name, "weight")))
        engine.load_checkpoint(tmp_path / "saved")
        assert_same_bytes(base_bytes(engine), before)
        assert_identical(continue_engine(engine, language_loss, steps=2), expected)


@pytest.mark.parametrize("kind", SOME)
def test_loading_a_state_dict_replaces_the_base(kind: str, tmp_path: Path) -> None:
    entries, model = make_model(kind).state_dict(), make_model(kind)
    for name, parameter in model.named_parameters():
        if "mlp.up_proj" in name:  # another base to start with
            for part in plain_parts(parameter):
                part.copy_(part + 1)
    with make_engine(model, config("nvme", tmp_path)) as engine:
        engine.load_state_dict(entries, strict=False)
        run = continue_engine(engine, language_loss, steps=STEPS)
    assert_identical(run, device_run(kind))


def test_an_export_of_codes_is_refused(tmp_path: Path) -> None:
    model = make_model("wrapper")
    with make_engine(model, config("host", tmp_path)) as engine:
        with pytest.raises(CheckpointError, match=r"(?s)q_proj.*quantized.*adapters"):
            engine.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        saved = engine.save_checkpoint(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="quantized"):
        export.export_checkpoint(saved, tmp_path / "out")


def test_adapters_are_saved_as_peft_does(tmp_path: Path) -> None:
    plain, model = make_model("nf4 double"), make_model("nf4 double")
    plain.save_pretrained(str(tmp_path / "plain"))
    with make_engine(model, config("tight", tmp_path)) as engine:
        engine.save_pretrained(tmp_path / "paged")
    found, expected = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("paged", "plain")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_quantizing_after_initialize_is_an_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    with make_engine(model, config("host", tmp_path)) as engine:
        engine(torch.ones(2, WIDTH))
        quantize_(model, Int8WeightOnlyConfig())
        with pytest.raises(GuardError, match=r"0\.weight was replaced"):
            engine(torch.ones(2, WIDTH))


@pytest.mark.parametrize("kind", ["torchao int8", "wrapper", "nf4"])
def test_exchanging_a_quantized_weight_is_an_error(kind: str, tmp_path: Path) -> None:
    model, other = make_model(kind), make_model(kind)
    name, _ = weight_of(model)
    with make_engine(model, config("host", tmp_path)) as engine:
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.weight = weight_of(other)[1]
        with pytest.raises(GuardError, match=r"up_proj\.weight.*was replaced"):
            language_loss(engine, 0)


def test_a_wrapper_that_is_trained_is_an_error() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    model.weight = nn.Parameter(Scaled.of(model.weight.detach()))
    with pytest.raises(OffloadError, match=r"weight is a Scaled that requires gradients"):
        make_engine(model, settings("host"))


@pytest.mark.parametrize("reason", ["codes is a", "inference_mode", "another tensor each time"])
def test_what_cannot_be_paged_stays_with_its_reason(reason: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    scaled: Any = Scaled.of(model[0].weight.detach())
    if reason == "codes is a":
        scaled.codes = scaled.codes.to_sparse()
    elif reason == "inference_mode":
        with torch.inference_mode():
            scaled.scale = scaled.scale.clone()
    else:
        scaled.__class__ = type(
            "Fresh",
            (Scaled,),
            {
                "fresh": property(lambda self: self.scale.clone()),
                "__tensor_flatten__": lambda self: (["codes", "fresh"], None),
            },
        )
    scaled._is_param = True
    model[0].weight = scaled
    with pytest.warns(UserWarning, match=rf"0\.weight.*{reason}") as caught:
        engine = make_engine(model, config("host", tmp_path))
    assert len(caught) == 1
    with engine:
        assert engine.report().tiers["device"].used_bytes >= WIDTH * WIDTH


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4", "wrapper", "nested wrapper"])
def test_proven_weights_wear_their_own_class(kind: str, tmp_path: Path) -> None:
    """After the first step nothing watches them while their module runs: ops cost nothing."""
    model, worn = make_model(kind), []
    name, weight = weight_of(model)
    layer = model.get_submodule(name.rpartition(".")[0])
    layer.register_forward_pre_hook(lambda module, _: worn.append(type(module.weight)))
    own = type(weight)
    with make_engine(model, config("tight", tmp_path)) as engine:
        run = continue_engine(engine, language_loss, steps=STEPS)
        assert type(weight) is not own, "guarded outside"
    assert worn[0] is not own
    assert set(worn[1:]) == {own}
    assert_identical(run, device_run(kind))


@pytest.mark.parametrize("kind", ["torchao int8", "nf4 double", "wrapper", "bitsandbytes int8"])
def test_backward_finds_evicted_weights(kind: str, tmp_path: Path) -> None:
    """Everything of the base has left between forward and backward."""
    with make_engine(make_model(kind), config("tight", tmp_path)) as engine:
        run = Run()
        for index in range(STEPS):
            loss = language_loss(engine, index)
            send_home(engine)
            engine.backward(loss)
            run.losses.append(loss.item())
            engine.step()
    assert run.losses == device_run(kind).losses


def test_an_edit_between_forward_and_backward_raises(tmp_path: Path) -> None:
    """Where autograd has saved the wrapper, as in plain PyTorch."""

    def edited(model: Any, call: Any) -> torch.Tensor:
        loss = language_loss(call, 2)
        _, weight = weight_of(model)
        with torch.no_grad():
            weight.copy_(weight.detach().clone())
        return loss

    plain, model = make_model("wrapper"), make_model("wrapper")
    with pytest.raises(RuntimeError, match=r"modified by an inplace"):
        edited(plain, plain).backward()
    with make_engine(model, config("tight", tmp_path)) as engine:
        continue_engine(engine, language_loss, steps=2)
        loss = edited(model, engine)
        with pytest.raises(RuntimeError, match=r"modified by an inplace.*up_proj"):
            engine.backward(loss)


@pytest.mark.parametrize("kind", ["wrapper", "nf4 in bf16"])
def test_unfreezing_a_quantized_weight_is_an_error(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    _, weight = weight_of(model)
    with make_engine(model, config("host", tmp_path)) as engine:
        continue_engine(engine, language_loss, steps=1)
        weight.requires_grad_(True)
        with pytest.raises(OffloadError, match=r"up_proj\.weight.*requires gradients"):
            language_loss(engine, 1)
        weight.requires_grad_(False)
        continue_engine(engine, language_loss, steps=1)


def test_one_quantized_weight_in_two_layers_is_stored_once(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]
        quantize_(layers[0], Int8WeightOnlyConfig())
        layers[2].weight = layers[0].weight
        return nn.Sequential(*layers)

    def loss_of(model: Any, index: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(index)
        return model(torch.randn(4, WIDTH, generator=drawn)).square().mean()

    runs = []
    for tier in ("device", "host", "nvme"):
        cfg = settings(tier, tmp_path if tier == "nvme" else None, bucket_elements=1024)
        cfg["tiers"]["device"]["memory"] = 64 << 20 if tier == "device" else 48 << 10
        with make_engine(make(), cfg) as engine:
            names = [n for n in engine.parameter_names() if n != "1.weight"]
            assert names == ["0.weight.qdata", "0.weight.scale", "0.weight.zero_point"]
            assert engine.aliases()["2.weight.qdata"] == "0.weight.qdata"
            runs.append(continue_engine(engine, loss_of, steps=3))
    for run in runs[1:]:
        assert_identical(run, runs[0])


def test_tables_that_weights_share_stay(tmp_path: Path) -> None:
    """What two wrappers have in common is no part of either, and nothing warns."""
    torch.manual_seed(0)
    layers = [_codes_of_linear(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(2)]
    shared = layers[0].weight.scale
    layers[1].weight.scale = shared
    model = nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))
    x = torch.randn(2, WIDTH)
    expected = model(x)
    with make_engine(model, config("nvme", tmp_path)) as engine:
        assert torch.equal(engine(x), expected)
        assert [n for n in engine.parameter_names() if n.endswith("scale")] == []
        assert type(shared) is torch.Tensor


def test_a_subclass_of_torchs_own_tests(tmp_path: Path) -> None:
    """It compares the classes of arguments and results, as `return_and_correct_aliasing` does."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(2)]
    for layer in layers:
        pair = TwoTensor(layer.weight.detach(), layer.weight.detach() * 2)
        layer.weight = nn.Parameter(pair, requires_grad=False)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers)
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        expected = model(x)
    with make_engine(model, config("nvme", tmp_path, device=60 << 10)) as engine:
        for _ in range(3):
            with torch.no_grad():
                found = engine(x)
            assert torch.equal(found.a, expected.a)
            assert torch.equal(found.b, expected.b)
        turned = layers[1].weight.t()
        assert type(turned) is not TwoTensor, "a view of what may leave is guarded"
        assert type(turned.clone()) is TwoTensor
        with torch.no_grad():
            assert torch.equal((x @ turned).b, (x @ layers[1].weight.clone().t()).b)


def test_a_wrapper_is_taken_apart_once_to_be_checked_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts it has: `__tensor_flatten__` is the user's, and may take its time."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), _codes_of_linear(nn.Linear(WIDTH, WIDTH)))
    flatten, flattened = Scaled.__tensor_flatten__, []

    def counted(self: Scaled) -> tuple[list[str], None]:
        flattened.append(self)
        return flatten(self)

    with make_engine(model, config("host", tmp_path)) as engine:
        monkeypatch.setattr(Scaled, "__tensor_flatten__", counted)
        engine._places.check()
        assert len(flattened) == 1
        packed = saved._pack_page(model[1].weight)
        assert isinstance(packed, saved.SavedWrapper)
        assert len(flattened) == 2


@pytest.mark.parametrize("make", [_codes_of_linear, _nested_of_linear])
def test_wrappers_follow_their_parts_to_another_device(make: Any) -> None:
    torch.manual_seed(0)
    layer = make(nn.Linear(WIDTH, WIDTH))
    weight = layer.weight
    composites, _ = find_composites({"weight": weight}, layer)
    (found,) = composites.values()
    for part in found.parts:
        torch.utils.swap_tensors(part.tensor, part.tensor.to("meta"))
    settle_composites([found], layer, torch.device("meta"))
    assert layer.weight is weight
    assert weight.device.type == "meta"
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert found.is_whole()


def test_a_frozen_dtensor_pages_its_local_tensor(tmp_path: Path) -> None:
    """A wrapper that names more than tensors: its mesh."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class OnMesh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            for name, parameter in list(self.second.named_parameters()):
                spread = distribute_tensor(parameter.detach(), mesh, [Replicate()])
                setattr(self.second, name, nn.Parameter(spread, requires_grad=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = DTensor.from_local(self.first(x), mesh, [Replicate()])
            return self.second(hidden).to_local()

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        torch.manual_seed(0)
        model = OnMesh()
        plain = copy.deepcopy(model)
        rule = torch.optim.SGD(plain.first.parameters(), lr=0.1)
        cfg = config("nvme", tmp_path, device=48 << 10, optimizer={"name": "sgd", "lr": 0.1})
        with make_engine(model, cfg) as engine:
            assert "second.weight._local_tensor" in engine.parameter_names()
            for _ in range(3):
                x = torch.randn(4, WIDTH)
                expected, found = plain(x).square().mean(), engine(x).square().mean()
                assert abs(found.item() - expected.item()) <= TOLERANCE * abs(expected.item())
                rule.zero_grad()
                expected.backward()
                rule.step()
                send_home(engine)
                engine.backward(found)
                engine.step()
    finally:
        distributed.destroy_process_group()
