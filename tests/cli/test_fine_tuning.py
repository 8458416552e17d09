"""`offload train` on examples: loss masks, packing, adapters, validation, resuming."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from offload.cli import rows, train
from offload.cli.batches import prepare
from offload.cli.data import ByteTokenizer
from offload.config import load_config
from offload.errors import ConfigError, OffloadError
from offload.telemetry import read_jsonl

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def conversations(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": "the number " * (1 + i % 3) + str(i)},
            ]
        }
        for i in range(count)
    ]


def tiny_config(tmp_path: Path, data: str, **run: object) -> dict:
    return {
        "tiers": {"device": {"kind": "cpu", "memory": "1MiB"}, "host": {"memory": "4MiB"}},
        "partition": {"bucket_elements": 16384},
        "precision": {"compute": "fp32"},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "run": {
            "architecture": "LlamaForCausalLM",
            "hf_config": {
                "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
                "bos_token_id": 256, "eos_token_id": 257,
            },
            "data": data,
            "chat_template": TEMPLATE,
            "steps": 4,
            "batch": 2,
            "sequence_length": 112,
            "output": str(tmp_path / "run"),
            **run,
        },
    }  # fmt: skip


def metrics(tmp_path: Path, name: str = "run") -> dict[str, list[dict]]:
    kinds: dict[str, list[dict]] = {}
    for entry in read_jsonl(tmp_path / name / "metrics.jsonl"):
        kinds.setdefault(entry["kind"], []).append(entry)
    return kinds


def prepared(tmp_path: Path, records: list[dict], **run: object):
    config = tiny_config(tmp_path, write(tmp_path / "d.jsonl", records), **run)
    section = load_config(config).run
    return prepare(section, ByteTokenizer(), tmp_path / "packed")


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_of_completions_alone(tmp_path, packing):
    records = [{"prompt": f"q{i}: ", "completion": "a" * (i + 1)} for i in range(12)]
    data = prepared(tmp_path, records, validation=0, packing=packing, batch=1, sequence_length=64)
    assert data.held_out is None
    completions = []
    for number in range(data.train.windows.num_windows):
        batch = data.train.shuffled(number)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        kept = labels >= 0
        assert torch.equal(labels[kept], ids[kept])
        text = bytes(token if token < 256 else ord("|") for token in labels[kept].tolist())
        completions += [each for each in text.decode().split("|") if each]
        if packing:
            starts = (ids == 256).nonzero()[:, 0].tolist()
            positions = batch["position_ids"][0].tolist()
            assert [i for i, at in enumerate(positions) if at == 0][: len(starts)] == starts
            assert not batch["use_cache"]
    assert sorted(completions) == sorted("a" * (i + 1) for i in range(12))
    rows = data.train.windows.num_windows
    assert rows < 6 if packing else rows == 12


def test_nothing_predicts_the_first_token_of_an_example():
    """Not what fills a row either; and positions start anew."""
    entry = rows.PRESENT | rows.TRAINED
    row = [entry | rows.FIRST | 7, entry | 8, entry | rows.FIRST | 9, rows.PRESENT | 5, entry | 6]
    entries = torch.tensor([row + [0] * 123, [rows.PRESENT | rows.FIRST | 1] + [0] * 127])
    batch = rows.to_batch(entries, packing=True)
    assert batch["input_ids"].shape == (2, 64), "cut where all rows have ended"
    assert batch["labels"][0, :6].tolist() == [-100, 8, -100, -100, 6, -100]
    assert batch["position_ids"][0, :5].tolist() == [0, 1, 0, 1, 2]
    assert (batch["labels"][1] == -100).all()
    padded = rows.to_batch(entries, packing=False)
    assert padded["attention_mask"].sum(1).tolist() == [5, 1]


def test_packing_changes_no_example(tmp_path):
    """The loss of a packed sequence is that of its examples, each by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = tiny_config(tmp_path, "x")["run"]["hf_config"]
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    totals = []
    for packing in (False, True):
        data = prepared(tmp_path, conversations(9), validation=0, packing=packing, batch=1)
        total, count = 0.0, 0
        for number in range(data.train.windows.num_windows):
            batch = data.train.shuffled(number)
            targets = int((batch["labels"][:, 1:] >= 0).sum())
            total += model(**batch).loss.item() * targets
            count += targets
        totals.append((total / count, count))
    assert totals[0][1] == totals[1][1]
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-5)


def test_assistant_turns_are_those_of_the_template(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    marked = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}</>{% endgeneration %}{% else %}"
        "{{ m['content'] }}</>{% endif %}{% endfor %}"
    )
    for template in (TEMPLATE, marked):
        for train_on, expected in (("completion", b"yo</>yo</>"), ("all", None)):
            data = prepared(
                tmp_path, [{"messages": turns * 2}], validation=0, batch=1, train_on=train_on,
                chat_template=template,
            )  # fmt: skip
            labels = data.train.shuffled(0)["labels"][0]
            found = bytes(token for token in labels[labels >= 0].tolist() if token < 256)
            whole = b"<user>hi</><assistant>yo</>" * 2
            assert found == (expected or whole)


def test_bad_lines_are_named_all_at_once(tmp_path):
    records = [*conversations(3), {"messages": []}, {"prompt": "x"}, {"messages": [{"role": 3}]}]
    with pytest.raises(OffloadError) as caught:
        prepared(tmp_path, records)
    text = str(caught.value)
    assert "3 bad line(s)" in text
    for line, what in ((4, "no list"), (5, "has the fields 'prompt'"), (6, "without a role")):
        assert f"d.jsonl:{line}: " in text
        assert what in text
    path = tmp_path / "d.jsonl"
    path.write_text(path.read_text() + "{nothing\n" * 20)
    with pytest.raises(OffloadError, match="10 or more bad"):
        prepare(
            load_config(tiny_config(tmp_path, str(path))).run, ByteTokenizer(), tmp_path / "packed"
        )


def test_what_is_cut_or_dropped_is_counted(tmp_path):
    records = [
        {"prompt": "p", "completion": "short"},
        {"prompt": "p", "completion": "long" * 40},
        {"prompt": "p" * 200, "completion": "never reached"},
    ]
    (note,) = prepared(tmp_path, records, validation=0, batch=1).notes
    assert "2 cut to 112 tokens" in note
    assert "1 with nothing to train on: dropped" in note
    assert "train: 2 examples in 2 sequences" in note
    (note,) = prepared(tmp_path, records, validation=0, batch=1, too_long="drop").notes
    assert "2 longer than 112 tokens: dropped" in note
    with pytest.raises(OffloadError, match=r"d\.jsonl:2: has 163 tokens, more than 112"):
        prepared(tmp_path, records, validation=0, batch=1, too_long="error")


def test_messages_without_a_template_say_so(tmp_path):
    with pytest.raises(OffloadError, match=r"set run\.chat_template"):
        prepared(tmp_path, conversations(3), chat_template=None)


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if loop.last else '' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = conversations(2)[0]["messages"]
    with pytest.raises(OffloadError, match="renders differently once more follows"):
        prepared(tmp_path, [{"messages": turns * 2}], chat_template=template)


def test_adapters_from_chat_to_exports(tmp_path, capsys):
    """LoRA on packed conversations, resumed to the bit; adapter and merged exports agree."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = write(tmp_path / "chat.jsonl", conversations(40))
    config = tiny_config(tmp_path, data, packing=True, eval_every=2, export=True, keep_best=True,
                         validation=0.1, generate_tokens=2)  # fmt: skip
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**config["run"].pop("hf_config"))).save_pretrained(base)
    del config["run"]["architecture"]
    config["run"]["model"] = str(base)
    config["lora"] = {"r": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "down_proj"]}
    config["checkpoint"] = {"every_steps": 1, "keep_last": 5}
    assert train.run(config) == 0
    assert "peft loads it" in capsys.readouterr().out
    expected = metrics(tmp_path)
    assert expected["eval"][-1]["held_out_loss"] < expected["eval"][0]["held_out_loss"]
    saved = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in saved.glob("[bs]*")) == [
        "best", *(f"step-{i:08d}" for i in (1, 2, 3, 4))
    ]  # fmt: skip
    adapter = (tmp_path / "run" / "export" / "adapter_model.safetensors").read_bytes()
    for name in ("best", "step-00000003", "step-00000004"):
        shutil.rmtree(saved / name)
    assert train.run(config) == 0
    found = metrics(tmp_path)
    assert [e["step"] for e in found["step"]] == [1, 2, 3, 4, 3, 4]
    assert [e["loss"] for e in found["step"][4:]] == [e["loss"] for e in found["step"][2:4]]
    again = {e["step"]: e["held_out_loss"] for e in found["eval"][len(expected["eval"]) :]}
    assert again == {e["step"]: e["held_out_loss"] for e in expected["eval"] if e["step"] >= 2}
    assert (tmp_path / "run" / "export" / "adapter_model.safetensors").read_bytes() == adapter

    from click.testing import CliRunner
    from peft import PeftModel

    from offload.cli.main import main

    for name, options in (("adapter", []), ("merged", ["--merge"])):
        command = ["export", str(saved), str(tmp_path / name), *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    ids = torch.arange(8)[None]
    plain = LlamaForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    untouched = LlamaForCausalLM.from_pretrained(base)
    assert torch.equal(adapted(ids).logits, merged(ids).logits)
    assert not torch.equal(untouched(ids).logits, merged(ids).logits)


def test_a_model_that_attends_across_the_border_is_refused(tmp_path, monkeypatch):
    """With its cache, a Llama takes no notice of positions: that has to be seen."""
    from transformers import LlamaForCausalLM

    config = tiny_config(tmp_path, write(tmp_path / "d.jsonl", conversations(20)), packing=True)
    forward = LlamaForCausalLM.forward

    def cached(self, input_ids=None, position_ids=None, use_cache=None, **kwargs):
        return forward(
            self, input_ids=input_ids, position_ids=position_ids, use_cache=True, **kwargs
        )

    monkeypatch.setattr(LlamaForCausalLM, "forward", cached)
    with pytest.raises(ConfigError, match="attends across the border of packed examples"):
        train.run(config)
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids, labels: None)
    with pytest.raises(ConfigError, match="takes no position_ids"):
        train.run(config)


def test_both_orders_of_accumulation_take_packed_examples(tmp_path):
    data = write(tmp_path / "d.jsonl", conversations(30))
    losses = []
    for order in ("micro_batch_major", "layer_major"):
        config = tiny_config(tmp_path, data, steps=2, packing=True, validation=0)
        config["training"] = {"gradient_accumulation_steps": 2, "accumulation": order}
        assert train.run(config) == 0
        losses.append([entry["loss"] for entry in metrics(tmp_path)["step"]])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 2


def test_texts_beside_examples_are_not_passed_over(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "a.jsonl", conversations(5))
    (folder / "b.md").write_text("text")
    section = load_config(tiny_config(tmp_path, str(folder))).run
    with pytest.raises(OffloadError, match=r"1 other text\(s\), e\.g\. .*b\.md"):
        prepare(section, ByteTokenizer(), tmp_path / "packed")


def test_chat_templates_without_jinja_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OffloadError, match="pip install jinja2"):
        prepared(tmp_path, conversations(5))


def test_every_target_counts_the_same_over_micro_batches(tmp_path):
    """Two micro-batches of one example each are one batch of both, to rounding."""
    records = [{"prompt": "q: ", "completion": "ab" * (1 + 9 * i)} for i in range(4)]
    data = write(tmp_path / "d.jsonl", records)
    losses = []
    for count, batch in ((1, 2), (2, 1)):
        config = tiny_config(tmp_path, data, steps=2, batch=batch, validation=0)
        config["training"] = {"gradient_accumulation_steps": count}
        assert train.run(config) == 0
        losses.append([(e["loss"], e["grad_norm"]) for e in metrics(tmp_path)["step"]])
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_run_that_gets_no_better_ends_early_also_when_resumed(tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", conversations(40))
    held_out = write(tmp_path / "v.jsonl", [{"prompt": "zz", "completion": "\x01\x02" * 20}] * 2)
    config = tiny_config(
        tmp_path, data, validation=held_out, steps=40, eval_every=1, patience=3, keep_best=True,
        too_long="drop",
    )  # fmt: skip
    config["checkpoint"] = {"every_steps": 1, "keep_last": 50}
    config["optimizer"]["lr"] = 0.05
    assert train.run(config) == 0
    assert "stopped early: 3 evaluations" in capsys.readouterr().out
    expected = metrics(tmp_path)
    last = expected["step"][-1]["step"]
    losses = {e["step"]: e["held_out_loss"] for e in expected["eval"] if e["step"]}
    best = min(losses, key=losses.get)
    assert last == best + 3 < 40
    saved = tmp_path / "run" / "checkpoints"
    from offload.state.export import export_checkpoint

    weights = [
        export_checkpoint(saved, tmp_path / tag, tag=tag) / "model.safetensors"
        for tag in ("best", f"step-{best:08d}", f"step-{last:08d}")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()
    for step in range(best + 3, last + 1):
        shutil.rmtree(saved / f"step-{step:08d}")
    assert train.run(config) == 0
    assert metrics(tmp_path)["step"][-1]["step"] == last


def test_what_is_frozen_stays(tmp_path):
    data = write(tmp_path / "d.jsonl", conversations(10))
    config = tiny_config(
        tmp_path, data, validation=0, steps=1, freeze=["*embed*", "*.layers.0.*"], export=True,
        generate_tokens=0,
    )  # fmt: skip
    assert train.run(config) == 0
    from safetensors.torch import load_file

    from offload.cli.models import build_model

    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    with torch.no_grad():
        before = build_model(load_config(config).run).state_dict()
    for name, tensor in after.items():
        is_frozen = "embed" in name or ".layers.0." in name
        assert torch.equal(tensor, before[name]) == is_frozen, name
    config["run"]["freeze"] = ["nothing"]
    with pytest.raises(ConfigError, match="'nothing' matches no parameter"):
        train.run(config)
    config["run"]["freeze"] = ["*"]
    with pytest.raises(ConfigError, match="nothing is left to train"):
        train.run(config)


def test_data_sets_of_the_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(conversations(6))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(
        str(tmp_path / "both")
    )
    folder = tmp_path / "lines"
    folder.mkdir()
    write(folder / "train.jsonl", conversations(6))
    expected = None
    for source in (tmp_path / "saved", tmp_path / "both", f"datasets:{folder}", folder):
        section = load_config(tiny_config(tmp_path, str(source), validation=0)).run
        found = prepare(section, ByteTokenizer(), tmp_path / "packed").train.shuffled(0)
        expected = expected or found
        assert all(torch.equal(found[name], expected[name]) for name in expected), source
    section = load_config(tiny_config(tmp_path, str(tmp_path / "both"), data_split="none")).run
    with pytest.raises(OffloadError, match="split 'none'"):
        prepare(section, ByteTokenizer(), tmp_path / "packed")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OffloadError, match="pip install datasets"):
        prepare(section, ByteTokenizer(), tmp_path / "packed")


def test_settings_that_contradict_each_other(tmp_path):
    config = tiny_config(tmp_path, "d", patience=2, keep_best=True, validation=0, export=True)
    config["lora"] = {}
    config["run"]["freeze"] = ["*"]
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    text = str(caught.value)
    for part in ("run.patience needs run.eval_every", "run.keep_best needs run.eval_every",
                 "run.freeze is of no use with [lora]", "choose 'merged'"):  # fmt: skip
        assert part in text
