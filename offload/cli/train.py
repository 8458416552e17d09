"""`offload train CONFIG`: data, model, steps, checkpoints, export, summary.

Writes to the run's output folder: config.json, metrics.jsonl (lines of kind "start", "step",
"eval" and "summary"), timeline.jsonl (the steps of run.trace_steps), data/ (token files),
checkpoints/, export/.

A run that finds a checkpoint of its own goes on from there: after a crash the same command again is
all that it takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from offload.cli.batches import Batches, Prepared, prepare
from offload.cli.data import PretrainedTokenizer, Tokenizer
from offload.cli.interrupt import EXIT_SIGNAL, StopRequest
from offload.cli.live import RunView
from offload.cli.machine import machine_of
from offload.cli.models import build_tokenizer, opened_model, vocabulary_size
from offload.cli.progress import Progress, describe_step
from offload.cli.recording import TIMELINE_NAME, Recorder, steps_to_record
from offload.cli.rows import check_separation, refuse_unpackable
from offload.cli.sinks import MetricsWriter, require_sinks
from offload.cli.steps import count_targets, count_tokens, on_device_of, take_step, weighted
from offload.cli.summary import Outcome, failed_expectations, print_summary
from offload.cli.trainable import trainable
from offload.cli.validation import BEST, Validation
from offload.config import OffloadConfig, RunSection, load_config
from offload.errors import ConfigError, OffloadError
from offload.state.adapters import has_adapters
from offload.state.merging import save_merged
from offload.state.session import OffloadEngine, initialize

METRICS_NAME = "metrics.jsonl"
EXIT_EXPECTATION = 1  # the run ended, and something in [run.expect] does not hold


def run(
    config: str | os.PathLike[str] | Mapping[str, Any] | OffloadConfig,
    given_stop: StopRequest | None = None,
) -> int:
    """Train as the config says and return the exit code of `offload train`.

    0 when all steps were taken and every expectation holds, 1 when one does not, 128 plus the
    signal's number when Ctrl-C or SIGTERM ended the run after the step that was under way.
    `given_stop` is looked at between steps; None: one of its own.

    Raises:
        Interrupted: a second signal came; the last save that was complete stays.
        OffloadError: whatever ended the run; checkpoints that were saved before stay.
    """
    given = load_config(config)
    section = _run_section(given)
    require_sinks(section.sinks)
    name = Path(config).stem if isinstance(config, str | os.PathLike) else "run"
    output = section.output or Path("runs") / name
    loaded = _with_directory(given, output / "checkpoints")
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    plain = given.model_dump(mode="json", exclude_unset=True)
    (output / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
    if not _has_checkpoint(loaded):
        (output / METRICS_NAME).unlink(missing_ok=True)
        (output / TIMELINE_NAME).unlink(missing_ok=True)
    transformers_logging.disable_progress_bar()
    with StopRequest() if given_stop is None else contextlib.nullcontext(given_stop) as stop:
        engine, tokenizer, data = _start(section, loaded, output)
        with engine, MetricsWriter(output / METRICS_NAME, section.sinks, plain) as metrics:
            for note in data.notes:
                console.print(note, highlight=False, markup=False, soft_wrap=True)
            training = _Training(engine, section, data, metrics, output)
            outcome = training.run(console, stop)
            if section.export and not stop:
                training.export(output / "export", console)
        print_summary(console, outcome)
        if stop.signal_number is not None:
            console.print(f"stopped by a signal after step {engine.global_steps}")
            return EXIT_SIGNAL + stop.signal_number
    if section.export:
        _show_export(console, section, engine.module, tokenizer, output / "export")
    failed = failed_expectations(outcome, section.expect)
    for line in failed:
        console.print(f"does not hold: run.expect.{line}", highlight=False, soft_wrap=True)
    return EXIT_EXPECTATION if failed else 0


def _run_section(config: OffloadConfig) -> RunSection:
    if config.run is None:
        raise ConfigError(problems=["[run] is missing: it says what to train on which data"])
    if config.run.data is None:
        raise ConfigError(problems=["run.data is missing: 'stdlib', or a file, folder or data set"])
    return config.run


def _start(
    section: RunSection, config: OffloadConfig, output: Path
) -> tuple[OffloadEngine, Tokenizer, Prepared]:
    """The engine, and the data in tokens; what is cheap to refuse is refused first."""
    with opened_model(section) as given:
        num_ids = vocabulary_size(given)
        tokenizer = build_tokenizer(section, num_ids)
        model = trainable(given, config)
        if section.packing:
            refuse_unpackable(model)
        data = prepare(section, tokenizer, output / "data")
        engine = initialize(model, config)
    if data.is_packed:
        try:
            check_separation(engine, num_ids)
        except BaseException:
            engine.close()
            raise
    return engine, tokenizer, data


@dataclass(slots=True)
class _Training:
    """The steps of one run."""

    engine: OffloadEngine
    section: RunSection
    data: Prepared
    metrics: MetricsWriter
    output: Path
    view: RunView = field(init=False)
    validation: Validation = field(init=False)

    def run(self, console: Console, stop: StopRequest) -> Outcome:
        """Take the steps that are left; evaluate before, between and after as configured."""
        section, engine, held_out = self.section, self.engine, self.data.held_out
        outcome = Outcome(placed_bytes=engine.plan.bytes)
        self.validation = Validation.from_client_state(self._resume(), section)
        num_steps = int(section.steps or 0)
        self.metrics.write(
            {
                "kind": "start",
                "step": engine.global_steps,
                "steps": num_steps,
                "placed_bytes": outcome.placed_bytes,
                "machine": machine_of(engine),
            }
        )
        recorder = self._recorder(num_steps)
        self.view = view = RunView(num_steps)
        with Progress(console, steps=num_steps, log_every=section.log_every, view=view) as progress:
            if held_out is not None:
                outcome.held_out_before = self._evaluate_due(held_out, progress)
            self._keep_client_state()
            while self._num_steps() < num_steps and not stop and not self.validation.is_over:
                recorder.begin(self._num_steps() + 1)
                self._step(self.data.train, outcome, progress)
                recorder.collect()
                if held_out is not None and self._num_steps() < num_steps:
                    self._evaluate_due(held_out, progress)
            if self.validation.is_over:
                progress.note(self.validation.describe_end())
            if not stop and held_out is not None:
                outcome.held_out_after = self._evaluate(held_out, progress)
            elif stop and engine.config.checkpoint.every_steps:
                self._save()
            engine.wait_for_checkpoint()
        recorder.collect(now=True)
        self.metrics.write(outcome.to_dict())
        return outcome

    def export(self, folder: Path, console: Console) -> None:
        """Write the model as it is, or was at its best."""
        engine, best = self.engine, self.validation.best
        directory = engine.config.checkpoint.directory
        if self.section.keep_best and best is not None and best.step != self._num_steps():
            assert directory is not None
            engine.load_checkpoint(directory, BEST)
            text = f"exported is the checkpoint of step {best.step}, whose held-out loss was lowest"
            console.print(text, highlight=False, soft_wrap=True)
        lora = engine.config.lora
        if lora is not None and lora.export == "merged":
            save_merged(engine, folder)
        else:
            engine.save_pretrained(folder)

    def _recorder(self, num_steps: int) -> Recorder:
        steps = steps_to_record(self.section.trace_steps, self._num_steps() + 1, num_steps)
        return Recorder(self.engine, self.output / TIMELINE_NAME, steps)

    def _num_steps(self) -> int:
        return self.engine.global_steps + self.engine.skipped_steps

    def _step(self, train: Batches, outcome: Outcome, progress: Progress) -> None:
        engine = self.engine
        started = time.perf_counter()
        number = self._num_steps()
        count = engine.config.training.gradient_accumulation_steps
        batches = [train.shuffled(number * count + micro) for micro in range(count)]
        batches = weighted(batches, engine.module)
        losses, taken = take_step(engine, batches)
        tokens = sum(map(count_tokens, batches))
        seconds = time.perf_counter() - started
        report, loss_mean = engine.report(), sum(losses) / len(losses)
        if taken:
            outcome.reports.append(report)
        outcome.losses.append(loss_mean)
        outcome.tokens += tokens
        outcome.seconds += seconds
        self.metrics.write(
            {
                "kind": "step",
                "step": number + 1,
                "loss": loss_mean,
                "taken": taken,
                "lr": engine.optimizer.param_groups[0]["lr"],
                "grad_norm": engine.grad_norm,
                "projected_gradient": engine.projected_gradient,
                "tokens_per_second": tokens / seconds,
                "report": report.to_dict(),
            }
        )
        self.view.checkpoint = engine.durable_checkpoint
        self.view.add(number + 1, report, loss=loss_mean, tokens_per_second=tokens / seconds)
        parts = describe_step(report, loss=loss_mean, tokens_per_second=tokens / seconds)
        progress.step(number + 1, parts if taken else [*parts, "not finite: skipped"])

    def _evaluate_due(self, held_out: Batches, progress: Progress) -> float | None:
        """The loss before the first step, evaluated if now is that, or an evaluation is due."""
        number = self._num_steps()
        if self.validation.is_due(number):
            self._evaluate(held_out, progress)
        return self.validation.before

    def _evaluate(self, held_out: Batches, progress: Progress) -> float:
        """Mean loss over the targets of the same held-out batches on every call."""
        engine = self.engine
        engine.eval()
        total, num_targets = 0.0, 0
        with torch.no_grad():
            for batch in held_out.spread(self.section.eval_batches):
                count = count_targets(batch)
                total += engine(**on_device_of(engine, batch)).loss.item() * count
                num_targets += count
        engine.train()
        loss, step = total / num_targets, self._num_steps()
        self.metrics.write({"kind": "eval", "step": step, "held_out_loss": loss})
        self.view.held_out = loss
        progress.note(f"held-out loss after {step} steps: {loss:.4f}")
        is_best = self.validation.add(step, loss)
        self._keep_client_state()
        if is_best and self.section.keep_best:
            directory = engine.config.checkpoint.directory
            assert directory is not None
            engine.save_checkpoint(directory, BEST, engine.client_state)
        return loss

    def _keep_client_state(self) -> None:
        self.engine.client_state = self.validation.to_client_state()

    def _save(self) -> None:
        """Save what the last step has left, unless that has been done."""
        engine = self.engine
        directory = engine.config.checkpoint.directory
        assert directory is not None
        if engine.global_steps % engine.config.checkpoint.every_steps:
            engine.save_checkpoint(directory, client_state=engine.client_state)

    def _resume(self) -> dict[str, Any]:
        """Client state of the newest checkpoint; {} when starting anew."""
        engine = self.engine
        torch.manual_seed(engine.config.training.seed)
        directory = engine.config.checkpoint.directory
        if directory is None or not _has_checkpoint(engine.config):
            return {}
        return dict(engine.load_checkpoint(directory))


def _with_directory(config: OffloadConfig, directory: Path) -> OffloadConfig:
    """The config with a place for checkpoints: the user's, or this one."""
    if config.checkpoint.directory is not None:
        return config
    checkpoint = config.checkpoint.model_copy(update={"directory": directory})
    return config.model_copy(update={"checkpoint": checkpoint})


def _has_checkpoint(config: OffloadConfig) -> bool:
    """Whether there is something to go on from, and it is wanted."""
    directory = config.checkpoint.directory
    is_wanted = config.run is not None and config.run.resume
    return is_wanted and directory is not None and any(directory.glob("*/manifest.json"))


def _show_export(
    console: Console,
    section: RunSection,
    module: Any,
    tokenizer: Tokenizer,
    folder: Path,
) -> None:
    """Load the export with transformers, or peft, and generate from it."""
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.save_pretrained(folder)
    base = module.get_base_model() if has_adapters(module) else module
    is_adapter = (folder / "adapter_config.json").is_file()
    source = str(section.model) if is_adapter else folder
    loader: Any = type(base)
    model, loading = loader.from_pretrained(source, dtype="auto", output_loading_info=True)
    wrong = [key for name in ("missing_keys", "unexpected_keys") for key in loading[name]]
    if wrong:
        raise OffloadError(f"the export in {source} does not match its model: {sorted(wrong)[:8]}")
    reader = "transformers"
    if is_adapter:
        from peft import PeftModel

        model, reader = PeftModel.from_pretrained(model, folder), "peft"
    text = f"exported to {folder}; {reader} loads it"
    console.print(text, highlight=False, soft_wrap=True)
    if not model.can_generate() or section.generate_tokens == 0:
        return
    torch.manual_seed(section.seed)
    prompt = torch.tensor([tokenizer.encode_prompt(section.prompt)])
    end = {} if tokenizer.end is None else {"pad_token_id": tokenizer.end}
    with torch.no_grad():
        tokens = model.eval().generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=section.generate_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            **end,
        )
    console.rule("generated by the export")
    console.print(tokenizer.decode(tokens[0].tolist()), highlight=False, markup=False)
    console.rule()
