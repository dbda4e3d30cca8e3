"""Models on disk, in fastdit's own layout and in those of other projects.

    model = load("DiT-XL-2-256x256.pt")  # the layout is recognised by the keys
    save(model, "model.safetensors", scheduler, labels)
    inspect("model.safetensors")  # config, diffusion and labels, without the weights

`loading` and `saving` hold these three; `sources` reads what is loaded, and `resolving` finds out
what it is. `native` is fastdit's own file format, with the digests of
`digests`, and `runs` finds the checkpoints of a training run. Other projects' files are read by
`pickles`, which runs no code in them, and `folders`, for those of diffusers. `entries` finds the
weights in what a file holds, `inference` the config that they belong to, and `translation` turns
the names and rows of other projects into fastdit's. `matching` compares them with a model, and
`adaptation` fits a loaded model to other data. `projects` says which projects extend the names of
facebookresearch/DiT and how, `diffusions` which diffusion or flow a model was trained on, and
`latent_stats` reads how its latents were normalised.

`text_models` translates the PixArt and the Stable Diffusion 3 of diffusers, and `text_originals`
those of their own projects, both by the tables of `pieces`; `text_inference` infers their configs,
and `options` reads those of diffusers. `lora` merges the LoRA layers of a live module.
"""

from fastdit.checkpoints.loading import inspect, load, verify
from fastdit.checkpoints.native import CheckpointInfo
from fastdit.checkpoints.saving import SAVED_LAYOUTS, save

__all__ = ["SAVED_LAYOUTS", "CheckpointInfo", "inspect", "load", "save", "verify"]
