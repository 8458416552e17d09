"""Which parameters and buffers stay in fp32 while the module computes in something narrower.

[Note: Kept in fp32]
The user names them by patterns (`precision.keep_fp32`). A transformers model names its own:
`_keep_in_fp32_modules` for fp16, `_keep_in_fp32_modules_strict` for fp16 and bf16, as expressions
that transformers searches for in parameter names; so do we. What is kept has buckets of its own, an
fp32 gradient, and no master beside it: it is its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from offload.errors import ConfigError

if TYPE_CHECKING:
    from offload.config import PrecisionSection


def kept_in_fp32(module: nn.Module, precision: PrecisionSection) -> frozenset[str]:
    """The names of the parameters and buffers of `module` that stay in fp32, all of them.

    Raises:
        ConfigError: a pattern of `precision.keep_fp32` matches nothing; names every such pattern.
    """
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    kept: set[str] = set()
    problems = []
    for pattern in precision.keep_fp32:
        found = {name for name in names if any(fnmatchcase(n, pattern) for n in _and_above(name))}
        if not found:
            problems.append(
                f"precision.keep_fp32: no parameter, buffer or module matches {pattern!r}"
            )
        kept |= found
    if problems:
        raise ConfigError(problems=problems)
    expressions = list(_expressions(module, precision.compute))
    kept |= {name for name in names if any(e.search(name) for e in expressions)}
    return frozenset(kept) if precision.compute != "fp32" else frozenset()


def _and_above(name: str) -> Iterator[str]:
    """A name, and those of the modules that hold it: a.b.c, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _expressions(module: nn.Module, compute: str) -> Iterator[re.Pattern[str]]:
    """What transformers would search for; wrappers around its models are looked through."""
    wanted = ["_keep_in_fp32_modules_strict"] if compute in ("bf16", "fp16") else []
    if compute == "fp16":
        wanted.append("_keep_in_fp32_modules")
    for prefix, owner in module.named_modules():
        for attribute in wanted:
            found = getattr(owner, attribute, None)
            for text in found if isinstance(found, (list, tuple, set)) else ():
                above = re.escape(f"{prefix}.") if prefix else ""
                yield re.compile(f"^{above}.*(?:{text.replace('*', '.*')})")
