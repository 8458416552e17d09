"""Rows: edits between steps, raw access, state dicts, files and copies."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from offload.errors import OffloadError
from tests.faults.lab import Run, row
from tests.faults.modules import WIDTH, Blocks, Chain, inputs, loss_of, tokens


def _edit(run: Run, number: int) -> None:
    """One of the ways to change weights, by number."""
    first, second, third, *_ = (b.up.weight for b in run.module.blocks)
    bias = run.module.blocks[0].up.bias
    with torch.no_grad():
        match number:
            case 0:
                first.clamp_(-0.05, 0.05)
                second.mul_(1.5)
                bias.copy_(torch.arange(WIDTH) / 64)
            case 1:
                first.data.mul_(0.5)
                second.data[3] = 0.25
                third.data = third.data * 2
            case 2:
                first.detach().add_(0.125)
                second[0].fill_(0.5)
                third.view(-1)[5:70].zero_()
                third.t()[1].add_(0.25)
            case 3:
                nn.init.constant_(bias, 0.125)
                torch.nn.utils.vector_to_parameters(torch.full((WIDTH,), 0.5), [bias])
                torch.mul(first, 0.5, out=second)
                third[third > 0] *= 2


def _train_and_edit(run: Run) -> None:
    for step in range(8):
        run.train(loss_of(run(inputs(step))))
        _edit(run, step % 4)
        if step % 2:
            run.evict_all()
        run.record("edited", [b.up.weight for b in run.module.blocks])
        run.record("masters", run.weights())


@row("dispatch", "write_back", "views", make=Blocks)
def edits_between_steps(run: Run) -> None:
    _train_and_edit(run)


@row(
    "dispatch",
    "write_back",
    "master_edits",
    make=Blocks,
    runs=("device", "host", "nvme"),
    precision={"compute": "bf16"},
)
def edits_between_steps_in_bf16(run: Run) -> None:
    dtype = torch.bfloat16
    for step in range(8):
        run.train(loss_of(run(inputs(step).to(dtype)).float()))
        _edit_bf16(run, step % 4)
        if step % 2:
            run.evict_all()
        run.record("edited", [b.up.weight for b in run.module.blocks])
        run.record("masters", run.weights())
        for name, master in run.weights().items():
            if "up" in name and step % 4 == 0 and "blocks.0" in name:
                weight = run.module.get_parameter(name).detach().float()
                assert torch.equal(master, weight + 0), f"{name}: the master has not followed"


def _edit_bf16(run: Run, number: int) -> None:
    with torch.no_grad():
        if number == 0:
            run.module.blocks[0].up.weight.mul_(0.5).add_(0.25)
            run.module.blocks[0].up.bias.data.fill_(0.375)
        elif number == 1:
            run.module.blocks[1].up.weight.data.clamp_(-0.0625, 0.0625)
        elif number == 2:
            run.module.blocks[2].up.weight.detach()[0].zero_()
        else:
            run.module.blocks[3].up.weight.data = torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16)


@row("dispatch", "write_back", make=Blocks)
def edits_inside_forward(run: Run) -> None:
    for block in run.module.blocks:
        block.register_forward_pre_hook(_clip)
        block.up.register_forward_pre_hook(_halve)
    for step in range(5):
        run.train(loss_of(run(inputs(step))))


def _clip(block: nn.Module, _: Any) -> None:
    with torch.no_grad():
        block.down.weight.clamp_(-0.125, 0.125)


def _halve(layer: nn.Module, _: Any) -> None:
    layer.bias.data.mul_(0.5)


class EditsItself(nn.Module):
    """A leaf that edits its own weight in its window, by version and past it, before its use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.mul_(0.75)
            self.weight.data.add_(0.0625)
        return torch.tanh(x @ self.weight)


@row("forward", "write_back", make=lambda: nn.Sequential(*(EditsItself() for _ in range(5))))
def edits_by_a_leaf_of_itself(run: Run) -> None:
    for step in range(5):
        run.train(loss_of(run(inputs(step))))


@row("dispatch", "raw_access", "write_back", make=Blocks, pages=7)
def edits_through_raw_memory(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))
        first, second, third, fourth = (b.up.weight for b in run.module.blocks)
        array = first.detach().numpy()
        address = second.data_ptr()
        capsule = torch.from_dlpack(third.detach())
        words = fourth.untyped_storage()
        run.record("loss", run(inputs(step + 50)))  # everything is wanted meanwhile
        run.evict_all()
        array[2, :4] = 0.5
        (ctypes.c_float * 2).from_address(address + 8)[:] = (0.25, 0.125)
        capsule[3] = 0.75
        words[2], words[3] = 128, 62  # 0.25 as far as its high half goes
        run.record("loss", run(inputs(step + 60)))
        run.record("edited", [first, second, third, fourth])
        run.record("masters", run.weights())
        assert array[2, 0] == 0.5


@row("dispatch", "raw_access", make=Blocks, pages=7)
def raw_pointers_stay_valid_until_the_step(run: Run) -> None:
    for step in range(3):
        arrays = [b.up.weight.detach().numpy() for b in run.module.blocks]
        want = [array.copy() for array in arrays]
        loss = loss_of(run(inputs(step)))
        run.backward(loss)
        run.evict_all()
        for array, values in zip(arrays, want, strict=True):
            assert np.array_equal(array, values), "the memory has gone"
        run.record("arrays", [torch.from_numpy(values) for values in want])
        run.step()


@row("dispatch", "write_back", make=Chain)
def state_dicts(run: Run) -> None:
    for step in range(2):
        run.train(loss_of(run(tokens(step)), step))
        state = run.module.state_dict()
        run.record("state dict", dict(state))
        clone = Chain()
        clone.load_state_dict(state)
        run.record("loaded elsewhere", dict(clone.state_dict()))
        torch.manual_seed(step)
        other = {name: torch.randn(value.shape) for name, value in state.items()}
        run.module.load_state_dict(other)
        run.evict_all()
        run.record("loaded", dict(run.module.state_dict()))
        run.record("masters", run.weights())
    if run.engine is not None:
        run.record("engine's", run.offloaded.state_dict())
    else:
        run.record("engine's", dict(run.module.state_dict()))


def _or_refused(act: Any) -> Any:
    """What `act()` gives, or None if the engine refuses it: the two answers that are allowed."""
    try:
        return act()
    except OffloadError:
        return None


def _assert_same(found: Any, expected: dict[str, torch.Tensor], what: str) -> None:
    if found is None:
        return
    assert set(found) <= set(expected), what
    for name, value in found.items():
        assert torch.equal(value, expected[name]), f"{what}: {name} is garbage"


def _saved(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@row("dispatch", make=Chain, runs=("device", "host", "nvme"))
def files_hold_true_values(run: Run) -> None:
    from safetensors.torch import load_file, save_file, save_model

    run.train(loss_of(run(tokens())))
    true = run.weights()
    state = run.module.state_dict
    path = run.folder / "model.safetensors"
    done = 0
    for what, act in {
        "torch.save of a state dict": lambda: _saved(state()),
        "save_file": lambda: save_file(state(), path) or load_file(path),
        "save_model": lambda: save_model(run.module, str(path)) or load_file(path),
        "save_file of the engine's": lambda: (
            save_file(run.offloaded.state_dict(), path) or load_file(path)
        ),
        "torch.save of parameters": lambda: _saved(dict(run.module.named_parameters())),
        "numpy": lambda: {n: torch.from_numpy(p.numpy().copy()) for n, p in state().items()},
    }.items():
        found = _or_refused(act)
        _assert_same(found, true, what)
        done += found is not None
        run.evict_all()
    # Only the device placement has room for all raw pointers at once.
    assert done >= (6 if run.kind == "device" else 2), done
    if run.engine is not None:
        run.offloaded._parts.pager.end_raw_access()


@row("copies", "hook_copies", "dispatch", make=Chain)
def copies_and_pickles(run: Run) -> None:
    run.train(loss_of(run(tokens())))
    want = run.weights()
    deep = copy.deepcopy(run.module)
    pickled = pickle.loads(pickle.dumps(run.module))
    saved = io.BytesIO()
    torch.save(run.module, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for copied in (deep, pickled, loaded):
        run.evict_all()
        for name, parameter in copied.named_parameters():
            assert type(parameter) is nn.Parameter, name
            assert torch.equal(parameter, want[name]), f"{name} is garbage"
        # The copy is a plain module: it trains, and the engine's module does not notice.
        loss = loss_of(copied(tokens(1)), 1)
        loss.backward()
        run.record("loss of a copy", loss)
        run.record("gradients of a copy", [p.grad for p in copied.parameters()])
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1.0)
    run.record("weights", run.weights())
    one = copy.deepcopy(run.module.head.weight)
    assert torch.equal(one, want["head.weight"])
    run.record("view", copy.copy(run.module.head.weight.detach()[0].clone()))
    run.train(loss_of(run(tokens(1)), 1))


@row("dispatch", make=lambda: _tiny_llama(), pages=3, runs=("device", "host", "nvme"))
def save_pretrained_of_transformers(run: Run) -> None:
    from safetensors.torch import load_file

    ids = tokens()
    run.train(run(input_ids=ids, labels=ids).loss)
    true = run.weights()
    target = run.folder / "saved"
    try:
        run.module.save_pretrained(target)
    except OffloadError:
        assert run.kind != "device", "there is room for everything"
    else:
        found = load_file(target / "model.safetensors")
        _assert_same(found, true, "save_pretrained")
        assert found
    run.offloaded._parts.pager.end_raw_access()
    run.train(run(input_ids=ids, labels=ids).loss)


def _tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=WIDTH,
            tie_word_embeddings=True,
        )
    )


@row("forward", "pack", make=lambda: _tiny_llama(), pages=3)
def llama_with_tied_weights_and_generate(run: Run) -> None:
    for step in range(3):
        ids = tokens(step)
        run.train(run(input_ids=ids, labels=ids).loss)
        run.record(
            "generated",
            run.module.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0),
        )


@row("dispatch", "write_back", make=lambda: Blocks(6), pages=16)
def parameters_as_one_vector(run: Run) -> None:
    parameters: Iterable[nn.Parameter] = list(run.module.blocks[1:5].parameters())
    for step in range(3):
        run.train(loss_of(run(inputs(step))))
        vector = nn.utils.parameters_to_vector(parameters)
        run.record("vector", vector)
        nn.utils.vector_to_parameters(vector.detach() * 0.5, parameters)
        run.evict_all()
        run.record("weights", run.weights())
