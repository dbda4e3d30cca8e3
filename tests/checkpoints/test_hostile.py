"""Files that were made to do harm are a ValueError, and cost little time and memory."""

import struct
import zipfile

import pytest
import torch

import fastdit
from fastdit.checkpoints import inspect, pickles
from fastdit.checkpoints.native import write_tensors

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
PROTOCOL = b"\x80\x02M\xe9\x03."

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def write(path, instructions, legacy=False, compression=zipfile.ZIP_STORED):
    """Write instructions as the content of a PyTorch file."""
    if legacy:
        path.write_bytes(MAGIC + PROTOCOL + b"\x80\x02}." + instructions + b"\x80\x02].")
        return
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", instructions)
        archive.writestr("archive/version", "3\n")


CONTENTS = {
    "None": b"\x80\x02N.",
    "a number": b"\x80\x02K\x05.",
    "a class": b"\x80\x02cfoo\nBar\n.",
    "a namespace": b"\x80\x02cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00aK\x01sb.",
    "lists too deep to show": b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
    "a key too deep to show": b"\x80\x02})" + b"\x85" * 5000 + b"K\x01s.",
    "a key too deep for the stack": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "a string that is not there": b"\x80\x02X" + struct.pack("<i", 2**31 - 1) + b"abc.",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_odd_contents_are_value_errors(tmp_path, content, legacy):
    write(tmp_path / "m.pt", CONTENTS[content], legacy)
    with pytest.raises(ValueError, match="expected"):
        fastdit.load(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="expected"):
        inspect(tmp_path / "m.pt")


def test_a_compressed_record_is_refused_before_it_grows(tmp_path):
    write(tmp_path / "m.pt", b"\x80\x02(" + b"N" * 10**6 + b"t.", False, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"its record archive/data.pkl is compressed"):
        fastdit.load(tmp_path / "m.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_too_many_instructions_or_names_are_refused(tmp_path, monkeypatch, legacy):
    names = b"".join(b"cfoo%d\nBar\n" % i for i in range(50))
    write(tmp_path / "m.pt", b"\x80\x02(" + b"N" * 3000 + names + b"t.", legacy)
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **o: calls.append(a) or load(*a, **o))
    monkeypatch.setattr(pickles, "_MAX_INSTRUCTIONS", 10_000)
    with pytest.raises(ValueError, match=r"it holds more than tensors \(foo\d+.Bar\)"):
        fastdit.load(tmp_path / "m.pt")
    assert 2 < len(calls) < 10  # each name costs another reading
    monkeypatch.setattr(pickles, "_MAX_INSTRUCTIONS", 1000)
    with pytest.raises(ValueError, match="after 1,001 instructions"):
        fastdit.load(tmp_path / "m.pt")


def state():
    return fastdit.DiT(hidden=8, n_layers=1, n_heads=2, num_classes=3).state_dict()


class Wrapper(torch.Tensor):
    """Computes nothing, as the tensors of a sharded model do outside of its processes."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, *_, **__):
        raise NotImplementedError


KINDS = {
    "sparse": lambda t: t.flatten(1).to_sparse(),
    "csr": lambda t: t.flatten(1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[0]]),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "wrapper": Wrapper,
    "scalar": lambda t: t.sum(),
    "expanded": lambda t: torch.zeros(1).expand(1, 10**9, 8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pos_embed", "y_embed.weight", "blocks.0.mlp.0.weight"])
def test_tensors_of_other_kinds_are_value_errors(kind, name):
    tensors = state()
    tensors[name] = KINDS[kind](tensors[name])
    with pytest.raises(ValueError, match="expected|unexpected"):
        fastdit.load(tensors, n_heads=2)
    live = fastdit.DiT(hidden=8, n_layers=1, n_heads=2, num_classes=3)
    live.state_dict = lambda: tensors
    with pytest.raises(ValueError, match="expected"):
        fastdit.load(live)


def test_entries_that_hold_each_other_end():
    inner = {}
    for _ in range(6):
        inner = {str(i): inner for i in range(60)}
    with pytest.raises(ValueError, match="expected at most 10000 entries that hold others"):
        fastdit.load(inner)
    own = {"model": state()}
    own["self"] = own
    with pytest.raises(ValueError, match=r"several fit; pass weights= with one of model, self.mod"):
        fastdit.load(own)


@pytest.mark.parametrize("source", [None, 5, [], b"path", torch.zeros(2)])
def test_a_source_of_another_type_is_a_value_error(source):
    with pytest.raises(ValueError, match="source: expected a path, tensors by name or a module"):
        fastdit.load(source)


@pytest.mark.parametrize("option", ["num_classes", "img_size", "in_channels"])
@pytest.mark.parametrize("size", [10**12, 10**30, 2**63])
def test_sizes_that_no_memory_holds_are_value_errors(option, size):
    model = fastdit.DiT(hidden=8, n_layers=1, n_heads=2, num_classes=3)
    with pytest.raises(ValueError, match=f"{option}: expected a weight of at most 2"):
        fastdit.load(model, **{option: size})


@pytest.mark.parametrize("diffusion", [5, True, [("T", 5)], "linear"])
def test_a_diffusion_of_another_type_is_a_value_error(diffusion):
    with pytest.raises(
        ValueError, match="diffusion: expected (one of flow, ddpm|.flow. or .ddpm., or a)"
    ):
        fastdit.load(fastdit.DiT(n_layers=1), diffusion=diffusion)


@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_a_header_of_more_layers_than_tensors_builds_none(tmp_path, layers):
    config = fastdit.DiTConfig(n_layers=1).to_dict() | {"n_layers": layers}
    write_tensors(tmp_path / "m", {"x": torch.zeros(1)}, {"config": config})
    with pytest.raises(ValueError, match=rf"expected tensors of {layers} layers, got 1 tensors"):
        fastdit.load(tmp_path / "m")


def test_a_dimension_without_an_integer_is_a_value_error(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        fastdit.load(tmp_path / "m")
