"""DeepSpeed's configuration and interface; deepspeed itself is not needed.

    engine, optimizer, loader, scheduler = offload.integrations.deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config="ds_config.json"
    )

See docs/from-deepspeed.md.
"""

from offload.integrations.deepspeed.idiom import DeepSpeedEngine
from offload.integrations.deepspeed.initializing import initialize
from offload.integrations.deepspeed.reading import Note
from offload.integrations.deepspeed.translation import Translation, translate

__all__ = ["DeepSpeedEngine", "Note", "Translation", "initialize", "translate"]
