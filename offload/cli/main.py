"""The command line: `offload COMMAND`.

Every command imports what it needs when it runs, so that `--help` needs neither torch nor numpy.
Errors of offload are printed as their message, without a traceback; the exit code is then 2. What
Ctrl-C or a second signal ends at once has the exit code 128 plus the signal's number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from signal import SIGINT, Signals
from typing import Any, Literal

import click

from offload import __version__
from offload.cli.interrupt import EXIT_SIGNAL, Interrupted, StopRequest
from offload.errors import OffloadError

_FAILURE = 1  # the command ran, and its answer is no
_ERROR = 2  # an offload error; also click's code for wrong usage


class _Commands(click.Group):
    """Prints offload's errors as one message, and says by the exit code what interrupted it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        click_main: Callable[..., Any] = super().main
        whole = partial(click_main, args, prog_name, complete_var, standalone_mode=False, **extra)
        if not standalone_mode:
            return whole()
        try:
            status = whole()
        except click.ClickException as error:
            error.show()
            status = error.exit_code
        except click.Abort:  # Ctrl-C before or behind the command; click's own status is 1
            status = EXIT_SIGNAL + SIGINT
        sys.exit(status or 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OffloadError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(_ERROR)
        except KeyboardInterrupt as interrupt:
            number = interrupt.signal_number if isinstance(interrupt, Interrupted) else SIGINT
            click.echo(f"interrupted by {Signals(number).name}", err=True)
            ctx.exit(EXIT_SIGNAL + number)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="offload")
def main() -> None:
    """Train models larger than memory: state lives on device, host and NVMe."""


@main.command()
@click.argument("config", type=click.Path(dir_okay=False))
def train(config: str) -> None:
    """Train as CONFIG (TOML or JSON) says."""
    # Before the imports: of a library that an interrupt has imported in part, none is whole again.
    with StopRequest() as stop:
        from offload.cli.train import run

        status = run(config, stop)
    sys.exit(status)


@main.command()
@click.argument("target", type=click.Path())
@click.option(
    "--config", type=click.Path(dir_okay=False), help="Where TARGET is a model: the configuration."
)
@click.option("--batch", type=click.IntRange(min=1), help="Sequences in one forward pass.")
@click.option("--sequence-length", type=click.IntRange(min=1), help="Tokens in one sequence.")
@click.option(
    "--measure/--no-measure",
    default=True,
    help="Measure the lanes shortly where `offload bench` has not done it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    target: str,
    config: str | None,
    batch: int | None,
    sequence_length: int | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Show where training state would live, whether it fits, and what a step would take.

    TARGET is a configuration with [run], or a Hugging Face directory or config.json. No weights are
    loaded. The exit code is 1 if it does not fit.
    """
    from offload.cli.plan import Request, run

    asked = Request(
        Path(target),
        config=None if config is None else Path(config),
        batch=batch,
        sequence_length=sequence_length,
        may_measure=measure,
    )
    if not run(asked, as_json=as_json):
        sys.exit(_FAILURE)


@main.command()
@click.argument("model")
@click.option(
    "-o",
    "--out",
    default="offload.toml",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="The file to write; it must not exist.",
)
@click.option("--data", default="stdlib", show_default=True, help="What to train on: run.data.")
@click.option("--lora", is_flag=True, help="Train adapters beside the frozen model.")
def init(model: str, out: str, data: str, lora: bool) -> None:
    """Write a commented configuration for MODEL and this machine, if it fits.

    MODEL is a Hugging Face folder, its config.json (new weights), or the word built-in.
    """
    from offload.cli.init import Request, write_config

    made = write_config(Request(model, Path(out), data, lora))
    click.echo(f"{made}\n{out} is written: `offload train {out}` trains")


@main.command()
@click.argument("config", type=click.Path(dir_okay=False), required=False)
@click.option("--path", "paths", multiple=True, help="Check this directory too; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(config: str | None, paths: tuple[str, ...], as_json: bool) -> None:
    """Check that training can run here, with CONFIG if given; name a remedy for each trouble."""
    from offload.cli.check import FAILED
    from offload.cli.doctor import examine, render, render_json
    from offload.config import load_config

    checks = examine(load_config(config), paths)
    if as_json:
        render_json(checks)
    else:
        render(checks)
    if any(check.status == FAILED for check in checks):
        sys.exit(_FAILURE)


@main.command()
@click.argument("config", type=click.Path(dir_okay=False), required=False)
@click.option(
    "--path", "paths", multiple=True, help="Measure this directory, too; may be repeated."
)
@click.option("--size", default="256MiB", show_default=True, help="Bytes moved in one pass.")
@click.option("--passes", default=3, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--steps",
    default=5,
    show_default=True,
    type=click.IntRange(min=0),
    help="Training steps to measure, in about a minute; 0: the lanes only.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    config: str | None, paths: tuple[str, ...], size: str, passes: int, steps: int, as_json: bool
) -> None:
    """Measure the lanes of this machine, and how near to their bound training steps come.

    With CONFIG's tiers, placement and I/O settings; the model is that of its [run], or a small
    built-in one.
    """
    from offload.cli.bench import run
    from offload.config import load_config
    from offload.config.sizes import parse_size

    try:
        size_bytes = parse_size(size)
    except ValueError as error:
        raise click.BadParameter(f"{size!r} {error}", param_hint="--size") from None
    sys.exit(
        run(
            load_config(config),
            paths,
            size_bytes=size_bytes,
            passes=passes,
            steps=steps,
            as_json=as_json,
        )
    )


@main.command()
@click.argument("run_dir", type=click.Path(file_okay=False))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    help="The page to write; default: report.html in RUN_DIR.",
)
def report(run_dir: str, output: str | None) -> None:
    """Sum up the run whose output folder is RUN_DIR, also while it is running.

    Prints a summary, and writes a page with charts that needs nothing beside itself.
    """
    from rich.console import Console

    from offload.cli.page import read_config, render_page
    from offload.cli.recording import read_timelines
    from offload.cli.report import read_run
    from offload.cli.summary import print_summary
    from offload.cli.written import write_text

    folder = Path(run_dir)
    run = read_run(folder)
    console = Console()
    print_summary(console, run.outcome)
    name = f"offload: {folder.resolve().name}"
    page = Path(output) if output else folder / "report.html"
    write_text(page, render_page(name, run, read_config(folder), read_timelines(folder)))
    console.print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)


@main.command()
@click.argument("run_dir", type=click.Path(file_okay=False))
@click.option("--step", type=click.IntRange(min=1), help="Default: the last one recorded.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    help="The file to write; default: trace-step-N.json in RUN_DIR.",
)
def trace(run_dir: str, step: int | None, output: str | None) -> None:
    """Export a recorded step of a run as Chrome trace JSON, which Perfetto opens.

    Steps are recorded by `offload train`: those of run.trace_steps.
    """
    from offload.cli.chrome_trace import write_trace
    from offload.cli.recording import recorded_step

    timeline = recorded_step(run_dir, step)
    path = Path(output or Path(run_dir) / f"trace-step-{timeline.step}.json")
    write_trace(timeline, path)
    click.echo(f"step {timeline.step}, {len(timeline.spans)} spans: {path}")


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--tag", help="Which checkpoint of a directory; default: the newest.")
@click.option(
    "--dtype",
    type=click.Choice(["compute", "fp32"]),
    default="compute",
    show_default=True,
    help="compute: as the model computes; fp32: the exact values that the optimizer updates.",
)
@click.option(
    "--delta",
    "base",
    type=click.Path(exists=True, file_okay=False),
    metavar="BASE",
    help="Write only the tensors whose bits differ from BASE's: a folder of safetensors, or a "
    "checkpoint. `apply-delta` makes the export of it.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "dcp"]),
    default="hf",
    show_default=True,
    help="hf: safetensors; dcp: a new directory that torch.distributed.checkpoint loads.",
)
@click.option("--optimizer", is_flag=True, help="With dcp: the optimizer's state and groups, too.")
@click.option(
    "--merge",
    is_flag=True,
    help="Of a checkpoint with LoRA adapters: the model with them added in, not the adapters.",
)
def export(
    checkpoint: str,
    out: str,
    tag: str | None,
    dtype: Literal["compute", "fp32"],
    base: str | None,
    form: Literal["hf", "dcp"],
    optimizer: bool,
    merge: bool,
) -> None:
    """Write the weights of CHECKPOINT to OUT, as transformers' from_pretrained reads them.

    Of a checkpoint with LoRA adapters: the adapters, as peft reads them, or with --merge the model.
    """
    if merge and (form == "dcp" or base is not None):
        raise click.UsageError("--merge is of safetensors, not with --format dcp or --delta")
    if form == "hf" and optimizer:
        raise click.UsageError("--optimizer needs --format dcp: safetensors for use hold weights")
    if form == "dcp":
        if base is not None:
            raise click.UsageError("--delta is of safetensors: it cannot be with --format dcp")
        from offload.state.dcp_export import export_dcp

        export_dcp(checkpoint, out, tag=tag, dtype=dtype, optimizer=optimizer)
    elif base is not None:
        from offload.errors import format_bytes
        from offload.state.delta import export_delta

        delta = export_delta(checkpoint, base, out, tag=tag, dtype=dtype)
        total = delta.num_changed + delta.num_unchanged
        click.echo(
            f"{delta.num_changed} of {total} tensors differ from {base}: "
            f"{format_bytes(delta.changed_bytes)} of {format_bytes(delta.total_bytes)}"
        )
    else:
        from offload.state.merging import export_any

        export_any(checkpoint, out, tag=tag, dtype=dtype, merge=merge)
    _list_files(out)


@main.command("apply-delta")
@click.argument("base", type=click.Path(exists=True, file_okay=False))
@click.argument("delta", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
def apply_delta(base: str, delta: str, out: str) -> None:
    """Write to OUT the export that `export --delta BASE` made DELTA of, bit for bit."""
    from offload.state import delta as deltas

    deltas.apply_delta(base, delta, out)
    _list_files(out)


@main.command("import")
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("source", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option(
    "--optimizer/--weights-only",
    default=None,
    help="Insist on the optimizer's state, or leave it; default: take it if it is there.",
)
@click.option(
    "--strict/--no-strict",
    default=True,
    help="--no-strict: moments that are missing begin at zero, what is in excess is passed over.",
)
def import_(config: str, source: str, out: str, optimizer: bool | None, strict: bool) -> None:
    """Make a checkpoint in OUT from one of another program, of the model of CONFIG's [run].

    SOURCE is a directory of torch.distributed.checkpoint, a universal checkpoint of DeepSpeed, or a
    folder of safetensors. No pickle in it is run.
    """
    from offload.cli.importing import run

    imported, saved = run(config, source, out, optimizer=optimizer, strict=strict)
    click.echo(f"{imported}\nsaved as {saved}")


@main.command()
@click.argument("source", metavar="DS_JSON", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write the TOML to a new file.")
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="KEY=VALUE",
    help='What a key\'s "auto" stands for, e.g. optimizer.params.lr=1e-4; may be repeated.',
)
@click.option(
    "--world-size",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Processes that train_batch_size is divided by.",
)
def translate(source: str, out: str | None, values: tuple[str, ...], world_size: int) -> None:
    """Turn a configuration of DeepSpeed into one of offload; say what became of every key."""
    from offload.cli.translating import run

    pairs = dict(value.partition("=")[::2] for value in values)
    click.echo(run(source, out, pairs, world_size), nl=False)


def _list_files(folder: str) -> None:
    for path in sorted(Path(folder).iterdir()):
        click.echo(path)


@main.command("config-schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration file."""
    import json

    from offload.config import config_json_schema

    click.echo(json.dumps(config_json_schema(), indent=2))


if __name__ == "__main__":
    main()
