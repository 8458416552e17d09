"""Every code block of docs/lightning.md runs, in its order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.docs.pages import blocks

pl: Any = pytest.importorskip("lightning.pytorch")


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return (self.layer(batch) - batch).square().mean()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("loss", self.training_step(batch, index))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*number of training batches.*")
@pytest.mark.filterwarnings("ignore:.*dirpath has changed.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
@pytest.mark.filterwarnings("ignore:.*tensorboardX.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nvme").mkdir()
    data = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4)
    names: dict[str, Any] = {
        "module": Module(),
        "new_module": Module(),
        "train_loader": data,
        "val_loader": data,
    }
    fit, after, again = [b for b in blocks("python") if b.page == "docs/lightning.md"]
    exec(fit.text, names)
    assert names["strategy"].engine.global_steps == 4
    assert names["strategy"].engine.config.precision.compute == "bf16"
    names["checkpoint"] = names["trainer"].checkpoint_callback.best_model_path
    exec(after.text, names)
    assert (tmp_path / "out" / "model.safetensors").exists()
    exec(again.text, names)
    assert names["strategy"].engine.global_steps == 6
