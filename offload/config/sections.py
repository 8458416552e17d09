"""The sections of a configuration, field by field, with defaults and ranges.

Everything here is frozen. What relates several fields stands in `offload.config.contradictions`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    WithJsonSchema,
)

from offload.config.sizes import (
    SIZE_PATTERN,
    parse_count_or_auto,
    parse_size_or_auto,
)

_SIZE_SCHEMA = {
    "anyOf": [
        {"const": "auto", "type": "string"},
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": SIZE_PATTERN},
    ],
    "x-type": "size or auto",
}
_COUNT_SCHEMA = {
    "anyOf": [{"const": "auto", "type": "string"}, {"type": "integer", "minimum": 1}],
    "x-type": "int or auto",
}
_KINDS: list[JsonValue] = ["auto", "cpu", "cuda", "cuda:0"]
_DEVICE_KIND = re.compile(r"auto|cpu|cuda(:\d+)?")


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: object) -> object:
    if isinstance(value, str) and value:
        value = Path(value).expanduser()
    try:
        is_no_folder = isinstance(value, Path) and value.exists() and not value.is_dir()
    except OSError as error:
        raise ValueError(f"{value} cannot be looked at: {error.strerror}") from error
    if is_no_folder:
        raise ValueError(f"{value} exists and is not a directory")
    return value


def _as_device_kind(value: object) -> object:
    if isinstance(value, str) and _DEVICE_KIND.fullmatch(value) is None:
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, not {value!r}")
    return value


SizeOrAuto = Annotated[
    int | Literal["auto"], PlainValidator(parse_size_or_auto), WithJsonSchema(_SIZE_SCHEMA)
]
CountOrAuto = Annotated[
    int | Literal["auto"], PlainValidator(parse_count_or_auto), WithJsonSchema(_COUNT_SCHEMA)
]
Tier = Literal["auto", "device", "host", "nvme"]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Betas = Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)]
Directory = Annotated[Path, BeforeValidator(_as_path)]
Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_as_tuple),
]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class DeviceTierSection(Section):
    """The accelerator's memory, or without one a budgeted part of host memory."""

    kind: Annotated[
        str,
        BeforeValidator(_as_device_kind),
        Field(json_schema_extra={"pattern": f"^({_DEVICE_KIND.pattern})$", "examples": _KINDS}),
    ] = "auto"
    """`auto` (cuda if there is one, else cpu), `cpu`, `cuda` or `cuda:N`."""
    memory: SizeOrAuto = "auto"
    """Hard budget of the bytes that the engine holds on the device: weights, slots and gradients.
    Activations are not part of it."""


class HostTierSection(Section):
    """Pinned CPU memory."""

    memory: SizeOrAuto = "auto"
    """Hard budget of the bytes that the engine holds in host memory, staging included. `auto` is a
    share of what is available now, under cgroup limits."""
    shrink: bool = True
    """Whether the budget shrinks where memory runs short while training (a cgroup's limit is
    lowered, or other programs take it): state that `auto` has placed on the host moves to
    `tiers.nvme`. See docs/failures.md."""


class NvmeTierSection(Section):
    """Files on one or more disks."""

    paths: Annotated[tuple[Directory, ...], BeforeValidator(_as_tuple)] = ()
    """Directories to keep state in; several are striped. Empty: the tier is not used. Relative
    paths are relative to the current directory."""
    capacity: SizeOrAuto = "auto"
    """Most bytes to allocate over all paths. `auto`: what the plan needs."""
    endurance_tbw: Positive | None = None
    """Terabytes (1e12 bytes) that each path's disk may be written, as its maker rates it (TBW).
    `offload plan` tells how long it lasts; nothing else reads it."""


class TiersSection(Section):
    """Where state can live, and how much of it."""

    device: DeviceTierSection = DeviceTierSection()
    """The accelerator."""
    host: HostTierSection = HostTierSection()
    """Host memory."""
    nvme: NvmeTierSection = NvmeTierSection()
    """Disks."""


class PlacementSection(Section):
    """The home tier of each state class; `auto` fills the fastest tier that has room."""

    weights: Tier = "auto"
    """Home of the weights in the compute dtype."""
    gradients: Tier = "auto"
    """Home of the gradients between backward and the optimizer step."""
    optimizer: Tier = "auto"
    """Home of master weights and moments."""
    update: Literal["auto", "cpu", "device"] | Share = "auto"
    """Where the optimizer updates. `device`: all buckets on the accelerator; a number from 0 to 1:
    that share of them; `auto`: the share that is fastest at the speeds measured at the start. See
    docs/update-on-the-device.md."""
    activations: Tier = "device"
    """Home of what autograd saves for backward. `auto` keeps on the device what fits there, and
    moves the rest to the fastest tier that has room."""


class ActivationsSection(Section):
    """How activations leave the device, when `placement.activations` is not `device`."""

    min_bytes: SizeOrAuto = "auto"
    """Smaller tensors stay on the device. `auto`: 1 MiB."""
    host_memory: SizeOrAuto = "auto"
    """The part of `tiers.host.memory` that they may take. `auto`: what the other state leaves;
    with `placement.activations = "nvme"` at most 256 MiB, for the way there and back."""
    device_memory: SizeOrAuto = "auto"
    """With `placement.activations = "auto"`: bytes of them that stay on the device, beside
    `tiers.device.memory`. `auto`: half of what that leaves free."""


class PartitionSection(Section):
    """How parameters are grouped into buckets."""

    bucket_elements: CountOrAuto = "auto"
    """Elements of one bucket, the unit that moves. `auto`: at least 8 buckets fit the device."""


class PrecisionSection(Section):
    """Number formats."""

    compute: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of weights and gradients in forward and backward; master weights are fp32."""
    keep_fp32: Names = ()
    """Patterns of names of parameters, buffers or modules that stay in fp32, `*` and `?` as in file
    names. What a transformers model asks for (`_keep_in_fp32_modules`) is kept without them. The
    modules have to cast by themselves, or run under autocast."""
    initial_loss_scale: Positive = 65536.0
    """First loss scale; fp16 only. Default of torch.amp.GradScaler."""
    growth_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    """The scale is multiplied by this after `growth_interval` good steps; fp16 only."""
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The scale is multiplied by this after a non-finite step; fp16 only."""
    growth_interval: Annotated[int, Field(ge=1)] = 2000
    """Good steps in a row before the scale grows; fp16 only."""


class TrainingSection(Section):
    """What a step is."""

    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Backward passes before each optimizer step."""
    accumulation: Literal["micro_batch_major", "layer_major"] = "micro_batch_major"
    """The order in which `engine.accumulate` runs the micro-batches of a step: one after the other,
    or all of them through a layer before any goes on to the next, so that weights move twice a step
    however many there are; see docs/accumulation.md. Losses and gradients are the same."""
    max_grad_norm: NotNegative = 0.0
    """Gradients are clipped to this global norm; 0 is no clipping."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the random numbers drawn during training, e.g. by dropout or as mezo's noise."""
    gradient_dtype: Literal["auto", "fp32", "compute"] = "auto"
    """Dtype gradients accumulate in. `auto`: `compute` with one accumulation step, else `fp32`."""
    loss_chunk_tokens: Annotated[int, Field(ge=0)] = 0
    """Most tokens whose logits exist at once in training: the loss is computed chunk by chunk, and
    again in backward, see docs/tiling.md. 0 = all of them."""
    lm_head: Annotated[str, Field(min_length=1)] | None = None
    """Path of the module that makes the logits, for `loss_chunk_tokens`. Default: what the model's
    `get_output_embeddings()` says."""


class OptimizerGroupSection(Section):
    """Settings of the parameters whose names match; what is not set is as in `[optimizer]`."""

    match: Annotated[Names, Field(min_length=1)]
    """Patterns of parameter names, `*` and `?` as in file names. The first group that matches a
    parameter takes it."""
    lr: NotNegative | None = None
    """Learning rate of this group."""
    betas: Betas | None = None
    """Betas of this group."""
    eps: NotNegative | None = None
    """Epsilon of this group."""
    weight_decay: NotNegative | None = None
    """Weight decay of this group."""
    momentum: NotNegative | None = None
    """Momentum of this group; sgd only."""


class OptimizerSection(Section):
    """The optimizer that is built when `initialize` gets no factory."""

    name: Literal["adamw", "adam", "sgd", "adagrad", "lion", "mezo"] = "adamw"
    """Update rule, with torch.optim's arithmetic. `mezo` trains with forward passes only: no
    gradients, no optimizer state; `step` takes a closure that returns the loss."""
    lr: NotNegative = 1e-4
    """Learning rate."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the moments; adamw, adam and lion."""
    eps: NotNegative = 1e-8
    """Added to the denominator; adamw, adam and adagrad."""
    weight_decay: NotNegative = 0.0
    """Weight decay: decoupled in adamw, lion and mezo, added to the gradient in the others."""
    perturbation: Positive = 1e-3
    """Scale of the noise that is added to the weights in one forward pass and subtracted in the
    other; the paper's epsilon, `zo_eps` in its code; mezo only."""
    momentum: NotNegative = 0.0
    """Momentum; sgd only."""
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Dampening of the momentum; sgd only."""
    nesterov: bool = False
    """Nesterov momentum; sgd only."""
    moments: Literal["fp32", "8bit"] = "fp32"
    """How the optimizer keeps its moments. `8bit`: one byte each and an fp32 scale for 64 of them,
    which changes the numbers; adamw, adam, lion, and sgd with momentum only. See
    docs/lossy-moments.md."""
    groups: Annotated[tuple[OptimizerGroupSection, ...], BeforeValidator(_as_tuple)] = ()
    """Groups with settings of their own, by name pattern; none = one group."""


class LrSchedulerSection(Section):
    """The course of the learning rate."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """`constant`, or a decay to `min_lr_ratio` after the warm-up: `linear` or `cosine`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    total_steps: CountOrAuto = "auto"
    """Optimizer steps until the decay ends. `auto`: `run.steps`."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the decay ends, as a share of the learning rate."""


class OverlapSection(Section):
    """What runs beside the computation. Never changes a number."""

    prefetch: bool = True
    """Fetch buckets before their use, by the recorded trace."""
    prefetch_depth: CountOrAuto = "auto"
    """Most buckets in flight ahead of their use."""
    optimizer: bool = True
    """Read, update and write chunks of the optimizer step beside each other, and beside backward
    and the next forward: see docs/overlapped-step.md."""


class IoSection(Section):
    """How files are read and written. Never changes a number."""

    backend: Literal["auto", "io_uring", "libaio", "threads", "python"] = "auto"
    """System interface; `auto` probes in this order."""
    queue_depth: CountOrAuto = "auto"
    """Most blocks in flight."""
    block_bytes: SizeOrAuto = "auto"
    """Requests are cut into blocks of this size, a multiple of 4096 bytes."""
    threads: CountOrAuto = "auto"
    """Threads of the `threads` and `python` backends."""
    checksum: bool = True
    """Verify every extent that is read back."""
    deadline_seconds: Positive = 60.0
    """An operation that takes longer is an error."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3
    """How often a read or write of an extent that has failed is made again, if the error may be a
    passing one (EIO, a timeout, a lost link), after 0.02, 0.1, 0.5, ... seconds."""


# The newest, and one to fall back on if it is damaged.
KEPT_BY_ITSELF = 2


class CheckpointSection(Section):
    """Checkpoints: where, how often, how many, and how they are written. See docs/saving.md."""

    directory: Directory | None = None
    """Where checkpoints are saved every `every_steps`. For `offload train` the default is
    `checkpoints` in `run.output`."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between two checkpoints that the engine saves by itself, in `engine.step()`;
    0 = none."""
    keep_last: CountOrAuto = "auto"
    """Of the checkpoints in a directory that have no tag of yours, the newest to keep; older ones
    are removed when a new one is durable. `auto`: of those that the engine saves by itself 2, of
    those that you save all."""
    asynchronous: bool = True
    """`save_checkpoint` returns when the state is safe from what comes later; it becomes durable
    beside the training that goes on, see `wait_for_checkpoint`. `false`: when it is durable."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a checkpoint does that becomes due while the one before is still being written: wait for
    it, or not be taken."""
    portable: bool = False
    """Copy state on nvme into the checkpoint, also where the checkpoint could refer to the extents
    that it is in. Then the checkpoint has its own disk space, and the tier needs none for it."""

    @property
    def pinned_versions(self) -> int:
        """Checkpoints that may refer to extents of the nvme tier, of those that are planned."""
        if not self.every_steps or self.portable:
            return 0
        return KEPT_BY_ITSELF if self.keep_last == "auto" else self.keep_last


class GuardSection(Section):
    """How touches of absent parameters are caught."""

    poison: bool = True
    """Map read-only NaN pages in place of absent storage: a missed fault gives NaN, not a crash."""
    gather: Names = ()
    """Paths of modules whose parameters are all present while the module runs: for C++ extensions
    and kernels that take raw pointers."""


class TilingSection(Section):
    """Weights of `nn.Linear` and `nn.Embedding` that come to the device in row ranges.

    See docs/tiling.md. What is too large for the device budget is tiled without being named.
    """

    modules: Names = ()
    """Patterns of module paths, `*` and `?` as in file names: those modules are tiled in any
    case."""
    tiles: CountOrAuto = "auto"
    """Tiles of each tiled weight. `auto`: at least 2, and as few as fit into half of the device
    memory that nothing else must have. The number changes the last bits of gradients."""


class ExpectSection(Section):
    """What a run states about itself; `offload train` fails at its end where it does not hold."""

    weights_over_device: NotNegative | None = None
    """The weights have at least this many times the bytes of the device budget."""
    state_over_host: NotNegative | None = None
    """Weights and optimizer state have at least this many times the bytes of the host budget."""
    nvme_reads_cover_state: bool = False
    """Steps read at least as many bytes from nvme, on average, as weights, gradients and optimizer
    state have beyond the host budget."""
    held_out_loss_fall: Fraction | None = None
    """The held-out loss falls by at least this share of what it was before the first step."""


class LoraSection(Section):
    """Adapters for `offload train`, made by the peft library; the model itself is then frozen."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the adapters."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """Their product is scaled by alpha / r, or alpha / sqrt(r) with `rslora`."""
    dropout: Fraction = 0.0
    """Dropout on what goes into an adapter."""
    targets: Names | Literal["auto", "all-linear"] = "auto"
    """Names, or ends of names, of the modules that get adapters. `all-linear`: all linear layers
    but the output's; `auto`: what peft has for this architecture, else `all-linear`."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), see https://arxiv.org/abs/2312.03732."""
    export: Literal["adapter", "merged"] = "adapter"
    """What `run.export` writes: the adapters, as peft loads them, or the model with the adapters
    added in."""


class RunSection(Section):
    """What `offload train` does."""

    model: str | None = None
    """A Hugging Face directory (its weights are loaded), or a config.json (weights are new)."""
    architecture: str | None = None
    """Class in `transformers`, e.g. `LlamaForCausalLM`. Needed beside `hf_config`; for `model` the
    default is the architecture that its config.json names."""
    hf_config: dict[str, Any] = {}
    """Fields of the architecture's configuration: a model with new weights, instead of `model`."""
    data: str | None = None
    """`stdlib` (the source text of Python's standard library); a file (.txt, .md, .py, .jsonl) or a
    folder of them; a folder of `datasets.save_to_disk`; or `datasets:NAME`, as
    `datasets.load_dataset` finds it offline. Lines of jsonl have `text`, `prompt` and `completion`,
    or `messages`. Tokens are those of the tokenizer beside `model`; without one, bytes. See
    docs/fine-tuning.md."""
    data_split: Annotated[str, Field(min_length=1)] = "train"
    """Split of a data set of the datasets library."""
    validation: Annotated[str, Field(min_length=1)] | Fraction = 0.05
    """What the held-out loss is of: that share of `data`, taken at even distances, or other data,
    named as `data` is; 0 = none."""
    train_on: Literal["completion", "all"] = "completion"
    """Tokens that the loss is of, where the data has `prompt` and `completion`, or `messages`:
    those of completions and assistants' turns, or all."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """How `messages` become text: a Jinja template, or a file with one. Default: that of the
    tokenizer."""
    packing: bool = False
    """Put several examples into one sequence. No example sees another: positions start anew, and
    a model that would attend across them is refused before the first step."""
    too_long: Literal["cut", "drop", "error"] = "cut"
    """What becomes of an example with more than `sequence_length` tokens; how many there are is
    said before the first step."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps to train."""
    batch: Annotated[int, Field(ge=1)] = 1
    """Sequences in one forward pass."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens in one sequence."""
    output: Directory | None = None
    """Folder of the run: metrics, checkpoints, export. Default: `runs/` and the config's name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of new weights and of the order of the data."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations on held-out data; 0 = before the first step and after the last."""
    eval_batches: Annotated[int, Field(ge=1)] = 4
    """Batches of one evaluation."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest held-out loss, under the tag `best`; it is what `export`
    writes. Needs `eval_every`."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Evaluations in a row without a lower held-out loss after which the run ends early; 0 = it
    does not. Needs `eval_every`."""
    freeze: Names = ()
    """Patterns of names of parameters that are not trained, `*` and `?` as in file names."""
    resume: bool = True
    """Go on from the newest whole checkpoint in `checkpoint.directory`, if there is one that this
    model, optimizer and precision can be loaded from. `false`: start anew, beside what is there."""
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between lines on a console that is no terminal; the metrics file has every step."""
    trace_steps: (
        Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_tuple)]
        | Literal["auto"]
    ) = "auto"
    """Steps whose timeline is recorded, for `offload trace` and `offload report`. `auto`: the fifth
    that the run takes. None with `[]`. Never changes a number."""
    sinks: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_as_tuple)
    ] = ()
    """Where the scalars of the metrics file go beside it; their packages have to be installed. See
    docs/seeing.md."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward instead of keeping them."""
    export: bool = False
    """At the end write the model for transformers' from_pretrained, load that and generate text."""
    prompt: str = "def "
    """What the generated text starts with."""
    generate_tokens: Annotated[int, Field(ge=0)] = 200
    """Tokens to generate from the export."""
    expect: ExpectSection = ExpectSection()
    """What must hold at the end."""
