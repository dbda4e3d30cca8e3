"""Models on disk, in fastdit's own layout and in those of other projects.

    model = load("DiT-XL-2-256x256.pt")  # the layout is recognised by the keys
    save(model, "model.safetensors", scheduler, labels)
    inspect("model.safetensors")  # config, diffusion and labels, without the weights

`native` holds these three and fastdit's own file format. `translation` turns the names and rows
of other projects into fastdit's; `pickles` reads their files but runs no code in them, and
`folders` reads the folders of diffusers. `adaptation` fits a loaded model to other data.
"""

from fastdit.checkpoints.native import SAVED_LAYOUTS, CheckpointInfo, inspect, load, save

__all__ = ["SAVED_LAYOUTS", "CheckpointInfo", "inspect", "load", "save"]
