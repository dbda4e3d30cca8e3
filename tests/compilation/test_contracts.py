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
from fastdit.ops.trajectory import DiTWeights, kernel_shape
from fastdit.update import COEFFICIENTS

HEADER = build.SOURCES / "structs.h"
SIZES = dict(rows=1, in_features=2, out_features=3, gelu=0)
LINEAR = SIZES | dict(x=None, weight=None, bias=None, y=None)


def test_the_columns_are_the_references():
    assert columns.COLUMNS == COEFFICIENTS


def test_triton_has_a_constant_for_every_column():
    pytest.importorskip("triton")
    from fastdit.kernels import sampling

    named = [getattr(sampling, name.upper()).value for name in columns.COLUMNS]
    assert named == list(range(sampling.ROW.value))


def test_cpp_has_an_enumerator_for_every_column():
    assert f"-DFASTDIT_COLUMNS={','.join(columns.COLUMNS)}" in build.FLAGS


def test_every_member_of_the_header_is_a_field():
    header = HEADER.read_text()
    assert re.findall(r"\bstruct (\w+)", header) == list(structs.STRUCTS)
    for name, struct in structs.STRUCTS.items():
        body = header.partition(f"struct {name} {{")[2].partition("};")[0]
        lines = [line.partition("//")[0] for line in body.splitlines()]
        declared = re.findall(r"(\*?)(\w+)[,;]", "".join(lines))
        pointers = [(field, kind is ctypes.c_void_p) for field, kind in struct._fields_]
        assert pointers == [(field, star == "*") for star, field in declared]


@pytest.mark.parametrize(
    "line",
    [
        "  double x;",
        "  int64_t a[2];",
        "  float eps = 1e-6f;",
        "  float a; float b;",
        "  const float *x, y",
        "  int64_t f() const { return 1; }",
        "  // a comment alone",
        "",
    ],
)
def test_the_parser_refuses_what_it_does_not_know(line):
    with pytest.raises(ValueError, match="expected members of a struct"):
        structs.parse(f"struct Linear {{\n  int64_t rows;\n{line}\n}};\n")


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


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_struct_of_another_size_is_refused(monkeypatch):
    library = build.library()
    monkeypatch.setitem(structs.STRUCTS, "Linear", Linear)
    with pytest.raises(build.BuildError, match=r"old\.so has a Linear of 72 bytes.* 80; delete"):
        build._check_sizes(library, Path("old.so"))


def test_a_changed_struct_is_another_library(monkeypatch, tmp_path):
    copy = shutil.copytree(build.SOURCES, tmp_path / "cpu")
    monkeypatch.setattr(build, "SOURCES", copy)
    before = build._digest()
    header = HEADER.read_text()
    (copy / "structs.h").write_text(header.replace("  float *y;", "  float *y;\n  int64_t stride;"))
    assert build._digest() != before


def test_changed_columns_are_another_library(monkeypatch):
    before = build._digest()
    monkeypatch.setattr(build, "FLAGS", [flag.replace("x0_eps", "x0_e") for flag in build.FLAGS])
    assert build._digest() != before


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_shape_knows_how_many_weights_are_packed(learn_sigma):
    weights = DiTWeights.of(fastdit.DiT(learn_sigma=learn_sigma))
    sizes, eps = kernel_shape(weights.cfg)
    assert Shape(*sizes, *eps).weights == len(weights.packed)
