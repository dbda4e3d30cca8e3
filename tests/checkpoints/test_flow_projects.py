"""Checkpoints of SiT, LightningDiT, REPA and JiT compute what these projects' own code computed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastdit
from fastdit.testing import relative_error

FOLDER = Path(__file__).parents[1] / "golden"
LIGHTNING = ("lightningdit", "lightningdit_qknorm", "lightningdit_wo_shift")
FILES = ("sit", *LIGHTNING, "repa", "jit")
GOLDEN = {name: load_file(FOLDER / f"{name}.safetensors") for name in FILES}
# What no tensor of a tiny model tells.
ANSWERS = {"sit": dict(n_heads=2, null_class=True, diffusion="flow")}
ANSWERS |= dict.fromkeys(LIGHTNING, dict(null_class=True))

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*left out 12 tensors:UserWarning", "ignore:.*assumed. context_start 1:UserWarning"
)


def stored(name):
    """Return the weights of a golden file, in the project's names."""
    return {n.removeprefix("model/"): t for n, t in GOLDEN[name].items() if n.startswith("model/")}


def loaded(name):
    return fastdit.load(stored(name), **ANSWERS.get(name, {}))


@pytest.mark.parametrize("name", FILES)
def test_a_forward_is_the_projects_own(name):
    golden, model = GOLDEN[name], loaded(name)
    with torch.no_grad():
        out = model(golden["forward/x"], golden["forward/t"], golden["forward/y"])
    C = golden["forward/out"].shape[1]  # SiT drops the other half of its outputs
    assert relative_error(out[:, :C], golden["forward/out"]) < 1e-5
