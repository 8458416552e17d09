"""The oracle of the engine's tests: models, a plain PyTorch training loop, and the bf16 rule.

Nothing here but `make_engine` and `train_engine` knows the engine: the plain loops are written from
PyTorch's documentation, so that a mistake in the engine is not repeated in its yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload
from offload.config import OffloadConfig
from offload.partition.layout import ParamSpec, pack

Model = Callable[[], nn.Module]
Loss = Callable[[Any, int], torch.Tensor]
State = dict[str, dict[str, torch.Tensor]]

# Gradients that are zero in exact arithmetic (a key bias: softmax ignores a shift) are rounding
# noise. Adam divides noise by its own size, so both sides use an epsilon that is larger than it.
EPS = 1e-6
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": EPS, "weight_decay": 0.1}

_SIZES = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 4}


@dataclass(slots=True)
class Run:
    """What a training run leaves behind: the loss of every micro-batch, norms, and the state."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    state: State = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    report: Any = None
    plan: Any = None


def make_engine(
    model: nn.Module, config: Mapping[str, Any] | OffloadConfig, **factories: Any
) -> Any:
    """The engine under test."""
    return offload.initialize(model, config, **factories)


def small_llama(depth: int = 2, *, seed: int = 0) -> Any:
    """A Llama of which each layer can be a bucket, with seeded weights."""
    import transformers

    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, intermediate_size=128, num_hidden_layers=depth)
    )


def transformers_model(name: str, checkpointing: str = "off") -> nn.Module:
    """A tiny model with seeded weights; `checkpointing` is off, reentrant or not_reentrant."""
    import transformers

    configs: dict[str, Callable[[], nn.Module]] = {
        "llama": small_llama,
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=64,
                n_layer=2,
                n_head=4,
                n_positions=64,
                vocab_size=256,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                **_SIZES, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=64
            )
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=64,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                d_kv=16,
                vocab_size=256,
                decoder_start_token_id=0,
            )
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **_SIZES,
                intermediate_size=64,
                num_hidden_layers=2,
                num_key_value_heads=2,
                num_local_experts=4,
            )
        ),
    }
    torch.manual_seed(0)
    model = configs[name]()
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and not parameter.any():
                parameter.normal_(std=0.02)  # else a bias is nothing but its first updates
    if checkpointing != "off":
        enable: Any = model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointing == "reentrant"})
    return model


def language_loss(model: Any, index: int) -> torch.Tensor:
    """The loss of micro-batch number `index`; dropout draws the same numbers on every side."""
    drawn = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(5, 256, (2, 16), generator=drawn)
    torch.manual_seed(index)
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def small_model() -> nn.Module:
    """Three linear layers with norms behind an embedding; seconds to train in any placement."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Embedding(64, 32)]
    for _ in range(3):
        layers += [nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(32, 64))


def small_loss(model: Any, index: int) -> torch.Tensor:
    """Next-token loss of a model from tokens to logits."""
    drawn = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, 64, (4, 8), generator=drawn)
    logits = model(tokens).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1).flatten())


def two_buckets_bytes(
    model: nn.Module, *, itemsize: int, bucket_elements: int, buckets: int = 2
) -> int:
    """The smallest device budget for paged weights: two largest buckets and a largest gradient.

    An op that takes more buckets needs more of them: `buckets`.
    """
    specs = [
        ParamSpec(
            name,
            tuple(p.shape),
            p.numel() * (2 if p.is_complex() else 1),
            "bf16" if itemsize == 2 else "fp32",
            itemsize,
            p.requires_grad,
        )
        for name, p in model.named_parameters()
    ]
    pages = sorted(bucket.nbytes for bucket in pack(specs, bucket_elements=bucket_elements))
    gradient = max(spec.nbytes for spec in specs if spec.trainable)
    return sum(-(-page // 4096) * 4096 for page in pages[-buckets:]) + gradient


def settings(
    tier: str,
    directory: Path | None = None,
    *,
    compute: str = "fp32",
    device: int = 64 << 20,
    host: int = 64 << 20,
    bucket_elements: int = 4096,
    **sections: Mapping[str, Any],
) -> dict[str, Any]:
    """A configuration with all state in one tier; `sections` override what they name.

    A section with a `name` replaces all that there is.
    """
    config: dict[str, dict[str, Any]] = {
        "tiers": {
            "device": {"kind": "cpu", "memory": device},
            "host": {"memory": host},
            **({"nvme": {"paths": [str(directory)]}} if directory else {}),
        },
        "placement": dict.fromkeys(("weights", "gradients", "optimizer"), tier),
        "precision": {"compute": compute},
        "optimizer": {"name": "adamw", **ADAMW},
        "partition": {"bucket_elements": bucket_elements},
        "io": {"retries": 0},  # a test that injects one error means it to be seen
    }
    for name, section in sections.items():
        inherited = {} if "name" in section else config.get(name, {})
        config[name] = {**inherited, **section}
    return config


def train_engine(
    model: nn.Module, config: Mapping[str, Any], loss_of: Loss, *, steps: int = 10, **factories: Any
) -> Run:
    """Train under the engine and close it."""
    with make_engine(model, config, **factories) as engine:
        run = continue_engine(engine, loss_of, steps=steps)
        run.report, run.plan = engine.report(), engine.plan
    return run


def continue_engine(engine: Any, loss_of: Loss, *, steps: int) -> Run:
    """Train an engine on; micro-batches are numbered from its start."""
    run = Run()
    target = engine.global_steps + engine.skipped_steps + steps
    while engine.global_steps + engine.skipped_steps < target:
        loss = loss_of(engine, engine.micro_steps)
        engine.backward(loss)
        run.losses.append(loss.item())
        if engine.step():
            run.norms.append(engine.grad_norm)
    run.state = dict(engine.named_state())
    run.steps = engine.parameter_steps()
    return run


def train_plain(
    model: nn.Module,
    loss_of: Loss,
    *,
    steps: int = 10,
    accumulation: int = 1,
    max_norm: float = 0.0,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[Any], Any] | None = None,
) -> Run:
    """The plain PyTorch loop in fp32."""
    run = Run()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rule = optimizer(parameters) if optimizer else _adamw(parameters)
    schedule = scheduler(rule) if scheduler else None
    for step in range(steps):
        for micro in range(accumulation):
            loss = loss_of(model, step * accumulation + micro)
            (loss / accumulation).backward()
            run.losses.append(loss.item())
        present = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([_values(p.grad) for p in present])
        torch.nn.utils.clip_grads_with_norm_(present, max_norm or torch.inf, norm)
        run.norms.append(norm.item())
        rule.step()
        rule.zero_grad()
        if schedule is not None:
            schedule.step()
    for name, parameter in model.named_parameters():
        run.state[name] = {"weight": parameter.detach().clone()} | {
            key: value.clone()
            for key, value in rule.state.get(parameter, {}).items()
            if torch.is_tensor(value) and value.ndim
        }
    return run


def _values(gradient: Any) -> torch.Tensor:
    """The elements that count: a sparse gradient has no norm of its own."""
    values: torch.Tensor = gradient.coalesce().values() if gradient.is_sparse else gradient
    return values


class LockStep:
    """Plain AdamW beside an engine: every step starts from the engine's own state.

    Two bf16 runs that differ in one rounding drift apart, because bf16 arithmetic turns one
    flipped bit into another gradient. Set to the engine's state before each step, the plain model
    must give the same loss and the same gradients bit for bit, and the same update within fp32
    rounding.
    """

    def __init__(self, model: nn.Module, engine: Any) -> None:
        self.model = model
        self.engine = engine
        self._accumulation = engine.config.training.gradient_accumulation_steps
        self._bf16 = engine.config.precision.compute == "bf16"
        self._named = dict(model.named_parameters())
        self._masters = {name: p.detach().clone() for name, p in self._named.items()}
        self._rule = _adamw(self._masters.values())
        if self._bf16:
            _compute_in_bf16(model)

    def step(self, loss_of: Loss, *, tolerance: float) -> float:
        """Take one step on both sides and compare what there is to compare.

        Returns the largest difference of a master or moment, which is at most `tolerance`.
        """
        self._adopt(dict(self.engine.named_state()))
        for _ in range(self._accumulation):
            index = self.engine.micro_steps
            loss = loss_of(self.model, index)
            (loss / self._accumulation).backward()
            self._collect()
            found = loss_of(self.engine, index)
            assert found.item() == loss.item()
            self.engine.backward(found)
            before = dict(self.engine.named_state())
            taken = self.engine.step()
        assert taken
        for name, master in self._masters.items():
            assert ("gradient" in before[name]) == (master.grad is not None), name
            if master.grad is not None:
                assert torch.equal(before[name]["gradient"].float(), master.grad), name
        self._rule.step()
        differences = [0.0]
        for name, tensors in self.engine.named_state():
            master = self._masters[name]
            weight = round_half_up(tensors["master"]) if self._bf16 else tensors["master"]
            assert torch.equal(tensors["weight"], weight), name
            expected = {"master": master, **self._rule.state[master]}
            for key in ("master", "exp_avg", "exp_avg_sq"):
                if key in expected:
                    difference = relative_difference(tensors[key], expected[key])
                    assert difference <= tolerance, (name, key)
                    differences.append(difference)
        self._rule.zero_grad()
        return max(differences)

    def _adopt(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self._named.items():
                master = self._masters[name]
                master.copy_(state[name]["master"])
                parameter.copy_(state[name]["weight"])
                for key, tensor in self._rule.state[master].items():
                    if key != "step":
                        tensor.copy_(state[name][key])

    def _collect(self) -> None:
        for name, parameter in self._named.items():
            if parameter.grad is not None:
                arrived = parameter.grad.float()
                kept = self._masters[name].grad
                self._masters[name].grad = arrived if kept is None else kept + arrived
                parameter.grad = None


def _compute_in_bf16(model: nn.Module) -> None:
    """Weights and the buffers of the state dict in bf16; computed tables stay as they are."""
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            stays = name in owner._non_persistent_buffers_set
            if buffer is not None and buffer.is_floating_point() and not stays:
                owner._buffers[name] = buffer.to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = round_half_up(parameter.data)


def round_half_up(values: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16: to the nearer, and from the middle away from zero (up in the bit pattern)."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    high = ((bits + 0x8000) >> 16) & 0xFFFF
    return high.to(torch.uint16).view(torch.bfloat16).view(values.shape)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), foreach=False, **ADAMW)


def assert_identical(found: Run, expected: Run) -> None:
    """Every loss, step count and tensor is the same, bit for bit."""
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    assert found.steps == expected.steps
    assert_same_state(found.state, expected.state)


def assert_same_state(found: State, expected: State) -> None:
    """Every tensor is the same, bit for bit."""
    assert list(found) == list(expected)
    for name, tensors in expected.items():
        assert list(found[name]) == list(tensors), name
        for key, tensor in tensors.items():
            assert found[name][key].dtype == tensor.dtype, (name, key)
            assert torch.equal(_bits(found[name][key]), _bits(tensor)), (name, key)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm, in fp64."""
    kind = torch.complex128 if expected.is_complex() else torch.float64
    difference = (found.to(kind) - expected.to(kind)).norm().item()
    return difference / max(expected.to(kind).norm().item(), 1e-30) if difference else 0.0


def assert_close(found: Run, expected: Run, *, tolerance: float, key: str = "weight") -> None:
    """Losses and the tensors called `key` agree within `tolerance`, norm-relative."""
    for one, other in zip(found.losses, expected.losses, strict=True):
        assert abs(one - other) <= tolerance * abs(other), (found.losses, expected.losses)
    for name, tensors in expected.state.items():
        difference = relative_difference(found.state[name][key], tensors[key])
        assert difference <= tolerance, (name, difference)
