"""The stored training state as it is at one call, while training goes on.

[Note: Snapshot]
Nothing is copied that nobody is about to change. What the call finds pending (a late update of the
step before) is a part of the snapshot; it is made when the snapshot is *captured*, block by block,
in whatever thread, while the next forward and backward run:

    call       plain values and what is no block are copied. Weights that live on the device, where
               the user reaches them, are captured at once if nothing is pending for them.
    capture    a block's pending update is made; then an extent on NVMe is pinned, and memory is
               the home itself
    barrier    the next thing that overwrites a home (an optimizer step, an edit, a load) waits
               for `BlockStore.captured`: all is captured, and the memory has been copied. A
               forked child is refused instead

What is on NVMe stays readable through its pins until `release`, whatever is written meanwhile.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

import torch

from offload.engine.build import Parts
from offload.engine.state_access import COMPLETIONS, StateAccess, scalar_state
from offload.engine.state_map import StateMap
from offload.errors import BudgetError, CheckpointError
from offload.partition.captured import Captured
from offload.partition.layout import UPDATED_CLASSES
from offload.partition.snapshot import (
    BlockKey,
    MappedTensor,
    Version,
    block_nbytes,
    version_of,
)
from offload.tiers.host import HostLease
from offload.tiers.pins import Pin
from offload.tiers.transfer import Transfer

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_OWNER = "staging of a checkpoint"


class Snapshot:
    """See [Note: Snapshot]. Made between two calls of the engine; `capture` is for one thread.

    Attributes:
        tensors: what is in blocks.
        copies: what is not, by kind, name and field: full tensors on the CPU.
        exposed: the blocks that are to be captured before the engine is used again.
        blocks: the others, in the order in which a forward needs them.
    """

    def __init__(
        self, parts: Parts, state_map: StateMap, access: StateAccess, *, with_gradients: bool
    ) -> None:
        self._parts = parts
        self.copies: dict[tuple[str, str, str], torch.Tensor] = {}
        tensors: list[MappedTensor] = []
        for state in parts.parameters:
            mapped = state_map.tensors[state.index]
            # What completes an edited weight has not followed it yet.
            stale = [field for field in COMPLETIONS if state.edited and field in mapped]
            tensors.extend(tensor for field, tensor in mapped.items() if field not in stale)
            for field in (*state_map.converted[state.index], *stale):
                self.copies["parameter", state.name, field] = access.read(state, field)
            if with_gradients and state.gradient_sums is not None:
                tensors.append(state_map.gradient(state))
                sums = torch.from_numpy(state.gradient_sums.copy())
                self.copies["gradient", state.name, "sums"] = sums
        self.tensors: Sequence[MappedTensor] = tensors
        every = dict.fromkeys(piece.block for tensor in tensors for piece in tensor.pieces)
        self.exposed = [key for key in every if self._is_exposed(key)]
        self.blocks = sorted(every.keys() - set(self.exposed))
        self._edits = {key.bucket: self._edits_of(key) for key in self.blocks}
        # From here on the barrier is closed; nothing above may fail behind it.
        self._captured = parts.store.captured = Captured()

    def nbytes(self, key: BlockKey) -> int:
        """Bytes of a block."""
        return block_nbytes(self._parts.store, key)

    @property
    def has_checksums(self) -> bool:
        """Whether extents have them."""
        return self._parts.config.io.checksum

    def device_of(self, key: BlockKey) -> int | None:
        """`st_dev` of the disk that has the block in a file that can be given a name."""
        block = self._parts.store.block(key.bucket, key.state_class)
        if block.home != "nvme" or not self.has_checksums:
            return None
        assert self._parts.nvme is not None
        return self._parts.nvme.device_of(block.records[key.chunk])

    def reserve_beside_pins(self, device: int, num_versions: int) -> None:
        """Allocate extents for the steps after so many snapshots whose extents stay pinned.

        Raises:
            BudgetError, DiskFullError, StorageError: see `NvmeStore.reserve_beside_pins`.
        """
        counts: Counter[int] = Counter()
        for key in self.blocks:
            if key.state_class in UPDATED_CLASSES and self.device_of(key) == device:
                block = self._parts.store.block(key.bucket, key.state_class)
                counts[self.nbytes(key)] += num_versions if block.bucket.trainable else 0
        if self._parts.nvme is not None:
            self._parts.nvme.reserve_beside_pins(counts)

    def unpinning(self) -> contextlib.AbstractContextManager[None]:
        """See `NvmeStore.unpinning`."""
        nvme = self._parts.nvme
        return contextlib.nullcontext() if nvme is None else nvme.unpinning()

    def start_read(self, pin: Pin, tensor: torch.Tensor) -> Transfer:
        """See `NvmeStore.start_read_pinned`."""
        assert self._parts.nvme is not None
        return self._parts.nvme.start_read_pinned(pin, tensor)

    def try_lease(self, nbytes: int) -> HostLease | None:
        """Staging of the host tier; None: there is none at present."""
        return self._parts.host.visit(nbytes, _OWNER)

    def no_lease(self, nbytes: int) -> BudgetError:
        """The error that says that there was none for long."""
        host = self._parts.host
        return BudgetError(
            tier="host",
            requested_bytes=nbytes,
            free_bytes=host.budget_bytes - host.used_bytes,
            budget_bytes=host.budget_bytes,
            owner=_OWNER,
            remedy="raise tiers.host.memory, or set checkpoint.asynchronous = false",
        )

    def capture(self, key: BlockKey) -> Version | None:
        """What a block says in this snapshot; memory of a home is good until `end_capture`.

        None: it needs staging, and there is none at present.

        Raises:
            BudgetError, StorageError: it could not be read, or its pending update not be made.
        """
        self._parts.updates.apply(key.bucket)
        store = self._parts.store
        block = store.block(key.bucket, key.state_class)
        return version_of(store, block, key.chunk, self.try_lease)

    def late_values(self) -> dict[str, object]:
        """Counters and scalars of the optimizer, which a pending update changes: plain values.

        To be asked for when every block has been captured.
        """
        parameters = self._parts.parameters
        return {
            "parameter_steps": [state.steps for state in parameters],
            "optimizer_scalars": scalar_state(self._parts.updater, parameters),
        }

    def check_unedited(self) -> None:
        """To be called before `end_capture`.

        Raises:
            CheckpointError: a weight that lives on the device was edited since the call.
        """
        for key in {key.bucket: key for key in self.blocks}.values():
            now = self._edits_of(key)
            for name, version in self._edits[key.bucket].items():
                if now[name] != version:
                    raise CheckpointError(
                        f"parameter {name} was edited while its state was being saved",
                        remedy="call wait_for_checkpoint() before the edit, or set "
                        "checkpoint.asynchronous = false",
                    )

    def end_capture(self) -> None:
        """What is in memory has been copied, or is given up: homes may be overwritten."""
        self._captured.set()

    def _is_exposed(self, key: BlockKey) -> bool:
        if key.state_class == "gradients":
            return True
        is_paged = self._parts.pages[key.bucket].is_paged
        is_weight = key.state_class == "weights"
        return is_weight and not is_paged and not self._parts.updates.is_pending(key.bucket)

    def _edits_of(self, key: BlockKey) -> dict[str, int]:
        """By name, the versions of parameters whose home the user reaches."""
        page = self._parts.pages[key.bucket]
        if page.is_paged:
            return {}
        with _NO_GUARD():
            return {p.state.name: p.current_version for p in page.parameters}
