"""What Python, Triton and C++ must agree on is declared once, and a difference is seen."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest

import fastdit
from fastdit.kernels import columns
from fastdit.kernels.cpu import build, structs
from fastdit.kernels.shape import Shape
from fastdit.ops.trajectory import PackedDiT, kernel_shape
from fastdit.update import COEFFICIENTS

LINEAR = dict(rows=1, in_features=2, out_features=3, x=None, weight=None, bias=None, y=None)


def test_the_columns_are_the_references():
    assert columns.COLUMNS == COEFFICIENTS


def test_triton_has_a_constant_for_every_column():
    pytest.importorskip("triton")
    from fastdit.kernels import sampling

    named = [getattr(sampling, name.upper()).value for name in columns.COLUMNS]
    assert named == list(range(sampling.ROW.value))


def test_the_header_declares_every_field_and_column():
    header = structs.header()
    assert f"enum : int {{ {', '.join(columns.COLUMNS)}, count }};" in header
    for struct in structs.STRUCTS:
        body = header.partition(f"struct {struct.__name__} {{")[2].partition("};")[0]
        lines = [line.partition("//")[0] for line in body.splitlines()]
        declared = re.findall(r"(\w+)[,;]", "".join(lines))
        assert declared == [name for name, _ in struct._fields_]


@pytest.mark.parametrize(
    ("fields", "named"),
    [(LINEAR | dict(stride=1), "stride"), ({k: LINEAR[k] for k in LINEAR if k != "bias"}, "bias")],
    ids=["one-more", "one-less"],
)
def test_a_struct_takes_all_its_fields_and_no_other(fields, named):
    assert structs.Linear(**LINEAR).in_features == 2
    with pytest.raises(TypeError, match=named):
        structs.Linear(**fields)


class Linear(structs.Struct):
    """The library's Linear with one more field."""

    _fields_ = [*structs.Linear._fields_, ("stride", ctypes.c_int64)]
    declarations = [*structs.Linear.declarations, ("int64_t", ["stride"], "")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_struct_of_another_size_is_refused(monkeypatch):
    library = build.library()
    monkeypatch.setattr(structs, "STRUCTS", (structs.Problem, Linear))
    with pytest.raises(build.BuildError, match=r"old\.so has a Linear of 64 bytes.* 72; delete"):
        build._check_sizes(library, Path("old.so"))


def test_a_changed_struct_is_another_library(monkeypatch):
    before = build._digest()
    monkeypatch.setattr(structs, "STRUCTS", (*structs.STRUCTS[:-1], Linear))
    assert build._digest() != before


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_shape_knows_how_many_weights_are_packed(learn_sigma):
    packed = PackedDiT.of(fastdit.DiT(learn_sigma=learn_sigma))
    sizes, eps = kernel_shape(packed.cfg)
    assert Shape(*sizes, *eps).weights == packed.size
