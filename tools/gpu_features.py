"""The part "features" of gpu_check.py: what the engine does beside plain training, one by one.

Each check trains tiny models on the device under test, and compares the bits (or, where an op is
computed in another order, the values) of a run that uses the feature with those of one whose state
is all on the device, or that the feature's page says it equals.
"""

from __future__ import annotations

import functools
import math
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOCABULARY = 512
WIDTH = 128
STEPS = 3
# Of sums in another order; a part that is wrong or missing is off by a thousand times as much.
TOLERANCE = 5e-6
HOMES = {
    home: dict.fromkeys(("weights", "gradients", "optimizer"), home)
    for home in ("device", "host", "nvme")
}


class SkippedError(Exception):
    """The check cannot run here; says why."""


@dataclass(frozen=True)
class Where:
    """The device under test, and a directory for NVMe state."""

    device: str
    path: str


@dataclass
class Outcome:
    """What a run has come to."""

    losses: list[float]
    state: dict[str, dict[str, torch.Tensor]]
    report: Any
    notes: dict[str, Any] = field(default_factory=dict)


class Norm(nn.LayerNorm):
    """A layer norm that computes in the dtype of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = super().forward(x.to(self.weight.dtype))
        return normed.to(x.dtype)


class Block(nn.Module):
    """A residual block, recomputed in backward if it is checkpointed."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.norm = Norm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.checkpointed:
            return self.run(x)
        recomputed: torch.Tensor = checkpoint(self.run, x, use_reentrant=False)
        return recomputed

    def run(self, x: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.down(functional.gelu(self.up(self.norm(x))))
        return x + update


class Tiny(nn.Module):
    """Token ids -> logits."""

    def __init__(self, *, checkpointed: bool = False, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(Block(checkpointed=checkpointed) for _ in range(4))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Lora(nn.Module):
    """A frozen linear layer with a trained update of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, base.in_features) / 16)
        self.b = nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain: torch.Tensor = self.base(x)
        return plain + x @ self.a.t() @ self.b.t()


def batch(device: str, number: int = 0) -> torch.Tensor:
    """Token ids of one step."""
    generator = torch.Generator().manual_seed(1 + number)
    return torch.randint(0, VOCABULARY, (4, 64), generator=generator).to(device)


def loss_of(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    """The loss of a model that returns logits, or of one that computes its own."""
    output = model(ids)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def llama() -> Any:
    """A tiny seeded Llama; transformers has to be there."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise SkippedError(f"transformers cannot be imported: {error}") from error
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def configuration(where: Where, home: str, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of one home; the device has room for about half of the tiny model elsewhere."""
    sections = {name: dict(section) for name, section in sections.items()}
    memory = sections.pop("device", {}).get("memory", "64MiB" if home == "device" else "2MiB")
    return {
        "tiers": {
            "device": {"kind": where.device, "memory": memory},
            "host": {"memory": "96MiB"},
            "nvme": {"paths": [where.path]},
        },
        "precision": {"compute": "fp32"},
        "optimizer": {"lr": 1e-3},
        **sections,
        "placement": {**HOMES[home], **sections.get("placement", {})},
    }


def train(
    where: Where,
    home: str,
    model: nn.Module,
    *,
    before_step: Callable[[nn.Module, int], None] | None = None,
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backward: Callable[[Any, int], float] | None = None,
    **sections: Mapping[str, Any],
) -> Outcome:
    """Losses and state after a few steps; `backward` replaces forward and backward of a step."""
    import offload

    losses = []
    with offload.initialize(model, configuration(where, home, **sections)) as engine:
        engine.train()
        for step in range(STEPS):
            if before_step is not None:
                before_step(model, step)
            with around_step():
                if backward is not None:
                    losses.append(backward(engine, step))
                else:
                    loss = loss_of(engine, batch(where.device, step))
                    engine.backward(loss)
                    losses.append(loss.item())
            engine.step()
        state = {
            name: {key: value.cpu().clone() for key, value in fields.items()}
            for name, fields in engine.named_state()
        }
        scale = engine.loss_scale.scale if engine.loss_scale is not None else None
        notes = {"skipped_steps": engine.skipped_steps, "loss_scale": scale}
        return Outcome(losses, state, engine.report(), notes)


def require_equal(found: Outcome, expected: Outcome) -> None:
    """Refuse a run that has not the bits of the other.

    Raises:
        AssertionError: says what differs.
    """
    if not all(math.isfinite(loss) for loss in expected.losses):
        raise AssertionError(f"losses of the reference are not finite: {expected.losses}")
    if found.losses != expected.losses:
        raise AssertionError(f"losses {found.losses}, expected {expected.losses}")
    if found.state.keys() != expected.state.keys():
        raise AssertionError(f"state of {sorted(found.state.keys() ^ expected.state.keys())}")
    for name, fields in expected.state.items():
        if found.state[name].keys() != fields.keys():
            raise AssertionError(f"{name}: has {list(found.state[name])}, expected {list(fields)}")
        for key, value in fields.items():
            if not torch.equal(found.state[name][key], value):
                raise AssertionError(f"{key} of {name} differs")


def require_close(found: Outcome, expected: Outcome) -> dict[str, Any]:
    """Refuse a run whose weights or losses are off by more than rounding; the largest difference.

    Raises:
        AssertionError: says by how much.
    """
    differences = {}
    for name, fields in expected.state.items():
        wanted = fields["master"].double()
        apart = (found.state[name]["master"].double() - wanted).norm() / wanted.norm()
        differences[name] = apart.item()
    losses = zip(found.losses, expected.losses, strict=True)
    for step, (loss, wanted_loss) in enumerate(losses):
        differences[f"loss {step}"] = abs(loss - wanted_loss) / abs(wanted_loss)
    for what, difference in differences.items():
        if not difference <= TOLERANCE:  # also if it is no number, which `max` would pass over
            raise AssertionError(f"the relative difference of {what} is {difference:g}")
    return {"largest_relative_difference": max(differences.values())}


# -- the checks ------------------------------------------------------------------------------------


def activations(where: Where, *, home: str, checkpointed: bool) -> dict[str, Any]:
    """Saved tensors that leave the device come back as they were."""
    expected = train(where, "device", Tiny(checkpointed=checkpointed))
    found = train(
        where,
        "host",
        Tiny(checkpointed=checkpointed),
        placement={"activations": home},
        activations={"min_bytes": 4096, "host_memory": "1MiB" if home == "nvme" else "8MiB"},
    )
    require_equal(found, expected)
    moved = found.report.activations
    if not (moved.moved_bytes and (home == "host" or moved.nvme_peak_bytes)):
        raise AssertionError(f"no activation has gone to {home}: {moved}")
    return {"moved_bytes": moved.moved_bytes}


def tiling(where: Where) -> dict[str, Any]:
    """A head and an embedding that are larger than the whole device budget."""
    vocabulary, budget = 8192, 3 << 20
    sgd = {"name": "sgd", "lr": 1e-2}
    expected = train(where, "device", Tiny(vocabulary=vocabulary), optimizer=sgd)
    model = Tiny(vocabulary=vocabulary)
    if model.head.weight.nbytes <= budget:
        raise AssertionError("the head fits")
    found = train(where, "host", model, optimizer=sgd, device={"memory": budget})
    peak = found.report.tiers["device"].peak_bytes
    if peak > budget:
        raise AssertionError(f"{peak} bytes of {budget} on the device")
    return {**require_close(found, expected), "device_peak_bytes": peak}


def chunked_loss(where: Where) -> dict[str, Any]:
    """The loss of 100 tokens at a time."""
    sgd = {"name": "sgd", "lr": 1e-2}
    expected = train(where, "device", Tiny(), optimizer=sgd)
    chunks = {"loss_chunk_tokens": 100, "lm_head": "head"}
    return require_close(train(where, "host", Tiny(), optimizer=sgd, training=chunks), expected)


def pretrained(where: Where) -> dict[str, Any]:
    """The weights of a file are those of the engine, and give the loss of plain PyTorch."""
    import offload

    model = llama()
    with tempfile.TemporaryDirectory(dir=where.path) as folder:
        model.save_pretrained(folder)
        expected = {name: value.detach().clone() for name, value in model.named_parameters()}
        with offload.from_pretrained(folder, configuration(where, "host")) as engine:
            for name, fields in engine.named_state():
                if not torch.equal(fields["master"].cpu(), expected.pop(name)):
                    raise AssertionError(f"{name} differs from the file")
            with torch.no_grad():
                loss = loss_of(engine, batch(where.device)).item()
    if expected:
        raise AssertionError(f"the engine lacks {list(expected)}")
    with torch.no_grad():
        plain = loss_of(model.eval().to(where.device), batch(where.device)).item()
    apart = abs(loss - plain) / plain
    if not apart <= TOLERANCE:
        raise AssertionError(f"loss {loss}, of plain PyTorch {plain}")
    return {"loss_difference": apart}


def deferred(where: Where) -> dict[str, Any]:
    """A model built without memory is the model built with it."""
    import offload

    with offload.deferred_init():
        model = Tiny()
    require_equal(train(where, "host", model), train(where, "device", Tiny()))
    return {}


def promotion(where: Where) -> dict[str, Any]:
    """What is unfrozen between steps is trained from there on."""

    def thaw(model: nn.Module, step: int) -> None:
        assert isinstance(model, Tiny)
        model.blocks[-1 - step].requires_grad_(True)

    outcomes = []
    for home in ("device", "host", "nvme"):
        model = Tiny()
        model.embedding.requires_grad_(False)
        model.blocks.requires_grad_(False)
        outcomes.append(train(where, home, model, before_step=thaw))
    expected, *others = outcomes
    if "exp_avg" not in expected.state["blocks.1.up.weight"]:
        raise AssertionError("the promoted parameter has no optimizer state")
    for found in others:
        require_equal(found, expected)
    return {}


def peft_lora(where: Where) -> dict[str, Any]:
    """Adapters of peft on a frozen base."""

    def make() -> Any:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise SkippedError(f"peft cannot be imported: {error}") from error
        base = llama()
        return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    require_equal(train(where, "host", make()), train(where, "device", make()))
    return {}


def int8_lora(where: Where) -> dict[str, Any]:
    """Adapters on a base that torchao has quantized."""

    def make() -> nn.Module:
        try:
            from torchao.quantization import (  # type: ignore[import-untyped]
                Int8WeightOnlyConfig,
                quantize_,
            )
        except Exception as error:  # a binary that does not fit this torch raises anything
            raise SkippedError(f"torchao cannot be imported: {error}") from error
        model = Tiny().requires_grad_(False)
        quantize_(model.blocks, Int8WeightOnlyConfig())
        for block in model.blocks:
            assert isinstance(block, Block)
            block.up, block.down = Lora(block.up), Lora(block.down)  # type: ignore[assignment]
        return model

    expected = train(where, "device", make())
    for home in ("host", "nvme"):
        require_equal(train(where, home, make()), expected)
    return {}


def forward_only(where: Where) -> dict[str, Any]:
    """The same noise, wherever the weights are at home."""
    import offload

    outcomes = []
    for home in ("host", "nvme"):
        model = Tiny()
        mezo = {"name": "mezo", "lr": 1e-4}
        weights = {"weights": home, "gradients": "auto", "optimizer": "auto"}
        config = configuration(where, home, optimizer=mezo, placement=weights)
        losses: list[float] = []
        with offload.initialize(model, config) as engine:
            for step in range(STEPS):
                ids = batch(where.device, step)
                engine.step(functools.partial(_dropped_loss, engine, ids))
                assert engine.step_loss is not None
                assert engine.projected_gradient is not None
                losses += [engine.step_loss, engine.projected_gradient]
            state = {n: {k: v.cpu().clone() for k, v in f.items()} for n, f in engine.named_state()}
            outcomes.append(Outcome(losses, state, engine.report()))
    require_equal(*outcomes)
    initial = dict(Tiny().named_parameters())["head.weight"]
    if any(torch.equal(value, initial) for value in outcomes[0].state["head.weight"].values()):
        raise AssertionError("the weights have not moved")
    return {"losses": outcomes[0].losses}


def _dropped_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A loss with random numbers of the device, which both passes have to draw alike."""
    logits = functional.dropout(model(ids), 0.1)
    return functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def keep_fp32(where: Where) -> dict[str, Any]:
    """Norms in fp32 in a model in bf16."""
    precision = {"compute": "bf16", "keep_fp32": ["*norm*"]}
    outcomes = []
    for home in ("device", "host", "nvme"):
        model = Tiny()
        outcomes.append(train(where, home, model, precision=precision))
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if (
            dtypes["blocks.0.norm.weight"] != torch.float32
            or dtypes["head.weight"] != torch.bfloat16
        ):
            raise AssertionError(f"dtypes {dtypes}")
    for found in outcomes[1:]:
        require_equal(found, outcomes[0])
    return {}


def fp16(where: Where) -> dict[str, Any]:
    """A loss scale that overflows at first."""
    precision = {"compute": "fp16", "initial_loss_scale": 2.0**40, "backoff_factor": 2.0**-30}
    outcomes = [train(where, home, Tiny(), precision=precision) for home in ("device", "host")]
    require_equal(outcomes[1], outcomes[0])
    if outcomes[1].notes != outcomes[0].notes or outcomes[0].notes["skipped_steps"] != 1:
        raise AssertionError(f"loss scales: {[outcome.notes for outcome in outcomes]}")
    return outcomes[0].notes


def side_stream(where: Where) -> dict[str, Any]:
    """Forward and backward in a CUDA stream of the user's."""
    if not where.device.startswith("cuda"):
        raise SkippedError("there are no streams without CUDA")
    seen: list[str] = []

    class Aside:
        """A stream of its own, ordered after and before what is around it."""

        def __enter__(self) -> None:
            self.outer = torch.cuda.current_stream()
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(self.outer)
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()

        def __exit__(self, *error: object) -> None:
            self.context.__exit__(*error)
            self.outer.wait_stream(self.stream)

    expected = train(where, "device", Tiny())
    for home in HOMES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = train(where, home, Tiny(), around_step=Aside)
        seen += [str(one.message) for one in caught]
        require_equal(found, expected)
    return {"warnings": sorted(set(seen))}


def two_threads(where: Where) -> dict[str, Any]:
    """Two backward passes at once; a sum of two does not depend on their order."""

    def backward(engine: Any, step: int, *, at_once: bool) -> float:
        losses = [loss_of(engine, batch(where.device, 2 * step + n)) for n in range(2)]
        errors: list[BaseException] = []

        def run(loss: torch.Tensor) -> None:
            try:
                loss.backward()
            except BaseException as error:  # noqa: BLE001 - raised below, in the main thread
                errors.append(error)

        threads = [threading.Thread(target=run, args=(loss,)) for loss in losses]
        for thread in threads:
            thread.start()
            if not at_once:
                thread.join()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return sum(loss.item() for loss in losses)

    fp32 = {"gradient_dtype": "fp32"}
    one_by_one = functools.partial(backward, at_once=False)
    at_once = functools.partial(backward, at_once=True)
    expected = train(where, "device", Tiny(), backward=one_by_one, training=fp32)
    for placement in ({}, {"activations": "nvme"}):
        section = {"min_bytes": 4096, "host_memory": "4MiB"} if placement else {}
        found = train(
            where,
            "host",
            Tiny(),
            backward=at_once,
            training=fp32,
            placement=placement,
            activations=section,
        )
        require_equal(found, expected)
    return {}


CHECKS: Mapping[str, Callable[[Where], dict[str, Any]]] = {
    **{
        f"activations on {home}{', checkpointed' if checkpointed else ''}": functools.partial(
            activations, home=home, checkpointed=checkpointed
        )
        for home in ("host", "nvme")
        for checkpointed in (False, True)
    },
    "tiling": tiling,
    "chunked loss": chunked_loss,
    "from_pretrained": pretrained,
    "deferred_init": deferred,
    "promotion": promotion,
    "LoRA of peft": peft_lora,
    "LoRA on torchao int8": int8_lora,
    "forward only": forward_only,
    "keep_fp32": keep_fp32,
    "fp16": fp16,
    "side stream": side_stream,
    "two threads in backward": two_threads,
}


def run_checks(device: str, path: str) -> dict[str, dict[str, Any]]:
    """Run every check; one that fails does not stop the others. "ok" of a skipped one is None."""
    results: dict[str, dict[str, Any]] = {}
    broken = ""
    for name, check in CHECKS.items():
        if broken:
            results[name] = {"ok": False, "error": f"not run: {broken}"}
            continue
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(dir=path) as own:
                results[name] = {"ok": True, **check(Where(device, str(Path(own))))}
        except SkippedError as reason:
            results[name] = {"ok": None, "skipped": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
            lines = traceback.format_exc().splitlines()
            text = f"{type(error).__name__}: {error}"
            results[name] = {"ok": False, "error": text, "traceback": lines[-12:]}
            broken = _broken(device, name)
        results[name]["seconds"] = round(time.perf_counter() - started, 2)
        print(f"  {name}: {results[name]}", flush=True)
    return results


def _broken(device: str, name: str) -> str:
    """Why nothing runs on the device any more after a check has failed; "" if it does."""
    if not device.startswith("cuda"):
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{name} has broken the device's context: {error}"
    return ""
