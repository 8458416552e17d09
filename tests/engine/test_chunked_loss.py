"""Loss in chunks of tokens: the numbers of the whole logits, which never exist at once."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import offload
from offload.engine.loss.lazy_logits import LazyHead, LazyLogits
from offload.errors import ConfigError, GuardError
from tests.oracle import (
    Run,
    assert_close,
    assert_identical,
    continue_engine,
    make_engine,
    relative_difference,
    settings,
    train_engine,
    train_plain,
    transformers_model,
)

VOCABULARY, WIDTH, CHUNK = 256, 64, 16
ROWS, COLUMNS = 3, 50  # of tokens; no multiple of a chunk
WIDE = 1_000  # a vocabulary beside which other activations are small


class LiveLogits(TorchDispatchMode):
    """Counts the elements of floating tensors as wide as the vocabulary, as ops make them.

    Attributes:
        largest: of one tensor.
        together: most at one time, memory that tensors share counted once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.together = 0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and _are_logits(made):
                self._made.append(weakref.ref(made))
                self.largest = max(self.largest, made.numel())
        live = {made.data_ptr(): made.numel() for ref in self._made if (made := ref()) is not None}
        self.together = max(self.together, sum(live.values()))
        return result


def _are_logits(made: torch.Tensor) -> bool:
    is_real = made.is_floating_point() and not made.is_meta
    is_weight = made.shape == (WIDTH, WIDE)  # the head's, transposed
    return is_real and made.dim() > 1 and made.shape[-1] == WIDE and not is_weight


class Custom(nn.Module):
    """A model of no library: its loss has class weights, label smoothing and a temperature."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, vocabulary)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("balance", torch.linspace(0.5, 1.5, vocabulary))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = 2 * (self.out(self.norm(self.embed(input_ids))) / self.temperature).double()
        logits = logits.float()[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(
            logits,
            labels[:, 1:].flatten(),
            weight=self.balance,
            label_smoothing=0.1,
            ignore_index=7,
        )
        return type("Output", (), {"loss": loss, "logits": logits})


def gemma2() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    )
    return transformers.Gemma2ForCausalLM(config).train()


def custom() -> nn.Module:
    torch.manual_seed(0)
    return Custom()


def gpt2() -> nn.Module:
    model = transformers_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers_model("llama"),
    "gemma2": gemma2,
    "gpt2": gpt2,
    "mixtral": lambda: transformers_model("mixtral"),
    "custom": custom,
}


def tokens_of(index: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(1000 + index)
    return torch.randint(5, VOCABULARY, (ROWS, COLUMNS), generator=drawn)


def loss_of(model: Any, index: int) -> torch.Tensor:
    tokens = tokens_of(index)
    labels = tokens.clone()
    labels[0, :9] = 7 if isinstance(getattr(model, "module", model), Custom) else -100
    loss: torch.Tensor = model(input_ids=tokens, labels=labels).loss
    return loss


def chunked(name: str, tokens: int = CHUNK) -> dict[str, Any]:
    head = {"lm_head": "out"} if name == "custom" else {}
    return {"loss_chunk_tokens": tokens, **head}


def engine_of(name: str, tier: str = "host", path: Path | None = None, **sections: Any) -> Any:
    config = settings(tier, path, training=chunked(name), **sections)
    return make_engine(MODELS[name](), config)


@pytest.mark.parametrize("name", list(MODELS))
def test_chunks_give_the_numbers_of_the_whole(name: str, tmp_path: Path) -> None:
    plain = train_plain(MODELS[name](), loss_of, steps=3)
    run = train_engine(
        MODELS[name](), settings("nvme", tmp_path, training=chunked(name)), loss_of, steps=3
    )
    assert_close(run, plain, tolerance=1e-6)


def widened(name: str) -> nn.Module:
    if name == "custom":
        return Custom(WIDE)
    model: Any = MODELS[name]()
    model.resize_token_embeddings(WIDE)
    return model


@pytest.mark.parametrize("name", list(MODELS))
def test_the_logits_never_exist_at_once(name: str) -> None:
    seen = {}
    for kind, training in (("whole", {}), ("chunks", chunked(name))):
        config = settings("host", training=training)
        with make_engine(widened(name), config) as engine, LiveLogits() as seen[kind]:
            engine.backward(loss_of(engine, 0))
    whole = ROWS * (COLUMNS - 1) * WIDE
    assert seen["whole"].together > seen["whole"].largest >= whole
    assert seen["chunks"].largest == CHUNK * WIDE
    assert seen["chunks"].together <= 7 * CHUNK * WIDE < whole


def test_gradients_of_each_reduction() -> None:
    given = torch.randn(ROWS * COLUMNS, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY)
    target = tokens_of(0).flatten()
    target[::5] = -100
    cases: list[dict[str, Any]] = [
        {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}
        for reduction in ("mean", "sum", "none")
        for smoothing in (0.0, 0.2)
        for weight in (None, torch.rand(VOCABULARY))
    ]
    for options in cases:
        gradients = []
        for logits in (head(given), lazy(head, given)):
            loss = functional.cross_entropy(logits, target, **options)
            sent = torch.linspace(1, 2, loss.numel()).view(loss.shape)
            gradients.append([loss, *torch.autograd.grad(loss, [given, *head.parameters()], sent)])
        for found, expected in zip(*reversed(gradients), strict=True):
            assert relative_difference(found.detach(), expected.detach()) <= 1e-6, options


def lazy(head: nn.Linear, given: torch.Tensor) -> LazyLogits:
    made = LazyHead(
        head.forward, list(head.parameters()), vocabulary=head.out_features, chunk_tokens=CHUNK
    )
    return LazyLogits.make(made, given, given.dtype)


@pytest.fixture
def logits() -> Iterator[tuple[LazyLogits, torch.Tensor]]:
    torch.manual_seed(0)
    head, given = nn.Linear(WIDTH, VOCABULARY), torch.randn(2, 3, WIDTH, requires_grad=True)
    return lazy(head, given), head(given)


MASK = torch.tensor([[True, False, True], [False, False, True]])
KEPT: list[Callable[[Any], Any]] = [
    lambda x: x.float(),
    lambda x: x.double(),
    lambda x: x.to(torch.bfloat16),
    lambda x: x.to(device="cpu", dtype=torch.float64),
    lambda x: torch.tanh(x / 3) * 3,
    lambda x: 1 - 2 * x,
    lambda x: x * torch.tensor(2.0),
    lambda x: x.clamp(-0.5, 0.5),
    lambda x: x[..., :-1, :],
    lambda x: x[:, 1:],
    lambda x: x[0],
    lambda x: x[0, 1:],
    lambda x: x[MASK],
    lambda x: x[:, torch.tensor([0, 2])],
    lambda x: x[None],
    lambda x: x[:, :, :],
    lambda x: x[1:, ..., :],
    lambda x: x.view(-1, VOCABULARY),
    lambda x: x.reshape(3, 2, VOCABULARY),
    lambda x: x.flatten(0, 1),
    lambda x: x[..., :-1, :].contiguous().view(-1, VOCABULARY).float(),
]
COMPUTED: list[Callable[[Any], Any]] = [
    lambda x: x[..., 0],
    lambda x: x[..., :5],
    lambda x: x[0, 1, 2],
    lambda x: x[:, :, None, 3],
    lambda x: x[[1, 0]],
    lambda x: x.transpose(1, 2),
    lambda x: x.view(6, 2, -1),
    lambda x: x.sum(-1),
    lambda x: x.softmax(-1),
    lambda x: x + torch.ones(VOCABULARY),
    lambda x: torch.cat([x, x]),
    lambda x: torch.maximum(torch.zeros(()), x),
    lambda x: x.argmax(-1),
    lambda x: x.detach(),
    lambda x: functional.log_softmax(x.float(), -1),
    lambda x: functional.cross_entropy(x.transpose(1, 2), torch.tensor([[1, 2, 3], [4, 5, 6]])),
    lambda x: functional.cross_entropy(x.view(-1, VOCABULARY), torch.tensor([1, 2, 3, 4, 5, 6])),
    lambda x: x.mul_(2.0),
    lambda x: x.masked_fill_(MASK[..., None], 0.0),
]


@pytest.mark.parametrize("op", KEPT + COMPUTED)
def test_every_use_has_the_values_of_real_logits(
    op: Callable[[Any], Any], logits: tuple[LazyLogits, torch.Tensor]
) -> None:
    late, real = logits
    found, expected = op(late), op(real)
    assert isinstance(found, LazyLogits) == (op in KEPT)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.requires_grad == expected.requires_grad
    computed = found.compute() if isinstance(found, LazyLogits) else found
    assert (computed.shape, computed.dtype) == (expected.shape, expected.dtype)
    assert relative_difference(computed.detach().float(), expected.detach().float()) <= 1e-6


def test_metadata_computes_nothing(logits: tuple[LazyLogits, torch.Tensor]) -> None:
    late, real = logits
    assert late.shape == real.shape
    assert late.size(-1) == VOCABULARY
    assert (late.dtype, late.device, late.ndim, len(late)) == (torch.float32, real.device, 3, 2)
    assert late.requires_grad
    assert late._real is None
    assert late.sum().requires_grad
    assert late._real is not None
    with torch.no_grad():
        assert torch.equal(late.view(-1), real.view(-1))


def test_looking_without_autograd_keeps_nothing(logits: tuple[LazyLogits, torch.Tensor]) -> None:
    late, real = logits
    with torch.no_grad():
        assert torch.equal(late.argmax(-1), real.argmax(-1))
    assert late._real is None


@pytest.mark.parametrize("grad_mode", [True, False])
def test_edits_stay(grad_mode: bool, logits: tuple[LazyLogits, torch.Tensor]) -> None:
    late, real = logits
    for each in (late, real):
        with torch.set_grad_enabled(grad_mode):
            each.index_fill_(2, torch.tensor([3]), -1.0)
            each[0, 0, :5] = 0.0
            each *= 2
    with torch.no_grad():
        assert torch.equal(late + 0, real)
    losses = [each.logsumexp(-1).sum() for each in (late, real)]
    weights = late._head.weights
    for one, other in zip(*(torch.autograd.grad(x, weights) for x in losses), strict=True):
        assert torch.equal(one, other)


def test_edits_beside_views_are_refused(logits: tuple[LazyLogits, torch.Tensor]) -> None:
    late, _ = logits
    view = late[:, 1:]
    for each in (late, view):
        with pytest.raises(GuardError, match="in-place"), torch.no_grad():
            each.zero_()
    late.sum()
    assert late.mul_(2.0).shape == late.shape


def test_what_bypasses_torch_functions_is_an_error(
    logits: tuple[LazyLogits, torch.Tensor],
) -> None:
    late, _ = logits

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(())

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return torch.ones(2, 3, VOCABULARY)

    with pytest.raises(GuardError, match="have not been computed"):
        Double.apply(late).backward()
    with pytest.raises(GuardError, match="have not been computed"), torch._C.DisableTorchFunction():
        late + 1


def test_logits_of_an_output_are_there_until_the_step() -> None:
    tokens = tokens_of(0)
    with engine_of("llama") as engine:
        reference = copy.deepcopy(engine.module)
        output = engine(input_ids=tokens, labels=tokens)
        assert isinstance(output.logits, LazyLogits)
        expected = reference(input_ids=tokens).logits
        engine.backward(output.loss)
        with torch.no_grad():
            assert relative_difference(output.logits.clone(), expected) <= 1e-6
        engine.step()
        with pytest.raises(GuardError, match=r"before engine\.step"):
            output.logits.argmax(-1)


def test_evaluation_and_generation_have_real_logits() -> None:
    tokens = tokens_of(0)
    with engine_of("llama") as engine:
        with torch.no_grad():
            assert type(engine(input_ids=tokens).logits) is torch.Tensor
        engine.eval()
        assert type(engine(input_ids=tokens).logits) is torch.Tensor
        with torch.no_grad():
            engine.module.generate(tokens[:, :4], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("tier", ["nvme", "device"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_placement_changes_no_bit_of_chunks_over_a_tiled_head(
    name: str, tier: str, tmp_path: Path
) -> None:
    def train(tier: str) -> Run:
        tiling = {"modules": ["lm_head"], "tiles": 3}
        training = {**chunked(name), "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
        config = settings(tier, tmp_path, training=training, tiling=tiling)
        return train_engine(MODELS[name](), config, loss_of, steps=2)

    host = train("host")
    assert_identical(train(tier), host)
    plain = train_plain(MODELS[name](), loss_of, steps=2, accumulation=2, max_norm=1.0)
    assert_close(host, plain, tolerance=1e-6)


def test_activations_elsewhere_change_no_bit(tmp_path: Path) -> None:
    runs = []
    for tier in ("device", "host", "nvme"):
        config = settings(
            "nvme",
            tmp_path,
            training=chunked("llama"),
            tiling={"modules": ["lm_head", "*.gate_proj"], "tiles": 3},
            placement={"activations": tier},
            **({} if tier == "device" else {"activations": {"min_bytes": 1024}}),
        )
        runs.append(train_engine(MODELS["llama"](), config, loss_of, steps=2))
    assert_identical(runs[1], runs[0])
    assert_identical(runs[2], runs[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_beside_and_around_chunks(reentrant: bool, tmp_path: Path) -> None:
    plain = train_plain(MODELS["llama"](), loss_of, steps=2)
    model: Any = MODELS["llama"]()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    config = settings("nvme", tmp_path, training=chunked("llama"))
    assert_close(train_engine(model, config, loss_of, steps=2), plain, tolerance=1e-6)

    def around(engine: Any, index: int) -> torch.Tensor:
        hidden = engine.module.model(input_ids=tokens_of(index)).last_hidden_state

        def loss(hidden: torch.Tensor) -> torch.Tensor:
            logits = engine.module.lm_head(hidden).view(-1, VOCABULARY)
            return functional.cross_entropy(logits, tokens_of(index).flatten())

        result: torch.Tensor = checkpoint(loss, hidden, use_reentrant=reentrant)
        return result

    runs = []
    for training in ({}, chunked("llama")):
        with make_engine(MODELS["llama"](), settings("host", training=training)) as engine:
            runs.append(continue_engine(engine, around, steps=2))
    assert_close(runs[1], runs[0], tolerance=1e-6)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precisions(compute: str) -> None:
    runs = [
        train_engine(
            MODELS["gemma2"](),
            settings("host", compute=compute, training=training),
            loss_of,
            steps=2,
        )
        for training in ({}, chunked("gemma2"))
    ]
    assert_close(runs[1], runs[0], tolerance=2e-2)


def test_autocast_reaches_the_chunks() -> None:
    def autocast_loss(model: Any, index: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, index)

    runs = [
        train_engine(MODELS["llama"](), settings("host", training=training), autocast_loss, steps=1)
        for training in ({}, chunked("llama"))
    ]
    assert_close(runs[1], runs[0], tolerance=2e-2)
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-6)


def test_an_adapted_head(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False)
        model: nn.Module = get_peft_model(transformers_model("llama"), lora)
        return model

    plain = train_plain(adapted(), loss_of, steps=2)
    config = settings("nvme", tmp_path, training=chunked("llama"))
    run = train_engine(adapted(), config, loss_of, steps=2)
    assert_close(run, plain, tolerance=1e-6)


def test_the_head_keeps_its_class_for_everybody_else() -> None:
    model: Any = transformers_model("llama")
    with make_engine(model, settings("host", training=chunked("llama"))):
        assert isinstance(model.lm_head, nn.Linear)
        assert type(model.lm_head) is not nn.Linear
        assert type(copy.deepcopy(model.lm_head)) is nn.Linear
        for protocol in (2, pickle.HIGHEST_PROTOCOL):
            unpickled = pickle.loads(pickle.dumps(model.lm_head, protocol))
            assert type(unpickled) is nn.Linear
            assert torch.equal(unpickled.weight, model.lm_head.weight)
        assert repr(model.lm_head).startswith("Linear(")
    assert type(model.lm_head) is nn.Linear


def test_heads_that_cannot_be_found() -> None:
    with pytest.raises(ConfigError, match="name it in training"):
        offload.initialize(custom(), settings("host", training={"loss_chunk_tokens": 4}))
    with pytest.raises(ConfigError, match="no module 'lm'"):
        make_engine(custom(), settings("host", training={"loss_chunk_tokens": 4, "lm_head": "lm"}))
    with pytest.raises(ConfigError, match="no out_features"):
        make_engine(
            custom(), settings("host", training={"loss_chunk_tokens": 4, "lm_head": "norm"})
        )
    with pytest.raises(ConfigError, match="loss_chunk_tokens is 0"):
        make_engine(custom(), settings("host", training={"lm_head": "out"}))
